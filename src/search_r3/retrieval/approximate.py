"""An approximate index: a graph proposes documents, the exact index scores and ranks them, audits watch the graph.

The graph (HNSW, by usearch) loses accuracy when many vectors are replaced in place. Nothing here trusts it: every score
comes from the stored vectors, `audit` measures what the graph misses, and `maintain` builds it anew below a floor.

Shapes: `Q` queries, `N` documents, `D` vector size, `K` results, `C` candidates.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from ..errors import VectorIndexError
from ..extras import extra
from ..types import Array, Rows
from . import storage
from .index import ExactIndex
from .protocol import VectorIndex
from .selection import count_ahead, groups_alike

GraphDType = Literal["f32", "f16", "bf16", "i8"]

SPARE = 16
"""Candidates beyond `K` at least: the graph compares rounded vectors, so the order at its edge is not the true one."""
STRAYED = 0.01
"""A document is put into the graph anew when `1 - cos` between its vector and the graph's is above this."""
ALIKE = 1e-6
"""Scores of unit vectors closer than this are equal to an audit: documents of one text stand in for each other."""


@dataclass(frozen=True)
class GraphSettings:
    """How the graph is built and searched; saved with the index.

    Attributes:
        dtype: precision of the graph's own copy of the vectors; results are scored from the store.
        connectivity: links per document; memory and accuracy grow with it.
        expansion_add: documents looked at for the links of a new one; building time grows with it.
        expansion_search: documents looked at by a search; its time and accuracy grow with it.
        oversample: candidates asked for, as a multiple of `K`; at least 1.
        rank_depth: the depth to which `ranks` counts.
    """

    dtype: GraphDType = "f16"
    connectivity: int = 16
    expansion_add: int = 96
    expansion_search: int = 128
    oversample: float = 2.0
    rank_depth: int = 1000

    def __post_init__(self) -> None:
        if self.dtype not in get_args(GraphDType):
            raise VectorIndexError(
                f"a graph cannot hold {self.dtype!r}; choose one of {', '.join(get_args(GraphDType))}"
            )
        for name in ("connectivity", "expansion_add", "expansion_search", "oversample", "rank_depth"):
            value = getattr(self, name)
            if not value >= 1:
                raise VectorIndexError(f"{name} of an approximate index must be at least 1, found {value}")


class Audited(VectorIndex):
    """What proposes documents for an exact index to score, and watches by audits what it misses.

    Attributes:
        recall_floor: `maintain` builds anew when the recall is below.
        audit_every: `maintain` runs by itself after so many updates; 0: only when asked.
        last_recall: what the last audit found; nan before the first.
        rebuilds: how often it was built anew.
    """

    @property
    def device(self) -> torch.device:
        """Where the store scores."""
        return self.store.device

    def scores_at(self, queries: Array, rows: Sequence[Rows]) -> list[Array]:
        """Of the store."""
        return self.store.scores_at(queries, rows)

    def vectors_at(self, rows: Sequence[int] | Rows) -> Array:
        """Of the store."""
        return self.store.vectors_at(rows)

    @abstractmethod
    def update(self, rows: Rows, vectors: Array, version: int | None = None) -> None:
        """Replace the vectors in these rows, each once, `len(rows) x D`; without a version they stay as old as before.

        Raises:
            VectorIndexError: wrong shape or values that are not finite; nothing is changed.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the index; a process killed at any moment leaves the old state or the new one.

        Raises:
            VectorIndexError: the disk refuses; the old state stays.
        """

    def audit(self, queries: Array | int = 100, k: int = 10, seed: int = 0) -> float:
        """Recall@k against the exact index, from 0 to 1.

        A document counts as found when its score reaches the exact k-th best.

        Args:
            queries: `Q x D`, or how many documents to draw whose vectors serve as queries.
            k: depth.
            seed: of the draw.

        Raises:
            VectorIndexError: no queries.
        """
        if (queries if isinstance(queries, int) else len(queries)) < 1:
            raise VectorIndexError("an audit needs at least one query, found none")
        if isinstance(queries, int):
            sample = np.random.default_rng(seed).choice(len(self), min(queries, len(self)), replace=False)
            queries = self.store.vectors_at(sample)
        _, truth = self.store.search_rows(queries, k)
        _, scores = self.search_rows(queries, k)
        self.last_recall = float((scores >= truth[:, -1:] - ALIKE).mean())
        return self.last_recall

    def maintain(self, queries: Array | int = 100, k: int = 10, seed: int = 0) -> float:
        """Audit, and build anew what proposes if its recall is below the floor.

        Returns:
            The recall before a rebuild; `last_recall` is the one after it.
        """
        recall = self.audit(queries, k, seed)
        if recall < self.recall_floor:
            self.rebuild()
            self.audit(queries, k, seed)
        return recall

    def rebuild(self) -> None:
        """Build anew what proposes, from the stored vectors."""
        self._build()
        self.rebuilds += 1

    def audit_facts(self) -> dict[str, Any]:
        """What the manifest of a saved index says of its audits."""
        recall = None if math.isnan(self.last_recall) else self.last_recall
        return {
            "recall_floor": self.recall_floor,
            "audit_every": self.audit_every,
            "audited": [recall, self.rebuilds, self._updates],
        }

    def _watch(self, store: ExactIndex, recall_floor: float, audit_every: int) -> None:
        if not 0 <= recall_floor <= 1 or audit_every < 0:
            raise VectorIndexError(
                f"recall_floor must lie between 0 and 1, found {recall_floor}; "
                f"audit_every must be 0 or above, found {audit_every}"
            )
        self.store = store
        self.doc_ids, self.rows, self.encoded_at_version = store.doc_ids, store.rows, store.encoded_at_version
        self.recall_floor, self.audit_every = recall_floor, audit_every
        self.last_recall, self.rebuilds, self._updates = math.nan, 0, 0

    def _watch_again(self, store: ExactIndex, manifest: Mapping[str, Any]) -> None:
        """`_watch`, from `audit_facts`; to be called within `readable`."""
        self._watch(store, manifest["recall_floor"], manifest["audit_every"])
        recall, self.rebuilds, self._updates = manifest["audited"]
        self.last_recall = math.nan if recall is None else recall

    def _updated(self) -> None:
        """To be called after each update."""
        self._updates += 1
        if self.audit_every and self._updates % self.audit_every == 0:
            self.maintain()

    @abstractmethod
    def _build(self) -> None:
        """Build what proposes from the stored vectors."""


class ApproximateIndex(Audited):
    """A graph over the vectors of an exact index, behind the same protocol.

    The graph is built with as many threads as torch uses; with more than one, two builds may differ slightly.

    Args:
        store: holds the vectors; from here on it is updated through this index only.
        settings: of the graph.
        recall_floor: `maintain` rebuilds the graph when its recall is below.
        audit_every: `maintain` runs by itself after so many updates; 0: only when asked.

    Raises:
        VectorIndexError: settings out of range.
    """

    def __init__(
        self,
        store: ExactIndex,
        settings: GraphSettings | None = None,
        *,
        recall_floor: float = 0.95,
        audit_every: int = 0,
    ) -> None:
        self._watch(store, recall_floor, audit_every)
        self.settings = settings or GraphSettings()
        self._build()

    def search_rows(self, queries: Array, k: int) -> tuple[Rows, Array]:
        """Rows and exact scores, both `Q x K`, of the best documents among those that the graph proposes.

        Where the graph proposes fewer than `K`, that query is searched exactly.

        Raises:
            VectorIndexError: wrong shape, values that are not finite, or `k` below 1.
        """
        count = max(math.ceil(k * self.settings.oversample), k + SPARE)
        if k < 1 or count >= len(self):
            return self.store.search_rows(queries, k)
        queries = self.store.check_queries(queries)
        candidates = self._propose(queries, count)  # Q x C
        scores = np.array(self.store.scores_at(queries, list(np.maximum(candidates, 0))), np.float32)
        scores = scores.reshape(candidates.shape)
        scores[candidates < 0] = -np.inf
        order = np.lexsort((candidates, -scores), axis=1)[:, :k]
        rows, scores = np.take_along_axis(candidates, order, 1), np.take_along_axis(scores, order, 1)
        gaps = np.flatnonzero(rows[:, -1] < 0)
        if len(gaps):
            rows[gaps], scores[gaps] = self.store.search_rows(queries[gaps], k)
        return rows, scores

    @property
    def counts_to(self) -> int:
        """`rank_depth`."""
        return self.settings.rank_depth

    def count_ahead(
        self, queries: Array, rows: Sequence[Rows], scores: Sequence[Array], left_out: Sequence[Rows]
    ) -> list[list[int]]:
        """How many of the first `rank_depth` that the graph proposes rank ahead of each target, but for `left_out`.

        A document behind all of them counts `rank_depth`: it ranks there or further down. Where the graph proposes
        too few, that query is counted exactly.
        """
        return self._count(queries, rows, scores, left_out)[0]

    def search_and_count(
        self, queries: Array, k: int, rows: Sequence[Rows], scores: Sequence[Array], left_out: Sequence[Rows]
    ) -> tuple[Rows, Array, list[list[int]]]:
        """Both, from one search of the graph; none of those that are left out is among the `k` best."""
        counts, near = self._count(queries, rows, scores, left_out)
        width = min((len(line) for line, _ in near.values()), default=0)
        if len(near) < len(rows) or width < k:
            return *self.search_rows(queries, k), counts
        best = np.empty((len(rows), k), np.int64), np.empty((len(rows), k), np.float32)
        for i, (line, own) in near.items():
            order = np.lexsort((line, -own))[:k]
            best[0][i], best[1][i] = line[order], own[order]
        return *best, counts

    def _count(
        self, queries: Array, rows: Sequence[Rows], scores: Sequence[Array], left_out: Sequence[Rows]
    ) -> tuple[list[list[int]], dict[int, tuple[Rows, Array]]]:
        """The counts, and where the graph gave them, the documents (and their scores) among which was counted."""
        depth, depths = self.settings.rank_depth, [self.settings.rank_depth + len(line) for line in left_out]
        shallow = {i: len(left_out[i]) for i, deep in enumerate(depths) if deep < len(self)}
        if not shallow:
            return self.store.count_ahead(queries, rows, scores, left_out), {}
        queries = self.store.check_queries(queries)
        rivals: dict[int, Rows] = {}
        for group in groups_alike(shallow):
            proposals = self._propose(queries[group], max(depths[i] for i in group))
            for i, candidates in zip(group, proposals, strict=True):
                if candidates[depths[i] - 1] >= 0:
                    # The targets are rivals of each other, whether the graph proposes them or not.
                    held = rows[i][rows[i] < len(self)]
                    rivals[i] = np.setdiff1d(np.union1d(candidates[: depths[i]], held), left_out[i])
        result: dict[int, list[int]] = {}
        found = self.store.scores_at(queries[list(rivals)], list(rivals.values()))
        near = {i: (line, own) for (i, line), own in zip(rivals.items(), found, strict=True)}
        for i, (line, own) in near.items():
            result[i] = [min(count, depth) for count in count_ahead(rows[i], scores[i], line, own)]
        rest = [i for i in range(len(rows)) if i not in rivals]
        exact = self.store.count_ahead(
            queries[rest], [rows[i] for i in rest], [scores[i] for i in rest], [left_out[i] for i in rest]
        )
        result |= dict(zip(rest, exact, strict=True))
        return [result[i] for i in range(len(rows))], near

    def update(self, rows: Rows, vectors: Array, version: int | None = None) -> None:
        """As `Audited.update`.

        The graph takes up anew what has moved by more than `STRAYED` from where it has it: it only proposes. Where more
        than half of all documents change, it is built anew, which is faster and better.
        """
        self.store.update(rows, vectors, version)
        if self._mapped is not None:
            self._read_graph(self._mapped, mmap=False)
        if 2 * len(rows) > len(self):
            self.rebuild()
        elif len(rows):
            rows = self._strayed(np.sort(rows))
            if len(rows):
                self._graph.remove(rows.astype(np.uint64), threads=torch.get_num_threads())
                self._add(rows)
        self._updated()

    def save(self, folder: Path) -> None:
        """As `Audited.save`: store, graph and settings."""
        writers, facts = self.store.writers(), self.store.facts()
        storage.save_state(folder, {**writers, **self.graph_writers()}, {**facts, **self.graph_facts()})

    def graph_writers(self) -> dict[str, storage.FileWriter]:
        """What writes the file of the graph."""
        return {"hnsw.graph": self._write_graph}

    def graph_facts(self) -> dict[str, Any]:
        """What the manifest says of it beside what it says of an exact index."""
        return {"index_type": "hnsw", "graph": asdict(self.settings), **self.audit_facts()}

    @classmethod
    def load(cls, folder: Path, *, mmap: bool = False, device: str | torch.device = "cpu") -> ApproximateIndex:
        """Read what `save` wrote, settings included.

        Args:
            folder: where it was saved.
            mmap: leave vectors and graph on the disk; the graph is read whole when it is updated.
            device: where the vectors of the store go.

        Raises:
            VectorIndexError: files are missing, damaged or do not fit together, or it is an exact index.
        """
        with storage.readable(Path(folder)):
            manifest, paths = storage.read_manifest(Path(folder))
            store = ExactIndex.from_state(manifest, paths, mmap=mmap)
            index = cls.__new__(cls)
            index.settings = GraphSettings(**manifest["graph"])
            index._watch_again(store, manifest)
            index._read_graph(paths["hnsw.graph"], mmap)
        store.to(device)
        return index

    def _empty_graph(self) -> Any:
        with extra("train"):
            from usearch.index import Index

        return Index(
            ndim=self.store.dimension,
            metric="ip",
            dtype=self.settings.dtype,
            connectivity=self.settings.connectivity,
            expansion_add=self.settings.expansion_add,
            expansion_search=self.settings.expansion_search,
        )

    def _build(self) -> None:
        self._graph: Any = self._empty_graph()
        self._mapped: Path | None = None
        for start in range(0, len(self), self.store.block):
            self._add(np.arange(start, min(start + self.store.block, len(self))))

    def _strayed(self, rows: Rows) -> Rows:
        """Those of these rows whose vectors are no longer where the graph has them."""
        there = np.stack(self._graph.get(rows.astype(np.uint64), "f32"))
        here = self.vectors_at(rows)
        lengths = np.linalg.norm(there, axis=1) * np.linalg.norm(here, axis=1)
        strayed: Rows = rows[(there * here).sum(axis=1) < (1 - STRAYED) * lengths]
        return strayed

    def _add(self, rows: Rows) -> None:
        self._graph.add(rows.astype(np.uint64), self.store.vectors_at(rows), threads=torch.get_num_threads())

    def _propose(self, queries: Array, count: int) -> Rows:
        """Candidates of each query, `Q x C`, -1 where there are fewer."""
        candidates = np.full((len(queries), count), -1, dtype=np.int64)
        if len(queries):
            matches = self._graph.search(queries, count, threads=torch.get_num_threads())
            keys = np.atleast_2d(matches.keys)
            # A single query gets a list without padding, and no counts.
            counts = matches.counts if len(queries) > 1 else np.array([keys.shape[1]])
            valid = np.arange(keys.shape[1]) < counts[:, None]
            candidates[:, : keys.shape[1]][valid] = keys[valid]
        return candidates

    def _write_graph(self, path: Path) -> None:
        try:
            self._graph.save(str(path))
        except RuntimeError as error:  # usearch's way to report what the disk refuses
            raise OSError(str(error)) from error

    def _read_graph(self, path: Path, mmap: bool) -> None:
        # Into a graph made with the saved settings: the file itself does not hold the expansions.
        self._graph, self._mapped = self._empty_graph(), path if mmap else None
        (self._graph.view if mmap else self._graph.load)(str(path))
        if len(self._graph) != len(self.store) or self._graph.ndim != self.store.dimension:
            raise ValueError(f"{path.name} holds {len(self._graph)} vectors of size {self._graph.ndim}")
