"""The command line as a user meets it: results, and for bad input one line on stderr, exit status 2, nothing lost."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from search_r3 import cli, console
from search_r3.evaluation.results import load_results
from search_r3.evaluation.search import Answer
from search_r3.model.encoder import SearchR3
from search_r3.retrieval import encode as encoding
from search_r3.retrieval.encoding.identity import PROBE
from search_r3.retrieval.index import ExactIndex
from tests.conftest import SMALL, call, save_tiny, small_collection
from tests.documents_made import pdf
from tests.fake_ray import FakeRay


def test_quickstart_leaves_everything_it_promises(run_dir: Path) -> None:
    report = json.loads((run_dir / "report.json").read_text())
    rows = ["bm25", "bm25+reasoning", "direct/sft", "reason/sft", "direct/rl", "reason/rl"]
    assert list(report["rows"]) == rows
    for row in report["rows"].values():
        for name in ("ndcg@10", "recall@100", "mrr@10"):
            assert 0.0 <= row[name] <= 1.0
        assert row["ndcg@10_interval"][0] <= row["ndcg@10"] <= row["ndcg@10_interval"][1]
        assert row["queries_per_second"] > 0
    assert report["rows"]["reason/rl"]["tokens_per_query"] > 0
    assert report["rows"]["direct/rl"]["tokens_per_query"] == 0
    pairs = [(one["first"], one["second"]) for one in report["comparisons"]]
    assert len(pairs) == 15 and ("reason/rl", "direct/rl") in pairs and ("reason/rl", "reason/sft") in pairs
    assert all(0 < one["p"] <= one["p_holm"] <= 1 for one in report["comparisons"])
    assert report["rows"]["reason/rl"]["gain_per_100_tokens"] == pytest.approx(
        100
        * (report["rows"]["reason/rl"]["ndcg@10"] - report["rows"]["direct/rl"]["ndcg@10"])
        / report["rows"]["reason/rl"]["tokens_per_query"]
    )
    assert sorted(result.system.name for result in load_results(run_dir / "results")) == sorted(rows)
    assert {name: len(values) for name, values in json.loads((run_dir / "rewards.json").read_text()).items()} == {
        "before": 12,
        "after": 12,
    }
    assert "where is the" in (run_dir / "report.html").read_text()
    assert {"share_ge_half_before", "share_ge_half_after", "forced_share"} <= set(report["rollouts"])
    assert report["rollouts"]["count"] == 12
    assert report["seconds"] > 0
    assert report["peak_memory_bytes"] > 2**20
    assert report["versions"]["torch"]
    for name in ("reward.png", "rollout_rewards.png", "ndcg.png", "account.png"):
        assert (run_dir / "plots" / name).read_bytes().startswith(b"\x89PNG")
    for name in ("settings.yaml", "rollouts.jsonl", "collection/corpus.jsonl"):
        assert (run_dir / name).stat().st_size > 0
    for name in ("model", "sft/model"):
        assert {"config.json", "model.safetensors", "tokenizer.json", "search_r3.json"} <= {
            path.name for path in (run_dir / name).iterdir()
        }
    stages = [json.loads(line)["stage"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert (stages.count("sft"), stages.count("grpo")) == (120, 4)


def test_a_complete_quickstart_is_shown_again_and_not_run_again(
    run_dir: Path,
    tiny_path: Path,
    collection_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    before = (run_dir / "report.json").read_bytes()
    where = [f"run_dir={run_dir}", f"base={tiny_path}", f"collection={collection_path}"]
    assert call(monkeypatch, "quickstart", "--resume", *SMALL, *where) == 0
    out = capsys.readouterr().out
    assert "is complete" in out
    assert "reason/rl" in out
    assert "Next: search-r3 search" in out
    index = f"search-r3 index atlas.store --collection atlas --model {run_dir}/model"
    assert out.splitlines()[-1] == f"Next (pip install 'search-r3[serve]'): {index}"
    assert (run_dir / "report.json").read_bytes() == before
    assert call(monkeypatch, "quickstart", *SMALL, *where) == 2
    assert call(monkeypatch, "quickstart", "--resume", *SMALL, *where, "seed=5") == 2
    assert "cannot resume: seed is 5 now but 0" in capsys.readouterr().err


def ranked(out: str) -> list[str]:
    """The lines of a search's table of documents."""
    return [line for line in out.splitlines() if line.strip().startswith(("0.", "1.", "-0."))]


def test_search_shows_reasoning_and_ranked_documents(
    run_dir: Path, collection_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    query = "where is the red house?"
    args = ["search", run_dir / "model", "--collection", collection_path, "-k", 3]
    assert call(monkeypatch, *args, query) == 0
    out = capsys.readouterr().out
    assert re.search(r"^reasoning: \S.* \(\d+ tokens\)$", out, re.MULTILINE)
    assert len(ranked(out)) == 3
    assert call(monkeypatch, *args, query, "--mode", "direct") == 0
    assert "reasoning" not in capsys.readouterr().out


def test_search_without_a_query_is_a_prompt(
    run_dir: Path, collection_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    lines = iter(["a red house", "a green boat", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert call(monkeypatch, "search", run_dir / "model", "-c", collection_path, "--mode", "direct") == 0
    assert capsys.readouterr().out.count("score") == 2


def test_a_query_longer_than_the_context_is_cut_and_said(
    run_dir: Path, collection_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    long = "red house " * 500
    assert call(monkeypatch, "search", run_dir / "model", long, "-c", collection_path, "--mode", "direct") == 0
    assert "longer than the model's max_length and lost its end" in capsys.readouterr().out


def test_the_parts_give_the_same_model_as_quickstart(
    run_dir: Path, tiny_path: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = [f"run_dir={tmp_path / 'parts'}", f"base={tiny_path}", f"collection={collection_path}"]
    assert call(monkeypatch, "sft", *SMALL, *where) == 0
    assert call(monkeypatch, "grpo", *SMALL, *where) == 0
    expected, found = (folder / "model" / "model.safetensors" for folder in (run_dir, tmp_path / "parts"))
    assert found.read_bytes() == expected.read_bytes()
    assert call(monkeypatch, "sft", *SMALL, *where) == 2, "a stage that has begun is not begun again"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The documents that models encode, collected; commands encode them in blocks of 8."""
    texts: list[str] = []
    whole = SearchR3.encode_document

    def encode(self: SearchR3, documents: list[str], **options: Any) -> Any:
        texts.extend(text for text in documents if text != PROBE)
        return whole(self, documents, **options)

    monkeypatch.setattr(SearchR3, "encode_document", encode)
    monkeypatch.setattr(encoding, "BLOCK_SIZES", {"cpu": 8, "cuda": 8})
    return texts


def test_an_encoded_collection_is_searched_without_encoding_it_again(
    run_dir: Path, collection_path: Path, tmp_path: Path, encoded: list[str], monkeypatch: Any, capsys: Any
) -> None:
    model, index = run_dir / "model", tmp_path / "[1]" / "index"
    assert call(monkeypatch, "encode", model, index, "-c", collection_path) == 0
    assert re.search(
        r"/\[1\]/index: 40 vectors of size 32 as float16; [\d,.]+/s, [\d,]+ tokens/s", capsys.readouterr().out
    )
    texts = small_collection().texts()
    assert encoded == list(texts.values())
    vectors = SearchR3(model, device="cpu").encode_document(list(texts.values()))
    stored = ExactIndex.load(index)
    np.testing.assert_allclose(stored.vectors_at([stored.row(doc_id) for doc_id in texts]), vectors, atol=1e-3)
    search = ["search", model, "where is the red house?", "-c", collection_path, "-k", 3]
    assert call(monkeypatch, *search) == 0
    expected = ranked(capsys.readouterr().out)
    encoded.clear()
    assert call(monkeypatch, *search, "--index", index) == 0
    assert [line.split()[1] for line in ranked(capsys.readouterr().out)] == [line.split()[1] for line in expected]
    assert encoded == []
    assert call(monkeypatch, "encode", model, tmp_path / "wide", "-c", collection_path, "--vectors", "float32") == 0
    assert ExactIndex.load(tmp_path / "wide").dtype == "float32"


def test_shards_are_searched_as_the_index_of_one_encoding(
    run_dir: Path, collection_path: Path, tmp_path: Path, encoded: list[str], monkeypatch: Any, capsys: Any
) -> None:
    model, parts, whole = run_dir / "model", tmp_path / "parts", tmp_path / "whole"
    encode = ["encode", model, parts, "-c", collection_path]
    assert call(monkeypatch, *encode, "--shard", "2/2", "--block-size", 8) == 0
    assert "parts: 1 of 2 shards; in 2/2: 24 vectors of size 32 as float16" in capsys.readouterr().out
    assert call(monkeypatch, *encode) == 2
    assert "holds 1 of 2 shards; encode the others with --shard: 1/2" in capsys.readouterr().err
    assert call(monkeypatch, *encode, "--shard", "3/2") == 2
    assert "no shard '3/2': expected I/N" in capsys.readouterr().err
    assert call(monkeypatch, *encode, "--shard", "1/2", "--block-size", 8) == 0
    assert "parts: all 2 shards, 40 vectors of size 32 as float16" in capsys.readouterr().out
    assert call(monkeypatch, "encode", model, whole, "-c", collection_path, "--block-size", 8) == 0
    np.testing.assert_array_equal(ExactIndex.load(parts).matrix, ExactIndex.load(whole).matrix)
    encoded.clear()
    shown = []
    for index in (parts, whole):
        capsys.readouterr()
        assert call(monkeypatch, "search", model, "a red house", "-c", collection_path, "--index", index) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and len(ranked(shown[0])) == 5
    assert encoded == []


def test_an_index_is_given_a_graph_and_says_its_recall(
    run_dir: Path, collection_path: Path, tmp_path: Path, encoded: list[str], monkeypatch: Any, capsys: Any
) -> None:
    model, index = run_dir / "model", tmp_path / "index"
    encode = ["encode", model, index, "-c", collection_path]
    assert call(monkeypatch, *encode, "--index-type", "auto") == 0
    assert "hnsw" not in capsys.readouterr().err, "40 documents are searched exactly"
    encoded.clear()
    assert call(monkeypatch, *encode, "--index-type", "hnsw") == 0
    said = "searched by a graph (hnsw): recall@10 1.000 against exact search"
    assert said in " ".join(capsys.readouterr().err.split())
    assert json.loads((index / "manifest.json").read_text())["index_type"] == "hnsw"
    assert call(monkeypatch, "search", model, "a red house", "-c", collection_path, "--index", index) == 0
    out, err = capsys.readouterr()
    assert said in " ".join(err.split()) and len(ranked(out)) == 5
    assert encoded == [], "vectors are encoded once"


def test_ray_encodes_what_a_process_does(
    run_dir: Path, collection_path: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setitem(sys.modules, "ray.data", fake.data)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    encode = ["encode", run_dir / "model", "-c", collection_path, "--block-size", 8]
    assert call(monkeypatch, *encode, tmp_path / "one") == 0
    for name, ray in (
        ("none", ["--ray"]),
        ("option", ["--ray-actors", 2, "--ray"]),
        ("local", ["--ray", "--ray-address", "local"]),
    ):
        assert call(monkeypatch, *encode, tmp_path / name, *ray) == 0
        found, expected = (ExactIndex.load(tmp_path / folder) for folder in (name, "one"))
        np.testing.assert_array_equal(found.matrix, expected.matrix)
    assert fake.starts == 1 + 2 + 1
    assert call(monkeypatch, *encode, tmp_path / "x", "--ray", "--ray-address", "10.0.0.1:6379") == 2
    assert "no Ray cluster at '10.0.0.1:6379'" in capsys.readouterr().err
    for alone in (["--ray-actors", 2], ["--ray-address", "auto"]):
        assert call(monkeypatch, *encode, tmp_path / "x", *alone) == 2
        assert "--ray-address and --ray-actors are for --ray; add it" in capsys.readouterr().err
    before_names = ["encode", "--ray", run_dir / "model", tmp_path / "first", "-c", collection_path]
    assert call(monkeypatch, *before_names) == 0, "no argument is taken for an address"
    assert len(ExactIndex.load(tmp_path / "first")) == 40


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Own documents: five files and two that are no texts."""
    folder = tmp_path / "notes [1]"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "house.md").write_text("# Houses\n\n" + "A red [house]. " * 60 + "\n\n## Boats\n\nGreen boats.\n")
    (folder / "page.html").write_text("<title>Lamps</title><h1>Black lamps</h1><p>A black lamp.")
    (folder / "paper.pdf").write_bytes(pdf(["A white chair.", "A blue river."]))
    (folder / "rows.csv").write_text("url,body,year\nu1,A black [horse].,1999\nu2,A white stone.,2001\n")
    (folder / "scan.pdf").write_bytes(pdf([""]))
    (folder / "image.png").write_bytes(b"\x89PNG\0\0")
    return folder


def test_own_documents_are_searched_and_encoded(
    tiny_path: Path, notes: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    own = ["--documents", notes, "--column", "id=url", "--chunk-tokens", 64, "--untrained"]
    search = ["search", tiny_path, "a red house", "--mode", "direct", *own]
    assert call(monkeypatch, *search, "-k", 9) == 0
    out, err = capsys.readouterr()
    assert len(ranked(out)) == 5
    assert "rows.csv:u1" in out and "page 1," in out and "A black [horse]." in out
    read = re.search(r"5 documents, (\d+) chunks; not read: (.*)", err)
    assert "1 x binary: " in read[2] and "1 x a PDF without text (scanned pages?): " in read[2]
    assert call(monkeypatch, *search, "--json", "--top", 5) == 0
    out = capsys.readouterr().out
    answer = json.loads(out)
    assert len(out.splitlines()) == 1
    parents = {"sub/house.md", "page.html", "paper.pdf", "rows.csv:u1", "rows.csv:u2"}
    assert {hit["parent_id"] for hit in answer["hits"]} == parents
    assert [hit["score"] for hit in answer["hits"]] == sorted((hit["score"] for hit in answer["hits"]), reverse=True)
    assert call(monkeypatch, "encode", tiny_path, tmp_path / "index", *own) == 0
    assert f"{read[1]} vectors of size" in capsys.readouterr().out
    assert len(ExactIndex.load(tmp_path / "index")) == int(read[1])
    assert call(monkeypatch, *search, "--json", "--top", 5, "--index", tmp_path / "index") == 0
    again = json.loads(capsys.readouterr().out)
    assert [hit["id"] for hit in again["hits"]] == [hit["id"] for hit in answer["hits"]]
    (notes / "new.txt").write_text("written since")
    assert call(monkeypatch, *search, "--index", tmp_path / "index") == 2
    assert "was encoded from other documents" in capsys.readouterr().err
    before = sorted(notes.rglob("*"))
    for place in (notes, notes / "sub" / "index"):
        assert call(monkeypatch, "encode", tiny_path, place, *own) == 2
        assert f"{place} lies in {notes}, whose files are read as documents" in " ".join(
            capsys.readouterr().err.split()
        )
    assert sorted(notes.rglob("*")) == before


def test_own_documents_that_cannot_be_had_are_one_line(
    tiny_path: Path, notes: Path, monkeypatch: Any, capsys: Any
) -> None:
    for args, message in (
        (["-d", notes / "no"], "no documents at "),
        (["-d", notes / "scan.pdf"], "no document with text in "),
        (["-d", notes, "-c", "atlas"], "--collection and --documents: give one of them"),
        (["-d", notes, "--column", "text"], "--column text: expected FIELD=COLUMN"),
        (["-d", notes, "--column", "txt=a"], "unknown field 'txt'"),
        (["-d", notes / "rows.csv", "--column", "text=no"], "no column 'no'; it has 'body', 'url', 'year'"),
        (["-d", notes, "--chunk-tokens", "9999"], "chunks of 9999 tokens, but with max_length="),
        (["-d", notes, "--chunk-overlap", "400"], "an overlap of 400 tokens: expected 0 to "),
    ):
        assert call(monkeypatch, "search", tiny_path, "x", "--mode", "direct", "--untrained", *args) == 2, args
        err = capsys.readouterr().err.strip().splitlines()
        assert err[-1].startswith("error: ") and message in err[-1], (args, err)


def test_a_prompt_with_json_answers_each_line_with_one(
    tiny_path: Path, notes: Path, monkeypatch: Any, capsys: Any
) -> None:
    lines = iter(["a red house", "a lamp", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: sys.stdout.write(prompt) * "" or next(lines))
    assert call(monkeypatch, "search", tiny_path, "-d", notes, "--mode", "direct", "--json", "--untrained") == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["query"] for answer in answers] == ["a red house", "a lamp"]


def test_encode_goes_on_where_it_was_stopped(
    tiny_path: Path, collection_path: Path, tmp_path: Path, encoded: list[str], monkeypatch: Any, capsys: Any
) -> None:
    args = ["encode", tiny_path, tmp_path / "index", "-c", collection_path, "--untrained"]
    texts = list(small_collection().texts().values())
    with monkeypatch.context() as patch:
        whole = SearchR3.encode_document

        def stopped(self: SearchR3, documents: list[str], **options: Any) -> Any:
            if texts[20] in documents:
                raise KeyboardInterrupt
            return whole(self, documents, **options)

        patch.setattr(SearchR3, "encode_document", stopped)
        assert call(patch, *args) == 130
    assert "encode and index with the same command" in capsys.readouterr().err
    encoded.clear()
    assert call(monkeypatch, *args) == 0
    assert "16 of 40 documents are encoded already" in capsys.readouterr().out
    assert encoded == texts[16:]
    assert call(monkeypatch, *args) == 0
    assert "40 of 40 documents are encoded already" in capsys.readouterr().out
    assert encoded == texts[16:]


def test_encode_reads_the_built_in_collection(
    tiny_path: Path, tmp_path: Path, encoded: list[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("search_r3.data.load.BUILDERS", {"atlas": lambda seed: small_collection()})
    assert call(monkeypatch, "encode", tiny_path, tmp_path / "index", "--untrained") == 0
    assert len(encoded) == 40


def test_an_index_of_another_model_or_collection_is_not_searched(
    tiny_path: Path, collection_path: Path, tokenizer: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    index, other, changed = tmp_path / "index", tmp_path / "other", tmp_path / "changed"
    save_tiny(other, tokenizer, "llama")
    small_collection().save(changed)
    corpus_file = changed / "corpus.jsonl"
    corpus_file.write_text(corpus_file.read_text().replace("white chair", "brown chair"))
    assert call(monkeypatch, "encode", tiny_path, index, "-c", collection_path, "--untrained") == 0
    before = {path.name: path.read_bytes() for path in index.iterdir()}
    for args, message in (
        (
            ["search", tiny_path, "x", "-c", changed, "--index", index, "--untrained"],
            "was encoded from other documents",
        ),
        (
            ["search", other, "x", "-c", collection_path, "--index", index, "--untrained"],
            "was encoded by another model",
        ),
        (
            ["search", tiny_path, "x", "-c", collection_path, "--index", tmp_path, "--untrained"],
            "holds no index; encode the corpus",
        ),
        (["encode", tiny_path, index, "-c", changed, "--untrained"], "was encoded from other documents"),
        (["encode", other, index, "-c", collection_path, "--untrained"], "was encoded by another model"),
        (
            ["encode", tiny_path, index, "-c", collection_path, "--vectors", "float32", "--untrained"],
            "as float16, not as float32",
        ),
    ):
        assert call(monkeypatch, *args) == 2, args
        err = capsys.readouterr().err.strip().splitlines()
        assert err[-1].startswith("error: ") and message in err[-1], (args, err)
        assert {path.name: path.read_bytes() for path in index.iterdir()} == before


def test_export_writes_a_sentence_transformers_directory_once(
    tiny_path: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    out = tmp_path / "out"
    assert call(monkeypatch, "export", tiny_path, out, "--weights", "float16") == 0
    assert "SentenceTransformer(" in capsys.readouterr().out
    assert (out / "modules.json").exists()
    from safetensors import safe_open

    with safe_open(out / "model.safetensors", "np") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {np.dtype("float16")}
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert call(monkeypatch, "export", tiny_path, out) == 2
    assert "exists; nothing is overwritten" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_reasoning_is_shown_while_it_is_written(capsys: pytest.CaptureFixture) -> None:
    shown = []

    def pieces() -> Iterator[str | Answer]:
        for piece in ("It [is]", " the\n", "  red", " house."):
            yield piece
            shown.append(capsys.readouterr().out)
        yield Answer("It [is] the\n  red house.", 9, True, True, [(small_collection().documents["d00"], 0.5)])

    console.show_answer(pieces())
    assert shown == ["reasoning: It [is]", " the\n", "  red", " house."]
    end = capsys.readouterr().out
    assert end.startswith(" (9 tokens)\n")
    assert "it was forced" in end and "lost its end" in end
    assert ranked(end)


def test_the_speed_is_that_of_what_is_done_now(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 12.0, 14.0, 14.0])
    monkeypatch.setattr("search_r3.console.time.perf_counter", lambda: next(clock))
    with console.bar("documents") as bar:
        bar.begin(100, 50)
        bar.advance(20, 600)
        bar.advance(20, 200)
        assert bar.speed == "10.0/s, 200 tokens/s"


def test_a_warning_that_every_block_repeats_is_shown_once() -> None:
    shown = cli._first_of_its_kind()
    records = [
        logging.LogRecord(name, logging.WARNING, "", 0, text, (number,), None)
        for name, text, number in (("a", "%d cut", 3), ("a", "%d cut", 4), ("a", "%d lost", 4), ("b", "%d cut", 4))
    ]
    assert [shown(record) for record in records] == [True, False, True, True]
    fault = logging.LogRecord("a", logging.ERROR, "", 0, "a fault of the server", (), None)
    assert shown(fault) and shown(fault), "each error is another one"


def broken_collection(folder: Path) -> Path:
    small_collection().save(folder)
    with (folder / "corpus.jsonl").open("a") as file:
        file.write("{not json\n")
    return folder


def test_bad_input_is_one_line_and_status_2(
    tmp_path: Path,
    tiny_path: Path,
    collection_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    broken = broken_collection(tmp_path / "broken")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((tiny_path / name).read_bytes())
    fresh = [f"run_dir={tmp_path / 'fresh'}", f"base={tiny_path}", f"collection={collection_path}", *SMALL]
    cases = [
        (["search", tiny_path, "x", "-c", broken], "corpus.jsonl:41: not valid JSON"),
        (["sft", "sft.stps=3"], "unknown setting 'sft.stps'; did you mean 'steps'?"),
        (["search", bare, "x", "-c", collection_path], "has no tokenizer (tokenizer.json is missing)"),
        (["search", tiny_path, " ", "-c", collection_path], "the query is empty"),
        (["search", tmp_path / "nowhere", "x"], "no model directory at"),
        (
            ["evaluate", "-m", tiny_path, "-c", collection_path, "--splits", "tset"],
            "has no split 'tset'; it has: dev, test",
        ),
        (["data", "build", "atlas", broken], "exists; nothing is overwritten"),
        (["base", broken], "exists; nothing is overwritten"),
        (["grpo", *fresh, "--model", tiny_path, "max_new_tokens=1"], "emitted the embed token within 1 tokens"),
        (["sft", *fresh, "--recipe", tmp_path / "no.yaml"], "cannot read the recipe"),
        (["encode", tiny_path, tmp_path / "i", "-c", broken, "--untrained"], "corpus.jsonl:41: not valid JSON"),
        (["encode", tiny_path, tmp_path / "i", "-c", tmp_path / "no", "--untrained"], "the folder does not exist"),
        (["export", tiny_path, broken], "exists; nothing is overwritten"),
    ]
    for args, message in cases:
        assert call(monkeypatch, *args) == 2, args
        err = capsys.readouterr().err.strip().splitlines()
        assert message in err[-1], (args, err)
        assert err[-1].startswith("error: ")


def test_a_model_that_never_emits_the_token_cannot_be_evaluated_in_reason_mode(
    tiny_path: Path,
    collection_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    where = ["--out", tmp_path / "out", "--bootstrap", 100, "--latency-queries", 0]
    assert call(monkeypatch, "evaluate", "-m", tiny_path, "-c", collection_path, "--modes", "reason", *where) == 2
    assert "emitted <|embed_token|> for none of 10 queries" in capsys.readouterr().err
    assert call(monkeypatch, "evaluate", "-m", tiny_path, "-c", collection_path, "--modes", "direct", *where) == 0


def test_the_installed_command_answers_help_and_errors(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("search-r3")
    shown = subprocess.run([command, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    for name in (
        "quickstart",
        "data",
        "base",
        "sft",
        "grpo",
        "evaluate",
        "mteb",
        "report",
        "encode",
        "export",
        "search",
    ):
        assert name in shown.stdout
    failed = subprocess.run(
        [command, "sft", "grpo.stps=1", f"run_dir={tmp_path / 'x'}"], capture_output=True, text=True
    )
    assert failed.returncode == 2
    assert failed.stderr.strip() == "error: unknown setting 'grpo.stps'; did you mean 'steps'?"
    assert not (tmp_path / "x").exists()


def test_a_full_disk_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import errno

    def full(self: object, folder: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr("search_r3.data.collection.Collection.save", full)
    assert call(monkeypatch, "data", "build", "atlas", tmp_path / "atlas") == 2
    assert (
        capsys.readouterr().err.strip() == f"error: cannot read or write {tmp_path / 'atlas'}: No space left on device"
    )
