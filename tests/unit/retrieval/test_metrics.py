"""Our measures against pytrec_eval and ir-measures, ties included, p-MRR against mteb, and numbers by hand."""

from __future__ import annotations

import math
from statistics import fmean

import ir_measures
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r3.retrieval.metrics import (
    MEASURES,
    average_precision,
    capped_recall,
    hit,
    measure,
    ndcg,
    ndcg_from_ranks,
    p_mrr,
    precision,
    rank,
    recall,
    reciprocal_rank,
)

doc_ids = st.sampled_from([f"d{i}" for i in range(150)])
scores = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5000001, 1.0, -1.0])
runs = st.dictionaries(doc_ids, scores, min_size=1, max_size=130)
judgements = st.dictionaries(doc_ids, st.integers(-1, 3), min_size=1, max_size=12)
IN_TREC_EVAL = {name: name.replace("@", "_").replace("ndcg", "ndcg_cut").replace("p_", "P_") for name in MEASURES}
IN_TREC_EVAL |= {name: f"map_cut_{name[4:]}" for name in MEASURES if name.startswith("map@")}
IN_TREC_EVAL |= {name: f"success_{name[4:]}" for name in MEASURES if name.startswith("hit@")}
_THEIRS = (("ndcg", "nDCG"), ("mrr", "RR"), ("map", "AP"), ("recall", "R"), ("hit", "Success"), ("p", "P"))
IN_IR_MEASURES = {
    name: name.replace(ours, theirs, 1) for ours, theirs in _THEIRS for name in MEASURES if name.split("@")[0] == ours
}
CAPPED = tuple(name for name in MEASURES if name.startswith("recall_cap"))
"""What no oracle but mteb has."""
RECIPROCAL = tuple(name for name in MEASURES if name.startswith("mrr"))


def has_relevant(qrels: dict[str, int]) -> bool:
    return any(gain > 0 for gain in qrels.values())


@settings(max_examples=300, deadline=None)
@given(runs, judgements.filter(has_relevant))
def test_measures_equal_pytrec_eval_with_ties(run: dict[str, float], qrels: dict[str, int]) -> None:
    names = {
        *("ndcg_cut.1,3,5,10,20,100,1000", "recall.1,5,10,20,100,1000", "P.1,3,5,10,20,100"),
        *("map", "map_cut.5,10,100,1000", "success.1,5,10,20,100"),
    }
    oracle = pytrec_eval.RelevanceEvaluator({"q": qrels}, names).evaluate({"q": run})["q"]
    for k in (10, 100):
        top = {doc_id: run[doc_id] for doc_id in rank(run, k)}
        [values] = pytrec_eval.RelevanceEvaluator({"q": qrels}, {"recip_rank"}).evaluate({"q": top}).values()
        oracle[f"mrr_{k}"] = values["recip_rank"]
    found = measure(rank(run), qrels)
    assert set(found) == set(MEASURES)
    for name in set(found) - set(CAPPED):
        value = found[name]
        assert value == pytest.approx(oracle[IN_TREC_EVAL[name]], abs=1e-9), name


@settings(max_examples=50, deadline=None)
@given(runs, judgements.filter(has_relevant))
def test_measures_equal_ir_measures_with_ties(run: dict[str, float], qrels: dict[str, int]) -> None:
    measures = {name: ir_measures.parse_measure(other) for name, other in IN_IR_MEASURES.items() if name not in CAPPED}
    # Its RR@k (the script of MS MARCO) has another rule for equal scores than trec_eval, whose rule is ours.
    reciprocal = {name: measures.pop(name) for name in RECIPROCAL}
    without_ties = {doc_id: -float(place) for place, doc_id in enumerate(rank(run))}
    oracle = ir_measures.calc_aggregate(measures.values(), {"q": qrels}, {"q": run})
    oracle |= ir_measures.calc_aggregate(reciprocal.values(), {"q": qrels}, {"q": without_ties})
    measures |= reciprocal
    found = measure(rank(run), qrels)
    for name, other in measures.items():
        assert found[name] == pytest.approx(oracle[other], abs=1e-9), name


def test_numbers_by_hand() -> None:
    ranking, qrels = ["a", "b", "c", "d"], {"b": 2, "d": 1, "x": 1}
    ideal = 2 / 1 + 1 / math.log2(3) + 1 / 2
    assert ndcg(ranking, qrels, 10) == pytest.approx((2 / math.log2(3) + 1 / math.log2(5)) / ideal)
    assert ndcg(ranking, qrels, 3) == pytest.approx((2 / math.log2(3)) / ideal)
    assert recall(ranking, qrels, 2) == pytest.approx(1 / 3)
    assert precision(ranking, qrels, 10) == pytest.approx(2 / 10), "divided by 10, not by the 4 that were found"
    assert capped_recall(ranking, qrels, 2) == pytest.approx(1 / 2), "no more than 2 can stand among the first 2"
    assert capped_recall(ranking, qrels, 10) == recall(ranking, qrels, 10)
    assert [hit(ranking, qrels, k) for k in (1, 2)] == [0.0, 1.0]
    assert average_precision(ranking, qrels) == pytest.approx((1 / 2 + 2 / 4) / 3)
    assert average_precision(ranking, qrels, 3) == pytest.approx((1 / 2) / 3)
    assert reciprocal_rank(ranking, qrels, 10) == 0.5
    assert reciprocal_rank(ranking, qrels, 1) == 0.0


def test_ties_rank_by_id_and_not_by_insertion() -> None:
    assert rank({"a": 1.0, "c": 1.0, "b": 1.0, "z": 0.0}) == ["c", "b", "a", "z"]
    assert rank({"b": 1.0, "a": 1.0}, k=1) == ["b"]


@given(
    st.permutations([f"d{i}" for i in range(12)]), st.dictionaries(doc_ids, st.integers(1, 3), min_size=1, max_size=5)
)
def test_ndcg_from_ranks_equals_ndcg_of_the_ranking(ranking: list[str], qrels: dict[str, int]) -> None:
    ranks = [ranking.index(doc_id) + 1 if doc_id in ranking else 13 for doc_id in qrels]
    assert ndcg_from_ranks(ranks, list(qrels.values()), 10) == pytest.approx(ndcg(ranking, qrels, 10))


def test_nothing_relevant_scores_zero() -> None:
    assert set(measure(["a"], {"a": 0}).values()) == {0.0}


FEW = [f"d{i}" for i in range(8)]
few_runs = st.dictionaries(st.sampled_from(FEW), scores, min_size=1)
changes = st.sets(st.sampled_from(FEW), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(few_runs, few_runs, changes), min_size=1, max_size=3))
def test_p_mrr_equals_mteb(queries: list[tuple[dict[str, float], dict[str, float], set[str]]]) -> None:
    calculate_pmrr = pytest.importorskip("mteb._evaluators.retrieval_metrics").calculate_pmrr
    before = {f"{i}-og": run for i, (run, _, _) in enumerate(queries)}
    after = {f"{i}-changed": run for i, (_, run, _) in enumerate(queries)}
    lost = {str(i): sorted(doc_ids) for i, (_, _, doc_ids) in enumerate(queries)}
    found = p_mrr(
        {name: rank(before[f"{name}-og"]) for name in lost},
        {name: rank(after[f"{name}-changed"]) for name in lost},
        lost,
    )
    assert fmean(found.values()) == pytest.approx(calculate_pmrr(before, after, lost), abs=1e-9)


def test_p_mrr_by_hand() -> None:
    before, after = {"q": ["a", "b", "c"]}, {"q": ["b", "c", "a"]}
    assert p_mrr(before, after, {"q": ["a"]}) == {"q": pytest.approx(1 - 1 / 3)}, "it fell from 1 to 3"
    assert p_mrr(after, before, {"q": ["a"]}) == {"q": pytest.approx(1 / 3 - 1)}, "it rose: the wrong way"
    assert p_mrr(before, before, {"q": ["a"]}) == {"q": 0.0}, "the instruction was ignored"
    assert p_mrr(before, after, {"q": ["x", "a"]}) == {"q": pytest.approx((0 + 2 / 3) / 2)}, "x has the rank after last"
