"""Results of systems on splits: what they hold, what they leave out, what is not computed again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from search_r3.config import EvaluationSettings, GRPOSettings, Recipe
from search_r3.data.collection import Collection, Document, Query
from search_r3.data.documents import read_documents
from search_r3.data.reading.chunks import Chunking
from search_r3.errors import ConfigError, DataError, ModelError
from search_r3.evaluation import benchmark
from search_r3.evaluation.baselines import BM25System
from search_r3.evaluation.benchmark import EvaluationOptions, evaluate, resolve_splits
from search_r3.evaluation.report.report import sampled_rewards
from search_r3.evaluation.results import Result, load_result, load_results
from search_r3.evaluation.runner import reasoning_baseline
from search_r3.evaluation.search import Searcher, snippet
from search_r3.evaluation.systems import (
    EncodedCollections,
    SearchR3System,
    System,
    index_documents,
)
from search_r3.evaluation.table import gain_per_100_tokens, markdown
from search_r3.model.encoder import SearchR3
from search_r3.retrieval.index import ExactIndex
from search_r3.retrieval.metrics import p_mrr
from search_r3.retrieval.ranking import RankRequest, make_requests, ranked
from tests.conftest import favour, save_tiny

QUICK = EvaluationOptions(latency_queries=2, bootstrap=100)


def run(system: System, collection: Collection, **options: object) -> Result:
    return evaluate(system, collection, "test", replace(QUICK, **options))


@pytest.fixture
def reasons(model: SearchR3) -> SearchR3:
    """A model that writes a little and then emits the embed token for most queries."""
    favour(model.backbone, model.backbone.embed_token_id, 2.0)
    return model


def test_bm25_finds_what_shares_words(collection: Collection) -> None:
    result = run(BM25System(), collection)
    assert result.scores["ndcg@10"] == 1.0, "every query holds its document's title"
    misled = run(BM25System("x", dict.fromkeys(collection.split("test"), "a red apple"), "x"), collection)
    assert misled.scores["ndcg@10"] < 0.5, "the given texts are searched, not the queries"
    blank = run(BM25System("x", dict.fromkeys(collection.split("test"), " "), "y"), collection)
    assert blank.scores["ndcg@10"] == 1.0, "a blank text falls back to the query"


def test_a_models_result_is_what_a_search_by_hand_gives(model: SearchR3, collection: Collection) -> None:
    result = run(SearchR3System(EncodedCollections(model), "direct"), collection)
    doc_ids = list(collection.documents)
    documents = model.encode_document([document.full_text for document in collection.documents.values()])
    for place, (query_id, gains) in enumerate(collection.split("test").items()):
        scores = model.similarity(model.encode_query(collection.queries[query_id].text, "direct"), documents)[0]
        rank = 1 + int((scores > scores[doc_ids.index(next(iter(gains)))]).sum())
        assert result.query_ids[place] == query_id
        assert result.queries[place] == collection.queries[query_id].text
        assert result.per_query["mrr@10"][place] == pytest.approx(1 / rank if rank <= 10 else 0.0)
        assert result.top[place][0][0] == doc_ids[int(scores.argmax())]
        assert result.relevant[place] == gains
        assert set(result.snippets) >= {doc_id for doc_id, _ in result.top[place]} | set(gains)
    assert result.scores["mrr@10"] == pytest.approx(np.mean(result.per_query["mrr@10"]))
    low, high = result.intervals["ndcg@10"]
    assert low <= result.scores["ndcg@10"] <= high
    assert (result.cost.tokens_per_query, result.cost.forced_share, result.reasoning) == (0, 0, [])


def test_a_reasoning_result_holds_what_was_written_and_what_it_cost(reasons: SearchR3, collection: Collection) -> None:
    result = run(SearchR3System(EncodedCollections(reasons), "reason"), collection)
    encoded = reasons.encode_query([collection.queries[query_id].text for query_id in result.query_ids], "reason")
    assert result.reasoning == encoded.reasoning
    assert result.reasoning_tokens == encoded.reasoning_tokens
    assert result.cost.tokens_per_query == pytest.approx(np.mean(encoded.reasoning_tokens))
    assert result.cost.forced_share == pytest.approx(np.mean(encoded.forced))
    assert min(result.reasoning_tokens) > 0
    assert result.cost.queries_per_second > 0
    assert result.cost.ms_per_query is not None and result.cost.ms_per_query > 0
    assert result.cost.documents_per_second is not None and result.cost.documents_per_second > 0
    assert run(BM25System(), collection, latency_queries=0).cost.ms_per_query is None


def test_both_modes_search_the_same_vectors(reasons: SearchR3, collection: Collection) -> None:
    encoded = EncodedCollections(reasons)
    first, _ = encoded.index(collection)
    again, _ = encoded.index(collection)
    assert again is first
    other = Collection("other", {"x": Document("x", "an apple")}, {}, {})
    assert encoded.index(other)[0].doc_ids == ["x"]


def test_splits_share_what_a_baseline_has_indexed(collection: Collection) -> None:
    system = BM25System()
    first = system.index(collection)
    assert system.index(replace(collection, name="same")) is first
    other = Collection("other", {"x": Document("x", "an apple")}, {}, {})
    assert system.index(other) is not first
    found = system.index(other).answer([RankRequest("q", "apple")], 10).rankings
    assert [ranking.doc_ids for ranking in found] == [["x"]]


@pytest.mark.parametrize("name", ["bm25", "direct"])
def test_blocks_of_requests_rank_as_all_at_once(
    name: str, model: SearchR3, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = make_requests(collection, collection.qrels["test"])
    system = BM25System() if name == "bm25" else SearchR3System(EncodedCollections(model), "direct")
    whole = system.index(collection).answer(requests, 100).rankings
    monkeypatch.setattr("search_r3.evaluation.systems.AT_A_TIME", 3)
    parts = system.index(collection).answer(requests, 100).rankings
    assert [ranking.best(100) for ranking in parts] == [ranking.best(100) for ranking in whole]
    assert len({tuple(ranking.doc_ids) for ranking in whole}) == len(requests) == 10


def test_a_corpus_on_the_disk_gives_the_same_result_and_is_removed(
    model: SearchR3, collection: Collection, tmp_path: Path
) -> None:
    encoded = EncodedCollections(model, tmp_path / "indexes")
    on_disk = run(SearchR3System(encoded, "direct"), collection)
    assert on_disk.per_query == run(SearchR3System(EncodedCollections(model), "direct"), collection).per_query
    later = EncodedCollections(model, tmp_path / "indexes")
    assert later.index(collection)[1] is None, "nothing was encoded again, so there is no speed"
    limits = model.backbone.settings
    model.backbone.settings = limits.model_copy(update={"max_length": 64})
    other = EncodedCollections(model, tmp_path / "indexes")
    assert other.index(collection)[1] is not None, "with another limit it is another index"
    other.forget(collection)
    assert sum(path.is_dir() for path in (tmp_path / "indexes").iterdir()) == 1
    model.backbone.settings = limits
    later.forget(collection)
    assert not list((tmp_path / "indexes").iterdir())


def test_a_result_is_computed_once(model: SearchR3, collection: Collection, tmp_path: Path) -> None:
    def again(system: System, asked: Collection = collection, **options: object) -> Result:
        return evaluate(system, asked, "test", replace(QUICK, **options), folder=tmp_path)

    first = again(BM25System())
    assert again(BM25System()) == first, "not even the date differs: it was read"
    assert load_results(tmp_path) == [first]
    named = again(BM25System("lexical"))
    assert (named.system.name, named.key, named.provenance) == ("lexical", first.key, first.provenance)
    assert sorted(result.system.name for result in load_results(tmp_path)) == ["bm25", "lexical"]
    assert again(BM25System()) == first, "nothing that was there is lost"
    assert again(BM25System("lexi cal")).key == again(BM25System("lexi.cal")).key == first.key
    assert [result.system.name for result in load_results(tmp_path)] == ["bm25", "lexi.cal", "lexical"], (
        "two names of one file leave the last"
    )
    assert again(BM25System(), depth=120).key != first.key, "other settings"
    assert again(BM25System(texts={}, origin="texts")).key != first.key, "other texts"
    documents = {**collection.documents, "new": Document("new", "a lamp")}
    assert again(BM25System(), replace(collection, documents=documents)).key != first.key, "another collection"
    direct = again(SearchR3System(EncodedCollections(model), "direct"))
    model.backbone.settings = model.backbone.settings.model_copy(update={"max_length": 64})
    assert again(SearchR3System(EncodedCollections(model), "direct")).key != direct.key, "other limits"
    whole = again(SearchR3System(EncodedCollections(model), "direct"))
    model.truncate_dim = 8
    assert again(SearchR3System(EncodedCollections(model), "direct")).key != whole.key, "fewer dimensions"


def test_a_model_that_was_trained_on_is_another_revision(
    tmp_path: Path, tokenizer: object, collection: Collection
) -> None:
    path = save_tiny(tmp_path / "m", tokenizer)
    before = SearchR3(path).backbone.revision
    assert SearchR3(path).backbone.revision == before
    model = SearchR3(path)
    with torch.no_grad():
        next(iter(model.backbone.model.parameters())).add_(1e-3)
    model.save_pretrained(path)
    after = SearchR3(path).backbone.revision
    assert after != before
    (path / "README.md").write_text("a card")
    assert SearchR3(path).backbone.revision == after, "its card does not change a model"


def test_a_damaged_result_is_named(collection: Collection, tmp_path: Path) -> None:
    evaluate(BM25System(), collection, "test", QUICK, folder=tmp_path)
    [path] = tmp_path.iterdir()
    whole = path.read_text()
    path.write_text(whole[:500])
    with pytest.raises(DataError, match=rf"{path.name} is no result of this version .*; remove it and evaluate again"):
        evaluate(BM25System(), collection, "test", QUICK, folder=tmp_path)
    path.write_text(whole.replace('"key": "', '"key": "0', 1))
    with pytest.raises(DataError, match="result of another evaluation; remove it"):
        evaluate(BM25System(), collection, "test", QUICK, folder=tmp_path)
    assert load_result(path).system.name == "bm25"


def test_queries_without_a_relevant_document_are_left_out(model: SearchR3, collection: Collection) -> None:
    qrels = {"test": {"q00": {"d00": 1}, "q01": {"d01": 0}}, "none": {"q00": {"d00": 0}}}
    partly = Collection("p", collection.documents, collection.queries, qrels)
    assert run(SearchR3System(EncodedCollections(model), "direct"), partly).query_ids == ["q00"]
    with pytest.raises(DataError, match="no query of split 'none'"):
        evaluate(BM25System(), partly, "none", QUICK)


APPLES = {f"d{i}": Document(f"d{i}", "apple " * (9 - i) + "pear " * i) for i in range(8)}


def apples(**options: object) -> Collection:
    queries = {"q": Query("q", "apple"), "d0": Query("d0", "apple"), "d7": Query("d7", "apple")}
    qrels = {"test": {"q": {"d1": 1}, "d0": {"d1": 1}, "d7": {"d7": 1}}}
    return Collection("apples", APPLES, queries, qrels, **options)


def top(result: Result, query_id: str) -> list[str]:
    return [doc_id for doc_id, _ in result.top[result.query_ids.index(query_id)]]


def systems(model: SearchR3) -> list[System]:
    return [BM25System(), SearchR3System(EncodedCollections(model), "direct")]


def test_a_document_with_the_id_of_its_query_is_left_out_unless_it_is_relevant(model: SearchR3) -> None:
    for system in systems(model):
        result = run(system, apples())
        assert "d0" in top(result, "q")
        assert "d0" not in top(result, "d0"), "the query itself"
        assert "d7" in top(result, "d7"), "judged relevant"
        assert result.collection.identical_ids == 1
        kept = run(system, apples(), identical_ids="keep")
        assert "d0" in top(kept, "d0")
        assert kept.collection.identical_ids == 0


def test_excluded_documents_leave_the_ranking_and_others_move_up(model: SearchR3) -> None:
    for system in systems(model):
        whole = top(run(system, apples()), "q")
        without = frozenset(whole[:2])
        result = run(system, apples(excluded={"q": without}))
        assert top(result, "q") == whole[2:]
        assert top(result, "d7") == top(run(system, apples()), "d7"), "other queries keep theirs"


def test_excluding_does_not_shorten_a_deep_ranking(model: SearchR3, collection: Collection) -> None:
    documents = {
        f"{n}{doc_id}": replace(d, doc_id=f"{n}{doc_id}")
        for n in range(9)
        for doc_id, d in collection.documents.items()
    }
    out = frozenset(list(documents)[:200])
    for system in (BM25System(), SearchR3System(EncodedCollections(model), "direct")):
        index = system.index(Collection("many", documents, {}, {}))
        [found] = index.answer([RankRequest("q", "this one is about a house", left_out=out)], 100).rankings
        assert len(found.doc_ids) == 100
        assert not out.intersection(found.doc_ids)


def test_only_the_pool_is_ranked(model: SearchR3) -> None:
    for system in systems(model):
        whole = top(run(system, apples()), "q")
        result = run(system, apples(pools={"q": frozenset({"d2", "d5", "d6"})}))
        assert top(result, "q") == [doc_id for doc_id in whole if doc_id in ("d2", "d5", "d6")]
        assert len(top(result, "d7")) == len(top(run(system, apples()), "d7"))
    both = apples(pools={"q": frozenset({"d2", "d5"})}, excluded={"q": frozenset({"d5"})})
    for system in systems(model):
        assert top(run(system, both), "q") == ["d2"]


def test_equal_scores_gain_nothing_by_their_order() -> None:
    same = np.ones((5, 2), np.float32) / np.sqrt(2, dtype=np.float32)
    index = ExactIndex(["a", "e", "c", "b", "d"], same)
    pool = frozenset("abcde")
    found = ranked(index, same[:2], [RankRequest("q", "x"), RankRequest("r", "x", pool=pool)], 3)
    assert [doc_id for doc_id, _ in found[0]] == ["e", "d", "c"]
    assert found[1] == found[0], "a pool follows the same rule"


@pytest.mark.parametrize("size", [64, 128, 384])
def test_equal_vectors_tie_wherever_they_stand(size: int) -> None:
    rng = np.random.default_rng(size)
    for count in (5, 17, 33, 63, 863):
        vector = rng.normal(size=size).astype(np.float32)
        vector /= np.linalg.norm(vector)
        index = ExactIndex([f"d{i:03d}" for i in range(count)], np.tile(vector, (count, 1)))
        query = rng.normal(size=(1, size)).astype(np.float32)
        best = [f"d{i:03d}" for i in reversed(range(count))][:5]
        for pool in (None, frozenset(index.doc_ids)):
            [found] = ranked(index, query, [RankRequest("q", "x", pool=pool)], 5)
            assert [doc_id for doc_id, _ in found] == best
            assert len({score for _, score in found}) == 1


def test_a_system_with_an_unknown_revision_is_known_by_its_source(collection: Collection, tmp_path: Path) -> None:
    class Nameless(BM25System):
        def __init__(self, model: str) -> None:
            super().__init__()
            self.info = self.info.model_copy(update={"model": model, "revision": "unknown"})

    keys = {evaluate(Nameless(m), collection, "test", QUICK, folder=tmp_path).key for m in ("a", "b", "a")}
    assert len(keys) == 2


class Clocked(BM25System):
    """Every fifth query takes 110 ms and the others 10 ms, by a clock of its own; it is its own index."""

    documents_per_second, truncated_documents = None, 0

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.info = self.info.model_copy(update={"mode": mode})
        self.now, self.asked = 0.0, 0

    def perf_counter(self) -> float:
        return self.now

    def index(self, *given: Any) -> Any:
        self.inner = super().index(*given)
        return self

    def answer(self, requests: list[RankRequest], *more: Any) -> Any:
        for _ in requests:
            self.now += 0.11 if self.asked % 5 == 0 else 0.01
            self.asked += 1
        return self.inner.answer(requests, *more)


def test_milliseconds_are_a_median_and_in_mode_auto_where_some_queries_think_a_mean(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for mode in ("direct", "reason", "auto"):
        system = Clocked(mode)
        monkeypatch.setattr(benchmark, "time", system)
        found[mode] = run(system, collection, latency_queries=10).cost.ms_per_query
    assert found == pytest.approx({"direct": 10.0, "reason": 10.0, "auto": 0.2 * 110 + 0.8 * 10})


def test_what_searches_a_models_reasoning_costs_what_the_model_costs(reasons: SearchR3, collection: Collection) -> None:
    reason = run(SearchR3System(EncodedCollections(reasons), "reason"), collection)
    lexical = run(reasoning_baseline(reason), collection)
    assert lexical.system.name == "bm25+reasoning"
    assert lexical.cost.tokens_per_query == reason.cost.tokens_per_query > 0
    assert lexical.cost.ms_per_query > reason.cost.ms_per_query
    assert lexical.cost.queries_per_second < reason.cost.queries_per_second


def test_a_gain_is_over_the_same_model_at_the_same_settings(reasons: SearchR3, collection: Collection) -> None:
    encoded = EncodedCollections(reasons)
    direct, reason = (run(SearchR3System(encoded, mode), collection) for mode in ("direct", "reason"))
    gain = 100 * (reason.scores["ndcg@10"] - direct.scores["ndcg@10"]) / reason.cost.tokens_per_query
    assert gain_per_100_tokens(reason, [reason, direct]) == pytest.approx(gain)
    assert gain_per_100_tokens(direct, [reason, direct]) is None
    other = direct.system.model_copy(update={"settings": {**direct.system.settings, "dtype": "bfloat16"}})
    assert gain_per_100_tokens(reason, [reason, direct.model_copy(update={"system": other})]) is None


def test_p_mrr_reads_both_instructions_of_a_query() -> None:
    queries = {"1-og": Query("1-og", "apple"), "1-changed": Query("1-changed", "pear pear")}
    judged = {"test": {"1-og": {"d0": 1}, "1-changed": {"d6": 1}}}
    followed = Collection("f", APPLES, queries, judged, changed={"1": frozenset({"d0"})})
    result = run(BM25System(), followed)
    assert result.query_ids == ["1-og"], "the field measures the original instruction"
    assert top(result, "1-og").index("d0") == 0
    assert result.scores["p-mrr"] == pytest.approx(1 - 1 / 8), "d0 holds no pear, so it is not in the ranking of 7"
    alone = Collection("a", APPLES, {"1-changed": queries["1-changed"]}, {"test": {"1-changed": {"d6": 1}}})
    changed = run(BM25System(), alone).scores
    assert changed["ndcg@10"] != result.scores["ndcg@10"]
    for name in ("ndcg@5", "ndcg@10", "map"):
        assert result.scores[f"changed/{name}"] == changed[name]
    plain = run(BM25System(), replace(followed, changed={}))
    assert "p-mrr" not in plain.scores
    assert "| p-MRR |" in markdown([result], []) and "+0.875" in markdown([result], [])
    assert "p-MRR" not in markdown([plain], [])
    nothing_left = {"test": {"1-og": {"d0": 1}, "1-changed": {"d0": 0}}}
    unjudged = run(BM25System(), replace(followed, qrels=nothing_left))
    assert unjudged.query_ids == ["1-og"]
    assert unjudged.scores["p-mrr"] == result.scores["p-mrr"], "its ranking counts without any relevant document"


def test_p_mrr_looks_deeper_than_the_other_measures(model: SearchR3, collection: Collection) -> None:
    queries = {"1-og": Query("1-og", "where is the red house?"), "1-changed": Query("1-changed", "a white chair")}
    judged = {"test": {query_id: {"d00": 1} for query_id in queries}}
    lost = {"1": frozenset(collection.documents)}
    followed = Collection("f", collection.documents, queries, judged, changed=lost)
    system = SearchR3System(EncodedCollections(model), "direct")
    index = index_documents(model, collection.documents)
    texts = [query.text for query in queries.values()]
    before, after = index.search(model.encode_query(texts, "direct").vectors, 40).doc_ids
    expected = p_mrr({"1": before}, {"1": after}, lost)["1"]
    assert run(system, followed).scores["p-mrr"] == pytest.approx(expected)
    assert run(system, followed, depth=100).settings["depth"] == 1000, "deeper than the other measures"


def test_splits_are_resolved(collection: Collection) -> None:
    assert resolve_splits(collection, []) == ["test"]
    assert resolve_splits(collection, ["all"]) == ["dev", "test", "train"]
    assert resolve_splits(collection, ["dev", "dev"]) == ["dev"]
    only = replace(collection, qrels={"train": collection.qrels["train"], "dev": collection.qrels["dev"]})
    assert resolve_splits(only, []) == ["dev"]
    with pytest.raises(DataError, match="no split 'tset'; it has: dev, test, train"):
        resolve_splits(collection, ["test", "tset"])
    with pytest.raises(DataError, match="name a split of it: odd"):
        resolve_splits(replace(collection, qrels={"odd": {}}), [])
    with pytest.raises(ConfigError, match="the measures look at 100 documents"):
        EvaluationOptions(depth=50)


def test_a_model_that_never_embeds_is_refused(model: SearchR3, collection: Collection) -> None:
    favour(model.backbone, model.backbone.embed_token_id, -100.0)
    with pytest.raises(ModelError, match=r"for none of 10 queries .* train stage 1"):
        run(SearchR3System(EncodedCollections(model), "reason"), collection)


def test_a_model_that_gives_nan_is_refused_by_name(model: SearchR3, collection: Collection) -> None:
    with torch.no_grad():
        model.backbone.causal_lm.base_model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")
    for mode in ("direct", "reason"):
        with pytest.raises(ModelError, match=r"gave NaN or infinity in the vectors of .*weights are broken"):
            run(SearchR3System(EncodedCollections(model), mode), collection)
    with pytest.raises(ModelError, match=r"gave NaN .*first: 'red house"):
        model.encode_document("red house")


def test_sampled_rewards_are_the_ranking_part(reasons: SearchR3, collection: Collection) -> None:
    index = index_documents(reasons, collection.documents)
    recipe = Recipe(evaluation=EvaluationSettings(rollout_queries=5, batch_size=4), grpo=GRPOSettings(group_size=3))
    rewards, forced = sampled_rewards(recipe, collection, reasons, index)
    assert len(rewards) == 15
    assert all(0.0 <= reward <= 1.0 for reward in rewards)
    assert 0.0 <= forced < 1.0
    wide = recipe.model_copy(update={"evaluation": EvaluationSettings(rollout_queries=5, batch_size=15)})
    again, _ = sampled_rewards(wide, collection, reasons, index)
    assert again == pytest.approx(rewards)


def test_a_searcher_returns_documents_best_first(model: SearchR3, collection: Collection) -> None:
    answer = Searcher(model, collection.documents).search("where is the red house?", "direct", k=7)
    scores = [score for _, score in answer.documents]
    assert len(scores) == 7
    assert scores == sorted(scores, reverse=True)
    assert answer.reasoning == ""


def test_a_search_that_streams_ends_with_the_same_answer(model: SearchR3, collection: Collection) -> None:
    favour(model.backbone, model.backbone.tokenizer.convert_tokens_to_ids("a"), 50.0)
    index = index_documents(model, collection.documents)
    searcher = Searcher(model, collection.documents, index)
    assert searcher.index is index, "what is encoded is not encoded again"
    *pieces, answer = searcher.stream("where is the red house?", k=7)
    whole = searcher.search("where is the red house?", k=7)
    assert len(pieces) > 5
    assert "".join(pieces) == answer.reasoning == whole.reasoning
    assert [document for document, _ in answer.documents] == [document for document, _ in whole.documents]
    assert (answer.reasoning_tokens, answer.forced, answer.truncated) == (whole.reasoning_tokens, whole.forced, False)


def test_of_a_document_in_chunks_only_the_best_is_shown(model: SearchR3, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("The red house stands here. " * 60)
    (tmp_path / "short.txt").write_text("A green boat.")
    chunks = {one.doc_id: one for one in read_documents(tmp_path, chunking=Chunking(32))}
    assert len(chunks) > 8
    answer = Searcher(model, chunks).search("The red house stands here.", "direct", k=2)
    assert sorted(one.parent_id for one, _ in answer.documents) == ["long.txt", "short.txt"]
    best = {one.parent_id: score for one, score in answer.documents}
    scores = model.similarity(
        model.encode_query(["The red house stands here."], "direct").vectors,
        model.encode_document([one.full_text for one in chunks.values()]),
    )[0]
    assert best["long.txt"] == pytest.approx(max(scores[:-1]), abs=1e-5)
    facts = answer.as_dict()
    assert facts["query"] == "The red house stands here."
    assert [hit["rank"] for hit in facts["hits"]] == [1, 2]
    hit = next(hit for hit in facts["hits"] if hit["parent_id"] == "long.txt")
    assert hit["path"] == str(tmp_path / "long.txt")
    assert (tmp_path / "long.txt").read_text()[hit["start"] : hit["end"]] == hit["text"]
    json.dumps(facts)


def test_a_snippet_shows_where_the_words_of_the_query_are() -> None:
    text = "Nothing here. " * 50 + "The red\nhouse stands by the river. " + "Nothing there. " * 50
    shown = snippet(text, "a RED house?")
    assert shown.startswith("… The red house stands") and shown.endswith(" …")
    assert 250 < len(shown) <= 300
    assert snippet("short\n text", "x") == "short text"
    assert snippet("word " * 100, "none of them").startswith("word word")
    assert len(snippet("x" * 1000, "x")) <= 300
    assert snippet("a " * 300 + "end", "end").endswith("a end")
