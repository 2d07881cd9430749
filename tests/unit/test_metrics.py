"""Our measures against pytrec_eval, ties included, and against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r3.retrieval.metrics import measure, ndcg, ndcg_from_ranks, rank, recall, reciprocal_rank

doc_ids = st.sampled_from([f"d{i}" for i in range(30)])
runs = st.dictionaries(doc_ids, st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5000001, 1.0, -1.0]), min_size=1, max_size=30)
judgements = st.dictionaries(doc_ids, st.integers(-1, 3), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(runs, judgements)
def test_measures_equal_pytrec_eval_with_ties(run: dict[str, float], qrels: dict[str, int]) -> None:
    oracle = pytrec_eval.RelevanceEvaluator({"q": qrels}, {"ndcg_cut.10", "recall.100"}).evaluate({"q": run})["q"]
    top = {doc_id: run[doc_id] for doc_id in rank(run, 10)}
    oracle_rr = pytrec_eval.RelevanceEvaluator({"q": qrels}, {"recip_rank"}).evaluate({"q": top})["q"]
    found = measure(rank(run), qrels)
    assert found["ndcg@10"] == pytest.approx(oracle["ndcg_cut_10"], abs=1e-9)
    if any(gain > 0 for gain in qrels.values()):  # trec_eval divides 0 by 0 otherwise
        assert found["recall@100"] == pytest.approx(oracle["recall_100"], abs=1e-9)
    assert found["mrr@10"] == pytest.approx(oracle_rr["recip_rank"], abs=1e-9)


def test_numbers_by_hand() -> None:
    ranking, qrels = ["a", "b", "c", "d"], {"b": 2, "d": 1, "x": 1}
    ideal = 2 / 1 + 1 / math.log2(3) + 1 / 2
    assert ndcg(ranking, qrels, 10) == pytest.approx((2 / math.log2(3) + 1 / math.log2(5)) / ideal)
    assert ndcg(ranking, qrels, 3) == pytest.approx((2 / math.log2(3)) / ideal)
    assert recall(ranking, qrels, 2) == pytest.approx(1 / 3)
    assert reciprocal_rank(ranking, qrels, 10) == 0.5
    assert reciprocal_rank(ranking, qrels, 1) == 0.0


def test_ties_rank_by_id_and_not_by_insertion() -> None:
    assert rank({"a": 1.0, "c": 1.0, "b": 1.0, "z": 0.0}) == ["c", "b", "a", "z"]
    assert rank({"b": 1.0, "a": 1.0}, k=1) == ["b"]


@given(
    st.permutations([f"d{i}" for i in range(12)]), st.dictionaries(doc_ids, st.integers(1, 3), min_size=1, max_size=5)
)
def test_ndcg_from_ranks_equals_ndcg_of_the_ranking(ranking: list[str], qrels: dict[str, int]) -> None:
    ranks = {doc_id: ranking.index(doc_id) + 1 for doc_id in qrels if doc_id in ranking}
    assert ndcg_from_ranks(ranks, qrels, 10) == pytest.approx(ndcg(ranking, qrels, 10))


def test_nothing_relevant_scores_zero() -> None:
    assert measure(["a"], {"a": 0}) == {"ndcg@10": 0.0, "recall@100": 0.0, "mrr@10": 0.0}
