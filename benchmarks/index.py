"""Speed, memory and recall of the vector indexes beside faiss and plain usearch; the last line is one JSON object.

    pip install search-r3[benchmarks]
    python benchmarks/index.py --sizes 10000 100000 --out runs/index.json
    python benchmarks/index.py --sizes 1000000 --skip-hnsw-above 100000 --out runs/index-1m.json   # peak below 14 GiB
    python benchmarks/index.py --quick                                                             # within a minute

The vectors are synthetic and seeded: unit vectors of size 896 that lie, as embeddings do, near a space of few
dimensions. A document is a cluster centre (64 latent dimensions, 200 documents to a cluster) plus noise inside 64 other
directions plus a little noise in all; a query is a document plus such noise. An update stands for a later model: 1 % of
the documents, turned by a small rotation that all share, with some noise of their own, and normalised.

Every contender runs in a process of its own with the same number of threads. Its memory is the peak of anonymous
resident memory since before it was built (on Linux; mapped files, such as the source of the vectors, do not count).
Recall is against a float32 product in numpy, before the updates and after all rounds of them. The ratio of exact search
to faiss's flat index is taken in one process that alternates the two.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import add_worker_arguments, machine, say, seconds, worker

SIZE, QUERIES, K, LATENT, BLOCK = 896, 64, 10, 64, 20_000
ROUNDS_OF_UPDATES, SHARE = 20, 0.01
GRAPHS = ("usearch", "faiss HNSW")


def normalised(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def noise(rng: np.random.Generator, count: int, basis: np.ndarray, inside: float, outside: float) -> np.ndarray:
    """Noise of length about `inside` in the directions of `basis` and `outside` in all."""
    latent = rng.standard_normal((count, LATENT), dtype=np.float32) @ basis * (inside / LATENT**0.5)
    return latent + rng.standard_normal((count, SIZE), dtype=np.float32) * np.float32(outside / SIZE**0.5)


def generate(folder: Path, count: int) -> None:
    """Documents, queries, updates and both truths, as .npy files; in blocks, through memory-mapped files."""
    rng = np.random.default_rng(count)
    bases = rng.standard_normal((2, LATENT, SIZE), dtype=np.float32) / np.float32(SIZE**0.5)
    centres = (
        rng.standard_normal((max(20, count // 200), LATENT), dtype=np.float32) @ bases[0] / np.float32(LATENT**0.5)
    )
    matrix = np.lib.format.open_memmap(folder / "documents.npy", mode="w+", dtype=np.float32, shape=(count, SIZE))
    for start in range(0, count, BLOCK):
        some = min(BLOCK, count - start)
        around = centres[rng.integers(len(centres), size=some)]
        matrix[start : start + some] = normalised(around + noise(rng, some, bases[1], 0.8, 0.2))
    matrix.flush()
    near = matrix[rng.choice(count, QUERIES, replace=False)]
    queries = normalised(near + noise(rng, QUERIES, bases[1], 0.5, 0.1))
    np.save(folder / "queries.npy", queries)
    np.save(folder / "truth.npy", truth(matrix, queries))
    del matrix
    live = np.load(folder / "documents.npy", mmap_mode="c")
    turn = rng.standard_normal((SIZE, SIZE), dtype=np.float32) / np.float32((2 * SIZE) ** 0.5)
    for number in range(ROUNDS_OF_UPDATES):
        rows = rng.choice(count, max(1, int(count * SHARE)), replace=False)
        moved = live[rows] + 0.2 * live[rows] @ (turn - turn.T) + noise(rng, len(rows), bases[1], 0.1, 0.05)
        live[rows] = normalised(moved)
        np.savez(folder / f"update{number}.npz", rows=rows, vectors=live[rows])
    np.save(folder / "truth_after.npy", truth(live, queries))


def truth(matrix: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Rows of the `K` best documents of each query."""
    scores, rows = np.empty((QUERIES, 0), np.float32), np.empty((QUERIES, 0), np.int64)
    for start in range(0, len(matrix), BLOCK):
        block = queries @ matrix[start : start + BLOCK].T
        scores = np.concatenate([scores, block], axis=1)
        rows = np.concatenate([rows, np.tile(np.arange(start, start + block.shape[1]), (QUERIES, 1))], axis=1)
        best = np.argpartition(-scores, K, axis=1)[:, :K]
        scores, rows = np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)
    return rows


def recall(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found.tolist(), expected.tolist(), strict=True)]))


class Ours:
    """An index of this package; rows are those of the source, because its ids descend."""

    def __init__(self, source: np.ndarray, dtype: str, graph: bool, threads: int) -> None:
        from search_r3.retrieval.approximate import ApproximateIndex
        from search_r3.retrieval.index import ExactIndex

        self.index: Any = ExactIndex([f"{len(source) - i:08}" for i in range(len(source))], source, dtype=dtype)
        if graph:
            self.index = ApproximateIndex(self.index)

    def search(self, queries: np.ndarray) -> np.ndarray:
        """Rows of the best documents, `Q x K`."""
        return self.index.search_rows(queries, K)[0]

    def update(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Replace some rows."""
        self.index.update(rows, vectors, 1)


class Usearch:
    """Plain usearch with the settings that `ApproximateIndex` has by default."""

    def __init__(self, source: np.ndarray, threads: int) -> None:
        from usearch.index import Index

        from search_r3.retrieval.approximate import GraphSettings

        settings, self.threads = GraphSettings(), threads
        options = {
            name: getattr(settings, name) for name in ("dtype", "connectivity", "expansion_add", "expansion_search")
        }
        self.index = Index(ndim=SIZE, metric="ip", **options)
        for start in range(0, len(source), BLOCK):
            block = source[start : start + BLOCK]
            self.index.add(np.arange(start, start + len(block), dtype=np.uint64), block, threads=threads)

    def search(self, queries: np.ndarray) -> np.ndarray:
        """Rows of the best documents, `Q x K`."""
        return self.index.search(queries, K, threads=self.threads).keys.astype(np.int64)

    def update(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Replace some rows."""
        self.index.remove(rows.astype(np.uint64), threads=self.threads)
        self.index.add(rows.astype(np.uint64), vectors, threads=self.threads)


class Faiss:
    """faiss's flat index, or its HNSW with the same links and expansions (its M counts links of the upper levels)."""

    def __init__(self, source: np.ndarray, graph: bool, threads: int) -> None:
        import faiss

        faiss.omp_set_num_threads(threads)
        self.faiss = faiss
        if graph:
            from search_r3.retrieval.approximate import GraphSettings

            settings = GraphSettings()
            self.index = faiss.IndexHNSWFlat(SIZE, settings.connectivity, faiss.METRIC_INNER_PRODUCT)
            self.index.hnsw.efConstruction = settings.expansion_add
            self.index.hnsw.efSearch = settings.expansion_search
            self.update = None
        else:
            self.index = faiss.IndexFlatIP(SIZE)
        for start in range(0, len(source), BLOCK):
            self.index.add(source[start : start + BLOCK])

    def search(self, queries: np.ndarray) -> np.ndarray:
        """Rows of the best documents, `Q x K`."""
        return self.index.search(queries, K)[1]

    def update(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """A flat index has no update; this writes into its storage."""
        codes = self.faiss.rev_swig_ptr(self.index.get_xb(), self.index.ntotal * SIZE).reshape(-1, SIZE)
        codes[rows] = vectors


CONTENDERS = {
    "exact float32": lambda source, threads: Ours(source, "float32", False, threads),
    "exact float16": lambda source, threads: Ours(source, "float16", False, threads),
    "faiss flat": lambda source, threads: Faiss(source, False, threads),
    "approximate": lambda source, threads: Ours(source, "float16", True, threads),
    "usearch": Usearch,
    "faiss HNSW": lambda source, threads: Faiss(source, True, threads),
}


class PeakMemory:
    """The peak of anonymous resident memory above what it was at the start, looked at every 20 ms."""

    def __init__(self) -> None:
        self.before = self.peak = self.now()
        threading.Thread(target=self.watch, daemon=True).start()

    def now(self) -> int:
        """Bytes."""
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.exists() else []
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    def watch(self) -> None:
        """Keep the peak, for ever."""
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.02)


def work(name: str, folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    """One contender, in this process."""
    import torch

    torch.set_num_threads(threads)
    source, queries = np.load(folder / "documents.npy", mmap_mode="c"), np.load(folder / "queries.npy")
    if name == "pair":
        ours, peer = CONTENDERS["exact float32"](source, threads), CONTENDERS["faiss flat"](source, threads)
        ours.search(queries), peer.search(queries)
        times = [(seconds(ours.search, queries), seconds(peer.search, queries)) for _ in range(rounds)]
        own, other = zip(*times, strict=True)
        return {"ratio": median(own) / median(other), "seconds": own, "peer_seconds": other}
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # what the library itself takes is not the index's
    memory, started = PeakMemory(), time.perf_counter()
    contender = CONTENDERS[name](source, threads)
    result: dict[str, Any] = {"build_seconds": time.perf_counter() - started}
    found = contender.search(queries)
    times = [seconds(contender.search, queries) for _ in range(rounds)]
    result |= {"queries_per_second": QUERIES / median(times), "recall": recall(found, np.load(folder / "truth.npy"))}
    result |= {"memory_bytes": memory.now() - memory.before, "peak_memory_bytes": memory.peak - memory.before}
    if contender.update is None:
        return {**result, "update_seconds": None, "recall_after_updates": None}
    spent = []
    for number in range(ROUNDS_OF_UPDATES):
        update = np.load(folder / f"update{number}.npz")
        spent.append(seconds(contender.update, update["rows"], update["vectors"]))
    after = recall(contender.search(queries), np.load(folder / "truth_after.npy"))
    return {**result, "update_seconds": median(spent), "recall_after_updates": after}


def compare(count: int, names: list[str], threads: int, rounds: int) -> dict[str, Any]:
    """All contenders on one corpus."""
    with tempfile.TemporaryDirectory() as scratch:
        say(f"{count} documents: generating took {seconds(generate, Path(scratch), count):.0f} s")
        results = {}
        for name in [*names, "pair"]:
            results[name], spent = worker(__file__, name, Path(scratch), threads, rounds)
            found = f"ratio {results[name]['ratio']:.3f}" if name == "pair" else row(count, name, results[name])
            say(f"{found} ({name} took {spent:.0f} s)")
    return {"documents": count, "pair": results.pop("pair"), "contenders": results}


def row(count: int, name: str, result: dict[str, Any]) -> str:
    updates = ["not supported (rebuild)", f"{result['build_seconds']:.1f} (rebuild)"]
    if result["update_seconds"] is not None:
        updates = [f"{result['recall_after_updates']:.3f}", f"{result['update_seconds']:.3f}"]
    memory = " / ".join(f"{result[key] / 2**20:,.0f}" for key in ("memory_bytes", "peak_memory_bytes"))
    speed = f"{result['queries_per_second']:,.0f}"
    cells = [f"{count:,}", name, speed, f"{result['recall']:.3f}", *updates, memory, f"{result['build_seconds']:.1f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--skip-hnsw-above", type=int, default=10**9, help="no plain usearch and faiss HNSW above")
    parser.add_argument("--rounds", type=int, default=9, help="timed searches of 64 queries; the median counts")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="5,000 documents")
    add_worker_arguments(parser)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker, options.folder, options.threads, options.rounds)))
        return
    results = []
    for count in [5_000] if options.quick else options.sizes:
        names = [name for name in CONTENDERS if name not in GRAPHS or count <= options.skip_hnsw_above]
        results.append(compare(count, names, options.threads, options.rounds))

    print(
        "| documents | index | queries/s | recall@10 | recall@10 after 20 x 1 % updated | update of 1 %, s "
        "| memory / peak, MiB | build, s |\n|---|---|---|---|---|---|---|---|"
    )
    for result in results:
        for name, measured in result["contenders"].items():
            print(row(result["documents"], name, measured))
    record = {
        "benchmark": "index",
        "peer": "faiss IndexFlatIP",
        "ratio": results[-1]["pair"]["ratio"],
        "unit": f"time of {QUERIES} exact queries, ours / peer",
        "runs": options.rounds,
        "settings": {
            "ratios": {str(result["documents"]): result["pair"]["ratio"] for result in results},
            **{"size": SIZE, "k": K, "threads": options.threads, "quick": options.quick},
        },
        "machine": machine(),
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**record, "results": results}, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
