"""A plugin of `llm` (https://llm.datasette.io): embedding models, one for queries and one for documents.

`llm` does not say which of the two a text is, so each has a model of its own. `SEARCH_R3_SOURCE` names a server, a
store or a model; by default it is the server of this machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Literal

from ..client import Client
from ..client.client import DEFAULT_URL
from ..errors import SearchR3Error
from ..extras import extra
from .source import InProcess, connect

with extra("llm"):
    from click import ClickException
    from llm import hookimpl
    from llm.models import EmbeddingModel

BATCH = 256
"""Texts that are encoded together."""


class SearchR3Model(EmbeddingModel):
    """Vectors of queries, or of documents."""

    batch_size = BATCH

    def __init__(self, kind: Literal["query", "document"]) -> None:
        self.model_id = f"search-r3-{kind}"
        self._kind = kind

    @cached_property
    def _client(self) -> Client | InProcess:
        return connect(os.environ.get("SEARCH_R3_SOURCE") or DEFAULT_URL)

    def embed_batch(self, items: Iterable[str | bytes], *, key: str | None = None) -> Iterator[list[float]]:
        """A vector for each text.

        Raises:
            ClickException: what is wrong, which commands of `llm` show as one line.
        """
        texts = [str(item) for item in items]
        if not texts:
            return
        try:
            encode = self._client.encode_query if self._kind == "query" else self._client.encode_document
            vectors = encode(texts).vectors
        except SearchR3Error as error:
            raise ClickException(str(error)) from error
        yield from vectors.tolist()


@hookimpl
def register_embedding_models(register: Callable[..., None]) -> None:
    """Called by `llm`."""
    register(SearchR3Model("query"))
    register(SearchR3Model("document"))
