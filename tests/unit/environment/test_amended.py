"""Rankings that are amended after documents moved are those of a new search."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from search_r3.config import RewardSettings
from search_r3.data.collection import Collection
from search_r3.environment import amended
from search_r3.environment.amended import SLACK, Moved, amend
from search_r3.environment.scoring import QueryRows, Scorer
from search_r3.parallel import Communicator
from search_r3.retrieval.index import ExactIndex
from search_r3.retrieval.ranking import RestrictedRows, find

COUNT, QUERIES, DEPTH = 600, 12, 5


def unit(rng: np.random.Generator, rows: int) -> np.ndarray:
    vectors = rng.normal(size=(rows, 16)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def query(rng: np.random.Generator, kind: int) -> QueryRows:
    positives = rng.choice(100, 1 + kind % 3, replace=False)  # the first 100 rows never move
    left_out = np.sort(rng.choice(np.arange(100, COUNT), 40, replace=False)) if kind % 4 == 1 else np.arange(0)
    pool = np.sort(np.union1d(positives, rng.choice(COUNT, 90, replace=False))) if kind % 4 == 2 else None
    if kind % 4 == 3:
        left_out = positives[:1]  # asked for, and cannot be ranked
    limits = RestrictedRows(np.arange(0) if pool is not None else left_out, pool)
    return QueryRows("q", ["d"] * len(positives), positives, [1] * len(positives), np.arange(0), limits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("many", "far"), [(30, 0.1), (200, 0.3), (300, 3.0)])
def test_amended_hits_are_those_of_a_new_search(
    many: int, far: float, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slack = SLACK if far < 1 else 1
    monkeypatch.setattr(amended, "SLACK", slack)
    rng = np.random.default_rng(many)
    index = ExactIndex([f"{COUNT - row:04}" for row in range(COUNT)], unit(rng, COUNT), dtype=dtype)
    targets, vectors = [query(rng, kind) for kind in range(QUERIES)], unit(rng, QUERIES)
    scorer = Scorer(Collection("none", {}, {}, {}), {}, RewardSettings(), k=10, max_new_tokens=1, depth=DEPTH)
    searches = []
    monkeypatch.setattr(
        Scorer,
        "search",
        lambda self, *given: searches.append(len(given[1])) or look(*given),  # type: ignore[func-returns-value]
    )

    def look(index: Any, vectors: Any, targets: Any, depth: int) -> Any:
        limits, positives = [one.limits for one in targets], [one.positives for one in targets]
        return find(index, vectors, positives, limits, depth)

    before = look(index, vectors, targets, DEPTH + slack)
    rows = np.sort(rng.choice(np.arange(100, COUNT), many, replace=False))
    held = index.vectors_at(rows)
    moved = held + far * unit(rng, many)
    index.update(rows, (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float32), 1)
    change = Moved(rows, held, index.vectors_at(rows))
    found = amend(index, scorer, Communicator(), before, change, vectors, targets, DEPTH)
    expected = look(index, vectors, targets, DEPTH)
    for own, true in zip(found, expected, strict=True):
        assert own.ranks == true.ranks
        np.testing.assert_array_equal(own.scores, true.scores)
        np.testing.assert_array_equal(own.rows, true.rows)
        np.testing.assert_array_equal(own.row_scores, true.row_scores)
    assert [one.ranks for one in found] != [one.ranks for one in before]
    pooled = sum(one.limits.pool is not None for one in targets)
    assert searches == [pooled] if far < 1 else searches[0] > pooled, "little is searched again"


def test_documents_that_moved_are_scored_where_all_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU sums differ from those of a CPU in the last bit, and equal vectors would have unequal scores."""
    rng, places = np.random.default_rng(0), []

    def watched(names: Any, vectors: Any, device: Any = "cpu") -> ExactIndex:
        places.append(device)
        return ExactIndex(names, vectors)

    index = ExactIndex([f"{9 - row}" for row in range(9)], unit(rng, 9))
    target = QueryRows("q", ["9"], np.array([0]), [1], np.arange(0), RestrictedRows(np.arange(0), None))
    scorer = Scorer(Collection("none", {}, {}, {}), {}, RewardSettings(), k=10, max_new_tokens=1, depth=2)
    vectors, rows = unit(rng, 1), np.array([3, 5])
    hits = scorer.search(index, vectors, [target], 2 + SLACK)
    change = Moved(rows, index.vectors_at(rows), unit(rng, 2))
    monkeypatch.setattr(amended, "ExactIndex", watched)
    monkeypatch.setattr(ExactIndex, "device", torch.device("cuda", 1))
    amend(index, scorer, Communicator(), hits, change, vectors, [target], 2)
    assert places == [torch.device("cuda", 1)] * 2
