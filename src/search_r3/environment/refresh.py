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

from ..retrieval.protocol import VectorIndex
from ..retrieval.ranking import Hits, RestrictedRows, ranked_rows
from ..sections import RefreshSettings
from ..types import Array, Rows
from .neighbours import NeighbourGraph

CLOSE = 0.01
"""A gap of this size between a document's score and a positive's halves the document's urgency."""
CUTS = 2
"""A document and a positive that both rank below so many times k change no reward by changing places."""


@dataclass(frozen=True)
class RefreshRequest:
    """What a policy may look at, after the positives of the batch have been encoded freshly.

    Attributes:
        index: the live index with its `encoded_at_version`.
        policy_version: the version of the weights that made the queries.
        queries: the vectors about to be ranked, `B x D`.
        positives: the rows of the relevant documents of each, `B` lists.
        limits: what the ranking of each may hold.
        k: depth of the reward's nDCG.
        hits: what each of them finds, where that is known to the depth that the policy looks at.
    """

    index: VectorIndex
    policy_version: int
    queries: Array
    positives: Sequence[Rows]
    limits: Sequence[RestrictedRows]
    k: int
    hits: Sequence[Hits] | None = None

    def ranked(self, depth: int) -> list[tuple[Rows, Array]]:
        """The best rows of each query and their scores."""
        if self.hits is not None:
            return [(own.rows[:depth], own.row_scores[:depth]) for own in self.hits]
        return ranked_rows(self.index, self.queries, self.limits, depth)


class RefreshPolicy(ABC):
    """A rung of the ladder in docs/method.md."""

    @abstractmethod
    def choose(self, request: RefreshRequest) -> Rows:
        """The rows to encode again, the most urgent first; the environment skips those that are fresh."""

    def moved(self, index: VectorIndex, rows: Rows) -> None:  # noqa: B027 - most policies keep no state
        """Told which rows of the index have new vectors."""

    def save(self, folder: Path) -> None:  # noqa: B027
        """Write the policy's own state into a folder."""

    def restore(self, folder: Path, index: VectorIndex) -> None:  # noqa: B027
        """Take up the state that `save` wrote for this index."""


class Periodic(RefreshPolicy):
    """Every document is encoded again at every `every`-th version, none between; at every one: the truth, in full.

    With `every=0` no document but the batch's positives (and the sample of the drift correction) is ever encoded again.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def choose(self, request: RefreshRequest) -> Rows:
        """Everything, or nothing."""
        due = self.every > 0 and request.policy_version % self.every == 0
        return np.arange(len(request.index) if due else 0)


class Shortlist(RefreshPolicy):
    """The stale documents among each rollout's `depth` best, the better ranks first."""

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def choose(self, request: RefreshRequest) -> Rows:
        """The union of the shortlists; a document's urgency is its best rank, then its best score."""
        urgency: dict[int, tuple[int, float]] = {}
        for rows, scores in request.ranked(self.depth):
            for place, (row, score) in enumerate(zip(rows.tolist(), scores.tolist(), strict=True)):
                urgency[row] = min(urgency.get(row, (place, -score)), (place, -score))
        return np.array(sorted(urgency, key=lambda row: (*urgency[row], row)), dtype=np.int64)


class Selective(RefreshPolicy):
    """The shortlists, and what the neighbour graph links to them and to the positives: the paper's third mechanism.

    A document changes a reward only by passing a positive of the query. So the most urgent is the one whose score is
    near a positive's, measured against how far it can have moved: `staleness / (|score - score of positive| + CLOSE)`,
    the largest value over the rollouts. Pairs far below the cut of the reward do not count, however close: there the
    ranking is densest, and what passes there changes nothing.
    """

    def __init__(self, depth: int, hops: int, neighbours: int) -> None:
        self.depth, self.hops, self.neighbours = depth, hops, neighbours
        self.graph: NeighbourGraph | None = None

    def choose(self, request: RefreshRequest) -> Rows:
        """Candidates by urgency."""
        index = request.index
        if self.graph is None:
            self.graph = NeighbourGraph.build(index, self.neighbours)
        deep = max(self.depth, CUTS * request.k)
        rankings = request.ranked(deep)
        shortlists = [rows[: self.depth] for rows, _ in rankings]
        cuts = [scores[: CUTS * request.k][-1] for _, scores in rankings]
        positives = np.unique(np.concatenate(request.positives))
        nearest = dict.fromkeys(row for rows in shortlists for row in rows.tolist())
        reached = np.array(self.graph.reach([*positives.tolist(), *nearest], self.hops))
        staleness = request.policy_version - index.encoded_at_version[reached]
        rows, staleness = reached[staleness > 0], staleness[staleness > 0]  # R
        scores = request.queries @ index.vectors_at(rows).T  # B x R
        gaps = np.full(len(rows), np.inf, dtype=np.float32)
        for query, own, own_positives, cut in zip(request.queries, scores, request.positives, cuts, strict=True):
            bars = index.vectors_at(own_positives) @ query
            near = np.where(np.maximum(own[:, None], bars) >= cut, np.abs(own[:, None] - bars), np.inf)
            gaps = np.minimum(gaps, near.min(axis=1))
        urgent: Rows = rows[np.argsort(-staleness / (gaps + CLOSE), kind="stable")]
        return urgent

    def moved(self, index: VectorIndex, rows: Rows) -> None:
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
            return Periodic(every=0)
        case "periodic":
            return Periodic(settings.every)
        case "shortlist":
            return Shortlist(settings.depth)
        case "selective":
            return Selective(settings.depth, settings.hops, settings.neighbours)
        case "full":
            return Periodic(every=1)
