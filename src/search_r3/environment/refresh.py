"""Refresh policies: which documents are encoded again before the rollouts of a step are ranked.

The environment always encodes the positives of the batch freshly; a policy names what else is worth it, the most
urgent first, and the environment encodes as much of that as the budget allows.

Shapes: `B` rollouts, `D` vector size, `L` depth of the shortlist.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import RefreshSettings
from ..retrieval.index import VectorIndex
from ..types import Array
from .neighbours import NeighbourGraph

CLOSE = 0.01
"""A gap of this size between a document's score and a positive's halves the document's urgency."""


@dataclass(frozen=True)
class RefreshRequest:
    """What a policy may look at, after the positives of the batch have been encoded freshly.

    Attributes:
        index: the live index with its `encoded_at_version`.
        policy_version: the version of the weights that made the queries.
        queries: the vectors about to be ranked, `B x D`.
        positives: the relevant documents (doc_ids) of each, `B` lists.
    """

    index: VectorIndex
    policy_version: int
    queries: Array
    positives: Sequence[Sequence[str]]


class RefreshPolicy(ABC):
    """A rung of the ladder in docs/method.md."""

    @abstractmethod
    def choose(self, request: RefreshRequest) -> Sequence[str]:
        """The doc_ids to encode again, the most urgent first; the environment skips those that are fresh."""

    def moved(self, index: VectorIndex, rows: Sequence[int]) -> None:  # noqa: B027 - most policies keep no state
        """Told which rows of the index have new vectors."""

    def save(self, folder: Path) -> None:  # noqa: B027
        """Write the policy's own state into a folder."""

    def restore(self, folder: Path, index: VectorIndex) -> None:  # noqa: B027
        """Take up the state that `save` wrote for this index."""


class Never(RefreshPolicy):
    """No document but the batch's positives (and the sample of the drift correction) is ever encoded again."""

    def choose(self, request: RefreshRequest) -> Sequence[str]:
        """Nothing."""
        return []


class Full(RefreshPolicy):
    """Every document is encoded again at every step: the truth, at full price."""

    def choose(self, request: RefreshRequest) -> Sequence[str]:
        """Everything."""
        return request.index.doc_ids


class Periodic(RefreshPolicy):
    """Every document is encoded again at every `every`-th version, none between."""

    def __init__(self, every: int) -> None:
        self.every = every

    def choose(self, request: RefreshRequest) -> Sequence[str]:
        """Everything, or nothing."""
        return request.index.doc_ids if request.policy_version % self.every == 0 else []


class Shortlist(RefreshPolicy):
    """The stale documents among each rollout's `depth` best, the better ranks first."""

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def choose(self, request: RefreshRequest) -> Sequence[str]:
        """The union of the shortlists; a document's urgency is its best rank, then its best score."""
        rows, scores = request.index.search_rows(request.queries, self.depth)  # B x L
        urgency: dict[int, tuple[int, float]] = {}
        for rank in range(rows.shape[1]):
            for row, score in zip(rows[:, rank].tolist(), scores[:, rank].tolist(), strict=True):
                place = (rank, -score)
                urgency[row] = min(urgency.get(row, place), place)
        return [request.index.doc_ids[row] for row in sorted(urgency, key=lambda row: (*urgency[row], row))]


class Selective(RefreshPolicy):
    """The shortlists, and what the neighbour graph links to them and to the positives: the paper's third mechanism.

    A document changes a reward only by passing a positive of the query. So the most urgent is the one whose score is
    near a positive's, measured against how far it can have moved: `staleness / (|score - score of positive| + CLOSE)`,
    the largest value over the rollouts.
    """

    def __init__(self, depth: int, hops: int, neighbours: int) -> None:
        self.depth, self.hops, self.neighbours = depth, hops, neighbours
        self.graph: NeighbourGraph | None = None

    def choose(self, request: RefreshRequest) -> Sequence[str]:
        """Candidates by urgency."""
        index = request.index
        if self.graph is None:
            self.graph = NeighbourGraph.build(index, self.neighbours)
        shortlist, _ = index.search_rows(request.queries, self.depth)  # B x L
        positives = sorted({index.row(doc_id) for doc_ids in request.positives for doc_id in doc_ids})
        reached = self.graph.reach([*positives, *dict.fromkeys(shortlist.flatten().tolist())], self.hops)
        staleness = request.policy_version - index.encoded_at_version[reached]
        rows = np.array(reached, dtype=np.int64)[staleness > 0]  # R
        scores = request.queries @ index.vectors_at(rows).T  # B x R
        gaps = np.full(scores.shape, np.inf, dtype=np.float32)
        for place, doc_ids in enumerate(request.positives):
            own = index.vectors(doc_ids) @ request.queries[place]  # the query's positives
            gaps[place] = np.abs(scores[place][:, None] - own).min(axis=1)
        urgency = staleness[staleness > 0] / (gaps.min(axis=0) + CLOSE)
        return [index.doc_ids[row] for row in rows[np.argsort(-urgency, kind="stable")]]

    def moved(self, index: VectorIndex, rows: Sequence[int]) -> None:
        """Mend the graph around the documents that moved."""
        if self.graph is not None:
            self.graph.repair(index, rows)

    def save(self, folder: Path) -> None:
        """Write the graph: its repairs depend on all that happened before."""
        if self.graph is not None:
            self.graph.save(folder)

    def restore(self, folder: Path, index: VectorIndex) -> None:
        """Read the graph, where one had been built."""
        if (folder / "graph.safetensors").exists():
            self.graph = NeighbourGraph.load(folder, index)


def make_policy(settings: RefreshSettings) -> RefreshPolicy:
    """The policy that the settings name. `drift` encodes what `never` does; the environment corrects the rest."""
    match settings.policy:
        case "never" | "drift":
            return Never()
        case "periodic":
            return Periodic(settings.every)
        case "shortlist":
            return Shortlist(settings.depth)
        case "selective":
            return Selective(settings.depth, settings.hops, settings.neighbours)
        case "full":
            return Full()


def within_budget(
    doc_ids: Sequence[str], tokens: Sequence[int], documents_left: float, tokens_left: float
) -> list[str]:
    """The longest head of `doc_ids` that fits both what is left of the documents and of the tokens."""
    kept: list[str] = []
    for doc_id, length in zip(doc_ids, tokens, strict=True):
        tokens_left -= length
        if len(kept) + 1 > documents_left or tokens_left < 0:
            break
        kept.append(doc_id)
    return kept
