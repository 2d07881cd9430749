"""The tools of agents, asked by the SDK's own client."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mcp.types
import pytest
from mcp import Client

from search_r3 import errors
from search_r3.data.documents import Chunk
from search_r3.model.encoder import SearchR3
from search_r3.serving import Fingerprint, Store
from search_r3.serving.engine import EngineThread
from search_r3.serving.server import ServerSettings
from search_r3.serving.server.mcp import create_mcp
from search_r3.serving.server.service import Service

WAIT = 60
TEXTS = ("Green tea is not oxidised.", "Black tea is oxidised.", "A kettle needs vinegar.")


def chunk(name: str, number: int, text: str, **facts: Any) -> Chunk:
    start = 100 * number
    values = {"parent_id": name, "start": start, "end": start + len(text), "content_hash": name, "source": "/notes"}
    return Chunk(f"{name}#{number}", text, **{"title": ""} | values | facts)


@pytest.fixture(scope="module")
def store(tiny_path: Path) -> Store:
    encoder = SearchR3(tiny_path, device="cpu")
    store = Store.create("memory://agents", Fingerprint.of(encoder))
    metadata = {"year": 2020, "lang": "en"}
    chunks = [
        chunk("tea.pdf", 0, TEXTS[0], title="Tea", path="/my notes/tea.pdf", page=1, metadata=metadata),
        chunk("tea.pdf", 1, TEXTS[1], title="Tea", path="/my notes/tea.pdf", page=2, metadata=metadata),
        chunk("a kettle", 0, TEXTS[2], metadata={"year": 1990}),
        chunk("site", 0, "A web page about boats.", metadata={"url": "https://boats.example/1", "document": "a boat"}),
    ]
    store.upsert(chunks, encoder.encode_document([one.full_text for one in chunks]))
    return store


@pytest.fixture(scope="module")
def engine(tiny_path: Path) -> Iterator[EngineThread]:
    with EngineThread(SearchR3(tiny_path, device="cpu", max_new_tokens=8), slots=4, max_queue=8) as engine:
        yield engine


@pytest.fixture(scope="module")
def service(engine: EngineThread, store: Store) -> Service:
    return Service(engine, ServerSettings(), store, None)


def ask(service: Service, tool: str, **arguments: Any) -> mcp.types.CallToolResult:
    async def asked() -> mcp.types.CallToolResult:
        async with Client(create_mcp(service)) as client:
            return await client.call_tool(tool, arguments)

    return asyncio.run(asked())


def test_the_tools_are_those_that_deep_research_asks_for(service: Service) -> None:
    async def listed() -> list[mcp.types.Tool]:
        async with Client(create_mcp(service)) as client:
            assert client.server_info is not None and client.server_info.name == "search-r3"
            assert "search" in (client.instructions or "")
            return (await client.list_tools()).tools

    search, fetch = asyncio.run(listed())
    assert (search.name, search.input_schema["required"]) == ("search", ["query"])
    assert (fetch.name, fetch.input_schema["required"]) == ("fetch", ["id"])
    assert {"k", "mode", "filter", "hybrid", "texts"} == search.input_schema["properties"].keys() - {"query"}
    assert all(tool.annotations and tool.annotations.read_only_hint and tool.output_schema for tool in (search, fetch))


def test_search_gives_ids_titles_and_urls_in_both_forms(service: Service, store: Store) -> None:
    answer = ask(service, "search", query="where is the tea?")
    assert not answer.is_error and len(answer.content) == 1
    assert json.loads(answer.content[0].text) == answer.structured_content
    results = {one["id"].partition("#")[0]: one for one in answer.structured_content["results"]}
    assert all(one.keys() == {"id", "title", "url"} for one in results.values())
    page = results["tea.pdf"]["id"][-1]  # of a document the best passage alone
    assert results["tea.pdf"]["url"] == f"file:///my%20notes/tea.pdf#page={int(page) + 1}"
    assert {one["title"] for one in results.values()} == {"Tea", "a kettle", "site"}
    assert results["site"]["url"] == "https://boats.example/1" and results["a kettle"]["url"] == "search-r3:a%20kettle"
    [queried] = store.search(service.engine.model.encode_query("where is the tea?").vectors, k=10)
    assert [one["id"] for one in answer.structured_content["results"]] == [hit.chunk.doc_id for hit in queried]


def test_further_arguments_are_those_of_the_route(service: Service) -> None:
    words = ask(service, "search", query="vinegar", mode="bm25", texts=True, k=1).structured_content["results"]
    assert [(one["id"], one["text"]) for one in words] == [("a kettle#0", TEXTS[2])]
    for wanted in ({"year": {"$gte": 2000}}, '{"lang": "en"}'):  # some agents send objects as text
        some = ask(service, "search", query="tea", filter=wanted, hybrid=True, mode="direct").structured_content
        assert [one["title"] for one in some["results"]] == ["Tea"]


def test_hybrid_search_fuses_words_and_vectors(service: Service, store: Store) -> None:
    orders = []
    for word in ("oxidised", "vinegar", "boats"):
        vectors = service.engine.model.encode_query(word, "direct").vectors
        fused = ask(service, "search", query=word, mode="direct", hybrid=True).structured_content["results"]
        expected = [[hit.chunk.doc_id for hit in store.search(vectors, texts=texts)[0]] for texts in ([word], None)]
        assert [one["id"] for one in fused] == expected[0]
        orders.append(expected)
    assert any(with_words != alone for with_words, alone in orders)


def test_fetch_gives_a_passage_and_by_its_document_all_of_it(service: Service) -> None:
    passage = ask(service, "fetch", id="tea.pdf#1").structured_content
    assert passage.keys() == {"id", "title", "text", "url", "metadata"}
    assert (passage["id"], passage["title"], passage["text"]) == ("tea.pdf#1", "Tea", TEXTS[1])
    assert passage["url"].endswith("tea.pdf#page=2") and passage["metadata"]["page"] == 2
    assert passage["metadata"] | {"document": "tea.pdf", "year": 2020, "source": "/notes"} == passage["metadata"]
    whole = ask(service, "fetch", id=passage["metadata"]["document"]).structured_content
    assert whole["text"] == f"{TEXTS[0]}\n\n\n{TEXTS[1]}" and whole["id"] == "tea.pdf"
    other = ask(service, "fetch", id="site#0").structured_content
    assert other["metadata"]["document"] == "site"  # whatever a field of that name says


@pytest.mark.parametrize(
    ("tool", "arguments", "words"),
    [
        ("search", {"query": " "}, "the query is empty"),
        ("search", {"query": "tea " * 900}, "is longer than"),
        ("search", {"query": "tea", "filter": {"year": {"$no": 1}}}, "unknown operator '$no'"),
        ("search", {"query": "tea", "k": 0}, "k"),
        ("search", {}, "query"),
        ("fetch", {"id": "nothing"}, "there is no document 'nothing'"),
    ],
)
def test_what_is_wrong_is_an_error_of_the_tool(
    tool: str, arguments: dict[str, Any], words: str, service: Service
) -> None:
    answer = ask(service, tool, **arguments)
    assert answer.is_error and words in answer.content[0].text


def test_a_full_queue_says_when_to_ask_again_and_a_fault_says_nothing(
    service: Service, engine: EngineThread, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(error: Exception) -> str:
        def submit(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(engine, "submit", submit)
        answer = ask(service, "search", query="tea")
        assert answer.is_error
        return answer.content[0].text

    assert "try again in 7 seconds" in failing(errors.OverloadedError("full; try again", 7))
    assert "secret" not in failing(RuntimeError("a secret path")) and "a secret path" in caplog.text


def test_without_a_store_the_tools_say_so(engine: EngineThread) -> None:
    service = Service(engine, ServerSettings(), None, None)
    for answer in (ask(service, "search", query="tea"), ask(service, "fetch", id="a")):
        assert answer.is_error and "serve a store" in answer.content[0].text


def test_an_agent_is_told_of_the_tools_while_the_model_is_loaded(service: Service) -> None:
    loaded = threading.Event()

    def load() -> Service:
        assert loaded.wait(WAIT)
        return service

    async def asked() -> mcp.types.CallToolResult:
        async with Client(create_mcp(load)) as client:
            assert len((await client.list_tools()).tools) == 2
            call = asyncio.ensure_future(client.call_tool("search", {"query": "tea"}))
            await client.list_tools()
            assert not call.done()
            loaded.set()
            return await call

    assert asyncio.run(asked()).structured_content["results"]


def test_a_model_that_cannot_be_loaded_is_an_error_of_each_call() -> None:
    def load() -> Service:
        raise errors.ModelError("no model there; name another")

    async def asked() -> list[mcp.types.CallToolResult]:
        async with Client(create_mcp(load)) as client:
            return [await client.call_tool("search", {"query": "tea"}), await client.call_tool("fetch", {"id": "a"})]

    for answer in asyncio.run(asked()):
        assert answer.is_error and "no model there; name another" in answer.content[0].text


def test_a_filter_that_no_document_can_fit_is_told_from_one_that_none_fits(service: Service) -> None:
    assert ask(service, "search", query="tea", filter={"year": 1066}).structured_content == {"results": []}
    answer = ask(service, "search", query="tea", filter={"yaer": 2020, "lang": "en", "path": "a"})
    assert answer.is_error and "has 'yaer'" in answer.content[0].text and "year" in answer.content[0].text


def test_a_call_that_is_given_up_frees_what_it_holds(service: Service, engine: EngineThread) -> None:
    async def given_up() -> None:
        submitted = asyncio.Event()
        loop = asyncio.get_running_loop()
        submit = service.submit

        async def watched(*args: Any, **options: Any) -> Any:
            future = await submit(*args, **options)
            futures.append(future)
            loop.call_soon(submitted.set)
            return future

        service.submit = watched  # type: ignore[method-assign]
        async with Client(create_mcp(service)) as client:
            call = asyncio.ensure_future(client.call_tool("search", {"query": "tea"}))
            await submitted.wait()
            call.cancel()
            async with asyncio.timeout(WAIT):
                while not futures[0].done():
                    await asyncio.sleep(0.001)

    futures: list[Any] = []
    step = engine._decoder.step
    engine._decoder.step = lambda: []  # type: ignore[method-assign]  # never done
    try:
        asyncio.run(given_up())
    finally:
        engine._decoder.step = step  # type: ignore[method-assign]
        del service.submit  # type: ignore[attr-defined]
    assert futures[0].cancelled()
