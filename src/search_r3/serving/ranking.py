"""Rankings of rows: by vectors, exactly in memory while they are few and then by an index; by words (BM25); by both.

Shapes: `Q` queries, `N` rows, `D` vector size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..extras import extra
from ..types import Array
from . import held
from .held import Held, Ranking, matrix_of
from .rows import CHUNK

logger = logging.getLogger(__name__)

FLAT_BYTES = 2**30
"""Vectors that take more are held in the index as bytes, and the best are compared exactly."""
REFINE = 5
"""So many times the hits wanted are compared exactly then."""
RECALL = 0.99
"""Of the 10 nearest, on average: as many partitions are searched as this takes."""
SAMPLE, DEPTH = 100, 10
FUSION = 60
"""Of reciprocal ranks: a list adds 1 / (60 + rank)."""
WORDS = "full_text_idx"
_VECTORS = "vector_idx"
_NAMES = "id", "parent_id"

Read = dict[str, dict[str, Any]]
"""Rows by the ids of their chunks."""


class Ranker:
    """Ranks the rows of a table whose vectors are normalised."""

    def __init__(self, table: Any, dimension: int) -> None:
        self._table, self._dimension = table, dimension
        self._has_words = False

    def nearest(self, memory: Held, queries: Array, depth: int, condition: str | None, read: Read) -> list[Ranking]:
        """The nearest rows of each query by cosine; `read` takes those that were read on the way, by id."""
        if condition is None and not memory.many:
            return memory.nearest(queries, depth)
        if not self._table.count_rows():
            return [[] for _ in queries]
        facts = self.index()
        return [self._query(query, depth, condition, facts, _columns(memory), read) for query in queries]

    def with_words(self, memory: Held, text: str, depth: int, condition: str | None, read: Read) -> Ranking:
        """The best rows by BM25; a query is taken literally, and one without words finds nothing."""
        if not text.strip() or not self.has_words:
            return []
        search = self._table.search(text, query_type="fts", fts_columns="full_text").limit(depth)
        search = search.where(condition, prefilter=True) if condition else search
        return _ranking(search.select([*_columns(memory), "_score"]).to_arrow().to_pylist(), read)

    @property
    def has_words(self) -> bool:
        """Whether there is an index of words; once there is, each write sees to it that there is."""
        self._has_words = self._has_words or WORDS in self.indices()
        return self._has_words

    def indices(self) -> set[str]:
        """Names of the indexes."""
        return {index.name for index in self._table.list_indices()}

    def index(self) -> dict[str, str]:
        """Of the index of vectors: its kind, the rows when it was built, nprobes and recall; empty without one."""
        metadata = self._table.schema.field("vector").metadata or {}
        facts = {key.decode(): value.decode() for key, value in metadata.items()}
        return facts if facts.get("kind") else {}

    def keep_indices(self) -> None:
        """Build what is missing: of words always, of vectors from `IN_MEMORY` rows on, and anew for twice as many."""
        with extra("serve"):
            from lancedb.index import FTS

        if WORDS not in self.indices():
            self._table.create_index("full_text", config=FTS(base_tokenizer="icu"), name=WORDS)
        count, facts = self._table.count_rows(), self.index()
        kind = "IvfSq" if count * self._dimension * 4 > FLAT_BYTES else "IvfFlat"
        if count >= held.IN_MEMORY and not (facts and facts["kind"] == kind and count < 2 * int(facts["rows"])):
            self._build(kind, count)

    def _build(self, kind: str, count: int) -> None:
        """Build the index, and find out how many of its partitions must be searched; the caller holds the lock."""
        with extra("serve"):
            from lancedb.index import IvfFlat, IvfSq

        config = {"IvfSq": IvfSq, "IvfFlat": IvfFlat}[kind](distance_type="dot")
        self._table.create_index("vector", config=config, name=_VECTORS, replace=True)
        queries, truth = self._sample(count)
        partitions = round(count**0.5)
        facts, probes, recall = dict[str, str](), 0, 0.0
        while recall < RECALL and probes < partitions:
            probes = min(2 * probes or 16, partitions)
            facts = {"kind": kind, "rows": str(count), "nprobes": str(probes)}
            hits = [{name for name, *_ in self._query(query, DEPTH + 1, None, facts, _NAMES, {})} for query in queries]
            # Each has itself, which every index finds.
            shares = [(len(one & best) - 1) / (len(best) - 1) for one, best in zip(hits, truth, strict=True)]
            recall = float(np.mean(shares))
        self._table.update_field_metadata({"path": "vector", "metadata": facts | {"recall": f"{recall:.3f}"}})
        logger.info("index of %d vectors: %s, nprobes %d, recall %.3f", count, kind, probes, recall)

    def _query(
        self,
        query: Array,
        depth: int,
        condition: str | None,
        facts: dict[str, str],
        columns: Sequence[str],
        read: Read,
    ) -> Ranking:
        search = self._table.search(query, vector_column_name="vector", query_type="vector").distance_type("dot")
        search = search.limit(depth).select([*columns, "_distance"])
        if condition:
            search = search.where(condition, prefilter=True)
        if facts:
            # All partitions (0) where these hold too few: of those that a filter lets through they may hold none.
            search = search.minimum_nprobes(int(facts["nprobes"])).maximum_nprobes(0)
            search = search.refine_factor(REFINE) if facts["kind"] == "IvfSq" else search
        return _ranking(search.to_arrow().to_pylist(), read)

    def _sample(self, count: int) -> tuple[Array, list[set[str]]]:
        """Vectors of random rows, each with the ids of its nearest rows: exactly, in one pass over all."""
        chosen = sorted(np.random.default_rng(0).choice(count, min(SAMPLE, count), replace=False).tolist())
        sampled = self._table.take_offsets(chosen).select(["vector"]).to_arrow()["vector"]
        queries = matrix_of(sampled)
        best: list[list[tuple[float, str]]] = [[] for _ in queries]
        for batch in self._table.search().select(["id", "vector"]).to_batches(batch_size=8192):
            scores = queries @ matrix_of(batch["vector"]).T
            top = np.argpartition(-scores, min(DEPTH, scores.shape[1] - 1), axis=1)[:, : DEPTH + 1]
            for one, line, places in zip(best, scores, top, strict=True):
                one += [(float(line[place]), batch["id"][int(place)].as_py()) for place in places]
                one[:] = sorted(one, reverse=True)[: DEPTH + 1]
        return queries, [{name for _, name in one} for one in best]


def fuse(rankings: Sequence[Ranking]) -> Ranking:
    """One ranking by the sum of reciprocal ranks."""
    if len(rankings) == 1:
        return rankings[0]
    scores: dict[tuple[str, str], float] = {}
    for ranking in rankings:
        for rank, (name, parent, _) in enumerate(ranking, 1):
            scores[name, parent] = scores.get((name, parent), 0.0) + 1 / (FUSION + rank)
    return _best_first([(*names, score) for names, score in scores.items()])


def first_of_each(ranking: Ranking, by_document: bool) -> list[tuple[str, float]]:
    """Ids of chunks with scores, of each document only its best."""
    best: dict[str, tuple[str, float]] = {}
    for name, parent, score in ranking:
        best.setdefault(parent if by_document else name, (name, score))
    return list(best.values())


def _columns(memory: Held) -> Sequence[str]:
    """What is read of the rows that are found."""
    return _NAMES if memory.whole else CHUNK


def _ranking(found: Sequence[dict[str, Any]], read: Read) -> Ranking:
    read.update((row["id"], row) for row in found if "text" in row)
    scores = [row["_score"] if "_score" in row else 1.0 - row["_distance"] for row in found]
    return _best_first([(row["id"], row["parent_id"], score) for row, score in zip(found, scores, strict=True)])


def _best_first(ranking: Ranking) -> Ranking:
    return sorted(ranking, key=lambda one: (one[2], one[0]), reverse=True)
