"""How fast a store answers: search latency at 20,000 and 1,000,000 vectors, and recall against exact search.

Vectors are clustered as those of texts are: a thousand centres, and noise around them. Queries are made the same way,
and none of them is stored. Recall is the share of the 10 exact best (numpy, all vectors) that the store returns.

    python benchmarks/serve_store.py --rows 20000
    python benchmarks/serve_store.py --rows 1000000      # some minutes, 3 GB of disk
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import finish, machine, peak_memory, say, seconds, versions

from search_r3.data.documents import Chunk
from search_r3.serving import Fingerprint, Store

BLOCK, CENTRES, WORDS = 10_000, 1000, 5000


def fingerprint(size: int) -> Fingerprint:
    return Fingerprint(
        model="random", dimension=size, max_length=64, embed_token_id=1, frame=(1,), text_ids=(2,), weights="",
        backend="", probe="",
    )  # fmt: skip


def clustered(draw: np.random.Generator, centres: np.ndarray, count: int) -> np.ndarray:
    """Unit vectors `count x D` around the centres."""
    noise = draw.normal(size=(count, centres.shape[1])).astype(np.float32) / np.sqrt(centres.shape[1])
    vectors = centres[draw.integers(len(centres), size=count)] + 0.7 * noise
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def text(draw: np.random.Generator) -> str:
    """Words as frequent as words are."""
    return " ".join(f"w{rank}" for rank in np.minimum(draw.zipf(1.3, size=30), WORDS))


def fill(store: Store, draw: np.random.Generator, centres: np.ndarray, rows: int) -> tuple[np.ndarray, float]:
    """Write rows in blocks; all vectors, and the seconds of writing."""
    everything, spent = np.empty((rows, centres.shape[1]), np.float32), 0.0
    for start in range(0, rows, BLOCK):
        vectors = clustered(draw, centres, min(BLOCK, rows - start))
        chunks = [
            Chunk(f"d{number}", text(draw), parent_id=f"d{number}", start=0, end=1, content_hash=str(number),
                  metadata={"year": int(number % 100)})
            for number in range(start, start + len(vectors))
        ]  # fmt: skip
        spent += seconds(store.upsert, chunks, vectors)
        everything[start : start + len(vectors)] = vectors
        say(f"{start + len(vectors):,} of {rows:,} rows")
    return everything, spent


def nearest(queries: np.ndarray, vectors: np.ndarray) -> list[set[str]]:
    """The ids of the 10 exact best of each query, block by block: all scores at once would take gigabytes."""
    scores, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for start in range(0, len(vectors), BLOCK):
        block = queries @ vectors[start : start + BLOCK].T
        scores = np.hstack([scores, block])
        rows = np.hstack([rows, np.broadcast_to(np.arange(start, start + block.shape[1]), block.shape)])
        best = np.argsort(-scores, axis=1)[:, :10]
        scores, rows = np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)
    return [{f"d{row}" for row in line} for line in rows.tolist()]


def measure(search: Any, count: int) -> dict[str, float]:
    """Milliseconds of one query at a time."""
    search(0)
    times = sorted(seconds(search, number) for number in range(count))
    return {"p50_ms": round(1000 * times[count // 2], 2), "p95_ms": round(1000 * times[int(count * 0.95)], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=256, help="of a vector")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    draw = np.random.default_rng(options.seed)
    centres = clustered(draw, np.zeros((1, options.size), np.float32), CENTRES)
    folder = Path(tempfile.mkdtemp(prefix="serve-store-"))
    try:
        store = Store.create(folder / "store", fingerprint(options.size))
        vectors, writing = fill(store, draw, centres, options.rows)
        record: dict[str, Any] = {"rows": options.rows, "size": options.size, "writing_s": round(writing, 1)}
        record["compact_s"] = round(seconds(store.compact), 1)
        record["index"] = store.index
        record["megabytes"] = round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6, 1)
        queries = clustered(draw, centres, options.queries)
        texts = [text(draw) for _ in range(options.queries)]
        exact = nearest(queries, vectors)
        hits = [[hit.chunk.parent_id for hit in store.search(query[None], k=10)[0]] for query in queries]
        shares = [len(best & set(names)) / 10 for best, names in zip(exact, hits, strict=True)]
        record["recall@10"] = round(float(np.mean(shares)), 4)
        del vectors
        started = time.perf_counter()
        store.search(queries, k=10)
        record["batch_queries_per_s"] = round(options.queries / (time.perf_counter() - started), 1)
        where = {"year": {"$lt": 5}}
        record["vectors"] = measure(lambda number: store.search(queries[number][None], k=10), options.queries)
        record["filtered"] = measure(
            lambda number: store.search(queries[number][None], k=10, where=where), options.queries
        )
        record["words"] = measure(lambda number: store.search(texts=[texts[number]], k=10), options.queries)
        record["hybrid"] = measure(
            lambda number: store.search(queries[number][None], texts=[texts[number]], k=10), options.queries
        )
        one = [Chunk("new", "one more", parent_id="new", start=0, end=1, content_hash="new")]
        record["upsert"] = measure(lambda number: store.upsert(one, queries[number][None]), 30)
        record |= {"peak_bytes": peak_memory(), **machine(), "versions": versions("lancedb", "numpy", "pyarrow")}
        finish(record, options.out)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
