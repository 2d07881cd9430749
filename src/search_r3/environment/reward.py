"""Ranked list to reward: named, bounded parts and their weighted sum. Pure functions on numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..config import RewardWeights
from ..errors import RewardError
from ..retrieval.metrics import ndcg_from_ranks


@dataclass(frozen=True)
class RewardParts:
    """The parts of one rollout's reward.

    Attributes:
        ranking: nDCG@k of the relevant documents' ranks in the live index, 0 to 1 (the paper's scaled DCG).
        similarity: (1 + mean cosine to the relevant documents) / 2, 0 to 1; still moves when the ranks are settled.
        format: 1 if the model emitted the embed token itself, 0 if it was forced.
        length: minus the used share of the reasoning budget, -1 to 0.
    """

    ranking: float
    similarity: float
    format: float
    length: float

    def total(self, weights: RewardWeights) -> float:
        """The weighted sum of the parts."""
        return float(sum(getattr(weights, name) * value for name, value in asdict(self).items()))


def reward_parts(
    ranks: Sequence[int],
    cosines: Sequence[float],
    gains: Sequence[int],
    *,
    k: int,
    forced: bool,
    reasoning_tokens: int,
    max_new_tokens: int,
) -> RewardParts:
    """Score one rollout.

    Args:
        ranks: rank (from 1) of every relevant document under the rollout's vector.
        cosines: its cosine to each of them.
        gains: the relevance of each of them.
        k: depth of the nDCG.
        forced: whether the embed token was forced.
        reasoning_tokens: tokens before the embed token.
        max_new_tokens: the budget.

    Raises:
        RewardError: no relevant document, or a cosine that is not finite.
    """
    if not ranks:
        raise RewardError("a query without a relevant document has no reward; remove it from the training split")
    if not all(math.isfinite(cosine) for cosine in cosines):
        raise RewardError("a rollout's cosine is not finite: the model's vector holds NaN")
    return RewardParts(
        ranking=ndcg_from_ranks(ranks, gains, k),
        similarity=(1.0 + sum(cosines) / len(cosines)) / 2.0,
        format=0.0 if forced else 1.0,
        length=-reasoning_tokens / max_new_tokens,
    )
