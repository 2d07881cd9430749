"""The account: how wrong the live index is, measured against documents encoded this very moment. Pure functions.

Every pair of arguments below is `(live, fresh)`: from the vectors that the index holds, and from the current weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

import numpy as np

from ..types import Array

RANK_CAP = 100
"""Ranks beyond this count as this one: whether a document is 1,000th or 2,000th changes no reward."""


@dataclass(frozen=True)
class Audit:
    """What the staleness of the index costs, over the rollouts of one step.

    Attributes:
        reward_error: mean absolute difference of the rewards.
        rank_error: mean absolute difference of the best positive's rank, capped at `RANK_CAP`.
        top10_overlap: mean share of the best documents (10, the depth of the reward) that both find.
        drift_mean: mean `1 - cos` between held and fresh vectors, over the random sample of documents.
        documents: documents encoded for the audit.
        seconds: spent on the audit.
    """

    reward_error: float
    rank_error: float
    top10_overlap: float
    drift_mean: float
    documents: int
    seconds: float

    def metrics(self) -> dict[str, float]:
        """Named as in `metrics.jsonl`."""
        return {f"audit_{name}": value for name, value in asdict(self).items()}


def compare_scores(
    *,
    rewards: Sequence[Sequence[float]],
    ranks: Sequence[Sequence[int]],
    top: Sequence[Sequence[Sequence[int]]],
    sample: Sequence[Array],
    documents: int,
    seconds: float,
) -> Audit:
    """Build the audit from what live and fresh vectors gave for the same rollouts."""
    capped = np.minimum(np.asarray(ranks, dtype=np.float64), RANK_CAP)
    overlaps = [len(set(live) & set(fresh)) / max(1, len(live)) for live, fresh in zip(*top, strict=True)]
    return Audit(
        reward_error=float(np.abs(np.subtract(*np.asarray(rewards, dtype=np.float64))).mean()),
        rank_error=float(np.abs(np.subtract(*capped)).mean()),
        top10_overlap=fmean(overlaps),
        drift_mean=float((1.0 - (sample[0] * sample[1]).sum(axis=1)).mean()),
        documents=documents,
        seconds=seconds,
    )
