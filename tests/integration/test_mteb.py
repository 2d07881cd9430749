"""The real mteb on real local tasks, offline."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import pytrec_eval
from datasets import Dataset

mteb = pytest.importorskip("mteb")
from mteb._create_dataloaders import create_dataloader
from mteb.abstasks.aggregate_task_metadata import AggregateTaskMetadata
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.models import EncoderProtocol
from mteb.types import PromptType

import search_r3
from search_r3 import console
from search_r3.data.collection import Collection, Document, Query
from search_r3.errors import ConfigError, DataError, ModelError
from search_r3.evaluation.benchmark import EvaluationOptions, evaluate
from search_r3.evaluation.mteb import SearchR3MTEB, run_mteb
from search_r3.evaluation.mteb_tasks import BRIGHT, PAPER, collection_task, suite_tasks
from search_r3.evaluation.systems import EncodedCollections, SearchR3System
from search_r3.model.encoder import SearchR3
from search_r3.model.prompts import PLAIN_MODES, PROMPT_SETS
from search_r3.retrieval.index import ExactIndex
from search_r3.retrieval.metrics import measure, p_mrr
from tests.conftest import favour
from tests.gates import gate_for

MEASURES = {
    **{f"ndcg@{k}": f"ndcg_at_{k}" for k in (1, 3, 5, 10, 100)},
    **{f"recall@{k}": f"recall_at_{k}" for k in (1, 5, 10, 100)},
    **{f"p@{k}": f"precision_at_{k}" for k in (1, 3, 5, 10, 100)},
    "map@5": "map_at_5",
    "mrr@10": "mrr_at_10",
}


def rankings(model: SearchR3, collection: Collection, query_ids: Any, mode: Any) -> dict[str, list[str]]:
    """Our own way from texts to rankings, all documents deep, without what a query must not or need not rank."""
    texts = collection.texts()
    index = ExactIndex(list(texts), model.encode_document(list(texts.values())))
    queries = model.encode_query([collection.queries[query_id].text for query_id in query_ids], mode)
    found = index.search(queries.vectors, len(texts)).doc_ids
    return {
        query_id: [
            doc_id
            for doc_id in ranking
            if doc_id in collection.pools.get(query_id, texts)
            and doc_id not in collection.excluded.get(query_id, ())
            and doc_id != query_id
        ]
        for query_id, ranking in zip(query_ids, found, strict=True)
    }


def scores_of(path: Path, split: str) -> dict[str, Any]:
    """The scores in a result file of mteb."""
    [scores] = json.loads(path.read_text())["scores"][split]
    return scores


def assert_equal_measures(found: dict[str, Any], collection: Collection, split: str, ranked: Any) -> None:
    rows = [measure(ranking, collection.qrels[split][query_id]) for query_id, ranking in ranked.items()]
    for ours, theirs in MEASURES.items():
        # mteb rounds its means to five decimals, MRR in the file to six.
        digits = 6 if ours.startswith("mrr") else 5
        assert found[theirs] == pytest.approx(round(fmean(row[ours] for row in rows), digits), abs=1e-9), ours


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes the number of texts in every call of the model's two encoders."""
    calls: list[int] = []
    encode_query, stream_document = SearchR3.encode_query, SearchR3.stream_document

    def query(self: SearchR3, texts: Any, *args: Any, **options: Any) -> Any:
        calls.append(len(texts))
        return encode_query(self, texts, *args, **options)

    def document(self: SearchR3, texts: Any, **options: Any) -> Any:
        calls.append(len(texts))
        return stream_document(self, texts, **options)

    monkeypatch.setattr(SearchR3, "encode_query", query)
    monkeypatch.setattr(SearchR3, "stream_document", document)
    return calls


def encoded(
    encoder: SearchR3MTEB, rows: list[dict[str, str]], prompt_type: PromptType | None, metadata: Any = None
) -> Any:
    """Rows through mteb's own loader and then through the encoder; by default of a task without a prompt."""
    metadata = metadata or mteb.get_task("SciFact").metadata.model_copy(update={"prompt": {}})
    column = None if prompt_type else "text"
    loader = create_dataloader(
        Dataset.from_list(rows), task_metadata=metadata, prompt_type=prompt_type, input_column=column, batch_size=2
    )
    return encoder.encode(loader, task_metadata=metadata, hf_split="test", hf_subset="default", prompt_type=prompt_type)


def test_both_modes_score_as_our_own_evaluation_and_are_not_run_twice(
    model: SearchR3, tiny_path: Path, collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    favour(model.backbone, model.backbone.embed_token_id, 2.0)
    task = collection_task(collection, "test")
    options = EvaluationOptions(latency_queries=0, bootstrap=100)
    ours = {
        mode: evaluate(SearchR3System(EncodedCollections(model), mode), collection, "test", options).scores["ndcg@10"]
        for mode in PLAIN_MODES
    }
    calls = counted(monkeypatch)
    first = run_mteb(model, ["direct", "reason"], task, tmp_path, save_predictions=True)
    assert sorted(calls) == [10, 10, 40], "the documents are encoded once for both modes"
    assert [(score.mode, score.model) for score in first] == [
        ("direct", f"local/{tiny_path.name}-direct"),
        ("reason", f"local/{tiny_path.name}-reason"),
    ]
    for score in first:
        folder = tmp_path / "results" / f"local__{tiny_path.name}-{score.mode}" / model.backbone.revision
        folder = folder / "experiments" / str(SearchR3MTEB(model, mode=score.mode).mteb_model_meta.experiment_name)
        assert score.path == folder / f"{task.metadata.name}.json"
        scores = scores_of(score.path, "test")
        ranked = rankings(model, collection, collection.qrels["test"], score.mode)
        assert_equal_measures(scores, collection, "test", ranked)
        assert score.measure == "ndcg_at_10"
        assert score.score == score.scores["test/default"] == scores["ndcg_at_10"]
        meta = json.loads((folder / "model_meta.json").read_text())
        assert meta["name"] == score.model
        assert meta["revision"] == model.backbone.revision
        assert (meta["embed_dim"], meta["max_tokens"], meta["similarity_fn_name"]) == (
            32,
            model.backbone.settings.max_length,
            "cosine",
        )
        predictions = tmp_path / "predictions" / folder.relative_to(tmp_path / "results")
        saved = json.loads((predictions / task.prediction_file_name).read_text())
        assert saved["mteb_model_meta"]["model_name"] == score.model
        assert {query_id: len(found) for query_id, found in saved["default"]["test"].items()} == dict.fromkeys(
            collection.qrels["test"], 40
        )
        measured = pytrec_eval.RelevanceEvaluator(collection.qrels["test"], {"ndcg_cut.10"})
        unrounded = fmean(row["ndcg_cut_10"] for row in measured.evaluate(saved["default"]["test"]).values())
        assert unrounded == pytest.approx(ours[score.mode], abs=1e-6)
        assert score.score == round(ours[score.mode], 5)
    assert first[1].tokens_per_query[f"{task.metadata.name}/test/default"] > 0
    assert first[0].score != first[1].score

    calls.clear()
    again = run_mteb(tiny_path, ["direct", "reason"], collection_task(collection, "test"), tmp_path)
    assert calls == []
    assert [replace(score, tokens_per_query={}) for score in first] == again


def test_texts_that_lose_their_end_are_counted_and_said(
    model: SearchR3, collection: Collection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {f"x{i}": Document(f"x{i}", "a red house and a blue boat " * (200 + i)) for i in range(3)}
    [first, *_] = collection.qrels["test"]
    queries = collection.queries | {first: Query(first, "where is the boat? " * 200)}
    cut = replace(collection, documents=collection.documents | long, queries=queries)
    favour(model.backbone, model.backbone.embed_token_id, 2.0)
    scores = run_mteb(model, ["direct", "reason"], collection_task(cut, "test"), tmp_path)
    assert [(one.truncated_queries, one.truncated_documents) for one in scores] == [(1, 3), (1, 3)]
    console.show_mteb(scores)
    out = " ".join(capsys.readouterr().out.split())
    for mode in ("direct", "reason"):
        assert f"{mode}, own: 1 queries were longer than the model's limit and lost their end" in out
        assert f"{mode}, own: 3 documents were longer" in out


def test_each_side_reaches_its_own_encoder_as_one_text(model: SearchR3) -> None:
    encoder = SearchR3MTEB(model, mode="direct")
    assert isinstance(encoder, EncoderProtocol)
    rows = [
        {"id": "a", "title": "red house", "text": "It is a house."},
        {"id": "b", "title": "", "text": " A blue boat. "},
        {"id": "c", "title": "lamp", "text": ""},
    ]
    documents = [Document(row["id"], row["text"], row["title"]).full_text for row in rows]
    np.testing.assert_array_equal(encoded(encoder, rows, PromptType.document), model.encode_document(documents))

    texts = [{"text": "where is it?"}, {"text": "who is it?"}, {"text": "what?"}]
    plain = [row["text"] for row in texts]
    asked = [row | {"id": str(i), "instruction": "Only houses."} for i, row in enumerate(texts)]
    instructed = [f"{text} Only houses." for text in plain]
    assert np.array_equal(encoded(encoder, asked, PromptType.query), model.encode_query(instructed, "direct").vectors)
    np.testing.assert_array_equal(encoded(encoder, texts, None), model.encode_document(plain))

    reasoned = encoded(SearchR3MTEB(model), asked, PromptType.query)
    np.testing.assert_array_equal(reasoned, model.encode_query(instructed, "reason").vectors)
    own = model.backbone.settings
    model.backbone.settings = own.model_copy(update={"mode": "direct"})
    assert SearchR3MTEB(model).mode == "direct" and SearchR3MTEB(model, mode="reason").mode == "reason"
    model.backbone.settings = own


def test_the_prompts_of_a_task_reach_their_side(model: SearchR3) -> None:
    scifact = mteb.get_task("SciFact").metadata
    own = scifact.prompt["query"]
    rows = [{"id": "a", "text": "where is it?"}, {"id": "b", "text": "who is it?"}]
    texts = [row["text"] for row in rows]
    general = "Retrieve text based on user query."
    cache: dict[str, Any] = {}  # of documents, as the encoders of one run share it

    def vectors(choice: str, prompt: Any, side: PromptType | None, rows: Any = rows) -> Any:
        encoder = SearchR3MTEB(model, mode="direct", instruction=choice)
        encoder._cache = cache
        return encoded(encoder, rows, side, scifact.model_copy(update={"prompt": prompt}))

    both = {"query": f"{own} ", "document": "A page."}
    for choice, prompt, expected in (
        ("own", scifact.prompt, own),
        ("own", both, own),
        ("own", own, own),
        ("own", None, general),
        ("own", {}, ""),
        ("none", both, ""),
        ("Find it.", both, "Find it."),
    ):
        found = vectors(choice, prompt, PromptType.query)
        np.testing.assert_array_equal(found, model.encode_query(texts, "direct", instruction=expected).vectors)
    for choice, prompt, expected in (("own", both, "A page."), ("own", own, ""), ("Find it.", both, "")):
        found = vectors(choice, prompt, PromptType.document, [row | {"title": ""} for row in rows])
        np.testing.assert_array_equal(found, model.encode_document(texts, instruction=expected))
    np.testing.assert_array_equal(vectors("own", both, None), model.encode_document(texts), "no side, no search")
    mixed = [row | {"instruction": one} for row, one in zip(rows, ("Only houses.", ""), strict=True)]
    found = vectors("own", both, PromptType.query, mixed)
    expected = model.encode_query(texts, "direct", instruction=["Only houses.", own]).vectors
    np.testing.assert_array_equal(found, expected, "a query's own instruction comes first")
    long = [{"id": "a", "text": "where is the red house? " * 200, "instruction": "Only houses."}]
    whole, cut = vectors("own", both, PromptType.query, long), vectors("none", both, PromptType.query, long)
    assert not np.array_equal(whole, cut), "the text loses its end, the instruction does not"


def test_instructions_are_results_of_their_own(
    model: SearchR3, tiny_path: Path, collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = {
        one: replace(query, text=f"{query.text} Only houses.", instruction="Only houses.")
        for one, query in collection.queries.items()
        if int(one[1:]) % 3
    }
    instructed = replace(collection, queries={**collection.queries, **queries})
    calls = counted(monkeypatch)
    task = collection_task(instructed)
    scores = run_mteb(model, ["direct"], task, tmp_path, instructions=["own", "none", "Find a page; or a book."])
    assert sorted(calls) == [10, 10, 10, 40], "the documents are encoded once for all instructions"
    assert [score.instruction for score in scores] == ["own", "none", "Find a page; or a book."]
    folders = [score.path.parent.name for score in scores]
    assert [name.partition("__")[0] for name in folders[:2]] == ["instruction_own", "instruction_none"]
    assert folders[2].startswith("instruction_Find-a-page-or-a-book-")
    assert len({score.score for score in scores}) > 1
    for score, choice in zip(scores, ("own", "none", "Find a page; or a book."), strict=True):
        system = SearchR3System(EncodedCollections(model), "direct", instruction=choice)
        options = EvaluationOptions(latency_queries=0, bootstrap=100)
        assert score.score == round(evaluate(system, instructed, "test", options).scores["ndcg@10"], 5)


def test_similarity_is_the_cosine(model: SearchR3) -> None:
    encoder = SearchR3MTEB(model)
    first, second = np.float32([[0.6, 0.8], [1, 0]]), np.float32([[0, 1], [0.8, 0.6]])
    np.testing.assert_allclose(encoder.similarity(first, second), [[0.8, 0.96], [0, 0.8]], atol=1e-6)
    np.testing.assert_allclose(encoder.similarity(first[0], second), [[0.8, 0.96]], atol=1e-6)
    np.testing.assert_allclose(encoder.similarity_pairwise(first, second), [0.8, 0.8], atol=1e-6)


def test_empty_documents_get_the_zero_vector_and_their_ties_rank_the_larger_id_first(
    model: SearchR3, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    documents = {f"d{i:02d}": Document(f"d{i:02d}", " ") for i in range(12)}
    queries = {f"q{i}": Query(f"q{i}", f"where is the {word}?") for i, word in enumerate(("house", "boat", "lamp"))}
    ids = ["d11", "d09", "d00"]  # ranks 1, 3 and 12 when all scores are 0
    qrels = {"test": {query_id: {doc_id: 1} for query_id, doc_id in zip(queries, ids, strict=True)}}
    task = collection_task(Collection("blank", documents, queries, qrels))
    [score] = run_mteb(model, ["direct"], task, tmp_path)
    found = scores_of(score.path, "test")
    assert found["ndcg_at_10"] == round((1 + 0.5 + 0) / 3, 5)
    assert found["mrr_at_1000"] == round((1 + 1 / 3 + 1 / 12) / 3, 6)
    assert "12 of 12 texts are empty and get the zero vector" in caplog.text
    assert encoded(SearchR3MTEB(model), [{"text": " "}, {"text": "a house"}], None).any(axis=1).tolist() == [
        False,
        True,
    ]


@pytest.mark.parametrize("limits", ["pools", "excluded", "both"])
def test_pools_and_excluded_documents_limit_what_is_ranked(
    model: SearchR3, collection: Collection, tmp_path: Path, limits: str
) -> None:
    qrels = collection.qrels["test"]
    first, second, third = list(qrels)[:3]
    # The documents before a relevant one; another query keeps half of the collection, the rest rank everything.
    full = rankings(model, collection, qrels, "direct")
    before = {query_id: full[query_id][: full[query_id].index(next(iter(qrels[query_id])))] for query_id in qrels}
    half = frozenset(list(collection.documents)[::2]) | set(qrels[third])
    limited = replace(
        collection,
        pools={} if limits == "excluded" else {third: half, first: half | set(qrels[first])},
        excluded={} if limits == "pools" else {first: frozenset(before[first]), second: frozenset(before[second])},
    )
    [score] = run_mteb(model, ["direct"], collection_task(limited, "test"), tmp_path)
    ranked = rankings(model, limited, qrels, "direct")
    assert ranked != full
    assert_equal_measures(scores_of(score.path, "test"), limited, "test", ranked)


def test_a_document_with_the_id_of_the_query_is_not_ranked(
    model: SearchR3, collection: Collection, tmp_path: Path
) -> None:
    ids = {query_id: f"d{(int(query_id[1:]) + 1) % 40:02d}" for query_id in collection.qrels["test"]}
    queries = {own: Query(own, collection.queries[query_id].text) for query_id, own in ids.items()}
    qrels = {"test": {own: collection.qrels["test"][query_id] for query_id, own in ids.items()}}
    identical = Collection("identical", collection.documents, queries, qrels)
    task = collection_task(identical)
    [score] = run_mteb(model, ["direct"], task, tmp_path)
    ranked = rankings(model, identical, qrels["test"], "direct")
    assert {len(ranking) for ranking in ranked.values()} == {39}
    assert_equal_measures(scores_of(score.path, "test"), identical, "test", ranked)
    assert task.ignore_identical_ids
    own = replace(identical, qrels={"test": qrels["test"] | {"d04": {"d04": 1}}})
    assert not collection_task(own).ignore_identical_ids


def test_changed_instructions_are_measured_by_p_mrr(model: SearchR3, collection: Collection, tmp_path: Path) -> None:
    queries, qrels, changed = {}, {}, {}
    for query_id, gains in list(collection.qrels["test"].items())[:4]:
        text, [doc_id] = collection.queries[query_id].text, gains
        queries[f"{query_id}-og"] = Query(f"{query_id}-og", text)
        queries[f"{query_id}-changed"] = Query(f"{query_id}-changed", f"{text} But nothing red.")
        qrels[f"{query_id}-og"], qrels[f"{query_id}-changed"] = {doc_id: 1, "d05": 1}, {"d05": 1}
        changed[query_id] = frozenset({doc_id})
    following = Collection("follow", collection.documents, queries, {"test": qrels}, changed=changed)
    [score] = run_mteb(model, ["direct"], collection_task(following), tmp_path)
    ranked = rankings(model, following, queries, "direct")
    ours = p_mrr(
        {query_id: ranked[f"{query_id}-og"] for query_id in changed},
        {query_id: ranked[f"{query_id}-changed"] for query_id in changed},
        changed,
    )
    assert score.measure == "p-MRR"
    assert score.score == pytest.approx(fmean(ours.values()), abs=1e-6)
    assert score.score != 0


def test_an_aggregate_is_the_mean_of_its_tasks(model: SearchR3, collection: Collection, tmp_path: Path) -> None:
    parts = [
        collection_task(replace(collection, name=name, qrels={"test": collection.qrels[name]}))
        for name in ("dev", "test")
    ]

    class Aggregate(AbsTaskAggregate):
        metadata = AggregateTaskMetadata(
            name="Both",
            description="Two tasks.",
            tasks=parts,
            type="Retrieval",
            category="t2t",
            eval_splits=["test"],
            main_score="ndcg_at_10",
        )

    single = run_mteb(model, ["direct"], parts, tmp_path / "single")
    [both] = run_mteb(model, ["direct"], Aggregate(), tmp_path / "both")
    assert both.path.name == "Both.json"
    assert {path.name for path in both.path.parent.glob("*.json")} >= {score.path.name for score in single}
    assert both.score == pytest.approx(fmean(score.score for score in single), abs=1e-6)


def test_other_contents_make_another_task(collection: Collection) -> None:
    def name(**changes: Any) -> str:
        return collection_task(replace(collection, **changes), "test").metadata.name

    names = [name(), name(pools={"q03": frozenset({"d03"})}), name(excluded={"q03": frozenset({"d04"})})]
    names += [name(documents=collection.documents | {"d40": Document("d40", "more")}), name(name="other/x")]
    assert len(set(names)) == 5
    assert names[0].startswith("small-test-")
    assert names[-1].startswith("other_x-test-")
    assert name() == names[0]


def test_what_changes_vectors_keeps_its_results_apart(tiny_path: Path, model: SearchR3) -> None:
    def name(mode: Any = "reason", instruction: str = "own", budget: int | None = None, **loading: Any) -> str:
        loaded = SearchR3(tiny_path, device="cpu", **loading)
        meta = SearchR3MTEB(loaded, mode=mode, max_new_tokens=budget, instruction=instruction).mteb_model_meta
        assert meta.model_name_as_path() == f"local__{tiny_path.name}-{mode}"
        return str(meta.experiment_name)

    settings = SearchR3(tiny_path, device="cpu").backbone.settings
    usual = f"instruction_own__max_length_{settings.max_length}__max_new_tokens_{settings.max_new_tokens}"
    assert name() == f"{usual}__prompts_search-r3"
    assert "__max_new_tokens_7__" in name(budget=7) and "__max_new_tokens_7__" in name(max_new_tokens=7)
    assert name("direct", budget=7) == name("direct") != name(), "nothing is written there"
    own = PROMPT_SETS["search-r3"].model_copy(update={"direct_system": "Find."})
    others = [name(dtype="bfloat16"), name(instruction="none"), name(max_length=64), name(prompts="published")]
    others += [name(prompts=own), name(truncate_dim=8), name(max_new_tokens=7)]
    assert len({name(), *others}) == 8
    meta = SearchR3MTEB(model, instruction="none").mteb_model_meta
    assert not meta.use_instructions
    json.dumps(meta.to_dict())
    model.backbone.source = "owner/name"
    meta = SearchR3MTEB(model).mteb_model_meta
    assert meta.name == "owner/name-reason"


def test_queries_are_reasoned_about_in_batches_of_the_size_asked_for(
    model: SearchR3, collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int | None]] = []
    encode_query = SearchR3.encode_query

    def noted(self: SearchR3, *args: Any, batch_size: int, max_new_tokens: int | None, **options: Any) -> Any:
        sizes.append((batch_size, max_new_tokens))
        return encode_query(self, *args, batch_size=batch_size, max_new_tokens=max_new_tokens, **options)

    monkeypatch.setattr(SearchR3, "encode_query", noted)
    task = collection_task(collection)
    [score] = run_mteb(model, ["reason"], task, tmp_path, batch_size=3, max_new_tokens=2)
    assert score.tokens_per_query[f"{task.metadata.name}/test/default"] <= 2
    assert "__max_new_tokens_2__" in score.path.as_posix()
    assert score.path.is_file()
    mteb.evaluate(SearchR3MTEB(model, batch_size=5, max_new_tokens=2), task, cache=None, co2_tracker=False)
    assert sizes == [(3, 2), (5, 2)]


def test_the_suites_are_tasks_of_the_installed_mteb() -> None:
    tasks = suite_tasks("paper")
    assert [task.metadata.name for task in tasks] == list(PAPER)
    assert all(task.metadata.modalities == ["text"] and not task.superseded_by for task in tasks)
    bright = [task.metadata.name for task in mteb.get_benchmark("BRIGHT(v1.1)").tasks]
    assert {name for name in bright if "Long" not in name} == set(BRIGHT)
    followir = [task.metadata.name for task in mteb.get_benchmark("FollowIR").tasks]
    again = suite_tasks(["SciFact", "followir", "SciFact", followir[0]])
    assert [task.metadata.name for task in again] == ["SciFact", *followir]


def test_unknown_names_are_all_told_with_the_nearest_known_ones() -> None:
    with pytest.raises(DataError) as caught:
        suite_tasks(["scifact", "SciFact", "Papers", "zzzzqqqq"])
    scifact, papers, nothing = str(caught.value).split("; '")
    assert scifact.startswith("'scifact' is neither a suite nor a task of mteb; nearest: SciFact")
    assert papers.startswith("Papers' is neither a suite nor a task of mteb; nearest: paper")
    assert nothing == "zzzzqqqq' is neither a suite nor a task of mteb"


def test_what_cannot_be_run_is_refused(model: SearchR3, collection: Collection, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown mode 'fast'; expected one of direct, reason"):
        run_mteb(model, ["fast"], "SciFact", tmp_path)  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="precision='int8': the vectors are float32"):
        mteb.evaluate(SearchR3MTEB(model), collection_task(collection), cache=None, encode_kwargs={"precision": "int8"})
    with pytest.raises(DataError, match=r"SciFact could not be run: .*finished results are in"):
        run_mteb(model, ["direct"], "SciFact", tmp_path)
    with pytest.raises(DataError, match="no query of split 'test' in 'small' has a relevant document"):
        collection_task(replace(collection, qrels={"test": {"q00": {"d00": 0}}}))
    with pytest.raises(DataError, match="has no split 'other'"):
        collection_task(collection, "other")


def test_the_names_are_public() -> None:
    assert [search_r3.SearchR3MTEB, search_r3.run_mteb] == [SearchR3MTEB, run_mteb]
    assert [search_r3.collection_task, search_r3.suite_tasks] == [collection_task, suite_tasks]


def test_without_mteb_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "search_r3.evaluation.mteb")
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(ConfigError, match=r"pip install 'search-r3\[mteb\]'"):
        _ = search_r3.SearchR3MTEB


def test_mode_auto_is_a_model_of_its_own_and_a_gates_results_are_kept_apart(
    model: SearchR3, collection: Collection, tmp_path: Path
) -> None:
    texts = [collection.queries[query_id].text for query_id in collection.qrels["test"]]
    with pytest.raises(ModelError, match="search-r3 gate"):
        SearchR3MTEB(model, mode="auto")
    model.backbone.gate = gate_for(model, texts)
    [score] = run_mteb(model, ["auto"], collection_task(collection, "test"), tmp_path, max_new_tokens=4)
    tokens = model.encode_query(texts, "auto", max_new_tokens=4).reasoning_tokens
    assert score.model.endswith("-auto") and list(score.tokens_per_query.values()) == [pytest.approx(fmean(tokens))]
    names = []
    for price in (0.001, 0.002):
        model.backbone.gate = gate_for(model, texts, price=price)
        names.append(SearchR3MTEB(model, mode="auto").mteb_model_meta.experiment_name)
    assert names[0] != names[1]
