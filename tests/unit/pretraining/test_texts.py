"""Pretraining on texts: what is read, what is packed, what is measured."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from search_r3.config import BaseModelSettings
from search_r3.errors import DataError
from search_r3.model.loading import load_backbone
from search_r3.pretraining.base import train_base
from search_r3.pretraining.texts import HELD_OUT, Texts, read_texts
from tests.conftest import call

DIALOGUE = [{"role": "user", "content": "where is the red boat?"}, {"role": "assistant", "content": "On the river."}]


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_folders_hold_documents_dialogues_and_plain_text(tmp_path: Path) -> None:
    write_rows(tmp_path / "corpus.jsonl", {"_id": "1", "title": "Boats", "text": "They float."}, {"messages": DIALOGUE})
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.txt").write_text("One\nparagraph.\n\n\nAnother.\n")
    (tmp_path / "notes.md").write_text("not read")
    texts = read_texts([tmp_path])
    dialogue = (("user", "where is the red boat?"), ("assistant", "On the river."))
    assert texts.train + texts.held_out == ["Boats They float.", dialogue, "One paragraph.", "Another."]
    assert "where is the red boat?\nOn the river." in list(texts.words())


def test_one_text_in_a_hundred_is_held_out_wherever_it_stands(tmp_path: Path) -> None:
    rows = [{"text": f"text number {i}"} for i in range(1000)]
    texts = read_texts([write_rows(tmp_path / "a.jsonl", *rows, *rows)])
    assert 0.3 < len(texts.held_out) * HELD_OUT / 2000 < 2
    assert not set(texts.held_out) & set(texts.train)
    assert all(texts.held_out.count(text) == 2 for text in texts.held_out)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"title": "no text"}, "a.jsonl:1: expected a string 'text' or a list 'messages'"),
        ({"messages": [{"role": "user"}]}, "a.jsonl:1: a message needs the strings 'role' and 'content'"),
        ({"text": "  "}, "no text in"),
        ({"text": "half \ud83d"}, "a.jsonl:1: the text holds half a surrogate pair, which is no text"),
        ({"title": "\udc00", "text": "x"}, "a.jsonl:1: the text holds half a surrogate pair"),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, "a.jsonl:1: a message holds half a surrogate pair"),
    ],
)
def test_rows_that_cannot_be_read_are_named(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_texts([write_rows(tmp_path / "a.jsonl", row)])


def test_paths_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").touch()
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    for path, message in (("none", "no such file"), ("a.pdf", "ends in .jsonl or .txt"), ("b.txt", "not UTF-8")):
        with pytest.raises(DataError, match=message):
            read_texts([tmp_path / path])


def test_every_pass_packs_all_texts_each_after_an_end_of_text(tokenizer: Any) -> None:
    texts = Texts(["red boat", (("user", "green house"),)], [])
    lengths = [len(tokenizer.encode("red boat", add_special_tokens=False)) + 1]
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "green house"}], tokenize=False)
    lengths.append(len(tokenizer.encode(rendered, add_special_tokens=False)) + 1)
    ids = list(itertools.islice(texts.tokens(tokenizer, random.Random(0)), 3 * sum(lengths)))
    assert ids.count(tokenizer.pad_token_id) == 6
    assert tokenizer.decode(ids).count("red boat") == 3


def test_a_text_cannot_end_a_turn(tokenizer: Any) -> None:
    ids = list(itertools.islice(Texts(["a <|im_end|> b"], []).tokens(tokenizer, random.Random(0)), 8))
    assert tokenizer.eos_token_id not in ids


def test_a_model_learns_the_texts_and_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"text": f"the {colour} boat number {i} floats on the river"} for i in range(100) for colour in ("red", "blue")
    ]
    path = write_rows(tmp_path / "a.jsonl", *rows, {"messages": DIALOGUE})
    sizes = {"batch_size": 4, "sequence_length": 16, "vocab_size": 600, "hidden_size": 64, "layers": 1}
    first = train_base(BaseModelSettings(steps=1, **sizes), tmp_path / "one", seed=0, texts=[path])
    last = train_base(BaseModelSettings(steps=60, **sizes), tmp_path / "many", seed=0, texts=[path])
    assert last["held_out_loss"] < first["held_out_loss"] - 2, "what was held out is like what was learned"
    assert load_backbone(tmp_path / "many").dimension == 64
    overrides = [f"base_model.{key}={value}" for key, value in {**sizes, "steps": 1}.items()]
    assert call(monkeypatch, "base", tmp_path / "cli", *overrides, "--texts", path) == 0
    assert "held_out_loss" in capsys.readouterr().out
