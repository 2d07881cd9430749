"""The approximate index against the exact one and a dictionary of vectors."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r3.errors import VectorIndexError
from search_r3.retrieval.approximate import ApproximateIndex, GraphSettings
from search_r3.retrieval.index import ExactIndex

DOCUMENTS, SIZE = 60, 8
IDS = [f"d{i}" for i in range(DOCUMENTS)]
# The graph looks at every document of a corpus of this size, and at more than it proposes.
THOROUGH = GraphSettings(dtype="f32", expansion_add=256, expansion_search=256, rank_depth=20)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.lists(st.sampled_from(IDS), min_size=0, max_size=40)),
        st.tuples(st.just("reload"), st.booleans()),
    ),
    max_size=8,
)


def unit(rng: np.random.Generator, count: int, size: int = SIZE) -> np.ndarray:
    vectors = rng.standard_normal((count, size), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def build(count: int, size: int = SIZE, graph: GraphSettings | None = None, **options) -> ApproximateIndex:
    store = ExactIndex([f"d{i}" for i in range(count)], unit(np.random.default_rng(0), count, size))
    return ApproximateIndex(store, graph, **options)


def agrees(index: ApproximateIndex, truth: dict[str, np.ndarray], queries: np.ndarray, k: int) -> None:
    doc_ids = list(truth)
    scores = queries @ np.stack([truth[doc_id] for doc_id in doc_ids]).T
    order = [[doc_ids[i] for i in np.argsort(-line)] for line in scores]
    found = index.search(queries, k)
    assert found.doc_ids == [line[:k] for line in order]
    np.testing.assert_allclose(found.scores, -np.sort(-scores, axis=1)[:, :k], atol=1e-5)
    depth = index.settings.rank_depth
    assert index.ranks(queries, [range(len(index))] * len(queries)) == [
        [min(line.index(doc_id) + 1, depth + 1) for doc_id in index.doc_ids] for line in order
    ]
    np.testing.assert_array_equal(
        index.vectors_at(index.rows_of(doc_ids)), np.stack([truth[doc_id] for doc_id in doc_ids])
    )


# The same examples each time: a graph may miss a neighbour, and some rare sequence of updates makes one that does.
@settings(max_examples=40, deadline=None, derandomize=True)
@given(steps, st.integers(0, 1000), st.integers(1, 40), st.integers(1, 3))
def test_any_sequence_of_steps_agrees_with_a_dictionary(changes, seed, k, queries) -> None:
    rng = np.random.default_rng(seed)
    vectors = unit(rng, DOCUMENTS)
    truth, versions = dict(zip(IDS, vectors, strict=True)), dict.fromkeys(IDS, 0)
    index = ApproximateIndex(ExactIndex(IDS, vectors), THOROUGH)
    with tempfile.TemporaryDirectory() as folder:
        for version, (step, argument) in enumerate(changes, 1):
            if step == "update":
                argument = list(dict.fromkeys(argument))
                vectors = unit(rng, len(argument))
                index.update(index.rows_of(argument), vectors, version)
                truth |= dict(zip(argument, vectors, strict=True))
                versions |= dict.fromkeys(argument, version)
            else:
                index.save(Path(folder))
                index = ApproximateIndex.load(Path(folder), mmap=argument)
            agrees(index, truth, unit(rng, queries), k)
        assert dict(zip(index.doc_ids, index.encoded_at_version.tolist(), strict=True)) == versions


def test_after_many_updates_every_document_is_found_by_its_own_new_vector() -> None:
    rng = np.random.default_rng(1)
    index = build(500, 32, GraphSettings(rank_depth=50))
    for version in range(1, 41):
        moved = rng.choice(500, 25, replace=False)
        index.update(index.rows_of([f"d{i}" for i in moved]), unit(rng, 25, 32), version)
    vectors = index.vectors_at(range(500))
    found = index.search(vectors, 3)
    assert [ids[0] for ids in found.doc_ids] == list(index.doc_ids)
    np.testing.assert_allclose(found.scores[:, 0], 1, atol=1e-5)
    rows, scores = index.search_rows(vectors, 3)
    np.testing.assert_allclose(scores, np.einsum("qd,qkd->qk", vectors, vectors[rows]), atol=1e-5)
    assert len(index._graph) == 500 and index.rebuilds == 0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_scores_come_from_the_store_whatever_the_graph_rounds_to(dtype) -> None:
    vectors = unit(np.random.default_rng(0), 300, 32)
    store = ExactIndex([f"d{i}" for i in range(300)], vectors, dtype=dtype)
    index = ApproximateIndex(store, GraphSettings(dtype="i8"))
    queries = unit(np.random.default_rng(1), 20, 32)
    rows, scores = index.search_rows(queries, 5)
    truth_rows, truth = store.search_rows(queries, 5)
    assert (rows == truth_rows).mean() > 0.95
    np.testing.assert_allclose(scores[rows == truth_rows], truth[rows == truth_rows], atol=1e-6)


def test_equal_vectors_rank_by_id() -> None:
    vectors = np.repeat(unit(np.random.default_rng(0), 20), 5, axis=0)
    index = ApproximateIndex(ExactIndex([f"{i:03}" for i in range(100)], vectors), THOROUGH)
    queries = unit(np.random.default_rng(1), 10)
    for rows, ranks in zip(index.search_rows(queries, 10)[0], index.ranks(queries, [range(100)] * 10), strict=True):
        groups = [rows[:5].tolist(), rows[5:].tolist()]
        assert all(group == sorted(group) for group in groups)
        assert [ranks[row] for row in rows] == list(range(1, 11))


def test_missing_proposals_are_ignored_and_a_starved_query_is_searched_exactly(monkeypatch) -> None:
    index = build(200)
    queries = unit(np.random.default_rng(1), 4)
    queries[2] = index.vectors_at([199])
    rows, scores = index.store.search_rows(queries, 10)
    propose = index._propose

    def starving(queries, count):
        proposed = propose(queries, count)
        proposed[1, 4:] = -1
        proposed[2, -3:] = -1
        return proposed

    monkeypatch.setattr(index, "_propose", starving)
    found = index.search_rows(queries, 10)
    np.testing.assert_array_equal(found[0], rows)
    np.testing.assert_allclose(found[1], scores, atol=1e-6)


def test_a_starved_query_is_ranked_exactly(monkeypatch) -> None:
    index = build(200, graph=GraphSettings(rank_depth=50))
    queries = unit(np.random.default_rng(1), 2)
    rows = [range(200)] * 2
    monkeypatch.setattr(index, "_propose", lambda queries, count: np.array([[3, 5] + [-1] * (count - 2)] * 2))
    assert index.ranks(queries, rows) == index.store.ranks(queries, rows)


def test_a_query_that_leaves_much_out_makes_no_other_search_deep(monkeypatch) -> None:
    index = build(2000, graph=GraphSettings(dtype="f32", expansion_add=256, expansion_search=1024, rank_depth=50))
    queries, asked = unit(np.random.default_rng(1), 3), []
    left_out = [np.arange(3), np.arange(900), np.empty(0, np.int64)]
    propose = index._propose
    monkeypatch.setattr(
        index, "_propose", lambda queries, count: asked.append((len(queries), count)) or propose(queries, count)
    )
    nearest = [line[:5] for line in index.store.search_rows(queries, 5)[0]]
    rows = [np.setdiff1d(line, out).tolist() for line, out in zip(nearest, left_out, strict=True)]
    assert index.ranks(queries, rows, left_out) == index.store.ranks(queries, rows, left_out)
    assert sorted(asked) == [(1, 950), (2, 53)]


def test_what_the_audits_found_survives_a_save(tmp_path) -> None:
    index = build(300, audit_every=3)
    assert np.isnan(index.last_recall)
    for loads in range(3):
        index.update(index.rows_of(["d1"]), unit(np.random.default_rng(loads), 1), loads)
        index.save(tmp_path)
        index = ApproximateIndex.load(tmp_path)
    assert index.last_recall == 1.0, "the third update was audited, whatever was loaded between"


def test_an_audit_without_queries_is_refused() -> None:
    with pytest.raises(VectorIndexError, match="at least one query"):
        build(30).audit(0)


def degrade(index: ApproximateIndex) -> None:
    """A graph with so few links that many documents are out of reach."""
    good, index.settings = index.settings, GraphSettings(connectivity=2, expansion_add=1, expansion_search=1)
    index._build()
    index.settings = good


def test_an_audit_sees_a_bad_graph_and_maintain_rebuilds_it() -> None:
    index = build(2000, 32, recall_floor=0.9)
    assert np.isnan(index.last_recall)
    assert index.maintain() == index.last_recall > 0.95
    assert index.rebuilds == 0
    degrade(index)
    bad = index.audit()
    assert bad == index.last_recall < 0.9 and index.rebuilds == 0, "an audit only measures"
    assert index.maintain() == bad
    assert index.rebuilds == 1 and index.last_recall > 0.95


def test_an_audit_equals_recall_counted_by_hand_and_follows_its_seed() -> None:
    index = build(2000, 32)
    degrade(index)
    queries = unit(np.random.default_rng(3), 30, 32)
    found, truth = index.search(queries, 5).doc_ids, index.store.search(queries, 5).doc_ids
    by_hand = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(found, truth, strict=True)])
    assert index.audit(queries, k=5) == pytest.approx(by_hand) and by_hand < 0.95
    assert index.audit(20, seed=1) == index.audit(20, seed=1)
    assert len({index.audit(20, seed=seed) for seed in range(5)}) > 1


def test_updates_audit_themselves_at_the_interval_asked_for(monkeypatch) -> None:
    index = build(200, audit_every=3)
    audits = []
    monkeypatch.setattr(index, "audit", lambda *_: audits.append(index._updates) or 1.0)
    for version in range(7):
        index.update(index.rows_of(["d1"]), unit(np.random.default_rng(version), 1), version)
    assert audits == [3, 6]


def test_replacing_most_documents_builds_the_graph_anew() -> None:
    index = build(100)
    index.update(index.rows_of([f"d{i}" for i in range(50)]), unit(np.random.default_rng(1), 50), 1)
    assert index.rebuilds == 0
    index.update(index.rows_of([f"d{i}" for i in range(51)]), unit(np.random.default_rng(1), 51), 1)
    assert index.rebuilds == 1


def test_settings_survive_a_save_and_search_alike(tmp_path: Path) -> None:
    graph = GraphSettings("bf16", connectivity=5, expansion_add=33, expansion_search=7, oversample=1.5, rank_depth=9)
    index = build(1000, 32, graph, recall_floor=0.7, audit_every=5)
    index.save(tmp_path)
    loaded = ApproximateIndex.load(tmp_path)
    assert (loaded.settings, loaded.recall_floor, loaded.audit_every) == (graph, 0.7, 5)
    for name in ("connectivity", "expansion_add", "expansion_search", "dtype"):
        assert getattr(loaded._graph, name) == getattr(index._graph, name)
    assert (loaded._graph.expansion_add, loaded._graph.expansion_search) == (33, 7)
    queries = unit(np.random.default_rng(1), 20, 32)
    np.testing.assert_array_equal(loaded.search_rows(queries, 10)[0], index.search_rows(queries, 10)[0])
    assert ExactIndex.load(tmp_path).search(queries, 1).doc_ids == index.store.search(queries, 1).doc_ids


def test_damaged_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    index = build(50)
    index.save(tmp_path / "graph")
    index.store.save(tmp_path / "exact")
    with pytest.raises(VectorIndexError, match=r"exact holds no usable index \(no 'graph' in it\); encode the corpus"):
        ApproximateIndex.load(tmp_path / "exact")
    manifest = json.loads((tmp_path / "graph" / "manifest.json").read_text())
    path = tmp_path / "graph" / manifest["files"]["hnsw.graph"]
    whole = path.read_bytes()
    build(40).save(tmp_path / "smaller")
    (smaller,) = (tmp_path / "smaller").glob("*.graph")
    for content in (whole[:-5], whole[::-1], smaller.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(VectorIndexError, match="graph holds no usable index"):
            ApproximateIndex.load(tmp_path / "graph")


def test_a_disk_that_refuses_the_graph_keeps_the_old_state(tmp_path: Path, monkeypatch) -> None:
    index = build(50)
    index.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    class Full:
        def save(self, path: str) -> None:
            Path(path).write_bytes(b"half")
            raise RuntimeError("Failed to serialize into stream")

    monkeypatch.setattr(index, "_graph", Full())
    with pytest.raises(VectorIndexError, match=r"cannot save the index .* Failed to serialize into stream; the state"):
        index.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_unusable_arguments_are_refused_and_change_nothing() -> None:
    index = build(100)
    query = unit(np.random.default_rng(1), 1)
    before = index.search_rows(query, 5)
    for call, message in (
        (lambda: GraphSettings(connectivity=0), "connectivity of an approximate index must be at least 1, found 0"),
        (lambda: GraphSettings(oversample=float("nan")), "oversample .* found nan"),
        (lambda: GraphSettings(dtype="f8"), "a graph cannot hold 'f8'; choose one of f32, f16"),
        (lambda: build(5, recall_floor=1.5), "recall_floor must lie between 0 and 1, found 1.5"),
        (lambda: build(5, audit_every=-1), "audit_every must be 0 or above, found -1"),
        (lambda: index.search(query, 0), "at least 1 document; k was 0"),
        (lambda: index.search(query[:, :2], 1), "vectors have size 2, the index has size 8"),
        (lambda: index.ranks(query, []), "1 queries need 1 lists of rows, found 0"),
        (lambda: index.update(index.rows_of(["d1", "d2"]), np.array([[1.0] * 8, [np.nan] * 8]), 1), "NaN or infinity"),
        (lambda: index.update(index.rows_of(["nope"]), query, 1), "'nope' is not in the index of 100 documents"),
    ):
        with pytest.raises(VectorIndexError, match=message):
            call()
    np.testing.assert_array_equal(index.search_rows(query, 5)[0], before[0])
    assert len(index._graph) == 100
    assert index.search_rows(np.empty((0, 8)), 3)[0].shape == (0, 3)
