"""The sketches of a corpus against the exact index of the same vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from search_r3.environment import sketch
from search_r3.environment.sketch import SketchIndex
from search_r3.errors import VectorIndexError
from search_r3.retrieval.index import ExactIndex

COUNT, SIZE, DEPTH, K = 1500, 64, 10, 6
IDS = [f"{COUNT - row:04}" for row in range(COUNT)]
NONE = [np.empty(0, np.int64)] * 20


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small corpus is searched by its sketches."""
    for name, value in {"SHARE": 2, "FIRST": 4, "UNIT": 4, "QUERIES": 7}.items():
        monkeypatch.setattr(sketch, name, value)


def near_a_plane(rng: np.random.Generator, count: int) -> np.ndarray:
    """Unit vectors near a space of few dimensions, as embeddings are."""
    plane = np.random.default_rng(5).standard_normal((8, SIZE))
    vectors = rng.standard_normal((count, 8)) @ plane + 0.05 * rng.standard_normal((count, SIZE))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def make(dtype: str = "float32", **options) -> SketchIndex:
    index = SketchIndex(ExactIndex(IDS, near_a_plane(np.random.default_rng(0), COUNT), dtype=dtype), **options)
    index.store.block = 400
    return index


def spoil(index: SketchIndex) -> None:
    """Sketches along one arbitrary direction."""
    index._draw(torch.zeros_like(index._basis).index_fill_(1, torch.tensor([0]), 0.1))


def refuse(*_: object) -> None:
    raise AssertionError("searched exactly")


def agrees(index: SketchIndex, monkeypatch: pytest.MonkeyPatch, left_out: list[np.ndarray] = NONE) -> None:
    rng = np.random.default_rng(1)
    queries = near_a_plane(rng, 20)
    best = index.store.search_rows(queries, 30)[0]
    # Among the first, at the depth, beyond it, and anywhere.
    rows = [
        np.setdiff1d([*line[[0, 3, 8, 9, 10, 20]], rng.integers(COUNT)][i % 2 :], left_out[i])
        for i, line in enumerate(best)
    ]
    scores = index.store.scores_at(queries, rows)
    true = index.store.count_ahead(queries, rows, scores, left_out)
    with monkeypatch.context() as patch:
        patch.setattr(ExactIndex, "_scan", refuse)
        found, found_scores, counts = index.search_and_count(queries, K, rows, scores, left_out)
        assert index.count_ahead(queries, rows, scores, left_out) == counts
    assert counts == [[min(count, DEPTH) for count in line] for line in true]
    for i in range(20):
        which = np.flatnonzero(~np.isin(best[i], left_out[i]))[:K]
        np.testing.assert_array_equal(found[i], best[i][which])
        np.testing.assert_array_equal(found_scores[i], index.store.scores_at(queries[i : i + 1], [found[i]])[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fast", [torch.float32, torch.bfloat16])
def test_sketches_find_what_an_exact_search_finds(
    dtype: str, fast: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sketch, "fast_dtype", lambda device: fast)
    index = make(dtype, rank_depth=DEPTH)
    assert index._sketches.shape == (COUNT, 8) and index._sketches.dtype == fast
    agrees(index, monkeypatch)


def test_what_is_left_out_is_neither_found_nor_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    index = make(rank_depth=DEPTH)
    best = index.store.search_rows(near_a_plane(np.random.default_rng(1), 20), 12)[0]
    agrees(index, monkeypatch, [line[1 : 1 + i % 3] for i, line in enumerate(best)])


def test_sketches_follow_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    index, rng = make(rank_depth=DEPTH), np.random.default_rng(3)
    rows = rng.permutation(COUNT)[:1000]
    vectors = near_a_plane(rng, 1000)
    index.update(rows, vectors, 7)
    assert set(index.encoded_at_version[rows]) == {7}
    np.testing.assert_array_equal(index.vectors_at(rows), vectors)
    agrees(index, monkeypatch)


def test_what_stands_in_every_so_manieth_row_is_not_taken_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of documents in eight pieces, of which the first pieces are near a query and the others far."""
    monkeypatch.setattr(sketch, "SHARE", 8)
    vectors = near_a_plane(np.random.default_rng(0), COUNT)
    query = vectors[:1]
    signs = np.sign(vectors @ query[0])
    signs[np.arange(COUNT) % 8 > 0] *= -1
    index = SketchIndex(ExactIndex(IDS, vectors * signs[:, None]), rank_depth=20)
    order = index.store.search_rows(query, 20)[0][0]
    with monkeypatch.context() as patch:
        patch.setattr(ExactIndex, "_scan", refuse)
        assert index.ranks(query, [order.tolist()]) == [list(range(1, 21))]


def test_equal_vectors_rank_by_id(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = near_a_plane(np.random.default_rng(0), COUNT)
    vectors[5::100] = vectors[5]
    index = SketchIndex(ExactIndex(IDS, vectors), rank_depth=DEPTH)
    query = vectors[5:6]
    with monkeypatch.context() as patch:
        patch.setattr(ExactIndex, "_scan", refuse)
        assert index.search_rows(query, K)[0].tolist() == [[5, 105, 205, 305, 405, 505]]
        assert index.ranks(query, [[5, 305, 1005]]) == [[1, 4, DEPTH + 1]]


def test_a_query_for_which_too_little_is_proposed_is_searched_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    index = make(rank_depth=DEPTH)
    queries = near_a_plane(np.random.default_rng(1), 3)
    seen = index._pass
    # Nothing is proposed for the second query.
    monkeypatch.setattr(index, "_pass", lambda *given: tuple(one[seen(*given)[1] != 1] for one in seen(*given)))
    expected = index.store.search_rows(queries, K)
    found = index.search_rows(queries, K)
    np.testing.assert_array_equal(found[0], expected[0])
    left_out = [expected[0][i, :2] for i in range(3)]
    rest = index.search_and_count(queries, K - 2, NONE[:3], [np.empty(0, np.float32)] * 3, left_out)[0]
    np.testing.assert_array_equal(rest, expected[0][:, 2:])


def test_a_small_corpus_is_searched_exactly() -> None:
    index = make(rank_depth=400)
    queries, rows = near_a_plane(np.random.default_rng(1), 5), [np.arange(700)] * 5
    scores = index.scores_at(queries, rows)
    true = index.store.count_ahead(queries, rows, scores, NONE[:5])
    assert index.count_ahead(queries, rows, scores, NONE[:5]) == [[min(one, 400) for one in line] for line in true]
    np.testing.assert_array_equal(index.search_rows(queries, 900)[0], index.store.search_rows(queries, 900)[0])


def test_no_query_makes_more_than_a_crowd_be_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sketches tell nothing, time stays within its bounds, and the audit sees what is missed."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((COUNT, SIZE)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = SketchIndex(ExactIndex(IDS, vectors), rank_depth=DEPTH)
    assert index._basis.shape[1] == SIZE // 2
    spoil(index)
    sizes, seen = [], index._pass
    monkeypatch.setattr(index, "_pass", lambda *given: sizes.append(len(seen(*given)[0])) or seen(*given))
    assert index.audit(50) < 1
    assert max(sizes) <= 1.5 * 7 * sketch.CROWD * index._deepest(10, [], [])


def test_a_saved_index_is_the_same_again_with_its_audits(tmp_path: Path) -> None:
    index = make("bfloat16", rank_depth=DEPTH, audit_every=5)
    index.update(np.arange(700), near_a_plane(np.random.default_rng(8), 700), 1)
    index.audit()
    index.save(tmp_path / "sketch")
    again = SketchIndex.load(tmp_path / "sketch")
    assert torch.equal(again._basis, index._basis) and torch.equal(again._sketches, index._sketches)
    facts = ("rank_depth", "audit_every", "last_recall", "rebuilds", "_updates", "recall_floor")
    assert [getattr(again, name) for name in facts] == [getattr(index, name) for name in facts]
    index.store.save(tmp_path / "exact")
    with pytest.raises(VectorIndexError, match="exact holds no usable index"):
        SketchIndex.load(tmp_path / "exact")


def test_one_that_is_read_back_goes_on_as_the_one_that_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ExactIndex, "block", 400)
    # Of so many coordinates, in float32, products of one row are often summed in another order than a block's.
    monkeypatch.setattr(sketch, "UNIT", 32)
    monkeypatch.setattr(sketch, "fast_dtype", lambda device: torch.float32)
    index = make(rank_depth=DEPTH)
    for row in range(0, COUNT, 50):
        index.update(np.array([row]), near_a_plane(np.random.default_rng(row), 1), 1)
    index.save(tmp_path)
    assert torch.equal(SketchIndex.load(tmp_path)._sketches, index._sketches)


def test_an_index_whose_recall_fell_takes_new_directions() -> None:
    index = make(rank_depth=DEPTH, audit_every=2)
    spoil(index)
    index.update(np.arange(1), index.vectors_at([0]), 1)
    assert index.rebuilds == 0
    index.update(np.arange(1), index.vectors_at([0]), 1)
    assert index.rebuilds == 1 and index.last_recall == 1.0
