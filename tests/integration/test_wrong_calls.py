"""Calls as people type them in their first hour: each works, or one line says what to do."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call

from search_r3 import SearchR3, read_documents
from search_r3.errors import ConfigError, DataError, ModelError, SearchR3Error
from search_r3.model.export import export_sentence_transformers
from tests.conftest import small_collection

TEXTS = ["red house", "blue boat"]


@pytest.fixture
def place(tmp_path: Path, tiny_path: Path, collection_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model in a run, a collection, notes, a file, and an empty folder; calls are made from there."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_path, tmp_path / "run" / "model")
    shutil.copytree(collection_path, tmp_path / "c")
    for name in ("notes", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes" / "a.md").write_text("# Tea\n\nGreen tea is not oxidised.\n")
    (tmp_path / "file.txt").write_text("mine")
    return tmp_path


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda m: m.encode_query(None), DataError, "the texts are of type NoneType; expected a list of strings"),
        (lambda m: m.encode_query(5), DataError, "of type int; expected a list"),
        (lambda m: m.encode_query({"q1": "red house"}), DataError, "of type dict; expected a list"),
        (lambda m: m.encode_document(b"red"), DataError, "of type bytes; expected a list"),
        (lambda m: m.encode_query(["red", 3]), DataError, "query number 1 is 3; expected a text"),
        (lambda m: m.encode_query(["red", "\ud83d"]), DataError, "query number 1 holds half a surrogate pair"),
        (lambda m: m.encode_document(["caf\udce9"]), DataError, "document number 0 holds a byte that is no UTF-8"),
        (lambda m: m.encode_query(TEXTS, instruction=None), DataError, "the instruction is None; expected a text"),
        (lambda m: m.encode_query(TEXTS, batch_size=0), ConfigError, "batch_size=0: expected at least 1"),
        (lambda m: m.similarity("red", "blue"), DataError, "expected vectors, found something else; encode texts"),
        (lambda m: m.similarity(np.ones((1, 3)), np.ones((2, 4))), DataError, "encode both with one model"),
        (lambda m: SearchR3(None), ModelError, "the model is None; expected a directory"),
        (lambda m: SearchR3(" "), ModelError, "the model is ' '; expected a directory"),
        (lambda m: SearchR3("x" * 300), ModelError, "no model directory at 'xxx.*too long"),
        (lambda m: SearchR3("run/model", device=["cpu"]), ConfigError, "a model is loaded on one device"),
        (lambda m: SearchR3("run/model", max_length="90"), ConfigError, "max_length='90': expected a whole number"),
        (lambda m: read_documents("notes", chunking=100), ConfigError, "chunking=100: expected a Chunking"),
        (lambda m: m.save_pretrained("file.txt"), ConfigError, "file.txt is there and holds something else"),
        (lambda m: m.save_pretrained("notes"), ConfigError, "notes is there and holds something else"),
        (lambda m: export_sentence_transformers(m.backbone, "run/model"), ConfigError, "holds something else"),
        (lambda m: small_collection().save("notes"), ConfigError, "holds something else, so it is not replaced"),
    ],
)
def test_python_says_what_to_do(
    model: SearchR3, place: Path, use: Callable[[SearchR3], Any], error: type[SearchR3Error], message: str
) -> None:
    before = sorted(place.rglob("*"))
    with pytest.raises(error, match=message) as caught:
        use(model)
    assert "\n" not in str(caught.value)
    assert sorted(place.rglob("*")) == before and (place / "file.txt").read_text() == "mine"


def test_python_takes_what_is_meant(model: SearchR3, place: Path) -> None:
    expected = model.encode_document(TEXTS)
    for texts in (tuple(TEXTS), iter(TEXTS), np.array(TEXTS), dict.fromkeys(TEXTS).keys()):
        np.testing.assert_array_equal(model.encode_document(texts), expected)
    model.save_pretrained("empty")
    model.save_pretrained("empty")  # over a model
    np.testing.assert_array_equal(SearchR3(Path("empty")).encode_document(TEXTS), expected)
    small_collection().save("c")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("search 'where is tea?'", "no model directory at where is tea?; give a directory with config.json"),
        ("search run tea -c c", "run is no model directory: config.json is missing; there is a model in run/model"),
        ("search run/model tea -d nowhere", "no documents at nowhere: expected a file, a folder, or a data set"),
        ("search run/model tea -d run/x", "no documents at run/x: expected a file, a folder"),
        ("search run/model tea -c notes", "Documents alone are searched and encoded with --documents"),
        ("search run/model tea -c run/x", "no collection at run/x: the folder does not exist"),
        ("search run/model tea -d empty", "no document with text in empty: it is empty"),
        ("search run/model tea -c c --index none", "none holds no index; encode the corpus into it"),
        ("search run/model tea -c c --index notes", "notes holds no index; encode the corpus into it"),
        ("search run/model tea -c c --device gpu", "device 'gpu' cannot be used here"),
        ("search run/model tea -c c --prompts bert", "prompts='bert' is no prompt set; expected search-r3"),
        ("search run/model 'caf\udce9' -c c", "the argument 'caf\\udce9' holds a byte that is no UTF-8"),
        ("search run/model tea -c c --instruction 'caf\udce9'", "the argument 'caf\\udce9' holds a byte"),
        ("encode run/model file.txt -c c --untrained", "cannot save the index to file.txt: File exists"),
        ("export run/model notes", "notes exists; nothing is overwritten: remove it or choose another"),
        ("grpo run_dir=new collection=c", "no stage-1 model in new/sft/model; train it (search-r3 sft run_dir=new)"),
        ("sft base=nowhere run_dir=new collection=c 'sft.splits={train: 1.0}'", "no model directory at nowhere"),
        ("sft collection=c run_dir=notes", "notes exists and holds no run; set run_dir=ANOTHER"),
        ("evaluate -m nowhere -c c", "no model directory at nowhere; give a directory"),
        ("evaluate -c c --baselines bm52", "unknown baseline 'bm52'; did you mean 'bm25'?"),
        ("data mine c out --with nonsense --splits train", "no model directory at nonsense; give a directory"),
        ("data traces c out --endpoint localhost:80 --model x --splits test", "expected one such as http://localhost"),
        ("push notes o/m", "notes is neither a model nor a run"),
        ("report notes", "no results in notes/results; give a folder that quickstart or evaluate wrote"),
    ],
)
def test_a_command_says_what_to_do(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    arguments = shlex.split(command)
    untrained = ["--untrained"] if arguments[:2] == ["search", "run/model"] else []
    assert call(monkeypatch, *arguments, *untrained) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error and error.strip().splitlines()[-1].startswith("error: ")
    assert (place / "file.txt").read_text() == "mine" and [path.name for path in (place / "notes").iterdir()] == [
        "a.md"
    ]


def test_a_path_may_hold_bytes_that_are_no_text(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "notes").rename("caf\udce9")
    for source in ("caf\udce9", "old=caf\udce9"):
        assert call(monkeypatch, "search", "run/model", "tea", "-d", source, "--untrained", "--mode", "direct") == 0
        assert "a.md" in capsys.readouterr().out


def test_queries_that_are_no_text_are_named(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for typed in ("caf\udce9", UnicodeDecodeError("utf-8", b"caf\xe9", 3, 4, "invalid")):

        def read(prompt: str = "", typed: Any = typed) -> str:
            if isinstance(typed, Exception):
                raise typed
            return typed

        monkeypatch.setattr("builtins.input", read)
        assert call(monkeypatch, "search", "run/model", "-c", "c", "--untrained", "--mode", "direct") == 2
        assert "no UTF-8" in capsys.readouterr().err.splitlines()[-1]


def test_a_training_whose_first_call_was_wrong_begins_with_the_mended_one(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["run_dir=new", "collection=c", "sft.steps=1", "sft.splits={train: 1.0}", "sft.batch_size=2"]
    settings += ["max_length=120", "max_new_tokens=16", "sft.reasoning_styles={restate: 1.0}"]
    assert call(monkeypatch, "sft", *settings, "base=nowhere") == 2
    assert call(monkeypatch, "sft", *settings, "base=run/model") == 0
    assert call(monkeypatch, "sft", "--resume", *settings, "base=nowhere") == 2
    assert "cannot resume: base is 'nowhere' now but 'run/model'" in capsys.readouterr().err
