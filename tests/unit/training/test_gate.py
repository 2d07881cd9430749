"""Fitting a gate: it finds what tells queries apart, says how sure it is, and refuses what teaches nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from search_r3.data.collection import Collection, Query
from search_r3.errors import DataError
from search_r3.model.encoder import SearchR3
from search_r3.model.modes.gate import sigmoid
from search_r3.training.modes.gate import Labelled, fit_gate, label_queries
from search_r3.training.modes.logistic import auc, brier, fit_logistic, log_loss, reliability


def made(size: int = 32, count: int = 240, noise: float = 0.0, seed: int = 0) -> Labelled:
    """Queries for which reasoning pays where the first number of a vector is positive, or the margin is small."""
    chance = np.random.default_rng(seed)
    vectors = chance.normal(size=(count, size)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    margins = chance.uniform(0, 0.2, size=count)
    scores = np.linspace(0.5, 0.3, 10)[None] - np.concatenate([[0.0], np.ones(9)])[None] * margins[:, None]
    pays = (vectors[:, 0] * 5 - (margins - 0.1) * 20 + noise * chance.normal(size=count)) > 0
    direct = np.where(pays, 0.2, 0.8)
    return Labelled(
        *([f"q{i}" for i in range(count)], vectors, scores.astype(np.float32), direct, np.full(count, 0.8)),
        *(np.full(count, 20.0), list(range(count)), {"measure": "ndcg@10"}),
    )


def test_newton_finds_the_minimum() -> None:
    chance = np.random.default_rng(1)
    table, penalties = chance.normal(size=(200, 3)), np.array([0.5, 1.0, 2.0])
    labels = (chance.random(200) < sigmoid(table @ np.array([2.0, -1.0, 0.0]) + 0.5)).astype(float)
    bias, weights = fit_logistic(table, labels, penalties)
    residual = sigmoid(table @ weights + bias) - labels
    assert abs(residual.sum()) < 1e-6 and np.abs(table.T @ residual + penalties * weights).max() < 1e-6
    assert weights[0] > 1 > -0.5 > weights[1]


def test_measures_of_probabilities() -> None:
    probabilities, labels = np.array([0.05, 0.15, 0.95, 1.0]), np.array([0.0, 1.0, 1.0, 1.0])
    assert auc(probabilities, labels) == 1.0 and auc(1 - probabilities, labels) == 0.0
    assert auc(np.full(4, 0.5), labels) == 0.5
    assert brier(probabilities, labels) == pytest.approx((0.05**2 + 0.85**2 + 0.05**2) / 4)
    assert log_loss(np.array([0.5, 0.5]), np.array([0.0, 1.0])) == pytest.approx(np.log(2))
    bins = reliability(probabilities, labels)
    assert [(one.low, one.count, one.observed) for one in bins] == [(0.0, 1, 0.0), (0.1, 1, 1.0), (0.9, 2, 1.0)]


def test_the_head_that_reads_scores_knows_more(model: SearchR3) -> None:
    gate = fit_gate(model, made(model.dimension))
    vector, scores = gate.fitted["by_vector"], gate.fitted["by_scores"]
    assert scores["auc"] > 0.95 > vector["auc"] > 0.6
    assert scores["brier"] < vector["brier"] < vector["brier_of_mean"]
    assert gate.by_scores.scores["margin"].weight < 0
    assert sum(one["count"] for one in scores["bins"]) == 240
    assert gate.price == pytest.approx(made().reason.sum() / 2 / 4800 - made().direct.sum() / 2 / 4800)
    assert scores["share"] == pytest.approx(gate.fitted["pays"], abs=0.1)
    assert 0.8 < scores["gain_share"] <= 1.0 and scores["token_share"] == pytest.approx(scores["share"])
    shares = [row["token_share"] for row in scores["prices"]]
    assert shares == sorted(shares) and len(shares) > 5
    assert gate == fit_gate(model, made(model.dimension)) or gate.fitted["provenance"]


def test_what_is_reported_is_of_queries_that_a_fit_has_not_seen(model: SearchR3) -> None:
    chance = np.random.default_rng(3)
    labelled = made(model.dimension)
    noise = replace(labelled, direct=np.where(chance.random(240) < 0.5, 0.2, 0.8), scores=np.ones_like(labelled.scores))
    report = fit_gate(model, noise).fitted["by_scores"]
    assert 0.35 < report["auc"] < 0.65 and report["brier"] > 0.24


def test_queries_alike_are_in_one_fold(model: SearchR3) -> None:
    """Copies of a query would else tell their labels across folds."""
    labelled = made(model.dimension, count=40)
    chance = np.random.default_rng(4)
    labels = np.where(chance.random(40) < 0.5, 0.2, 0.8)
    six = {name: np.repeat(getattr(labelled, name), 6, axis=0) for name in ("vectors", "reason", "tokens")}
    six |= {"scores": np.ones((240, 10), dtype=np.float32), "direct": np.repeat(labels, 6)}
    alike = replace(labelled, query_ids=[f"q{i}" for i in range(240)], groups=[i // 6 for i in range(240)], **six)
    apart = replace(alike, groups=list(range(240)))
    assert fit_gate(model, apart).fitted["by_vector"]["auc"] > 0.9
    assert fit_gate(model, alike).fitted["by_vector"]["auc"] < 0.75


def test_labels_are_our_own_measures(model: SearchR3, collection: Collection) -> None:
    labelled = label_queries(model, collection, ["train"], batch_size=8)
    assert labelled.query_ids == list(collection.qrels["train"]) and labelled.vectors.shape == (20, model.dimension)
    vectors = model.encode_query([collection.queries[one].text for one in labelled.query_ids], "reason").vectors
    documents = model.encode_document([one.full_text for one in collection.documents.values()])
    names = list(collection.documents)
    for vector, query_id, value in zip(vectors, labelled.query_ids, labelled.reason, strict=True):
        [relevant] = collection.qrels["train"][query_id]
        rank = sorted(names, key=lambda name: -float(documents[names.index(name)] @ vector)).index(relevant) + 1
        assert value == pytest.approx(1 / np.log2(rank + 1) if rank <= 10 else 0.0)
    assert (labelled.tokens > 0).any() and labelled.scores.shape == (20, 10)
    assert len(label_queries(model, collection, ["train", "dev"], limit=25, batch_size=8).query_ids) == 25


def test_queries_that_are_measured_on_are_not_learned_from(
    model: SearchR3, collection: Collection, caplog: pytest.LogCaptureFixture
) -> None:
    """By id, and by text whatever its case; the record still names the whole collection."""
    train, test = collection.qrels["train"], collection.qrels["test"]
    same, twin = list(train)[3], list(train)[5]
    queries = collection.queries | {"twin": Query("twin", collection.queries[twin].text.upper())}
    leaky = {**collection.qrels, "train": {**train, **collection.qrels["dev"]}}
    leaky["test"] = {**test, same: train[same], "twin": train[twin]}
    whole = replace(collection, queries=queries, qrels=leaky)
    labelled = label_queries(model, whole, ["train"], held_out=["test"], batch_size=8)
    assert labelled.query_ids == [one for one in leaky["train"] if one not in (same, twin)]
    assert labelled.facts["hash"] == whole.content_hash()
    assert "2 queries of train are not trained on, since test holds them too" in caplog.text
    with pytest.raises(DataError, match="18 queries in train; a gate needs at least 20"):
        label_queries(model, whole, ["train"], held_out=["dev", "test"])
    everything = replace(whole, qrels={"train": train, "test": train})
    with pytest.raises(DataError, match="0 queries in train"):
        label_queries(model, everything, ["train"], held_out=["test"])


def test_what_teaches_nothing_is_refused(model: SearchR3, collection: Collection) -> None:
    labelled = made(model.dimension)
    for direct, said in ((labelled.reason, "pays for 0 of 240"), (labelled.reason - 0.5, "does not pay for 0 of 240")):
        with pytest.raises(DataError, match=said):
            fit_gate(model, replace(labelled, direct=direct))
    with pytest.raises(DataError, match="at least 20"):
        label_queries(model, collection, ["dev"])
    with pytest.raises(DataError, match="unknown measure 'ndcg'"):
        label_queries(model, collection, ["train"], measure_name="ndcg")
