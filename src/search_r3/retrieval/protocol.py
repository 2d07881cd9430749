"""What ranks, refresh policies and evaluations ask of an index of vectors, whichever one it is.

Shapes: `Q` queries, `N` documents, `D` vector size, `K` results.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import VectorIndexError
from ..model.modes.gate import TOP
from ..types import Array, Rows

T = TypeVar("T")


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

    @property
    def counts_to(self) -> int:
        """The largest number that `count_ahead` tells from a larger one."""
        return sys.maxsize

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where scores are summed: the same sums of the same vectors come from no other kind of device."""

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
        targets = [np.array(line, dtype=np.int64) for line in rows]
        rivals = left_out or [np.empty(0, np.int64)] * len(rows)
        ahead = self.count_ahead(queries, targets, self.scores_at(queries, targets), rivals)
        return [[count + 1 for count in counts] for counts in ahead]

    def count_ahead(
        self, queries: Array, rows: Sequence[Rows], scores: Sequence[Array], left_out: Sequence[Rows]
    ) -> list[list[int]]:
        """How many documents rank ahead of each target, but for those that are left out.

        Args:
            queries: `Q x D`.
            rows: for each query the rows of its targets; of one that this index does not hold, the row that it would
                push back.
            scores: of the targets, as `scores_at` gives them.
            left_out: for each query; none of them is a target.
        """
        return self.search_and_count(queries, 0, rows, scores, left_out)[2]

    @abstractmethod
    def search_and_count(
        self, queries: Array, k: int, rows: Sequence[Rows], scores: Sequence[Array], left_out: Sequence[Rows]
    ) -> tuple[Rows, Array, list[list[int]]]:
        """`search_rows` (of none, where `k` is 0) and `count_ahead` of the same queries, at the price of one search."""

    @abstractmethod
    def scores_at(self, queries: Array, rows: Sequence[Rows]) -> list[Array]:
        """The scores of chosen rows for each query, `Q` lists; equal vectors have equal ones."""

    @abstractmethod
    def vectors_at(self, rows: Sequence[int] | Rows) -> Array:
        """The vectors held in these rows, `len(rows) x D`, as float32."""

    def together(self, queries: Array, labels: Sequence[T]) -> tuple[Array, list[T], slice]:
        """What this process asks the index: the queries of all processes, where all search together (`sharded`).

        Returns:
            The queries, what names each of them, and which of them are this process's.
        """
        return queries, list(labels), slice(0, len(labels))
