"""The server under load: many clients beside one-at-a-time calls, and documents beside sentence-transformers.

    pip install search-r3[benchmarks]
    python benchmarks/serve.py --model runs/quickstart/model --out runs/bench/serve.json      # 25 minutes
    python benchmarks/serve.py --quick                                                        # a minute

`search-r3 serve` runs in a process of its own, with a store of the collection's documents. Clients ask `/v1/search`
without pause, each one query at a time, for --seconds after a warm-up. One at a time means the same search in Python,
query after query, without a server (`alone`), or by one client of the server; the better of both is what the ratio of
64 clients is taken to.

Documents go to `/v1/embeddings`, --batch of them in a request. The peer is the app that one would write over
sentence-transformers, with FastAPI, the same route and the same form of the answer, over the same weights (our export;
vectors agree to 1e-4). It encodes as many requests at once as suits it best of --peer-threads, tried beforehand.

In each of --runs rounds all sides are measured; every other round goes backwards. A ratio is of medians over rounds.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import check_vectors, finish, machine, need, prepare, say, versions
from http_load import Call, Client, keep_busy, milliseconds, process, rate_and_waits, serve
from pydantic import BaseModel

MODES = ("direct", "reason")
WARM_UP = 0.2
"""Of the measured time, before it."""


class Body(BaseModel):
    """What the peer takes; FastAPI needs its name here."""

    input: list[str]


def peer_app(folder: str, threads: int) -> None:
    """FastAPI over sentence-transformers: `threads` requests are encoded at once, others wait."""
    import threading

    import uvicorn
    from fastapi import FastAPI
    from sentence_transformers import SentenceTransformer

    app, model, turn = FastAPI(), SentenceTransformer(folder, device="cpu"), threading.Semaphore(threads)

    @app.get("/health")
    def health() -> str:
        return "ok"

    @app.post("/v1/embeddings")
    def embeddings(body: Body) -> dict[str, Any]:
        with turn:
            vectors = model.encode_document(body.input, show_progress_bar=False)
        data = [
            {"object": "embedding", "index": place, "embedding": base64.b64encode(vector.tobytes()).decode()}
            for place, vector in enumerate(vectors)
        ]
        return {"object": "list", "data": data, "model": "peer", "usage": {"prompt_tokens": 0, "total_tokens": 0}}

    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_config=None)).run(sockets=[listening])


def shuffled(texts: list[str], seed: int) -> list[str]:
    return random.Random(seed).sample(texts, len(texts))


def searches(queries: list[str], mode: str) -> Callable[[int], Iterator[Call]]:
    """Each client asks all queries, in an order of its own."""
    return lambda number: (
        Call(mode, "POST", "/v1/search", {"query": query, "mode": mode})
        for query in itertools.cycle(shuffled(queries, number))
    )


def embedded(documents: list[str], batch: int) -> Callable[[int], Iterator[Call]]:
    """Each client encodes all documents, in an order of its own."""

    def calls(number: int) -> Iterator[Call]:
        texts = itertools.cycle(shuffled(documents, number))
        while True:
            body = {"model": "search-r3:document", "encoding_format": "base64"}
            yield Call("documents", "POST", "/v1/embeddings", body | {"input": list(itertools.islice(texts, batch))})

    return calls


def alone(search: Callable[[str], Any], queries: list[str], seconds: float) -> dict[str, Any]:
    """Queries one after another, without a server."""
    texts, spent = itertools.cycle(queries), []
    search(next(texts))
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        before = time.perf_counter()
        search(next(texts))
        spent.append(time.perf_counter() - before)
    rate = len(spent) / (time.perf_counter() - started)
    waits = {f"p{share}_ms": milliseconds(spent, share / 100) for share in (50, 95)}
    return {"per_second": rate, **waits, "failed": 0}


def vectors_from(url: str, texts: list[str]) -> np.ndarray:
    answer = Client(url).ask(next(embedded(texts, len(texts))(0)))
    order = shuffled(texts, 0)
    rows = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in answer.json["data"]]
    return np.stack([rows[order.index(text)] for text in texts])


def median_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each number over the rounds."""
    known = {name: [row[name] for row in rows if row[name] is not None] for name in rows[0]}
    medians = {name: median(values) if values else None for name, values in known.items()}
    return medians | {"per_second_by_round": [round(row["per_second"], 2) for row in rows]}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All sides, round after round."""
    from search_r3 import SearchR3
    from search_r3.data.load import load_collection
    from search_r3.model.export import export_sentence_transformers
    from search_r3.serving import Store
    from search_r3.serving.search import StoreSearcher

    collection = load_collection(options.collection)
    queries = sorted({query.text for query in collection.queries.values()})
    queries = shuffled(queries, options.seed)[: options.queries]
    documents = [document.full_text for document in collection.documents.values()]
    store, exported = folder / "store", folder / "peer"
    command = [sys.executable, "-m", "search_r3.cli", "index", store, "--model", options.model]
    subprocess.run([*map(str, command), "--collection", options.collection], check=True, stdout=sys.stderr)
    model = SearchR3(options.model, device="cpu")
    export_sentence_transformers(model.backbone, exported)
    searcher = StoreSearcher(model, Store.open(store))

    def busy(url: str, clients: int, calls: Callable[[int], Iterator[Call]]) -> dict[str, Any]:
        answers = keep_busy(url, clients, options.seconds, calls, warm_up=WARM_UP * options.seconds)
        return rate_and_waits(answers, options.seconds)

    def started_peer(threads: int) -> Any:
        return process([sys.executable, __file__, "--peer", exported, "--peer-threads", threads])

    tried = {}
    for threads in options.peer_threads:
        with started_peer(threads) as (_, url):
            tried[threads] = busy(url, max(options.clients), embedded(documents, options.batch))["per_second"]
            say(f"peer with {threads} requests at once: {options.batch * tried[threads]:.1f} documents/s")
    best = max(tried, key=lambda threads: tried[threads])
    with serve(store) as (_, ours), started_peer(best) as (_, peer):
        difference = check_vectors(vectors_from(ours, documents[:64]), vectors_from(peer, documents[:64]))
        sides: dict[str, Callable[[], dict[str, Any]]] = {}
        for mode in MODES:
            sides[f"{mode}/alone"] = lambda mode=mode: alone(
                lambda query: searcher.search(query, mode).as_dict(), queries, options.seconds
            )
            for clients in options.clients:
                sides[f"{mode}/{clients}"] = lambda mode=mode, clients=clients: busy(
                    ours, clients, searches(queries, mode)
                )
        for clients in options.clients:
            for side, url in (("documents", ours), ("peer", peer)):
                sides[f"{side}/{clients}"] = lambda url=url, clients=clients: busy(
                    url, clients, embedded(documents, options.batch)
                )
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for number in range(options.runs):
            for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
                rows[name].append(sides[name]())
                say(f"round {number + 1}/{options.runs} {name}: {rows[name][-1]}")
    for name in rows:
        if name.startswith(("documents", "peer")):
            for row in rows[name]:
                row["per_second"] *= options.batch
    return {
        "sides": {name: median_of(some) for name, some in rows.items()},
        "largest_difference": difference,
        "peer_threads": best,
        "peer_requests_per_second_by_threads": tried,
        "texts": {"queries": len(queries), "documents": len(documents)},
    }


def ratios_of(sides: dict[str, dict[str, Any]], clients: list[int]) -> dict[str, float]:
    rate = {name: side["per_second"] for name, side in sides.items()}
    most = max(clients)
    ratios = {
        mode: rate[f"{mode}/{most}"] / max(rate[f"{mode}/alone"], rate[f"{mode}/{min(clients)}"]) for mode in MODES
    }
    return ratios | {f"documents/{count}": rate[f"documents/{count}"] / rate[f"peer/{count}"] for count in clients}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--collection", default="atlas")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="documents in a request")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    parser.add_argument("--runs", type=int, default=5, help="rounds; medians count")
    parser.add_argument("--peer-threads", type=int, nargs="+", default=[1, 2, 40], help="40 is FastAPI's own choice")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the JSON object here too")
    parser.add_argument("--quick", action="store_true", help="one round, seconds each")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the servers too
    prepare(options)
    if options.peer:
        peer_app(options.peer, options.peer_threads[0])
        return
    need("torch", "transformers", "sentence_transformers", "fastapi", "lancedb")
    if options.quick:
        options.runs, options.seconds, options.peer_threads, options.queries = 1, 2.0, [1], 128
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(options, Path(scratch))
    record = {"benchmark": "serve", "peer": "FastAPI over sentence-transformers"}
    record |= {"ratios": ratios_of(found["sides"], options.clients), **found}
    record["settings"] = {key: value for key, value in vars(options).items() if key not in ("out", "peer")}
    record["settings"] |= versions("torch", "transformers", "sentence-transformers", "fastapi", "uvicorn", "lancedb")
    finish({**record, "machine": machine()}, options.out)


if __name__ == "__main__":
    main()
