"""Agents and rollouts that ask a server over a real port, or start one of their own over stdio."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx2
import numpy as np
import pytest
import uvicorn
from mcp import Client, StdioServerParameters

from search_r3.data.documents import chunks_of
from search_r3.model.encoder import SearchR3
from search_r3.serving import Fingerprint, Store
from search_r3.serving.engine import EngineThread
from search_r3.serving.server import ServerSettings, create_app
from tests import chat_server
from tests.conftest import call, small_collection
from tests.rollouts import roll

WAIT = 60
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def encoder(tiny_path: Path) -> SearchR3:
    return SearchR3(tiny_path, device="cpu", max_new_tokens=4)


@pytest.fixture(scope="module")
def store(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Forty documents of one chunk."""
    encoder = SearchR3(tiny_path, device="cpu")
    path = tmp_path_factory.mktemp("agents") / "notes.store"
    store = Store.create(path, Fingerprint.of(encoder), model=str(tiny_path))
    chunks = [c for one in small_collection().documents.values() for c in chunks_of(one.doc_id, one.text, one.title)]
    store.upsert(chunks, encoder.encode_document([chunk.full_text for chunk in chunks]))
    return store


@pytest.fixture(scope="module")
def server(encoder: SearchR3, store: Store) -> Iterator[SimpleNamespace]:
    """An app in a thread, for this machine alone."""
    engine = EngineThread(encoder, slots=32, max_queue=1024)
    app = create_app(engine, ServerSettings("tiny", max_body=50_000, host="127.0.0.1"), store=store)
    listening = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(app, log_config=None))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    with httpx2.Client(timeout=WAIT) as http:  # a busy machine is no fault
        yield SimpleNamespace(url=f"http://127.0.0.1:{listening.getsockname()[1]}", engine=engine, http=http)
    running.should_exit = True
    thread.join(WAIT)


@pytest.mark.parametrize("mode", ["auto", "legacy"])  # the protocol before 2026-07-28 has sessions
def test_the_tools_answer_over_http_as_the_routes_do(mode: Any, server: SimpleNamespace) -> None:
    async def asked() -> tuple[Any, Any]:
        async with Client(f"{server.url}/mcp", mode=mode) as client:
            assert [tool.name for tool in (await client.list_tools()).tools] == ["search", "fetch"]
            found = await client.call_tool("search", {"query": "where is the red house?", "k": 3})
            [first, *_] = found.structured_content["results"]
            return found.structured_content, (await client.call_tool("fetch", {"id": first["id"]})).structured_content

    found, fetched = asyncio.run(asked())
    hits = server.http.post(f"{server.url}/v1/search", json={"query": "where is the red house?", "k": 3}).json()["hits"]
    assert [(one["id"], one["title"]) for one in found["results"]] == [(hit["id"], hit["title"]) for hit in hits]
    assert fetched["text"] == hits[0]["text"] and fetched["metadata"]["document"] == hits[0]["parent_id"]
    metrics = server.http.get(f"{server.url}/metrics").text
    assert 'search_r3_http_answers_total{route="/mcp",status="200"}' in metrics


CALL = {"name": "search", "arguments": {"query": "where is the boat?"}}
META = {"io.modelcontextprotocol/protocolVersion": "2026-07-28", "io.modelcontextprotocol/clientCapabilities": {}}
MODERN = {"MCP-Protocol-Version": "2026-07-28", "Mcp-Method": "tools/call", "Mcp-Name": "search"}


@pytest.mark.parametrize(("headers", "params"), [({}, CALL), (MODERN, CALL | {"_meta": META})], ids=["2025", "2026"])
def test_an_agent_that_hangs_up_gives_the_slot_back(
    headers: dict[str, str], params: dict[str, Any], server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Any] = []
    here, submit = threading.Event(), server.engine.submit

    def submitted(*args: Any, **options: Any) -> Any:
        jobs.append(submit(*args, **options))
        here.set()
        return jobs[-1]

    monkeypatch.setattr(server.engine, "submit", submitted)
    monkeypatch.setattr(server.engine._decoder, "step", lambda: [])  # never done
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params})
    lines = ["POST /mcp HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", "Accept: */*"]
    lines += [f"{name}: {value}" for name, value in headers.items()] + [f"Content-Length: {len(body)}", "", body]
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
        client.sendall("\r\n".join(lines).encode())
        assert here.wait(WAIT)
    tick = threading.Event()
    assert any(jobs[0].cancelled() or tick.wait(0.01) for _ in range(100 * WAIT))


def test_the_gate_stands_before_the_tools_too(server: SimpleNamespace) -> None:
    post = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}

    def status(body: Any = post, **headers: str) -> int:
        return server.http.post(f"{server.url}/mcp", json=body, headers={"Accept": "*/*", **headers}).status_code

    assert status() == 200
    assert status(post | {"params": {"a": "b" * 60_000}}) == 413
    for headers, expected in (
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:8765"}, 200),
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1.evil.example"}, 421),
        ({"Host": "["}, 421),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ):
        assert status(**headers) == expected, headers
        route = server.http.get(f"{server.url}/info", headers=headers)
        assert route.status_code == expected
        assert expected == 200 or "127.0.0.1 alone" in route.json()["error"]["message"]


NOISE = """
import os, sys
from search_r3 import cli
from search_r3.model.encoder import SearchR3
from search_r3.serving import Store

def noisy(function):
    def with_noise(*args, **options):
        print("noise of", function.__name__)
        sys.stdout.flush()
        os.write(1, b"noise of a library\\n")
        return function(*args, **options)
    return with_noise

SearchR3.__init__, Store.get = noisy(SearchR3.__init__), noisy(Store.get)
cli.main()
"""


def test_over_stdio_nothing_but_the_protocol_is_on_the_wire(store: Store, tmp_path: Path) -> None:
    wire, errors = tmp_path / "wire", tmp_path / "errors"
    command = shlex.join([sys.executable, "-c", NOISE, "mcp", store.address, "--max-new-tokens", "4"])
    shell = f"{command} 2>{shlex.quote(str(errors))} | tee {shlex.quote(str(wire))}"

    async def asked() -> tuple[Any, Any]:
        parameters = StdioServerParameters(command="sh", args=["-c", shell], env=dict(os.environ))
        async with Client(parameters) as client:
            found = await client.call_tool("search", {"query": "where is the red house?", "k": 3})
            first = found.structured_content["results"][0]["id"]
            return found.structured_content, await client.call_tool("fetch", {"id": first})

    found, fetched = asyncio.run(asked())
    assert len(found["results"]) == 3 and fetched.structured_content["id"] == found["results"][0]["id"]
    lines = wire.read_text().splitlines()
    assert lines and all(json.loads(line)["jsonrpc"] == "2.0" for line in lines)
    noise = errors.read_text()
    assert "noise of __init__" in noise and "noise of get" in noise and "40 chunks" in noise


def test_what_is_still_in_a_buffer_is_kept_from_the_wire() -> None:
    code = (
        "import os\nfrom search_r3.cli.serve import _on_stderr\nprint('before')\n"
        "with _on_stderr():\n    print('within')\n    os.write(1, b'a library')\nprint('wire')"
    )
    buffering = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=buffering)
    assert done.stdout == "wire\n" and all(word in done.stderr for word in ("before", "within", "a library"))


def test_what_is_no_store_is_no_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "mcp", tmp_path / "nothing") == 2
    output = capsys.readouterr()
    assert "is no store" in output.err and not output.out


@pytest.mark.parametrize(("options", "local"), [((), True), (("--token", "x"), False), (("--host", "0.0.0.0"), False)])
def test_only_a_server_that_nobody_else_can_reach_is_for_this_machine_alone(
    options: tuple[str, ...], local: bool, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: services.append(self.config.app.state.service))
    assert call(monkeypatch, "serve", store.address, "--port", 0, *options) == 0
    services[0].engine.close(0)
    assert services[0].settings.local is local


def policy(rollout: str) -> str:
    """Searches for what the question asks, in some rollouts first in a way that no query should be; then answers."""
    number, question = re.match(r"(\d+): (.*)", rollout).groups()
    if titles := re.findall(r"Doc \d\(Title: (\".*?\")\) This one is about a", rollout):
        return f"<answer>{', '.join(titles)}</answer>"
    if "\n" not in rollout and int(number) % 4:
        return ("", "<search> </search>", f"<search>{'red ' * 900}</search>", "I do not know")[int(number) % 4]
    return f"so <search>{question}</search>"


def test_hundreds_of_rollouts_search_at_once_and_the_server_goes_on_answering(
    server: SimpleNamespace, store: Store, encoder: SearchR3
) -> None:
    questions = [query.text for query in small_collection().queries.values()]
    done, health = threading.Event(), []

    def watch() -> None:
        while not done.wait(0.01):
            health.append(server.http.get(f"{server.url}/health").status_code)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        with ThreadPoolExecutor(8) as threads:  # of 8 trainers
            prompts = [f"{number}: {text}" for number, text in enumerate(questions)]
            batches = list(threads.map(lambda _: roll(server.url, prompts, policy), range(8)))
            # verl asks for one rollout at a time
            bodies = [{"queries": [text], "topk": 3, "return_scores": True} for text in questions * 3]
            post = lambda body: server.http.post(f"{server.url}/retrieve", json=body).json()["result"]  # noqa: E731
            single = list(threads.map(post, bodies))
    finally:
        done.set()
        watching.join(WAIT)
    assert set(health) == {200}
    assert all(rollout.count("</answer>") == 1 for rollouts in batches for rollout in rollouts)
    assert all(len(re.findall('"', rollout.rpartition("<answer>")[2])) == 6 for rollout in batches[0][::4])
    expected = store.search(encoder.encode_query(questions).vectors, k=3)
    texts = {
        chunk.doc_id: chunk for hits in store.search(encoder.encode_query(questions).vectors, k=40) for chunk, _ in hits
    }
    for hits, [passages] in zip(expected * 3, single, strict=True):
        assert np.allclose([one["score"] for one in passages], [hit.score for hit in hits], atol=1e-4)
        for one in passages:
            chunk = texts[one["document"]["id"]]
            assert one["document"]["contents"] == f'"{chunk.title}"\n{chunk.text}'


@pytest.fixture
def agent() -> ModuleType:
    spec = importlib.util.spec_from_file_location("agent", ROOT / "examples" / "agent.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tool_call(arguments: str) -> Any:
    function = {"name": "search", "arguments": arguments}
    return chat_server.completion(
        None, "tool_calls", tool_calls=[{"id": "call-1", "type": "function", "function": function}]
    )


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Iterator[chat_server.Server]:
    with chat_server.running_server(monkeypatch) as chat:
        yield chat


def test_the_agent_searches_mends_its_calls_and_answers(
    agent: ModuleType, server: SimpleNamespace, chat: chat_server.Server, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = ['{"words": "house"}', '{"query": " "}', '{"query": "where is the red house?", "k": 2}']

    def reply(question: str, turn: int) -> chat_server.Answer:
        assert question == "where is the house?"
        return tool_call(calls[turn]) if turn < len(calls) else chat_server.completion("It is red [d00#0].")

    chat.answer = reply
    agent.main(["where is the house?", "--base-url", chat.url, "--model", "m", "--server", server.url])
    assert capsys.readouterr().out == "It is red [d00#0].\n"
    read = [one["content"] for one in chat.bodies[-1]["messages"] if one["role"] == "tool"]
    assert "search takes query and k" in read[0] and "the query is empty" in read[1]
    passages = json.loads(read[2])
    assert len(passages) == 2 and all(one.keys() == {"id", "title", "text"} for one in passages)
    assert [one["tool_choice"] for one in chat.bodies] == ["auto"] * 4


def test_the_agent_answers_in_the_end_and_says_what_it_cannot_reach(
    agent: ModuleType, server: SimpleNamespace, chat: chat_server.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    call_again, said = tool_call('{"query": "boat"}'), chat_server.completion("enough")
    monkeypatch.setattr(agent, "ROUNDS", 2)
    chat.answer = lambda *_: said if chat.bodies[-1]["tool_choice"] == "none" else call_again
    options = ["where?", "--base-url", chat.url, "--model", "m", "--server"]
    agent.main([*options, server.url])
    assert [one["tool_choice"] for one in chat.bodies] == ["auto", "auto", "none"]
    with pytest.raises(SystemExit, match=r"cannot search at http://127\.0\.0\.1:1: .*is search-r3 serve running"):
        agent.main([*options, "http://127.0.0.1:1"])
