"""Nearest vectors of a table: exactly in memory while they are few, through an index of measured recall from then on.

Shapes: `Q` queries, `N` rows, `D` vector size.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np

from ..types import Array

logger = logging.getLogger(__name__)

IN_MEMORY = 20_000
"""Rows from which on there is an index."""
FLAT_BYTES = 2**30
"""Vectors that take more are held in the index as bytes, and the best are compared exactly."""
REFINE = 5
"""So many times the hits wanted are compared exactly then."""
RECALL = 0.99
"""Of the 10 nearest, on average: as many partitions are searched as this takes."""
SAMPLE, DEPTH = 100, 10
_NAME = "vector_idx"

Ranking = list[tuple[str, str, float]]
"""Ids of chunks and documents with scores, best first; equal scores by id, the larger first, as everywhere."""


class VectorSearch:
    """Searches the vectors of a table, which are normalised, by cosine."""

    def __init__(self, table: Any, dimension: int) -> None:
        self._table, self._dimension = table, dimension
        self._mutex = threading.Lock()
        self._held: tuple[int, dict[str, str], Any] | None = None

    def nearest(self, queries: Array, depth: int, condition: str | None) -> list[Ranking]:
        """The nearest rows of each query."""
        count = self._table.count_rows()
        if not count:
            return [[] for _ in queries]
        if condition is None and count < IN_MEMORY:
            parents, index = self._hold()
            result = index.search(queries, depth)
            return [
                [(name, parents[name], score) for name, score in zip(names, scores.tolist(), strict=True)]
                for names, scores in zip(result.doc_ids, result.scores, strict=True)
            ]
        return [self._query(query, depth, condition, self.facts()) for query in queries]

    def facts(self) -> dict[str, str]:
        """Of the index: its kind, the rows when it was built, nprobes and recall; empty without one."""
        metadata = self._table.schema.field("vector").metadata or {}
        facts = {key.decode(): value.decode() for key, value in metadata.items()}
        return facts if facts.get("kind") else {}

    def keep_index(self) -> None:
        """Build the index where it is time to: none yet, or twice the rows; measure it; the caller holds the lock."""
        from lancedb.index import IvfFlat, IvfSq

        count, facts = self._table.count_rows(), self.facts()
        kind = "IvfSq" if count * self._dimension * 4 > FLAT_BYTES else "IvfFlat"
        if count < IN_MEMORY or (facts and facts["kind"] == kind and count < 2 * int(facts["rows"])):
            return
        config = {"IvfSq": IvfSq, "IvfFlat": IvfFlat}[kind](distance_type="dot")
        self._table.create_index("vector", config=config, name=_NAME, replace=True)
        queries, truth = self._sample(count)
        partitions = round(count**0.5)
        probes, recall = 0, 0.0
        while recall < RECALL and probes < partitions:
            probes = min(2 * probes or 16, partitions)
            new = {"kind": kind, "rows": str(count), "nprobes": str(probes)}
            hits = [{name for name, _, _ in self._query(query, DEPTH + 1, None, new)} for query in queries]
            # Each has itself, which every index finds.
            shares = [(len(one & best) - 1) / (len(best) - 1) for one, best in zip(hits, truth, strict=True)]
            recall = float(np.mean(shares))
        new["recall"] = f"{recall:.3f}"
        self._table.update_field_metadata({"path": "vector", "metadata": new})
        logger.info(
            "index of %d vectors: %s, %d of %d partitions, recall %.3f", count, kind, probes, partitions, recall
        )

    def _query(self, query: Array, depth: int, condition: str | None, facts: dict[str, str]) -> Ranking:
        search = self._table.search(query, vector_column_name="vector", query_type="vector").distance_type("dot")
        search = search.limit(depth).select(["id", "parent_id", "_distance"])
        if condition:
            search = search.where(condition, prefilter=True)
        if facts:
            search = search.nprobes(int(facts["nprobes"]))
            search = search.refine_factor(REFINE) if facts["kind"] == "IvfSq" else search
        found = search.to_arrow().to_pydict()
        scores = [1.0 - distance for distance in found["_distance"]]
        ranking = list(zip(found["id"], found["parent_id"], scores, strict=True))
        return sorted(ranking, key=lambda one: (one[2], one[0]), reverse=True)

    def _hold(self) -> tuple[dict[str, str], Any]:
        """The documents of all chunks and an exact index of the vectors, read again after every write."""
        from ..retrieval.index import ExactIndex

        with self._mutex:
            version = self._table.version
            if self._held is None or self._held[0] != version:
                found = self._table.search().select(["id", "parent_id", "vector"]).to_arrow()
                names = found["id"].to_pylist()
                parents = dict(zip(names, found["parent_id"].to_pylist(), strict=True))
                self._held = version, parents, ExactIndex(names, self._matrix(found["vector"]))
            return self._held[1:]

    def _matrix(self, column: Any) -> Array:
        values: Array = column.combine_chunks().flatten().to_numpy().reshape(-1, self._dimension)
        return values

    def _sample(self, count: int) -> tuple[Array, list[set[str]]]:
        """Vectors of random rows, each with the ids of its nearest rows: exactly, in one pass over all."""
        chosen = sorted(np.random.default_rng(0).choice(count, min(SAMPLE, count), replace=False).tolist())
        queries = self._matrix(self._table.take_offsets(chosen).select(["vector"]).to_arrow()["vector"])
        best: list[list[tuple[float, str]]] = [[] for _ in queries]
        for batch in self._table.search().select(["id", "vector"]).to_batches(batch_size=8192):
            names = batch["id"]
            scores = queries @ batch["vector"].flatten().to_numpy().reshape(-1, self._dimension).T
            top = np.argpartition(-scores, min(DEPTH, scores.shape[1] - 1), axis=1)[:, : DEPTH + 1]
            for one, line, places in zip(best, scores, top, strict=True):
                one += [(float(line[place]), names[int(place)].as_py()) for place in places]
                one[:] = sorted(one, reverse=True)[: DEPTH + 1]
        return queries, [{name for _, name in one} for one in best]
