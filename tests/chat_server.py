"""A server of chat completions on this machine, and everything that it was asked."""

from __future__ import annotations

import json
import re
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from search_r3.data.writing import chat
from tests.local_http import local_server

CERTIFICATES = ssl.create_default_context()
Answer = tuple[int, dict[str, str], str]


def completion(content: Any, finish: str = "stop", usage: Any = None, **message: Any) -> Answer:
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    usage = {"prompt_tokens": 100, "completion_tokens": 7} if usage is None else usage
    return 200, {}, json.dumps({"choices": [choice], "usage": usage})


class Server:
    """Chat completions on 127.0.0.1. `answer(what was asked about, how often it was asked before)` makes the reply.

    What was asked about is the query of the prompt, else the title of the article, else what the user says.
    """

    def __init__(self) -> None:
        self.answer: Callable[[str, int], Answer] = lambda title, turn: completion("")
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.titles: list[str] = []
        self.busy = self.busiest = 0
        self.lock = threading.Lock()
        self.http, self.url, self.thread = local_server(self.serve)

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        match = re.search(r"^(?:Query|Title): (.*)$", body["messages"][0]["content"], re.MULTILINE)
        title = match[1] if match else next(one["content"] for one in body["messages"] if one["role"] == "user")
        with self.lock:
            turn = self.titles.count(title)
            self.bodies.append(body)
            self.headers.append({"path": request.path, **{k.lower(): v for k, v in request.headers.items()}})
            self.times.append(time.monotonic())
            self.titles.append(title)
            self.busy += 1
            self.busiest = max(self.busiest, self.busy)
        status, headers, text = self.answer(title, turn)
        with self.lock:
            self.busy -= 1
        request.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(text.encode())))
        request.end_headers()
        request.wfile.write(text.encode())


@contextmanager
def running_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server; no proxy is asked for it, and retries wait for next to nothing."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(chat, "BACKOFF_S", 0.01)
    http = sys.modules.get("httpx2") or sys.modules["httpx"]
    # Without TLS in play, the certificates need not be read anew for each client.
    monkeypatch.setattr(http, "AsyncClient", partial(http.AsyncClient, verify=CERTIFICATES))
    running = Server()
    running.thread.start()
    try:
        yield running
    finally:
        running.http.shutdown()
        running.thread.join()
        running.http.server_close()
