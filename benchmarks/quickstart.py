"""Run the quickstart with several seeds and print the table of docs/results.md; the last line is one JSON object.

    python benchmarks/quickstart.py --seeds 0 1 2 --out runs/seeds      # about 7 minutes a seed on two cores
    python benchmarks/quickstart.py --quick --out runs/quick            # a few steps, within a minute

A run that is complete already is read, not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from common import machine, spread

ROWS = ("bm25", "bm25+reasoning", "direct/sft", "reason/sft", "direct/rl", "reason/rl")
QUICK = [
    "sft.steps=120",
    "sft.batch_size=12",
    "grpo.steps=2",
    "grpo.queries_per_step=8",
    "evaluation.rollout_queries=4",
]


def run(seed: int, folder: Path, quick: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One quickstart; returns its report and the metrics of stage 2."""
    command = [sys.executable, "-m", "search_r3.cli", "quickstart", "--recipe", "recipes/quickstart.yaml", "--resume"]
    subprocess.run([*command, f"seed={seed}", f"run_dir={folder}", *(QUICK if quick else [])], check=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return json.loads((folder / "report.json").read_text()), [row for row in rows if row["stage"] == "grpo"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    seeds = options.seeds[:1] if options.quick else options.seeds
    results = [run(seed, options.out / f"seed{seed}", options.quick) for seed in seeds]
    reports = [report for report, _ in results]

    print("\n| row | nDCG@10 | recall@100 | MRR@10 | tokens/query | queries/s |\n|---|---|---|---|---|---|")
    for name in ROWS:
        rows = [report["rows"][name] for report in reports]
        cells = [spread([row[key] for row in rows]) for key in ("ndcg@10", "recall@100", "mrr@10")]
        cells += [f"{median([row[key] for row in rows]):.1f}" for key in ("tokens_per_query", "queries_per_second")]
        print(f"| `{name}` | {' | '.join(cells)} |")

    def gain(other: str) -> list[float]:
        return [report["rows"]["reason/rl"]["ndcg@10"] - report["rows"][other]["ndcg@10"] for report in reports]

    def p_value(report: dict[str, Any], other: str) -> float:
        """Of the paired test of reason/rl against another row, before Holm's correction."""
        [found] = [one["p"] for one in report["comparisons"] if one["first"] == "reason/rl" and one["second"] == other]
        return float(found)

    dev = [[row["dev_ndcg@10_reason"] for row in metrics if "dev_ndcg@10_reason" in row] for _, metrics in results]
    facts = {
        "reason/rl minus direct/rl": spread(gain("direct/rl")),
        "reason/rl minus reason/sft": spread(gain("reason/sft")),
        "largest p, reason/rl vs direct/rl": max(p_value(r, "direct/rl") for r in reports),
        "largest p, reason/rl vs reason/sft": max(p_value(r, "reason/sft") for r in reports),
        "best minus last dev evaluation in RL": spread([max(values) - values[-1] for values in dev]),
        "rollouts with reward >= 0.5 before RL": spread([r["rollouts"]["share_ge_half_before"] for r in reports]),
        "rollouts with reward >= 0.5 after RL": spread([r["rollouts"]["share_ge_half_after"] for r in reports]),
        "forced share after RL": spread([r["rollouts"]["forced_share"] for r in reports]),
        "seconds": spread([r["seconds"] for r in reports], 0),
        "peak memory, GiB": spread([r["peak_memory_bytes"] / 2**30 for r in reports], 2),
    }
    print("\n| what | median (range) |\n|---|---|")
    for name, value in facts.items():
        print(f"| {name} | {value} |")
    ratio = median([r["rows"]["reason/rl"]["ndcg@10"] / max(r["rows"]["direct/rl"]["ndcg@10"], 1e-9) for r in reports])
    record = {"benchmark": "quickstart", "peer": "direct/rl", "ratio": ratio, "unit": "nDCG@10", "runs": len(reports)}
    print(json.dumps({**record, "settings": {"seeds": seeds, "quick": options.quick}, "machine": machine()}))


if __name__ == "__main__":
    main()
