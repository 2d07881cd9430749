"""Rollouts in, rewards out: the environment owns the index and its refresh. No gradients here.

Shapes: `B` rollouts, `N` documents, `D` vector size.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..config import RefreshSettings, RewardSettings
from ..data.collection import Collection, Qrels
from ..errors import DataError, RewardError
from ..model.engine.decoding import Rollout
from ..parallel import Communicator, divide, encode_sharded
from ..retrieval.approximate import ApproximateIndex
from ..retrieval.index import ExactIndex, descending
from ..retrieval.ranking import ranked_rows
from ..types import Array, DocumentEncoder, Rows
from .account import Audit, compare_scores
from .drift import MIN_PAIRS, DriftCorrection, fit_drift
from .refresh import RefreshRequest, make_policy
from .reward import RewardParts
from .scoring import QueryRows, Score, Scorer

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


class RetrievalEnvironment:
    """A corpus whose vectors follow the model, and the reward that it gives.

    Args:
        collection: documents and queries.
        qrels: judgements of the training queries.
        encoder: encodes document texts with the current weights.
        refresh: which documents are refreshed, and under which budget.
        weights: weights of the reward parts.
        k: depth of the nDCG in the reward.
        max_new_tokens: the reasoning budget.
        depth: the number of best documents that a score names.
        seed: of the random samples of documents.
        frozen: documents keep their first vectors, and `refresh` (but for its `index`) is not looked at.
        communicator: the other processes, if there are any.
        state: a folder that `save` wrote; by default all documents are encoded now, as version 0.
    """

    def __init__(
        self,
        collection: Collection,
        qrels: Qrels,
        encoder: DocumentEncoder,
        refresh: RefreshSettings,
        weights: RewardSettings,
        *,
        k: int,
        max_new_tokens: int,
        depth: int = 0,
        seed: int = 0,
        frozen: bool = False,
        communicator: Communicator | None = None,
        state: Path | None = None,
    ) -> None:
        self.collection, self.qrels, self.encoder, self.refresh = collection, qrels, encoder, refresh
        self.weights, self.k, self.frozen = weights, k, frozen
        self.scorer = Scorer(collection, qrels, weights, k=k, max_new_tokens=max_new_tokens, depth=depth)
        self.seed, self.communicator = seed, communicator or Communicator()
        self.policy = make_policy(refresh)
        self._rows_by_query: dict[str, QueryRows] = {}
        self._tokens = np.full(len(collection.documents), -1, dtype=np.int64)  # N, -1 where they were never counted
        self._doc_ids = sorted(collection.documents, reverse=True)  # as the rows of the index
        self.index: ExactIndex | ApproximateIndex
        if state is None:
            doc_ids = list(collection.documents)
            self.index = ExactIndex(doc_ids, self._encode(np.argsort(descending(doc_ids))))
            if refresh.index == "approximate":
                self.index = ApproximateIndex(self.index, audit_every=UPDATES_PER_INDEX_AUDIT)
                self.index.maintain()
            return
        kind = ApproximateIndex if refresh.index == "approximate" else ExactIndex
        self.index = kind.load(state / "index")
        if list(self.index.doc_ids) != self._doc_ids:
            raise DataError(f"the saved index and collection {collection.name!r} hold different documents")
        self.policy.restore(state / "policy", self.index)

    @property
    def exact_index(self) -> ExactIndex:
        """The vectors as they are held, for an exact search."""
        return self.index.store if isinstance(self.index, ApproximateIndex) else self.index

    def feedback(self, rollouts: Sequence[Rollout], query_ids: Sequence[str], policy_version: int) -> Feedback:
        """Refresh the index, rank every rollout's vector in it and score the ranks.

        With several processes each gives its own rollouts, which may be none; the refresh serves all of them.

        Args:
            rollouts: `B` rollouts made by the weights of `policy_version`.
            query_ids: the query of each.
            policy_version: version of the weights; encoded documents get it.

        Raises:
            RewardError: nobody gave a rollout, a query without a relevant document, or a reward cannot be computed.
        """
        lacking = [query_id for query_id in query_ids if not self.positives(query_id)]
        if lacking:
            raise RewardError(
                f"query {lacking[0]!r} has no relevant document and so no reward; remove it from the training split"
            )
        vectors = rollout_vectors(rollouts)
        report = self._refresh(vectors, query_ids, policy_version)
        scores = self.score(rollouts, query_ids)
        self.communicator.barrier()
        return Feedback([score.parts.total(self.weights) for score in scores], scores, report)

    def score(self, rollouts: Sequence[Rollout], query_ids: Sequence[str]) -> list[Score]:
        """Rank and score replies in the index as it is; those of direct mode are empty."""
        vectors = rollout_vectors(rollouts)
        return self.scorer.score(self.index, rollouts, vectors, [self.query_rows(one) for one in query_ids])

    def audit(self, rollouts: Sequence[Rollout], query_ids: Sequence[str], policy_version: int) -> Audit:
        """Score the same rollouts against freshly encoded documents; the index stays as it is.

        Encoded are the documents that matter most (positives and the best `2 k` of every rollout) and a random sample
        of the rest, or, where `refresh.audit_documents` is 0, all. Both scores are taken among these documents, by
        exact search. With several processes each audits its own rollouts.
        """
        started = time.perf_counter()
        vectors = rollout_vectors(rollouts)
        targets = [self.query_rows(query_id) for query_id in query_ids]
        size, rows = self.refresh.audit_documents, np.arange(len(self.index))
        sample = rows
        if size and size < len(rows):
            best = ranked_rows(self.index, vectors, [query.limits for query in targets], 2 * self.k)
            sample = np.array(random.Random(f"{self.seed}/audit/{policy_version}").sample(range(len(rows)), size))
            rows = np.unique(np.concatenate([*(r for r, _ in best), *(query.positives for query in targets), sample]))
        doc_ids, targets = [self._doc_ids[row] for row in rows], [query.within(rows) for query in targets]
        limits = [query.limits for query in targets]
        live = ExactIndex(doc_ids, self.index.vectors_at(rows))
        fresh = ExactIndex(doc_ids, self.encoder.encode_document(self._texts(rows)))
        scores = [self.scorer.score(index, rollouts, vectors, targets) for index in (live, fresh)]
        tops = [ranked_rows(index, vectors, limits, self.k) for index in (live, fresh)]
        self.communicator.barrier()
        return compare_scores(
            rewards=[[score.parts.total(self.weights) for score in side] for side in scores],
            ranks=[[score.best_rank for score in side] for side in scores],
            top=[[ranking.tolist() for ranking, _ in top] for top in tops],
            sample=[index.vectors_at(np.searchsorted(rows, sample)) for index in (live, fresh)],
            documents=len(rows),
            seconds=time.perf_counter() - started,
        )

    def positives(self, query_id: str) -> list[str]:
        """The relevant documents of a query."""
        return [doc_id for doc_id, gain in self.qrels[query_id].items() if gain > 0]

    def query_rows(self, query_id: str) -> QueryRows:
        """The rows that a query's ranking is about: its relevant documents, and what its ranking may hold."""
        if query_id not in self._rows_by_query:
            self._rows_by_query[query_id] = self.scorer.query_rows(self.index, query_id)
        return self._rows_by_query[query_id]

    def save(self, folder: Path) -> None:
        """Write the environment's state: the index with its versions, and what the policy keeps."""
        self.index.save(folder / "index")
        self.policy.save(folder / "policy")

    def _refresh(self, vectors: Array, query_ids: Sequence[str], policy_version: int) -> RefreshReport:
        started = time.perf_counter()
        shares = self.communicator.all_gather((vectors, query_ids))
        given = [own for own, _ in shares if len(own)]
        if not given:
            raise RewardError("no rollouts were given; one process at least has to give one")
        if self.frozen:
            return RefreshReport(0, 0, time.perf_counter() - started, 0.0, 0, 0.0, self._recall)
        queries = np.concatenate(given)
        targets = [self.query_rows(query_id) for _, own in shares for query_id in own]
        positives = [query.positives for query in targets]
        first = self._stale(_by_doc_id(np.concatenate(positives)), policy_version)
        correct = self.refresh.policy == "drift" or self.refresh.correct_drift
        if correct:
            # At most half of what the positives leave of the budget, so that the policy has its share too.
            sample = self._affordable(self._drift_sample(first, policy_version), first, 0.5)
            if len(first) + len(sample) >= MIN_PAIRS:  # fewer would buy no map
                first = np.concatenate([first, sample])
        gain = self._encode_again(first, policy_version, correct=correct)
        limits = [query.limits for query in targets]
        request = RefreshRequest(self.index, policy_version, queries, positives, limits, self.k)
        urgent = self._stale(self.policy.choose(request), policy_version)
        second = self._agree(self._affordable(urgent, first))
        self._encode_again(second, policy_version, correct=False)
        rows = np.concatenate([first, second])
        staleness = policy_version - self.index.encoded_at_version
        return RefreshReport(
            documents_encoded=len(rows),
            tokens_encoded=int(self._count_tokens(rows).sum()),
            seconds=time.perf_counter() - started,
            staleness_mean=float(staleness.mean()),
            staleness_max=int(staleness.max()),
            drift_gain=gain,
            index_recall=self._recall,
        )

    @property
    def _recall(self) -> float:
        return self.index.last_recall if isinstance(self.index, ApproximateIndex) else 1.0

    def _agree(self, choice: T) -> T:
        """The first process's choice, for all: searches and fits of other machines may differ in a near tie."""
        first: T = self.communicator.all_gather(choice)[0]
        return first

    def _stale(self, rows: Rows, policy_version: int) -> Rows:
        """Those of the rows that other weights encoded, in their order."""
        stale: Rows = rows[self.index.encoded_at_version[rows] != policy_version]
        return stale

    def _drift_sample(self, but: Rows, policy_version: int) -> Rows:
        """Random stale rows, other than `but`."""
        others = np.setdiff1d(self._stale(np.arange(len(self.index)), policy_version), but)[::-1]
        rng = random.Random(f"{self.seed}/drift/{policy_version}")
        return others[rng.sample(range(len(others)), min(self.refresh.drift_sample, len(others)))]

    def _affordable(self, rows: Rows, spent: Rows, share: float = 1.0) -> Rows:
        """The head of `rows` that fits a share of the budget that the rows in `spent` leave."""
        documents, tokens = self.refresh.max_documents, self.refresh.max_tokens
        if documents is not None:
            rows = rows[: max(0, int(share * (documents - len(spent))))]
        if tokens is not None:
            left = share * (tokens - self._count_tokens(spent).sum())
            rows = rows[: np.searchsorted(np.cumsum(self._count_tokens(rows)), left, side="right")]
        return rows

    def _encode_again(self, rows: Rows, policy_version: int, *, correct: bool) -> float:
        """Encode these documents and, if asked, correct all others; returns the gain of the correction."""
        if not len(rows):
            return 0.0
        before, after, gain = self.index.vectors_at(rows), self._encode(rows), 0.0
        if correct:
            gain = self._correct(fit_drift(before, after, self._agree), policy_version)
        self.index.update(rows, after, policy_version)
        self.policy.moved(self.index, rows)
        return gain

    def _correct(self, correction: DriftCorrection, policy_version: int) -> float:
        """Apply a map to every stale vector; returns its gain."""
        if correction.name != "identity":
            stale = self._stale(np.arange(len(self.index)), policy_version)
            for start in range(0, len(stale), ROWS_AT_A_TIME):
                rows = stale[start : start + ROWS_AT_A_TIME]
                self.index.update(rows, correction.apply(self.index.vectors_at(rows)))
        return correction.gain

    def _encode(self, rows: Rows) -> Array:
        """Vectors of these documents, each process encoding its share."""
        shares = divide(self._count_tokens(rows).tolist(), self.communicator.world_size)
        return encode_sharded(
            self.communicator, shares, lambda own: self.encoder.encode_document(self._texts(rows[list(own)]))
        )

    def _count_tokens(self, rows: Rows) -> NDArray[np.int64]:
        new = rows[self._tokens[rows] < 0]
        if len(new):
            self._tokens[new] = self.encoder.count_document_tokens(self._texts(new))
        return self._tokens[rows]

    def _texts(self, rows: Rows) -> list[str]:
        return [self.collection.documents[self._doc_ids[row]].full_text for row in rows]


def _by_doc_id(rows: Rows) -> Rows:
    """Each of the rows once, in the order of doc_ids."""
    return np.unique(rows)[::-1]


def rollout_vectors(rollouts: Sequence[Rollout]) -> Array:
    """The vectors of `B` rollouts, `B x D`; of none, `0 x 0`."""
    if not rollouts:
        return np.empty((0, 0), np.float32)
    return np.stack([rollout.vector.numpy() for rollout in rollouts])
