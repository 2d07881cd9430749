"""Peak memory of a step of stage 1 as the batch grows: with cached gradients it should not.

    python benchmarks/stage1_memory.py --out stage1_memory.json
    python benchmarks/stage1_memory.py --quick                    # small batches, within a minute

Each point is a process of its own that trains two steps through `train_sft` on a random Qwen2 and a generated
collection, and reports the most resident memory that it had (on a GPU: what torch had allocated at its peak). The peer
is the same step without cached gradients, at the smallest batch. `ratio` is the largest peak with cached gradients over
the smallest; of `step_bytes`, which leave out what a step with two queries takes (libraries, model, data), too.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import (
    Shape,
    add_arguments,
    atlas_texts,
    finish,
    machine,
    make_model,
    peak_memory,
    prepare,
    say,
    versions,
)

WORDS = {"query": (6, 14), "document": (30, 70), "reasoning": (10, 40)}
"""Words of a text, from the least to the most."""


def make_collection(folder: Path, queries: int, seed: int) -> Path:
    """A collection in which every query has a document and a reasoning trace; words are drawn at random."""
    from search_r3.data.collection import Collection, Document, Query

    rng = random.Random(f"stage1/{seed}")
    words = " ".join(atlas_texts()[:4000]).split()

    def text(kind: str) -> str:
        return " ".join(rng.choices(words, k=rng.randint(*WORDS[kind])))

    documents = {f"d{i}": Document(f"d{i}", text("document"), "") for i in range(2 * queries)}
    asked = {f"q{i}": Query(f"q{i}", text("query"), {"reasoning": text("reasoning")}) for i in range(queries)}
    qrels = {"train": {f"q{i}": {f"d{i}": 1} for i in range(queries)}}
    Collection("stage1", documents, asked, qrels).save(folder)
    return folder


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One point, in this process."""
    prepare(options)
    import torch

    from search_r3.config import load_recipe
    from search_r3.training.sft import train_sft

    folder, spent = Path(options.folder), []

    def train(steps: int, batch: int, micro: int | None) -> None:
        with tempfile.TemporaryDirectory() as run_dir:
            recipe = load_recipe(
                None,
                [
                    *(f"run_dir={run_dir}/run", f"base={folder / 'model'}", f"collection={folder / 'collection'}"),
                    *("max_length=256", "max_new_tokens=128", "save_every=1000", f"seed={options.seed}"),
                    *(f"sft.steps={steps}", f"sft.batch_size={batch}", "sft.splits={train: 1.0}"),
                    *("sft.random_negatives=1", "sft.hard_negatives=0", "sft.kl_weight=1.0"),
                    f"sft.micro_batch_size={micro or 'null'}",
                ],
            )
            spent.extend(row["seconds"] for row in train_sft(recipe).log_history)

    train(1, 2, 2)  # loads libraries, model and collection, which the process holds from now on
    before = peak_memory()
    spent.clear()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    train(2, options.batch, options.micro if options.cached else None)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()
    return {"peak_bytes": peak, "step_bytes": peak - before, "seconds": spent}


def point(options: argparse.Namespace, folder: Path, batch: int, cached: bool) -> dict[str, Any]:
    """One point, in a process of its own."""
    command = [sys.executable, __file__, "--folder", str(folder), "--batch", str(batch), "--micro", str(options.micro)]
    command += ["--threads", str(options.threads), "--seed", str(options.seed), *(["--cached"] if cached else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    how = f"cached, {options.micro} at once" if cached else "all at once"
    say(f"batch {batch}, {how}: {found['step_bytes'] / 2**20:.0f} MiB, {max(found['seconds']):.1f} s per step")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, runs=1)
    parser.set_defaults(shape=Shape(4, 128), vocabulary=4096)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024], help="queries per step")
    parser.add_argument("--micro", type=int, default=32, help="sequences per pass with cached gradients")
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # of a single point, as the last two
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--cached", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        print(json.dumps(measure(options)))
        return
    if options.quick:
        options.shape, options.vocabulary, options.batches, options.micro = Shape(2, 64), 1024, [16, 64], 8
    started = time.perf_counter()
    prepare(options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", atlas_texts()[:4000], options.shape, options.vocabulary, 1024, options.seed)
        make_collection(folder / "collection", 2 * max(options.batches), options.seed)
        cached = {batch: point(options, folder, batch, cached=True) for batch in options.batches}
        plain = point(options, folder, min(options.batches), cached=False)
    record = {
        "benchmark": "stage1_memory",
        "peer": "the same step without cached gradients",
        "unit": "largest peak over smallest",
        "ratio": {
            name: max(one[name] for one in cached.values()) / min(one[name] for one in cached.values())
            for name in ("peak_bytes", "step_bytes")
        },
        "plain_over_cached": plain["step_bytes"] / cached[min(options.batches)]["step_bytes"],
        "runs": 1,
        "points": cached,
        "plain": {min(options.batches): plain},
        "settings": {
            **{"shape": str(options.shape), "vocabulary": options.vocabulary, "micro_batch_size": options.micro},
            **{"seed": options.seed, "threads": options.threads, "quick": options.quick},
        },
        "seconds": time.perf_counter() - started,
        "machine": machine(),
        "versions": versions("torch", "transformers", "accelerate"),
    }
    finish(record, options.out)


if __name__ == "__main__":
    main()
