"""Hard negatives, triples and traces that a language model writes, against a real server on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from search_r3.data.collection import Collection, Document, Query
from search_r3.data.triples import training_examples
from search_r3.data.writing import written_items
from search_r3.data.writing.asking import REPLIES_PER_ITEM, STOP_AFTER, Prices, Standing
from search_r3.data.writing.replies import MENTION, SPECIAL, copied_share
from search_r3.data.writing.written import Writer, _sample, write_negatives, write_traces, write_triples
from search_r3.data.writing.written_items import find_passage_fault, find_trace_fault, length_like, show
from search_r3.errors import DataError
from tests.chat_server import Answer, Server, completion, running_server

NAMES = ("amber", "birch", "cedar", "dune", "ember", "fjord", "grove", "heath", "inlet", "jetty")
TRACE = "It asks for a place near the sea, so look for what is told about {} there."


def make_collection(count: int = 3, titled: bool = True) -> Collection:
    names = [f"{NAMES[i % 10]}{i}" for i in range(count)]
    documents = {
        name: Document(name, f"Long ago the people of {name} built a harbour of stone by the sea.", titled * name)
        for name in names
    }
    queries = {f"q-{name}": Query(f"q-{name}", f"what did they build in {name}?") for name in names}
    return Collection("made", documents, queries, {"train": {f"q-{name}": {name: 1} for name in names}})


def subject(title: str) -> str:
    """The name in a query, or the title of an article as it is."""
    return title.split()[-1].rstrip("?")


def passage(text: str, title: str = "A title") -> dict[str, str]:
    return {"title": title, "text": text}


def negatives(*passages: Any) -> Answer:
    return completion(json.dumps({"negatives": list(passages)}))


def good_negative(title: str, turn: int) -> Answer:
    return negatives(passage(f"Nobody knows who lives in {subject(title)} today, or how they came."))


def good_triple(title: str, turn: int) -> Answer:
    query = f"which old works are known of {title}?"
    return completion(json.dumps({"query": query, "negatives": [passage(f"The works of {title} are not for sale.")]}))


def good_trace(title: str, turn: int) -> Answer:
    return completion(json.dumps({"reasoning": TRACE.format(subject(title))}))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with running_server(monkeypatch) as running:
        yield running


def writer(server: Server, **options: Any) -> Writer:
    return Writer(server.url, "writer", **options)


# Hard negatives


def test_negatives_join_the_corpus_and_the_metadata(server: Server, tmp_path: Path) -> None:
    server.answer = good_negative
    whole = make_collection()
    whole.queries["q-birch1"] = Query("q-birch1", whole.queries["q-birch1"].text, {"negatives": ["amber0"], "by": 1})
    report = write_negatives(whole, tmp_path / "out", writer(server, api_key="sk-1"))
    loaded = Collection.load(tmp_path / "out")
    assert loaded.qrels == whole.qrels
    new = [doc_id for doc_id in loaded.documents if doc_id not in whole.documents]
    assert len(new) == 3 and all(doc_id.startswith("written/") for doc_id in new)
    assert loaded.documents[new[0]].text == "Nobody knows who lives in amber0 today, or how they came."
    assert loaded.documents[new[0]].title == "A title"
    assert loaded.queries["q-amber0"].metadata == {"negatives": [new[0]]}
    assert loaded.queries["q-birch1"].metadata == {"negatives": [new[1], "amber0"], "by": 1}
    assert [example.negative_ids for example in training_examples(loaded, "train")][1] == (new[1], "amber0")
    assert (report.asked, report.written, report.passages, report.failed, report.requests) == (3, 3, 3, {}, 3)
    saved = json.loads((tmp_path / "out" / "written.json").read_text())
    assert saved["settings"]["model"] == "writer" and saved["passages"] == 3
    assert "sk-1" not in json.dumps(saved)
    assert {headers["authorization"] for headers in server.headers} == {"Bearer sk-1"}


def test_the_prompt_holds_query_and_positives(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written_items, "MAX_SHOWN_CHARS", 80)
    server.answer = good_negative
    documents = {
        "a": Document("a", "first {text} " + "long " * 20 + "END"), "b": Document("b", "second text", "B title"),
        "no": Document("no", "not relevant"),
    }  # fmt: skip
    whole = Collection("t", documents, {"q": Query("q", "who {is} it?")}, {"train": {"q": {"a": 1, "b": 2, "no": 0}}})
    write_negatives(whole, tmp_path / "out", writer(server, max_tokens=99, temperature=0.25), per_query=2)
    body = server.bodies[0]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("writer", 99, 0.25)
    content = body["messages"][0]["content"]
    assert "Write 2 different passage(s)" in content
    assert '{"negatives": [{"title": "...", "text": "..."}, ...]}' in content
    assert content.endswith(
        "Query: who {is} it?\n\nTitle: B title\n\nsecond text\n\nfirst {text} long long long long long lo"
    )


def test_a_corpus_without_titles_gets_passages_without(server: Server, tmp_path: Path) -> None:
    server.answer = good_negative
    write_negatives(make_collection(titled=False), tmp_path / "out", writer(server))
    assert {document.title for document in Collection.load(tmp_path / "out").documents.values()} == {""}


def test_passages_are_gathered_over_replies_with_the_fault_of_the_last(server: Server, tmp_path: Path) -> None:
    texts = [f"Passage number {number} on harbours, which says nothing that helps." for number in range(4)]
    replies = {
        "amber0": [
            negatives(passage(texts[0]), passage("short")), negatives(passage(texts[0].upper()), passage(texts[1]))
        ],
        "birch1": [completion("I cannot."), completion("{}"), completion('{"negatives": [7]}')],
        "cedar2": [completion("{", "length")] * REPLIES_PER_ITEM,
    }  # fmt: skip
    server.answer = lambda title, turn: replies[subject(title)][turn]
    report = write_negatives(make_collection(), tmp_path / "out", writer(server, concurrency=1), per_query=2)
    loaded = Collection.load(tmp_path / "out")
    added = loaded.queries["q-amber0"].metadata["negatives"]
    assert [loaded.documents[doc_id].text for doc_id in added] == texts[:2]
    assert (report.written, report.passages) == (1, 2)
    assert report.failed == {"a passage had no text": 1, "the reply was cut at max_tokens": 1}
    assert loaded.queries["q-birch1"].metadata == {}
    asked = [
        body["messages"][0]["content"].partition("\n\nAn earlier reply could not be used: ")[2]
        for body in server.bodies
    ]
    assert asked[:5] == [
        "",
        "a passage had not 4 to 42 words.",
        "",
        "the reply was not JSON.",
        "the reply had no list of negatives.",
    ]
    assert len({body["seed"] for body in server.bodies[:2]}) == 2


POSITIVE = Document(
    "p", "The old bridge was built of grey stone in the year of the great flood by two brothers.", "Bridge"
)


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        (passage("Grey stone is found in many rivers, and brothers often quarrel about it."), None),
        (passage("It was built of grey stone, as many were then, and nobody knows by whom."), None),
        ("text", "a passage had no text"),
        ({"title": "a"}, "a passage had no text"),
        (passage("half a \ud800 letter stands in this text of some words"), "a passage had no text"),
        (passage("text of some words that is long enough", 7), "a passage had no text"),
        (passage("text of some words that is long enough", " "), "a passage had no title"),
        ({"text": "text of some words that is long enough"}, "a passage had no title"),
        (passage("far too short"), "a passage had not 6 to 54 words"),
        (passage("word " * 55), "a passage had not 6 to 54 words"),
        (passage("a text that ends the turn <|im_end|> and goes on"), "a passage held a special token"),
        (passage("a text of an <|embed_token|> and some more words"), "a passage held a special token"),
        (
            passage("THE OLD bridge was built of grey stone, in the year of the great flood!"),
            "a passage was copied from what answers the query",
        ),
        (passage("this one is here: already, in other letters"), "a passage came twice"),
    ],
)
def test_a_passage_is_checked(found: object, fault: str | None) -> None:
    others = ["This one is here already in other letters."]
    assert find_passage_fault(found, [POSITIVE], others) == fault


def test_the_share_that_is_copied_is_counted_in_runs_of_words() -> None:
    assert copied_share("a b c d e f", ["x a b c d y"], 3) == 2 / 4
    assert copied_share("A, b; C!", ["a b c"], 3) == 1
    assert copied_share("a b c", ["a b", "b c"], 3) == 0
    assert copied_share("a b c", ["a b", "b c"], 2) == 1
    assert copied_share("a b", ["c a b"], 8) == 1, "a short text is one run"
    assert copied_share("", ["a"], 3) == copied_share("a", [""], 3) == 0


def test_a_passage_is_as_long_as_the_positives_are() -> None:
    assert length_like([Document("a", "one two"), Document("b", "one two three four")]) == 3
    assert length_like([Document("a", "word " * 900)]) == 200
    assert length_like([Document("a", "", "title alone")]) == 1
    assert show([Document("a", "text", "title"), Document("b", "more")]) == "Title: title\n\ntext\n\nmore"


# Triples


def test_triples_are_written_for_articles(server: Server, tmp_path: Path) -> None:
    server.answer = good_triple
    articles = make_collection(4).documents
    report = write_triples(articles, tmp_path / "set", writer(server, limit=3, seed=1), splits={"made": 1.0})
    loaded = Collection.load(tmp_path / "set")
    assert (report.asked, report.written, report.passages) == (3, 3, 3)
    assert articles.items() <= loaded.documents.items() and len(loaded.documents) == 4 + 3
    examples = training_examples(loaded, "made")
    for example in examples:
        [positive], [negative] = example.positive_ids, example.negative_ids
        assert example.query.query_id.startswith("written/")
        assert example.query.text == f"which old works are known of {positive}?"
        assert loaded.documents[negative].text == f"The works of {positive} are not for sale."
        assert (example.query.metadata["source"], example.query.metadata["model"]) == (positive, "writer")
    assert len({example.query.query_id for example in examples}) == 3


def test_the_negatives_of_a_triple_belong_to_its_query(server: Server, tmp_path: Path) -> None:
    def reply(query: str, *texts: str) -> Answer:
        return completion(json.dumps({"query": query, "negatives": [passage(text) for text in texts]}))

    text = "Many words about harbours that do not help, number {}."
    replies = {
        "amber0": [reply("no", text.format(0)), reply("what is told of it?", text.format(1)),
                   reply("who told of it first?", text.format(2), text.format(3))],
        "birch1": [reply("what is told of that?", text.format(4), text.format(5))]
                  + [reply("what is told of this?", text.format(6))] * 2,
        "cedar2": [reply("the birch stands here, does it?")] * 3,
    }  # fmt: skip
    server.answer = lambda title, turn: replies[title][turn]
    report = write_triples(make_collection().documents, tmp_path / "set", writer(server), per_query=3)
    loaded = Collection.load(tmp_path / "set")
    found = {
        query.text: [loaded.documents[doc_id].text[-2:-1] for doc_id in query.metadata["negatives"]]
        for query in loaded.queries.values()
    }
    assert found == {"who told of it first?": ["2", "3"], "what is told of that?": ["4", "5"]}
    assert report.failed == {"the reply had no list of negatives": 1}
    assert report.passages == 4


# Traces


def test_traces_stand_beside_those_of_other_styles(server: Server, tmp_path: Path) -> None:
    server.answer = good_trace
    whole = make_collection()
    whole.queries["q-amber0"] = Query("q-amber0", "what did they build in amber0?", {"reasoning": "old"})
    whole.queries["q-birch1"] = Query(
        "q-birch1", "what did they build in birch1?", {"reasoning": {"llm": "x", "a": "y"}}
    )
    report = write_traces(whole, tmp_path / "out", writer(server), style="llm")
    loaded = Collection.load(tmp_path / "out")
    assert {query_id: query.metadata["reasoning"] for query_id, query in loaded.queries.items()} == {
        "q-amber0": {"trace": "old", "llm": TRACE.format("amber0")},
        "q-birch1": {"a": "y", "llm": TRACE.format("birch1")},
        "q-cedar2": {"llm": TRACE.format("cedar2")},
    }
    assert loaded.documents == whole.documents
    assert training_examples(loaded, "train")[2].reasoning == {"llm": TRACE.format("cedar2")}
    assert (report.written, report.passages) == (3, 0)
    content = server.bodies[0]["messages"][0]["content"]
    assert "in 8 to 120 words" in content and "built a harbour of stone" in content


@pytest.mark.parametrize(
    ("trace", "fault"),
    [
        ("A bridge of that age is likely of stone, so look for who built bridges then.", None),
        (7, "the reasoning was not text"),
        ("half a \ud800 letter stands in this text of some words", "the reasoning was not text"),
        ("too short to be of any use", "the reasoning had not 8 to 20 words"),
        ("word " * 21, "the reasoning had not 8 to 20 words"),
        ("It is about bridges of stone and their age <|embed_token|>", "the reasoning held a special token"),
        ("<think>It is about bridges of stone and their age.</think>", "the reasoning held a special token"),
        (
            "It is about bridges, and the document says that brothers built one.",
            "the reasoning mentioned the documents, which its reader does not see",
        ),
        (
            "According to the text, it is stone that such bridges are made of.",
            "the reasoning mentioned the documents, which its reader does not see",
        ),
        (
            "So: the old bridge was built of grey stone in the year of the great flood.",
            "the reasoning was copied from the documents",
        ),
        ("By two brothers, in the year of some flood, so seek the brothers who built the bridge.", None),
    ],
)
def test_a_trace_is_checked(trace: object, fault: str | None) -> None:
    assert find_trace_fault(trace, [POSITIVE], 20) == fault


def test_what_speaks_of_unseen_documents_is_told_from_what_does_not() -> None:
    for text in (
        "The passage states that", "as described in the article", "based on these documents", "The given passage is",
        "Document 2 has it", "these two passages mention", "the provided texts", "the document above explains",
    ):  # fmt: skip
        assert MENTION.search(text), text
    for text in (
        "look for a document that says who", "a text on harbours", "an article about stone", "the context of the war",
        "the law says so", "documents about bridges are sought",
    ):  # fmt: skip
        assert not MENTION.search(text), text
    assert all(SPECIAL.search(text) for text in ("<|im_start|>", "</think>", "[INST]", "<s>", "<|Embed_Token|>"))
    assert not any(SPECIAL.search(text) for text in ("a < b", "a <b> tag", "x [1]", "a | b", "< | >"))


# Cost and progress


def test_the_cost_is_estimated_before_and_counted_during(server: Server, tmp_path: Path) -> None:
    server.answer = lambda title, turn: (
        completion("no") if title.endswith("amber0?") and turn == 0 else good_trace(title, turn)
    )
    estimates: list[Standing] = []
    seen: list[Standing] = []
    options: dict[str, Any] = {
        "prices": Prices(2.0, 10.0), "max_tokens": 50, "concurrency": 1,
        "on_start": estimates.append, "progress": seen.append,
    }  # fmt: skip
    report = write_traces(make_collection(), tmp_path / "out", writer(server, limit=2, seed=4, **options))
    prompts = [body["messages"][0]["content"] for body in server.bodies]
    first = {prompt for prompt in prompts if "An earlier reply" not in prompt}
    read = sum(map(len, first)) // 4
    assert estimates == [Standing(0, 2, read, 100, pytest.approx(read * 2e-6 + 100 * 1e-5), measured=False)]
    spent = [(one.done, one.total, one.prompt_tokens, one.completion_tokens) for one in seen]
    each = [(len(prompts) - 1) * 100, 100] if len(prompts) == 3 else [100, 100]
    assert spent == [(1, 2, each[0], each[0] * 7 // 100), (2, 2, sum(each), sum(each) * 7 // 100)]
    assert seen[-1].cost == report.cost == pytest.approx((sum(each) * 2 + sum(each) * 0.07 * 10) / 1e6)
    again = write_traces(make_collection(), tmp_path / "out", writer(server, seed=4, **options))
    assert estimates[1].done == 2 and estimates[1].total == 3 and estimates[1].measured
    assert estimates[1].prompt_tokens == round(sum(each) * 3 / 2)
    assert (again.resumed, again.requests) == (2, 1 + (len(prompts) == 2)), "a larger sample holds the smaller one"


def test_without_prices_there_is_no_cost(server: Server, tmp_path: Path) -> None:
    server.answer = good_trace
    seen: list[Any] = []
    given = writer(server, on_start=seen.append, progress=seen.append)
    report = write_traces(make_collection(1), tmp_path / "out", given)
    assert [one.cost for one in seen] == [None, None] and report.cost is None
    assert (report.prompt_tokens, report.completion_tokens, report.uncounted) == (100, 7, 0)


def test_tokens_that_the_endpoint_does_not_count_are_said(server: Server, tmp_path: Path) -> None:
    def uncounted(title: str, turn: int) -> Answer:
        content = json.dumps({"reasoning": TRACE.format(title)})
        return completion(content, usage={}) if "amber" in title else good_trace(title, turn)

    server.answer = uncounted
    report = write_traces(make_collection(), tmp_path / "out", writer(server, prices=Prices(1.0, 1.0)))
    assert report.uncounted == 1 and report.cost == pytest.approx(214e-6)


def test_prices_are_per_million_tokens() -> None:
    assert Prices(0.15, 0.6).cost(2_000_000, 500_000) == pytest.approx(0.6)
    assert Prices(0, 0).cost(1e9, 1e9) == 0
    for wrong in ((-1, 0), (0, float("inf")), (float("nan"), 0)):
        with pytest.raises(DataError, match="expected 0 or more per million"):
            Prices(*wrong)


def test_a_larger_sample_holds_the_smaller_one() -> None:
    ids = [f"q{number}" for number in range(1000)]
    small, large = (_sample(ids, Writer("", "", limit=limit)) for limit in (10, 100))
    assert len(small) == 10 and len(large) == 100 and set(small) < set(large)
    assert large == [one for one in ids if one in large], "in their own order"
    assert set(_sample(ids, Writer("", "", limit=10, seed=1))) != set(small)
    assert _sample(ids, Writer("", "", limit=1000)) == _sample(ids, Writer("", "")) == ids


# Faults


def test_a_killed_call_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    reached, release = threading.Event(), threading.Event()

    def answer(title: str, turn: int) -> Answer:
        if title.endswith("cedar2?") and turn == 0:
            reached.set()
            release.wait(20)
        return good_negative(title, turn)

    server.answer = answer
    make_collection(5).save(tmp_path / "made")
    code = (
        "from search_r3.data.collection import Collection\n"
        "from search_r3.data.writing.written import Writer, write_negatives\n"
        f"whole, out = Collection.load({str(tmp_path / 'made')!r}), {str(tmp_path / 'out')!r}\n"
        f"write_negatives(whole, out, Writer({server.url!r}, 'writer', concurrency=1))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    assert reached.wait(30), process.communicate()
    process.kill()
    process.communicate()
    release.set()
    assert not (tmp_path / "out").exists()
    report = write_negatives(make_collection(5), tmp_path / "out", writer(server))
    assert (report.resumed, report.requests, report.written) == (2, 3, 5)
    write_negatives(make_collection(5), tmp_path / "whole", writer(server))
    assert (tmp_path / "out" / "queries.jsonl").read_bytes() == (tmp_path / "whole" / "queries.jsonl").read_bytes()
    assert (tmp_path / "out" / "corpus.jsonl").read_bytes() == (tmp_path / "whole" / "corpus.jsonl").read_bytes()


def test_an_endpoint_that_is_down_ends_the_call(server: Server, tmp_path: Path) -> None:
    server.answer = lambda title, turn: good_trace(title, turn) if "amber0" in title else (503, {}, "busy")
    with pytest.raises(
        DataError, match=rf"gave no reply to {STOP_AFTER} queries in a row \(the last: HTTP 503: busy\)"
    ):
        write_traces(make_collection(40), tmp_path / "out", writer(server, retries=0, concurrency=1))
    assert len(server.titles) == 1 + STOP_AFTER and not (tmp_path / "out").exists()
    server.answer = good_trace
    assert write_traces(make_collection(40), tmp_path / "out", writer(server)).resumed == 1


def test_queries_without_a_reply_are_asked_again(server: Server, tmp_path: Path) -> None:
    server.answer = lambda title, turn: (500, {}, "") if "birch1" in title else good_trace(title, turn)
    report = write_traces(make_collection(), tmp_path / "out", writer(server, retries=1))
    assert report.failed == {"HTTP 500": 1} and report.written == 2
    assert Collection.load(tmp_path / "out").queries["q-birch1"].metadata == {}
    server.answer = good_trace
    again = write_traces(make_collection(), tmp_path / "out", writer(server, retries=1))
    assert (again.written, again.requests) == (3, 1)
    assert Counter(map(subject, server.titles)) == {"amber0": 1, "birch1": 3, "cedar2": 1}


def test_a_refused_key_ends_the_call(server: Server, tmp_path: Path) -> None:
    server.answer = lambda title, turn: (401, {}, "who is sk-9")
    with pytest.raises(DataError, match=r"refuses the api key for the model 'writer' \(HTTP 401: who is \*\*\*\)"):
        write_negatives(make_collection(), tmp_path / "out", writer(server, api_key="sk-9"))


def test_when_nothing_can_be_used_nothing_is_written_over(server: Server, tmp_path: Path) -> None:
    make_collection(1).save(tmp_path / "out")
    server.answer = lambda title, turn: completion("no")
    for write, what in (
        (write_negatives, "none of the 2 queries got a hard negative"),
        (write_traces, "none of the 2 queries got a reasoning trace"),
    ):
        with pytest.raises(DataError, match=rf"{what} \(the reply was not JSON: 2\); see what 'writer' at"):
            write(make_collection(2), tmp_path / "out", writer(server))
        (tmp_path / "out.progress.jsonl").unlink()
    with pytest.raises(DataError, match="none of the 2 articles got a query with a hard negative"):
        write_triples(make_collection(2).documents, tmp_path / "out", writer(server))
    assert Collection.load(tmp_path / "out").content_hash() == replace(make_collection(1)).content_hash()


def test_progress_of_another_task_or_other_settings_is_refused(server: Server, tmp_path: Path) -> None:
    server.answer = good_negative
    write_negatives(make_collection(), tmp_path / "out", writer(server))
    for call, named in (
        (
            lambda: write_traces(make_collection(), tmp_path / "out", writer(server)),
            "written 'negatives', now 'traces'",
        ),
        (lambda: write_negatives(make_collection(2), tmp_path / "out", writer(server)), "collection '"),
        (lambda: write_negatives(make_collection(), tmp_path / "out", writer(server, seed=1)), "seed 0, now 1"),
        (
            lambda: write_negatives(make_collection(), tmp_path / "out", writer(server), per_query=2),
            "per_query 1, now 2",
        ),
    ):
        with pytest.raises(DataError) as error:
            call()
        assert "was made with other settings" in str(error.value) and named in str(error.value)
    assert len(server.titles) == 3


@pytest.mark.parametrize(
    ("write", "change", "message"),
    [
        (write_negatives, {"per_query": 0}, "per_query 0: expected 1 or more"),
        (write_negatives, {"splits": ["dev"]}, "collection 'made' has no split 'dev'; it has: train"),
        (write_negatives, {"splits": []}, "no split was named"),
        (write_negatives, {"limit": 0}, "limit 0: expected 1 or more"),
        (write_negatives, {"max_tokens": 0}, "max_tokens 0: expected 1 or more"),
        (write_negatives, {"endpoint": "localhost"}, "the endpoint 'localhost' is no address"),
        (write_triples, {"splits": {"a/b": 1.0}}, "the splits {'a/b': 1.0} cannot be used; expected names"),
        (write_triples, {"per_query": -1}, "per_query -1"),
        (write_triples, {"data": {}}, "no articles were given"),
        (write_traces, {"style": " "}, "style ' ', max_words 120: expected a name"),
        (write_traces, {"max_words": 7}, "max_words 7: expected a name, and 8 words or more"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(
    tmp_path: Path, write: Any, change: dict[str, Any], message: str
) -> None:
    data = change.pop("data", make_collection(1).documents if write is write_triples else make_collection(1))
    fields = {name: change.pop(name) for name in ("limit", "max_tokens", "endpoint") if name in change}
    given = Writer(**{"endpoint": "http://127.0.0.1:9/v1", "model": "writer", **fields})
    with pytest.raises(DataError, match=message):
        write(data, tmp_path / "out", given, **change)
    assert not list(tmp_path.iterdir())


def test_metadata_that_cannot_be_used_is_named_before_anything_is_asked(server: Server, tmp_path: Path) -> None:
    for write, metadata, message in (
        (write_negatives, {"negatives": ["nowhere"]}, "metadata.negatives names 'nowhere', no document here"),
        (write_traces, {"reasoning": [1]}, r"metadata\.reasoning must be a text or a mapping"),
    ):
        whole = replace(make_collection(1), queries={"q-amber0": Query("q-amber0", "what?", metadata)})
        with pytest.raises(DataError, match=message):
            write(whole, tmp_path / "out", writer(server))
    assert server.titles == [] and not list(tmp_path.iterdir())


def test_a_collection_that_cannot_be_sent_is_named(tmp_path: Path) -> None:
    given = Writer("http://127.0.0.1:9/v1", "writer")
    whole = make_collection(1)
    for broken, message in (
        (replace(whole, queries={"q-amber0": Query("q-amber0", "half \ud800")}), "holds half a letter"),
        (replace(whole, documents={"amber0": Document("amber0", "half \ud800")}), "holds half a letter"),
        (
            replace(whole, qrels={"train": {"q-amber0": {"amber0": 0}}}),
            "no query of train has a document",
        ),
    ):
        with pytest.raises(DataError, match=message):
            write_traces(broken, tmp_path / "out", given)
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match="photos exists and is no collection"):
        write_traces(whole, tmp_path / "photos", given)
