from __future__ import annotations

from statistics import fmean

import numpy as np
import pytest

from search_r3.data.collection import Collection
from search_r3.errors import DataError
from search_r3.evaluation.baselines import BM25System
from search_r3.evaluation.benchmark import EvaluationOptions, evaluate
from search_r3.evaluation.significance import bootstrap_intervals, compare, holm, paired_p_value


def test_the_paired_test_knows_signal_from_noise() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=200)
    better = (noise + 0.5 + 0.1 * rng.normal(size=200)).tolist()
    assert paired_p_value(better, noise.tolist(), 2000, 0) < 0.01
    assert paired_p_value(noise.tolist(), rng.permutation(noise).tolist(), 2000, 0) > 0.05
    assert paired_p_value([1.0, 0.0], [1.0, 0.0], 200, 0) == 1.0
    assert paired_p_value([1.0, 0.0], [0.0, 0.0], 200, 0) == 1.0, "one difference says nothing about its sign"
    # Three pairs, all differing by the same sign: 2 of the 8 sign patterns are as extreme.
    assert paired_p_value([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], 1000, 0) == pytest.approx(0.25)
    assert paired_p_value([1.0, 1.0, 1.0, 0.5], [0.0, 0.0, 0.0, 0.5], 1000, 0) == pytest.approx(0.25), "a tie adds none"
    with pytest.raises(DataError, match="same queries on both sides"):
        paired_p_value([1.0], [1.0, 0.0], 200, 0)


def test_p_values_are_uniform_where_nothing_differs() -> None:
    rng = np.random.default_rng(1)
    found = [paired_p_value(rng.normal(size=30).tolist(), rng.normal(size=30).tolist(), 400, 0) for _ in range(300)]
    assert fmean(p < 0.1 for p in found) == pytest.approx(0.1, abs=0.05)
    assert fmean(p < 0.5 for p in found) == pytest.approx(0.5, abs=0.08)


def test_the_interval_holds_the_mean_of_each_measure() -> None:
    values = np.random.default_rng(0).uniform(size=100)
    found = bootstrap_intervals({"a": values.tolist(), "b": (values + 5).tolist(), "same": [0.5] * 100}, 1000, 0)
    low, high = found["a"]
    assert low < values.mean() < high
    assert 0.08 < high - low < 0.16  # 4 x 0.29 / sqrt(100) = 0.115
    assert found["b"] == pytest.approx((low + 5, high + 5)), "the same queries are drawn for every measure"
    assert found["same"] == (0.5, 0.5)
    assert bootstrap_intervals({"a": [0.25]}, 100, 0) == {"a": (0.25, 0.25)}


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0], "never above 1"
    assert holm([]) == []


def test_all_pairs_of_a_split_are_compared_and_corrected_together(collection: Collection) -> None:
    options = EvaluationOptions(latency_queries=0, bootstrap=100)
    wrong = BM25System("wrong", dict.fromkeys(collection.queries, "a red apple"), "one text for all")
    results = [
        evaluate(system, collection, split, options) for split in ("test", "dev") for system in (BM25System(), wrong)
    ]
    found = compare(results, 2000, 0)
    assert [(one.split, one.first, one.second) for one in found] == [
        ("test", "wrong", "bm25"),
        ("dev", "wrong", "bm25"),
    ]
    assert found[0].difference == pytest.approx(results[1].scores["ndcg@10"] - results[0].scores["ndcg@10"])
    assert found[0].difference < -0.5
    assert [one.p_holm for one in found] == holm([one.p for one in found])
    assert found[0].p < found[0].p_holm < 0.05


def test_results_of_two_states_of_a_collection_are_not_compared(collection: Collection) -> None:
    options = EvaluationOptions(latency_queries=0, bootstrap=100)
    fewer = dict(list(collection.qrels["test"].items())[1:])
    other = Collection("small", collection.documents, collection.queries, {"test": fewer})
    results = [evaluate(BM25System(), collection, "test", options), evaluate(BM25System("b"), other, "test", options)]
    with pytest.raises(DataError, match=r"different states of 'small', test; evaluate both again, or remove"):
        compare(results, 200, 0)
