"""The one ranking rule, against a brute force that sorts everything."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from search_r3.data.collection import Collection, Document, Query
from search_r3.data.restrictions import Restrictions, restrictions
from search_r3.retrieval.approximate import ApproximateIndex, GraphSettings
from search_r3.retrieval.index import ExactIndex
from search_r3.retrieval.protocol import VectorIndex
from search_r3.retrieval.ranking import make_requests, ranked, ranks, restricted_rows
from tests.limits import every_limit

COUNT, SIZE = 60, 8
IDS = [f"d{number:02}" for number in range(COUNT)]


def unit(rng: np.random.Generator, rows: int) -> np.ndarray:
    vectors = rng.normal(size=(rows, SIZE)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def documents() -> np.ndarray:
    """Unit vectors, of which a third stand three times."""
    vectors = unit(np.random.default_rng(0), COUNT)
    vectors[20:40] = vectors[40:60] = vectors[:20]
    return vectors


def brute_force(vector: np.ndarray, limits: Restrictions) -> list[str]:
    score = {doc_id: float(value) for doc_id, value in zip(IDS, documents().astype(np.float64) @ vector, strict=True)}
    return sorted(filter(limits.allow, IDS), key=lambda doc_id: (score[doc_id], doc_id), reverse=True)


LIMITS = every_limit(IDS)


def indexes() -> list[VectorIndex]:
    exact = ExactIndex(IDS, documents())
    exact.block, exact.query_block = 7, 3
    graph = GraphSettings(dtype="f32", connectivity=32, expansion_search=400, rank_depth=20)
    return [ExactIndex(IDS, documents()), exact, ApproximateIndex(ExactIndex(IDS, documents()), graph)]


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_rankings_and_ranks_are_those_of_a_sort_of_what_the_restrictions_allow(kind: int) -> None:
    index = indexes()[kind]
    vectors = unit(np.random.default_rng(1), len(LIMITS))
    expected = [brute_force(vector, limits) for vector, limits in zip(vectors, LIMITS, strict=True)]
    for depth in (1, 10, COUNT):
        rankings = ranked(index, vectors, LIMITS, depth)
        assert [[doc_id for doc_id, _ in ranking] for ranking in rankings] == [line[:depth] for line in expected]
    # Lists of different lengths, among them documents that cannot be ranked.
    targets = [IDS[: 1 + 9 * place] for place in range(len(LIMITS))]
    rows = [[index.row(doc_id) for doc_id in line] for line in targets]
    found = ranks(index, vectors, rows, [restricted_rows(index, limits) for limits in LIMITS])
    for place, line in enumerate(targets):
        order = expected[place]
        true = [order.index(doc_id) + 1 if doc_id in order else COUNT + 1 for doc_id in line]
        if kind == 2 and LIMITS[place].pool is None and len(LIMITS[place].left_out) < 40:
            # A graph counts to its depth.
            true = [min(rank, 21) if rank <= COUNT else rank for rank in true]
        assert found[place] == true


def test_a_rank_among_many_equal_vectors_is_decided_by_the_id_alone() -> None:
    index = ExactIndex(IDS, np.repeat(unit(np.random.default_rng(2), 1), COUNT, axis=0))
    index.block = 7  # the rest of 4 rows is summed in another order
    limits = Restrictions(left_out=frozenset({"d59", "d30"}))
    [found] = ranks(index, unit(np.random.default_rng(3), 1), [list(range(COUNT))], [restricted_rows(index, limits)])
    assert found == [61, *range(1, 29), 61, *range(29, 59)]


def test_the_restrictions_are_what_the_collection_excludes_the_pool_and_the_identical_id() -> None:
    texts = {doc_id: Document(doc_id, doc_id) for doc_id in IDS}
    queries = {name: Query(name, name) for name in ("d01", "d02", "q")}
    collection = Collection(
        "c", texts, queries, {}, excluded={"q": frozenset({"d03"})}, pools={"d01": frozenset({"d01", "d04"})}
    )
    assert restrictions(collection, "q", {}) == Restrictions(left_out=frozenset({"d03"}))
    own = Restrictions(left_out=frozenset({"d01"}), pool=frozenset({"d01", "d04"}))
    assert restrictions(collection, "d01", {"d01": 0}) == own
    assert restrictions(collection, "d02", {"d02": 1}) == Restrictions(), "an identical id that is relevant is no copy"
    assert restrictions(collection, "d02", {}, "keep") == Restrictions()
    requests = make_requests(collection, {"q": {"d05": 1}, "d01": {"d04": 1}})
    assert [(one.query_id, one.text, one.left_out, one.pool) for one in requests] == [
        ("q", "q", frozenset({"d03"}), None),
        ("d01", "d01", own.left_out, own.pool),
    ]


def test_a_query_with_many_targets_does_not_make_the_others_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    index, compared = ExactIndex(IDS, documents()), []
    at_least = torch.ge

    def counting(tensor: torch.Tensor, bar: torch.Tensor, *, out: torch.Tensor) -> object:
        compared.append(tensor.numel())
        return at_least(tensor, bar, out=out)

    monkeypatch.setattr(torch, "ge", counting)
    index.ranks(unit(np.random.default_rng(4), 30), [[5], *([[1, 2]] * 9), list(range(COUNT)), *([[3]] * 19)])
    assert sum(compared) == COUNT * (1 + 9 * 2 + COUNT + 19), "every target against every document, and no more"


def test_a_query_that_leaves_many_documents_out_does_not_make_the_others_search_deep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vectors, queries = unit(np.random.default_rng(5), 2000), unit(np.random.default_rng(6), 5)
    index = ExactIndex([f"{row:04}" for row in range(2000)], vectors)
    limits = [Restrictions(left_out=frozenset(index.doc_ids[:count])) for count in (0, 900, 1, 63, 1000)]
    searches, search = [], ExactIndex.search_and_count

    def recording(self: ExactIndex, own: np.ndarray, k: int, *targets: Any) -> object:
        searches.append((len(own), k))
        return search(self, own, k, *targets)

    monkeypatch.setattr(ExactIndex, "search_and_count", recording)
    rankings = ranked(index, queries, limits, 10)
    assert searches == [(3, 10 + 32 + 63), (2, 10 + 32 + 1000)]
    for query, limit, ranking in zip(queries, limits, rankings, strict=True):
        order = [index.doc_ids[row] for row in np.argsort(-(index.matrix @ query))]
        assert [doc_id for doc_id, _ in ranking] == [doc_id for doc_id in order if limit.allow(doc_id)][:10]
