"""BM25 through bm25s (Lucene's variant, English stop words, no stemming): the baseline, and the negatives' source."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from .metrics import rank

Scored = list[tuple[str, float]]
"""Documents with their scores, best first."""


class BM25:
    """A lexical index.

    Args:
        doc_ids: unique document ids.
        texts: one text per document.
    """

    def __init__(self, doc_ids: Sequence[str], texts: Sequence[str]) -> None:
        import bm25s

        self.doc_ids = list(doc_ids)
        self._rows = {doc_id: row for row, doc_id in enumerate(self.doc_ids)}
        self._bm25: Any = bm25s.BM25()
        tokens = self._tokens(texts)
        self._empty = not any(tokens)  # bm25s cannot index documents that hold no word at all
        if not self._empty:
            self._bm25.index(tokens, show_progress=False)

    @staticmethod
    def release() -> str:
        """The library and its version."""
        return f"bm25s {version('bm25s')}"

    def search(self, texts: Sequence[str], k: int) -> list[list[str]]:
        """The `k` best documents of each text under the ranking rule; documents that share no word are left out."""
        return [[doc_id for doc_id, _ in found] for found in self.search_scored(texts, k)]

    def search_scored(
        self, texts: Sequence[str], k: int, pools: Sequence[Iterable[str] | None] | None = None
    ) -> list[Scored]:
        """The same with scores; a text with a pool ranks the documents of that pool alone."""
        return [
            self._best(tokens, k, pool)
            for tokens, pool in zip(self._tokens(texts), pools or [None] * len(texts), strict=True)
        ]

    def _best(self, tokens: list[str], k: int, pool: Iterable[str] | None) -> Scored:
        # A text of stop words alone has no tokens, for which bm25s raises an IndexError.
        if not tokens or self._empty:
            return []
        scores = self._bm25.get_scores(tokens)
        if pool is None:
            rows = scores.nonzero()[0]
        else:
            chosen = np.array([self._rows[doc_id] for doc_id in pool if doc_id in self._rows], dtype=np.int64)
            rows = chosen[scores[chosen] != 0]
        if len(rows) > k:
            # All that tie with the last place stay, for the ranking rule to choose among.
            rows = rows[scores[rows] >= np.partition(scores[rows], -k)[-k]]
        found = {self.doc_ids[row]: float(scores[row]) for row in rows}
        return [(doc_id, found[doc_id]) for doc_id in rank(found, k)]

    def _tokens(self, texts: Sequence[str]) -> list[list[str]]:
        import bm25s

        tokenize: Any = bm25s.tokenize
        tokens: list[list[str]] = tokenize(
            list(texts), stopwords="en", show_progress=False, return_ids=False, allow_empty=False
        )
        # Of a text without any word bm25s makes the one token "", with which it cannot search.
        return [[token for token in line if token] for line in tokens]
