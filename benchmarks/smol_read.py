"""The small real model learns to read what it writes, on a CPU; the last line is one JSON object.

    python benchmarks/smol_data.py PAIRS DATA_ROOT data/smol --profile ship
    python benchmarks/smol_read.py smol --anew --data data/smol --work runs/smol-read --limit 250

Begins from a trained model (`smol`, or a directory); `--anew`: from what encodes its documents, where it has learned to
read before. Stages: base (its weights, whole), collection (a few thousand documents and queries of the sources that
have reasoning), own (the model's own replies to them, `best-of-n` with n = 1), sft (recipes/smol-read.yaml: documents
frozen), grpo, and what both models do on dev queries. A stage that is finished is not repeated, so the same command
goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import machine, say
from smol_eval import evaluate

from search_r3.config import load_recipe
from search_r3.data.collection import Collection
from search_r3.model.encoder import SearchR3
from search_r3.training.best_of_n import BestOfNSettings, best_of_n
from search_r3.training.grpo import train_grpo
from search_r3.training.sft import train_sft

RECIPE = Path(__file__).parent.parent / "recipes" / "smol-read.yaml"
WHOLE = 1500
"""Documents of a source up to which all of them are ranked; of a larger one those that a query needs, and its
negatives."""


def smaller(train: Collection, splits: Sequence[str], limit: int, seed: int) -> Collection:
    """So many queries of each split, drawn at random, and the documents that are ranked for them."""
    qrels = {}
    for split in splits:
        judged = train.qrels[split]
        drawn = random.Random(f"{seed}/{split}").sample(sorted(judged), min(limit, len(judged)))
        qrels[split] = {one: judged[one] for one in drawn}
    asked = {one for split in qrels.values() for one in split}
    needed = {one for split in qrels.values() for gains in split.values() for one in gains}
    needed |= {one for query_id in asked for one in train.queries[query_id].metadata.get("negatives", ())}
    sources: dict[str, list[str]] = {}
    for one in train.documents:
        sources.setdefault(one.split("/")[0], []).append(one)
    needed |= {one for split in splits if len(sources[split]) <= WHOLE for one in sources[split]}
    return Collection(
        "smol-read",
        {one: document for one, document in train.documents.items() if one in needed},
        {one: train.queries[one] for one in train.queries if one in asked},
        qrels,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="smol, or a model directory that a stage has trained")
    parser.add_argument("--anew", action="store_true", help="leave out what the model has for queries alone")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/smol-read"))
    parser.add_argument("--limit", type=int, default=250, help="queries of each source to learn from")
    parser.add_argument("--queries", type=int, default=200, help="dev queries of each collection")
    parser.add_argument("--set", nargs="*", default=[], help="key=value for the recipe")
    parser.add_argument(
        "--stages", nargs="*", default=["sft", "grpo"], choices=["sft", "grpo"], help="none: look at the base alone"
    )
    options = parser.parse_args(arguments)
    work = options.work
    base, own = work / "base", work / "own"
    where = [f"run_dir={work / 'run'}", f"base={base}", f"collection={own}"]
    recipe = load_recipe(RECIPE, [*where, *options.set])
    if not (base / "config.json").exists():
        model = SearchR3(options.model, dtype="float32")
        (SearchR3(model.backbone.document_side) if options.anew else model).save_pretrained(base)
    if not (own / "corpus.jsonl").exists():
        splits = list(recipe.sft.splits)
        collection = smaller(Collection.load(options.data / "train"), splits, options.limit, recipe.seed)
        say(f"{len(collection.documents):,} documents, {len(collection.queries):,} queries")
        settings = BestOfNSettings(samples=1, sampling_temperature=0.6, min_ndcg=0.0)
        report = best_of_n(
            SearchR3(base, dtype="bfloat16"), collection, own, settings, cache=work / "cache", splits=splits
        )
        say(f"own replies: {report}")
    models = {} if options.stages else {"base": base}
    if "sft" in options.stages:
        models["sft"] = train_sft(recipe, resume=True).model_path
    if "grpo" in options.stages:
        models["grpo"] = train_grpo(recipe, model=models.get("sft", base), resume=True).model_path
    results: dict[str, Any] = {}
    for name, path in models.items():
        encoder = SearchR3(path, dtype="bfloat16")
        results[name] = evaluate(name, encoder, options.data, work, (options.queries, 10**6), say, lambda: True)
    record = {"benchmark": "smol_read", "results": results, "settings": {"limit": options.limit}, "machine": machine()}
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
