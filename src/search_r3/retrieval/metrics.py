"""One ranking rule, and the measures on it, equal to trec_eval's (tests compare with pytrec_eval and ir-measures).

The rule: higher score first; equal scores by doc_id, the larger string first, as trec_eval does. Scores are compared
in float32, as trec_eval does too. So a system that gives every document the same score gains nothing by their order
in a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

import numpy as np

from ..types import Array

MAIN = "ndcg@10"
"""The measure that tables lead with and that intervals and tests are computed for first."""
MEASURES = (
    *(f"ndcg@{k}" for k in (1, 3, 5, 10, 20, 100, 1000)),
    "map",
    *(f"map@{k}" for k in (5, 10, 100, 1000)),
    *(f"mrr@{k}" for k in (10, 100)),
    *(f"recall@{k}" for k in (1, 5, 10, 20, 100, 1000)),
    *(f"recall_cap@{k}" for k in (10, 100)),
    *(f"hit@{k}" for k in (1, 5, 10, 20, 100)),
    *(f"p@{k}" for k in (1, 3, 5, 10, 20, 100)),
)
"""What is computed for every query; `map` reads the ranking as deep as it was retrieved."""
DEPTH = 1000
"""How deep a ranking must be for all of them."""


def rank(scores: Mapping[str, float], k: int | None = None) -> list[str]:
    """The doc_ids of `scores`, best first, at most `k`.

    Example:
        >>> rank({"a": 0.5, "b": 0.5, "c": 0.9})
        ['c', 'b', 'a']
    """
    return sorted(scores, key=lambda doc_id: (np.float32(scores[doc_id]), doc_id), reverse=True)[:k]


def dcg(gains: Iterable[float]) -> float:
    """Discounted cumulative gain of gains in rank order: `sum gain_i / log2(i + 1)`, `i` from 1."""
    return sum(gain / math.log2(position + 1) for position, gain in enumerate(gains, 1))


def ndcg(ranking: Sequence[str], relevance: Mapping[str, int], k: int) -> float:
    """nDCG@k with linear gains (trec_eval's `ndcg_cut`).

    Judgements below 0 count as 0; without relevant documents the result is 0.
    """
    ideal = dcg(sorted((max(gain, 0) for gain in relevance.values()), reverse=True)[:k])
    return dcg(max(relevance.get(doc_id, 0), 0) for doc_id in ranking[:k]) / ideal if ideal > 0 else 0.0


def ndcg_from_ranks(ranks: Sequence[int], gains: Sequence[int], k: int) -> float:
    """nDCG@k of the ranks (from 1) and the gains of all relevant documents."""
    ideal = dcg(sorted(gains, reverse=True)[:k])
    # In the order of the ranks, as the ideal is: the same ranks in another order would give another last digit.
    gained = sum(gain / math.log2(rank + 1) for rank, gain in sorted(zip(ranks, gains, strict=True)) if rank <= k)
    return gained / ideal if ideal > 0 else 0.0


def recall(ranking: Sequence[str], relevance: Mapping[str, int], k: int) -> float:
    """Share of the relevant documents among the first `k`. 0 without relevant documents."""
    relevant = relevant_ids(relevance)
    return len(relevant.intersection(ranking[:k])) / len(relevant) if relevant else 0.0


def capped_recall(ranking: Sequence[str], relevance: Mapping[str, int], k: int) -> float:
    """Relevant documents among the first `k`, divided by as many as can stand there (BEIR's and mteb's `R_cap`)."""
    relevant = relevant_ids(relevance)
    return len(relevant.intersection(ranking[:k])) / min(len(relevant), k) if relevant else 0.0


def hit(ranking: Sequence[str], relevance: Mapping[str, int], k: int) -> float:
    """1 where a relevant document is among the first `k`, else 0 (trec_eval's `success`)."""
    return float(not relevant_ids(relevance).isdisjoint(ranking[:k]))


def precision(ranking: Sequence[str], relevance: Mapping[str, int], k: int) -> float:
    """Relevant documents among the first `k`, divided by `k` however short the ranking is (trec_eval's `P`)."""
    return len(relevant_ids(relevance).intersection(ranking[:k])) / k


def average_precision(ranking: Sequence[str], relevance: Mapping[str, int], k: int | None = None) -> float:
    """Mean over all relevant documents of the precision at their ranks, 0 for those not among the first `k`.

    trec_eval's `map`, or `map_cut` with a `k`. 0 without relevant documents.
    """
    relevant = relevant_ids(relevance)
    hits, total = 0, 0.0
    for position, doc_id in enumerate(ranking[:k], 1):
        if doc_id in relevant:
            hits += 1
            total += hits / position
    return total / len(relevant) if relevant else 0.0


def reciprocal_rank(ranking: Sequence[str], relevance: Mapping[str, int], k: int) -> float:
    """1 / rank of the first relevant document among the first `k`, else 0."""
    for position, doc_id in enumerate(ranking[:k], 1):
        if relevance.get(doc_id, 0) > 0:
            return 1.0 / position
    return 0.0


def relevant_ids(relevance: Mapping[str, int]) -> set[str]:
    """The documents judged above 0."""
    return {doc_id for doc_id, gain in relevance.items() if gain > 0}


_FUNCTIONS = {
    "ndcg": ndcg,
    "map": average_precision,
    "mrr": reciprocal_rank,
    "recall": recall,
    "recall_cap": capped_recall,
    "hit": hit,
    "p": precision,
}


def measure(ranking: Sequence[str], relevance: Mapping[str, int]) -> dict[str, float]:
    """All of `MEASURES` for one query's ranking (`DEPTH` documents or more, or all there are)."""
    values = {}
    for name in MEASURES:
        function, _, depth = name.partition("@")
        values[name] = _FUNCTIONS[function](ranking, relevance, int(depth) if depth else len(ranking))
    return values


def p_mrr(
    original: Mapping[str, Sequence[str]], changed: Mapping[str, Sequence[str]], lost: Mapping[str, Iterable[str]]
) -> dict[str, float]:
    """How well rankings follow a changed instruction: p-MRR of FollowIR (Weller et al. 2024, arXiv 2403.15246), eq. 1.

    For a document that the changed instruction makes irrelevant, with its ranks `r` before and `s` after:
    `s / r - 1` where it did not fall (`r >= s`), else `1 - r / s`. From -1 (it rose to the top) over 0 (the
    instruction was ignored) to 1. A document that is not in a ranking has the rank after its last.

    Args:
        original: query -> ranking for the original instruction.
        changed: query -> ranking for the changed one.
        lost: query -> documents that are relevant by the original instruction alone.

    Returns:
        query -> mean over its documents; the measure of a collection is the mean over queries.
    """
    values = {}
    for query, doc_ids in lost.items():
        ranks = [(_rank_of(doc_id, original[query]), _rank_of(doc_id, changed[query])) for doc_id in doc_ids]
        if ranks:
            values[query] = fmean(new / old - 1 if old >= new else 1 - old / new for old, new in ranks)
    return values


def _rank_of(doc_id: str, ranking: Sequence[str]) -> int:
    return ranking.index(doc_id) + 1 if doc_id in ranking else len(ranking) + 1


def probe_cosine(vectors: Array) -> float:
    """Mean cosine between different vectors of a probe set, `P x D`: near 1 means that the vectors have collapsed."""
    count = len(vectors)
    if count < 2:
        return 0.0
    return float(((vectors @ vectors.T).sum() - (vectors**2).sum()) / (count * (count - 1)))
