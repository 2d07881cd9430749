"""The one ranking rule: reward, dev evaluation, hard negatives and benchmarks rank by it.

1. What the collection excludes for a query never stands in its ranking (BRIGHT), nor does the document that bears the
   query's id unless it is judged relevant (ArguAna); an evaluation may choose another rule for these.
2. Where the query has a pool, its documents alone are ranked (babi).
3. Higher scores first, equal ones by doc_id, the larger string first. Equal vectors have equal scores.

`data.restrictions` makes 1 and 2 of a collection, for all rooms. With vectors there are two ways on. Rankings, as an
evaluation needs them:

    requests = make_requests(collection, qrels)           # in the order of qrels
    rankings = ranked(index, vectors, requests, depth=10)
    ndcg([doc_id for doc_id, _ in rankings[0]], qrels[requests[0].query_id], 10)

And ranks of chosen documents, which cost no sort, as a reward needs them; inside, documents are rows of the index:

    limits = [restricted_rows(index, request) for request in requests]
    ranks(index, vectors, rows, limits)

Without vectors (BM25) `without` takes what is left out of a ranking; `search_scored` takes pools.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..data.collection import Collection
from ..data.restrictions import IdenticalIds, Restrictions, restrictions
from ..data.rows import bare_text
from ..types import Array, Rows
from .lexical import Scored
from .protocol import VectorIndex
from .selection import NOISE, count_ahead, groups_alike

MARGIN = 32
"""Documents beyond the depth that are scored once more, since a matrix product may order equal ones wrongly. Where the
margin is all noise, every document is scored once more."""


@dataclass(frozen=True)
class RankRequest(Restrictions):
    """One query as a system sees it (`data.collection.Query`), with what must not stand in its ranking."""

    query_id: str
    text: str
    instruction: str = ""

    @property
    def bare(self) -> str:
        """The text without its instruction."""
        return bare_text(self.text, self.instruction)


def make_requests(
    collection: Collection,
    qrels: Mapping[str, Mapping[str, int]],
    identical_ids: IdenticalIds = "unless-relevant",
) -> list[RankRequest]:
    """The queries of these judgements, in their order."""
    requests = []
    for query_id, relevance in qrels.items():
        limits = restrictions(collection, query_id, relevance, identical_ids)
        query = collection.queries[query_id]
        requests.append(
            RankRequest(query_id, query.text, query.instruction, left_out=limits.left_out, pool=limits.pool)
        )
    return requests


def ranked(index: VectorIndex, vectors: Array, requests: Sequence[Restrictions], depth: int) -> list[Scored]:
    """The documents of each request, best first, at most `depth`, under its restrictions."""
    limits = [restricted_rows(index, request) for request in requests]
    return [
        [(index.doc_ids[row], score) for row, score in zip(rows, scores.tolist(), strict=True)]
        for rows, scores in ranked_rows(index, vectors, limits, depth)
    ]


def ranked_rows(
    index: VectorIndex, vectors: Array, limits: Sequence[RestrictedRows], depth: int
) -> list[tuple[Rows, Array]]:
    """The rows of each query `Q x D`, best first, at most `depth`, under its restrictions, and their scores."""
    none: list[Rows] = [np.empty(0, np.int64)] * len(limits)
    return [(hits.rows, hits.row_scores) for hits in find(index, vectors, none, limits, depth)]


@dataclass(frozen=True)
class RestrictedRows:
    """`Restrictions` as rows of an index, ascending; a pool holds nothing that is left out."""

    left_out: Rows
    pool: Rows | None

    def allow(self, rows: Rows) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Which of these rows can be ranked."""
        return ~holds(self.left_out, rows) if self.pool is None else holds(self.pool, rows)

    def within(self, rows: Rows) -> RestrictedRows:
        """The same in an index of these rows alone, which ascend."""
        left_out, pool = holds(self.left_out, rows), None if self.pool is None else holds(self.pool, rows)
        return RestrictedRows(np.flatnonzero(left_out), None if pool is None else np.flatnonzero(pool))


def holds(ascending: Rows, rows: Rows) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which of some rows are among others, which ascend: `np.isin` for a handful, at a fraction of its price."""
    if not len(ascending):
        return np.zeros(len(rows), np.bool_)
    found: np.ndarray[tuple[int], np.dtype[np.bool_]] = (
        ascending[np.minimum(np.searchsorted(ascending, rows), len(ascending) - 1)] == rows
    )
    return found


def restricted_rows(index: VectorIndex, limits: Restrictions) -> RestrictedRows:
    """The rows of the documents that the restrictions name, those that the index holds."""
    if limits.pool is None:
        return RestrictedRows(_rows(index, limits.left_out), None)
    return RestrictedRows(_rows(index, frozenset()), _rows(index, limits.pool - limits.left_out))


def _rows(index: VectorIndex, doc_ids: frozenset[str]) -> Rows:
    return np.array(sorted(index.rows[doc_id] for doc_id in doc_ids if doc_id in index.rows), dtype=np.int64)


@dataclass(frozen=True)
class Hits:
    """Where one query finds documents that it is asked about, and what it finds first.

    Attributes:
        ranks: of the documents asked for (from 1), among those that can be ranked; of one that cannot, the rank behind
            all documents of the index.
        scores: of these.
        rows: the best of the ranking.
        row_scores: of these.
    """

    ranks: list[int]
    scores: Array
    rows: Rows
    row_scores: Array


def ranks(
    index: VectorIndex, vectors: Array, rows: Sequence[Sequence[int] | Rows], limits: Sequence[RestrictedRows]
) -> list[list[int]]:
    """The rank (from 1) of chosen documents of each query, as `Hits.ranks`.

    Args:
        index: what is ranked.
        vectors: of the queries, `Q x D`.
        rows: of the documents asked for, `Q` lists.
        limits: of each query.
    """
    return [hits.ranks for hits in find(index, vectors, rows, limits, 0)]


def find(
    index: VectorIndex,
    vectors: Array,
    rows: Sequence[Sequence[int] | Rows],
    limits: Sequence[RestrictedRows],
    depth: int,
) -> list[Hits]:
    """Ranks of chosen documents and the `depth` first of each ranking, in one search.

    Args:
        index: what is ranked.
        vectors: of the queries, `Q x D`.
        rows: of the documents asked for, `Q` lists.
        limits: of each query.
        depth: may be 0.
    """
    asked = [np.array(line, dtype=np.int64) for line in rows]
    scores = index.scores_at(vectors, asked)
    allowed = [limit.allow(line) for line, limit in zip(asked, limits, strict=True)]
    targets = [line[ok] for line, ok in zip(asked, allowed, strict=True)]
    bars = [line[ok] for line, ok in zip(scores, allowed, strict=True)]
    candidates, ahead = search_allowed(index, vectors, targets, bars, limits, depth)
    result = []
    for place, (near, near_scores) in enumerate(zip(candidates, index.scores_at(vectors, candidates), strict=True)):
        pool = limits[place].pool
        counts = ahead[place] if pool is None else count_ahead(targets[place], bars[place], pool, near_scores)
        own = np.full(len(asked[place]), len(index) + 1)
        own[allowed[place]] = np.array(counts, np.int64) + 1
        # Rows stand in descending order of doc_id, so the lower row comes first among equals.
        order = np.lexsort((near, -near_scores))[:depth]
        result.append(Hits(own.tolist(), scores[place], near[order], near_scores[order]))
    return result


def search_allowed(
    index: VectorIndex,
    vectors: Array,
    targets: Sequence[Rows],
    bars: Sequence[Array],
    limits: Sequence[RestrictedRows],
    depth: int,
) -> tuple[list[Rows], list[list[int]]]:
    """Rows among which the first `depth` of each ranking are (pools whole), and where there is no pool, the counts.

    Args:
        index: what is ranked.
        vectors: of the queries, `Q x D`.
        targets: the rows of documents that can be ranked, as `VectorIndex.count_ahead` takes them.
        bars: their scores.
        limits: of each query.
        depth: may be 0.
    """
    candidates = [np.empty(0, np.int64) if limit.pool is None else limit.pool for limit in limits]
    ahead: list[list[int]] = [[] for _ in limits]
    for group in groups_alike({i: len(limit.left_out) for i, limit in enumerate(limits) if limit.pool is None}):
        left_out = [limits[i].left_out for i in group]
        asked, asked_scores = [targets[i] for i in group], [bars[i] for i in group]
        if not depth:
            for i, counts in zip(group, index.count_ahead(vectors[group], asked, asked_scores, left_out), strict=True):
                ahead[i] = counts
            continue
        deepest = depth + MARGIN + max(map(len, left_out))
        nearest, products, group_counts = index.search_and_count(vectors[group], deepest, asked, asked_scores, left_out)
        for i, rows, scores, counts in zip(group, nearest, products, group_counts, strict=True):
            last = min(depth + len(limits[i].left_out), len(rows)) - 1
            tied = len(rows) < len(index) and scores[last] - scores[-1] < NOISE
            rows = np.arange(len(index)) if tied else rows
            candidates[i] = rows[limits[i].allow(rows)]
            ahead[i] = counts
    return candidates, ahead


def without(scored: Scored, request: Restrictions, depth: int) -> Scored:
    """The first `depth` of a ranking but for what is left out of it."""
    return [(doc_id, score) for doc_id, score in scored if doc_id not in request.left_out][:depth]
