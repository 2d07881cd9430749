"""Names and texts of users are shown as they are: what looks like markup or an emoji in them is neither."""

from __future__ import annotations

import pytest

from search_r3 import console
from search_r3.data.collection import Document
from search_r3.evaluation.search import Answer

ODD = "set[v2] [b] :key:"


def test_names_and_texts_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console.say(ODD)
    console._show_grid(["name"], [[f"row {ODD}"]], title=f"title {ODD}")
    console.show_answer([Answer("", 0, False, False, [(Document(f"id {ODD}", f"text {ODD}"), 0.5)], "text")])
    out = capsys.readouterr().out
    for place in ("row ", "title ", "id ", "text ", ""):
        assert f"{place}{ODD}" in out
    assert out.count(ODD) == 5
