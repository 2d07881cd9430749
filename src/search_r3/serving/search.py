"""Asking a store with a model."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from ..evaluation.search import Answer, Searcher
from ..model.embeddings import QueryEmbeddings
from ..model.encoder import SearchR3
from .filters import Filter
from .fingerprint import Fingerprint
from .store import Store


class ModelLoader(Protocol):
    """Loads a model; `SearchR3` is one."""

    def __call__(self, model: str, /, *, max_length: int | None, prompts: str | None, revision: str | None) -> SearchR3:
        """The model with these settings in place of its own."""
        ...


def open_with_model(
    address: str | Path,
    model: str | None = None,
    load: ModelLoader = SearchR3,
    *,
    max_length: int | None = None,
    prompts: str | None = None,
    revision: str | None = None,
) -> tuple[Store, SearchR3]:
    """A store, and the model that encoded it, or another one that encodes documents as that does.

    Args:
        address: of the store.
        model: the other one.
        load: how it is loaded.
        max_length: in place of that which the store was made with.
        prompts: in place of those.
        revision: in place of that.

    Raises:
        StoreError: there is no store, or the model's vectors do not fit into it.
        ModelError: the model cannot be loaded.
    """
    store = Store.open(address)
    info = store.info
    name = model or info.model
    encoder = load(
        name,
        max_length=max_length or info.fingerprint.max_length,
        prompts=prompts or info.prompts,
        revision=revision or (info.revision if name == info.model else None),
    )
    encoder.truncate_dim = info.fingerprint.truncate_dim
    info.fingerprint.check(Fingerprint.of(encoder, info.fingerprint.instruction), store.address)
    return store, encoder


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
