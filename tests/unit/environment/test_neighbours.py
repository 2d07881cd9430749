"""The neighbour graph against an exact one, before and after documents move."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from search_r3.environment import neighbours
from search_r3.environment.neighbours import NeighbourGraph
from search_r3.errors import VectorIndexError
from search_r3.retrieval.index import ExactIndex


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clustered(rng: np.random.Generator, count: int = 600, dimension: int = 16) -> np.ndarray:
    centres = rng.normal(size=(30, dimension))
    return unit(centres[rng.integers(0, 30, count)] + 0.5 * rng.normal(size=(count, dimension)))


def index_of(vectors: np.ndarray) -> ExactIndex:
    return ExactIndex([f"d{i:04d}" for i in range(len(vectors))], vectors)


def exact_links(index: ExactIndex, neighbours: int) -> list[set[int]]:
    scores = index.matrix @ index.matrix.T
    np.fill_diagonal(scores, -np.inf)
    return [set(row.tolist()) for row in np.argsort(-scores, axis=1)[:, :neighbours]]


def recall(graph: NeighbourGraph, index: ExactIndex) -> float:
    true = exact_links(index, graph.links.shape[1])
    return float(
        np.mean([len(own & set(links.tolist())) / len(own) for own, links in zip(true, graph.links, strict=True)])
    )


def test_a_built_graph_is_exact_and_in_order() -> None:
    index = index_of(clustered(np.random.default_rng(0)))
    graph = NeighbourGraph.build(index, 5)
    assert recall(graph, index) == 1.0
    assert graph.recall(index, np.arange(600)) == 1.0
    assert not (graph.links == np.arange(600)[:, None]).any(), "no document is its own neighbour"
    scores = np.einsum("nld,nd->nl", index.matrix[graph.links], index.matrix)
    assert (np.diff(scores, axis=1) <= 1e-6).all(), "best first"


def test_repairs_keep_the_graph_near_exact_while_documents_move() -> None:
    rng = np.random.default_rng(1)
    index = index_of(clustered(rng))
    repaired, left_alone = NeighbourGraph.build(index, 5), NeighbourGraph.build(index, 5)
    for version in range(1, 21):
        rows = rng.choice(600, size=30, replace=False)
        moved = unit(index.vectors_at(rows) + 0.25 * rng.normal(size=(30, 16)))
        index.update(rows, moved, version)
        assert repaired.repair(index, rows) > 0
    assert recall(repaired, index) > 0.93
    assert recall(repaired, index) == pytest.approx(repaired.recall(index, np.arange(600)))
    assert recall(left_alone, index) < 0.6, "the repairs are what keeps it"


def test_the_moved_documents_own_links_and_those_to_them_are_exact() -> None:
    rng = np.random.default_rng(2)
    index = index_of(clustered(rng))
    graph = NeighbourGraph.build(index, 5)
    old = index.doc_ids[7]
    index.update(np.array([index.row(old)]), index.vectors_at([300]), 1)  # now a twin of row 300
    graph.repair(index, np.array([7]))
    assert set(graph.links[7].tolist()) == exact_links(index, 5)[7]
    assert 7 in graph.links[300]
    untouched = exact_links(index, 5)
    assert np.mean([set(graph.links[row].tolist()) == untouched[row] for row in range(600)]) > 0.99


def test_a_graph_of_which_most_has_moved_is_built_anew() -> None:
    rng = np.random.default_rng(3)
    index = index_of(clustered(rng))
    graph = NeighbourGraph.build(index, 5)
    index.update(np.arange(600), clustered(rng))
    assert graph.repair(index, np.arange(400)) == 600
    assert recall(graph, index) == 1.0


def test_reach_goes_hop_by_hop() -> None:
    links = np.array([[1], [2], [3], [3], [-1]])
    graph = NeighbourGraph(links)
    assert graph.reach([0, 4], 0) == [0, 4]
    assert graph.reach([0, 4], 1) == [0, 4, 1]
    assert graph.reach([0], 2) == [0, 1, 2]
    assert graph.reach([0], 9) == [0, 1, 2, 3]


def test_equal_vectors_and_fewer_documents_than_links_are_no_trouble() -> None:
    index = index_of(unit(np.ones((4, 3))))
    graph = NeighbourGraph.build(index, 6)
    for row in range(4):
        assert sorted(graph.links[row].tolist()) == sorted([*({0, 1, 2, 3} - {row}), -1, -1, -1])
    graph.repair(index, np.array([0]))
    assert (graph.links >= 0).sum() == 12


def test_a_small_allowance_repairs_to_the_same_links(monkeypatch: pytest.MonkeyPatch) -> None:
    links = []
    for allowance in (neighbours.CANDIDATES_AT_A_TIME, 40):
        monkeypatch.setattr(neighbours, "CANDIDATES_AT_A_TIME", allowance)
        rng = np.random.default_rng(5)
        index = index_of(clustered(rng))
        graph = NeighbourGraph.build(index, 5)
        index.update(np.arange(60), clustered(rng)[:60], 1)
        graph.repair(index, np.arange(60))
        links.append(graph.links)
    np.testing.assert_array_equal(*links)


def test_a_saved_graph_loads_as_it_was_and_with_its_own_index_only(tmp_path: Path) -> None:
    index = index_of(clustered(np.random.default_rng(4)))
    graph = NeighbourGraph.build(index, 5)
    graph.save(tmp_path / "policy")
    np.testing.assert_array_equal(NeighbourGraph.load(tmp_path / "policy", index).links, graph.links)
    with pytest.raises(VectorIndexError, match="no usable neighbour graph"):
        NeighbourGraph.load(tmp_path, index)
    with pytest.raises(VectorIndexError, match="of 600 documents, the index has 10"):
        NeighbourGraph.load(tmp_path / "policy", index_of(clustered(np.random.default_rng(4), 10)))
