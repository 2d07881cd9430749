"""Rows that lie with several processes are searched as one exact index is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search_r3.errors import DataError
from search_r3.parallel import Communicator
from search_r3.retrieval.approximate import ApproximateIndex, GraphSettings
from search_r3.retrieval.index import ExactIndex
from search_r3.retrieval.ranking import ranked, ranks, restricted_rows
from search_r3.retrieval.sharded import ShardedIndex, divide_rows, encode_rows, load_rows, shard_name
from tests.limits import every_limit
from tests.threads import together

COUNT, SIZE = 90, 8
IDS = sorted((f"d{number:02}" for number in range(COUNT)), reverse=True)


def unit(rng: np.random.Generator, rows: int) -> np.ndarray:
    vectors = rng.normal(size=(rows, SIZE)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def documents() -> np.ndarray:
    """Unit vectors, of which a third stand three times, so that equal scores lie with different processes."""
    vectors = unit(np.random.default_rng(0), COUNT)
    vectors[30:60] = vectors[60:] = vectors[:30]
    return vectors


def sharded(communicator: Communicator, dtype: str = "float32", graph: GraphSettings | None = None) -> ShardedIndex:
    own = divide_rows([1 + row % 7 for row in range(COUNT)], communicator.world_size)[communicator.rank]
    held = encode_rows(IDS, lambda rows: documents()[rows], rows=own, dtype=dtype)  # type: ignore[arg-type]
    return ShardedIndex(IDS, own, held if graph is None else ApproximateIndex(held, graph), communicator)


LIMITS = every_limit(IDS)
ROWS = [np.arange(place, COUNT, 1 + 2 * place) for place in range(len(LIMITS))]


def answers(index: Any, depth: int) -> tuple[Any, Any, Any]:
    vectors = unit(np.random.default_rng(1), len(LIMITS))
    limits = [restricted_rows(index, one) for one in LIMITS]
    scores = [line.tolist() for line in index.scores_at(vectors, ROWS)]
    return ranked(index, vectors, LIMITS, depth), ranks(index, vectors, ROWS, limits), scores


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rankings_ranks_and_scores_are_those_of_one_index_bit_for_bit(world_size: int, dtype: str) -> None:
    whole = ExactIndex(IDS, documents(), dtype=dtype)  # type: ignore[arg-type]
    for depth in (1, 10, COUNT):
        expected = answers(whole, depth)
        for found in together(world_size, lambda one, depth=depth: answers(sharded(one, dtype), depth)):  # type: ignore[misc]
            assert found == expected


def test_a_graph_over_each_shard_counts_to_its_depth_over_all_of_them() -> None:
    graph = GraphSettings(dtype="f32", connectivity=32, expansion_search=400, rank_depth=20)
    vectors = unit(np.random.default_rng(2), 4)
    rows = [np.arange(COUNT)] * 4
    true = ExactIndex(IDS, documents()).ranks(vectors, rows)
    for found in together(2, lambda one: sharded(one, graph=graph).ranks(vectors, rows)):
        assert found == [[min(rank, 21) for rank in line] for line in true]


def test_vectors_come_from_where_they_lie_and_an_update_reaches_all() -> None:
    moved, rows = unit(np.random.default_rng(3), 20), np.arange(5, 85, 4)

    def work(communicator: Communicator) -> tuple[Any, ...]:
        index = sharded(communicator)
        own = index.held(rows)
        index.update(rows, moved[np.isin(rows, own)], 3)
        wanted = np.array([2, 9, 40]) if communicator.rank else np.array([5, 88])
        return index.vectors_at(np.arange(COUNT)), index.encoded_at_version, index.vectors_for(wanted), len(own), wanted

    whole = ExactIndex(IDS, documents())
    whole.update(rows, moved, 3)
    results = together(2, work)
    for vectors, versions, near, _, wanted in results:
        np.testing.assert_array_equal(vectors, whole.matrix)
        np.testing.assert_array_equal(versions, whole.encoded_at_version)
        np.testing.assert_array_equal(near, whole.matrix[wanted])
    assert sum(result[3] for result in results) == len(rows), "each process takes its own"


def test_queries_of_all_processes_are_asked_together_even_where_one_has_none() -> None:
    vectors = unit(np.random.default_rng(4), 3)

    def work(communicator: Communicator) -> Any:
        own = vectors if communicator.rank else np.empty((0, 0), np.float32)
        return sharded(communicator).together(own, ["a", "b", "c"] if communicator.rank else [])

    for rank, (found, labels, own) in enumerate(together(2, work)):
        np.testing.assert_array_equal(found, vectors)
        assert (labels, labels[own]) == (["a", "b", "c"], ["a", "b", "c"] if rank else [])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_shards_are_loaded_by_as_many_processes_or_by_others(tmp_path: Path, after: int, dtype: str) -> None:
    def save(communicator: Communicator) -> None:
        index = sharded(communicator, dtype)
        rows = np.arange(0, COUNT, 5)
        index.update(rows, documents()[index.held(rows)], 4)
        index.save(tmp_path)

    together(2, save)
    whole = ExactIndex(IDS, documents(), dtype=dtype)  # type: ignore[arg-type]

    def load(communicator: Communicator, doc_ids: list[str] = IDS) -> tuple[Any, Any]:
        rows = divide_rows([1 + row % 7 for row in range(len(doc_ids))], after)[communicator.rank]
        name = shard_name(communicator) if after > 1 else ""
        held = load_rows(tmp_path, doc_ids, rows, ExactIndex.load, shard=name)
        assert isinstance(held, ExactIndex) and held.dtype == dtype
        index = ShardedIndex(doc_ids, rows, held, communicator)
        return index.vectors_at(np.arange(len(doc_ids))), index.encoded_at_version

    for vectors, versions in together(after, load):
        np.testing.assert_array_equal(vectors, whole.matrix)
        assert (np.flatnonzero(versions == 4) == np.arange(0, COUNT, 5)).all()
    with pytest.raises(DataError, match="hold different documents"):
        together(after, lambda one: load(one, IDS[:-1]))
    with pytest.raises(DataError, match="hold different documents"):
        together(after, lambda one: load(one, [*IDS, "a"]))
