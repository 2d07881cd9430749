"""Asking a store with a model."""

from __future__ import annotations

from ..evaluation.search import Answer, Searcher
from ..model.embeddings import QueryEmbeddings
from ..model.encoder import SearchR3
from .filters import Filter
from .store import Store


class StoreSearcher(Searcher):
    """A model and a store; `search` and `stream` are those of `Searcher`.

    Args:
        model: the model, whose fingerprint the store was opened with.
        store: the documents.
        instruction: of every query.
        hybrid: ranks of words (BM25) and of vectors are fused.
        where: which documents are searched.
    """

    def __init__(
        self, model: SearchR3, store: Store, instruction: str = "", *, hybrid: bool = False, where: Filter | None = None
    ) -> None:
        self.model, self.store, self.instruction = model, store, instruction
        self.hybrid, self.where = hybrid, where

    def _answer(self, query: str, encoded: QueryEmbeddings, k: int) -> Answer:
        texts = [query] if self.hybrid else None
        [hits] = self.store.search(encoded.vectors, texts=texts, k=k, where=self.where)
        row = encoded.reasoning[0], encoded.reasoning_tokens[0], encoded.forced[0], encoded.truncated[0]
        return Answer(*row, list(hits), query)
