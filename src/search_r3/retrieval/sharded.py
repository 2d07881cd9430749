"""An index whose rows lie with several processes: each holds some, on its device, and all search together.

Every process calls every method, in the same order and with the same arguments (`together` makes the queries of all of
one process's), and gets the whole answer. What a process does alone is the work on its own rows; what travels are the
best rows and scores of each query, and numbers of documents that rank ahead. Results are those of one exact index:
scores are summed pair by pair, the same wherever a row lies.

Shapes: `Q` queries, `N` documents, `D` vector size, `K` results.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import DataError, VectorIndexError
from ..parallel import Communicator, divide, gather_queries
from ..types import Array, Rows
from .approximate import Audited
from .index import DType, ExactIndex
from .protocol import VectorIndex
from .storage import read_manifest, readable

T = TypeVar("T")
ROWS_AT_A_TIME = 65_536
"""Vectors encoded, copied or sent together, so that a large corpus is never held twice."""


class ShardedIndex(VectorIndex):
    """The documents of all processes, of which this one holds some.

    Args:
        doc_ids: of all rows, in descending order.
        own: the rows that this process holds, ascending; every row is one process's.
        shard: these rows, in an index of their own.
        communicator: the processes.

    Attributes:
        shard: this process's rows.
    """

    def __init__(
        self, doc_ids: Sequence[str], own: Rows, shard: ExactIndex | Audited, communicator: Communicator
    ) -> None:
        self.doc_ids, self.shard, self._own, self._communicator = doc_ids, shard, own, communicator
        self.rows = {doc_id: row for row, doc_id in enumerate(doc_ids)}
        self._owner = np.full(len(doc_ids), -1)  # N, the rank that holds each row
        self._place = np.full(len(doc_ids), -1)  # N, where it stands in this process's shard; -1: not here
        self._place[own] = np.arange(len(own))
        self.encoded_at_version = np.zeros(len(doc_ids), np.int64)
        for rank, part in enumerate(communicator.all_gather_rows(np.stack([own, shard.encoded_at_version], axis=1))):
            self._owner[part[:, 0]] = rank
            self.encoded_at_version[part[:, 0]] = part[:, 1]
        assert (self._owner >= 0).all(), "every row lies somewhere"

    @property
    def counts_to(self) -> int:
        """As those of the shards."""
        return self.shard.counts_to

    @property
    def device(self) -> torch.device:
        """That of this process's shard."""
        return self.shard.device

    @property
    def exact(self) -> ShardedIndex:
        """The same vectors, searched exactly."""
        if isinstance(self.shard, ExactIndex):
            return self
        index = copy.copy(self)
        index.shard = self.shard.store
        return index

    def held(self, rows: Rows) -> Rows:
        """Those of some rows that this process holds, in their order."""
        own: Rows = rows[self._place[rows] >= 0]
        return own

    def together(self, queries: Array, labels: Sequence[T]) -> tuple[Array, list[T], slice]:
        """The queries of all processes."""
        return gather_queries(self._communicator, queries, labels)

    def search_rows(self, queries: Array, k: int) -> tuple[Rows, Array]:
        """Rows and scores, both `Q x K`, of the `k` best documents of each query, from the best of every shard."""
        return self._best_of_all(*self.shard.search_rows(queries, k), min(k, len(self)))

    def count_ahead(
        self, queries: Array, rows: Sequence[Rows], scores: Sequence[Array], left_out: Sequence[Rows]
    ) -> list[list[int]]:
        """How many documents of all shards rank ahead of each target, but for those that are left out."""
        places, limits = self._places(rows, left_out)
        return self._sum(self.shard.count_ahead(queries, places, scores, limits), rows)

    def search_and_count(
        self, queries: Array, k: int, rows: Sequence[Rows], scores: Sequence[Array], left_out: Sequence[Rows]
    ) -> tuple[Rows, Array, list[list[int]]]:
        """Both, from one pass over each shard."""
        places, limits = self._places(rows, left_out)
        best, best_scores, counts = self.shard.search_and_count(queries, k, places, scores, limits)
        return *self._best_of_all(best, best_scores, min(k, len(self))), self._sum(counts, rows)

    def _places(self, rows: Sequence[Rows], left_out: Sequence[Rows]) -> tuple[list[Rows], list[Rows]]:
        """Where targets stand, or would stand, in this process's shard, and what it leaves out."""
        return [np.searchsorted(self._own, line) for line in rows], [self._place[self.held(line)] for line in left_out]

    def _best_of_all(self, places: Rows, found: Array, k: int) -> tuple[Rows, Array]:
        rows = np.full((len(places), k), -1, np.int64)
        scores = np.full((len(places), k), -np.inf, np.float32)
        rows[:, : places.shape[1]], scores[:, : places.shape[1]] = self._own[places], found
        rows = np.concatenate(self._communicator.all_gather_rows(rows), axis=1)
        scores = np.concatenate(self._communicator.all_gather_rows(scores), axis=1)
        order = np.lexsort((rows, -scores), axis=1)[:, :k]
        return np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)

    def _sum(self, own: Sequence[Sequence[int]], rows: Sequence[Rows]) -> list[list[int]]:
        flat = np.array([count for counts in own for count in counts], dtype=np.int64)
        total = sum(part[:, 0] for part in self._communicator.all_gather_rows(flat[:, None]))
        return [line.tolist() for line in _split(np.minimum(total, self.counts_to), rows)]

    def scores_at(self, queries: Array, rows: Sequence[Rows]) -> list[Array]:
        """The scores of chosen rows for each query, each from where the row lies."""
        own = self.shard.scores_at(queries, [self._place[self.held(line)] for line in rows])
        flat = np.concatenate([np.empty(0, np.float32), *own])
        return _split(self._put_together(flat[:, None], np.concatenate([np.empty(0, np.int64), *rows]))[:, 0], rows)

    def vectors_at(self, rows: Sequence[int] | Rows) -> Array:
        """The vectors held in these rows, `len(rows) x D`, as float32, from all processes."""
        rows = np.asarray(rows, dtype=np.int64)
        return self._put_together(self.shard.vectors_at(self._place[self.held(rows)]), rows)

    def vectors_for(self, rows: Rows) -> Array:
        """The vectors in rows that each process chooses for itself, `len(rows) x D`; a call of all processes."""
        wanted = np.unique(np.concatenate(self._communicator.all_gather_rows(rows[:, None])))
        result: Array | None = None
        for start in range(0, len(wanted), ROWS_AT_A_TIME):
            block = wanted[start : start + ROWS_AT_A_TIME]
            vectors, inside = self.vectors_at(block), np.isin(rows, block)
            result = np.empty((len(rows), vectors.shape[1]), np.float32) if result is None else result
            result[inside] = vectors[np.searchsorted(block, rows[inside])]
        return np.empty((0, 0), np.float32) if result is None else result

    def update(self, rows: Rows, vectors: Array, version: int) -> None:
        """Replace vectors, each row once.

        Args:
            rows: the same in all processes.
            vectors: of `held(rows)`.
            version: that encoded them.

        Raises:
            VectorIndexError: wrong shape or values that are not finite; nothing is changed here.
        """
        own = self.held(rows)
        if len(own):
            self.shard.update(self._place[own], vectors, version)
        self.encoded_at_version[rows] = version

    def save(self, folder: Path) -> None:
        """Write this process's rows; all of them are saved when every process has done so.

        Raises:
            VectorIndexError: the disk refuses.
        """
        self.shard.save(folder / shard_name(self._communicator))

    def _put_together(self, own: Array, rows: Rows) -> Array:
        """Values of these rows, one line each, from the lines of the processes that hold them."""
        owners, parts = self._owner[rows], self._communicator.all_gather_rows(own)
        result = np.empty((len(rows), max(part.shape[1] for part in parts)), np.float32)
        for rank, part in enumerate(parts):
            result[owners == rank] = part
        return result


def divide_rows(lengths: Sequence[int], world_size: int) -> list[Rows]:
    """The rows that each process encodes and holds, ascending, so that the sums of their lengths are nearly equal."""
    return [np.array(sorted(share), dtype=np.int64) for share in divide(lengths, world_size)]


def encode_rows(
    doc_ids: Sequence[str],
    encode: Callable[[Rows], Array],
    *,
    rows: Rows,
    dtype: DType = "float32",
    device: str | torch.device = "cpu",
) -> ExactIndex:
    """An index of some rows of a corpus, encoded block by block.

    Args:
        doc_ids: of the whole corpus, in descending order.
        encode: vectors of some rows, `n x D`.
        rows: which ones, ascending; at least one.
        dtype: how they are stored.
        device: where they are stored.
    """
    index: ExactIndex | None = None
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        block = rows[start : start + ROWS_AT_A_TIME]
        vectors = encode(block)
        if index is None:
            names = [doc_ids[row] for row in rows]
            index = ExactIndex.reserve(names, vectors.shape[1], dtype=dtype, device=device)
        index.update(np.arange(start, start + len(block)), vectors)
    if index is None:
        raise VectorIndexError("an index needs at least one document; the corpus is empty")
    return index


def load_rows(
    folder: Path,
    doc_ids: Sequence[str],
    rows: Rows,
    load: Callable[..., ExactIndex | Audited],
    *,
    shard: str = "",
    device: str | torch.device = "cpu",
) -> ExactIndex | Audited:
    """Some rows of a corpus, from what one process or several have saved.

    Where as many processes saved as there are now, each reads what it wrote, bit for bit; else it picks its rows from
    all that was written, into an exact index: what proposes for it is to be built anew.

    Args:
        folder: where an index or its shards were saved.
        doc_ids: of the whole corpus, in descending order.
        rows: that this process is to hold, ascending.
        load: that of the kind of index that was saved.
        shard: the name under which this process saves its rows; none where it saves them all.
        device: where the vectors go.

    Raises:
        DataError: other documents were saved.
        VectorIndexError: files are missing or damaged.
    """
    names, saved = [doc_ids[row] for row in rows], sorted(folder.glob("shard-*")) or [folder]
    with readable(folder):
        complete = sum(read_manifest(path)[0]["documents"] for path in saved) == len(doc_ids)
    if folder / shard in saved and complete:
        index = load(folder / shard, device=device)
        if list(index.doc_ids) == names:
            return index
    parts = [ExactIndex.load(path, mmap=True) for path in saved]
    if not complete or sum(doc_id in part.rows for part in parts for doc_id in doc_ids) != len(doc_ids):
        raise DataError(f"the index saved in {folder} and the collection hold different documents")
    picked = ExactIndex.reserve(names, parts[0].dimension, dtype=parts[0].dtype, device=device)
    for part in parts:
        here = np.array([place for place, doc_id in enumerate(names) if doc_id in part.rows], dtype=np.int64)
        for start in range(0, len(here), ROWS_AT_A_TIME):
            block = here[start : start + ROWS_AT_A_TIME]
            places = part.rows_of([names[place] for place in block])
            picked.update(block, part.vectors_at(places))
            picked.encoded_at_version[block] = part.encoded_at_version[places]
    return picked


def shard_name(communicator: Communicator) -> str:
    """Under which a process saves its rows."""
    return f"shard-{communicator.rank:05d}-of-{communicator.world_size:05d}"


def _split(flat: NDArray[T], lists: Sequence[Rows]) -> list[NDArray[T]]:  # type: ignore[type-var]
    """A flat array as lines of the lengths of these lists."""
    ends = np.cumsum([0, *(len(line) for line in lists)])
    return [flat[start:end] for start, end in pairwise(ends)]
