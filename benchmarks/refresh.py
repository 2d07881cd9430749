"""How wrong each refresh policy is, and what it costs: along the same GRPO trajectory, then in trainings of its own.

    python benchmarks/refresh.py --recipe recipes/atlas-wide.yaml --out runs/refresh     # hours on two cores
    python benchmarks/refresh.py --quick --out runs/refresh-quick                        # within a minute

Trajectories: a real GRPO run with `full` refresh, which encodes every document at every step. Beside it every other
policy keeps an index of its own and is asked for its rewards of the very same rollouts; the vectors that it pays for
are read from the full index, so that its errors are exact and its price is counted, not guessed. Trainings: whole
runs in which the policy's own rewards train the model. The stage-1 model is the same for all; seeds change stage 2.

Every finished trajectory and training is a file under --out and is not repeated. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from common import machine, spread
from scipy.stats import spearmanr

from search_r3.config import Recipe, RefreshSettings, load_recipe
from search_r3.data.collection import Collection
from search_r3.data.load import load_collection
from search_r3.environment.environment import RetrievalEnvironment, rollout_vectors
from search_r3.environment.refresh import Selective
from search_r3.evaluation.benchmark import EvaluationOptions, evaluate
from search_r3.evaluation.systems import EncodedCollections, SearchR3System
from search_r3.files import write_json
from search_r3.model.encoder import SearchR3
from search_r3.training import losses
from search_r3.training.engine import load_model, make_engine
from search_r3.training.grpo import train_grpo, update
from search_r3.training.rl.rollouts import Experience, collect
from search_r3.training.sft import train_sft
from search_r3.types import DocumentEncoder, Progress

QUICK = [
    "collection=atlas",
    "sft.steps=120",
    "sft.batch_size=12",
    "grpo.steps=2",
    "grpo.queries_per_step=8",
    "grpo.evaluate_every=2",
]

SMALLEST_ERROR = 1e-5
"""Smaller errors are drawn as this one."""


def policies(documents: int, budgets: Sequence[float]) -> dict[str, RefreshSettings]:
    """The settings of every row but `full`, for a corpus of that size; budgets are shares of it."""
    rows = {
        "never": RefreshSettings(policy="never"),
        "drift": RefreshSettings(policy="drift"),
        "periodic 10": RefreshSettings(policy="periodic", every=10),
        "shortlist": RefreshSettings(policy="shortlist"),
        "shortlist + drift": RefreshSettings(policy="shortlist", correct_drift=True),
    }
    for budget in budgets:
        limit = max(1, int(budget * documents))
        rows[f"selective {100 * budget:g}%"] = RefreshSettings(policy="selective", max_documents=limit)
        rows[f"selective {100 * budget:g}% + drift"] = RefreshSettings(
            policy="selective", max_documents=limit, correct_drift=True
        )
    return rows


class FromTheTruth:
    """A document encoder for a shadow environment: reads what the full index has just encoded."""

    def __init__(self, truth: RetrievalEnvironment, model: SearchR3) -> None:
        self.truth, self.model = truth, model
        self.doc_ids = {document.full_text: doc_id for doc_id, document in truth.collection.documents.items()}
        self.tokens: dict[str, int] = {}

    def encode_document(self, texts: Sequence[str], progress: Progress | None = None) -> Any:
        """Vectors of the full index."""
        if progress is not None:
            progress(len(texts), sum(self.count_document_tokens(texts)))
        return self.truth.index.vectors_at(self.truth.index.rows_of([self.doc_ids[text] for text in texts]))

    def count_document_tokens(self, texts: Sequence[str]) -> list[int]:
        """As the model counts, each text once."""
        unknown = [text for text in texts if text not in self.tokens]
        self.tokens.update(zip(unknown, self.model.count_document_tokens(unknown), strict=True))
        return [self.tokens[text] for text in texts]


class Shadow:
    """One policy with an index of its own, asked for its rewards of rollouts that another run made."""

    def __init__(self, environment: RetrievalEnvironment) -> None:
        self.environment = environment
        self.rewards: list[float] = []
        self.rows: list[dict[str, float | None]] = []

    def answer(self, truth: RetrievalEnvironment, experience: Experience, step: int, recipe: Recipe) -> None:
        """Refresh by the policy, score the rollouts, and write down what that cost and how far it is from the truth."""
        settings, own = recipe.grpo, self.environment
        feedback = own.feedback(experience.rollouts, experience.query_ids, step)
        self.rewards += feedback.rewards
        true = np.array(experience.feedback.rewards)
        groups = torch.tensor(feedback.rewards).view(-1, settings.group_size)
        signs = losses.group_advantages(groups, settings.advantage_scale).values.flatten().sign()
        vectors = rollout_vectors(experience.rollouts)
        found = zip(truth.index.search(vectors, 10).doc_ids, own.index.search(vectors, 10).doc_ids, strict=True)
        paid, count = feedback.refresh, len(truth.index)
        graph = own.policy.graph if isinstance(own.policy, Selective) else None
        self.rows.append(
            {
                "reward_mae": float(np.abs(true - feedback.rewards).mean()),
                "top10_overlap": fmean(len(set(a) & set(b)) / len(a) for a, b in found),
                "sign_agreement": float((signs == experience.advantages.sign()).float().mean()),
                "documents": paid.documents_encoded,
                "tokens": paid.tokens_encoded,
                "seconds": paid.seconds + experience.feedback.refresh.seconds * paid.documents_encoded / count,
                "staleness": paid.staleness_mean,
                "drift": float((1 - (own.index.matrix * truth.index.matrix).sum(axis=1)).mean()),
                "drift_gain": paid.drift_gain,
                "graph_recall": graph.recall(own.index, np.arange(0, count, max(1, count // 200))) if graph else None,
            }
        )


def finished(path: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """What a file of an earlier call holds, if that call asked for the same."""
    record = json.loads(path.read_text())
    if record["settings"] != asked:
        sys.exit(f"{path} was made with other settings; choose another --out, or remove it")
    return record


def trajectory(recipe: Recipe, base: Path, path: Path, budgets: Sequence[float]) -> dict[str, Any]:
    """One GRPO run with `full`, and every policy's answers to its rollouts."""
    asked = {"collection": recipe.collection, "budgets": list(budgets), "seed": recipe.seed}
    asked |= {"grpo": recipe.grpo.model_dump(mode="json")}
    if path.exists():
        return finished(path, asked)
    if recipe.grpo.kl_coefficient or recipe.grpo.num_iterations > 1:
        sys.exit("a trajectory is a training with full refresh only where kl_coefficient=0 and num_iterations=1")
    collection, settings = load_collection(recipe.collection), recipe.grpo
    qrels = {query_id: gains for split in settings.splits for query_id, gains in collection.split(split).items()}
    model = load_model(recipe, base)
    engine = make_engine(model, recipe, settings)

    def environment(encoder: DocumentEncoder, refresh: RefreshSettings) -> RetrievalEnvironment:
        limits = {"k": settings.reward_k, "max_new_tokens": recipe.max_new_tokens, "seed": recipe.seed}
        return RetrievalEnvironment(collection, qrels, encoder, refresh, settings.reward, **limits)

    truth = environment(model, RefreshSettings(policy="full"))
    reader = FromTheTruth(truth, model)
    rows = policies(len(collection.documents), budgets)
    shadows = {name: Shadow(environment(reader, refresh)) for name, refresh in rows.items()}
    start, true_rewards, steps = truth.index.matrix.copy(), [], []
    for step in range(settings.steps):
        started = time.perf_counter()
        experience = collect(model, truth, recipe, step, engine)
        true_rewards += experience.feedback.rewards
        collected = time.perf_counter()
        for shadow in shadows.values():
            shadow.answer(truth, experience, step, recipe)
        answered = time.perf_counter()
        values = update(model, engine, truth, experience, settings)
        steps.append(
            {
                "reward": fmean(experience.feedback.rewards),
                "refresh_seconds": experience.feedback.refresh.seconds,
                "seconds": time.perf_counter() - answered + collected - started,
                "drift_from_start": float((1 - (start * truth.index.matrix).sum(axis=1)).mean()),
                "grad_norm": values["grad_norm"],
            }
        )
        print(f"{path.stem} step {step + 1}/{settings.steps} {steps[-1]}", file=sys.stderr, flush=True)
    record = {
        "settings": asked,
        "corpus": collection.name,
        "documents": len(collection.documents),
        "learning_rate": settings.learning_rate,
        "seed": recipe.seed,
        "full": steps,
        "policies": {name: shadow.rows for name, shadow in shadows.items()},
        "spearman": {
            name: float(spearmanr(true_rewards, shadow.rewards).statistic) for name, shadow in shadows.items()
        },
        "final": final_ndcg(model, collection, recipe),
        "tokens": sum(reader.count_document_tokens(list(reader.doc_ids))),
    }
    write_json(path, record)
    return record


def training(recipe: Recipe, base: Path, path: Path) -> dict[str, Any]:
    """A whole stage 2 in which the policy's own rewards train the model; its final nDCG@10 and what it paid."""
    asked = recipe.model_dump(mode="json")
    if path.exists():
        return finished(path, asked)
    started = time.perf_counter()
    result = train_grpo(recipe, model=base, resume=True)
    seconds = time.perf_counter() - started
    rows = [row for row in result.log_history if row["step"] > 0]
    collection = load_collection(recipe.collection)
    record = {
        "settings": asked,
        "final": final_ndcg(load_model(recipe, result.model_path), collection, recipe),
        "documents": sum(row["documents_encoded"] for row in rows),
        "tokens": sum(row["tokens_encoded"] for row in rows),
        "refresh_seconds": sum(row["refresh_seconds"] for row in rows),
        "seconds": seconds,
    }
    write_json(path, record)
    return record


def final_ndcg(model: SearchR3, collection: Collection, recipe: Recipe) -> float:
    """nDCG@10 on the test split after reasoning, over a corpus encoded afresh."""
    settings = recipe.evaluation
    system = SearchR3System(EncodedCollections(model), "reason", batch_size=settings.batch_size)
    options = EvaluationOptions(latency_queries=0)
    return evaluate(system, collection, settings.test_split, options).scores["ndcg@10"]


def mean_of(record: dict[str, Any], name: str, key: str) -> float:
    """The mean over the steps of what a policy's rows hold."""
    return fmean(row[key] for row in record["policies"][name])


def full_share(record: dict[str, Any]) -> float:
    """The share of documents that `full` encodes per step: the first step finds them fresh."""
    return (len(record["full"]) - 1) / len(record["full"])


def print_trajectories(records: Sequence[dict[str, Any]]) -> None:
    """One row per policy: means over the steps, median and range over the seeds."""
    documents = records[0]["documents"]
    full_seconds = fmean(step["refresh_seconds"] for record in records for step in record["full"])
    print(
        f"\n{records[0]['corpus']}, learning rate {records[0]['learning_rate']:g}: {len(records)} trajectories of ",
        end="",
    )
    print(f"{len(records[0]['full'])} steps; documents move by 1 - cos = ", end="")
    print(f"{spread([record['full'][-1]['drift_from_start'] for record in records])} from first to last step")
    print("\n| policy | encoded/step | seconds/step | reward MAE | Spearman | top-10 overlap | same sign | staleness |")
    print("|---|---|---|---|---|---|---|---|")
    print(f"| full | {full_share(records[0]):.1%} | {full_seconds:.2f} | 0 | 1 | 1 | 1 | 0 |")
    for name in records[0]["policies"]:
        share = fmean(mean_of(record, name, "documents") for record in records) / documents
        seconds = fmean(mean_of(record, name, "seconds") for record in records)
        cells = [spread([mean_of(record, name, "reward_mae") for record in records], 4)]
        cells += [spread([record["spearman"][name] for record in records], 4)]
        cells += [
            spread([mean_of(record, name, key) for record in records]) for key in ("top10_overlap", "sign_agreement")
        ]
        staleness = fmean(mean_of(record, name, "staleness") for record in records)
        print(f"| {name} | {share:.2%} | {seconds:.2f} | {' | '.join(cells)} | {staleness:.1f} |")
    graphs = [name for name, rows in records[0]["policies"].items() if rows[-1]["graph_recall"] is not None]
    ends = {name: spread([record["policies"][name][-1]["graph_recall"] for record in records]) for name in graphs}
    print("\nrecall of the neighbour graph at the last step: " + ", ".join(f"{n} {value}" for n, value in ends.items()))
    drifts = {
        name: spread([record["policies"][name][-1]["drift"] for record in records], 4) for name in ("never", "drift")
    }
    print(
        f"drift (1 - cos to fresh) of all documents at the last step: never {drifts['never']}, drift {drifts['drift']}"
    )


def print_trainings(results: dict[str, list[dict[str, Any]]], documents: int, steps: int) -> None:
    """Final quality and what was paid for it."""
    print("\n| trained with | test nDCG@10, reason | documents encoded | share/step | refresh seconds |")
    print("|---|---|---|---|---|")
    for name, rows in results.items():
        total = fmean(row["documents"] for row in rows)
        cells = [spread([row["final"] for row in rows]), f"{total:.0f}", f"{total / documents / steps:.2%}"]
        print(f"| {name} | {' | '.join(cells)} | {fmean(row['refresh_seconds'] for row in rows):.0f} |")


def plot(groups: dict[float, list[dict[str, Any]]], path: Path) -> None:
    """Left: error against price, all policies and rates. Right: the error over the steps, at the largest rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    frontier, course = figure.subplots(1, 2)
    documents = next(iter(groups.values()))[0]["documents"]
    for (rate, records), marker in zip(groups.items(), "osD^v", strict=False):
        for number, name in enumerate(records[0]["policies"]):
            share = fmean(mean_of(record, name, "documents") for record in records) / documents
            error = fmean(mean_of(record, name, "reward_mae") for record in records)
            frontier.scatter(share, max(error, SMALLEST_ERROR), marker=marker, s=60, color=f"C{number}")
        frontier.scatter([], [], marker=marker, color="0.4", label=f"learning rate {rate:g}")
    frontier.set(xscale="log", yscale="log", xlabel="share of documents encoded per step")
    frontier.set(ylabel="mean error of the reward against full", title="Colours as on the right")
    frontier.legend()
    rate, records = max(groups.items())
    for number, name in enumerate(records[0]["policies"]):
        errors = np.mean([[row["reward_mae"] for row in record["policies"][name]] for record in records], axis=0)
        course.plot(range(1, len(errors) + 1), errors, color=f"C{number}", label=name)
    course.set(xlabel="GRPO step", ylabel="mean error of the reward against full", title=f"learning rate {rate:g}")
    course.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/atlas-wide.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/refresh"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[3e-4, 1e-3])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.01, 0.03], help="shares of the corpus")
    parser.add_argument("--train", nargs="*", help="policies that get trainings of their own; by default all")
    parser.add_argument("--train-learning-rates", type=float, nargs="*", help="by default those of the trajectories")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    seeds, rates = (
        (options.seeds[:1], options.learning_rates[:1]) if options.quick else (options.seeds, options.learning_rates)
    )
    common = [f"run_dir={options.out}/stage1", "seed=0", *(QUICK if options.quick else [])]
    first = load_recipe(options.recipe, common)
    base = train_sft(first, resume=True).model_path

    def recipe(*overrides: str) -> Recipe:
        return load_recipe(options.recipe, [*(QUICK if options.quick else []), *overrides])

    groups: dict[float, list[dict[str, Any]]] = {}
    documents = 0
    for rate in rates:
        for seed in seeds:
            chosen = recipe(f"seed={seed}", f"grpo.learning_rate={rate}")
            path = options.out / f"trajectory-{rate:g}-{seed}.json"
            groups.setdefault(rate, []).append(trajectory(chosen, base, path, options.budgets))
    documents = groups[rates[0]][0]["documents"]
    for records in groups.values():
        print_trajectories(records)
    plot(groups, options.out / "refresh.png")
    for rate in rates if options.train_learning_rates is None else options.train_learning_rates:
        # The trajectory is itself the training with `full`.
        results: dict[str, list[dict[str, Any]]] = {"full": [as_training(record) for record in groups.get(rate, [])]}
        rows = policies(documents, options.budgets)
        for name in rows if options.train is None else options.train:
            settings = rows[name].model_dump(exclude_none=True)
            for seed in seeds:
                label = f"{name.replace('%', 'pc').replace(' ', '')}-{rate:g}-{seed}"
                overrides = [f"grpo.refresh.{key}={value}" for key, value in settings.items()]
                chosen = recipe(
                    f"seed={seed}", f"grpo.learning_rate={rate}", f"run_dir={options.out}/{label}", *overrides
                )
                results.setdefault(name, []).append(training(chosen, base, options.out / f"training-{label}.json"))
        print(f"\nTrainings at learning rate {rate:g}:")
        print_trainings(results, documents, first.grpo.steps)
    record = groups[rates[0]][0]
    share = mean_of(record, f"selective {100 * options.budgets[-1]:g}%", "documents") / documents
    result = {"benchmark": "refresh", "peer": "full", "ratio": share, "unit": "documents encoded", "runs": len(seeds)}
    settings = {"recipe": options.recipe, "seeds": seeds, "learning_rates": rates, "quick": options.quick}
    print(json.dumps({**result, "settings": settings, "machine": machine()}))


def as_training(record: dict[str, Any]) -> dict[str, Any]:
    """What a training with `full` is, read from its trajectory."""
    return {
        "final": record["final"],
        "documents": full_share(record) * len(record["full"]) * record["documents"],
        "refresh_seconds": sum(step["refresh_seconds"] for step in record["full"]),
    }


if __name__ == "__main__":
    main()
