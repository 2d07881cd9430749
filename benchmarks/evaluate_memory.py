"""Memory and time of an evaluation of many documents whose vectors are given; the last line is one JSON object.

    pip install search-r3[benchmarks]
    python benchmarks/evaluate_memory.py --documents 1000000 --queries 1000 --out runs/evaluate-1m.json
    python benchmarks/evaluate_memory.py --quick                                          # within a minute

Documents, queries and vectors are synthetic and seeded: unit vectors of size 896 in float16, in an index folder as
`search-r3 encode` writes it, but for a model that was never run over the documents. What is measured is the command
`search-r3 evaluate --index`, in a process of its own: the peak of its anonymous resident memory, looked at every 20 ms
(on Linux; files that are mapped, the vectors among them, do not count), and its seconds, the loading of the libraries
among them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import Shape, finish, machine, make_model, prepare, say

SIZE, WORDS = 896, 60
PARTS = "RssAnon", "RssFile", "VmRSS"


def texts(count: int, seed: int) -> Iterator[str]:
    """Texts of about 360 characters, of Zipf's words."""
    draw = random.Random(seed)
    words = [
        f"{first}{second}{third}" for first in "bdklmnprst" for second in "aeiou" for third in ("", "na", "to", "rin")
    ]
    weights = [1 / (place + 1) for place in range(len(words))]
    for number in range(count):
        yield f"{' '.join(draw.choices(words, weights, k=WORDS))} {number}"


def write_collection(folder: Path, documents: int, queries: int, seed: int) -> None:
    """A BEIR folder in which every query is the beginning of a document, which is relevant to it."""
    draw = random.Random(seed)
    (folder / "qrels").mkdir(parents=True)
    chosen = dict.fromkeys(draw.sample(range(documents), queries))
    with (folder / "corpus.jsonl").open("w") as corpus, (folder / "queries.jsonl").open("w") as asked:
        with (folder / "qrels" / "test.tsv").open("w") as judged:
            judged.write("query-id\tcorpus-id\tscore\n")
            for number, text in enumerate(texts(documents, seed)):
                corpus.write(json.dumps({"_id": f"document-{number:09}", "title": "", "text": text}) + "\n")
                if number in chosen:
                    asked.write(json.dumps({"_id": f"query-{number}", "text": text[:60]}) + "\n")
                    judged.write(f"query-{number}\tdocument-{number:09}\t1\n")


def write_index(model_folder: Path, collection: Path, index: Path, seed: int) -> None:
    """An index folder of random vectors, which says that this model made them."""
    from search_r3 import SearchR3
    from search_r3.data.collection import CorpusFile
    from search_r3.retrieval.encode import encode_corpus
    from search_r3.retrieval.encoding.identity import PROBE

    rng = np.random.default_rng(seed)
    model = SearchR3(model_folder, device="cpu")
    encode = model.encode_document

    def made_up(some: list[str], **options: Any) -> np.ndarray:
        if some == [PROBE]:
            return encode(some)
        vectors = rng.standard_normal((len(some), SIZE), dtype=np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    model.encode_document = made_up  # type: ignore[assignment, method-assign]
    encode_corpus(model, CorpusFile(collection / "corpus.jsonl", set()), index, block_size=16_384)


def watched(command: list[str]) -> dict[str, float]:
    """Run a command; GiB of each kind of memory at its peak, and seconds."""
    peaks = dict.fromkeys(PARTS, 0)
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        lines = status.read_text().splitlines() if status.exists() else []
        for line in lines:
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"the evaluation ended with {process.returncode}: {' '.join(command)}")
    names = dict(zip(PARTS, ("anonymous", "mapped", "resident"), strict=True))
    sizes = {f"{names[part]}_gib": round(peak / 2**30, 3) for part, peak in peaks.items()}
    return {**sizes, "seconds": round(time.perf_counter() - started, 1)}


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Make what is not there, and evaluate."""
    collection, model, index = (folder / name for name in ("collection", "model", "index"))
    if not collection.exists():
        say(f"writing {options.documents:,} documents")
        write_collection(collection, options.documents, options.queries, options.seed)
        make_model(model, texts(2000, options.seed), Shape(1, SIZE), 4096, 512, options.seed)
        say("writing their vectors")
        write_index(model, collection, index, options.seed)
    say("evaluating")
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "search_r3.cli", "evaluate", "--modes", "direct", "--out", out]
        command += ["--model", str(model), "--collections", str(collection), "--index", str(index)]
        command += ["--latency-queries", "4", "--bootstrap", "100", "--permutations", "100"]
        measured: dict[str, Any] = watched(command)
        [result] = [json.loads(path.read_text()) for path in (Path(out) / "results").glob("*.json")]
    vectors = sum(path.stat().st_size for path in index.rglob("vectors-*"))
    return {
        **measured,
        "vectors_gib": round(vectors / 2**30, 3),
        "corpus_gib": round((collection / "corpus.jsonl").stat().st_size / 2**30, 3),
        "ms_per_query": result["cost"]["ms_per_query"],
        "parts": result["provenance"]["seconds"],
        "documents": result["collection"]["documents"],
        "queries": result["collection"]["queries"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep collection and vectors here, or take them from here")
    parser.add_argument("--out", type=Path, help="write the JSON object here too")
    parser.add_argument("--quick", action="store_true", help="5,000 documents, 50 queries")
    options = parser.parse_args()
    if options.quick:
        options.documents, options.queries = 5000, 50
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the process that is measured
    prepare(options)
    with tempfile.TemporaryDirectory() as scratch:
        record = measure(options.folder or Path(scratch), options)
    finish({"benchmark": "evaluate_memory", "machine": machine(), "dimension": SIZE, **record}, options.out)


if __name__ == "__main__":
    main()
