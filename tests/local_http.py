"""A small HTTP server on this machine, for the servers that tests talk to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Serve = Callable[[BaseHTTPRequestHandler], None]


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, *arguments: object) -> None: ...  # clients that went away


def local_server(post: Serve, get: Serve | None = None) -> tuple[ThreadingHTTPServer, str, threading.Thread]:
    """A server, the address of its API and the thread that is to run it; without `get` it answers no GET."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            post(self)

        def log_message(self, *arguments: object) -> None: ...

    if get is not None:
        Handler.do_GET = lambda asked: get(asked)  # type: ignore[attr-defined]
    http = _Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    return http, f"http://127.0.0.1:{http.server_port}/v1", thread
