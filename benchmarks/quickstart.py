"""Run the quickstart and its controls with several seeds; print the tables of docs/results.md and a JSON object.

    python benchmarks/quickstart.py --seeds 0 1 2 --out runs/seeds      # about 16 minutes a seed on two cores
    python benchmarks/quickstart.py --quick --out runs/quick            # a few steps, within two minutes

The controls answer whether stage 2 is worth more than the labels and the time that it takes. They are a stage 1 on the
labelled queries of both stages' splits, with as many optimizer steps as both stages together and batches so much larger
that it also takes as many seconds (on a quiet machine; the last table has the ratio). `*/sft-labels` have of stage 2's
queries what stage 2 has, their labels (direct mode learns from them); `*/sft-all` see written reasoning for them, too.

Seeds change training only; `--collection atlas:SEED` divides the queries otherwise. A training that is complete already
is read, not repeated; tests are paired over queries, each query's nDCG@10 being its mean over the seeds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import machine, spread

from search_r3.config import load_recipe
from search_r3.data.collection import Collection
from search_r3.data.load import load_collection
from search_r3.evaluation.results import Result, load_results
from search_r3.evaluation.significance import paired_p_value

RECIPE = Path("recipes/quickstart.yaml")
CONTROLS = ("direct/sft-all", "reason/sft-all", "direct/sft-labels", "reason/sft-labels")
ROWS = ("bm25", "bm25+reasoning", "direct/sft", "reason/sft", *CONTROLS, "direct/rl", "reason/rl")
MAIN = "ndcg@10"
CONTROL_BATCH = 32
"""Queries per step of the control, measured: 660 such steps take as long as 600 of 24 and 60 of stage 2."""
QUICK = [
    "sft.steps=120",
    "sft.batch_size=12",
    "grpo.steps=2",
    "grpo.queries_per_step=8",
    "evaluation.rollout_queries=4",
]


def search_r3(*arguments: object) -> None:
    """Run a command of the package."""
    subprocess.run([sys.executable, "-m", "search_r3.cli", *map(str, arguments)], check=True)


def stage_seconds(folder: Path) -> dict[str, float]:
    """Stage -> seconds of all its steps."""
    seconds: dict[str, float] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        seconds[row["stage"]] = seconds.get(row["stage"], 0.0) + row.get("seconds", 0.0)
    return seconds


def train_control(name: str, folder: Path, overrides: list[str], quick: bool) -> float:
    """Train and measure a control of the quickstart in `folder`; returns its seconds over those of both stages."""
    recipe, control = load_recipe(RECIPE, overrides), folder / name
    seconds = stage_seconds(folder)
    steps = recipe.sft.steps + recipe.grpo.steps
    collection = load_collection(recipe.collection)
    labels = {split: len(collection.split(split)) for split in ("sft", *recipe.grpo.splits)}
    shares = {split: (1 - recipe.sft.splits["facts"]) * count / sum(labels.values()) for split, count in labels.items()}
    splits = {"facts": recipe.sft.splits["facts"], **shares}
    if not (control / "sft" / "model" / "config.json").exists():
        settings = [f"run_dir={control}", f"sft.steps={steps}", f"sft.splits={json.dumps(splits)}"]
        settings.append(f"sft.batch_size={recipe.sft.batch_size if quick else CONTROL_BATCH}")
        if name == "sft-labels":
            unwritten(collection, recipe.grpo.splits).save(folder / "unwritten")
            settings += [f"collection={folder / 'unwritten'}", "sft.untraced=direct"]
        search_r3("sft", "--recipe", RECIPE, "--resume", *overrides, *settings)
    model = ["--model", f"{name}={control / 'sft' / 'model'}", "--modes", "direct", "reason"]
    where = ["--collections", recipe.collection, "--splits", recipe.evaluation.test_split]
    search_r3("evaluate", *model, *where, "--out", control / "evaluation", "--latency-queries", "0")
    return stage_seconds(control)["sft"] / sum(seconds.values())


def unwritten(collection: Collection, splits: Sequence[str]) -> Collection:
    """The collection without the reasoning traces of these splits' queries."""
    bare = {query_id for split in splits for query_id in collection.split(split)}
    queries = {
        query_id: replace(query, metadata={k: v for k, v in query.metadata.items() if k != "reasoning"})
        if query_id in bare
        else query
        for query_id, query in collection.queries.items()
    }
    return replace(collection, queries=queries)


def run(seed: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One seed: report, results by row, dev curve of stage 2, and the longer control's seconds over both stages'."""
    overrides = [f"seed={seed}", f"collection={options.collection}", *(QUICK if options.quick else [])]
    search_r3("quickstart", "--recipe", RECIPE, "--resume", *overrides, f"run_dir={folder}")
    names = ("sft-all", "sft-labels")
    shares = [train_control(name, folder, overrides, options.quick) for name in names]
    places = [folder, *(folder / name / "evaluation" for name in names)]
    results = [result for place in places for result in load_results(place / "results")]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "report": json.loads((folder / "report.json").read_text()),
        "results": {result.system.name: result for result in results},
        "dev": [row["dev_ndcg@10_reason"] for row in metrics if row["stage"] == "grpo" and "dev_ndcg@10_reason" in row],
        "control_seconds": max(shares),
    }


def show_rows(runs: list[dict[str, Any]]) -> None:
    """The table of the systems."""
    print("\n| row | nDCG@10 | recall@100 | MRR@10 | tokens/query |\n|---|---|---|---|---|")
    for name in ROWS:
        results: list[Result] = [one["results"][name] for one in runs]
        cells = [spread([result.scores[key] for result in results]) for key in (MAIN, "recall@100", "mrr@10")]
        cells.append(f"{median([result.cost.tokens_per_query for result in results]):.1f}")
        print(f"| `{name}` | {' | '.join(cells)} |")


def compare_rows(runs: list[dict[str, Any]], first: str, second: str) -> dict[str, Any]:
    """The difference of two rows in each seed, and p of the paired test on the queries' means over the seeds."""
    sides = [np.array([one["results"][name].per_query[MAIN] for one in runs]) for name in (first, second)]
    by_seed = (sides[0] - sides[1]).mean(axis=1)
    p = paired_p_value(sides[0].mean(axis=0).tolist(), sides[1].mean(axis=0).tolist(), 10_000, 0)
    return {"first": first, "second": second, "difference": float(by_seed.mean()), "by_seed": by_seed.tolist(), "p": p}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--collection", default="atlas")
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    seeds = options.seeds[:1] if options.quick else options.seeds
    runs = [run(seed, options.out / f"seed{seed}", options) for seed in seeds]
    show_rows(runs)

    best_control = max(CONTROLS, key=lambda name: median([one["results"][name].scores[MAIN] for one in runs]))
    others = dict.fromkeys(["direct/rl", "reason/sft", best_control, "reason/sft-labels"])
    pairs = [*(("reason/rl", other) for other in others), ("reason/sft", "direct/sft")]
    pairs += [(f"reason/{name}", f"direct/{name}") for name in ("sft-all", "sft-labels")]
    comparisons = [compare_rows(runs, *pair) for pair in pairs]
    print("\n| nDCG@10 of | minus that of | difference | over the seeds | p |\n|---|---|---|---|---|")
    for one in comparisons:
        cells = [f"`{one['first']}`", f"`{one['second']}`", f"{one['difference']:+.3f}", spread(one["by_seed"])]
        print(f"| {' | '.join(cells)} | {one['p']:.4f} |")

    reports = [one["report"] for one in runs]
    facts = {
        "best minus last dev evaluation in RL": spread([max(one["dev"]) - one["dev"][-1] for one in runs]),
        "rollouts with reward >= 0.5 before RL": spread([r["rollouts"]["share_ge_half_before"] for r in reports]),
        "rollouts with reward >= 0.5 after RL": spread([r["rollouts"]["share_ge_half_after"] for r in reports]),
        "forced share after RL": spread([r["rollouts"]["forced_share"] for r in reports]),
        "seconds of the quickstart": spread([r["seconds"] for r in reports], 0),
        "seconds of the longer control over those of both stages": spread([one["control_seconds"] for one in runs]),
        "peak memory, GiB": spread([r["peak_memory_bytes"] / 2**30 for r in reports], 2),
    }
    print("\n| what | median (range) |\n|---|---|")
    for name, value in facts.items():
        print(f"| {name} | {value} |")
    scores = {name: [one["results"][name].scores[MAIN] for one in runs] for name in ROWS}
    ratio = median(scores["reason/rl"]) / max(median(scores[best_control]), 1e-9)
    record = {"benchmark": "quickstart", "peer": best_control, "ratio": ratio, "unit": "nDCG@10", "runs": len(runs)}
    record |= {"scores": scores, "comparisons": comparisons, "machine": machine()}
    record["settings"] = {"seeds": seeds, "collection": options.collection, "quick": options.quick}
    print(json.dumps(record))


if __name__ == "__main__":
    main()
