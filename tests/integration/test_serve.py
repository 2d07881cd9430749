"""A server over a real port: clients of others, clients that hang up, signals."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import uvicorn

from search_r3.cli.serve import _listening
from search_r3.model.encoder import SearchR3
from search_r3.serving import Fingerprint, Store
from search_r3.serving.engine import EngineThread
from search_r3.serving.server import create_app
from tests.conftest import call

WAIT = 60


class Running:
    """An app in a thread; its engine stops in the decoder's first step until `go`."""

    def __init__(self, model: SearchR3) -> None:
        self.engine = EngineThread(model, slots=2)
        self.here, self.go, self.steps = threading.Event(), threading.Event(), 0
        self._step = self.engine._decoder.step
        self.engine._decoder.step = self._held  # type: ignore[method-assign]
        app = create_app(self.engine, store=Store.create("memory://served", Fingerprint.of(model)))
        self.server = uvicorn.Server(uvicorn.Config(app, log_config=None))
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self._socket]})
        self.thread.start()

    def _held(self) -> Any:
        self.steps += 1
        self.here.set()
        assert self.go.wait(WAIT)
        return self._step()


@pytest.fixture
def running(model: SearchR3) -> Iterator[Running]:
    running = Running(model)
    yield running
    running.go.set()
    running.server.should_exit = True
    running.thread.join(WAIT)


def until(condition: Callable[[], bool]) -> None:
    tick = threading.Event()
    for _ in range(100 * WAIT):
        if condition():
            return
        tick.wait(0.01)
    raise AssertionError("it did not happen")


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_gives_the_slot_back(stream: bool, running: Running) -> None:
    with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2]))) as client:
        body = json.dumps({"input": "where is it?", "max_new_tokens": 100}).encode()
        head = (
            f"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        assert running.here.wait(WAIT)
        [job] = running.engine._jobs["reason"]
    until(job.future.cancelled)
    running.go.set()
    until(lambda: running.engine.load() == {"queries": 0, "documents": 0, "slots": 0})
    assert running.steps < 50


def test_what_is_in_work_when_the_server_ends_is_answered(running: Running) -> None:
    answers: list[httpx2.Response] = []
    client = threading.Thread(
        target=lambda: answers.append(
            httpx2.post(f"{running.url}/v1/embeddings", json={"input": "a", "max_new_tokens": 9}, timeout=WAIT)
        )
    )
    client.start()
    assert running.here.wait(WAIT)
    running.server.should_exit = True
    until(lambda: not running.server.servers[0].is_serving())
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{running.url}/health")
    running.go.set()
    client.join(WAIT)
    running.thread.join(WAIT)
    assert answers[0].status_code == 200 and not running.engine.alive


@contextlib.contextmanager
def served(*args: object, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process `search-r3 serve` and its address."""
    command = [sys.executable, "-m", "search_r3.cli", "serve", *map(str, args), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            match = re.match(r"http://127\.0\.0\.1:\d+", line)
            assert match, line
            yield process, match[0]
        finally:
            process.kill()


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, collection_path: Path) -> Path:
    path = tmp_path_factory.mktemp("stores") / "s"
    with pytest.MonkeyPatch.context() as patch:
        options = ["--model", tiny_path, "--collection", collection_path, "--untrained"]
        assert call(patch, "index", path, *options) == 0
    return path


def test_a_store_is_served_to_real_clients_and_ends_on_sigterm(store_path: Path, tiny_path: Path) -> None:
    model = SearchR3(tiny_path, device="cpu")
    options = ["--name", "tiny", "--max-new-tokens", 8, "--dimensions", 8, "--max-batch", 3]
    with served(store_path, *options, SEARCH_R3_TOKEN="secret") as (process, url):
        client = openai.OpenAI(api_key="secret", base_url=f"{url}/v1", max_retries=0)
        texts = ["the red house", "a boat"]
        for name, expected in (
            ("tiny:document", model.encode_document(texts)),
            ("tiny:direct", model.encode_query(texts, "direct").vectors),
            ("tiny", model.encode_query(texts, max_new_tokens=8).vectors),
        ):
            answer = client.embeddings.create(model=name, input=texts)  # the client asks for base64
            assert np.allclose([one.embedding for one in answer.data], expected, atol=1e-5)
            assert answer.usage.prompt_tokens > 0
        assert len(client.embeddings.create(model="tiny", input="a", dimensions=8).data[0].embedding) == 8
        floats = client.embeddings.create(
            model="tiny", input=texts, encoding_format="float", extra_body={"input_type": "document"}
        )
        assert np.allclose([one.embedding for one in floats.data], model.encode_document(texts), atol=1e-5)
        with pytest.raises(openai.BadRequestError, match="dimensions=9"):
            client.embeddings.create(model="tiny", input="a", dimensions=9)
        with pytest.raises(openai.BadRequestError, match="token ids"):
            client.embeddings.create(model="tiny", input=[[1, 2]])
        with pytest.raises(openai.NotFoundError, match="no model 'ada'"):
            client.embeddings.create(model="ada", input="a")
        with pytest.raises(openai.APIStatusError, match="the limit is 3"):
            client.embeddings.create(model="tiny", input=["a"] * 4)
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(api_key="x", base_url=f"{url}/v1", max_retries=0).models.list()
        assert "tiny:reason" in [one.id for one in client.models.list()]
        headers = {"Authorization": "Bearer secret"}
        document = {"documents": [{"id": "new", "text": "a purple river"}]}
        assert httpx2.put(f"{url}/v1/documents", json=document, headers=headers).json()["documents"] == 1
        found = httpx2.post(f"{url}/v1/search", json={"query": "purple", "mode": "bm25"}, headers=headers).json()
        assert found["hits"][0]["parent_id"] == "new"
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT) == -signal.SIGTERM
    assert [chunk.text for chunk in Store.open(store_path).get("new")] == ["a purple river"]


def test_ctrl_c_ends_a_server_without_a_word_of_error(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(server: object, sockets: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("uvicorn.Server.run", interrupted)
    assert call(monkeypatch, "serve", tiny_path, "--port", 0, "--untrained") == 0
    assert "error" not in capsys.readouterr().err


def test_an_answer_does_not_wait_for_an_acknowledgement() -> None:
    with _listening("127.0.0.1", 0, None) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_what_cannot_be_served_ends_with_one_line(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert call(monkeypatch, "serve", tiny_path, "--port", port) == 2
    assert f"cannot listen at 127.0.0.1:{port}" in capsys.readouterr().err
    assert call(monkeypatch, "serve", tiny_path, "--port", 0) == 2
    assert "no stage has trained" in capsys.readouterr().err
    assert call(monkeypatch, "serve", tiny_path, "--port", 0, "--model", tiny_path) == 2
    assert "is no store" in capsys.readouterr().err
    assert call(monkeypatch, "serve", tiny_path, "--port", 0, "--untrained", "--dimensions", 999) == 2
    assert "32 dimensions" in capsys.readouterr().err
