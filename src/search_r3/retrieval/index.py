"""The exact index: the truth that every other one is held against.

Higher scores rank first and equal scores by doc_id, the larger string first, as everywhere (`metrics`). The rows of an
index stand in descending order of doc_id, so among equal scores the lower row wins.

Shapes: `Q` queries, `N` documents, `D` vector size, `K` results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import VectorIndexError
from ..model.documents import unusable_rows
from ..types import Array, Rows
from . import storage
from .parts import Parts
from .protocol import VectorIndex
from .selection import NOISE, Ahead, Best, Blocks, Rounding, count_ahead, keys

DType = Literal["float32", "float16", "bfloat16"]

_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
PAIRS = 256
"""Vectors multiplied one by one together: they should fit into a core's cache."""
LONGEST = 1.01
"""The length of a unit vector that was rounded, at most."""


class ExactIndex(VectorIndex):
    """Exact search by matrix products of blocks of documents and queries; `Q x N` scores never exist at once.

    Args:
        doc_ids: unique document ids, in any order.
        vectors: `N x D`, L2-normalised; copied once, block by block, so a memory-mapped array is fine.
        version: the policy version that encoded them.
        dtype: how vectors are stored. Scores are float32 sums of float32 products either way.
        device: where vectors are stored and scored. Results are numpy arrays in any case.

    Raises:
        VectorIndexError: doubled ids, an unknown dtype, wrong shapes or values that are not finite.
    """

    block = 8192
    """Documents scored at once."""
    query_block = 256
    """Queries scored at once."""

    def __init__(
        self,
        doc_ids: Sequence[str],
        vectors: Array,
        version: int = 0,
        *,
        dtype: DType = "float32",
        device: str | torch.device = "cpu",
    ) -> None:
        if not doc_ids:
            raise VectorIndexError("an index needs at least one document; the corpus is empty")
        if dtype not in _DTYPES:
            raise VectorIndexError(f"an index cannot hold {dtype!r}; choose one of {', '.join(_DTYPES)}")
        order = descending(doc_ids)
        vectors = _check_shape(vectors, len(doc_ids), None)
        self._tensor: torch.Tensor | Parts = torch.empty(vectors.shape, dtype=_DTYPES[dtype], device=device)  # N x D
        self._label([doc_ids[i] for i in order], np.full(len(doc_ids), version, dtype=np.int64))
        self._check_values(vectors)
        for start in range(0, len(order), self.block):
            self._tensor[start : start + self.block] = _tensor_of(vectors[order[start : start + self.block]])

    @classmethod
    def reserve(
        cls, doc_ids: Sequence[str], dimension: int, *, dtype: DType = "float32", device: str | torch.device = "cpu"
    ) -> ExactIndex:
        """An index of zeros for `update` to fill block by block; `doc_ids` in descending order."""
        index = cls.__new__(cls)
        index._tensor = torch.zeros((len(doc_ids), dimension), dtype=_DTYPES[dtype], device=device)
        index._label(doc_ids, np.zeros(len(doc_ids), dtype=np.int64))
        return index

    @property
    def dtype(self) -> DType:
        """How vectors are stored."""
        name: DType = next(name for name in get_args(DType) if _DTYPES[name] == self._tensor.dtype)
        return name

    @property
    def device(self) -> torch.device:
        """Where vectors are stored and scored."""
        return self._tensor.device

    @property
    def dimension(self) -> int:
        """The size of a vector, `D`."""
        return self._tensor.shape[1]

    @property
    def matrix(self) -> Array:
        """All vectors, `N x D`, in the order of `doc_ids`: a view (do not write) of float32 on the CPU, else a copy."""
        array: Array = self._tensor.float().cpu().numpy()
        return array

    def search_rows(self, queries: Array, k: int) -> tuple[Rows, Array]:
        """The `k` best documents of each query (all of them where there are fewer).

        Args:
            queries: `Q x D`.
            k: at least 1.

        Returns:
            Rows (positions in `doc_ids`) and scores, both `Q x K`, best first.

        Raises:
            VectorIndexError: wrong shape, values that are not finite, or `k` below 1.
        """
        if k < 1:
            raise VectorIndexError(f"a search returns at least 1 document; k was {k}")
        none: list[Rows] = [np.empty(0, np.int64)] * len(queries)
        rows, scores, _ = self._scan(queries, k, none, [])
        return rows, scores

    def search_and_count(
        self, queries: Array, k: int, rows: Sequence[Rows], scores: Sequence[Array], left_out: Sequence[Rows]
    ) -> tuple[Rows, Array, list[list[int]]]:
        """`search_rows` and `count_ahead` in one pass over the documents."""
        best, best_scores, counts = self._scan(queries, k, rows, scores)
        limited = [i for i, rivals in enumerate(left_out) if len(rivals) and len(rows[i])]
        for i, own in zip(limited, self.scores_at(queries[limited], [left_out[i] for i in limited]), strict=True):
            less = count_ahead(rows[i], scores[i], left_out[i], own)
            counts[i] = [count - some for count, some in zip(counts[i], less, strict=True)]
        return best, best_scores, counts

    def _scan(
        self, queries: Array, k: int, targets: Sequence[Rows], target_scores: Sequence[Array]
    ) -> tuple[Rows, Array, list[list[int]]]:
        """The `k` best documents of each query (none, where it is 0), and how many rank ahead of each target."""
        vectors, k = self._queries(queries), min(k, len(self))
        rows, scores = np.empty((len(vectors), k), dtype=np.int64), np.empty((len(vectors), k), dtype=np.float32)
        counts: list[list[int]] = [[] for _ in targets]
        # The longest lists stand together, so that they alone pay for their length.
        order = sorted(range(len(targets)), key=lambda query: len(targets[query]), reverse=True)
        if not any(map(len, targets)):
            target_scores = [np.empty(0, np.float32)] * len(vectors)
            if not k:
                return rows, scores, counts
        for start in range(0, len(order), self.query_block):
            part = order[start : start + self.query_block]
            block = vectors[part]
            rounding = self._rounding(block)
            best = Best(block, rounding)
            lists, bars = [targets[i].tolist() for i in part], [target_scores[i].tolist() for i in part]
            ahead = Ahead(partial(self.pair_scores, block), lists, bars, block.device, rounding)
            for first, products in self._products(block) if rounding is None else self._rounded_products(block):
                if k:
                    best.add(first, products, k)
                ahead.add(first, products)
            if k:
                rows[part], scores[part] = (found.cpu().numpy() for found in best.finish(k))
            for i, own in zip(part, ahead.lists(), strict=True):
                counts[i] = own
        return rows, scores, counts

    def scores_at(self, queries: Array, rows: Sequence[Rows]) -> list[Array]:
        """The scores of chosen rows for each query, `Q` lists; equal vectors have equal ones.

        Those of a matrix product may differ in the last bit: it sums the edges of a block in another order.
        """
        if not len(rows):
            return []
        sizes = [len(line) for line in rows]
        places = torch.from_numpy(np.concatenate(rows)).to(self._tensor.device)
        owners = torch.arange(len(rows)).repeat_interleave(torch.tensor(sizes)).to(places.device)
        scores = self.pair_scores(self._queries(queries), places, owners).cpu().numpy()
        return np.split(scores, np.cumsum(sizes)[:-1])

    def pair_scores(self, queries: torch.Tensor, rows: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """The scores of pairs of a row and a query (their numbers), each summed by itself."""
        scores = queries.new_empty(len(rows))
        # Used again and again: to get as much memory anew would take longer than the sums. A GPU may sum few
        # rows in another order than many, so there they are always as many.
        size = (PAIRS if queries.is_cuda else min(PAIRS, len(rows)), self.dimension)
        near, far = queries.new_empty(size, dtype=self._tensor.dtype), queries.new_empty(size)
        for start in range(0, len(rows), PAIRS):
            part = rows[start : start + PAIRS]
            narrow, wide = near[: len(part)], far[: len(part)]
            if isinstance(self._tensor, torch.Tensor):
                torch.index_select(self._tensor, 0, part, out=narrow)
            else:
                narrow = self._tensor[part]
            torch.index_select(queries, 0, query[start : start + PAIRS], out=wide)
            wide.mul_(narrow)
            scores[start : start + PAIRS] = far.sum(1)[: len(part)]
        return scores

    def check_queries(self, queries: Array) -> Array:
        """Queries as float32, `Q x D`.

        Raises:
            VectorIndexError: wrong shape or values that are not finite.
        """
        queries = _check_shape(queries, None, self.dimension)
        self._check_values(queries)
        return np.ascontiguousarray(queries, dtype=np.float32)

    def vectors_at(self, rows: Sequence[int] | Rows) -> Array:
        """The vectors held in these rows, `len(rows) x D`, as float32."""
        places = torch.tensor(np.asarray(rows, dtype=np.int64), device=self._tensor.device)
        array: Array = self._tensor[places].float().cpu().numpy()
        return array

    def block_at(self, rows: slice) -> torch.Tensor:
        """The vectors in a block of rows as they are stored; do not write."""
        return self._tensor[rows]

    def update(self, rows: Rows, vectors: Array, version: int | None = None) -> None:
        """Replace the vectors in these rows, each once, `len(rows) x D`; without a version they stay as old as before.

        Raises:
            VectorIndexError: wrong shape or values that are not finite; nothing is changed.
        """
        vectors = _check_shape(vectors, len(rows), self.dimension)
        self._check_values(vectors)
        self._tensor[torch.tensor(rows, dtype=torch.long, device=self._tensor.device)] = _tensor_of(vectors).to(
            self._tensor.device, self._tensor.dtype
        )
        if version is not None:
            self.encoded_at_version[rows] = version

    def save(self, folder: Path) -> None:
        """Write the index; a process killed at any moment leaves the old state or the new one.

        Raises:
            VectorIndexError: the disk refuses; the old state stays.
        """
        storage.save_state(folder, self.writers(), self.facts())

    @classmethod
    def load(cls, folder: Path, *, mmap: bool = False, device: str | torch.device = "cpu") -> ExactIndex:
        """Read what `save` wrote.

        Args:
            folder: where it was saved.
            mmap: leave the vectors on the disk and read what is used; an update stays in memory, never in the file.
            device: where the vectors go.

        Raises:
            VectorIndexError: files are missing, damaged or do not fit together.
        """
        with storage.readable(Path(folder)):
            index = cls.from_state(*storage.read_manifest(Path(folder)), mmap=mmap)
        return index.to(device)

    def to(self, device: str | torch.device) -> ExactIndex:
        """Move the vectors to a device; returns the index."""
        self._tensor = self._tensor.to(device)
        return self

    def writers(self) -> dict[str, storage.FileWriter]:
        """What writes each data file of a saved index."""
        labels = storage.label_writers(self.doc_ids, self.encoded_at_version)
        bits = self._tensor[:].view(torch.int16) if self.dtype in storage.FILE_DTYPES else self._tensor
        return {"vectors.npy": storage.write_array(bits, self.block), **labels}

    def facts(self) -> dict[str, Any]:
        """What the manifest of a saved index says about it."""
        return {"documents": len(self), "dimension": self.dimension, "dtype": self.dtype}

    @classmethod
    def from_state(cls, manifest: Mapping[str, Any], paths: Mapping[str, Path], *, mmap: bool) -> ExactIndex:
        """The index that `facts` and `writers` described; to be called within `storage.readable`."""
        count, dtype = manifest["documents"], manifest["dtype"]
        if dtype not in _DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}")
        index = cls.__new__(cls)
        index.doc_ids, index.rows, index.encoded_at_version = storage.read_labels(paths, count, mmap=mmap)
        index._tensor = storage.read_vectors(manifest, paths, mmap=mmap)
        return index

    def _label(self, doc_ids: Sequence[str], versions: NDArray[np.int64]) -> None:
        self.doc_ids, self.encoded_at_version = doc_ids, versions
        self.rows = {doc_id: row for row, doc_id in enumerate(doc_ids)}
        if len(self.rows) != len(doc_ids):
            raise VectorIndexError("document ids must be unique within an index")

    def _queries(self, queries: Array) -> torch.Tensor:
        return torch.tensor(self.check_queries(queries), device=self._tensor.device)

    def _check_values(self, vectors: Array) -> None:
        for start in range(0, len(vectors), self.block):
            largest = "float16" if self.dtype == "float16" else "float32"  # bfloat16 reaches as far as float32
            if len(unusable_rows(vectors[start : start + self.block], largest)):
                raise VectorIndexError(
                    f"vectors hold NaN or infinity (or more than {self.dtype} can); the model that made them is broken"
                )

    def _rounding(self, queries: torch.Tensor) -> Rounding | None:
        """Of products in bfloat16, where vectors are stored so and the processor multiplies them faster than float32.

        What such a product cannot tell is taken from float32 sums, so that results are the same.
        """
        if self.dtype != "bfloat16" or fast_dtype(self.device) != torch.bfloat16:
            return None

        def products(start: int, columns: torch.Tensor) -> torch.Tensor:
            return self._tensor[start : start + self.block].to(queries) @ queries[columns].T

        error = (queries - queries.bfloat16()).norm(dim=1) * LONGEST + NOISE
        # A GPU may add parts of a sum that are rounded already.
        unit = torch.finfo(torch.bfloat16).eps / 2 * (4 if queries.is_cuda else 1)
        return Rounding(partial(self.pair_scores, queries), error, unit, products)

    def _rounded_products(self, queries: torch.Tensor) -> Blocks:
        narrow = queries.bfloat16().T
        scores = narrow.new_empty((min(self.block, len(self)), len(queries)))
        for start in range(0, len(self), self.block):
            block = self._tensor[start : start + self.block]
            yield start, keys(torch.mm(block, narrow, out=scores[: len(block)]))

    def _products(self, queries: torch.Tensor) -> Blocks:
        """The first row and the keys of the scores of each block; the next block overwrites them.

        A document gets the same bits in every pass over the same queries: same shapes, same memory, same order of sums.
        Two documents with one vector may differ in the last bit: the edges of a block are summed in another order.
        """
        size = min(self.block, len(self))
        scores = queries.new_empty((size, len(queries)))
        narrow = self._tensor.dtype != queries.dtype
        wide = queries.new_empty((size, self.dimension)) if narrow else queries
        for start in range(0, len(self), size):
            block = self._tensor[start : start + size]
            if narrow:
                block = wide[: len(block)].copy_(block)
            yield start, keys(torch.mm(block, queries.T, out=scores[: len(block)]))


@cache
def _multiplies_bfloat16() -> bool:
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where it is multiplied faster than float32, else that."""
    return torch.bfloat16 if device.type == "cuda" or _multiplies_bfloat16() else torch.float32


def descending(doc_ids: Sequence[str]) -> Rows:
    """The place in `doc_ids` of each row of an index, `N`."""
    return np.array(sorted(range(len(doc_ids)), key=doc_ids.__getitem__, reverse=True), dtype=np.int64)


def _check_shape(vectors: Array, rows: int | None, dimension: int | None) -> Array:
    array = np.asarray(vectors)
    if array.ndim != 2 or (rows is not None and len(array) != rows):
        raise VectorIndexError(
            f"expected {rows if rows is not None else 'Q'} vectors in rows, found shape {array.shape}"
        )
    if dimension is not None and array.shape[1] != dimension:
        raise VectorIndexError(f"vectors have size {array.shape[1]}, the index has size {dimension}: another model's?")
    return array


def _tensor_of(vectors: Array) -> torch.Tensor:
    """A copy as float32."""
    return torch.tensor(np.asarray(vectors, dtype=np.float32))
