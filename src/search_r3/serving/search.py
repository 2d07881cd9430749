"""Asking a store with a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..evaluation.search import Answer, Searcher
from ..model.embeddings import QueryEmbeddings
from ..model.encoder import SearchR3
from ..model.modes.gate import TOP
from ..retrieval.encoding.fingerprint import Fingerprint
from ..types import Array
from .filters import Filter
from .jobs import Embedded, Outcome
from .store import Hit, Store


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


NOT_ENCODED = Outcome([Embedded(np.zeros(0, np.float32), 0, False)], 0.0, 0.0)
"""Of a query that is searched for its words only."""


def hits_of(
    store: Store, query: str, outcome: Outcome, k: int, *, hybrid: bool = False, where: Filter | None
) -> list[Hit]:
    """What a store holds for a query that an engine has encoded; by its words alone where it is `NOT_ENCODED`."""
    words = outcome is NOT_ENCODED
    vectors, texts = None if words else outcome.vectors, [query] if words or hybrid else None
    [hits] = store.search(vectors, texts=texts, k=k, where=where)
    return list(hits)


def top_scores(store: Store, vectors: Array, where: Filter | None = None) -> Array:
    """The scores of the best documents, `Q x 10` (fewer columns where there are fewer), best first, for a gate."""
    scores = [[hit.score for hit in hits] for hits in store.search(vectors, k=TOP, where=where)]
    width = min(map(len, scores), default=0)
    return np.array([line[:width] for line in scores], dtype=np.float32).reshape(len(scores), width)


def answer_of(query: str, outcome: Outcome, hits: Sequence[Hit]) -> dict[str, Any]:
    """The query's reasoning and hits, as JSON."""
    [one] = outcome.texts
    reasoned = one.reasoning, one.reasoning_tokens, one.forced, one.truncated
    return Answer(*reasoned, list(hits), query, one.thought, one.gate).as_dict()


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
        return Answer.of(query, encoded, list(hits))

    def _top_scores(self, vectors: Array) -> Array:
        return top_scores(self.store, vectors, self.where)
