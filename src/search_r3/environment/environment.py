"""Rollouts in, rewards out: the environment owns the index and its refresh. No gradients here.

Shapes: `B` rollouts, `N` documents, `D` vector size.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..config import RefreshSettings, RewardWeights
from ..data.collection import Collection, Qrels
from ..data.restrictions import restrictions
from ..errors import DataError, RewardError
from ..model.engine.decoding import Rollout
from ..parallel import Communicator, SingleProcess, divide, encode_sharded
from ..retrieval.approximate import ApproximateIndex
from ..retrieval.index import ExactIndex, VectorIndex
from ..retrieval.ranking import RestrictedRows, ranks, restricted_rows
from ..types import Array, DocumentEncoder
from .account import Audit, compare_scores
from .drift import MIN_PAIRS, DriftCorrection, fit_drift
from .refresh import RefreshRequest, make_policy, within_budget
from .reward import RewardParts, reward_parts

T = TypeVar("T")
ROWS_AT_A_TIME = 65_536
"""Vectors corrected together, so that a large corpus is never copied whole."""
UPDATES_PER_INDEX_AUDIT = 20
"""An approximate index checks its own recall after so many updates; a step makes up to two."""


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


@dataclass(frozen=True)
class Feedback:
    """The environment's answer to a batch of rollouts, one entry per rollout."""

    rewards: list[float]
    parts: list[RewardParts]
    best_ranks: list[int]
    refresh: RefreshReport


@dataclass(frozen=True)
class JudgedRows:
    """The relevant documents of a query as rows of an index, their gains, and what its ranking may hold."""

    positives: list[int]
    gains: list[int]
    limits: RestrictedRows


class RetrievalEnvironment:
    """A corpus whose vectors follow the model, and the reward that it gives.

    Args:
        collection: documents and queries.
        qrels: judgements of the training queries.
        encoder: encodes document texts with the current weights.
        refresh: which documents are refreshed, and under which budget.
        weights: weights of the reward parts.
        k: depth of the nDCG in the ranking part.
        max_new_tokens: the reasoning budget, for the length part.
        seed: of the random samples of documents.
        communicator: the other processes, if there are any.
        state: a folder that `save` wrote; by default all documents are encoded now, as version 0.
    """

    def __init__(
        self,
        collection: Collection,
        qrels: Qrels,
        encoder: DocumentEncoder,
        refresh: RefreshSettings,
        weights: RewardWeights,
        *,
        k: int,
        max_new_tokens: int,
        seed: int = 0,
        communicator: Communicator | None = None,
        state: Path | None = None,
    ) -> None:
        self.collection, self.qrels, self.encoder, self.refresh = collection, qrels, encoder, refresh
        self.weights, self.k, self.max_new_tokens = weights, k, max_new_tokens
        self.seed, self.communicator = seed, communicator or SingleProcess()
        self.policy = make_policy(refresh)
        self._tokens: dict[str, int] = {}
        self.index: ExactIndex | ApproximateIndex
        if state is None:
            doc_ids = list(collection.documents)
            self.index = ExactIndex(doc_ids, self._encode(doc_ids))
            if refresh.index == "approximate":
                self.index = ApproximateIndex(self.index, audit_every=UPDATES_PER_INDEX_AUDIT)
                self.index.maintain()
            return
        kind = ApproximateIndex if refresh.index == "approximate" else ExactIndex
        self.index = kind.load(state / "index")
        if set(self.index.doc_ids) != set(collection.documents):
            raise DataError(f"the saved index and collection {collection.name!r} hold different documents")
        self.policy.restore(state / "policy", self.index)

    @property
    def exact_index(self) -> ExactIndex:
        """The vectors as they are held, for an exact search."""
        return self.index.store if isinstance(self.index, ApproximateIndex) else self.index

    def feedback(self, rollouts: Sequence[Rollout], query_ids: Sequence[str], policy_version: int) -> Feedback:
        """Refresh the index, rank every rollout's vector in it and score the ranks.

        With several processes each gives its own rollouts; the refresh serves all of them.

        Args:
            rollouts: `B` rollouts made by the weights of `policy_version`.
            query_ids: the query of each.
            policy_version: version of the weights; encoded documents get it.

        Raises:
            RewardError: no rollouts, or a query without a relevant document.
        """
        positives = [self.positives(query_id) for query_id in query_ids]
        if not rollouts or not all(positives):
            lacking = [query_id for query_id, doc_ids in zip(query_ids, positives, strict=True) if not doc_ids]
            raise RewardError(
                f"query {lacking[0]!r} has no relevant document and so no reward; remove it from the training split"
                if lacking
                else "no rollouts were given; every process needs at least one"
            )
        report = self._refresh(rollout_vectors(rollouts), positives, policy_version)
        parts, best_ranks = self._score(self.index, rollouts, query_ids)
        self.communicator.barrier()
        return Feedback([part.total(self.weights) for part in parts], parts, best_ranks, report)

    def audit(self, rollouts: Sequence[Rollout], query_ids: Sequence[str], policy_version: int) -> Audit:
        """Score the same rollouts against freshly encoded documents; the index stays as it is.

        Encoded are the documents that matter most (positives and the best `2 k` of every rollout) and a random sample
        of the rest, or, where `refresh.audit_documents` is 0, all. Both scores are taken among these documents, by
        exact search. With several processes each audits its own rollouts.
        """
        started = time.perf_counter()
        size, doc_ids = self.refresh.audit_documents, list(self.index.doc_ids)
        if size and size < len(doc_ids):
            found = self.index.search(rollout_vectors(rollouts), 2 * self.k).doc_ids
            best = dict.fromkeys(doc_id for ids in found for doc_id in ids)
            best |= dict.fromkeys(doc_id for query_id in query_ids for doc_id in self.positives(query_id))
            sample = random.Random(f"{self.seed}/audit/{policy_version}").sample(doc_ids, size)
            doc_ids = list(best | dict.fromkeys(sample))
        else:
            sample = doc_ids
        live = ExactIndex(doc_ids, self.index.vectors(doc_ids))
        fresh = ExactIndex(doc_ids, self.encoder.encode_document(self._texts(doc_ids)))
        scored = [self._score(index, rollouts, query_ids) for index in (live, fresh)]
        self.communicator.barrier()
        return compare_scores(
            rewards=[[part.total(self.weights) for part in parts] for parts, _ in scored],
            ranks=[best_ranks for _, best_ranks in scored],
            top=[index.search(rollout_vectors(rollouts), self.k).doc_ids for index in (live, fresh)],
            sample=[index.vectors(sample) for index in (live, fresh)],
            documents=len(doc_ids),
            seconds=time.perf_counter() - started,
        )

    def positives(self, query_id: str) -> list[str]:
        """The relevant documents of a query."""
        return [doc_id for doc_id, gain in self.qrels[query_id].items() if gain > 0]

    def save(self, folder: Path) -> None:
        """Write the environment's state: the index with its versions, and what the policy keeps."""
        self.index.save(folder / "index")
        self.policy.save(folder / "policy")

    def _score(
        self, index: VectorIndex, rollouts: Sequence[Rollout], query_ids: Sequence[str]
    ) -> tuple[list[RewardParts], list[int]]:
        """Reward parts and the best rank of a relevant document, per rollout."""
        vectors = rollout_vectors(rollouts)
        # The rollouts of a group share their query.
        judged = {query_id: self._judged(index, query_id) for query_id in query_ids}
        owners = [judged[query_id] for query_id in query_ids]
        positives = [owner.positives for owner in owners]
        rank_lists = ranks(index, vectors, positives, [owner.limits for owner in owners])
        parts = [
            reward_parts(
                ranks_of,
                (index.vectors_at(owner.positives) @ vector).tolist(),
                owner.gains,
                k=self.k,
                forced=rollout.forced,
                reasoning_tokens=rollout.reasoning_tokens,
                max_new_tokens=self.max_new_tokens,
            )
            for rollout, vector, ranks_of, owner in zip(rollouts, vectors, rank_lists, owners, strict=True)
        ]
        return parts, [min(ranks_of) for ranks_of in rank_lists]

    def _judged(self, index: VectorIndex, query_id: str) -> JudgedRows:
        relevance = self.qrels[query_id]
        positives = self.positives(query_id)
        return JudgedRows(
            [index.row(doc_id) for doc_id in positives],
            [relevance[doc_id] for doc_id in positives],
            restricted_rows(index, restrictions(self.collection, query_id, relevance)),
        )

    def _refresh(self, vectors: Array, positives: list[list[str]], policy_version: int) -> RefreshReport:
        started = time.perf_counter()
        everyone = self.communicator.all_gather((vectors, positives))
        queries = np.concatenate([own for own, _ in everyone])
        relevant = [doc_ids for _, own in everyone for doc_ids in own]
        first = self._stale({doc_id for doc_ids in relevant for doc_id in doc_ids}, policy_version)
        corrected = self.refresh.policy == "drift" or self.refresh.correct_drift
        if corrected:
            # At most half of what the positives leave of the budget, so that the policy has its share too.
            sample = self._affordable(self._drift_sample(first, policy_version), first, 0.5)
            if len(first) + len(sample) >= MIN_PAIRS:  # fewer would buy no map
                first += sample
        gain = self._encode_again(first, policy_version, correct=corrected)
        wanted = self.policy.choose(RefreshRequest(self.index, policy_version, queries, relevant))
        chosen = self._agreed(self._affordable(self._stale(wanted, policy_version), first))
        self._encode_again(chosen, policy_version, correct=False)
        encoded = first + chosen
        staleness = policy_version - self.index.encoded_at_version
        return RefreshReport(
            documents_encoded=len(encoded),
            tokens_encoded=sum(self._count_tokens(encoded)),
            seconds=time.perf_counter() - started,
            staleness_mean=float(staleness.mean()),
            staleness_max=int(staleness.max()),
            drift_gain=gain,
            index_recall=self.index.last_recall if isinstance(self.index, ApproximateIndex) else 1.0,
        )

    def _agreed(self, choice: T) -> T:
        """The first process's choice, for all: searches and fits of other machines may differ in a near tie."""
        agreed: T = self.communicator.all_gather(choice)[0]
        return agreed

    def _stale(self, doc_ids: Iterable[str], policy_version: int) -> list[str]:
        """Those of the documents that other weights encoded; a set comes back sorted."""
        ordered = sorted(doc_ids) if isinstance(doc_ids, set) else doc_ids
        versions = self.index.encoded_at_version
        return [doc_id for doc_id in ordered if versions[self.index.row(doc_id)] != policy_version]

    def _drift_sample(self, but: Sequence[str], policy_version: int) -> list[str]:
        """Random stale documents, other than `but`."""
        others = sorted(set(self._stale(self.index.doc_ids, policy_version)).difference(but))
        rng = random.Random(f"{self.seed}/drift/{policy_version}")
        return rng.sample(others, min(self.refresh.drift_sample, len(others)))

    def _affordable(self, doc_ids: Sequence[str], spent: Sequence[str], share: float = 1.0) -> list[str]:
        """The head of `doc_ids` that fits a share of the budget that the documents in `spent` leave."""
        documents, tokens = self.refresh.max_documents, self.refresh.max_tokens
        if documents is None and tokens is None:
            return list(doc_ids)
        doc_ids = doc_ids[:documents]
        return within_budget(
            doc_ids,
            self._count_tokens(doc_ids),
            inf if documents is None else share * (documents - len(spent)),
            inf if tokens is None else share * (tokens - sum(self._count_tokens(spent))),
        )

    def _encode_again(self, doc_ids: Sequence[str], policy_version: int, *, correct: bool) -> float:
        """Encode these documents and, if asked, correct all others; returns the gain of the correction."""
        if not doc_ids:
            return 0.0
        before, after, gain = self.index.vectors(doc_ids), self._encode(doc_ids), 0.0
        if correct:
            gain = self._correct(fit_drift(before, after, self._agreed), policy_version)
        self.index.update(doc_ids, after, policy_version)
        self.policy.moved(self.index, [self.index.row(doc_id) for doc_id in doc_ids])
        return gain

    def _correct(self, correction: DriftCorrection, policy_version: int) -> float:
        """Apply a map to every stale vector; returns its gain."""
        if correction.name != "identity":
            assert isinstance(self.index, ExactIndex), "the settings refuse corrections of an approximate index"
            stale = np.flatnonzero(self.index.encoded_at_version != policy_version)
            for start in range(0, len(stale), ROWS_AT_A_TIME):
                rows = stale[start : start + ROWS_AT_A_TIME]
                self.index.set_vectors_at(rows, correction.apply(self.index.vectors_at(rows)))
        return correction.gain

    def _encode(self, doc_ids: Sequence[str]) -> Array:
        """Vectors of these documents, each process encoding its share."""
        shares = divide(self._count_tokens(doc_ids), self.communicator.world_size)

        def encode(places: Sequence[int]) -> Array:
            return self.encoder.encode_document(self._texts([doc_ids[place] for place in places]))

        return encode_sharded(self.communicator, shares, encode)

    def _count_tokens(self, doc_ids: Sequence[str]) -> list[int]:
        unknown = [doc_id for doc_id in doc_ids if doc_id not in self._tokens]
        if unknown:
            counts = self.encoder.count_document_tokens(self._texts(unknown))
            self._tokens.update(zip(unknown, counts, strict=True))
        return [self._tokens[doc_id] for doc_id in doc_ids]

    def _texts(self, doc_ids: Sequence[str]) -> list[str]:
        return [self.collection.documents[doc_id].full_text for doc_id in doc_ids]


def rollout_vectors(rollouts: Sequence[Rollout]) -> Array:
    """The vectors of `B` rollouts, `B x D`."""
    return np.stack([rollout.vector.numpy() for rollout in rollouts])
