"""What adapters ask: a server, or a model and a store in this process, which answer in the same way."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack

from ..client import Client, Embeddings, SearchAnswer, SearchHit, SearchOptions, Usage
from ..errors import ConfigError, DataError, NotFoundError
from ..modes import Mode

if TYPE_CHECKING:
    from ..model.encoder import SearchR3
    from ..serving.jobs import Outcome
    from ..serving.store import Store


class InProcess:
    """A model, and a store where there is one, asked as `Client` asks a server; threads share the decoder.

    Args:
        model: encodes; the store's vectors must be its own.
        store: what is searched.

    Example:
        >>> from search_r3 import SearchR3
        >>> with InProcess(SearchR3("builtin")) as source:
        ...     source.encode_query("what do people pay with in Tashkent?", "direct").vectors.shape
        (1, 192)
    """

    def __init__(self, model: SearchR3, store: Store | None = None) -> None:
        from ..serving.engine import EngineThread

        self._engine = EngineThread(model, max_queue=sys.maxsize)
        self._store = store

    @classmethod
    def open(cls, source: str | Path) -> InProcess:
        """A store with its model; or a model alone, by its directory or hub id.

        Raises:
            StoreError, ModelError: it cannot be read.
        """
        from ..model.encoder import SearchR3
        from ..serving.database import exists
        from ..serving.search import open_with_model

        if not exists(source):
            return cls(SearchR3(source))
        store, model = open_with_model(source)
        return cls(model, store)

    def encode_query(
        self, texts: str | Sequence[str], mode: Mode | None = None, *, instruction: str = ""
    ) -> Embeddings:
        """As `Client.encode_query`."""
        outcome = self._encode(texts, mode, instruction=instruction)
        return Embeddings(outcome.vectors, _price(outcome))

    def encode_document(self, texts: str | Sequence[str]) -> Embeddings:
        """As `Client.encode_document`."""
        outcome = self._encode(texts, "document", instruction=self._document_instruction)
        return Embeddings(outcome.vectors, _price(outcome))

    def search(self, query: str, **options: Unpack[SearchOptions]) -> SearchAnswer:
        """As `Client.search`.

        Raises:
            NotFoundError: there is no store.
            DataError: the query is empty.
            ConfigError: a cross-encoder is asked for, which servers alone have.
        """
        from ..serving.search import NOT_ENCODED, answer_of, hits_of

        if self._store is None:
            raise NotFoundError("there is a model and no store; name a store (search-r3 index) or a server")
        if not query.strip():
            raise DataError("the query is empty; give a text with at least one visible character")
        if options.get("rerank"):
            raise ConfigError("rerank: a cross-encoder is a server's (search-r3 serve --reranker); leave it out")
        started, mode = time.perf_counter(), options.get("mode")
        where, hybrid = options.get("filter"), options.get("hybrid", False)
        outcome = NOT_ENCODED
        if mode != "bm25":
            outcome = self._encode(
                *(query, mode, where),
                instruction=options.get("instruction", ""),
                max_new_tokens=options.get("max_new_tokens"),
                truncate=options.get("truncate", False),
            )
        hits = hits_of(self._store, query, outcome, options.get("k", 10), hybrid=hybrid, where=where)
        answer = answer_of(query, outcome, hits)
        seconds = {"total": time.perf_counter() - started}
        return SearchAnswer.model_validate(answer | {"usage": _price(outcome), "seconds": seconds})

    def close(self) -> None:
        """End its thread; it can't be asked any more."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _document_instruction(self) -> str:
        return "" if self._store is None else self._store.info.fingerprint.instruction

    def _encode(
        self,
        texts: str | Sequence[str],
        kind: Literal[Mode, "document"] | None,
        where: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Outcome:
        from ..serving.auto import encode_auto

        listed = [texts] if isinstance(texts, str) else list(texts)
        kind = kind or self._engine.model.backbone.settings.mode
        if kind == "auto":
            return encode_auto(self._engine, listed, self._store, where, **options)
        return self._engine.submit(listed, kind, **options).result()


Source = str | Path | Client | InProcess
"""A server's address (`http://...`), a store, a model (directory or hub id); or what was made of one already."""


def connect(source: Source) -> Client | InProcess:
    """What answers there; a server's token is the environment's `SEARCH_R3_TOKEN`, or that of the `Client` given.

    Raises:
        SearchR3Error: a store or a model cannot be read.
    """
    if isinstance(source, Client | InProcess):
        return source
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        return Client(source)
    return InProcess.open(source)


def facts_of(hit: SearchHit, answer: SearchAnswer) -> dict[str, Any]:
    """What frameworks keep beside a text: the document's metadata, where it is from, the score, the reasoning."""
    names = "parent_id", "title", "path", "page", "start", "end"
    place = {name: value for name in names if (value := getattr(hit, name)) not in ("", None)}
    return {**hit.metadata, **place, "score": hit.score, "reasoning": answer.reasoning}


def given(**options: Any) -> SearchOptions:
    """The options that are not None."""
    chosen: Any = {name: value for name, value in options.items() if value is not None}
    options_: SearchOptions = chosen
    return options_


def _price(outcome: Outcome) -> Usage:
    return Usage(prompt_tokens=outcome.prompt_tokens, completion_tokens=outcome.reasoning_tokens)
