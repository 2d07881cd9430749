"""Modes side by side on queries of one and of several hops: direct, auto at prices, budgets, means of samples, oracle.

    python benchmarks/modes.py runs/a/model runs/b/model --collection atlas --split dev --out modes.json

One-hop queries of `atlas` are all in its split `facts`, and stage 1 learns from every one of them. So one-hop queries
are asked here in wordings that no training has seen, about the territories of a split and what lies in them: as many as
there are queries of several hops. The gate is fitted on such a mixture of the split `rl`, whose direct vectors no
stage has trained, and measured on one of `dev` (or, at the very end, `test`); nothing is written into the models.

More models join as further points, in all modes that they have, with a gate of their own where they do not decide
themselves: `--also distilled=FOLDER,FOLDER` for each of the models, in their order. Where reasoning never pays, or
always does, there is no gate to fit, and no mode auto of that model.
`--brief` leaves budgets and samples out.

Milliseconds are means over queries that are asked alone. Each is put to every system before the next one is, several
times, back and forth, and the least counts, so that what else the machine does weighs little, and on all points alike.

A policy that decides itself (`grpo.at_once`) is best trained on such a mixture, too: `--save FOLDER` writes it, with
the splits `rl` and `dev`, and does nothing else.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from common import finish, machine, say, seconds, spread, versions

ONE_HOP = {
    "city_territory": ("the country of the city {s}", "which country is the city of {s} in?", "where is {s}?"),
    "currency_territory": ("the country that uses the {s}", "the country that pays with the {s}"),
    "language_territory": ("the country that speaks {s}", "which country is {s} spoken in?"),
    "language_script": ("which script do people write {s} with?", "the writing system used in {s}"),
}
"""Wordings of one-hop questions that no training has seen, in words that it has; those of territories are the wordings
that ask about a city with several hops (`city_currency`, `city_language`), so that no wording gives the hops away."""
BUDGETS, SAMPLES, PERMUTATIONS = (4, 8, 12, 16, 24), (4,), 2_000
ALONE, ROUNDS = 32, 3
PARTS = ("mixed", "one", "several")
TARGETS = {"mixed": 0.95, "several": 0.80}
"""Share of reason's gain over direct that auto should keep with half of reason's tokens."""


def mixture(split: str, name: str, seed: int = 0) -> Any:
    """A collection with the splits `mixed`, `one` and `several`: as many queries of one hop as of several."""
    from search_r3.data.collection import Collection, Query
    from search_r3.data.generators.atlas import BUILT_IN, PATHS, read_atlas, share_a_stem, split_territories

    atlas, whole = read_atlas(), BUILT_IN[name](0)
    territory_of = split_territories(atlas, 0)
    candidates = []
    wordings = ONE_HOP | {f"territory_{kind}": PATHS[f"city_{kind}"].questions for kind in ("currency", "language")}
    for relation, questions in wordings.items():
        for subject, target in sorted(atlas.facts[relation].items()):
            places = [one for one in (subject, target) if one.startswith("territory:")]
            places = places or [one for one, spoken in atlas.facts["territory_language"].items() if spoken == subject]
            if {territory_of[one] for one in places} == {split} and not share_a_stem(
                atlas.name(subject), atlas.name(target)
            ):
                candidates += [(relation, subject, target, question) for question in questions]
    chance = random.Random(f"{seed}/{split}")
    several = sorted(whole.split(split))
    size = min(len(several), len(candidates))
    several, chosen = chance.sample(several, size), chance.sample(candidates, size)
    queries = {query_id: whole.queries[query_id] for query_id in several}
    qrels: dict[str, Any] = {"one": {}, "several": {query_id: whole.split(split)[query_id] for query_id in several}}
    for number, (relation, subject, target, question) in enumerate(chosen):
        query_id = f"one/{relation}/{subject}/{number}"
        queries[query_id] = Query(query_id, question.format(s=atlas.name(subject)), {"hops": 1})
        qrels["one"][query_id] = {target: 1}
    return Collection(f"{name}-{split}", whole.documents, queries, {"mixed": qrels["one"] | qrels["several"], **qrels})


def mixtures(name: str) -> Any:
    """A collection whose splits `rl` and `dev` are the mixtures of these."""
    from search_r3.data.collection import Collection

    parts = {split: mixture(split, name) for split in ("rl", "dev")}
    queries = {query_id: query for part in parts.values() for query_id, query in part.queries.items()}
    qrels = {split: part.qrels["mixed"] for split, part in parts.items()}
    return Collection(f"{name}-mixed", parts["rl"].documents, queries, qrels)


def measure_model(
    model: Any, fit: Any, held_out: Any, price: float | None, also: dict[str, Any], brief: bool
) -> dict[str, Any]:
    """The gate, and the frontier on each part of the held-out mixture."""
    from search_r3.errors import DataError
    from search_r3.evaluation.benchmark import EvaluationOptions, evaluate
    from search_r3.evaluation.frontier.record import frontier
    from search_r3.evaluation.runner import FrontierOptions
    from search_r3.evaluation.systems import Effort, EncodedCollections, SearchR3System
    from search_r3.model.modes.first import decides, has_auto
    from search_r3.model.modes.latent import trained_modes
    from search_r3.training.modes.gate import fit_gate, label_queries

    def gate_of(one: Any, label: str) -> Any:
        try:
            return fit_gate(one, label_queries(one, fit, ["mixed"]), price)
        except DataError as error:
            say(f"{label}: no mode auto, since {error}")
            return None

    gate, half = gate_of(model, "gate"), None
    model.backbone.gate = gate
    ways: list[tuple[str, Any, Any]] = [(mode, mode, Effort()) for mode in ("direct", "reason")]
    if gate is not None:
        say(f"gate: AUC {gate.fitted['by_scores']['auc']:.3f}, vector alone {gate.fitted['by_vector']['auc']:.3f}")
        half = min(gate.fitted["by_scores"]["prices"], key=lambda row: abs((row["token_share"] or 0) - 0.5))["price"]
        ways += [("auto", "auto", Effort()), ("auto at half", "auto", Effort(price=half))]
    if not brief:
        ways += [(name, "reason", effort) for name, effort in FrontierOptions(BUDGETS, SAMPLES).efforts().items()]
    encoded = EncodedCollections(model)
    systems = [SearchR3System(encoded, mode, name, effort=effort) for name, mode, effort in ways]
    for label, other in also.items():
        there, modes = EncodedCollections(other), trained_modes(other.backbone)
        if not has_auto(other.backbone):
            other.backbone.gate = gate_of(other, label)
        modes += ["auto"] if has_auto(other.backbone) else []
        systems += [SearchR3System(there, mode, f"{mode}/{label}") for mode in modes]
        if decides(other.backbone):
            systems.append(SearchR3System(there, "reason", f"at once/{label}", effort=Effort(budget=1)))
    options = EvaluationOptions(depth=100, bootstrap=100, latency_queries=0)
    whole = [evaluate(system, held_out, "mixed", options) for system in systems]
    for place, milliseconds in enumerate(asked_alone(systems, held_out, options.depth)):
        cost = whole[place].cost.model_copy(update={"ms_per_query": milliseconds})
        whole[place] = whole[place].model_copy(update={"cost": cost})
    results = [part_of(result, part, held_out.qrels[part]) for part in PARTS for result in whole]
    splits = frontier(results, PERMUTATIONS, 0)
    for split in splits:
        here = {one.system.name: one for one in results if one.collection.split == split["split"]}
        for label in also:
            if f"auto/{label}" in here:
                split["points"] += own_thresholds(here, label)
    return {"gate": gate and gate.model_dump(mode="json"), "half_price": half, "frontier": splits}


def asked_alone(systems: Sequence[Any], collection: Any, depth: int) -> list[float]:
    """Milliseconds of each system for a query of the mixture."""
    from search_r3.retrieval.ranking import make_requests

    requests = make_requests(collection, collection.qrels["mixed"])
    indexes = [system.index(collection) for system in systems]
    least: list[list[float]] = [[] for _ in systems]
    for request in requests[:: max(1, len(requests) // ALONE)]:
        spent: list[list[float]] = [[] for _ in systems]
        for number in range(ROUNDS):
            for place in range(len(systems))[:: 1 if number % 2 else -1]:
                spent[place].append(1000 * seconds(indexes[place].answer, [request], depth))
        for own, times in zip(least, spent, strict=True):
            own.append(min(times))
    return [fmean(own) for own in least]


def own_thresholds(results: dict[str, Any], label: str) -> list[dict[str, Any]]:
    """Mode auto of a further model, where the probability to think has to reach other values."""
    import numpy as np

    direct, reason = (results[name] for name in ("direct", "reason"))
    low, high = (one.scores["ndcg@10"] for one in (direct, reason))
    written, at_once = results[f"reason/{label}"], results.get(f"at once/{label}", results[f"direct/{label}"])
    chances = np.array([one["probability"] for one in results[f"auto/{label}"].gate])
    rows = []
    for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        thinks = chances >= np.quantile(chances, 1 - share)
        quality = np.where(thinks, written.per_query["ndcg@10"], at_once.per_query["ndcg@10"]).mean()
        tokens = np.where(thinks, written.reasoning_tokens, 0).mean()
        row: dict[str, Any] = {"name": f"auto/{label} at {share}", "family": f"auto/{label}", "ndcg@10": float(quality)}
        row |= {"tokens_per_query": float(tokens), "ms_per_query": None, "share": float(thinks.mean())}
        row["gain_share"] = float((quality - low) / (high - low)) if high > low else None
        rows.append(row | {"token_share": float(tokens / max(1e-12, fmean(reason.reasoning_tokens)))})
    return rows


def part_of(result: Any, part: str, query_ids: Any) -> Any:
    """The result of some of its queries, under another name of the split; the cost in time stays that of all."""
    rows = [row for row, query_id in enumerate(result.query_ids) if query_id in query_ids]
    names = "query_ids", "queries", "top", "relevant", "reasoning", "reasoning_tokens", "thought", "gate"
    lists = {name: [values[row] for row in rows] if (values := getattr(result, name)) else [] for name in names}
    per_query = {name: [values[row] for row in rows] for name, values in result.per_query.items()}
    share = fmean(lists["thought"]) if lists["thought"] else None
    changes = {
        "collection": result.collection.model_copy(update={"split": part, "queries": len(rows)}),
        "per_query": per_query,
        "scores": {name: fmean(values) for name, values in per_query.items()},
        "cost": result.cost.model_copy(update={"thinking_share": share}),
    }
    return result.model_copy(update=lists | changes)


def kept(split: dict[str, Any], name: str) -> dict[str, float | None]:
    """A point of one part of the mixture."""
    row = next(point for point in split["points"] if point["name"] == name)
    keys = "ndcg@10", "tokens_per_query", "ms_per_query", "gain_share", "token_share"
    return {key: row[key] for key in keys}


def at_half(split: dict[str, Any], family: str = "auto") -> float | None:
    """The share of the gain that auto keeps at exactly half of reason's tokens, between its two nearest prices.

    None where it reaches no such price, or there is no such auto.
    """
    if not any(row["family"] == family for row in split["points"]):
        return None
    rows = [row for row in split["points"] if row["family"] in ("direct", family, "reason")]
    rows = sorted((row for row in rows if row["gain_share"] is not None), key=lambda row: row["token_share"])
    for low, high in pairwise(rows):
        if low["token_share"] <= 0.5 <= high["token_share"]:
            share = (0.5 - low["token_share"]) / max(1e-12, high["token_share"] - low["token_share"])
            return float(low["gain_share"] + share * (high["gain_share"] - low["gain_share"]))
    return None


def table(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the models, part by part; what is kept at half of the tokens; areas."""
    rows: dict[str, Any] = {}
    for place, part in enumerate(PARTS):
        splits = [one["frontier"][place] for one in seeds]
        own = [{row["name"] for row in split["points"]} for split in splits]
        names = [row["name"] for row in splits[0]["points"] if " at 0" not in row["name"]]
        names = [name for name in names if all(name in one for one in own)]  # a gate may be missing
        rows[part] = {
            "points": {
                name: {
                    key: None if any(each[key] is None for each in values) else fmean(each[key] for each in values)
                    for key in values[0]
                }
                for name in names
                if (values := [kept(split, name) for split in splits])
            },
            "kept_at_half": {
                family: [at_half(split, family) for split in splits]
                for family in sorted({row["family"] for row in splits[0]["points"]})
                if family.partition("/")[0] == "auto"
            },
            "areas": [split["areas"] for split in splits],
        }
    return rows


def lines(part: str, rows: dict[str, Any]) -> list[str]:
    """The table of one part of the mixture: means over the models, the cheapest point first."""
    keys = {"ndcg@10": "nDCG@10", "tokens_per_query": "tokens", "ms_per_query": "ms", "gain_share": "of the gain"}
    text = [f"{part:24} " + " ".join(f"{heading:>11}" for heading in keys.values())]
    for name, row in sorted(rows["points"].items(), key=lambda item: item[1]["tokens_per_query"]):
        digits = {"tokens_per_query": 1, "ms_per_query": 1}
        cells = ["" if row[key] is None else f"{row[key]:.{digits.get(key, 3)}f}" for key in keys]
        text.append(f"{name:24} " + " ".join(f"{cell:>11}" for cell in cells))
    for family, values in rows["kept_at_half"].items():
        known = [value for value in values if value is not None]
        text.append(f"{family} keeps at half of the tokens: {spread(known) if known else 'nothing'}")
    return [*text, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="model directories, a seed each")
    parser.add_argument("--also", action="append", default=[], help="LABEL=FOLDER,FOLDER,...: one for each model")
    parser.add_argument("--collection", default="atlas", help="atlas or atlas-wide")
    parser.add_argument("--split", default="dev", help="dev, or at the end test")
    parser.add_argument("--price", type=float, help="of a token in nDCG@10; by default half of what it earns")
    parser.add_argument("--brief", action="store_true", help="without budgets and samples")
    parser.add_argument("--save", type=Path, help="write the mixture that a policy is trained on, and end")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.save is not None:
        mixtures(options.collection).save(options.save)
        return
    if not options.models:
        parser.error("name one model or more")

    from search_r3 import SearchR3

    fit = mixture("rl", options.collection)
    held_out = mixture(options.split, options.collection)
    say(f"fit: {len(fit.queries)} queries; measured: {len(held_out.queries)}")
    also = {label: folders.split(",") for label, _, folders in (one.partition("=") for one in options.also)}
    for label, folders in also.items():
        if len(folders) != len(options.models):
            parser.error(
                f"--also {label} names {len(folders)} folders for {len(options.models)} models; name one for each"
            )
    seeds = []
    for number, name in enumerate(options.models):
        others = {label: SearchR3(folders[number]) for label, folders in also.items()}
        seeds.append(
            {"model": name} | measure_model(SearchR3(name), fit, held_out, options.price, others, options.brief)
        )
    record = {
        "benchmark": "modes",
        "collection": options.collection,
        "split": options.split,
        "queries": {part: len(held_out.qrels[part]) for part in PARTS},
        "fit": len(fit.queries),
        "targets": TARGETS,
        "table": table(seeds),
        "seeds": seeds,
        "machine": machine(),
        "versions": versions("search-r3", "torch", "transformers", "numpy"),
    }
    for part, rows in record["table"].items():
        say("\n".join(lines(part, rows)))
    finish(record, options.out)


if __name__ == "__main__":
    main()
