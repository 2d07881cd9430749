"""Vector indexes behind one protocol; the exact index is the truth.

Shapes: `Q` queries, `N` documents, `D` vector size, `K` results.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import VectorIndexError
from ..files import atomic_directory, write_json

Array = NDArray[np.float32]


@dataclass(frozen=True)
class SearchResult:
    """The best documents of every query: `doc_ids` `Q x K` (lists), `scores` `Q x K` (float32)."""

    doc_ids: list[list[str]]
    scores: Array


class VectorIndex(Protocol):
    """What the environment, the evaluation and the server ask of an index."""

    doc_ids: Sequence[str]
    encoded_at_version: NDArray[np.int64]

    def search(self, queries: Array, k: int) -> SearchResult:
        """The `k` best documents of each query."""
        ...

    def update(self, doc_ids: Sequence[str], vectors: Array, version: int) -> None:
        """Replace the vectors of known documents, which are then as old as `version`."""
        ...

    def vectors(self, doc_ids: Sequence[str]) -> Array:
        """The vectors held for these documents, `len(doc_ids) x D`."""
        ...

    def save(self, folder: Path) -> None:
        """Write the index atomically."""
        ...


class ExactIndex:
    """All scores by matrix products, blocked over queries; ties by the ranking rule of `metrics`.

    Args:
        doc_ids: unique document ids.
        vectors: `N x D`, float32, L2-normalised.
        version: the policy version that encoded them.

    Raises:
        VectorIndexError: doubled ids, wrong shapes or values that are not finite.
    """

    block = 1024

    def __init__(self, doc_ids: Sequence[str], vectors: Array, version: int = 0) -> None:
        if not doc_ids:
            raise VectorIndexError("an index needs at least one document; the corpus is empty")
        # Rows stand in the order in which equal scores rank (doc_id descending), so "first row wins" is the tie rule.
        order = sorted(range(len(doc_ids)), key=lambda i: doc_ids[i], reverse=True)
        self.doc_ids: Sequence[str] = [doc_ids[i] for i in order]
        self.rows = {doc_id: row for row, doc_id in enumerate(self.doc_ids)}
        if len(self.rows) != len(doc_ids):
            raise VectorIndexError("document ids must be unique within an index")
        self._matrix = _checked(vectors, len(doc_ids), None)[order]
        self.encoded_at_version = np.full(len(doc_ids), version, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.doc_ids)

    @property
    def matrix(self) -> Array:
        """All vectors, `N x D`, in the order of `doc_ids` (a view: do not write)."""
        return self._matrix

    def scores(self, queries: Array) -> Array:
        """Scores of every document, `Q x N`, columns in the order of `doc_ids`."""
        result: Array = (torch.from_numpy(_checked(queries, None, self._matrix.shape[1])) @ self._tensor().T).numpy()
        return result

    def search(self, queries: Array, k: int) -> SearchResult:
        """The `k` best documents of each query (all of them where there are fewer)."""
        k = min(k, len(self))
        ids: list[list[str]] = []
        kept = np.empty((len(queries), k), dtype=np.float32)
        for start in range(0, len(queries), self.block):
            scores = self.scores(queries[start : start + self.block])
            for offset, row in enumerate(scores):
                best = _top(row, k)
                kept[start + offset] = row[best]
                ids.append([self.doc_ids[i] for i in best])
        return SearchResult(ids, kept)

    def ranks(self, queries: Array, doc_ids: Sequence[Sequence[str]]) -> list[dict[str, int]]:
        """The rank (from 1) of chosen documents for each query, without sorting all scores."""
        ranks = []
        for start in range(0, len(queries), self.block):
            for row, wanted in zip(
                self.scores(queries[start : start + self.block]),
                doc_ids[start : start + self.block],
                strict=True,
            ):
                ranks.append({doc_id: _rank_of(row, self.row(doc_id)) for doc_id in wanted})
        return ranks

    def row(self, doc_id: str) -> int:
        """The row of a document.

        Raises:
            VectorIndexError: the index does not hold it.
        """
        try:
            return self.rows[doc_id]
        except KeyError:
            raise VectorIndexError(f"document {doc_id!r} is not in the index of {len(self)} documents") from None

    def vectors(self, doc_ids: Sequence[str]) -> Array:
        """The vectors held for these documents, `len(doc_ids) x D`."""
        return self._matrix[[self.row(doc_id) for doc_id in doc_ids]]

    def update(self, doc_ids: Sequence[str], vectors: Array, version: int) -> None:
        """Replace the vectors of known documents; on an error nothing is changed."""
        rows = [self.row(doc_id) for doc_id in doc_ids]
        checked = _checked(vectors, len(rows), self._matrix.shape[1])
        if rows:
            self._matrix[rows] = checked
            self.encoded_at_version[rows] = version

    def save(self, folder: Path) -> None:
        """Write ids (JSON) and vectors (safetensors) atomically."""
        from safetensors.numpy import save_file

        with atomic_directory(folder) as out:
            arrays: dict[str, NDArray[Any]] = {
                "vectors": self._matrix,
                "encoded_at_version": self.encoded_at_version,
            }
            save_file(arrays, out / "index.safetensors")
            write_json(out / "doc_ids.json", list(self.doc_ids))

    @classmethod
    def load(cls, folder: Path) -> ExactIndex:
        """Read what `save` wrote.

        Raises:
            VectorIndexError: files are missing or do not fit together.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            arrays = load_file(folder / "index.safetensors")
            doc_ids = json.loads((folder / "doc_ids.json").read_text(encoding="utf-8"))
            index = cls(doc_ids, arrays["vectors"])
            index.encoded_at_version = arrays["encoded_at_version"]
        except (OSError, KeyError, SafetensorError, json.JSONDecodeError) as error:
            raise VectorIndexError(f"{folder} holds no usable index: {error}") from error
        return index

    def _tensor(self) -> torch.Tensor:
        return torch.from_numpy(self._matrix)


def _top(scores: Array, k: int) -> NDArray[np.int64]:
    """The `k` best columns, best first, the lower column first among equal scores."""
    if k < len(scores):
        threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
        candidates = np.flatnonzero(scores >= threshold)
    else:
        candidates = np.arange(len(scores))
    order = np.argsort(-scores[candidates], kind="stable")
    return candidates[order][:k]


def _rank_of(scores: Array, column: int) -> int:
    """The rank (from 1) of one column under the same rule."""
    own = scores[column]
    return int((scores > own).sum() + (scores[:column] == own).sum()) + 1


def _checked(vectors: Array, rows: int | None, dimension: int | None) -> Array:
    array = np.ascontiguousarray(vectors, dtype=np.float32)
    if array.ndim != 2 or (rows is not None and len(array) != rows):
        raise VectorIndexError(
            f"expected {rows if rows is not None else 'Q'} vectors in rows, found shape {array.shape}"
        )
    if dimension is not None and array.shape[1] != dimension:
        raise VectorIndexError(f"vectors have size {array.shape[1]}, the index has size {dimension}: another model's?")
    if not np.isfinite(array).all():
        raise VectorIndexError("vectors hold NaN or infinity; the model that made them is broken")
    return array
