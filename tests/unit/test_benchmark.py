from __future__ import annotations

from statistics import fmean

import numpy as np
import pytest

from search_r3.data.collection import Collection
from search_r3.errors import DataError
from search_r3.evaluation.benchmark import (
    Row,
    bootstrap_interval,
    evaluate_bm25,
    evaluate_model,
    index_documents,
    paired_p_value,
    paired_p_values,
    sampled_rewards,
)
from search_r3.evaluation.search import Searcher
from search_r3.model.encoder import SearchR3
from tests.conftest import favour


def test_bm25_finds_what_shares_words(collection: Collection) -> None:
    row = evaluate_bm25(collection, "test")
    assert row.mean("ndcg@10") == 1.0, "every query holds its document's title"
    misled = evaluate_bm25(collection, "test", "bm25+reasoning", dict.fromkeys(collection.split("test"), "a red apple"))
    assert misled.mean("ndcg@10") < 0.5, "the given texts are searched, not the queries"
    blank = evaluate_bm25(collection, "test", "x", dict.fromkeys(collection.split("test"), " "))
    assert blank.mean("ndcg@10") == 1.0, "a blank text falls back to the query"


def test_a_models_row_is_what_a_search_by_hand_gives(model: SearchR3, collection: Collection) -> None:
    row = evaluate_model(model, collection, "test", "direct", "direct/x")
    doc_ids = list(collection.documents)
    documents = model.encode_document([document.full_text for document in collection.documents.values()])
    for query_id, gains in collection.split("test").items():
        scores = model.similarity(model.encode_query(collection.queries[query_id].text, "direct"), documents)[0]
        place = 1 + int((scores > scores[doc_ids.index(next(iter(gains)))]).sum())
        assert row.per_query[query_id]["mrr@10"] == pytest.approx(1 / place if place <= 10 else 0.0)
    assert (row.tokens_per_query, row.forced_share) == (0, 0)


def test_queries_without_a_relevant_document_are_left_out(model: SearchR3, collection: Collection) -> None:
    qrels = {"test": {"q00": {"d00": 1}, "q01": {"d01": 0}}, "none": {"q00": {"d00": 0}}}
    partly = Collection("p", collection.documents, collection.queries, qrels)
    assert set(evaluate_model(model, partly, "test", "direct", "d").per_query) == {"q00"}
    with pytest.raises(DataError, match="no query of split 'none'"):
        evaluate_bm25(partly, "none")


def test_sampled_rewards_are_the_ranking_part(model: SearchR3, collection: Collection) -> None:
    favour(model.backbone, model.backbone.embed_token_id, 3.0)
    index = index_documents(model, collection)
    rewards, forced = sampled_rewards(
        model, collection, "test", queries=5, group_size=3, k=10, seed=0, index=index, batch_size=4
    )
    assert len(rewards) == 15
    assert all(0.0 <= reward <= 1.0 for reward in rewards)
    assert 0.0 <= forced < 1.0
    again, _ = sampled_rewards(
        model, collection, "test", queries=5, group_size=3, k=10, seed=0, index=index, batch_size=15
    )
    assert again == pytest.approx(rewards)


def test_the_paired_test_knows_signal_from_noise() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=200)
    better = (noise + 0.5 + 0.1 * rng.normal(size=200)).tolist()
    assert paired_p_value(better, noise.tolist(), 2000, 0) < 0.01
    assert paired_p_value(noise.tolist(), rng.permutation(noise).tolist(), 2000, 0) > 0.05
    assert paired_p_value([1.0, 0.0], [1.0, 0.0], 200, 0) == 1.0
    # Three pairs, all differing by the same sign: 2 of the 8 sign patterns are as extreme.
    assert paired_p_value([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], 1000, 0) == pytest.approx(0.25)
    with pytest.raises(DataError, match="same queries on both sides"):
        paired_p_value([1.0], [1.0, 0.0], 200, 0)


def test_p_values_of_all_pairs_are_named() -> None:
    rows = [
        Row(name, {f"q{i}": {"ndcg@10": value} for i in range(20)}, 1.0) for name, value in (("a", 0.1), ("b", 0.9))
    ]
    assert set(paired_p_values(rows, 200, 0)) == {"b vs a"}
    assert paired_p_values(rows, 200, 0)["b vs a"] < 0.02


def test_the_interval_holds_the_mean() -> None:
    values = np.random.default_rng(0).uniform(size=100).tolist()
    low, high = bootstrap_interval(values, 1000, 0)
    assert low < fmean(values) < high
    assert 0.08 < high - low < 0.16  # 4 x 0.29 / sqrt(100) = 0.115
    assert bootstrap_interval([0.5, 0.5], 100, 0) == (0.5, 0.5)


def test_a_searcher_returns_documents_best_first(model: SearchR3, collection: Collection) -> None:
    answer = Searcher(model, collection).search("where is the red house?", "direct", k=7)
    scores = [score for _, score in answer.documents]
    assert len(scores) == 7
    assert scores == sorted(scores, reverse=True)
    assert answer.reasoning == ""


def test_a_search_that_streams_ends_with_the_same_answer(model: SearchR3, collection: Collection) -> None:
    favour(model.backbone, model.backbone.tokenizer.convert_tokens_to_ids("a"), 50.0)
    index = index_documents(model, collection)
    searcher = Searcher(model, collection, index)
    assert searcher.index is index, "what is encoded is not encoded again"
    *pieces, answer = searcher.stream("where is the red house?", k=7)
    whole = searcher.search("where is the red house?", k=7)
    assert len(pieces) > 5
    assert "".join(pieces) == answer.reasoning == whole.reasoning
    assert [document for document, _ in answer.documents] == [document for document, _ in whole.documents]
    assert (answer.reasoning_tokens, answer.forced, answer.truncated) == (whole.reasoning_tokens, whole.forced, False)
