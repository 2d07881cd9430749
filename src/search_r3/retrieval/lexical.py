"""BM25 through bm25s (Lucene's variant, k1 1.5, b 0.75): the baseline, and the source of hard negatives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt

from ..extras import extra
from .metrics import rank
from .tokens import LexicalTokens

Scored = list[tuple[str, float]]
"""Documents with their scores, best first."""
Scores = npt.NDArray[np.float32]
_Matches = npt.NDArray[np.integer[Any]]
_Column = tuple[_Matches, Scores]


class BM25:
    """A lexical index.

    Args:
        doc_ids: unique document ids.
        texts: one text per document.
        tokens: how texts are read; by default without stems, English stop words, as negatives are mined for stage 1.
    """

    def __init__(self, doc_ids: Sequence[str], texts: Sequence[str], tokens: LexicalTokens | None = None) -> None:
        with extra("eval"):
            import bm25s

        self._tokens = tokens or LexicalTokens(stemmed=False)
        self.doc_ids = list(doc_ids)
        self._rows = {doc_id: row for row, doc_id in enumerate(self.doc_ids)}
        self._bm25: Any = bm25s.BM25()
        lines = self._tokens.of_documents(texts)
        self._empty = not any(lines)  # bm25s cannot index documents that hold no word at all
        if not self._empty:
            self._bm25.index(lines, show_progress=False)

    @staticmethod
    def release() -> str:
        """The library and its version."""
        return f"bm25s {version('bm25s')}"

    def search(
        self, texts: Sequence[str], k: int, pools: Sequence[Iterable[str] | None] | None = None
    ) -> list[list[str]]:
        """The `k` best documents of each text, of its pool where it has one; those that share no word are left out."""
        return [[doc_id for doc_id, _ in ranking] for ranking in self.search_scored(texts, k, pools)]

    def search_scored(
        self, texts: Sequence[str], k: int, pools: Sequence[Iterable[str] | None] | None = None
    ) -> list[Scored]:
        """The same with scores."""
        return [
            self._best(tokens, k, pool)
            for tokens, pool in zip(self._tokens(texts), pools or [None] * len(texts), strict=True)
        ]

    def scores(self, texts: Sequence[str], doc_ids: Sequence[Sequence[str]]) -> list[list[float]]:
        """The score of each of these documents for the text at its place; 0 where they share no word."""
        return [
            self._scores(self._columns(tokens), self._rows_of(line)).tolist()
            for tokens, line in zip(self._tokens(texts), doc_ids, strict=True)
        ]

    def _best(self, tokens: list[str], k: int, pool: Iterable[str] | None) -> Scored:
        columns = self._columns(tokens)
        if pool is None:
            rows, scores = self._candidates(columns, k)
        else:
            rows = self._rows_of(doc_id for doc_id in pool if doc_id in self._rows)
            scores = self._scores(columns, rows)
            rows, scores = rows[scores != 0], scores[scores != 0]
        if len(rows) > k:
            # All that tie with the last place stay, for the ranking rule to choose among.
            best = scores >= np.partition(scores, -k)[-k]
            rows, scores = rows[best], scores[best]
        score_of = {self.doc_ids[row]: score for row, score in zip(rows.tolist(), scores.tolist(), strict=True)}
        return [(doc_id, score_of[doc_id]) for doc_id in rank(score_of, k)]

    def _rows_of(self, doc_ids: Iterable[str]) -> _Matches:
        return np.array([self._rows[doc_id] for doc_id in doc_ids], dtype=np.int64)

    def _columns(self, tokens: list[str]) -> list[_Column]:
        """The documents that hold each token, with what it adds to their scores: what bm25s adds up, in its order."""
        if self._empty:
            return []
        matrix = self._bm25.scores
        ends = matrix["indptr"]
        return [
            (matrix["indices"][ends[token] : ends[token + 1]], matrix["data"][ends[token] : ends[token + 1]])
            for token in self._bm25.get_tokens_ids(tokens)
        ]

    @staticmethod
    def _scores(columns: list[_Column], rows: _Matches) -> Scores:
        """The scores of some documents, looked up in the columns, whose rows ascend."""
        scores = np.zeros(len(rows), dtype=np.float32)
        for holds, adds in columns:
            at = np.minimum(np.searchsorted(holds, rows), len(holds) - 1)
            scores += np.where(holds[at] == rows, adds[at], np.float32(0))
        return scores

    def _candidates(self, columns: list[_Column], k: int) -> tuple[_Matches, Scores]:
        """The documents that can be among the `k` best, and their scores.

        The `k`-th best of the rarest word that `k` documents hold is no better than the `k`-th best of all; what scores
        less need not be sorted, which takes as long as the sums where most documents share a common word.
        """
        scores = np.zeros(len(self.doc_ids), dtype=np.float32)
        for holds, adds in columns:
            scores[holds] += adds
        enough = [holds for holds, _ in columns if len(holds) >= k]
        if enough:
            rarest = scores[min(enough, key=len)]
            rows = np.flatnonzero(scores >= np.partition(rarest, -k)[-k])
        else:
            rows = np.flatnonzero(scores)
        return rows, scores[rows]
