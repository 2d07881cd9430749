"""What the page about models says of each architecture is what happens."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import models_matrix as matrix


@pytest.fixture(scope="module")
def base_tokenizer() -> Any:
    return matrix.load_tokenizer()


def table() -> list[str]:
    text = matrix.PAGE.read_text(encoding="utf-8")
    return text.partition(matrix.START)[2].partition(matrix.END)[0].strip().splitlines()


def test_the_page_has_a_row_for_every_family() -> None:
    assert [row.split(" | ")[0] for row in table()[2:]] == [f"| {name}" for name in matrix.FAMILIES]


@pytest.mark.parametrize("name", matrix.FAMILIES)
def test_a_row_of_the_page_is_what_happens(name: str, base_tokenizer: Any) -> None:
    assert matrix.row(name, base_tokenizer) in table()
