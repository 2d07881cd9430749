"""Vector indexes behind one protocol; the exact index is the truth.

Higher scores rank first and equal scores by doc_id, the larger string first, as everywhere (`metrics`). The rows of an
index stand in descending order of doc_id, so among equal scores the lower row wins.

Shapes: `Q` queries, `N` documents, `D` vector size, `K` results.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import VectorIndexError
from ..model.documents import unusable_rows
from ..model.modes.gate import TOP
from ..types import Array, Rows
from . import storage
from .parts import Parts
from .selection import Best, Blocks, count_ahead, count_better

DType = Literal["float32", "float16"]

_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class SearchResult:
    """The best documents of every query: `doc_ids` `Q x K` (lists), `scores` `Q x K` (float32)."""

    doc_ids: list[list[str]]
    scores: Array


class VectorIndex(ABC):
    """What ranks and refresh policies ask of an index.

    Attributes:
        doc_ids: the document of each row, in descending order.
        rows: the row of each document.
        encoded_at_version: the policy version that encoded each row, `N`.
    """

    doc_ids: Sequence[str]
    rows: Mapping[str, int]
    encoded_at_version: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.doc_ids)

    def row(self, doc_id: str) -> int:
        """The row of a document.

        Raises:
            VectorIndexError: the index does not hold it.
        """
        try:
            return self.rows[doc_id]
        except KeyError:
            raise VectorIndexError(f"document {doc_id!r} is not in the index of {len(self)} documents") from None

    def rows_of(self, doc_ids: Sequence[str]) -> Rows:
        """The row of each document, as `row`."""
        return np.array([self.row(doc_id) for doc_id in doc_ids], dtype=np.int64)

    def search(self, queries: Array, k: int) -> SearchResult:
        """`search_rows` with doc_ids instead of rows."""
        rows, scores = self.search_rows(queries, k)
        return SearchResult([[self.doc_ids[row] for row in line] for line in rows.tolist()], scores)

    def top_scores(self, queries: Array) -> Array:
        """The scores of the best documents, `Q x 10` (all where there are fewer), best first: what a gate reads."""
        return self.search_rows(queries, TOP)[1]

    @abstractmethod
    def search_rows(self, queries: Array, k: int) -> tuple[Rows, Array]:
        """Rows and scores, both `Q x K`, of the `k` best documents of each query (all where there are fewer)."""

    @abstractmethod
    def ranks(
        self, queries: Array, rows: Sequence[Sequence[int]], left_out: Sequence[Rows] | None = None
    ) -> list[list[int]]:
        """The rank (from 1) of chosen rows for each query, among all but those that are left out for it."""

    @abstractmethod
    def scores_at(self, rows: Rows, query: Array) -> Array:
        """The scores of these rows for one query, `len(rows)`; equal vectors have equal ones."""

    @abstractmethod
    def vectors_at(self, rows: Sequence[int] | Rows) -> Array:
        """The vectors held in these rows, `len(rows) x D`, as float32."""


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

    @property
    def dtype(self) -> DType:
        """How vectors are stored."""
        return "float16" if self._tensor.dtype == torch.float16 else "float32"

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
        vectors, k = self._queries(queries), min(k, len(self))
        rows, scores = np.empty((len(vectors), k), dtype=np.int64), np.empty((len(vectors), k), dtype=np.float32)
        for start in range(0, len(vectors), self.query_block):
            part = slice(start, start + self.query_block)
            best = Best(vectors[part])
            for first, products in self._products(vectors[part]):
                best.add(first, products, k)
            rows[part], scores[part] = best.rows.cpu().numpy(), best.scores.cpu().numpy()
        return rows, scores

    def ranks(
        self, queries: Array, rows: Sequence[Sequence[int]], left_out: Sequence[Rows] | None = None
    ) -> list[list[int]]:
        """The rank (from 1) of chosen rows for each query, without sorting all scores.

        Args:
            queries: `Q x D`.
            rows: the documents asked for, for each query.
            left_out: the documents that are not ranked, for each query; none of them is asked for.

        Raises:
            VectorIndexError: wrong shape, values that are not finite, or not one list of rows for each query.
        """
        if len(rows) != len(queries):
            raise VectorIndexError(f"{len(queries)} queries need {len(queries)} lists of rows, found {len(rows)}")
        vectors = self._queries(queries)
        result: list[list[int]] = [[] for _ in rows]
        # The longest lists stand together, so that they alone pay for their length.
        order = sorted(range(len(rows)), key=lambda query: len(rows[query]), reverse=True)
        for start in range(0, len(order), self.query_block):
            part = order[start : start + self.query_block]
            block, lists = vectors[part], [rows[i] for i in part]
            better = count_better(self._products(block), partial(self._pair_scores, block), lists, block.device)
            for i, counts in zip(part, better, strict=True):
                result[i] = [count + 1 for count in counts]
        for i, rivals in enumerate(left_out or ()):
            if len(rivals) and result[i]:
                targets = np.array(rows[i], dtype=np.int64)
                scores, rival_scores = self.scores_at(targets, queries[i]), self.scores_at(rivals, queries[i])
                ahead = count_ahead(targets, scores, rivals, rival_scores)
                result[i] = [rank - count for rank, count in zip(result[i], ahead, strict=True)]
        return result

    def scores_at(self, rows: Rows, query: Array) -> Array:
        """The scores of these rows for one query, `len(rows)`; equal vectors have equal ones.

        Those of a matrix product may differ in the last bit: it sums the edges of a block in another order.
        """
        scores: Array = self.candidate_scores(query[None], rows[None])[0]
        return scores

    def candidate_scores(self, queries: Array, rows: Rows) -> Array:
        """The same for the rows `Q x C` of queries `Q x D`."""
        vectors, places = self._queries(queries), torch.tensor(rows, dtype=torch.long).to(self._tensor.device)
        owners = torch.arange(len(places), device=places.device).repeat_interleave(places.shape[1])
        scores: Array = self._pair_scores(vectors, places.flatten(), owners).view(places.shape).cpu().numpy()
        return scores

    def _pair_scores(self, queries: torch.Tensor, rows: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """The scores of pairs of a row and a query, each summed by itself."""
        scores = queries.new_empty(len(rows))
        for start in range(0, len(rows), self.block):
            part = slice(start, start + self.block)
            scores[part] = (self._tensor[rows[part]].to(queries) * queries[query[part]]).sum(1)
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
        return {"vectors.npy": storage.write_array(self._tensor, self.block), **labels}

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
            if len(unusable_rows(vectors[start : start + self.block], self.dtype)):
                raise VectorIndexError(
                    f"vectors hold NaN or infinity (or more than {self.dtype} can); the model that made them is broken"
                )

    def _products(self, queries: torch.Tensor) -> Blocks:
        """The first row and the scores (`rows x Q`) of each block; the next block overwrites the scores.

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
            yield start, torch.mm(block, queries.T, out=scores[: len(block)])


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
