"""The small real model learns to write and to read what it writes, on a CPU; the last line is one JSON object.

    python benchmarks/smol_data.py PAIRS DATA_ROOT data/smol --profile ship
    python benchmarks/smol_read.py smol --anew --data data/smol --work runs/smol-read

Begins from a trained model (`smol`, or a directory); `--anew`: from what encodes its documents, where it has learned to
read before. Stages: base (its weights, whole), data (the documents and queries of the sources that have reasoning),
write (true traces, most of them where the query holds what they say), own (its own replies to other queries,
`best-of-n` with n = 1), read (own replies, right or wrong, are read; true traces are written on), grpo
(recipes/smol-read.yaml: documents frozen), and what both models do on dev queries. A stage that is finished is not
repeated, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import begin, machine, say
from smol_eval import evaluate

from search_r3.config import Recipe, load_recipe
from search_r3.data.collection import Collection
from search_r3.model.encoder import SearchR3
from search_r3.training.best_of_n import BestOfNSettings, best_of_n
from search_r3.training.grpo import train_grpo
from search_r3.training.sft import train_sft

RECIPE = Path(__file__).parent.parent / "recipes" / "smol-read.yaml"
SIZES = {
    "babi_support": (1400, 700),
    "openbookqa": (300, 200),
    "strategyqa_facts": (300, 200),
    "entailmentbank": (300, 200),
}
"""Source -> its queries whose traces are written first (split `SOURCE-write`), and those that it replies to itself."""
WRITE = ["sft.reasoning_styles={trace: 1.0}", "sft.read_styles=[]", "sft.steps=80", "sft.learning_rate=8.0e-4"]
SHARES = {"babi_support": 0.7, "openbookqa": 0.1, "strategyqa_facts": 0.1, "entailmentbank": 0.1}
"""Of the queries whose traces are written first."""
STAGES = ("write", "read", "grpo")
WHOLE = 1500
"""Documents of a source up to which all of them are ranked; of a larger one those that a query needs, and its
negatives."""


def smaller(train: Collection, sizes: Mapping[str, tuple[int, int]], seed: int) -> Collection:
    """So many queries of each source, drawn at random, and the documents that are ranked for them."""
    qrels = {}
    for source, (written, replied) in sizes.items():
        judged = train.qrels[source]
        if written + replied > len(judged):
            raise SystemExit(f"{source} has {len(judged)} queries; {written + replied} are needed")
        drawn = random.Random(f"{seed}/{source}").sample(sorted(judged), written + replied)
        qrels[f"{source}-write"] = {one: judged[one] for one in drawn[:written]}
        qrels[source] = {one: judged[one] for one in drawn[written:]}
    asked = {one for split in qrels.values() for one in split}
    needed = {one for split in qrels.values() for gains in split.values() for one in gains}
    needed |= {one for query_id in asked for one in train.queries[query_id].metadata.get("negatives", ())}
    sources: dict[str, list[str]] = {}
    for one in train.documents:
        sources.setdefault(one.split("/")[0], []).append(one)
    needed |= {one for source in sizes if len(sources[source]) <= WHOLE for one in sources[source]}
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
    parser.add_argument("--queries", type=int, default=200, help="dev queries of each collection")
    parser.add_argument("--set", nargs="*", default=[], help="key=value for the recipe")
    parser.add_argument(
        "--stages",
        nargs="*",
        default=STAGES,
        choices=STAGES,
        help="those before come too; none: look at the base alone",
    )
    options = parser.parse_args(arguments)
    work = options.work
    base, data, own = work / "base", work / "data", work / "own"

    def recipe(name: str, begins: Path, collection: Path, *settings: str) -> Recipe:
        where = [f"run_dir={work / name}", f"base={begins}", f"collection={collection}"]
        return load_recipe(RECIPE, [*where, *settings, *options.set])

    facts = {"model": options.model, "anew": options.anew, "data": str(options.data)}
    begin(work, facts | {"seed": load_recipe(RECIPE, options.set).seed})
    if not (base / "config.json").exists():
        model = SearchR3(options.model, dtype="float32")
        (SearchR3(model.backbone.document_side) if options.anew else model).save_pretrained(base)
    if not (data / "corpus.jsonl").exists():
        collection = smaller(Collection.load(options.data / "train"), SIZES, load_recipe(RECIPE, options.set).seed)
        say(f"{len(collection.documents):,} documents, {len(collection.queries):,} queries")
        collection.save(data)
    models = {} if options.stages else {"base": base}
    if options.stages:
        splits = ", ".join(f"{source}-write: {share}" for source, share in SHARES.items())
        settings = recipe("write", base, data, *WRITE, f"sft.splits={{{splits}}}")
        models["write"] = train_sft(settings, resume=True).model_path
    if {"read", "grpo"} & set(options.stages):
        if not (own / "corpus.jsonl").exists():
            sampled = BestOfNSettings(samples=1, sampling_temperature=0.6, min_ndcg=0.0)
            writer = SearchR3(models["write"], dtype="bfloat16")
            report = best_of_n(writer, Collection.load(data), own, sampled, cache=work / "cache", splits=list(SIZES))
            say(f"own replies: {report}")
        models["read"] = train_sft(recipe("read", models["write"], own), resume=True).model_path
    if "grpo" in options.stages:
        models["grpo"] = train_grpo(recipe("grpo", base, own), model=models["read"], resume=True).model_path
    results: dict[str, Any] = {}
    for name, path in models.items():
        encoder = SearchR3(path, dtype="bfloat16")
        results[name] = evaluate(name, encoder, options.data, work, (options.queries, 10**6), say, lambda: True)
    record = {"benchmark": "smol_read", "results": results, "settings": {"sizes": SIZES}, "machine": machine()}
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
