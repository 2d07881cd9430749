"""The final evaluation of a run: `report.json` and plots."""

from __future__ import annotations

import platform
import resource
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from ..config import Recipe
from ..data.collection import Collection
from ..files import write_json
from ..model.encoder import SearchR3
from .benchmark import (
    Row,
    evaluate_bm25,
    evaluate_model,
    index_documents,
    paired_p_values,
    sampled_rewards,
)

STAGES = ("sft", "rl")
PACKAGES = ("search-r3", "torch", "transformers", "accelerate", "tokenizers", "bm25s", "babel", "numpy")

Note = Callable[[str], None]


def evaluate_run(
    recipe: Recipe, collection: Collection, models: dict[str, Path], note: Note
) -> tuple[list[Row], dict[str, list[float]], float]:
    """All rows of the report on the test split, and the rewards of sampled rollouts before and after RL.

    Args:
        recipe: the run's settings.
        collection: the run's collection.
        models: `sft` and `rl` -> model directory.
        note: told what is being evaluated.

    Returns:
        The rows, `before` / `after` -> ranking rewards, and the share of forced rollouts after RL.
    """
    settings, split = recipe.evaluation, recipe.evaluation.test_split
    rows: list[Row] = []
    rewards: dict[str, list[float]] = {}
    forced = 0.0
    for stage in STAGES:
        note(f"evaluating the {stage} model on {split}")
        model = SearchR3(models[stage], dtype=recipe.dtype)
        index = index_documents(model, collection)
        for mode in ("direct", "reason"):
            rows.append(
                evaluate_model(
                    model,
                    collection,
                    split,
                    mode,
                    f"{mode}/{stage}",
                    index=index,
                    batch_size=settings.batch_size,
                )
            )
        rewards["before" if stage == "sft" else "after"], forced = sampled_rewards(
            model,
            collection,
            split,
            queries=settings.rollout_queries,
            group_size=recipe.grpo.group_size,
            k=recipe.grpo.reward_k,
            seed=recipe.seed,
            index=index,
            batch_size=settings.batch_size,
            sampling_temperature=recipe.grpo.sampling_temperature,
        )
    lexical = [
        evaluate_bm25(collection, split),
        evaluate_bm25(collection, split, "bm25+reasoning", rows[-1].reasoning),
    ]
    return lexical + rows, rewards, forced


def build_report(
    recipe: Recipe,
    collection: Collection,
    rows: Sequence[Row],
    rewards: dict[str, list[float]],
    forced: float,
) -> dict[str, Any]:
    """The content of `report.json`, but for the seconds of the whole run."""
    settings = recipe.evaluation
    return {
        "rows": {row.name: row.record(settings.bootstrap, recipe.seed) for row in rows},
        "p_values": paired_p_values(rows, settings.permutations, recipe.seed),
        "rollouts": {
            "share_ge_half_before": fmean(reward >= 0.5 for reward in rewards["before"]),
            "share_ge_half_after": fmean(reward >= 0.5 for reward in rewards["after"]),
            "forced_share": forced,
            "count": len(rewards["after"]),
        },
        "collection": {
            "name": collection.name,
            "split": settings.test_split,
            "documents": len(collection.documents),
            "hash": collection.content_hash(),
        },
        "seed": recipe.seed,
        "peak_memory_bytes": peak_memory_bytes(),
        "versions": {
            "python": platform.python_version(),
            "machine": platform.machine(),
            **{name: version(name) for name in PACKAGES},
        },
    }


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_report(
    folder: Path, report: dict[str, Any], metrics: Sequence[dict[str, Any]], rewards: dict[str, list[float]]
) -> None:
    """Write the plots, then `report.json`: where that stands, the run is complete."""
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    plot_training(metrics, plots / "reward.png")
    plot_account(metrics, plots / "account.png")
    plot_rewards(rewards, plots / "rollout_rewards.png")
    plot_rows(report["rows"], plots / "ndcg.png")
    write_json(folder / "report.json", report)


def plot_training(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Reward of each step's rollouts and nDCG@10 on dev over the steps of stage 2."""
    figure, axes = _figure()
    steps = [row for row in metrics if "reward_ranking" in row]
    axes.plot(
        [row["step"] for row in steps],
        [row["reward_ranking"] for row in steps],
        color="0.6",
        label="rollouts: nDCG reward",
    )
    for mode, colour in (("direct", "tab:orange"), ("reason", "tab:blue")):
        key = f"dev_ndcg@10_{mode}"
        points = [row for row in metrics if key in row]
        axes.plot(
            [row["step"] for row in points],
            [row[key] for row in points],
            marker="o",
            color=colour,
            label=f"dev nDCG@10, {mode}",
        )
    axes.set(xlabel="GRPO step", ylabel="nDCG@10", ylim=(0, 1.02), title="Stage 2: what the policy learns")
    axes.legend()
    _save(figure, path)


def plot_account(metrics: Sequence[dict[str, Any]], path: Path) -> bool:
    """The audits of the live index over the steps of stage 2; a run without audits gets no plot.

    Returns:
        Whether there was anything to plot.
    """
    audits = [row for row in metrics if "audit_reward_error" in row]
    if not audits:
        return False
    figure, axes = _figure()
    steps = [row["step"] for row in audits]
    axes.plot(steps, [row["audit_reward_error"] for row in audits], marker="o", label="mean error of the reward")
    axes.plot(steps, [1 - row["audit_top10_overlap"] for row in audits], marker="s", label="top-10 documents missed")
    axes.plot(steps, [row["audit_drift_mean"] for row in audits], marker="^", label="drift of a document, 1 - cos")
    axes.set(xlabel="GRPO step", ylabel="held against freshly encoded vectors", title="The account of the live index")
    axes.set_ylim(bottom=0)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(figure, path)
    return True


def plot_rewards(rewards: dict[str, list[float]], path: Path) -> None:
    """Distribution of the rollouts' ranking rewards before and after RL, with the share at or above 0.5."""
    figure, axes = _figure()
    shares = {name: fmean(value >= 0.5 for value in values) for name, values in rewards.items()}
    axes.hist(
        list(rewards.values()),
        bins=[i / 20 for i in range(21)],
        label=[f"{name} RL: {shares[name]:.0%} at 0.5 or more" for name in rewards],
        weights=[[1 / len(values)] * len(values) for values in rewards.values()],
    )
    axes.axvline(0.5, color="black", linestyle="--", linewidth=1)
    axes.set(
        xlabel="nDCG@10 of a sampled rollout's vector",
        ylabel="share of rollouts",
        title="Rollout rewards on test queries",
    )
    axes.legend()
    _save(figure, path)


def plot_rows(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """nDCG@10 of every row with its 95 % bootstrap interval."""
    figure, axes = _figure()
    names = list(rows)
    means = [rows[name]["ndcg@10"] for name in names]
    low = [max(0.0, mean - rows[name]["ndcg@10_interval"][0]) for name, mean in zip(names, means, strict=True)]
    high = [max(0.0, rows[name]["ndcg@10_interval"][1] - mean) for name, mean in zip(names, means, strict=True)]
    colours = [
        "tab:blue" if name.startswith("reason") else "tab:orange" if name.startswith("direct") else "0.6"
        for name in names
    ]
    bars = axes.bar(names, means, yerr=[low, high], capsize=4, color=colours)
    axes.bar_label(bars, fmt="%.3f", label_type="center", color="white")
    axes.set(ylabel="nDCG@10", ylim=(0, 1.02), title="Held-out test queries, 95 % intervals")
    _save(figure, path)


def _figure() -> tuple[Any, Any]:
    # The object interface: no global pyplot state, no display needed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150)
