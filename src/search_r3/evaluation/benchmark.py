"""Models and baselines on one split of a collection: per-query measures, speed, and paired tests between rows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np

from ..data.collection import Collection
from ..errors import DataError, ModelError
from ..model.documents import Progress
from ..model.encoder import SearchR3
from ..model.prompts import Mode
from ..retrieval.index import ExactIndex
from ..retrieval.lexical import BM25
from ..retrieval.metrics import MEASURES, measure, ndcg_from_ranks

DEPTH = 100
"""Documents retrieved per query."""


@dataclass(frozen=True)
class Row:
    """The result of one system on one split.

    Attributes:
        name: e.g. `reason/rl`.
        per_query: query_id -> measure -> value.
        queries_per_second: encoding and ranking, documents already indexed.
        tokens_per_query: mean reasoning tokens.
        forced_share: share of queries whose embed token was forced.
        truncated: queries that lost their end.
        reasoning: query_id -> reasoning text, where there is one.
    """

    name: str
    per_query: dict[str, dict[str, float]]
    queries_per_second: float
    tokens_per_query: float = 0.0
    forced_share: float = 0.0
    truncated: int = 0
    reasoning: dict[str, str] = field(default_factory=dict)

    def mean(self, name: str) -> float:
        """The mean of one measure over the queries."""
        return fmean(values[name] for values in self.per_query.values())

    def values(self, name: str) -> list[float]:
        """One measure, query by query."""
        return [values[name] for values in self.per_query.values()]

    def record(self, resamples: int, seed: int) -> dict[str, Any]:
        """The row as it stands in `report.json`; `ndcg@10_interval` is the 95 % bootstrap interval of the mean."""
        means: dict[str, Any] = {name: self.mean(name) for name in MEASURES}
        means["ndcg@10_interval"] = list(bootstrap_interval(self.values("ndcg@10"), resamples, seed))
        means |= {"queries_per_second": self.queries_per_second, "tokens_per_query": self.tokens_per_query}
        return means | {
            "forced_share": self.forced_share,
            "truncated": self.truncated,
            "queries": len(self.per_query),
        }


def evaluate_bm25(
    collection: Collection, split: str, name: str = "bm25", texts: Mapping[str, str] | None = None
) -> Row:
    """BM25 on the queries, or on other `texts` by query_id: a model's reasoning (the query where it is blank)."""
    qrels = _judged(collection, split)
    documents = collection.documents
    index = BM25(list(documents), [document.full_text for document in documents.values()])
    asked = [(texts or {}).get(query_id, "").strip() or collection.queries[query_id].text for query_id in qrels]
    started = time.perf_counter()
    found = index.search(asked, DEPTH)
    seconds = time.perf_counter() - started
    return Row(name, _measured(qrels, found), len(qrels) / seconds)


def index_documents(model: SearchR3, collection: Collection, *, progress: Progress | None = None) -> ExactIndex:
    """Encode a whole collection into an exact index."""
    texts = collection.texts()
    return ExactIndex(list(texts), model.encode_document(list(texts.values()), progress=progress))


def evaluate_model(
    model: SearchR3,
    collection: Collection,
    split: str,
    mode: Mode,
    name: str,
    *,
    index: ExactIndex | None = None,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> Row:
    """One model in one mode; reasoning is greedy.

    Raises:
        DataError: the split is unknown or has no query with a relevant document.
        ModelError: the model emitted the embed token for no query at all: it was not trained to reason.
    """
    qrels = _judged(collection, split)
    index = index or index_documents(model, collection)
    started = time.perf_counter()
    encoded = model.encode_query(
        [collection.queries[query_id].text for query_id in qrels],
        mode,
        batch_size=batch_size,
        progress=progress,
    )
    if mode == "reason" and all(encoded.forced):
        raise ModelError(
            f"{model.backbone.source} emitted {model.backbone.settings.embed_token} for none of {len(qrels)} queries "
            f"within {model.backbone.settings.max_new_tokens} tokens; train stage 1 (search-r3 sft) first, or "
            "evaluate --mode direct"
        )
    found = index.search(encoded.vectors, DEPTH).doc_ids
    seconds = time.perf_counter() - started
    return Row(
        name,
        _measured(qrels, found),
        len(qrels) / seconds,
        fmean(encoded.reasoning_tokens),
        fmean(encoded.forced),
        sum(encoded.truncated),
        dict(zip(qrels, encoded.reasoning, strict=True)) if mode == "reason" else {},
    )


def sampled_rewards(
    model: SearchR3,
    collection: Collection,
    split: str,
    *,
    queries: int,
    group_size: int,
    k: int,
    seed: int,
    index: ExactIndex,
    batch_size: int = 128,
    sampling_temperature: float = 1.0,
) -> tuple[list[float], float]:
    """The ranking part of the reward over sampled rollouts, as in training, and the share of forced ones.

    Args:
        model: the policy.
        collection: documents and queries.
        split: judgements.
        queries: how many queries, evenly spread over the split.
        group_size: rollouts per query.
        k: depth of the nDCG.
        seed: of the sampling.
        index: the collection encoded by the same model.
        batch_size: rollouts decoded together.
        sampling_temperature: as in training.
    """
    qrels = _judged(collection, split)
    spread = np.linspace(0, len(qrels) - 1, min(queries, len(qrels))).round().astype(int)
    chosen = [list(qrels)[i] for i in spread for _ in range(group_size)]
    encoded = model.encode_query(
        [collection.queries[query_id].text for query_id in chosen],
        "reason",
        batch_size=batch_size,
        sampling_temperature=sampling_temperature,
        seed=seed,
    )
    positives = [[doc_id for doc_id, gain in qrels[query_id].items() if gain > 0] for query_id in chosen]
    ranks = index.ranks(encoded.vectors, positives)
    rewards = [ndcg_from_ranks(found, qrels[query_id], k) for found, query_id in zip(ranks, chosen, strict=True)]
    return rewards, fmean(encoded.forced)


def bootstrap_interval(values: Sequence[float], resamples: int, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean."""
    if len(set(values)) == 1:
        return values[0], values[0]
    from scipy.stats import bootstrap

    result = bootstrap((values,), np.mean, n_resamples=resamples, method="percentile", rng=np.random.default_rng(seed))
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def paired_p_value(first: Sequence[float], second: Sequence[float], permutations: int, seed: int) -> float:
    """Two-sided paired randomisation test of equal means: signs of the differences are flipped at random.

    Raises:
        DataError: different numbers of values.
    """
    if len(first) != len(second):
        raise DataError(f"a paired test needs the same queries on both sides, found {len(first)} and {len(second)}")
    from scipy.stats import permutation_test

    differences = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    if not differences.any():
        return 1.0
    result = permutation_test(
        (differences,),
        lambda sample, axis: sample.mean(axis=axis),
        permutation_type="samples",
        n_resamples=permutations,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def paired_p_values(rows: Sequence[Row], permutations: int, seed: int) -> dict[str, float]:
    """nDCG@10 of every pair of rows: `"a vs b" -> p`."""
    return {
        f"{first.name} vs {second.name}": paired_p_value(
            first.values("ndcg@10"), second.values("ndcg@10"), permutations, seed
        )
        for second, first in combinations(rows, 2)
    }


def _judged(collection: Collection, split: str) -> dict[str, dict[str, int]]:
    """The queries of a split that have at least one relevant document."""
    qrels = {
        query_id: gains for query_id, gains in collection.split(split).items() if any(g > 0 for g in gains.values())
    }
    if not qrels:
        raise DataError(f"no query of split {split!r} in {collection.name!r} has a relevant document")
    return qrels


def _measured(qrels: Mapping[str, Mapping[str, int]], found: Sequence[Sequence[str]]) -> dict[str, dict[str, float]]:
    return {query_id: measure(ranking, gains) for (query_id, gains), ranking in zip(qrels.items(), found, strict=True)}
