"""Put a model's own replies to train queries beside their traces, as the style `own`; prints one JSON object.

    python benchmarks/smol_own.py MODEL data/smol/train data/smol/own --splits openbookqa babi_support --queries 1000
    search-r3 sft --recipe recipes/smol-read.yaml                       # reads them, writes the true traces

A vector that was trained after true traces alone believes whatever is written. With these it learns, by the ranking
loss, how far the model's own writing can be trusted; `sft.read_styles=[own]` keeps the text of the replies untaught.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from search_r3.data.collection import Collection
from search_r3.model.encoder import SearchR3

STYLE = "own"


def with_own_replies(
    model: SearchR3, collection: Collection, splits: Sequence[str], queries: int, temperature: float, seed: int = 0
) -> Collection:
    """The collection with these splits alone, and of each the queries that have been replied to.

    Args:
        model: writes the replies.
        collection: its queries may have true traces in `metadata.reasoning`.
        splits: names of judged splits.
        queries: of each split, at most; a random choice.
        temperature: of sampling.
        seed: decides choice and replies.
    """
    rng = random.Random(seed)
    asked: dict[str, list[str]] = {}
    for name in splits:
        judged = sorted(collection.split(name))
        asked[name] = rng.sample(judged, min(queries, len(judged)))
    ids = [query_id for found in asked.values() for query_id in found]
    texts = [collection.queries[query_id].text for query_id in ids]
    replies = model.encode_query(texts, "reason", sampling_temperature=temperature, seed=seed).reasoning
    own = dict(collection.queries)
    for query_id, reply in zip(ids, replies, strict=True):
        if reply.strip():
            known = collection.queries[query_id].metadata
            reasoning = {**known.get("reasoning", {}), STYLE: reply}
            own[query_id] = replace(own[query_id], metadata={**known, "reasoning": reasoning})
    qrels = {name: {one: collection.qrels[name][one] for one in found} for name, found in asked.items()}
    return Collection(collection.name, collection.documents, own, qrels, pools=collection.pools)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("collection", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--splits", nargs="+", required=True)
    parser.add_argument("--queries", type=int, default=1000, help="of each split")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    began = time.perf_counter()
    model = SearchR3(options.model, dtype=options.dtype)
    found = with_own_replies(
        model, Collection.load(options.collection), options.splits, options.queries, options.temperature
    )
    found.save(options.out)
    counts = {name: len(judged) for name, judged in found.qrels.items()}
    print(json.dumps({"benchmark": "smol_own", "queries": counts, "seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main()
