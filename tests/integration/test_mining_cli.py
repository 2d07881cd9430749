"""`data mine`, `data triples` and `data traces` as commands, and one after another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from search_r3.data.collection import Collection, Query
from search_r3.data.triples import training_examples
from search_r3.model.encoder import SearchR3
from search_r3.model.export import export_sentence_transformers
from tests.chat_server import Answer, Server, completion, running_server
from tests.conftest import call


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with running_server(monkeypatch) as running:
        running.answer = answer
        yield running


def answer(title: str, turn: int) -> Answer:
    """What serves all three commands: each takes what it asked for."""
    thing = title.removeprefix("where is the ").rstrip("?")
    return completion(
        json.dumps(
            {
                "query": f"who has ever seen one {thing}?",
                "negatives": [{"title": "thing", "text": f"Nobody ever asks how much the {thing} would cost."}],
                "reasoning": f"This asks for a place, so what is sought tells about one thing: a {thing}.",
            }
        )
    )


def test_mine_with_several_models_and_a_cross_encoder(
    tiny_path: Path,
    collection_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    pytest.importorskip("sentence_transformers")
    model = SearchR3(tiny_path, device="cpu")
    export_sentence_transformers(model.backbone, tmp_path / "peer")
    config = transformers.BertConfig(
        vocab_size=len(model.backbone.tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=1, pad_token_id=model.backbone.tokenizer.pad_token_id,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "cross")
    model.backbone.tokenizer.save_pretrained(tmp_path / "cross")
    retrievers = ["bm25", tiny_path, f"sentence-transformers:{tmp_path / 'peer'}"]
    args = ["data", "mine", collection_path, tmp_path / "mined", "--with", *retrievers, "--depth", 10]
    limits = ["--per-query", 3, "--unfiltered", "--splits", "train", "dev"]
    assert call(monkeypatch, *args, *limits) == 0
    out = capsys.readouterr().out
    assert "90 hard negatives for 30 queries" in out and "dropped: judged " in out
    loaded = Collection.load(tmp_path / "mined")
    assert all(len(example.negative_ids) == 3 for example in training_examples(loaded, "train"))
    assert all("negatives" not in loaded.queries[query_id].metadata for query_id in loaded.split("test"))
    report = json.loads((tmp_path / "mined" / "mining.json").read_text())
    assert [one["kind"] for one in report["retrievers"]] == ["bm25", "dense", "dense"]
    assert report["judge"] == report["retrievers"][1], "the first model judges, not BM25"
    assert report["retrievers"][1]["mode"] == "direct" and report["settings"]["max_share"] is None
    query, documents = loaded.queries["q00"], loaded.documents
    vectors = model.encode_document([documents[doc_id].full_text for doc_id in query.metadata["negatives"]])
    scores = model.similarity(model.encode_query([query.text], "direct"), vectors)[0].tolist()
    assert scores == sorted(scores, reverse=True), "hardest first"
    assert call(monkeypatch, *args) == 2
    assert "mined exists; nothing is overwritten" in capsys.readouterr().err
    args[3] = tmp_path / "second"
    assert call(monkeypatch, *args, *limits, "--cache", tmp_path / "mined.cache", "--skip", 2) == 0
    assert json.loads((tmp_path / "second" / "mining.json").read_text())["resumed"] == report["blocks"]
    args[3] = tmp_path / "third"
    assert call(monkeypatch, *args, "--cross-encoder", tmp_path / "cross", "--cache", tmp_path / "mined.cache") == 0
    assert json.loads((tmp_path / "third" / "mining.json").read_text())["judge"]["kind"] == "cross-encoder"


def test_a_long_query_keeps_its_instruction(
    tiny_path: Path, collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = {
        name: Query(name, f"{query.text * 60} Only {name}.", instruction=f"Only {name}.")
        for name, query in collection.queries.items()
    }
    replace(collection, queries=queries).save(tmp_path / "told")
    asked: list[tuple[str, str]] = []
    plain = SearchR3.encode_query

    def watched(self: SearchR3, texts: list[str], mode: str, *, instruction: list[str]) -> Any:
        asked.extend(zip(texts, instruction, strict=True))
        return plain(self, texts, mode, instruction=instruction)

    monkeypatch.setattr(SearchR3, "encode_query", watched)
    args = ["data", "mine", tmp_path / "told", tmp_path / "mined", "--with", tiny_path, "--max-length", 120]
    assert call(monkeypatch, *args) == 0
    train = collection.qrels["train"]
    assert set(asked) == {(collection.queries[name].text * 60, f"Only {name}.") for name in train}


def test_mine_names_what_it_cannot_use(
    collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    args = ["data", "mine", collection_path, tmp_path / "mined", "--with", "bm25"]
    for change, message in (
        (["--skip", 50], "expected 1 or more negatives, and 0 or more skipped of a larger depth"),
        (["--max-share", 2], "max_share 2.0: expected a share above 0 and up to 1"),
        (["--splits", "none"], "has no split 'none'; it has: dev, test, train"),
        (["--cross-encoder", tmp_path / "nowhere"], "cannot load the cross-encoder"),
    ):
        if "--cross-encoder" in change:
            pytest.importorskip("sentence_transformers")
        assert call(monkeypatch, *args, *change) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert call(monkeypatch, *args[:4], "--with", tmp_path / "no-model") == 2
    assert "no-model" in capsys.readouterr().err
    assert not (tmp_path / "mined").exists()


def test_triples_then_traces_then_mining(
    server: Server,
    collection_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("WRITER_KEY", "sk-7")
    endpoint = ["--endpoint", server.url, "--model", "writer", "--api-key-variable", "WRITER_KEY"]
    prices = ["--price-in", 1000, "--price-out", 10000, "--max-tokens", 64]
    assert call(monkeypatch, "data", "triples", collection_path, tmp_path / "a", *endpoint, *prices, "--limit", 15) == 0
    out = capsys.readouterr().out
    assert "15 of 15 queries to ask about; in all " in out and "960 written; cost " in out
    assert "15 hard negatives for 15 queries" in out
    assert "tokens: 1,500 read, 105 written; 15 requests; cost 2.55" in out
    assert {headers["authorization"] for headers in server.headers} == {"Bearer sk-7"}
    style = ["--style", "llm", "--max-words", 40]
    assert call(monkeypatch, "data", "traces", tmp_path / "a", tmp_path / "b", *endpoint, *style) == 0
    out = capsys.readouterr().out
    assert "20 reasoning traces" in out and "20 requests; --price-in and --price-out show the cost" in out
    assert call(monkeypatch, "data", "mine", tmp_path / "b", tmp_path / "c", "--with", "bm25", "--per-query", 2) == 0
    assert "negatives that queries had: 15, of which 15 stay" in capsys.readouterr().out
    examples = training_examples(Collection.load(tmp_path / "c"), "train")
    written = [example for example in examples if example.negative_ids[0].startswith("written/")]
    assert len(written) == 15 and all(len(example.negative_ids) == 3 for example in written)
    assert all(set(example.reasoning) == {"chain", "restate", "llm"} for example in examples)


def test_triples_for_articles(
    server: Server,
    collection_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    server.answer = lambda title, turn: completion("no") if title == "red house" else answer(title, turn)
    args = ["data", "triples", collection_path, tmp_path / "set", "--endpoint", server.url, "--model", "writer"]
    assert call(monkeypatch, *args, "--articles", "--splits", "made") == 0
    out = capsys.readouterr().out
    assert "39 hard negatives for 39 queries" in out and "1 without: the reply was not JSON" in out
    loaded = Collection.load(tmp_path / "set")
    assert list(loaded.qrels) == ["made"] and len(loaded.documents) == 40 + 39
    assert call(monkeypatch, *args, "--articles", "--splits", "a", "b") == 2
    assert "--splits names a, b; queries that are written go into one split" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["triples", "traces"])
def test_what_cannot_be_written_is_named(
    server: Server,
    command: str,
    collection_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    endpoint = ["--endpoint", server.url, "--model", "writer"]
    args = ["data", command, collection_path, tmp_path / "out", *endpoint]
    assert call(monkeypatch, *args, "--price-in", 1) == 2
    assert "the cost needs both prices; give --price-in and --price-out" in capsys.readouterr().err
    assert call(monkeypatch, *args, "--price-in", -1, "--price-out", 1) == 2
    assert "expected 0 or more per million" in capsys.readouterr().err
    assert call(monkeypatch, "data", command, collection_path, collection_path, *endpoint) == 2
    assert "is what is read; choose another folder to write" in capsys.readouterr().err
    server.answer = lambda title, turn: (404, {}, "no such model")
    assert call(monkeypatch, *args) == 2
    assert "does not know the model 'writer'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
