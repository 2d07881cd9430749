"""How the index work of an RL step grows with the corpus, part by part; the last line is one JSON object.

    pip install search-r3[benchmarks]
    python benchmarks/growth.py --out runs/growth.json      # 1,000 to 1,000,000 documents; half an hour, 8 GiB
    python benchmarks/growth.py --only "exact float32" "exact bfloat16" approximate        # minutes, without peers
    python benchmarks/growth.py --quick                     # within a minute

Documents, vectors of size 896, are those of benchmarks/index.py: near a space of 128 dimensions. 512 rollouts, eight to
a query, lie between a relevant document and random directions, so that it ranks anywhere from first to beyond the
thousandth. The same is measured at the largest size for spread documents, whose spectrum is that of real embeddings.

A step is, with
the package's own functions and without the encoding: `choose` (the search, and the shortlist policy's choice),
`refresh` (the index takes new vectors of the chosen documents) and `reward` (ranks of the relevant documents and the
best 100 of every ranking, amended for what moved). `search` is the ten best of every rollout, alone. Peers do what they
can: `choose` is their search, `reward` the search of the 1,000 best in which the relevant document is looked for.

Each contender runs in a process of its own with the same number of threads; memory is the peak of anonymous resident
memory since before it was built. `ranks right` is the share of the relevant documents within the first 1,000, by exact
search of the same vectors, that got this very rank. Exponents are slopes of log(seconds) over log(documents).
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import add_worker_arguments, finish, machine, say, seconds, versions, worker
from index import BLOCK, LATENT, SIZE, PeakMemory, noise, normalised
from index import Faiss as Flat

DEPTH, NEAREST, DEEPEST, GROUP = 10, 100, 1000, 8
PARTS = ("build", "search", "choose", "refresh", "reward", "step")
GOALS = {"exact bfloat16": 4.0, "approximate": 1.0}
"""Seconds of a step at so many documents as follow."""
GOAL_AT = 1_000_000
KINDS = ["near a plane", "spread"]
"""Of documents: those of all sizes, and those of the largest for the contenders that have a goal."""
DECAY = 78
"""The variance of the i-th direction of spread documents falls as exp(-i / DECAY): 56, 81, 91 and 96 % of it are in the
first 64, 128, 192 and 256; of all-MiniLM-L6-v2's vectors of 1,200 texts from six collections, 58, 80, 92 and 97 %."""
STORE_QUERIES = 8
"""The store answers one query at a time; so many are timed, and multiplied."""


def generate(folder: Path, count: int, rollouts: int, kind: str) -> None:
    """Documents, rollouts and the row of the relevant document of each, as .npy files."""
    rng = np.random.default_rng(count)
    if kind == KINDS[1]:
        return generate_spread(folder, count, rollouts, rng)
    bases = rng.standard_normal((2, LATENT, SIZE), dtype=np.float32) / np.float32(SIZE**0.5)
    centres = rng.standard_normal((max(20, count // 200), LATENT), dtype=np.float32) @ bases[0]
    centres /= np.float32(LATENT**0.5)
    matrix = np.lib.format.open_memmap(folder / "documents.npy", mode="w+", dtype=np.float32, shape=(count, SIZE))
    for start in range(0, count, BLOCK):
        some = min(BLOCK, count - start)
        around = centres[rng.integers(len(centres), size=some)]
        matrix[start : start + some] = normalised(around + noise(rng, some, bases[1], 0.8, 0.2))
    matrix.flush()
    relevant = rng.choice(count, -(-rollouts // GROUP), replace=False).repeat(GROUP)[:rollouts]
    far = rng.uniform(0.5, 4, size=(rollouts, 1)).astype(np.float32)
    np.save(folder / "rollouts.npy", normalised(matrix[relevant] + far * noise(rng, rollouts, bases[0], 1.0, 0.2)))
    np.save(folder / "relevant.npy", relevant)


def generate_spread(folder: Path, count: int, rollouts: int, rng: np.random.Generator) -> None:
    """The same with variances that fall as `DECAY` says, in all directions."""
    deviations = np.exp(np.arange(SIZE, dtype=np.float32) / (-2 * DECAY))
    deviations /= np.linalg.norm(deviations)

    def draw(number: int) -> np.ndarray:
        return rng.standard_normal((number, SIZE), dtype=np.float32) * deviations

    centres = draw(max(20, count // 200))
    matrix = np.lib.format.open_memmap(folder / "documents.npy", mode="w+", dtype=np.float32, shape=(count, SIZE))
    for start in range(0, count, BLOCK):
        some = min(BLOCK, count - start)
        matrix[start : start + some] = normalised(centres[rng.integers(len(centres), size=some)] + draw(some))
    matrix.flush()
    relevant = rng.choice(count, -(-rollouts // GROUP), replace=False).repeat(GROUP)[:rollouts]
    far = rng.uniform(0.5, 4, size=(rollouts, 1)).astype(np.float32)
    np.save(folder / "rollouts.npy", normalised(matrix[relevant] + far * draw(rollouts)))
    np.save(folder / "relevant.npy", relevant)


def moved(vectors: np.ndarray, version: int) -> np.ndarray:
    """What a later model makes of some documents."""
    rng = np.random.default_rng(version)
    step = rng.standard_normal(vectors.shape, dtype=np.float32) * np.float32(0.1 / SIZE**0.5)
    return normalised(vectors + step)


class Ours:
    """An index of this package under the environment's own functions; its rows are those of the source."""

    def __init__(self, source: np.ndarray, threads: int, dtype: str, sketch: bool) -> None:
        from search_r3.environment.sketch import SketchIndex
        from search_r3.retrieval.index import ExactIndex

        doc_ids = [f"{len(source) - i:08}" for i in range(len(source))]
        self.store = ExactIndex(doc_ids, source, dtype=dtype)
        self.index: Any = SketchIndex(self.store) if sketch else self.store

    def search(self, queries: np.ndarray) -> None:
        """The ten best of every rollout."""
        self.index.search_rows(queries, DEPTH)

    def step(self, queries: np.ndarray, relevant: np.ndarray, version: int) -> dict[str, float]:
        """Seconds of each part of a step."""
        from search_r3.config import RewardSettings
        from search_r3.data.collection import Collection
        from search_r3.environment.amended import SLACK, Moved, amend
        from search_r3.environment.refresh import RefreshRequest, Shortlist
        from search_r3.environment.scoring import QueryRows, Scorer
        from search_r3.parallel import Communicator
        from search_r3.retrieval.ranking import RestrictedRows

        free, none = RestrictedRows(np.arange(0), None), np.arange(0)
        targets = [QueryRows("q", ["d"], np.array([row]), [1], none, free) for row in relevant]
        positives, limits = [query.positives for query in targets], [free] * len(queries)
        scorer = Scorer(Collection("none", {}, {}, {}), {}, RewardSettings(), k=DEPTH, max_new_tokens=1, depth=NEAREST)
        started = time.perf_counter()
        hits = scorer.search(self.index, queries, targets, NEAREST + SLACK)
        chosen = Shortlist(DEPTH).choose(RefreshRequest(self.index, version, queries, positives, limits, DEPTH, hits))
        spent = {"choose": time.perf_counter() - started}
        rows = np.setdiff1d(chosen, relevant)  # these are fresh before the search
        before = self.index.vectors_at(rows)
        vectors = moved(before, version)
        spent["refresh"] = seconds(self.index.update, rows, vectors, version)
        started = time.perf_counter()
        change = Moved(rows, before, self.index.vectors_at(rows))
        hits = amend(self.index, scorer, Communicator(), hits, change, queries, targets, NEAREST)
        spent["reward"] = time.perf_counter() - started
        self.ranks = np.array([own.ranks[0] for own in hits])
        return spent

    def ranks_right(self, queries: np.ndarray, relevant: np.ndarray) -> float:
        """Of the ranks of the last step, the share within the first 1,000 that exact search confirms."""
        true = np.array(self.store.ranks(queries, [[row] for row in relevant]))[:, 0]
        near = true <= DEEPEST
        return float((self.ranks[near] == true[near]).mean())


class Peer:
    """A peer whose index gives the rows of the best documents."""

    def found(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Rows of the `k` best documents, `Q x k`."""
        raise NotImplementedError

    def update(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Replace some rows."""
        raise NotImplementedError

    def search(self, queries: np.ndarray) -> None:
        """The ten best of every rollout."""
        self.found(queries, DEPTH)

    def step(self, queries: np.ndarray, relevant: np.ndarray, version: int) -> dict[str, float]:
        """Seconds of each part of a step."""
        started = time.perf_counter()
        rows = np.unique(np.append(self.found(queries, DEPTH), relevant))
        spent = {"choose": time.perf_counter() - started}
        self.source[rows] = moved(self.source[rows], version)
        spent["refresh"] = seconds(self.update, rows, self.source[rows])
        started = time.perf_counter()
        best = self.found(queries, min(DEEPEST, len(self.source)))
        spent["reward"] = time.perf_counter() - started
        where = best == relevant[:, None]
        self.ranks = np.where(where.any(axis=1), where.argmax(axis=1) + 1, DEEPEST + 1)
        return spent

    def ranks_right(self, queries: np.ndarray, relevant: np.ndarray) -> float:
        """As of ours, by a product in numpy."""
        bars = (queries * self.source[relevant]).sum(axis=1)
        true = np.ones(len(queries), np.int64)
        for start in range(0, len(self.source), BLOCK):
            true += (self.source[start : start + BLOCK] @ queries.T > bars + 1e-6).sum(axis=0)
        near = true <= DEEPEST
        return float((self.ranks[near] == true[near]).mean())


class FaissFlat(Peer):
    """faiss's flat index."""

    def __init__(self, source: np.ndarray, threads: int) -> None:
        self.source, self.flat = source, Flat(source, False, threads)
        self.update = self.flat.update

    def found(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Rows of the `k` best documents, `Q x k`."""
        return self.flat.index.search(queries, k)[1]


class FaissLists(Peer):
    """faiss's IVF-PQ with codes of 112 bytes: 4 sqrt(N) lists, of which a query reads a sixteenth."""

    def __init__(self, source: np.ndarray, threads: int) -> None:
        import faiss

        faiss.omp_set_num_threads(threads)
        self.source = source
        count = max(1, min(int(4 * len(source) ** 0.5), len(source) // 40))
        sample = source[:: max(1, len(source) // max(10_000, 40 * count))]
        quantizer = faiss.IndexFlatIP(SIZE)
        bits = 8 if len(sample) >= 1000 else 4
        self.index = faiss.IndexIVFPQ(quantizer, SIZE, count, SIZE // 8, bits, faiss.METRIC_INNER_PRODUCT)
        self.index.nprobe = max(1, count // 16)
        self.index.cp.min_points_per_centroid = self.index.pq.cp.min_points_per_centroid = 1
        self.index.cp.niter = 10  # of 25: training is most of its time at a million
        self.index.train(np.ascontiguousarray(sample))
        for start in range(0, len(source), BLOCK):
            self.index.add(source[start : start + BLOCK])

    def found(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Rows of the `k` best documents, `Q x k`."""
        return self.index.search(queries, k)[1]

    def update(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Out of the lists and in again."""
        self.index.remove_ids(rows)
        self.index.add_with_ids(vectors, rows)


class Store(Peer):
    """The store of documents and vectors (LanceDB) without an index of its own; it has no ranks."""

    def __init__(self, source: np.ndarray, threads: int) -> None:
        import lancedb
        import pyarrow as pa

        self.source, self.folder = source, tempfile.TemporaryDirectory()
        parts = (source[start : start + BLOCK] for start in range(0, len(source), BLOCK))
        schema = pa.schema([("vector", pa.list_(pa.float32(), SIZE))])
        batches = (
            pa.record_batch([pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), SIZE)], schema=schema)
            for part in parts
        )
        self.table = lancedb.connect(self.folder.name).create_table("documents", batches, schema=schema)

    def search(self, queries: np.ndarray) -> None:
        """The ten best of some rollouts."""
        for query in queries[:STORE_QUERIES]:
            self.table.search(query).distance_type("dot").limit(DEPTH).to_arrow()


CONTENDERS = {
    "exact float32": lambda source, threads: Ours(source, threads, "float32", False),
    "exact bfloat16": lambda source, threads: Ours(source, threads, "bfloat16", False),
    "approximate": lambda source, threads: Ours(source, threads, "bfloat16", True),
    "faiss flat": FaissFlat,
    "store": Store,
    "faiss IVF-PQ": FaissLists,
}

MODULES = {
    "exact": ["search_r3.environment.amended"],
    "approximate": ["search_r3.environment.amended", "search_r3.environment.sketch"],
    "faiss": ["faiss"],
    "store": ["lancedb", "pyarrow"],
}


def work(name: str, folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    """One contender, in this process."""
    import torch

    for module in MODULES[name.split()[0]]:  # before the clock starts
        importlib.import_module(module)
    torch.set_num_threads(threads)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # what the library itself takes is not the index's
    source = np.load(folder / "documents.npy", mmap_mode="c")
    queries, relevant = np.load(folder / "rollouts.npy"), np.load(folder / "relevant.npy")
    memory, started = PeakMemory(), time.perf_counter()
    contender = CONTENDERS[name](source, threads)
    result: dict[str, Any] = {"build": time.perf_counter() - started, "memory_bytes": memory.now() - memory.before}
    contender.search(queries)
    result["search"] = median(seconds(contender.search, queries) for _ in range(rounds))
    if name == "store":
        result["search"] *= len(queries) / min(len(queries), STORE_QUERIES)
        return {**result, "peak_memory_bytes": memory.peak - memory.before}
    steps = [contender.step(queries, relevant, version) for version in range(1, rounds + 1)]
    result |= {part: median(step[part] for step in steps) for part in steps[0]}
    result["median_rank"] = float(np.median(contender.ranks))
    result["step"] = median(sum(step.values()) for step in steps)
    result["peak_memory_bytes"] = memory.peak - memory.before
    return {**result, "ranks_right": contender.ranks_right(queries, relevant)}


def measure(folder: Path, count: int, names: Sequence[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is known of the contenders on the corpus in a folder, after each of them."""
    results: dict[str, Any] = {}
    for name in names:
        try:
            results[name], spent = worker(__file__, name, folder, options.threads, options.rounds)
        except subprocess.CalledProcessError as error:  # the others are worth having
            say(f"{count:,} documents: {name} failed: {error}")
            continue
        say(f"{row(count, name, results[name])} ({name} took {spent:.0f} s)")
        yield results


def row(count: int, name: str, result: dict[str, Any]) -> str:
    cells = [f"{result[part]:.3f}" if part in result else "-" for part in PARTS]
    right = f"{result['ranks_right']:.3f}" if "ranks_right" in result else "-"
    memory = f"{result['memory_bytes'] / 2**20:,.0f} / {result['peak_memory_bytes'] / 2**20:,.0f}"
    return f"| {' | '.join([f'{count:,}', name, *cells, right, memory])} |"


def exponents(results: dict[int, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of every contender and part that was measured at two sizes or more."""
    slopes: dict[str, dict[str, float]] = {}
    for name in CONTENDERS:
        for part in (*PARTS, "memory_bytes"):
            points = [(count, own[name][part]) for count, own in results.items() if part in own.get(name, {})]
            points = [(count, value) for count, value in points if value > 0]
            if len(points) > 1:
                sizes, values = np.log(np.array(points, dtype=np.float64)).T
                slopes.setdefault(name, {})[part] = float(np.polyfit(sizes, values, 1)[0])
    return slopes


def make_record(results: dict[str, dict[int, dict[str, Any]]], options: argparse.Namespace) -> dict[str, Any]:
    """What is known so far, by the kind of the documents and their number."""
    easy = results.get("near a plane", {})
    largest = easy.get(GOAL_AT, {})
    met = {name: largest[name]["step"] <= goal for name, goal in GOALS.items() if name in largest}
    return {
        "benchmark": "growth",
        "results": results,
        "exponents": exponents(easy),
        "goals": {"seconds_of_a_step": GOALS, "met": met, "documents": GOAL_AT} if met else None,
        "settings": {
            **{"rollouts": options.rollouts, "size": SIZE, "threads": options.threads, "rounds": options.rounds},
            "quick": options.quick,
        },
        "versions": versions("search-r3", "torch"),
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000, GOAL_AT])
    parser.add_argument("--rollouts", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3, help="steps and searches; medians count")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="these contenders; by default all")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of documents; by default all")
    parser.add_argument("--scratch", type=Path, help="where documents and store lie: 8 GB; by default the system's")
    parser.add_argument("--out", type=Path, help="written after each contender, so that a cut run leaves what it has")
    parser.add_argument("--quick", action="store_true", help="500 and 3,000 documents, 32 rollouts, one round")
    add_worker_arguments(parser)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker, options.folder, options.threads, options.rounds)))
        return
    if options.quick:
        options.sizes, options.rollouts, options.rounds = [500, 3_000], 32, 1
    results: dict[str, dict[int, dict[str, Any]]] = {}
    for kind in options.kinds:
        for count in options.sizes if kind == KINDS[0] else options.sizes[-1:]:
            with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
                spent = seconds(generate, Path(scratch), count, options.rollouts, kind)
                say(f"{count:,} documents, {kind}: generating took {spent:.0f} s")
                names = [name for name in options.only or CONTENDERS if kind == KINDS[0] or name in GOALS]
                for known in measure(Path(scratch), count, names, options):
                    results.setdefault(kind, {})[count] = known
                    if options.out:
                        options.out.parent.mkdir(parents=True, exist_ok=True)
                        options.out.write_text(json.dumps(make_record(results, options), indent=2) + "\n")
    for kind, by_size in results.items():
        print(f"\nDocuments {kind}:\n")
        print(f"| documents | index | {', s | '.join(PARTS)}, s | ranks right | memory / peak, MiB |")
        print("|---" * (len(PARTS) + 4) + "|")
        for count, measured in by_size.items():
            for name, result in measured.items():
                print(row(count, name, result))
    record = make_record(results, options)
    for name, own in record["exponents"].items():
        print(f"{name}: " + ", ".join(f"{part} N^{slope:.2f}" for part, slope in own.items()))
    finish(record, options.out)


if __name__ == "__main__":
    main()
