"""Rollouts in, rewards out: the environment owns the index and its refresh. No gradients here.

Shapes: `B` rollouts, `D` vector size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import RewardWeights
from ..data.collection import Collection, Qrels
from ..errors import DataError
from ..model.generation import Rollout
from ..retrieval.index import Array, ExactIndex
from .refresh import RefreshPolicy, RefreshRequest
from .reward import RewardParts, reward_parts

Encode = Callable[[Sequence[str]], Array]
"""Texts to vectors with the current weights, `N x D`."""


@dataclass(frozen=True)
class RefreshReport:
    """What one refresh did: documents and seconds spent; staleness (in versions) of all documents afterwards."""

    documents_encoded: int
    seconds: float
    staleness_mean: float
    staleness_max: int


@dataclass(frozen=True)
class Feedback:
    """The environment's answer to a batch of rollouts, one entry per rollout."""

    rewards: list[float]
    parts: list[RewardParts]
    best_ranks: list[int]
    refresh: RefreshReport


class RetrievalEnvironment:
    """A corpus whose vectors follow the model, and the reward that it gives.

    Args:
        collection: documents and queries.
        qrels: judgements of the training queries.
        encode: encodes document texts with the current weights.
        policy: which documents are refreshed.
        weights: weights of the reward parts.
        k: depth of the nDCG in the ranking part.
        max_new_tokens: the reasoning budget, for the length part.
        index: the index of an earlier state; by default all documents are encoded now, as version 0.
    """

    def __init__(
        self,
        collection: Collection,
        qrels: Qrels,
        encode: Encode,
        policy: RefreshPolicy,
        weights: RewardWeights,
        *,
        k: int,
        max_new_tokens: int,
        index: ExactIndex | None = None,
    ) -> None:
        self.collection, self.qrels, self.encode, self.policy, self.weights = (
            collection,
            qrels,
            encode,
            policy,
            weights,
        )
        self.k, self.max_new_tokens = k, max_new_tokens
        if index is None:
            doc_ids = list(collection.documents)
            index = ExactIndex(doc_ids, encode(self._texts(doc_ids)))
        elif set(index.doc_ids) != set(collection.documents):
            raise DataError(f"the saved index and collection {collection.name!r} hold different documents")
        self.index = index

    def feedback(self, rollouts: Sequence[Rollout], query_ids: Sequence[str], policy_version: int) -> Feedback:
        """Refresh the index, rank every rollout's vector in it and score the ranks.

        Args:
            rollouts: `B` rollouts made by the weights of `policy_version`.
            query_ids: the query of each.
            policy_version: version of the weights; encoded documents get it.
        """
        vectors = np.stack([rollout.vector.cpu().numpy() for rollout in rollouts])  # B x D
        positives = [self.positives(query_id) for query_id in query_ids]
        report = self._refresh(vectors, sorted({doc_id for ids in positives for doc_id in ids}), policy_version)
        ranks = self.index.ranks(vectors, positives)
        parts = []
        for rollout, vector, query_id, found in zip(rollouts, vectors, query_ids, ranks, strict=True):
            cosines = (self.index.vectors(list(found)) @ vector).tolist()
            parts.append(
                reward_parts(
                    found,
                    cosines,
                    self.qrels[query_id],
                    k=self.k,
                    forced=rollout.forced,
                    reasoning_tokens=rollout.reasoning_tokens,
                    max_new_tokens=self.max_new_tokens,
                )
            )
        rewards = [part.total(self.weights) for part in parts]
        return Feedback(rewards, parts, [min(found.values()) for found in ranks], report)

    def positives(self, query_id: str) -> list[str]:
        """The relevant documents of a query."""
        return [doc_id for doc_id, gain in self.qrels[query_id].items() if gain > 0]

    def save(self, folder: Path) -> None:
        """Write the environment's state (the index with its versions) atomically."""
        self.index.save(folder)

    def _refresh(self, vectors: Array, positive_ids: list[str], policy_version: int) -> RefreshReport:
        started = time.perf_counter()
        request = RefreshRequest(self.index, policy_version, vectors, positive_ids)
        wanted = dict.fromkeys([*positive_ids, *self.policy.choose(request)])
        versions = self.index.encoded_at_version
        stale = [doc_id for doc_id in wanted if versions[self.index.row(doc_id)] != policy_version]
        if stale:
            self.index.update(stale, self.encode(self._texts(stale)), policy_version)
        staleness = policy_version - self.index.encoded_at_version
        seconds = time.perf_counter() - started
        return RefreshReport(len(stale), seconds, float(staleness.mean()), int(staleness.max()))

    def _texts(self, doc_ids: Sequence[str]) -> list[str]:
        return [self.collection.documents[doc_id].full_text for doc_id in doc_ids]
