"""Results made by hand: systems that rank 40 documents for queries with one or two relevant ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from search_r3.evaluation.results import CollectionInfo, Cost, Result, SystemInfo
from search_r3.retrieval.metrics import measure

HOSTILE = "</script><img src=x onerror=alert(1)><!-- \u2028 & \"quotes\" 'single' {{ title }}"
"""A query text that leaves its place, where a page lets it."""
SYSTEMS = (("bm25", "bm25", "", 0.35), ("direct", "search-r3", "direct", 0.45), ("reason", "search-r3", "reason", 0.7))


def make_result(
    name: str = "reason",
    kind: str = "search-r3",
    mode: str = "reason",
    quality: float = 0.7,
    *,
    collection: str = "first",
    split: str = "test",
    queries: int = 12,
    **changes: Any,
) -> Result:
    """A system that puts a query's relevant document at a rank near the top as often as `quality` says."""
    chance = random.Random(f"{name} {collection}")
    documents = {f"d{i:02d}": f"Document {i} of {collection}, which says <b>something</b>." for i in range(40)}
    names = list(documents)
    relevant = [{names[i % 40]: 1} | ({names[(i * 7 + 3) % 40]: 2} if i % 3 == 0 else {}) for i in range(queries)]
    rankings = []
    for gains in relevant:
        ranking = chance.sample(names, 40)
        for doc_id in gains:
            if chance.random() < quality:
                ranking.remove(doc_id)
                ranking.insert(chance.randrange(4), doc_id)
        rankings.append(ranking)
    rows = [measure(ranking, gains) for ranking, gains in zip(rankings, relevant, strict=True)]
    per_query = {key: [row[key] for row in rows] for key in rows[0]}
    scores = {key: fmean(values) for key, values in per_query.items()}
    reasons = mode == "reason"
    tokens = [chance.randrange(8, 60) for _ in range(queries)] if reasons else []
    values: dict[str, Any] = {
        "key": chance.randbytes(32).hex(),
        "system": SystemInfo(
            name=name,
            kind=kind,
            model="models/tiny",
            revision=random.Random(name.partition("/")[2]).randbytes(20).hex() if mode else "0.3",
            mode=mode,
            settings={"k1": 1.5},
        ),
        "collection": CollectionInfo(
            name=collection,
            split=split,
            source=collection,
            hash=random.Random(collection).randbytes(32).hex(),
            documents=40,
            queries=queries,
            without_text=0,
            identical_ids=0,
        ),
        "settings": {"depth": 100, "seed": 0},
        "scores": scores,
        "intervals": {key: (max(0.0, mean - 0.08), min(1.0, mean + 0.08)) for key, mean in scores.items()},
        "cost": Cost(
            queries_per_second=80.0 if reasons else 900.0,
            ms_per_query=None if kind == "bm25" else (41.5 if reasons else 6.25),
            documents_per_second=None if reasons else 1234.5,
            tokens_per_query=fmean(tokens or [0]),
        ),
        "query_ids": [f"q{i:03d}" for i in range(queries)],
        "queries": [HOSTILE, *(f"what is said in document {i % 40}?" for i in range(1, queries))],
        "per_query": per_query,
        "top": [[(doc_id, 1 - rank / 50) for rank, doc_id in enumerate(ranking[:10])] for ranking in rankings],
        "relevant": relevant,
        "snippets": documents,
        "reasoning": [f"{name} thinks: document {i}. {HOSTILE}" for i in range(queries)] if reasons else [],
        "reasoning_tokens": tokens,
        "provenance": {"date": "2026-01-02T03:04:05+00:00", "versions": {"numpy": "2.0"}, "machine": "x86_64"},
    }
    return Result(**values | changes)


def make_results(collections: Sequence[str] = ("first", "second"), queries: int = 12) -> list[Result]:
    """BM25, direct and reason on each collection."""
    return [
        make_result(*system, collection=collection, queries=queries) for collection in collections for system in SYSTEMS
    ]
