"""The exact index against a dictionary of vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r3.errors import VectorIndexError
from search_r3.retrieval.index import ExactIndex
from search_r3.retrieval.lexical import BM25
from search_r3.retrieval.metrics import rank

IDS = [f"d{i}" for i in (3, 1, 10, 2, 7, 5, 0)]
# Few distinct values, exact in float32: ties are common and sums do not round.
values = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=3, max_size=3)
updates = st.lists(st.tuples(st.sampled_from(IDS), values), max_size=8)


def matrix(rows: list[list[float]]) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


@settings(max_examples=200, deadline=None)
@given(st.lists(values, min_size=7, max_size=7), updates, values, st.integers(1, 9))
def test_any_sequence_of_updates_agrees_with_a_dictionary(
    start: list[list[float]], changes: list[tuple[str, list[float]]], query: list[float], k: int
) -> None:
    truth = dict(zip(IDS, start, strict=True))
    index = ExactIndex(IDS, matrix(start))
    versions = dict.fromkeys(IDS, 0)
    for version, (doc_id, vector) in enumerate(changes, 1):
        index.update([doc_id], matrix([vector]), version)
        truth[doc_id], versions[doc_id] = vector, version
    scores = {doc_id: float(np.dot(vector, query)) for doc_id, vector in truth.items()}
    result = index.search(matrix([query]), k)
    expected = rank(scores, k)
    assert result.doc_ids[0] == expected
    np.testing.assert_allclose(result.scores[0], [scores[doc_id] for doc_id in expected])
    order = rank(scores)
    assert index.ranks(matrix([query]), [IDS])[0] == {doc_id: order.index(doc_id) + 1 for doc_id in IDS}
    assert dict(zip(index.doc_ids, index.encoded_at_version.tolist(), strict=True)) == versions
    np.testing.assert_array_equal(index.vectors(IDS), matrix([truth[doc_id] for doc_id in IDS]))


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    index = ExactIndex([f"d{i}" for i in range(50)], rng.normal(size=(50, 8)).astype(np.float32))
    queries = rng.normal(size=(11, 8)).astype(np.float32)
    whole, ranks = index.search(queries, 5), index.ranks(queries, [["d3", "d9"]] * 11)
    monkeypatch.setattr(ExactIndex, "block", 3)
    assert index.search(queries, 5).doc_ids == whole.doc_ids
    assert index.ranks(queries, [["d3", "d9"]] * 11) == ranks


def test_a_saved_index_loads_as_it_was(tmp_path: Path) -> None:
    index = ExactIndex(IDS, matrix([[float(i), 1.0, 0.0] for i in range(7)]))
    index.update(["d7"], matrix([[9.0, 9.0, 9.0]]), version=4)
    index.save(tmp_path / "index")
    loaded = ExactIndex.load(tmp_path / "index")
    assert list(loaded.doc_ids) == list(index.doc_ids)
    np.testing.assert_array_equal(loaded.matrix, index.matrix)
    np.testing.assert_array_equal(loaded.encoded_at_version, index.encoded_at_version)
    loaded.update(["d1"], matrix([[0.0, 0.0, 0.0]]), version=5)
    assert loaded.encoded_at_version[loaded.row("d1")] == 5


def test_a_refused_update_changes_nothing() -> None:
    index = ExactIndex(IDS, matrix([[1.0, 0.0, 0.0]] * 7))
    before = index.matrix.copy()
    for ids, vectors, message in (
        (["d1", "nope"], matrix([[1, 1, 1], [1, 1, 1]]), "'nope' is not in the index"),
        (["d1"], matrix([[1, float("nan"), 1]]), "NaN or infinity"),
        (["d1"], matrix([[1, 1]]), "vectors have size 2, the index has size 3"),
        (["d1", "d2"], matrix([[1, 1, 1]]), "expected 2 vectors"),
    ):
        with pytest.raises(VectorIndexError, match=message):
            index.update(ids, vectors, 1)
    np.testing.assert_array_equal(index.matrix, before)
    assert (index.encoded_at_version == 0).all()


def test_empty_doubled_and_unreadable_indexes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(VectorIndexError, match="the corpus is empty"):
        ExactIndex([], matrix([]))
    with pytest.raises(VectorIndexError, match="must be unique"):
        ExactIndex(["a", "a"], matrix([[1, 1], [1, 1]]))
    with pytest.raises(VectorIndexError, match="no usable index"):
        ExactIndex.load(tmp_path)


def test_bm25_finds_shared_words_and_nothing_else() -> None:
    bm25 = BM25(["a", "b", "c"], ["red house", "red boat", "green lamp"])
    assert bm25.search(["house", "a red thing", "the", "zebra"], 10) == [["a"], ["b", "a"], [], []]
    assert bm25.search(["red"], 1) == [["b"]], "equal scores rank by id, as everywhere"
