"""The clients, for programs with and without an event loop."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from typing import Any, Self, TypeVar, Unpack

import httpx2

from ..errors import ConfigError, DeadlineError, UnavailableError
from ..modes import Mode
from .answers import (
    DocumentEntry,
    Embeddings,
    FilterField,
    Reranking,
    SearchAnswer,
    ServerInfo,
    StoredDocument,
    WriteReport,
)
from .calls import Calls, Events, SearchOptions
from .exchange import Call, Steps, one_error

DEFAULT_URL = "http://127.0.0.1:8765"
"""Where `search-r3 serve` listens."""
_CONNECT = 10.0
# A server closes idle connections after 5 seconds; one that is used at that moment would fail.
_LIMITS = httpx2.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=3.0)

T = TypeVar("T")


class _Base:
    """What both clients know of their server."""

    def __init__(self, url: str, token: str | None, timeout: float, max_retries: int) -> None:
        with one_error(url):
            parts = httpx2.URL(url)
        if parts.scheme not in ("http", "https") or not parts.host:
            raise ConfigError(f"{url!r} is no address of a server; expected for instance {DEFAULT_URL}")
        self.url = url.rstrip("/")
        token = token or os.environ.get("SEARCH_R3_TOKEN")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._timeout = httpx2.Timeout(timeout, connect=min(timeout, _CONNECT))
        self._calls = Calls(max_retries)

    def _request(self, http: httpx2.Client | httpx2.AsyncClient, call: Call) -> httpx2.Request:
        headers = self._headers | ({"Content-Type": "application/json"} if call.body is not None else {})
        return http.build_request(
            *(call.method, f"{self.url}{call.path}"),
            content=call.body,
            params=call.params,
            headers=headers,
            timeout=self._timeout,
        )


class Client(_Base):
    """A client of `search-r3 serve`; threads may share one. In a `with` block it is closed at the end.

    Where the server is busy (429, 503) it is asked again when it says (`Retry-After`). What is too much for one request
    goes in several, as the limits in `/info` say.

    Args:
        url: of the server.
        token: what the server asks for; by default the environment's `SEARCH_R3_TOKEN`.
        timeout: seconds to wait for an answer. The server itself gives a request up after 300 unless told otherwise.
        max_retries: how often a busy server is asked again.
        http_client: for certificates, proxies and the like; it is not closed with this one.

    Raises:
        ConfigError: the address is none. Of methods: there is another server, or the token is wrong.
        DataError, NotFoundError, TooLargeError: of methods: what was asked cannot be had; the message is the server's.
        OverloadedError: of methods: the server is still busy after all retries.
        DeadlineError: of methods: it was not answered in time, there or here.
        UnavailableError: of methods: there is no server, it ends, or the connection broke.
        ModelError: of methods: the model failed.

    Example:
        >>> with Client("http://127.0.0.1:8765") as client:  # doctest: +SKIP
        ...     for hit in client.search("which tea is not oxidised?", k=3).hits:
        ...         print(hit.score, hit.parent_id, hit.text)
    """

    _own = False

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        token: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 5,
        http_client: httpx2.Client | None = None,
    ) -> None:
        super().__init__(url, token, timeout, max_retries)
        self._http = http_client or httpx2.Client(limits=_LIMITS)
        self._own = http_client is None

    def encode_query(
        self,
        texts: str | Sequence[str],
        mode: Mode | None = None,
        *,
        instruction: str = "",
        max_new_tokens: int | None = None,
        dimensions: int | None = None,
        truncate: bool = False,
    ) -> Embeddings:
        """Vectors of queries.

        Args:
            texts: a single one counts as one.
            mode: `reason` or `direct`; by default the server's.
            instruction: what is looked for; it follows each text.
            max_new_tokens: reasoning budget; by default the model's own.
            dimensions: the first ones of each vector alone, if the server says that the model was trained for it.
            truncate: texts that are too long lose their ends; else they are an error.
        """
        fields = {"mode": mode, "instruction": instruction, "max_new_tokens": max_new_tokens}
        sizes = {"dimensions": dimensions, "truncate": truncate}
        return self._run(self._calls.embeddings(texts, input_type="query", **fields, **sizes))

    def encode_document(
        self, texts: str | Sequence[str], *, dimensions: int | None = None, truncate: bool = False
    ) -> Embeddings:
        """Vectors of documents, with the instruction of the server's store; arguments as in `encode_query`."""
        sizes = {"dimensions": dimensions, "truncate": truncate}
        return self._run(self._calls.embeddings(texts, input_type="document", **sizes))

    def search(self, query: str, **options: Unpack[SearchOptions]) -> SearchAnswer:
        """The best documents for a query, with the reasoning and its price; options as in `SearchOptions`."""
        return self._run(self._calls.search(query, options))

    def stream(self, query: str, **options: Unpack[SearchOptions]) -> Iterator[str | SearchAnswer]:
        """Pieces of the reasoning as the model writes them, then the answer that `search` gives.

        Closing the iterator cancels the request.

        Raises:
            UnavailableError: the stream ended before the answer was whole.
        """
        response = self._run(self._calls.stream(query, options))
        events = Events(self.url)
        with one_error(self.url), closing(response):
            for event in httpx2.EventSource(response, max_event_size=None):
                if (one := events.take(event)) is not None:
                    yield one
                if isinstance(one, SearchAnswer):
                    return
        raise events.ended()

    def rerank(
        self,
        query: str,
        texts: Sequence[str],
        *,
        top_n: int | None = None,
        instruction: str = "",
        truncate: bool = False,
    ) -> Reranking:
        """Rank texts for a query: by the server's cross-encoder, else by cosine with the query, in the server's mode.

        Args:
            query: is encoded once for each request that the texts take.
            texts: what is ranked.
            top_n: the best of them alone.
            instruction: follows the query.
            truncate: as in `encode_query`.
        """
        return self._run(self._calls.rerank(query, texts, top_n, instruction=instruction, truncate=truncate))

    def put_documents(self, documents: Sequence[Mapping[str, Any]]) -> WriteReport:
        """Write documents; each replaces the one of its id. When this returns they are on the disk and are found.

        What fits into one request is written whole or not at all; of several, an error says from which place on
        nothing was written.

        Args:
            documents: `{"id", "text", "title", "metadata"}`, the last two optional.
        """
        return self._run(self._calls.put_documents(documents))

    def get_document(self, doc_id: str) -> StoredDocument:
        """A document, or one chunk of it, by its id.

        Raises:
            NotFoundError: there is none.
        """
        return self._run(self._calls.get_document(doc_id))

    def list_documents(self, *, after: str = "", limit: int | None = None) -> list[DocumentEntry]:
        """Documents by their ids: those behind `after`, so many at most."""
        return self._run(self._calls.list_documents(after, limit))

    def delete_documents(self, ids: str | Sequence[str]) -> int:
        """Remove documents, and return how many there were; unknown ids are passed over."""
        return self._run(self._calls.delete_documents(ids))

    def fields(self) -> list[FilterField]:
        """What the `filter` of a search can name, of the first 10,000 chunks."""
        return self._run(self._calls.fields())

    def info(self) -> ServerInfo:
        """The model and the server's limits."""
        return self._run(self._calls.info())

    def health(self) -> bool:
        """Whether a server is there and takes requests."""
        try:
            self._run(self._calls.health())
        except (UnavailableError, DeadlineError):
            return False
        return True

    def close(self) -> None:
        """Close the connections."""
        if self._own:
            self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:  # adapters of frameworks hold one for as long as they live
        self.close()

    def _run(self, steps: Steps[T]) -> T:
        response: httpx2.Response | None = None
        with one_error(self.url):
            while True:
                try:
                    step = steps.send(response)
                except StopIteration as end:
                    result: T = end.value
                    return result
                if isinstance(step, Call):
                    response = self._send(step)
                else:
                    time.sleep(step)

    def _send(self, call: Call) -> httpx2.Response:
        response = self._http.send(self._request(self._http, call), stream=call.stream)
        if response.status_code != httpx2.codes.OK:
            response.read()
        return response


class AsyncClient(_Base):
    """`Client` for programs with an event loop: the same arguments, methods and errors.

    Example:
        >>> async def ask(query: str) -> None:
        ...     async with AsyncClient("http://127.0.0.1:8765") as client:
        ...         async for piece in client.stream(query):
        ...             print(piece if isinstance(piece, str) else piece.hits)
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        token: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 5,
        http_client: httpx2.AsyncClient | None = None,
    ) -> None:
        super().__init__(url, token, timeout, max_retries)
        self._http = http_client or httpx2.AsyncClient(limits=_LIMITS)
        self._own = http_client is None

    async def encode_query(
        self,
        texts: str | Sequence[str],
        mode: Mode | None = None,
        *,
        instruction: str = "",
        max_new_tokens: int | None = None,
        dimensions: int | None = None,
        truncate: bool = False,
    ) -> Embeddings:
        """As `Client.encode_query`."""
        fields = {"mode": mode, "instruction": instruction, "max_new_tokens": max_new_tokens}
        sizes = {"dimensions": dimensions, "truncate": truncate}
        return await self._run(self._calls.embeddings(texts, input_type="query", **fields, **sizes))

    async def encode_document(
        self, texts: str | Sequence[str], *, dimensions: int | None = None, truncate: bool = False
    ) -> Embeddings:
        """As `Client.encode_document`."""
        sizes = {"dimensions": dimensions, "truncate": truncate}
        return await self._run(self._calls.embeddings(texts, input_type="document", **sizes))

    async def search(self, query: str, **options: Unpack[SearchOptions]) -> SearchAnswer:
        """As `Client.search`."""
        return await self._run(self._calls.search(query, options))

    async def stream(self, query: str, **options: Unpack[SearchOptions]) -> AsyncIterator[str | SearchAnswer]:
        """As `Client.stream`; who leaves before the answer closes the iterator (`contextlib.aclosing`)."""
        response = await self._run(self._calls.stream(query, options))
        events = Events(self.url)
        with one_error(self.url):
            async with aclosing(response):
                async for event in httpx2.EventSource(response, max_event_size=None):
                    if (one := events.take(event)) is not None:
                        yield one
                    if isinstance(one, SearchAnswer):
                        return
        raise events.ended()

    async def rerank(
        self,
        query: str,
        texts: Sequence[str],
        *,
        top_n: int | None = None,
        instruction: str = "",
        truncate: bool = False,
    ) -> Reranking:
        """As `Client.rerank`."""
        return await self._run(self._calls.rerank(query, texts, top_n, instruction=instruction, truncate=truncate))

    async def put_documents(self, documents: Sequence[Mapping[str, Any]]) -> WriteReport:
        """As `Client.put_documents`."""
        return await self._run(self._calls.put_documents(documents))

    async def get_document(self, doc_id: str) -> StoredDocument:
        """As `Client.get_document`."""
        return await self._run(self._calls.get_document(doc_id))

    async def list_documents(self, *, after: str = "", limit: int | None = None) -> list[DocumentEntry]:
        """As `Client.list_documents`."""
        return await self._run(self._calls.list_documents(after, limit))

    async def delete_documents(self, ids: str | Sequence[str]) -> int:
        """As `Client.delete_documents`."""
        return await self._run(self._calls.delete_documents(ids))

    async def fields(self) -> list[FilterField]:
        """As `Client.fields`."""
        return await self._run(self._calls.fields())

    async def info(self) -> ServerInfo:
        """As `Client.info`."""
        return await self._run(self._calls.info())

    async def health(self) -> bool:
        """As `Client.health`."""
        try:
            await self._run(self._calls.health())
        except (UnavailableError, DeadlineError):
            return False
        return True

    async def close(self) -> None:
        """Close the connections."""
        if self._own:
            await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, steps: Steps[T]) -> T:
        response: httpx2.Response | None = None
        with one_error(self.url):
            while True:
                try:
                    step = steps.send(response)
                except StopIteration as end:
                    result: T = end.value
                    return result
                if isinstance(step, Call):
                    response = await self._send(step)
                else:
                    await asyncio.sleep(step)

    async def _send(self, call: Call) -> httpx2.Response:
        response = await self._http.send(self._request(self._http, call), stream=call.stream)
        if response.status_code != httpx2.codes.OK:
            await response.aread()
        return response
