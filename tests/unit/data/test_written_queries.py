"""Queries that a language model writes for articles, and all that a call can meet, against a server on this machine."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import datasets
import pytest

from search_r3.data.collection import Collection, Document
from search_r3.data.load import load_articles
from search_r3.data.writing import chat, written, written_items
from search_r3.data.writing.asking import REPLIES_PER_ITEM, STOP_AFTER, Standing
from search_r3.data.writing.replies import read_object
from search_r3.data.writing.written import Writer, WrittenReport, write_triples
from search_r3.data.writing.written_items import find_query_fault, queries_item
from search_r3.errors import DataError
from tests.chat_server import Answer, Server, completion, running_server
from tests.conftest import call

WORDS = ("amber", "birch", "cedar", "dune", "ember", "fjord", "grove", "heath", "inlet", "jetty")


def make_articles(count: int) -> dict[str, Document]:
    names = [f"{WORDS[i % 10]}{i}" for i in range(count)]
    return {n: Document(n, f"This text tells of {n} at some length. It was written long ago.", n) for n in names}


def queries(*texts: str) -> Answer:
    return completion(json.dumps({"queries": list(texts)}))


def good(title: str, turn: int) -> Answer:
    return queries(f"what is told about {title}?")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with running_server(monkeypatch) as running:
        running.answer = good
        yield running


def make(server: Server, out: Path, count: int = 3, per_article: int = 1, **options: Any) -> WrittenReport:
    splits = options.pop("splits", {"test": 1.0})
    writer = Writer(**{"endpoint": server.url, "model": "writer", **options})
    return write_triples(make_articles(count), out, writer, splits=splits, per_query=0, per_article=per_article)


def texts_of(collection: Collection) -> dict[str, list[str]]:
    """Article -> its queries, both in their order."""
    texts: dict[str, list[str]] = {}
    for query in collection.queries.values():
        assert query.query_id.startswith("written/")
        texts.setdefault(query.metadata["source"], []).append(query.text)
    return texts


def test_every_article_gets_its_query_and_the_collection_is_saved(server: Server, tmp_path: Path) -> None:
    def slow_first(title: str, turn: int) -> Answer:
        time.sleep(0.1 * (title == "amber0"))
        return good(title, turn)

    server.answer = slow_first
    seen: list[Standing] = []
    report = make(server, tmp_path / "wiki", api_key="sk-1", progress=seen.append)
    loaded = Collection.load(tmp_path / "wiki")
    assert loaded.documents == make_articles(3)
    texts = texts_of(loaded)
    assert texts == {doc_id: [f"what is told about {doc_id}?"] for doc_id in loaded.documents}
    assert list(texts) == ["amber0", "birch1", "cedar2"], "not the order of the replies"
    assert all(set(query.metadata) == {"source", "model"} for query in loaded.queries.values())
    assert {query.metadata["model"] for query in loaded.queries.values()} == {"writer"}
    judged = {query.query_id: {query.metadata["source"]: 1} for query in loaded.queries.values()}
    assert loaded.qrels == {"test": judged}
    assert [(one.done, one.total) for one in seen] == [(1, 3), (2, 3), (3, 3)]
    assert (report.asked, report.queries, report.failed, report.resumed, report.requests) == (3, 3, {}, 0, 3)
    assert (report.written, report.passages) == (3, 0)
    assert (report.prompt_tokens, report.completion_tokens) == (300, 21)
    assert 0.1 < report.seconds < 5


def test_the_request_holds_what_was_asked_for(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written_items, "MAX_SHOWN_CHARS", 40)
    articles = {"a": Document("a", "It {was} told by the river." + " long" * 50 + " END", "a title")}
    writer = Writer(server.url, "writer", "sk-1", max_tokens=99, temperature=0.25)
    write_triples(articles, tmp_path / "one", writer, per_query=0)
    body, headers = server.bodies[0], server.headers[0]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("writer", 99, 0.25)
    (message,) = body["messages"]
    assert message["role"] == "user"
    assert message["content"].endswith("Title: a title\n\nIt {was} told by the river. long long lo")
    assert '{"queries": ["...", ...]}' in message["content"]
    assert headers["authorization"] == "Bearer sk-1"
    write_triples(articles, tmp_path / "two", replace(writer, seed=1), per_query=0)
    write_triples(articles, tmp_path / "three", writer, per_query=0)
    assert server.bodies[0]["seed"] != server.bodies[1]["seed"]
    assert server.bodies[0]["seed"] == server.bodies[2]["seed"]


def test_without_a_key_none_is_sent_not_even_that_of_the_hub(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    make(server, tmp_path / "wiki")
    assert all("authorization" not in headers for headers in server.headers)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_the_endpoint_may_be_written_in_several_ways(server: Server, tmp_path: Path, suffix: str) -> None:
    make(server, tmp_path / "wiki", 1, endpoint=server.url.removesuffix("/v1") + suffix)
    assert server.headers[0]["path"] == "/v1/chat/completions"


def test_a_refused_request_comes_back_after_the_time_that_the_server_asks_for(server: Server, tmp_path: Path) -> None:
    server.answer = lambda title, turn: (429, {"Retry-After": "0.4"}, "slow down") if turn == 0 else good(title, turn)
    report = make(server, tmp_path / "wiki", 1)
    assert (report.queries, report.requests) == (1, 2)
    assert server.times[1] - server.times[0] >= 0.4


def test_retry_after_may_be_a_date() -> None:
    assert chat._seconds("7") == 7
    assert chat._seconds(formatdate(time.time() + 100, usegmt=True)) == pytest.approx(100, abs=3)
    assert chat._seconds(formatdate(time.time() - 100, usegmt=True)) == 0
    assert [chat._seconds(text) for text in ("", "soon", "-3", "nan")] == [0, 0, 0, 0]


def test_waits_between_retries_grow(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "BACKOFF_S", 0.1)
    monkeypatch.setattr(chat.random, "uniform", lambda low, high: high)
    server.answer = lambda title, turn: (503, {}, "") if turn < 3 else good(title, turn)
    make(server, tmp_path / "wiki", 1)
    gaps = [later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)]
    for gap, wait in zip(gaps, (0.1, 0.2, 0.4), strict=True):
        assert wait <= gap < wait + 0.5


def test_an_article_without_a_reply_is_counted_and_asked_again_by_the_next_call(server: Server, tmp_path: Path) -> None:
    server.answer = lambda title, turn: (500, {}, "broken") if title == "birch1" else good(title, turn)
    report = make(server, tmp_path / "wiki", retries=2)
    assert report.failed == {"HTTP 500": 1}
    assert Counter(server.titles) == {"amber0": 1, "birch1": 3, "cedar2": 1}
    loaded = Collection.load(tmp_path / "wiki")
    assert "birch1" in loaded.documents
    assert set(texts_of(loaded)) == {"amber0", "cedar2"}
    server.answer = good
    again = make(server, tmp_path / "wiki", retries=2)
    assert (again.queries, again.resumed, again.requests, again.failed) == (3, 2, 1, {})
    assert server.titles[5:] == ["birch1"]


def test_a_request_that_cannot_be_served_is_not_sent_again(server: Server, tmp_path: Path) -> None:
    server.answer = lambda title, turn: (400, {}, "too long") if title == "birch1" else good(title, turn)
    report = make(server, tmp_path / "wiki")
    assert (report.failed, report.requests) == ({"HTTP 400": 1}, 3)


@pytest.mark.parametrize(
    ("status", "refused", "words", "sent"),
    [
        (400, "max_tokens", "max_tokens is not supported by this model, use max_completion_tokens", True),
        (400, "max_tokens", "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", True),
        (400, "temperature", "Unsupported value: 'temperature' does not support 0.7 with this model.", False),
        (422, "seed", "body.seed: Extra inputs are not permitted", False),
    ],
)
def test_an_argument_that_a_server_refuses_is_named_otherwise_or_left_out(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, status: int, refused: str, words: str, sent: bool
) -> None:
    def answer(title: str, turn: int) -> Answer:
        with server.lock:
            body = server.bodies[-1]
        return (status, {}, json.dumps({"error": {"message": words}})) if refused in body else good(title, turn)

    server.answer = answer
    report = make(server, tmp_path / "wiki", concurrency=1)
    assert (report.failed, report.queries, report.requests) == ({}, 3, 4)
    assert all(refused not in body for body in server.bodies[1:])
    assert all(("max_completion_tokens" in body) == sent for body in server.bodies[1:])
    assert [record.message for record in caplog.records] == [
        f"{server.url}/chat/completions takes no {refused}: {'max_completion_tokens' if sent else 'none'} is sent"
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps({"error": {"message": "temperature must be below 2", "code": 7}}), "temperature must be below 2"),
        (json.dumps({"error": "no such thing"}), "no such thing"),
        (json.dumps({"message": "quota"}), "quota"),
        (json.dumps({"detail": [{"msg": "odd"}]}), '{"detail": [{"msg": "odd"}]}'),
        ("plain words", "plain words"),
    ],
)
def test_a_server_s_own_words_are_shown(server: Server, tmp_path: Path, text: str, words: str) -> None:
    server.answer = lambda title, turn: (400, {}, text) if title == "birch1" else good(title, turn)
    assert make(server, tmp_path / "one").words == {"HTTP 400": words}
    server.answer = lambda title, turn: (400, {}, text)
    with pytest.raises(DataError) as error:
        make(server, tmp_path / "all")
    assert f"(HTTP 400: 3); to HTTP 400 the endpoint says {words!r}; see what" in str(error.value)


def test_a_slow_reply_is_given_up(server: Server, tmp_path: Path) -> None:
    def answer(title: str, turn: int) -> Answer:
        time.sleep(2.5 if title == "amber0" or (title == "birch1" and turn == 0) else 0)
        return good(title, turn)

    server.answer = answer
    report = make(server, tmp_path / "wiki", timeout=1.0, retries=1)
    assert report.failed == {"no reply within 1 s": 1}
    assert Counter(server.titles) == {"amber0": 2, "birch1": 2, "cedar2": 1}
    assert report.queries == 2


def test_an_unusable_reply_is_asked_for_again_with_its_fault(server: Server, tmp_path: Path) -> None:
    bad = [completion("I cannot do that."), queries("too short"), completion('{"queries": ["what is')]
    replies = {
        "amber0": [bad[0], bad[1]],
        "birch1": bad,
        "cedar2": [completion("", "length", {}) for _ in range(REPLIES_PER_ITEM)],
        "dune3": [(200, {}, "<html>log in</html>")],
    }
    server.answer = lambda title, turn: replies[title][turn] if turn < len(replies[title]) else good(title, turn)
    report = make(server, tmp_path / "wiki", 4, concurrency=1)
    assert report.failed == {"the reply was not JSON": 1, "the reply was cut at max_tokens": 1}
    assert Counter(server.titles) == {"amber0": 3, "birch1": 3, "cedar2": 3, "dune3": 2}
    assert report.prompt_tokens == 300 + 300 + 100
    asked = [body["messages"][0]["content"].partition("\n\nAn earlier reply ")[2] for body in server.bodies[:3]]
    assert asked == [
        "",
        "could not be used: the reply was not JSON.",
        "could not be used: a query had not 3 to 60 words.",
    ]
    assert len({body["seed"] for body in server.bodies[:3]}) == 3, "a deterministic server would repeat itself"
    before = len(server.titles)
    assert make(server, tmp_path / "wiki", 4).failed == report.failed
    assert len(server.titles) == before, "finished articles are not asked for again, with a query or without"


def test_several_queries_are_gathered_over_replies(server: Server, tmp_path: Path) -> None:
    first, second, third = "who told of it first?", "when was  it\nwritten down?", "where does the tale end?"
    replies = {
        "amber0": [queries(first, "no", second, first), queries(second.upper(), third, "how many tales are there?")],
        "birch1": [queries(first)] * REPLIES_PER_ITEM,
    }
    server.answer = lambda title, turn: replies[title][turn]
    report = make(server, tmp_path / "wiki", 2, per_article=3)
    texts = texts_of(Collection.load(tmp_path / "wiki"))
    assert texts == {"amber0": [first, "when was it written down?", third], "birch1": [first]}
    assert (report.failed, report.written, report.queries) == ({}, 2, 4)
    assert "Write 3 different" in server.bodies[0]["messages"][0]["content"]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "refuses the api key for the model 'writer' (HTTP 401: bad key *** given); give a key that may use it"),
        (403, "refuses the api key for the model 'writer' (HTTP 403: bad key *** given)"),
        (404, "does not know the model 'writer', or chat completions are elsewhere (HTTP 404: bad key *** given)"),
    ],
)
def test_a_refusal_ends_the_call_at_once(server: Server, tmp_path: Path, status: int, message: str) -> None:
    server.answer = lambda title, turn: (status, {}, "bad key\nsk-secret given") if turn == 0 else good(title, turn)
    with pytest.raises(DataError) as error:
        make(server, tmp_path / "wiki", 20, api_key="sk-secret", concurrency=2)
    assert message in str(error.value)
    assert f"{server.url}/chat/completions" in str(error.value)
    assert "sk-secret" not in str(error.value)
    assert len(server.titles) <= 2
    assert not (tmp_path / "wiki").exists()
    assert "sk-secret" not in (tmp_path / "wiki.progress.jsonl").read_text()


def test_no_more_requests_are_under_way_than_allowed(server: Server, tmp_path: Path) -> None:
    def answer(title: str, turn: int) -> Answer:
        time.sleep(0.03)
        return good(title, turn)

    server.answer = answer
    make(server, tmp_path / "wiki", 20, concurrency=4)
    assert server.busiest == 4


def test_a_killed_call_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    reached, release = threading.Event(), threading.Event()

    def answer(title: str, turn: int) -> Answer:
        if title == "dune3" and turn == 0:
            reached.set()
            release.wait(20)
        return good(title, turn)

    server.answer = answer
    code = (
        "from pathlib import Path\n"
        "from search_r3.data.collection import Document\n"
        "from search_r3.data.writing.written import Writer, write_triples\n"
        f"articles = {make_articles(6)!r}\n"
        f"out = Path({str(tmp_path / 'wiki')!r})\n"
        f"writer = Writer({server.url!r}, 'writer', concurrency=1)\n"
        "write_triples(articles, out, writer, splits={'test': 1.0}, per_query=0)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    assert reached.wait(20), process.communicate()
    process.kill()
    process.communicate()
    release.set()
    assert not (tmp_path / "wiki").exists()
    report = make(server, tmp_path / "wiki", 6, concurrency=1)
    assert report.resumed == 3
    assert Counter(server.titles) == {"amber0": 1, "birch1": 1, "cedar2": 1, "dune3": 2, "ember4": 1, "fjord5": 1}
    assert (report.queries, report.requests, report.prompt_tokens) == (6, 3, 600)
    assert len(Collection.load(tmp_path / "wiki").queries) == 6


def test_a_half_written_line_is_dropped(server: Server, tmp_path: Path) -> None:
    make(server, tmp_path / "wiki", concurrency=1)
    progress = tmp_path / "wiki.progress.jsonl"
    whole = progress.read_text()
    progress.write_text(whole[:-9])
    report = make(server, tmp_path / "wiki")
    assert (report.resumed, report.requests, report.queries) == (2, 1, 3)
    assert server.titles[3:] == ["cedar2"]
    assert progress.read_text() == whole
    progress.write_text(whole[:20])
    assert make(server, tmp_path / "wiki").resumed == 0, "not even the settings were whole"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"wiki\.progress\.jsonl:3: not valid JSON"),
        ('{"doc_id": "x"}', r"jsonl:3: expected the keys answer, comple"),
    ],
)
def test_a_damaged_progress_file_is_named(server: Server, tmp_path: Path, line: str, message: str) -> None:
    make(server, tmp_path / "wiki")
    progress = tmp_path / "wiki.progress.jsonl"
    lines = progress.read_text().splitlines()
    lines[2] = line
    progress.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=message):
        make(server, tmp_path / "wiki")


def test_another_file_in_the_place_of_the_progress_file_is_refused(server: Server, tmp_path: Path) -> None:
    (tmp_path / "wiki.progress.jsonl").write_text('{"_id": 1}\n')
    with pytest.raises(DataError, match=r"progress.jsonl:1: no progress file of this function"):
        make(server, tmp_path / "wiki")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "other"}, "(model 'writer', now 'other')"),
        ({"seed": 3, "temperature": 0.1}, "(temperature 0.7, now 0.1; seed 0, now 3)"),
        ({"max_tokens": 9}, "(max_tokens 1024, now 9)"),
        ({"per_article": 2}, "(per_article 1, now 2)"),
        ({"count": 4}, "(articles '"),
        ({"prompt": "Ask {count} about:\n{shown}"}, "(prompt '"),
    ],
)
def test_progress_made_with_other_settings_is_refused(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], named: str
) -> None:
    make(server, tmp_path / "wiki")
    if "prompt" in change:
        prompt = change.pop("prompt")
        for module in (written, written_items):
            monkeypatch.setattr(module, "QUERIES_PROMPT", prompt)
    with pytest.raises(DataError) as error:
        make(server, tmp_path / "wiki", **change)
    assert f"wiki.progress.jsonl was made with other settings {named}" in str(error.value)
    assert len(server.titles) == 3
    assert make(server, tmp_path / "other", **change).resumed == 0


def test_what_does_not_change_the_queries_may_change(server: Server, tmp_path: Path) -> None:
    make(server, tmp_path / "wiki", 10)
    report = make(
        server, tmp_path / "wiki", 10, concurrency=2, timeout=5.0, api_key="sk-2", splits={"a": 0.7, "b": 0.3}
    )
    assert (report.resumed, report.requests) == (10, 0)
    loaded = Collection.load(tmp_path / "wiki")
    assert {split: len(part) for split, part in loaded.qrels.items()} == {"a": 7, "b": 3}
    make(server, tmp_path / "wiki", 10, splits={"a": 0.7, "b": 0.3})
    assert Collection.load(tmp_path / "wiki").qrels == loaded.qrels


def test_when_every_article_fails_nothing_is_written_over(server: Server, tmp_path: Path) -> None:
    make(server, tmp_path / "wiki")
    before = Collection.load(tmp_path / "wiki").content_hash()
    (tmp_path / "wiki.progress.jsonl").unlink()
    server.answer = lambda title, turn: completion("no") if title == "amber0" else (500, {}, "")
    with pytest.raises(DataError) as error:
        make(server, tmp_path / "wiki", retries=0)
    assert "none of the 3 articles got a query (HTTP 500: 2, the reply was not JSON: 1)" in str(error.value)
    assert Collection.load(tmp_path / "wiki").content_hash() == before


def test_a_server_that_is_down_ends_the_call(server: Server, tmp_path: Path) -> None:
    broken = {f"{WORDS[i % 10]}{i}" for i in range(STOP_AFTER - 1)}
    server.answer = lambda title, turn: (502, {}, "bad sk-1") if title in broken else good(title, turn)
    report = make(server, tmp_path / "some", STOP_AFTER + 1, retries=0)
    assert report.failed == {"HTTP 502": STOP_AFTER - 1}
    server.answer = lambda title, turn: (502, {}, "bad sk-1")
    with pytest.raises(DataError) as error:
        make(server, tmp_path / "none", 40, retries=0, api_key="sk-1", concurrency=1)
    assert f"gave no reply to {STOP_AFTER} articles in a row (the last: HTTP 502: bad ***)" in str(error.value)
    assert not (tmp_path / "none").exists()


def test_nobody_listening_is_named(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(DataError, match=r"\(no connection \(ConnectError\): 1\)"):
        write_triples(make_articles(1), tmp_path / "wiki", Writer(address, "writer", retries=0), per_query=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"articles": {}}, "no articles were given"),
        ({"articles": {"a": Document("b", "text")}}, "the article 'a' bears the id 'b'"),
        ({"articles": {"a\tb": Document("a\tb", "text")}}, r"the article 'a\tb' bears"),
        ({"articles": {"a": Document("a", " ", "title")}}, "the article 'a' has no text"),
        ({"articles": {"a": Document("a", "half \ud800")}}, "the article 'a' has no text, or half a letter"),
        ({"endpoint": "localhost:8000"}, "the endpoint 'localhost:8000' is no address; expected one such as http"),
        ({"api_key": "sk-secret\n"}, "the api key holds a blank, a line break"),
        ({"per_article": 0}, "per_query 0, per_article 0: expected 0 passages or more, and one query for each"),
        ({"per_query": -1}, "per_query -1, per_article 1: expected 0 passages or more"),
        ({"per_query": 1, "per_article": 2}, "or several without passages (per_query 0)"),
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"concurrency": 0}, "concurrency 0, timeout"),
        ({"timeout": 0.0}, "timeout 0.0"),
        ({"retries": -1}, "retries -1"),
        ({"splits": {}}, "the splits {} cannot be used"),
        ({"splits": {"a": 0.5, "b": 0.4}}, "positive shares that sum to 1"),
        ({"splits": {"a": 1.5, "b": -0.5}}, "positive shares that sum to 1"),
        ({"splits": {"a/b": 1.0}}, "expected names"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    fields = {name: change.pop(name) for name in Writer.__dataclass_fields__ if name in change}
    writer = Writer(**{"endpoint": "http://127.0.0.1:9/v1", "model": "writer", **fields})
    articles = change.pop("articles", make_articles(1))
    with pytest.raises(DataError) as error:
        write_triples(articles, tmp_path / "wiki", writer, **{"per_query": 0, **change})
    assert message in str(error.value)
    assert "secret" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_collection_is_not_replaced(server: Server, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match="photos exists and is no collection, so it is not replaced"):
        make(server, tmp_path / "photos")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write .*wiki\.progress\.jsonl: "):
        make(server, tmp_path / "file" / "wiki")


@pytest.mark.parametrize(
    "reply",
    [
        '{"queries": ["one {two} three"]}',
        '```json\n{"queries": ["one {two} three"]}\n```',
        'Here they are:\n```\n{\n "queries": ["one {two} three"]\n}\n```\nAnything else?',
        '<think>{"queries": ["no"]} or so</think>\n{"queries": ["one {two} three"]}',
    ],
)
def test_queries_are_read_from_fences_and_after_reasoning(reply: str) -> None:
    item = queries_item(Document("a", "some text"), 1)
    assert item.take(read_object(reply), []) == ([{"query": "one {two} three", "negatives": []}], "")


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ("", "was empty"),
        ("<think>hm</think> \n", "was empty"),
        ("what is it?", "was not JSON"),
        ('{"queries": ["a"', "was not JSON"),
        ('{"a":' * 5000 + "}", "was not JSON"),
        ('{"questions": ["a"]}', "had no list of queries"),
        ('{"queries": "a"}', "had no list of queries"),
        ('{"queries": []}', "had no list of queries"),
    ],
)
def test_a_reply_without_queries_is_named(reply: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        queries_item(Document("a", "some text"), 1).take(read_object(reply), [])


@pytest.mark.parametrize(
    ("query", "fault"),
    [
        ("what colour is it?", None),
        ("the bridge is red", None),
        ("is it " + "very " * 57 + "old", None),
        (7, "a query was not text"),
        ("half a \ud800 letter", "a query was not text"),
        ("too short", "a query had not 3 to 60 words"),
        ("is it " + "very " * 58 + "old", "a query had not 3 to 60 words"),
        ("the Golden Gate", "a query was copied from the article"),
        ("The bridge is red and long?", "a query was copied from the article"),
        ("it spans a strait that ships pass by", "a query was copied from the article"),
        ("it spans a strait that ships pass", None),
        ("Who built the bridge", "a query came twice"),
    ],
)
def test_a_query_is_checked_against_its_article(query: object, fault: str | None) -> None:
    text = "The bridge is red, and long. Built with care, it spans a strait that ships pass by day and by night."
    assert find_query_fault(query, Document("a", text, "The Golden Gate"), ["who built the bridge?"]) == fault


def write_articles(path: Path, count: int) -> Path:
    rows = [{"_id": one.doc_id, "title": one.title, "text": one.text} for one in make_articles(count).values()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_articles_come_from_a_file_a_folder_or_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_articles(tmp_path / "corpus.jsonl", 10)
    assert load_articles(str(path)) == load_articles(str(tmp_path)) == make_articles(10)
    some = load_articles(str(path), limit=4, seed=1)
    assert len(some) == 4 and some.items() <= make_articles(10).items()
    assert load_articles(str(path), limit=4, seed=1) == some != load_articles(str(path), limit=4, seed=2)
    parquet = tmp_path / "train.parquet"
    rows = [{"id": str(i), "url": "u", "title": f"t{i}", "text": f"text {i}" if i else " "} for i in range(6)]
    datasets.Dataset.from_list(rows).to_parquet(parquet)
    whole = datasets.load_dataset
    asked: list[Any] = []

    def local(source: str, subset: str | None, **options: Any) -> Any:
        asked.append((source, subset, options.pop("revision")))
        return whole("parquet", data_files=str(parquet), **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    found = load_articles("wikimedia/wikipedia:20231101.en@main")
    assert asked == [("wikimedia/wikipedia", "20231101.en", "main")]
    assert found == {str(i): Document(str(i), f"text {i}", f"t{i}") for i in range(1, 6)}, "the one without text is out"
    assert load_articles("wikimedia/wikipedia:20231101.en", limit=3).items() <= found.items()


def test_articles_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no articles at \./nowhere\.jsonl"):
        load_articles("./nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text('{"_id": "a", "title": "", "text": " "}\n')
    with pytest.raises(DataError, match="no article with text"):
        load_articles(str(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match="owner/name: cannot be read"):
        load_articles("owner/name")


def test_the_command_writes_a_collection_and_says_what_failed(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    articles = write_articles(tmp_path / "articles.jsonl", 3)
    server.answer = lambda title, turn: queries("no") if title == "birch1" else good(title, turn)
    monkeypatch.setenv("WRITER_KEY", "sk-2")
    args = ["data", "triples", articles, tmp_path / "out", "--endpoint", server.url, "--model", "writer"]
    args += ["--articles", "--per-query", 0, "--splits", "test"]
    assert call(monkeypatch, *args, "--api-key-variable", "WRITER_KEY") == 0
    out = capsys.readouterr().out
    assert "out: 2 queries" in out and "3 of 3 articles to ask about" in out
    assert "1 without: a query had not 3 to 60 words" in out
    assert len(Collection.load(tmp_path / "out").queries) == 2
    assert {headers["authorization"] for headers in server.headers} == {"Bearer sk-2"}
    assert call(monkeypatch, *args, "--temperature", 1.5) == 2
    assert "made with other settings (temperature 0.7, now 1.5)" in capsys.readouterr().err


def test_the_command_of_before_names_the_new_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert call(monkeypatch, "data", "synthesize", "a.jsonl", "out", "--model", "writer", "--queries", 2) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: `data synthesize` is `data triples ARTICLES OUT --articles --per-query 0")
    assert call(monkeypatch, "data", "triples", "a", "out", "--endpoint", "x", "--model", "y", "--per-article", 2) == 2
    assert "--per-article 2 goes with --articles" in capsys.readouterr().err
