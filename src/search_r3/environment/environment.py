"""Rollouts in, rewards out: the environment owns the index and its refresh. No gradients here.

Several processes hold the corpus together: each encodes, keeps and searches its own documents (`retrieval.sharded`).
Two mechanisms read vectors from everywhere, the graph of `selective` and the drift correction; with them each process
holds the whole index, and the encoding alone is divided.

Shapes: `B` rollouts, `N` documents, `D` vector size.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..config import RewardSettings
from ..data.collection import Collection, Qrels
from ..errors import RewardError
from ..model.engine.decoding import Rollout
from ..parallel import Communicator, gather_queries
from ..retrieval.approximate import Audited
from ..retrieval.index import ExactIndex
from ..retrieval.ranking import Hits, ranked_rows
from ..retrieval.sharded import ROWS_AT_A_TIME, ShardedIndex, divide_rows, encode_rows, load_rows, shard_name
from ..sections import RefreshSettings
from ..types import Array, DocumentEncoder, Rows
from .account import Audit, compare_scores
from .amended import SLACK, Moved, amend
from .drift import MIN_PAIRS, DriftCorrection, fit_drift
from .feedback import Feedback, RefreshReport
from .refresh import RefreshRequest, make_policy
from .scoring import QueryRows, Score, Scorer
from .sketch import SketchIndex

T = TypeVar("T")
UPDATES_PER_INDEX_AUDIT = 20
"""An approximate index checks its own recall after so many updates; a step makes up to two."""


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
        frozen: documents keep their first vectors, and `refresh` (but for its `index` and `dtype`) is not looked at.
        communicator: the other processes, if there are any; then every method but `positives`, `query_rows` and
            `vectors_at` is called by all of them together.
        device: where vectors are stored and scored.
        state: a folder that `save` wrote; by default all documents are encoded now, as version 0.

    Attributes:
        sharded: whether each process holds its own documents only.

    Raises:
        DataError: the saved index holds other documents than the collection.
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
        device: str | torch.device = "cpu",
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
        self._encoded_tokens = 0  # by this process, in the refresh that is under way
        self._near: tuple[Rows, Array] = np.arange(0), np.empty((0, 0), np.float32)
        world_size, rank = self.communicator.world_size, self.communicator.rank
        shares = divide_rows([len(collection.documents[one].full_text) for one in self._doc_ids], world_size)
        self._encoder_of = np.empty(len(self._doc_ids), np.int64)  # N, the rank that encodes each row
        for number, share in enumerate(shares):
            self._encoder_of[share] = number
        whole = not frozen and (refresh.correct_drift or refresh.policy in ("selective", "drift"))
        self.sharded = world_size > 1 and not whole and all(map(len, shares))
        own = shares[rank] if self.sharded else np.arange(len(self._doc_ids))
        held: ExactIndex | Audited
        if state is None:
            held = encode_rows(self._doc_ids, self._encode, rows=own, dtype=refresh.dtype, device=device)
        else:
            load = SketchIndex.load if refresh.index == "approximate" else ExactIndex.load
            name = shard_name(self.communicator) if self.sharded else ""
            held = load_rows(state / "index", self._doc_ids, own, load, shard=name, device=device)
        if refresh.index == "approximate" and isinstance(held, ExactIndex):
            held = SketchIndex(held, audit_every=UPDATES_PER_INDEX_AUDIT)
            held.maintain()
        self.index: ExactIndex | Audited | ShardedIndex = held
        if self.sharded:
            self.index = ShardedIndex(self._doc_ids, own, held, self.communicator)
        if state is not None:
            self.policy.restore(state / "policy", self.index)

    @property
    def exact_index(self) -> ExactIndex | ShardedIndex:
        """The vectors as they are held, for an exact search."""
        if isinstance(self.index, ShardedIndex):
            return self.index.exact
        return self.index.store if isinstance(self.index, Audited) else self.index

    def caught_up(self, policy_version: int) -> ExactIndex | ShardedIndex | None:
        """The corpus as the weights of now encode it, where the live index may hold it; for an evaluation.

        With `full`, `periodic` and `shortlist` what is stale is encoded now, and the next rollouts find it fresh. None
        with `never` and `drift`, which are to encode nothing else, and with `selective`, whose graph all would move.
        """
        if self.frozen:
            return self.exact_index
        if self.refresh.policy in ("never", "drift", "selective"):
            return None
        self._encode_again(self._stale(np.arange(len(self.index)), policy_version), policy_version, correct=False)
        return self.exact_index

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
        vectors, everyone, own = gather_queries(self.communicator, rollout_vectors(rollouts), query_ids)
        if not everyone:
            raise RewardError("no rollouts were given; one process at least has to give one")
        targets = [self.query_rows(query_id) for query_id in everyone]
        report, hits = self._refresh(vectors, targets, policy_version)
        scores = (
            self.score(rollouts, query_ids) if hits is None else self.scorer.judge(rollouts, targets[own], hits[own])
        )
        self.communicator.barrier()
        return Feedback([score.parts.total(self.weights) for score in scores], scores, report)

    def score(self, rollouts: Sequence[Rollout], query_ids: Sequence[str]) -> list[Score]:
        """Rank and score replies in the index as it is; those of direct mode are empty."""
        vectors, everyone, own = self.index.together(rollout_vectors(rollouts), query_ids)
        if not everyone:
            return []
        targets = [self.query_rows(query_id) for query_id in everyone]
        return self.scorer.judge(rollouts, targets[own], self.scorer.search(self.index, vectors, targets)[own])

    def keep_near(self, query_ids: Sequence[str], scores: Sequence[Score]) -> None:
        """Keep the vectors of what these replies found and of the relevant documents, so that `vectors_at` has them."""
        if isinstance(self.index, ShardedIndex):
            positives = [self.query_rows(query_id).positives for query_id in query_ids]
            rows = np.unique(np.concatenate([np.arange(0), *(score.nearest for score in scores), *positives]))
            self._near = rows, self.index.vectors_for(rows)

    def vectors_at(self, rows: Rows) -> Array:
        """The vectors in these rows, `len(rows) x D`; of other processes' documents, those that were kept."""
        if isinstance(self.index, ShardedIndex):
            kept, vectors = self._near
            near: Array = vectors[np.searchsorted(kept, rows)]
            return near
        return self.index.vectors_at(rows)

    def audit(self, rollouts: Sequence[Rollout], query_ids: Sequence[str], policy_version: int) -> Audit:
        """Score the same rollouts against freshly encoded documents; the index stays as it is.

        Encoded are the documents that matter most (positives and the best `2 k` of every rollout) and a random sample
        of the rest, or, where `refresh.audit_documents` is 0, all. Both scores are taken among these documents, by
        exact search.
        """
        started = time.perf_counter()
        vectors, everyone, own = gather_queries(self.communicator, rollout_vectors(rollouts), query_ids)
        targets = [self.query_rows(query_id) for query_id in everyone]
        size, rows = self.refresh.audit_documents, np.arange(len(self.index))
        sample = rows
        if size and size < len(rows):
            best = ranked_rows(self.index, vectors, [query.limits for query in targets], 2 * self.k)
            sample = np.array(random.Random(f"{self.seed}/audit/{policy_version}").sample(range(len(rows)), size))
            rows = np.unique(np.concatenate([*(r for r, _ in best), *(query.positives for query in targets), sample]))
            rows = self._agree(rows)
        doc_ids, targets = [self._doc_ids[row] for row in rows], [query.within(rows) for query in targets]
        limits = [query.limits for query in targets]
        sides = [ExactIndex(doc_ids, held) for held in (self.index.vectors_at(rows), self._encode_for_all(rows))]
        live, fresh = sides
        tops = [ranked_rows(index, vectors, limits, self.k) for index in sides]
        scores = [self.scorer.score(index, rollouts, vectors[own], targets[own]) for index in sides]
        told = [[(score.parts.total(self.weights), score.best_rank) for score in side] for side in scores]
        shares = self.communicator.all_gather(told)
        rewards, best_ranks = (
            [[pair[what] for share in shares for pair in share[side]] for side in (0, 1)] for what in (0, 1)
        )
        return compare_scores(
            rewards=rewards,
            ranks=best_ranks,
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
        if self.sharded or self.communicator.rank == 0:
            self.index.save(folder / "index")
        if self.communicator.rank == 0:
            self.policy.save(folder / "policy")

    def _refresh(
        self, queries: Array, targets: Sequence[QueryRows], policy_version: int
    ) -> tuple[RefreshReport, list[Hits] | None]:
        """Of all processes' queries together; also what these find afterwards, where that is known already."""
        started = time.perf_counter()
        if self.frozen:
            return RefreshReport(0, 0, time.perf_counter() - started, 0.0, 0, 0.0, self._recall), None
        self._encoded_tokens = 0
        done = np.flatnonzero(self.index.encoded_at_version == policy_version)  # by a step that draws again
        positives = [query.positives for query in targets]
        first = self._stale(_by_doc_id(np.concatenate(positives)), policy_version)
        correct = self.refresh.policy == "drift" or self.refresh.correct_drift
        if correct:
            # At most half of what the positives leave of the budget, so that the policy has its share too.
            sample = self._affordable(self._drift_sample(first, policy_version), [done, first], 0.5)
            if len(first) + len(sample) >= MIN_PAIRS:  # fewer would buy no map
                first = np.concatenate([first, sample])
        gain = self._encode_again(first, policy_version, correct=correct)
        limits, hits, depth = [query.limits for query in targets], None, 0
        if self.refresh.policy == "shortlist":  # it moves few documents: one search serves choice and reward
            depth = max(self.scorer.wanted, self.refresh.depth)
            hits = self.scorer.search(self.index, queries, targets, depth + SLACK)
        request = RefreshRequest(self.index, policy_version, queries, positives, limits, self.k, hits)
        # Agreed on before a budget counts their tokens, which all processes do together.
        second = self._affordable(self._agree(self._stale(self.policy.choose(request), policy_version)), [done, first])
        moved = np.sort(second)
        before = None if hits is None else self.index.vectors_at(moved)
        self._encode_again(second, policy_version, correct=False)
        if hits is not None and before is not None and len(moved):
            change = Moved(moved, before, self.index.vectors_at(moved))
            hits = amend(self.index, self.scorer, self.communicator, hits, change, queries, targets, depth)
        staleness = policy_version - self.index.encoded_at_version
        report = RefreshReport(
            documents_encoded=len(first) + len(second),
            tokens_encoded=sum(self.communicator.all_gather(self._encoded_tokens)),
            seconds=time.perf_counter() - started,
            staleness_mean=float(staleness.mean()),
            staleness_max=int(staleness.max()),
            drift_gain=gain,
            index_recall=self._recall,
        )
        return report, hits

    @property
    def _recall(self) -> float:
        held = self.index.shard if isinstance(self.index, ShardedIndex) else self.index
        own = held.last_recall if isinstance(held, Audited) else 1.0
        return float(min(self.communicator.all_gather(own)))

    def _agree(self, choice: T) -> T:
        """The first process's choice, for all: searches and fits of other machines may differ in a near tie."""
        if self.sharded:  # all have seen the same
            return choice
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

    def _affordable(self, rows: Rows, spent: Sequence[Rows], share: float = 1.0) -> Rows:
        """The head of `rows` that fits a share of the budget that the rows in `spent` leave."""
        documents, tokens = self.refresh.max_documents, self.refresh.max_tokens
        if documents is not None:
            rows = rows[: max(0, int(share * (documents - sum(map(len, spent)))))]
        if tokens is not None and len(rows):
            left = share * (tokens - self._count_tokens(np.concatenate(spent)).sum())
            rows = rows[: np.searchsorted(np.cumsum(self._count_tokens(rows)), left, side="right")]
        return rows

    def _encode_again(self, rows: Rows, policy_version: int, *, correct: bool) -> float:
        """Encode these documents and, if asked, correct all others; returns the gain of the correction."""
        gain = 0.0
        if correct and len(rows):  # a sample, whose vectors of before and now are wanted together
            before, after = self.index.vectors_at(rows), self._encode(rows)
            gain = self._correct(fit_drift(before, after, self._agree), policy_version)
            self._take_in(rows, after, policy_version)
        else:
            for start in range(0, len(rows), ROWS_AT_A_TIME):
                block = rows[start : start + ROWS_AT_A_TIME]
                self._take_in(block, self._encode(block), policy_version)
        return gain

    def _take_in(self, rows: Rows, vectors: Array, policy_version: int) -> None:
        self.index.update(rows, vectors, policy_version)
        self.policy.moved(self.index, rows)

    def _correct(self, correction: DriftCorrection, policy_version: int) -> float:
        """Apply a map to every stale vector; returns its gain."""
        if correction.name != "identity":
            assert not isinstance(self.index, ShardedIndex)
            stale = self._stale(np.arange(len(self.index)), policy_version)
            for start in range(0, len(stale), ROWS_AT_A_TIME):
                rows = stale[start : start + ROWS_AT_A_TIME]
                self.index.update(rows, correction.apply(self.index.vectors_at(rows)))
        return correction.gain

    def _encode(self, rows: Rows) -> Array:
        """Vectors of these documents for the index of this process: all of them, or its own."""
        return self._encode_own(rows) if self.sharded else self._encode_for_all(rows)

    def _encode_for_all(self, rows: Rows) -> Array:
        """Vectors of these documents, each process encoding its share."""
        parts = self.communicator.all_gather_rows(self._encode_own(rows))
        vectors = np.empty((len(rows), max(part.shape[1] for part in parts)), np.float32)
        for rank, part in enumerate(parts):
            if len(part):
                vectors[self._encoder_of[rows] == rank] = part
        return vectors

    def _encode_own(self, rows: Rows) -> Array:
        """Vectors of those of these documents that this process encodes."""

        def count(texts: int, tokens: int) -> None:
            self._encoded_tokens += tokens

        own = rows[self._encoder_of[rows] == self.communicator.rank]
        if not len(own):
            return np.empty((0, 0), np.float32)
        return self.encoder.encode_document(self._texts(own), progress=count)

    def _count_tokens(self, rows: Rows) -> NDArray[np.int64]:
        """Tokens of these documents; each process counts those that it encodes, once."""
        new = rows[self._tokens[rows] < 0]
        if len(new):
            own = new[self._encoder_of[new] == self.communicator.rank]
            counts = np.array(self.encoder.count_document_tokens(self._texts(own)) if len(own) else [], np.int64)
            for part in self.communicator.all_gather_rows(np.stack([own, counts], axis=1)):
                self._tokens[part[:, 0]] = part[:, 1]
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
