"""The server for a long time: many clients, all routes, and whether it stays as it was.

    pip install search-r3[benchmarks]
    python benchmarks/soak.py --model runs/quickstart/model --out runs/bench/soak.json     # 14 minutes
    python benchmarks/soak.py --quick                                                      # a minute or two

First each route alone is asked for --alone seconds by as many clients as ask it at once later (--beside), as `serve.py`
does: its rate; documents are written and deleted together, so that a deletion finds something. Then for --seconds
all clients ask all routes in a random order, and come back when they are told to (429 with `Retry-After`). The queue is
short (--max-queue) and some requests hold many documents, so that this happens.

- `statuses` counts all answers by route; anything but 200 and 429 is an error, 0 a connection that broke or events that
  ended early.
- `answered_share`: requests that were answered in the end.
- `throughput_share`: the seconds that the answers would have taken at the rates of each route alone, by the seconds
  they took.
- `memory_growth`: resident memory of the last minute by that of the second, less 1; `p95_ms` by minute.

The exit status is 1 where a goal is missed. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from common import finish, machine, need, prepare, say, versions
from http_load import Answer, Call, keep_busy, milliseconds, rate_and_waits, serve

GOALS = {"answered_share": 0.9, "throughput_share": 0.8}
GROWTH = 0.05
OWN_DOCUMENTS = 100
"""Written and removed again, so that the store stays as large as it is."""
MIX = {
    "search/reason": 4,
    "search/direct": 4,
    "search/bm25": 2,
    "search/hybrid": 2,
    "search/stream": 2,
    "embeddings/documents": 4,
    "embeddings/bulk": 1,
    "embeddings/queries": 2,
    "retrieve": 2,
    "rerank": 1,
    "documents/put": 1,
    "documents/get": 2,
    "documents/delete": 1,
    "info": 1,
}
"""Route -> how often, of 29."""
WRITES = ("documents/put", "documents/delete")
ALONE = [*([kind] for kind in MIX if kind not in WRITES), list(WRITES)]
"""What is measured before."""


def one_call(kind: str, draw: random.Random, queries: list[str], texts: list[str]) -> Call:
    """A request of this kind."""
    query, some, many = draw.choice(queries), draw.sample(texts, 8), draw.choices(texts, k=256)
    number = draw.randrange(OWN_DOCUMENTS)
    search = {"query": query, "k": draw.choice([3, 10])}
    own = {"id": f"soak/{number}", "text": f"{draw.choice(texts)} {number}", "metadata": {"year": 2000 + number}}
    method, path, body = {
        "search/reason": ("POST", "/v1/search", search | {"mode": "reason"}),
        "search/direct": ("POST", "/v1/search", search | {"mode": "direct"}),
        "search/bm25": ("POST", "/v1/search", search | {"mode": "bm25"}),
        "search/hybrid": ("POST", "/v1/search", search | {"mode": "direct", "hybrid": True}),
        "search/stream": ("POST", "/v1/search", search | {"mode": "reason", "stream": True}),
        "embeddings/documents": ("POST", "/v1/embeddings", {"model": "search-r3:document", "input": some}),
        "embeddings/bulk": ("POST", "/v1/embeddings", {"model": "search-r3:document", "input": many}),
        "embeddings/queries": ("POST", "/v1/embeddings", {"model": "search-r3:direct", "input": some}),
        "retrieve": ("POST", "/retrieve", {"queries": draw.sample(queries, 2), "topk": 3, "return_scores": True}),
        "rerank": ("POST", "/v2/rerank", {"query": query, "documents": some}),
        "documents/put": ("PUT", "/v1/documents", {"documents": [own]}),
        "documents/get": ("GET", "/v1/documents?limit=20", None),
        "documents/delete": ("DELETE", "/v1/documents", {"ids": [own["id"]]}),
        "info": ("GET", "/info", None),
    }[kind]
    return Call(kind, method, path, body)


def calls_of(kinds: list[str], weights: list[int], queries: list[str], texts: list[str]) -> Callable[[int], Any]:
    """What each client asks, without end."""

    def calls(number: int) -> Iterator[Call]:
        draw = random.Random(f"soak/{number}")
        while True:
            yield one_call(draw.choices(kinds, weights)[0], draw, queries, texts)

    return calls


class Watch:
    """Resident memory of a process, read each second in a thread."""

    def __init__(self, pid: int) -> None:
        self.values: list[tuple[float, int]] = []
        self._process, self._ended = psutil.Process(pid), threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(1.0):
            self.values.append((time.monotonic(), self._process.memory_info().rss))


def by_minute(
    answers: list[Answer], watch: Watch, started: float, seconds: float, minute: float
) -> list[dict[str, Any]]:
    """Of each minute: answers per second, p95 of all and of reasoned searches, MiB."""
    rows = []
    for number in range(int(seconds / minute)):
        start, stop = started + number * minute, started + (number + 1) * minute
        here = [answer for answer in answers if start <= answer.ended < stop and answer.status == 200]
        reasoned = [answer.seconds for answer in here if answer.kind == "search/reason"]
        rss = [value for moment, value in watch.values if start <= moment < stop]
        rows.append(
            {
                "per_second": round(len(here) / minute, 2),
                "p95_ms": milliseconds([answer.seconds for answer in here], 0.95),
                "reason_p95_ms": milliseconds(reasoned, 0.95),
                "mebibytes": round(median(rss) / 2**20, 1) if rss else None,
            }
        )
    return rows


def soak(options: argparse.Namespace, store: Path) -> dict[str, Any]:
    """Each route alone, then all of them."""
    from search_r3.data.load import load_collection

    collection = load_collection(options.collection)
    queries = sorted({query.text for query in collection.queries.values()})
    texts = sorted({document.full_text for document in collection.documents.values()})
    ended: list[int] = []
    with serve(store, "--max-queue", options.max_queue) as (running, url):
        alone = {}
        for kinds in ALONE:
            calls = calls_of(kinds, [1] * len(kinds), queries, texts)
            answers = keep_busy(url, options.beside, options.alone, calls, warm_up=0.2 * options.alone, patience=20)
            alone[kinds[0]] = rate_and_waits(answers, options.alone)
            say(f"{' and '.join(kinds)} alone: {alone[kinds[0]]}")
        say(f"all of them, for {options.seconds:g} s")
        with Watch(running.pid) as watch:
            started = time.monotonic()
            calls = calls_of(list(MIX), list(MIX.values()), queries, texts)
            answers = keep_busy(
                url, options.clients, options.seconds, calls, patience=20,
                answered=lambda answer: ended.append(answer.status),
            )  # fmt: skip
    statuses = {kind: dict(Counter(a.status for a in answers if a.kind == kind)) for kind in MIX}
    done = [answer for answer in answers if answer.status == 200]
    rates = {kind: max(alone[kinds[0]]["per_second"], 1 / options.alone) for kinds in ALONE for kind in kinds}
    needed = sum(1 / rates[answer.kind] for answer in done)
    minutes = by_minute(answers, watch, started, options.seconds, options.minute)
    memory = [row["mebibytes"] for row in minutes]
    return {
        "answered_share": ended.count(200) / len(ended),
        "throughput_share": needed / options.seconds,
        "memory_growth": memory[-1] / memory[min(1, len(memory) - 1)] - 1,
        "errors": sum(answer.status not in (200, 429) for answer in answers),
        "answers_per_second": len(done) / options.seconds,
        "statuses": statuses,
        "minutes": minutes,
        "alone": alone,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--collection", default="atlas")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--beside", type=int, default=8, help="clients of a route that is measured alone")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--alone", type=float, default=15.0, help="seconds of each route before")
    parser.add_argument("--minute", type=float, default=60.0, help="seconds that are told apart")
    parser.add_argument("--max-queue", type=int, default=512, help="of the server: queries, and documents")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the JSON object here too")
    parser.add_argument("--quick", action="store_true", help="seconds in the place of minutes")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the server too
    prepare(options)
    need("torch", "transformers", "fastapi", "lancedb")
    if options.quick:
        options.seconds, options.alone, options.minute = 30.0, 2.0, 10.0
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch) / "store"
        command = [sys.executable, "-m", "search_r3.cli", "index", store, "--model", options.model]
        subprocess.run([*map(str, command), "--collection", options.collection], check=True, stdout=sys.stderr)
        found = soak(options, store)
    record = {"benchmark": "soak", **found}
    record["missed"] = [name for name, least in GOALS.items() if found[name] < least]
    record["missed"] += ["memory_growth"] * (found["memory_growth"] > GROWTH) + ["errors"] * bool(found["errors"])
    record["settings"] = {key: value for key, value in vars(options).items() if key != "out"}
    record["settings"] |= versions("torch", "transformers", "fastapi", "uvicorn", "lancedb")
    finish({**record, "machine": machine()}, options.out)
    sys.exit(1 if record["missed"] else 0)


if __name__ == "__main__":
    main()
