"""Ids in files are the list that they were, and are found without a dictionary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_r3.retrieval import labels, storage
from search_r3.retrieval.labels import DocIds, RowOf, bytes_of, ends_of

ids = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), unique=True, min_size=1, max_size=20)


def held(doc_ids: list[str]) -> DocIds:
    return DocIds(np.frombuffer(b"".join(bytes_of(doc_ids)), dtype=np.uint8), ends_of(doc_ids))


@given(ids, st.integers(1, 5), st.text(max_size=2))
def test_they_are_a_list_and_a_dictionary_of_rows(doc_ids: list[str], block: int, other: str) -> None:
    doc_ids = sorted(doc_ids, reverse=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels, "AT_A_TIME", block)
        found = held(doc_ids)
        assert found == doc_ids and list(found) == doc_ids and found != [*doc_ids, "more"] and found != doc_ids[1:]
        assert [found[row] for row in range(-len(doc_ids), len(doc_ids))] == doc_ids * 2
        assert found[1:3] == doc_ids[1:3]
        for held_at_most in (0, 1000):
            patch.setattr(labels, "HELD", held_at_most)
            rows = RowOf(found)
            assert dict(rows) == {doc_id: row for row, doc_id in enumerate(doc_ids)}
            assert (other in rows) == (other in doc_ids)
    with pytest.raises(IndexError):
        found[len(doc_ids)]


@given(ids, st.integers(1, 5), st.sampled_from([1, labels.LONG]))
def test_any_other_order_is_refused(doc_ids: list[str], block: int, long: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels, "AT_A_TIME", block)
        patch.setattr(labels, "LONG", long)
        if doc_ids == sorted(doc_ids, reverse=True):
            held(doc_ids)
        else:
            with pytest.raises(ValueError, match="not in descending order"):
                held(doc_ids)
        with pytest.raises(ValueError, match="not in descending order"):
            held([*sorted(doc_ids, reverse=True), min(doc_ids)])


def test_who_asks_for_few_pays_for_no_dictionary() -> None:
    rows = RowOf(held([f"{number:05}" for number in range(3200, 0, -1)]))
    assert [rows["00001"] for _ in range(200)] == [3199] * 200 and rows._rows is None
    assert rows["00002"] == 3198 and rows._rows is not None
    assert rows["00001"] == 3199 and "00000" not in rows


def test_they_are_read_from_the_disk_when_they_are_asked_for(tmp_path: Path) -> None:
    doc_ids = [f"{number:05}" for number in range(3000, 0, -1)]
    writers = storage.label_writers(doc_ids, np.zeros(3000, dtype=np.int64))
    paths = storage.save_state(tmp_path, writers, {})
    found, rows, _ = storage.read_labels(paths, 3000, mmap=True)
    assert isinstance(found, DocIds) and rows["00001"] == 2999
    assert isinstance(found._text.base, np.memmap) and isinstance(found._ends.base, np.memmap)
    found, rows, _ = storage.read_labels(paths, 3000)
    assert (found, type(rows)) == (doc_ids, dict)
