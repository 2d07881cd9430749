"""The final evaluation of a run: results, `report.json`, the page and its plots."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ...config import Recipe
from ...data.collection import Collection
from ...errors import DataError
from ...files import atomic_directory, read_jsonl, write_json
from ...model.encoder import SearchR3
from ...model.prompts import PLAIN_MODES
from ...retrieval.metrics import ndcg
from ...retrieval.protocol import VectorIndex
from ...retrieval.ranking import make_requests, ranked
from ..baselines import BM25System
from ..benchmark import EvaluationOptions, evaluate, judged
from ..frontier.record import Split, read_frontier
from ..instructions import NONE, OWN, choices, label
from ..results import Result, load_results, package_versions
from ..runner import RESULTS, SUMMARY, reasoning_baseline
from ..significance import compare
from ..systems import EncodedCollections, SearchR3System
from ..table import summary
from .page import write_page

REWARDS, METRICS = "rewards.json", "metrics.jsonl"
STAGES = ("sft", "rl")
ORDER = ("bm25", "bm25+reasoning", "direct/sft", "reason/sft", "direct/rl", "reason/rl")

Note = Callable[[str], None]


def evaluate_run(
    recipe: Recipe, collection: Collection, models: dict[str, Path], folder: Path, note: Note
) -> tuple[list[Result], dict[str, list[float]], float]:
    """All results of the report on the test split, and the rewards of sampled rollouts before and after RL.

    Args:
        recipe: the run's settings.
        collection: the run's collection.
        models: `sft` and `rl` -> model directory.
        folder: where results are looked up and written.
        note: told what is being evaluated.

    Returns:
        The results, `before` / `after` -> nDCG of sampled rollouts, and the share of forced rollouts after RL.
    """
    settings, split = recipe.evaluation, recipe.evaluation.test_split
    options = EvaluationOptions(bootstrap=settings.bootstrap, seed=recipe.seed)
    results = [evaluate(BM25System(), collection, split, options, source=recipe.collection, folder=folder)]
    rewards: dict[str, list[float]] = {}
    forced = 0.0
    for stage in STAGES:
        note(f"evaluating the {stage} model on {split}")
        collections = EncodedCollections(SearchR3(models[stage], dtype=recipe.dtype))
        for choice, mode in product(reversed(choices(collection, split)), PLAIN_MODES):
            name = f"{mode}/{stage}{label(choice)}"
            system = SearchR3System(collections, mode, name, settings.batch_size, choice)
            results.append(evaluate(system, collection, split, options, source=recipe.collection, folder=folder))
        index = collections.index(collection)[0]
        sampled = sampled_rewards(recipe, collection, collections.model, index)
        rewards["before" if stage == "sft" else "after"], forced = sampled
    lexical = reasoning_baseline(results[-1], "bm25+reasoning")
    results.append(evaluate(lexical, collection, split, options, source=recipe.collection, folder=folder))
    order = [name + label(choice) for name in ORDER for choice in (OWN, NONE)]
    return sorted(results, key=lambda result: order.index(result.system.name)), rewards, forced


def sampled_rewards(
    recipe: Recipe, collection: Collection, model: SearchR3, index: VectorIndex
) -> tuple[list[float], float]:
    """The nDCG of sampled rollouts, forced ones as any other, and the share of forced ones.

    The queries are `evaluation.rollout_queries` of the test split, evenly spread over it.

    Args:
        recipe: the run's settings.
        collection: documents and queries.
        model: the policy.
        index: the collection encoded by it.
    """
    settings, k = recipe.evaluation, recipe.grpo.reward_k
    qrels = judged(collection, settings.test_split)
    spread = np.linspace(0, len(qrels) - 1, min(settings.rollout_queries, len(qrels))).round().astype(int)
    query_ids = [list(qrels)[i] for i in spread for _ in range(recipe.grpo.group_size)]
    rollouts = model.encode_query(
        [collection.queries[query_id].bare for query_id in query_ids],
        "reason",
        instruction=[collection.queries[query_id].instruction for query_id in query_ids],
        batch_size=settings.batch_size,
        sampling_temperature=recipe.grpo.sampling_temperature,
        seed=recipe.seed,
    )
    request_of = {request.query_id: request for request in make_requests(collection, qrels)}
    rankings = ranked(index, rollouts.vectors, [request_of[query_id] for query_id in query_ids], k)
    rewards = [
        ndcg([doc_id for doc_id, _ in ranking], qrels[query_id], k)
        for ranking, query_id in zip(rankings, query_ids, strict=True)
    ]
    return rewards, fmean(rollouts.forced)


def build_report(
    recipe: Recipe,
    collection: Collection,
    results: Sequence[Result],
    rewards: dict[str, list[float]],
    forced: float,
) -> dict[str, Any]:
    """The content of `report.json`, but for the seconds of the whole run."""
    settings = recipe.evaluation
    comparisons = compare(results, settings.permutations, recipe.seed)
    return {
        "rows": {result.system.name: summary(result, results) for result in results},
        "comparisons": [comparison.record() for comparison in comparisons],
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
        "versions": package_versions(),
    }


def write_runs_page(runs: Sequence[Path], folder: Path, title: str | None, permutations: int, seed: int) -> Path:
    """The page of several runs or evaluations together.

    Args:
        runs: folders that `quickstart` or `evaluate` wrote.
        folder: made here; gets `report.html` and `plots/`.
        title: of the page; by default the names of the folders.
        permutations: of the paired tests.
        seed: of the paired tests.

    Raises:
        DataError: a folder holds no result, or a damaged one.
    """
    results: list[Result] = []
    rewards: dict[str, list[float]] = {}
    metrics: list[dict[str, Any]] = []
    frontiers: list[Split] = []
    alike = len({run.name for run in runs}) < len(runs)
    for run in runs:
        new = last_results(run)
        if not new:
            raise DataError(f"no results in {run / RESULTS}; give a folder that quickstart or evaluate wrote")
        suffix = f" ({run if alike else run.name})" if len(runs) > 1 else ""
        names = {(result.place, result.system.name) for result in results}
        keys = {(result.place, result.key) for result in results}
        for result in new:
            if (result.place, result.key) in keys:
                continue
            if (result.place, result.system.name) in names:
                result = result.renamed(result.system.name + suffix)
            results.append(result)
        frontiers += read_frontier(run)
        if (run / REWARDS).exists():
            values = json.loads((run / REWARDS).read_text(encoding="utf-8"))
            rewards |= {name + suffix: values[name] for name in values}
        if len(runs) == 1 and (run / METRICS).exists():
            metrics = [row for _, row in read_jsonl(run / METRICS)]
    comparisons = [comparison.record() for comparison in compare(results, permutations, seed)]
    title = title or ", ".join(run.name for run in runs)
    with atomic_directory(folder) as scratch:
        more = {"metrics": metrics, "comparisons": comparisons, "frontiers": frontiers}
        write_page(results, scratch, title=title, rewards=rewards, **more)
    return folder / "report.html"


def last_results(run: Path) -> list[Result]:
    """The results in the summary of the last `evaluate` into this folder; all of a run of `quickstart`."""
    results = load_results(run / RESULTS)
    path = run / SUMMARY
    if not path.exists():
        return results
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    summary_keys = {(row["system"], row["key"]) for row in rows}
    return [result for result in results if (result.system.name, result.key) in summary_keys]


def peak_memory_bytes() -> int | None:
    """The largest resident size of this process so far; None on Windows, where Python cannot tell it."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_report(
    folder: Path,
    report: dict[str, Any],
    results: Sequence[Result],
    metrics: Sequence[dict[str, Any]],
    rewards: dict[str, list[float]],
) -> None:
    """Write the page and the plots, then `report.json`: where that stands, the run is complete."""
    write_json(folder / REWARDS, rewards)
    write_page(
        results,
        folder,
        title=f"{report['collection']['name']}, seed {report['seed']}",
        rewards=rewards,
        metrics=metrics,
        comparisons=report["comparisons"],
    )
    write_json(folder / "report.json", report)
