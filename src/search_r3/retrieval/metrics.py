"""One ranking rule, and the measures on it, equal to trec_eval's (tests compare with pytrec_eval).

The rule: higher score first; equal scores by doc_id, the larger string first, as trec_eval does. Scores are compared
in float32, as trec_eval does too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

MEASURES = ("ndcg@10", "recall@100", "mrr@10")


def rank(scores: Mapping[str, float], k: int | None = None) -> list[str]:
    """The doc_ids of `scores`, best first, at most `k`.

    Example:
        >>> rank({"a": 0.5, "b": 0.5, "c": 0.9})
        ['c', 'b', 'a']
    """
    ordered = sorted(scores, key=lambda doc_id: (np.float32(scores[doc_id]), doc_id), reverse=True)
    return ordered[:k]


def dcg(gains: Iterable[float]) -> float:
    """Discounted cumulative gain of gains in rank order: `sum gain_i / log2(i + 1)`, `i` from 1."""
    return sum(gain / math.log2(position + 1) for position, gain in enumerate(gains, 1))


def ideal_dcg(relevance: Mapping[str, int], k: int) -> float:
    """The largest DCG@k that any ranking can reach; judgements below 0 count as 0."""
    return dcg(sorted((max(gain, 0) for gain in relevance.values()), reverse=True)[:k])


def ndcg(ranking: Sequence[str], relevance: Mapping[str, int], k: int) -> float:
    """nDCG@k with linear gains (trec_eval's `ndcg_cut`).

    Judgements below 0 count as 0; without relevant documents the result is 0.
    """
    ideal = ideal_dcg(relevance, k)
    found = dcg(max(relevance.get(doc_id, 0), 0) for doc_id in ranking[:k])
    return found / ideal if ideal > 0 else 0.0


def ndcg_from_ranks(ranks: Mapping[str, int], relevance: Mapping[str, int], k: int) -> float:
    """nDCG@k when only the ranks (from 1) of the relevant documents are known."""
    ideal = ideal_dcg(relevance, k)
    found = sum(
        max(relevance[doc_id], 0) / math.log2(position + 1) for doc_id, position in ranks.items() if position <= k
    )
    return found / ideal if ideal > 0 else 0.0


def recall(ranking: Sequence[str], relevance: Mapping[str, int], k: int) -> float:
    """Share of the relevant documents among the first `k`. 0 without relevant documents."""
    relevant = {doc_id for doc_id, gain in relevance.items() if gain > 0}
    return len(relevant.intersection(ranking[:k])) / len(relevant) if relevant else 0.0


def reciprocal_rank(ranking: Sequence[str], relevance: Mapping[str, int], k: int) -> float:
    """1 / rank of the first relevant document among the first `k`, else 0."""
    for position, doc_id in enumerate(ranking[:k], 1):
        if relevance.get(doc_id, 0) > 0:
            return 1.0 / position
    return 0.0


def measure(ranking: Sequence[str], relevance: Mapping[str, int]) -> dict[str, float]:
    """All of `MEASURES` for one query's ranking (100 documents deep or all there are)."""
    return {
        "ndcg@10": ndcg(ranking, relevance, 10),
        "recall@100": recall(ranking, relevance, 100),
        "mrr@10": reciprocal_rank(ranking, relevance, 10),
    }
