"""A server in a process of its own, and clients that keep it busy: what the benchmarks over HTTP share.

Each client is a thread with one connection and one request at a time; a new one follows when the answer is there.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

WAIT = 120.0
"""Seconds for an answer, at most."""


class Call(NamedTuple):
    """One HTTP request: its kind, method, path and JSON."""

    kind: str
    method: str
    path: str
    body: dict[str, Any] | None = None


class Answer(NamedTuple):
    """What became of one: the time of its end (`time.monotonic`), the seconds it took, its status (0 without one)."""

    kind: str
    ended: float
    seconds: float
    status: int
    retry_after: str | None
    text: bytes

    @property
    def json(self) -> Any:
        """What it holds."""
        return json.loads(self.text)


class Client:
    """One connection, opened anew where it was closed."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._connection = http.client.HTTPConnection(host, int(port), timeout=WAIT)

    def ask(self, call: Call) -> Answer:
        """Send it and wait for the whole answer; a connection that breaks, or events without an end, have status 0."""
        started = time.monotonic()
        body = None if call.body is None else json.dumps(call.body)
        status, retry_after, text = 0, None, b""
        try:
            self._connection.request(call.method, call.path, body, {"Content-Type": "application/json"})
            response = self._connection.getresponse()
            retry_after, text = response.getheader("Retry-After"), response.read()
            whole = not (call.body or {}).get("stream") or b"event: done" in text
            status = response.status if whole else 0
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            text = repr(error).encode()
        ended = time.monotonic()
        return Answer(call.kind, ended, ended - started, status, retry_after, text)


def keep_busy(
    url: str,
    clients: int,
    seconds: float,
    calls: Callable[[int], Iterator[Call]],
    *,
    warm_up: float = 0.0,
    patience: int = 0,
    answered: Callable[[Answer], None] | None = None,
) -> list[Answer]:
    """Ask with so many clients for so long; the answers that came within that time.

    Args:
        url: of the server.
        clients: how many.
        seconds: how long, once it is warm.
        calls: what a client asks, from its number.
        warm_up: seconds before, whose answers do not count.
        patience: how often a client that is told to come back (`Retry-After`) does; each try is an answer.
        answered: is told of each last answer.
    """
    answers: list[Answer] = []
    stop = time.monotonic() + warm_up + seconds

    def work(number: int) -> None:
        client = Client(url)
        for call in calls(number):
            for _ in range(1 + patience):
                answer = client.ask(call)
                answers.append(answer._replace(text=b""))  # a list's append is atomic
                if answer.retry_after is None or time.monotonic() >= stop:
                    break
                time.sleep(float(answer.retry_after))
            cut = answer.retry_after is not None and time.monotonic() >= stop  # it would have come back
            if answered is not None and not cut:
                answered(answer)
            if time.monotonic() >= stop:
                return

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answer for answer in answers if stop - seconds <= answer.ended < stop]


@contextmanager
def process(command: Sequence[object]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server whose first line begins with its address, until the block ends; that address, answering."""
    free = {name: value for name, value in os.environ.items() if name != "SEARCH_R3_TOKEN"}
    with subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True, env=free) as running:
        try:
            assert running.stdout is not None
            line = running.stdout.readline()
            url = line.split(" ")[0].strip().removesuffix(":")
            if not url.startswith("http://"):
                sys.exit(f"the server did not start: {line!r}")
            health = Call("health", "GET", "/health")
            while Client(url).ask(health).status != 200:
                if running.poll() is not None:
                    sys.exit(f"the server ended with {running.returncode}")
                time.sleep(0.1)
            yield running, url
        finally:
            running.terminate()
            try:
                running.wait(WAIT)
            except subprocess.TimeoutExpired:
                running.kill()


def serve(store: object, *options: object) -> Any:
    """`process` of `search-r3 serve`."""
    command = [sys.executable, "-m", "search_r3.cli", "serve", store, "--port", 0, *options]
    return process(command)


def milliseconds(values: Sequence[float], share: float) -> float | None:
    """A percentile of seconds, by rank; of no values there is none."""
    ranked = sorted(values)
    return round(1000 * ranked[min(len(ranked) - 1, int(share * len(ranked)))], 1) if ranked else None


def rate_and_waits(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Answers with status 200 per second, their milliseconds, and how many others there were."""
    good = [answer.seconds for answer in answers if answer.status == 200]
    waits = {f"p{share}_ms": milliseconds(good, share / 100) for share in (50, 95)}
    return {"per_second": len(good) / seconds, **waits, "failed": len(answers) - len(good)}
