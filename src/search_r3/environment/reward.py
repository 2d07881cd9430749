"""Ranked list to reward: named, bounded parts and their weighted sum. Pure functions on numbers, and a user's own part.

Raw cosine to the relevant documents is no part: any text that says less raises it, and it led a training there
(docs/log.md). It is a metric only.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np

from ..config import RewardSettings
from ..errors import ConfigError, RewardError
from ..retrieval.metrics import ndcg_from_ranks
from ..types import Array

DEEPEST = 1000
"""The rank from which on `log_rank` is 0."""
FREE_SHARE = 0.75
"""The share of the budget that the part `length` does not price."""


@dataclass(frozen=True)
class Outcome:
    """What a reward is computed from, and what a function of the user's is given: one reply and where it led.

    Attributes:
        query_id: of the query.
        query: its text.
        reasoning: the reply's text without special tokens; empty in direct mode.
        reasoning_tokens: tokens before the embed token.
        max_new_tokens: the budget, the embed token included.
        forced: whether the embed token was forced.
        doc_ids: the relevant documents.
        gains: the relevance of each, above 0.
        ranks: the rank of each (from 1) under the reply's vector in the live index.
        cosines: the cosine of each to the reply's vector.
    """

    query_id: str
    query: str
    reasoning: str
    reasoning_tokens: int
    max_new_tokens: int
    forced: bool
    doc_ids: Sequence[str]
    gains: Sequence[int]
    ranks: Sequence[int]
    cosines: Sequence[float]


class RewardFunction(Protocol):
    """A reward part of the user's own, named in a recipe as `module:function`."""

    def __call__(self, outcome: Outcome, /) -> float:
        """The part's value; finite, and between -1 and 1 where its weight is to mean what those of the others do."""
        ...


@dataclass(frozen=True)
class RewardParts:
    """The parts of one reply's reward.

    Attributes:
        ndcg: nDCG@k of the relevant documents' ranks in the live index, 0 to 1 (the paper's scaled DCG).
        log_rank: see `log_rank`, 0 to 1; tells ranks apart that nDCG@k counts as 0.
        contrastive: see `contrastive`, 0 to 1; still moves where the ranks are settled.
        format: 1 if the model emitted the embed token itself, 0 if it was forced.
        length: 0 up to `FREE_SHARE` of the budget, then falling to -1 where the budget is used up.
        tokens: minus the used share of the budget, -1 to 0: a price for every token.
        custom: the value of the user's own function; 0 without one.
    """

    ndcg: float
    log_rank: float
    contrastive: float
    format: float
    length: float
    tokens: float
    custom: float

    def weighted(self, weights: RewardSettings) -> dict[str, float]:
        """Each part times its weight; the reward is their sum."""
        return {name: getattr(weights, name) * value for name, value in asdict(self).items()}

    def total(self, weights: RewardSettings) -> float:
        """The weighted sum of the parts."""
        return float(sum(self.weighted(weights).values()))

    def by_rank(self, weights: RewardSettings) -> float:
        """What the ranks alone earn: by `log_rank` too where it has a weight, else by `ndcg`."""
        return self.ndcg + (self.log_rank if weights.log_rank > 0 else 0.0)


def reward_parts(
    outcome: Outcome,
    settings: RewardSettings,
    *,
    k: int,
    contrast: float = 0.0,
    function: RewardFunction | None = None,
) -> RewardParts:
    """Score one reply.

    Args:
        outcome: the reply and its ranks.
        settings: whether forced replies earn what ranks earn.
        k: depth of the nDCG.
        contrast: the value of `contrastive`, where that part is wanted.
        function: the user's own part.

    Raises:
        RewardError: no relevant document, a cosine that is not finite, or the user's function failed.
    """
    if not outcome.ranks:
        raise RewardError("a query without a relevant document has no reward; remove it from the training split")
    if not all(math.isfinite(cosine) for cosine in outcome.cosines):
        raise RewardError("a rollout's cosine is not finite: the model's vector holds NaN")
    # Tokens are not trained on where the reply was cut off, so a good rank would be credited to what led there.
    earns = settings.forced_ranks or not outcome.forced
    used = outcome.reasoning_tokens / outcome.max_new_tokens
    longest = (outcome.max_new_tokens - 1) / outcome.max_new_tokens  # reasoning that leaves room for the embed token
    return RewardParts(
        ndcg=ndcg_from_ranks(outcome.ranks, outcome.gains, k) if earns else 0.0,
        log_rank=log_rank(outcome.ranks, outcome.gains) if earns else 0.0,
        contrastive=contrast if earns else 0.0,
        format=0.0 if outcome.forced else 1.0,
        length=-max(0.0, used - FREE_SHARE) / (longest - FREE_SHARE) if longest > FREE_SHARE else 0.0,
        tokens=-used,
        custom=0.0 if function is None else _call(function, outcome),
    )


def log_rank(ranks: Sequence[int], gains: Sequence[int]) -> float:
    """`max(0, 1 - log(rank) / log(1000))`, the mean over the relevant documents, weighted by their gains.

    Each is ranked among the documents that are not relevant, so that the best order of any number earns 1. The mean and
    not the best: where one is found already, the others are what is left to learn, and nDCG@k does not see them.

    Example:
        >>> log_rank([1, 2], [1, 1]), round(log_rank([10], [1]), 3), log_rank([4000], [1])
        (1.0, 0.667, 0.0)
    """
    total = 0.0
    for rank, gain in sorted(zip(ranks, gains, strict=True)):  # as `ndcg_from_ranks`
        among = rank - sum(other < rank for other in ranks)
        total += gain * max(0.0, 1.0 - math.log(among) / math.log(DEEPEST))
    return total / sum(gains)


def contrastive(positives: Array, gains: Sequence[int], negatives: Array, temperature: float) -> float:
    """The softmax probability of a relevant document among itself and the negatives, the mean weighted by gains.

    Args:
        positives: cosines of the relevant documents; -inf for one that cannot be ranked.
        gains: their relevance.
        negatives: cosines of the best documents of the index that are not relevant.
        temperature: tau.

    Example:
        >>> round(contrastive(np.array([0.9]), [1], np.array([0.9, 0.5]), 0.05), 3)
        0.5
    """
    best = max(positives.max(initial=-2.0), negatives.max(initial=-2.0))  # so that nothing overflows
    own = np.exp((positives.astype(np.float64) - best) / temperature)
    others = np.exp((negatives.astype(np.float64) - best) / temperature).sum()
    shares = np.divide(own, own + others, out=np.zeros_like(own), where=own > 0)
    return float(np.average(shares, weights=gains))


def load_function(name: str) -> RewardFunction:
    """The function that a recipe names as `module:function`.

    Raises:
        ConfigError: it cannot be imported.
    """
    module, _, attribute = name.partition(":")
    try:
        function: RewardFunction = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"grpo.reward.function={name}: {error}; expected module:function, of a module that Python finds (install "
            "it, or put its folder into PYTHONPATH)"
        ) from error
    if not callable(function):
        raise ConfigError(f"grpo.reward.function={name} is no function but {type(function).__name__}")
    return function


def _call(function: RewardFunction, outcome: Outcome) -> float:
    name = getattr(function, "__qualname__", repr(function))
    try:
        value = float(function(outcome))
    except Exception as error:  # whatever the user's code raises
        raise RewardError(
            f"the reward function {name} failed for query {outcome.query_id!r}: {type(error).__name__}: {error}"
        ) from error
    if not math.isfinite(value):
        raise RewardError(f"the reward function {name} gave {value} for query {outcome.query_id!r}; expected a number")
    return value
