"""What the methods of both clients ask, and how answers are read.

Shapes: `N` texts, `D` vector size.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, TypedDict, TypeVar
from urllib.parse import quote

import httpx2
import numpy as np
from pydantic import BaseModel, ValidationError

from ..errors import ConfigError, DataError, SearchR3Error, UnavailableError
from ..modes import SearchMode
from .answers import (
    DocumentEntry,
    Embeddings,
    FilterField,
    RankedText,
    Reranking,
    SearchAnswer,
    ServerInfo,
    StoredDocument,
    Usage,
    WriteReport,
)
from .exchange import Call, Steps, content_of, error_of, exchange

PAGE = 1000
"""Documents that are listed by one request."""
_DOCUMENTS = "/v1/documents"
_STATUSES = {status.phrase.lower().replace(" ", "_"): int(status) for status in HTTPStatus}

A = TypeVar("A", bound=BaseModel)
Item = TypeVar("Item")


class SearchOptions(TypedDict, total=False):
    """How a query is searched; what is not given is as the server has it."""

    k: int
    """Documents wanted; 10 by default."""
    mode: SearchMode
    """Reason first, embed at once, or rank by words alone."""
    instruction: str
    """What is looked for; it follows the query."""
    filter: Mapping[str, Any]
    """Which documents are searched, such as `{"year": {"$gte": 2020}}`; see `serving.filters.to_sql`."""
    hybrid: bool
    """Ranks by words and by vectors are fused."""
    rerank: bool
    """The server's cross-encoder ranks the hits anew."""
    max_new_tokens: int
    """Reasoning budget; by default the model's own."""
    truncate: bool
    """A query that is too long loses its end; else it is an error."""


class _Deleted(BaseModel):
    deleted: int


class Calls:
    """The calls to one server, whose limits are asked for once."""

    def __init__(self, max_retries: int) -> None:
        self._max_retries = max_retries
        self._info: ServerInfo | None = None

    def info(self) -> Steps[ServerInfo]:
        """`GET /info`."""
        self._info = _read(ServerInfo, (yield from self._ask("GET", "/info")))
        return self._info

    def fields(self) -> Steps[list[FilterField]]:
        """`GET /v1/fields`."""
        answer = yield from self._ask("GET", "/v1/fields")
        try:
            return [_read(FilterField, one) for one in answer["fields"]]
        except (KeyError, TypeError) as error:
            raise _unlike(error) from error

    def health(self) -> Steps[None]:
        """`GET /health`, once."""
        yield from exchange(Call("GET", "/health"), 0)

    def embeddings(self, texts: str | Sequence[str], **fields: Any) -> Steps[Embeddings]:
        """`POST /v1/embeddings`, as often as the limits ask for."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        fields = {"model": "search-r3", "encoding_format": "base64", **_given(fields)}
        vectors, usage = [], Usage()
        for place, part in (yield from self._parts(texts, fields | {"input": []})):
            with _placed("texts", place, part, texts):
                answer = yield from self._ask("POST", "/v1/embeddings", fields | {"input": part})
            try:
                rows = [base64.b64decode(one["embedding"]) for one in answer["data"]]
                vectors.append(np.stack([np.frombuffer(row, dtype="<f4") for row in rows]).astype(np.float32))
            except (KeyError, TypeError, ValueError) as error:
                raise _unlike(error) from error
            usage += _read(Usage, answer["usage"])
        return Embeddings(np.concatenate(vectors), usage)

    def rerank(self, query: str, texts: Sequence[str], top_n: int | None = None, **fields: Any) -> Steps[Reranking]:
        """`POST /v2/rerank`, as often as the limits ask for."""
        texts = list(texts)
        fields = {"query": query, **_given(fields)}
        ranked, usage = [], Usage()
        for place, part in (yield from self._parts(texts, fields | {"documents": []})):
            with _placed("texts", place, part, texts):
                answer = yield from self._ask("POST", "/v2/rerank", fields | {"documents": part})
            one = _read(Reranking, answer)
            ranked += [RankedText(index=place + hit.index, score=hit.score) for hit in one.results]
            usage += one.usage
        return Reranking(results=sorted(ranked, key=lambda hit: -hit.score)[:top_n], usage=usage)

    def search(self, query: str, options: SearchOptions) -> Steps[SearchAnswer]:
        """`POST /v1/search`."""
        return _read(SearchAnswer, (yield from self._ask("POST", "/v1/search", {"query": query, **_given(options)})))

    def stream(self, query: str, options: SearchOptions) -> Steps[httpx2.Response]:
        """`POST /v1/search`, whose events are then read by `Events`."""
        body = _json({"query": query, **_given(options), "stream": True})
        return (yield from exchange(Call("POST", "/v1/search", body, stream=True), self._max_retries))

    def put_documents(self, documents: Sequence[Mapping[str, Any]]) -> Steps[WriteReport]:
        """`PUT /v1/documents`, as often as the limits ask for."""
        documents = [dict(one) for one in documents]
        report = WriteReport()
        for place, part in (yield from self._parts(documents, {"documents": []})):
            with _placed("documents", place, part, documents, "; those before are written"):
                report += _read(WriteReport, (yield from self._ask("PUT", _DOCUMENTS, {"documents": part})))
        return report

    def get_document(self, doc_id: str) -> Steps[StoredDocument]:
        """`GET /v1/documents/ID`."""
        if not doc_id:
            raise DataError("the id of a document is empty; list_documents gives ids")
        # A dot alone would be taken for a folder of the address.
        name = quote(doc_id, safe="").replace(".", "%2E")
        return _read(StoredDocument, (yield from self._ask("GET", f"{_DOCUMENTS}/{name}")))

    def list_documents(self, after: str, limit: int | None) -> Steps[list[DocumentEntry]]:
        """`GET /v1/documents`, page by page."""
        entries: list[DocumentEntry] = []
        while limit is None or len(entries) < limit:
            size = PAGE if limit is None else min(PAGE, limit - len(entries))
            page = yield from self._ask("GET", _DOCUMENTS, params={"after": after, "limit": size})
            try:
                entries += [_read(DocumentEntry, one) for one in page["documents"]]
                after = page["next"]
            except (KeyError, TypeError) as error:
                raise _unlike(error) from error
            if after is None:
                break
        return entries

    def delete_documents(self, ids: str | Sequence[str]) -> Steps[int]:
        """`DELETE /v1/documents`, as often as the limits ask for."""
        ids = [ids] if isinstance(ids, str) else list(ids)
        deleted = 0
        for place, part in (yield from self._parts(ids, {"ids": []})):
            with _placed("ids", place, part, ids, "; those before are deleted"):
                deleted += _read(_Deleted, (yield from self._ask("DELETE", _DOCUMENTS, {"ids": part}))).deleted
        return deleted

    def _ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        params: Mapping[str, str | int] | None = None,
    ) -> Steps[Any]:
        written = None if body is None else _json(body)
        return content_of((yield from exchange(Call(method, path, written, params), self._max_retries)))

    def _parts(self, items: list[Item], rest: Mapping[str, Any]) -> Steps[list[tuple[int, list[Item]]]]:
        """Runs of items that fit into one request each, with the place of their first; `rest`: the body without any."""
        if len(items) < 2:
            return [(0, items)]
        info = self._info or (yield from self.info())
        room = info.max_body_bytes - len(_json(rest))
        parts: list[tuple[int, list[Item]]] = []
        size = room
        for place, item in enumerate(items):
            more = len(_json(item)) + 1
            if size + more > room or len(parts[-1][1]) == info.max_client_batch_size:
                parts.append((place, []))
                size = 0
            parts[-1][1].append(item)
            size += more
        return parts


class Events:
    """The events of a streamed search, one after the other."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._hits: dict[str, Any] | None = None

    def take(self, event: httpx2.ServerSentEvent) -> str | SearchAnswer | None:
        """A piece of the reasoning, or the answer, with which a stream ends.

        Raises:
            SearchR3Error: the server failed.
        """
        try:
            data: Any = event.json()
            if event.event == "reasoning":
                return str(data["text"])
            if event.event == "hits":
                self._hits = dict(data)
            elif event.event == "error":
                raise error_of(_STATUSES.get(data["error"]["code"], 500), data["error"]["message"])
            elif event.event == "done" and self._hits is not None:
                return _read(SearchAnswer, self._hits | data)
        except (KeyError, TypeError, ValueError) as error:
            raise _unlike(error) from error
        return None

    def ended(self) -> UnavailableError:
        """What is raised where the answer has not come."""
        return UnavailableError(f"{self._url} ended the stream before its end; ask again")


def _json(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"this cannot be sent as JSON: {error}") from error


def _read(kind: type[A], content: Any) -> A:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise _unlike(error) from error


def _unlike(error: Exception) -> ConfigError:
    what = " ".join(str(error).split())[:200]
    return ConfigError(
        f"this is not the answer of a search-r3 server of this version ({what}); check the address and the versions"
    )


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


@contextmanager
def _placed(what: str, place: int, part: Sequence[object], whole: Sequence[object], else_: str = "") -> Iterator[None]:
    """An error about one of several requests says which: the server counts from the first item of each."""
    try:
        yield
    except SearchR3Error as error:
        if len(part) < len(whole):
            error.args = (f"{what} {place} to {place + len(part) - 1}: {error}{else_ if place else ''}",)
        raise
