"""Replies in, scores out: where each reply's vector ranks its query's relevant documents in an index, and its reward.

Shapes: `B` replies, `D` vector size, `K` documents of a ranking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from ..config import RewardSettings
from ..data.collection import Collection, Qrels
from ..data.restrictions import restrictions
from ..model.engine.decoding import Rollout
from ..retrieval.protocol import VectorIndex
from ..retrieval.ranking import Hits, RestrictedRows, find, restricted_rows
from ..types import Array, Rows
from .reward import Outcome, RewardParts, contrastive, load_function, reward_parts


@dataclass(frozen=True)
class QueryRows:
    """What a query's ranking is about, as rows of an index.

    Attributes:
        query_id: the query.
        doc_ids: its relevant documents.
        positives: their rows.
        gains: the relevance of each.
        twins: other documents with the text of one of them; ascending.
        limits: what the ranking may hold.
    """

    query_id: str
    doc_ids: list[str]
    positives: Rows
    gains: list[int]
    twins: Rows
    limits: RestrictedRows

    def within(self, rows: Rows) -> QueryRows:
        """The same in an index of these rows alone, which ascend; the positives are among them."""
        positives, twins = np.searchsorted(rows, self.positives), np.flatnonzero(np.isin(rows, self.twins))
        return QueryRows(self.query_id, self.doc_ids, positives, self.gains, twins, self.limits.within(rows))

    def are_negatives(self, rows: Rows) -> NDArray[np.bool_]:
        """Which of some ranked rows are neither relevant nor have the text of a relevant document."""
        return np.isin(rows, [*self.positives, *self.twins], invert=True)


@dataclass(frozen=True)
class Score:
    """What one reply's vector found.

    Attributes:
        parts: of the reward.
        best_rank: of a relevant document.
        cosine: to the relevant documents, the mean.
        nearest: the best rows of its ranking, as many as were asked for.
    """

    parts: RewardParts
    best_rank: int
    cosine: float
    nearest: Rows


class Scorer:
    """Scores replies in any index of a collection.

    Args:
        collection: documents and queries.
        qrels: judgements of the queries that are asked about.
        settings: of the reward.
        k: depth of the nDCG.
        max_new_tokens: the reasoning budget.
        depth: the number of documents of each ranking that are remembered, `K`.

    Raises:
        ConfigError: the user's reward function cannot be imported.
    """

    def __init__(
        self,
        collection: Collection,
        qrels: Qrels,
        settings: RewardSettings,
        *,
        k: int,
        max_new_tokens: int,
        depth: int = 0,
    ) -> None:
        self.collection, self.qrels, self.settings = collection, qrels, settings
        self.k, self.max_new_tokens, self.depth = k, max_new_tokens, depth
        self.function = None if settings.function is None else load_function(settings.function)
        self._twins: dict[str, list[str]] | None = None

    def query_rows(self, index: VectorIndex, query_id: str) -> QueryRows:
        """The rows that a query's ranking is about."""
        relevance = self.qrels[query_id]
        doc_ids = [doc_id for doc_id, gain in relevance.items() if gain > 0]
        twins = {twin for doc_id in doc_ids for twin in self._same_text(doc_id)} - set(doc_ids)
        return QueryRows(
            query_id,
            doc_ids,
            index.rows_of(doc_ids),
            [relevance[doc_id] for doc_id in doc_ids],
            np.sort(index.rows_of(sorted(twins))),
            restricted_rows(index, restrictions(self.collection, query_id, relevance)),
        )

    def score(
        self, index: VectorIndex, rollouts: Sequence[Rollout], vectors: Array, targets: Sequence[QueryRows]
    ) -> list[Score]:
        """Rank and score each reply.

        Args:
            index: what is ranked.
            rollouts: `B` replies.
            vectors: theirs, `B x D`.
            targets: what the query of each is about.

        Raises:
            RewardError: a reward cannot be computed.
        """
        return self.judge(rollouts, targets, self.search(index, vectors, targets)) if rollouts else []

    @property
    def wanted(self) -> int:
        """The number of best documents that a score is made of."""
        return max(self.depth, self.settings.contrastive_depth if self.settings.contrastive > 0 else 0)

    def search(
        self, index: VectorIndex, vectors: Array, targets: Sequence[QueryRows], depth: int | None = None
    ) -> list[Hits]:
        """What vectors `B x D` find in an index, where the query of each is about `targets`, to `depth` or `wanted`."""
        limits, positives = [query.limits for query in targets], [query.positives for query in targets]
        return find(index, vectors, positives, limits, self.wanted if depth is None else depth)

    def judge(self, rollouts: Sequence[Rollout], targets: Sequence[QueryRows], hits: Sequence[Hits]) -> list[Score]:
        """Score replies for what their vectors found.

        Raises:
            RewardError: a reward cannot be computed.
        """
        scores = []
        for rollout, query, own in zip(rollouts, targets, hits, strict=True):
            outcome = self._outcome(rollout, query, own)
            contrast = self._contrast(query, own) if self.settings.contrastive > 0 else 0.0
            parts = reward_parts(outcome, self.settings, k=self.k, contrast=contrast, function=self.function)
            scores.append(Score(parts, min(own.ranks), fmean(outcome.cosines), own.rows[: self.depth]))
        return scores

    def _contrast(self, query: QueryRows, hits: Hits) -> float:
        depth = self.settings.contrastive_depth
        rivals = hits.row_scores[:depth][query.are_negatives(hits.rows[:depth])]
        own = np.where(query.limits.allow(query.positives), hits.scores, -np.inf)
        return contrastive(own, query.gains, rivals, self.settings.contrastive_temperature)

    def _outcome(self, rollout: Rollout, query: QueryRows, hits: Hits) -> Outcome:
        return Outcome(
            query_id=query.query_id,
            query=self.collection.queries[query.query_id].text,
            reasoning=rollout.reasoning,
            reasoning_tokens=rollout.reasoning_tokens,
            max_new_tokens=self.max_new_tokens,
            forced=rollout.forced,
            doc_ids=query.doc_ids,
            gains=query.gains,
            ranks=hits.ranks,
            cosines=hits.scores.tolist(),
        )

    def _same_text(self, doc_id: str) -> list[str]:
        """All documents with the text of this one."""
        if self._twins is None:
            groups: dict[str, list[str]] = {}
            for other, document in self.collection.documents.items():
                groups.setdefault(document.full_text, []).append(other)
            self._twins = {text: group for text, group in groups.items() if len(group) > 1}
        return self._twins.get(self.collection.documents[doc_id].full_text, [])
