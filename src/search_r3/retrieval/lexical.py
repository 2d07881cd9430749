"""BM25 through bm25s (Lucene's variant, English stop words, no stemming): the baseline, and the negatives' source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .metrics import rank


class BM25:
    """A lexical index.

    Args:
        doc_ids: unique document ids.
        texts: one text per document.
    """

    def __init__(self, doc_ids: Sequence[str], texts: Sequence[str]) -> None:
        import bm25s

        self.doc_ids = list(doc_ids)
        self._bm25: Any = bm25s.BM25()
        self._bm25.index(self._tokens(texts), show_progress=False)

    def search(self, texts: Sequence[str], k: int) -> list[list[str]]:
        """The `k` best documents of each text under the ranking rule; documents that share no word are left out."""
        results = []
        for tokens in self._tokens(texts):
            # A text of stop words alone has no tokens, for which bm25s raises an IndexError.
            scores = self._bm25.get_scores(tokens) if tokens else np.zeros(0)
            results.append(rank({self.doc_ids[i]: scores[i] for i in scores.nonzero()[0]}, k))
        return results

    def _tokens(self, texts: Sequence[str]) -> list[list[str]]:
        import bm25s

        tokenize: Any = bm25s.tokenize
        tokens: list[list[str]] = tokenize(
            list(texts), stopwords="en", show_progress=False, return_ids=False, allow_empty=False
        )
        return tokens
