"""Names and texts of users are shown as they are: what looks like markup or an emoji in them is neither."""

from __future__ import annotations

import pytest

from search_r3 import console
from search_r3.data.collection import Document
from search_r3.data.documents import Chunk
from search_r3.evaluation.search import Answer

ODD = "set[v2] [b] :key:"


def test_names_and_texts_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console.say(ODD)
    console.show_grid(["name"], [[f"row {ODD}"]], title=f"title {ODD}")
    console.show_answer([Answer("", 0, False, False, [(Document(f"id {ODD}", f"text {ODD}"), 0.5)], "text")])
    out = capsys.readouterr().out
    for place in ("row ", "title ", "id ", "text ", ""):
        assert f"{place}{ODD}" in out
    assert out.count(ODD) == 5


def test_a_chunk_is_shown_with_its_title(capsys: pytest.CaptureFixture[str]) -> None:
    place = {"parent_id": "tea.md", "start": 0, "end": 12, "content_hash": ""}
    titled = Chunk("tea.md#0", "It is green.", "Tea [v2]", **place)  # type: ignore[arg-type]
    plain = Chunk("tea.md#1", "It is black.", **place)  # type: ignore[arg-type]
    console.show_answer([Answer("", 0, False, False, [(titled, 0.5), (plain, 0.4)], "tea")])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:4:2] == [["0.500", "tea.md", "Tea", "[v2]"], ["0.400", "tea.md", "It", "is", "black."]]
    assert lines[2][-3:] == ["It", "is", "green."]


def test_an_answer_without_documents_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_answer([Answer("", 0, False, False, [], "tea")])
    assert capsys.readouterr().out == "no document was found\n"
