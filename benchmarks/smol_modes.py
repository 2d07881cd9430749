"""Ways to think side by side on a real model, direct, distilled, latent, auto, reason; the last line is a JSON object.

    python benchmarks/smol_data.py PAIRS DATA_ROOT data/research --profile research
    python benchmarks/smol_modes.py smol --data data/research --work runs/smol-modes

Begins from a trained model (`smol`, or a directory), whose documents stay as they are, and one source of the data whose
queries hold what a reasoning would say. Stages (recipes/smol-modes.yaml): base (weights, whole, that read longer
queries), write (true traces), read in two goes (its own replies, right or wrong, are read; true traces are written on),
and then, all from there: latent (soft tokens), distill (no labels), decide (stage 1 shows that a reply may embed at
once, stage 2 when to). Distill and stage 2 have queries of their own; nothing learns from those of the split `gate`,
for `search-r3 gate`. A stage that is finished is not repeated, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from common import machine, say

from search_r3.config import Recipe, load_recipe
from search_r3.data.collection import Collection
from search_r3.files import write_json
from search_r3.model.encoder import SearchR3
from search_r3.training.best_of_n import BestOfNSettings, best_of_n
from search_r3.training.grpo import train_grpo
from search_r3.training.modes.distill import train_distill
from search_r3.training.sft import train_sft

RECIPE = Path(__file__).parent.parent / "recipes" / "smol-modes.yaml"
MAX_LENGTH = 256
SIZES = {"write": 4000, "own": 1000, "rest": 900}
"""Queries with a trace in each split that is learned from."""
GATE = 600
OWN = ["sft.read_styles=[own]", "sft.warmup_steps=4"]
MIXED = [*OWN, "sft.splits={own: 0.6, write: 0.4}"]
MOSTLY_READ = "sft.reasoning_styles={trace: 0.25, own: 0.75}"
READ = [*MIXED, MOSTLY_READ, "sft.steps=64", "sft.learning_rate=6.0e-4"]
MORE = [*OWN, "sft.splits={own: 0.8, write: 0.2}", "sft.reasoning_styles={trace: 0.2, own: 0.8}", "sft.steps=40"]
LATENT = [*MIXED, "sft.reasoning_styles={trace: 0.6, own: 0.4}", "sft.latent_steps=3", "sft.steps=24"]
LATENT += ["sft.batch_size=8"]  # a step passes K + 1 times over each prompt
SHOWN = [*MIXED, MOSTLY_READ, "sft.at_once=0.3", "sft.steps=12"]
SLOWER = "sft.learning_rate=4.0e-4"
STAGES = ("write", "read", "latent", "distill", "decide")


def divided(train: Collection, source: str, seed: int) -> Collection:
    """The documents of one source, and splits of its queries."""
    judged, queries = train.qrels[source], train.queries
    traced = [one for one in sorted(judged) if "trace" in queries[one].metadata.get("reasoning", {})]
    if len(traced) < GATE + sum(SIZES.values()):
        raise SystemExit(f"{source} has {len(traced)} queries with a trace; {GATE + sum(SIZES.values())} are needed")
    chance = random.Random(f"{seed}/{source}")
    chance.shuffle(traced)
    apart = chance.sample(sorted(judged), GATE)
    left = iter([one for one in traced if one not in set(apart)])
    splits = {name: list(islice(left, size)) for name, size in SIZES.items()}
    learned = {queries[one].text.casefold() for query_ids in splits.values() for one in query_ids}
    splits["gate"] = [one for one in apart if queries[one].text.casefold() not in learned]
    qrels = {name: {one: judged[one] for one in query_ids} for name, query_ids in splits.items()}
    documents = {one: document for one, document in train.documents.items() if one.split("/")[0] == source}
    asked = {one for query_ids in splits.values() for one in query_ids}
    return Collection(source, documents, {one: queries[one] for one in queries if one in asked}, qrels)


class Stages:
    """The models of `work`; a stage that is finished there is not repeated."""

    def __init__(self, work: Path, changes: Sequence[str]) -> None:
        self.work, self.changes = work, changes

    def sft(self, name: str, base: Path, collection: Path, *settings: str) -> Path:
        """Stage 1 from `base`."""
        return train_sft(self._recipe(name, collection, f"base={base}", *settings), resume=True).model_path

    def distill(self, name: str, model: Path, collection: Path) -> Path:
        """The direct vector learns what `model` finds by reasoning."""
        return train_distill(model, self._recipe(name, collection), resume=True).model_path

    def grpo(self, name: str, model: Path, collection: Path) -> Path:
        """Stage 2 from `model`."""
        return train_grpo(self._recipe(name, collection), model=model, resume=True).model_path

    def _recipe(self, name: str, collection: Path, *settings: str) -> Recipe:
        where = [f"run_dir={self.work / name}", f"collection={collection}"]
        return load_recipe(RECIPE, [*where, *settings, *self.changes])


def begin(work: Path, facts: dict[str, Any]) -> None:
    """Write down what the work begins from; refuse a folder that began from something else."""
    file = work / "begun.json"
    if file.exists() and (before := json.loads(file.read_text(encoding="utf-8"))) != facts:
        raise SystemExit(f"{work} began with {before}, now it is {facts}; give another --work")
    work.mkdir(parents=True, exist_ok=True)
    write_json(file, facts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="smol, or a model directory that a stage has trained")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--source", default="clutrr_relation", help="split of the data; its queries have traces")
    parser.add_argument("--work", type=Path, default=Path("runs/smol-modes"))
    parser.add_argument("--set", nargs="*", default=[], help="key=value for the recipe of every stage")
    parser.add_argument("--stages", nargs="*", default=STAGES, choices=STAGES, help="those that come before are made")
    options = parser.parse_args(arguments)
    work, stages, seed = options.work, Stages(options.work, options.set), load_recipe(RECIPE, options.set).seed
    begin(work, {"model": options.model, "data": str(options.data), "source": options.source, "seed": seed})
    base, data, own = work / "base", work / "data", work / "own"
    if not (base / "config.json").exists():
        SearchR3(options.model, dtype="float32", max_length=MAX_LENGTH).save_pretrained(base)
    if not (data / "corpus.jsonl").exists():
        divided(Collection.load(options.data / "train"), options.source, seed).save(data)
    models = {"write": stages.sft("write", base, data)}
    if not (own / "corpus.jsonl").exists():
        settings = BestOfNSettings(samples=1, sampling_temperature=0.6, min_ndcg=0.0)
        writer = SearchR3(models["write"], dtype="bfloat16")
        report = best_of_n(writer, Collection.load(data), own, settings, cache=work / "cache", splits=["own"])
        say(f"own replies: {report}")
    if {"read", "latent", "distill", "decide"} & set(options.stages):
        first = stages.sft("read", models["write"], own, *READ)
        models["read"] = stages.sft("read-more", first, own, *MORE, SLOWER)
    if "latent" in options.stages:
        models["latent"] = stages.sft("latent", models["read"], own, *LATENT, SLOWER)
    if "distill" in options.stages:
        models["distill"] = stages.distill("distill", models["read"], own)
    if "decide" in options.stages:
        shown = stages.sft("shown", models["read"], own, *SHOWN, SLOWER)
        models["decide"] = stages.grpo("decide", shown, own)
    record = {"benchmark": "smol_modes", "models": {name: str(path) for name, path in models.items()}}
    print(json.dumps(record | {"machine": machine()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
