"""The clients against a server that is scripted: what is asked again, split, refused, and how a stream ends."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import httpx2
import numpy as np
import pytest

from search_r3 import errors
from search_r3.client import AsyncClient, Client, SearchAnswer
from search_r3.client import client as module

URL = "http://there:1"
INFO = {
    "model_id": "tiny", "version": "9", "dimension": 2, "dimensions": [], "max_input_length": {"reason": 9},
    "max_new_tokens": 9, "max_client_batch_size": 3, "max_concurrent_requests": 9, "max_body_bytes": 400,
    "timeout_seconds": 9.0, "default_mode": "reason", "store": True, "cross_encoder": False, "new": "unknown",
}  # fmt: skip
HIT = {"id": "a#0", "parent_id": "a", "rank": 1, "score": 0.5, "text": "tea"}
FOUND = {"query": "q", "reasoning": "so", "reasoning_tokens": 1, "forced": False, "truncated": False, "hits": [HIT]}
PRICE = {"usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}, "seconds": {"total": 0.1}}


class Server:
    """Answers by the function; keeps what it was asked."""

    def __init__(self, answer: Callable[[httpx2.Request, int], httpx2.Response]) -> None:
        self.answer = answer
        self.requests: list[httpx2.Request] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        if request.url.path == "/info":
            return httpx2.Response(200, json=INFO)
        return self.answer(request, len(self.requests))

    @property
    def bodies(self) -> list[Any]:
        return [json.loads(one.content) for one in self.requests if one.content]

    def client(self, **options: Any) -> Client:
        return Client(URL, http_client=httpx2.Client(transport=httpx2.MockTransport(self)), **options)

    def async_client(self, **options: Any) -> AsyncClient:
        return AsyncClient(URL, http_client=httpx2.AsyncClient(transport=httpx2.MockTransport(self)), **options)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody waits; what would have been waited is here."""
    waits: list[float] = []

    async def wait(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(module.time, "sleep", waits.append)
    monkeypatch.setattr(module.asyncio, "sleep", wait)
    monkeypatch.delenv("SEARCH_R3_TOKEN", raising=False)
    return waits


def refusal(status: int, message: str = "words", **headers: str) -> httpx2.Response:
    return httpx2.Response(status, json={"error": {"message": message, "code": "x"}}, headers=headers)


def encoded(request: httpx2.Request, _: int) -> httpx2.Response:
    """Vectors (length of the text, 1)."""
    texts = json.loads(request.content)["input"]
    rows = [base64.b64encode(np.array([len(text), 1], "<f4").tobytes()).decode() for text in texts]
    usage = {"prompt_tokens": len(texts), "completion_tokens": 2, "total_tokens": 0}
    return httpx2.Response(200, json={"data": [{"embedding": row} for row in rows], "usage": usage})


def both(server: Server, method: str, *args: Any, options: dict[str, Any] | None = None, **keywords: Any) -> Any:
    """What a method of the one client returns or raises, which is what the other's does, too."""

    async def asked() -> Any:
        async with server.async_client(**options or {}) as client:
            return await getattr(client, method)(*args, **keywords)

    def outcome(ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except errors.SearchR3Error as error:
            return error

    server.requests = []
    first = outcome(lambda: getattr(server.client(**options or {}), method)(*args, **keywords))
    asked_first, server.requests = server.requests, []
    second = outcome(lambda: asyncio.run(asked()))
    assert [(one.method, one.url, one.content) for one in asked_first] == [
        (one.method, one.url, one.content) for one in server.requests
    ]
    assert repr(first) == repr(second)
    if isinstance(first, Exception):
        raise first
    return first


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_when_it_says(status: int, waits: list[float]) -> None:
    server = Server(
        lambda request, count: (
            refusal(status, **{"Retry-After": "7"}) if count < 3 else httpx2.Response(200, json=FOUND)
        )
    )
    assert both(server, "search", "q").reasoning == "so"
    assert len(waits) == 4 and all(7 <= wait <= 7 * 1.25 for wait in waits)


def test_without_a_word_waits_grow_and_retries_end(waits: list[float]) -> None:
    server = Server(lambda request, count: refusal(503))
    with pytest.raises(errors.UnavailableError, match="words"):
        both(server, "search", "q", options={"max_retries": 3})
    assert len(waits) == 6
    assert 0.5 <= waits[0] <= 0.625 and 1 <= waits[1] <= 1.25 and 2 <= waits[2] <= 2.5
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("said", "least", "most"),
    [
        ("Fri, 01 Jan 2100 00:00:00 GMT", 0, 0),
        ("61", 0, 0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0, 0.01),
        ("soon", 0.5, 1),
    ],
)
def test_a_wait_may_be_a_date_and_is_not_endless(said: str, least: float, most: float, waits: list[float]) -> None:
    server = Server(lambda request, count: refusal(429, "the queue is full", **{"Retry-After": said}))
    with pytest.raises(errors.OverloadedError, match="the queue is full") as caught:
        server.client(max_retries=1).search("q")
    assert len(waits) == (1 if most else 0) and all(least <= wait <= most for wait in waits)
    assert caught.value.retry_after >= (61 if not most else 0)


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (400, errors.DataError, "words"),
        (401, errors.ConfigError, "words; give token="),
        (403, errors.ConfigError, "words"),
        (404, errors.NotFoundError, "words"),
        (413, errors.TooLargeError, "words"),
        (422, errors.DataError, "words"),
        (424, errors.ModelError, "words"),
        (504, errors.DeadlineError, "words"),
        (302, errors.ConfigError, "words"),
        (500, errors.UnavailableError, "words"),
    ],
)
def test_errors_are_the_packages_with_the_servers_message(
    status: int, kind: type[Exception], words: str, waits: list[float]
) -> None:
    server = Server(lambda request, count: refusal(status))
    with pytest.raises(kind, match=f"^{words}"):
        both(server, "search", "q")
    assert not waits and len(server.requests) == 1


def test_who_is_no_server_of_ours_is_named(waits: list[float]) -> None:
    page = Server(lambda request, count: httpx2.Response(200, text="<html>hello"))
    other = Server(lambda request, count: httpx2.Response(200, json={"hits": 3}))
    proxy = Server(lambda request, count: httpx2.Response(502, text="<h1>Bad Gateway"))
    with pytest.raises(errors.ConfigError, match=r"http://there:1/v1/search is no server of search-r3.*not JSON"):
        both(page, "search", "q")
    with pytest.raises(errors.ConfigError, match="not the answer of a search-r3 server"):
        both(other, "search", "q")
    with pytest.raises(errors.ConfigError, match="no server of search-r3"):
        list(page.client().stream("q"))
    with pytest.raises(errors.UnavailableError, match="answered 502: <h1>Bad Gateway"):
        both(proxy, "search", "q")
    for url in ("there:1", "ftp://there", "http://", "http://there:x"):
        with pytest.raises(errors.ConfigError):
            Client(url)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (httpx2.ConnectError("refused"), errors.UnavailableError, "cannot reach http://there:1: refused"),
        (httpx2.ConnectTimeout("slow"), errors.UnavailableError, "does not answer"),
        (httpx2.ReadTimeout("slow"), errors.DeadlineError, "longer timeout="),
        (httpx2.RemoteProtocolError("gone"), errors.UnavailableError, "before its answer was whole"),
        (httpx2.TooManyRedirects("round"), errors.ConfigError, "check the address"),
    ],
)
def test_what_goes_wrong_on_the_way_is_an_error_of_the_package(
    error: Exception, kind: type[Exception], words: str
) -> None:
    def failing(*_: object) -> httpx2.Response:
        raise error

    with pytest.raises(kind, match=words):
        both(Server(failing), "search", "q")
    assert both(Server(failing), "health") is False if kind is not errors.ConfigError else True


def test_texts_are_split_at_the_servers_limits(waits: list[float]) -> None:
    server = Server(encoded)
    lengths = [1, 2, 3, 4, 150, 151, 5, 6]
    embeddings = both(server, "encode_query", ["a" * length for length in lengths], "direct", instruction="Only tea.")
    parts = [[len(text) for text in body["input"]] for body in server.bodies]
    assert parts == [[1, 2, 3], [4, 150], [151, 5, 6]]
    assert all(len(one.content) <= INFO["max_body_bytes"] for one in server.requests)  # type: ignore[operator]
    assert embeddings.vectors[:, 0].tolist() == lengths and embeddings.vectors.dtype == np.float32
    assert embeddings.usage.prompt_tokens == 8 and embeddings.usage.total_tokens == 14
    assert {body["input_type"] for body in server.bodies} == {"query"}
    assert {(body["mode"], body["instruction"]) for body in server.bodies} == {("direct", "Only tea.")}
    server.requests.clear()
    client = server.client()
    client.encode_document("one text")  # no limit can split it
    assert server.bodies[0]["input_type"] == "document" and server.bodies[0]["input"] == ["one text"]
    client.encode_document(["a", "b"])
    client.encode_document(["a", "b"])
    paths = ["/v1/embeddings", "/info", "/v1/embeddings", "/v1/embeddings"]
    assert [one.url.path for one in server.requests] == paths


def test_a_body_may_be_as_large_as_the_limit_and_no_larger(waits: list[float]) -> None:
    server = Server(encoded)
    whole = INFO["max_body_bytes"]
    for length in range(80, 140):
        server.client().encode_document(["é" * length, "b" * 30])
    sizes = [len(one.content) for one in server.requests if one.content and len(json.loads(one.content)["input"]) == 2]
    assert sizes and max(sizes) <= whole  # type: ignore[operator]
    assert max(sizes) > whole - 4  # type: ignore[operator]


def test_an_error_in_one_of_several_requests_says_in_which(waits: list[float]) -> None:
    def second_fails(request: httpx2.Request, count: int) -> httpx2.Response:
        if b"bad" in request.content:
            return refusal(400, "document 'bad' has no text")
        return httpx2.Response(200, json={"documents": 3, "chunks": 4, "encoded": 4, **PRICE})

    server = Server(second_fails)
    documents = [{"id": name, "text": "tea"} for name in "abcd"]
    with pytest.raises(
        errors.DataError, match=r"^documents 3 to 4: document 'bad' has no text; those before are written$"
    ):
        both(server, "put_documents", [*documents[:3], {"id": "bad", "text": ""}, documents[3]])
    with pytest.raises(errors.DataError, match=r"^document 'bad' has no text$"):
        both(server, "put_documents", [{"id": "bad", "text": ""}])
    report = both(server, "put_documents", documents)
    assert (report.documents, report.chunks, report.usage.total_tokens) == (6, 8, 8)
    for wrong in (float("nan"), "\ud800", object()):
        with pytest.raises(errors.DataError, match="cannot be sent as JSON"):
            server.client().put_documents([{"id": "a", "text": "b", "metadata": {"x": wrong}}])


def test_rankings_of_several_requests_are_one(waits: list[float]) -> None:
    def ranked(request: httpx2.Request, _: int) -> httpx2.Response:
        texts = json.loads(request.content)["documents"]
        results = [{"index": place, "relevance_score": len(text)} for place, text in enumerate(texts)]
        return httpx2.Response(200, json={"results": sorted(results, key=lambda one: -one["relevance_score"]), **PRICE})

    server = Server(ranked)
    ranking = both(server, "rerank", "q", ["aa", "a", "aaaa", "aaa", "aaaaa"], top_n=4)
    assert [(hit.index, hit.score) for hit in ranking.results] == [(4, 5), (2, 4), (3, 3), (0, 2)]
    assert ranking.usage.completion_tokens == 2


def test_documents_are_listed_page_by_page_and_named_whatever_their_ids(
    waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ["a", "b", "c", "d", "e"]

    def answered(request: httpx2.Request, _: int) -> httpx2.Response:
        if request.url.path == "/v1/documents":
            after, limit = request.url.params["after"], int(request.url.params["limit"])
            rest = [one for one in ids if one > after]
            page = [{"id": one, "chunks": 1} for one in rest[:limit]]
            return httpx2.Response(
                200, json={"documents": page, "total": 5, "next": rest[limit - 1] if len(rest) > limit else None}
            )
        name = request.url.raw_path.decode().removeprefix("/v1/documents/")
        return httpx2.Response(200, json={"id": name, "parent_id": name, "text": "tea"})

    monkeypatch.setattr("search_r3.client.calls.PAGE", 2)
    server = Server(answered)
    assert [one.id for one in both(server, "list_documents")] == ids and len(server.requests) == 3
    assert [one.id for one in both(server, "list_documents", after="a", limit=3)] == ["b", "c", "d"]
    assert len(server.requests) == 2
    for doc_id, name in (("notes/a b.md", "notes%2Fa%20b%2Emd"), ("..", "%2E%2E"), ("a#1?x", "a%231%3Fx")):
        assert both(server, "get_document", doc_id).id == name
    with pytest.raises(errors.DataError, match="is empty"):
        both(server, "get_document", "")


def test_fields_are_what_a_filter_can_name(waits: list[float]) -> None:
    fields = [{"name": "year", "list": False, "values": [[2020, 3], [True, 1], ["x", 1]]}]
    server = Server(lambda request, count: httpx2.Response(200, json={"chunks": 5, "fields": fields}))
    [field] = both(server, "fields")
    assert (field.name, field.list, field.values) == ("year", False, ((2020, 3), (True, 1), ("x", 1)))
    assert field.values[1][0] is True and server.requests[0].url.path == "/v1/fields"


def events(*named: tuple[str, Any]) -> str:
    return "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in named)


def streaming(text: str) -> Server:
    headers = {"content-type": "text/event-stream; charset=utf-8"}
    return Server(lambda request, count: httpx2.Response(200, text=text, headers=headers))


def streamed(server: Server) -> list[Any]:
    async def asked() -> list[Any]:
        async with server.async_client() as client, aclosing(client.stream("q", k=3)) as stream:
            return [one async for one in stream]

    pieces = list(server.client().stream("q", k=3))
    assert asyncio.run(asked()) == pieces
    assert server.bodies[0] == {"query": "q", "k": 3, "stream": True}
    return pieces


def test_a_stream_is_pieces_and_then_the_whole_answer() -> None:
    text = events(("reasoning", {"text": "s"}), ("reasoning", {"text": "o"}), ("hits", FOUND), ("done", PRICE))
    *pieces, answer = streamed(streaming(text))
    assert pieces == ["s", "o"] and isinstance(answer, SearchAnswer)
    assert answer.hits[0].parent_id == "a" and answer.usage.total_tokens == 4 and answer.seconds == {"total": 0.1}


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        (events(("reasoning", {"text": "s"}), ("hits", FOUND)), errors.UnavailableError, "ended the stream before"),
        (events(("done", PRICE)), errors.UnavailableError, "ended the stream before"),
        ("", errors.UnavailableError, "ended the stream before"),
        (
            events(("hits", FOUND), ("error", {"error": {"message": "the disk is gone", "code": "gateway_timeout"}})),
            errors.DeadlineError,
            "^the disk is gone$",
        ),
        (events(("reasoning", {})), errors.ConfigError, "not the answer"),
        ("event: hits\ndata: {\n\n", errors.ConfigError, "not the answer"),
    ],
)
def test_a_stream_without_its_end_is_an_error(text: str, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        list(streaming(text).client().stream("q"))

    async def asked() -> None:
        async for _ in streaming(text).async_client().stream("q"):
            pass

    with pytest.raises(kind, match=words):
        asyncio.run(asked())


def test_a_stream_that_is_refused_is_asked_for_again(waits: list[float]) -> None:
    text = events(("hits", FOUND), ("done", PRICE))
    headers = {"content-type": "text/event-stream"}
    server = Server(
        lambda request, count: (
            refusal(429, **{"Retry-After": "2"}) if count == 1 else httpx2.Response(200, text=text, headers=headers)
        )
    )
    [answer] = list(server.client().stream("q"))
    assert isinstance(answer, SearchAnswer) and len(waits) == 1


def test_a_token_comes_from_the_call_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(lambda request, count: httpx2.Response(200, json=FOUND))
    monkeypatch.setenv("SEARCH_R3_TOKEN", "one")
    server.client().search("q")
    server.client(token="two").search("q")
    monkeypatch.delenv("SEARCH_R3_TOKEN")
    server.client().search("q")
    sent = [one.headers.get("authorization") for one in server.requests]
    assert sent == ["Bearer one", "Bearer two", None]


def test_a_timeout_is_for_an_answer_and_shorter_for_a_connection() -> None:
    server = Server(lambda request, count: httpx2.Response(200, json=FOUND))
    for seconds in (7.0, 70.0):
        both(server, "search", "q", options={"timeout": seconds})
        waited = server.requests[0].extensions["timeout"]
        assert (waited["read"], waited["connect"]) == (seconds, min(seconds, 10.0))


def test_the_clients_have_the_same_methods() -> None:
    import inspect

    def methods(kind: type) -> dict[str, Any]:
        names = [name for name in dir(kind) if not name.startswith("_")]
        return {name: list(inspect.signature(getattr(kind, name)).parameters.values()) for name in names}

    assert methods(Client) == methods(AsyncClient)
