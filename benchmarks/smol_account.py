"""The five collections by which a small real model is judged, as folders that `search-r3 evaluate` reads.

    python benchmarks/smol_account.py DATA_ROOT runs/account
    search-r3 evaluate --model smol --collections runs/account/* --splits dev --baselines bm25 --out runs/account-dev

DATA_ROOT holds the collections in the BEIR layout. `dev` has all queries that training keeps apart (the collection's
own dev split, or a fifth of train by the hash of the id), `test` those of the collection's test split, where it has
one. Documents are all there; of the queries of a split at most 1,500, by the hash of the id. Of `babi_support` the
query has the story in it, as in training, and its documents are those that a query may rank. Choose by dev, read
test once.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from common import say
from real_collections import divide
from smol_data import cut, stories

from search_r3.data.collection import Collection, Document, Query

LARGEST = 1500
NAMES = ("openbookqa", "strategyqa_facts", "entailmentbank", "clutrr_relation", "babi_support")


def first_of(query_ids: Iterable[str]) -> list[str]:
    """`LARGEST` of them."""
    return sorted(query_ids, key=lambda one: hashlib.sha256(one.encode()).hexdigest())[:LARGEST]


def whole(name: str, root: Path) -> Collection:
    """The documents, and the queries of dev and test."""
    collection = Collection.load(root / name)
    if name == "babi_support":
        parts = [stories(root / name, split) for split in ("train", "test")]
        collection = Collection(
            name,
            parts[0].documents | parts[1].documents,
            parts[0].queries | parts[1].queries,
            parts[0].qrels | parts[1].qrels,
            pools={**parts[0].pools, **parts[1].pools},
        )
    _, dev = divide(collection)
    splits = {"dev": dev} | ({"test": collection.split("test")} if "test" in collection.qrels else {})
    splits = {split: {one: gains[one] for one in first_of(gains)} for split, gains in splits.items()}
    asked = {query_id for split in splits.values() for query_id in split}
    ranked = {one for query_id in asked for one in collection.pools.get(query_id, collection.documents)}
    return replace(
        collection,
        documents={
            one: Document(one, cut(collection.documents[one].text), collection.documents[one].title)
            for one in sorted(ranked)
        },
        queries={one: Query(one, collection.queries[one].text) for one in sorted(asked)},
        qrels=splits,
        pools={one: pool for one, pool in collection.pools.items() if one in asked},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="DATA_ROOT")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    for name in NAMES:
        collection = whole(name, options.root)
        collection.save(options.out / name)
        sizes = ", ".join(f"{split} {len(gains):,} queries" for split, gains in collection.qrels.items())
        say(f"{name}: {len(collection.documents):,} documents, {sizes}")


if __name__ == "__main__":
    main()
