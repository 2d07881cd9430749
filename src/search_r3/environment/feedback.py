"""What the environment answers to a batch of rollouts, and what the refresh of its index cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from .reward import RewardParts
from .scoring import Score


@dataclass(frozen=True)
class RefreshReport:
    """What the refresh of one step did.

    Attributes:
        documents_encoded: by all processes together.
        tokens_encoded: of them.
        seconds: spent on choosing, encoding, correcting and mending.
        staleness_mean: versions since a document was encoded, over all documents, afterwards.
        staleness_max: the largest.
        drift_gain: share of the held-out drift that the correction removed; 0 without one.
        index_recall: recall of an approximate index at its last audit; 1 for an exact one.
    """

    documents_encoded: int
    tokens_encoded: int
    seconds: float
    staleness_mean: float
    staleness_max: int
    drift_gain: float
    index_recall: float

    def metrics(self) -> dict[str, float]:
        """Named as in `metrics.jsonl`."""
        values = asdict(self)
        return {"refresh_seconds": values.pop("seconds"), **values}

    def with_more(self, later: RefreshReport) -> RefreshReport:
        """Of two refreshes of one step, this one and a later one: what both cost, and the state after the later."""
        return replace(
            later,
            documents_encoded=self.documents_encoded + later.documents_encoded,
            tokens_encoded=self.tokens_encoded + later.tokens_encoded,
            seconds=self.seconds + later.seconds,
            drift_gain=self.drift_gain,
        )


@dataclass(frozen=True)
class Feedback:
    """The environment's answer to a batch of rollouts, one entry per rollout."""

    rewards: list[float]
    scores: list[Score]
    refresh: RefreshReport

    @property
    def parts(self) -> list[RewardParts]:
        """The parts of each reward."""
        return [score.parts for score in self.scores]

    @property
    def best_ranks(self) -> list[int]:
        """The best rank of a relevant document."""
        return [score.best_rank for score in self.scores]
