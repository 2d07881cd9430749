"""Reasoning distilled into the direct vector: what is learned, what stays, and that a killed run goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from search_r3 import train_distill
from search_r3.config import Recipe, load_recipe
from search_r3.data.collection import Collection, Query
from search_r3.errors import ConfigError, DataError
from search_r3.files import hash_file, hash_folder
from search_r3.model.encoder import SearchR3
from search_r3.parallel import Communicator
from search_r3.retrieval.index import ExactIndex
from search_r3.training import losses
from search_r3.training.dev import DevSplit
from search_r3.training.modes.distill import Course
from search_r3.training.modes.teacher import Teacher, choose_queries
from search_r3.training.sft import train_sft
from tests.conftest import Stop, StopAt, call, favour, save_tiny

STAGE_1 = [
    "max_length=120", "max_new_tokens=16", "sft.steps=120", "sft.batch_size=4", "sft.learning_rate=1e-2",
    "sft.splits={train: 1.0}", "sft.reasoning_styles={restate: 1.0}",
]  # fmt: skip
SETTINGS = [
    "distill.steps=4", "distill.batch_size=6", "distill.learning_rate=5e-3", "distill.evaluate_every=2",
    "distill.depth=5", "distill.warmup_steps=0", "save_every=2",
]  # fmt: skip
DEV = ("dev_ndcg@10_direct", "dev_ndcg@10_reason")
TEXTS = ["where is the red house?", "a blue boat", "the white chair"]


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, collection_path: Path) -> Path:
    folder = tmp_path_factory.mktemp("stage-1")
    base = save_tiny(folder / "base", tokenizer, spare_rows=16)
    where = [f"run_dir={folder}/run", f"base={base}", f"collection={collection_path}"]
    return train_sft(load_recipe(None, [*STAGE_1, *where])).model_path


def recipe(folder: Path, collection: Path, *more: str) -> Recipe:
    return load_recipe(None, [*SETTINGS, f"run_dir={folder}", f"collection={collection}", *more])


@pytest.fixture(scope="module", params=["full", "lora"])
def path(request: Any, tmp_path_factory: pytest.TempPathFactory, stage_1: Path, collection_path: Path) -> Path:
    more = ["lora.rank=4"] if request.param == "lora" else []
    settings = recipe(tmp_path_factory.mktemp(request.param) / "run", collection_path, *more)
    return train_distill(stage_1, settings).model_path


def test_documents_stay_byte_for_byte_and_queries_move(path: Path, stage_1: Path) -> None:
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert hash_file(path / name) == hash_file(stage_1 / name)
    assert json.loads((path / "search_r3.json").read_text())["queries"] == "queries"
    before, after = SearchR3(stage_1, device="cpu"), SearchR3(path, device="cpu")
    np.testing.assert_array_equal(after.encode_document(TEXTS), before.encode_document(TEXTS))
    assert np.abs(after.encode_query(TEXTS, "direct") - before.encode_query(TEXTS, "direct").vectors).max() > 1e-3
    assert after.backbone.settings.max_length == 120, "the model's own limits, which the recipe does not name"


@pytest.mark.parametrize("target", ["scores", "vector"])
def test_direct_vectors_come_nearer_to_reasoned_ones_and_those_stay(
    stage_1: Path, collection: Collection, collection_path: Path, tmp_path: Path, target: str
) -> None:
    more = [f"distill.target={target}", "distill.steps=40", "distill.evaluate_every=0"]
    result = train_distill(stage_1, recipe(tmp_path / "run", collection_path, *more))
    before, after = SearchR3(stage_1, device="cpu"), SearchR3(result.model_path, device="cpu")
    texts = [query.text for query in choose_queries(collection, ["train"], [])]
    teacher = before.encode_query(texts, "reason").vectors

    def cosine(model: SearchR3, mode: Any) -> float:
        return float((model.encode_query(texts, mode).vectors * teacher).sum(-1).mean())

    assert cosine(after, "direct") > cosine(before, "direct") + 0.5 * (1 - cosine(before, "direct"))
    assert cosine(after, "reason") > 0.97
    first, last = result.log_history[1], result.log_history[-1]
    name = "score_kl" if target == "scores" else "vector_distance"
    assert last[name] < 0.5 * first[name]
    assert first["reason_distance"] == pytest.approx(0, abs=1e-5), "the replies' vectors are what they were"
    assert result.log_history[0]["teacher_queries"] == 20


def test_without_the_term_that_holds_it_reason_mode_moves_further(
    stage_1: Path, collection_path: Path, tmp_path: Path
) -> None:
    before = SearchR3(stage_1, device="cpu").encode_query(TEXTS, "reason").vectors
    kept = {}
    for weight in (0, 1):
        more = [f"distill.hold_weight={weight}", "distill.steps=20", "distill.evaluate_every=0"]
        result = train_distill(stage_1, recipe(tmp_path / str(weight), collection_path, *more))
        vectors = SearchR3(result.model_path, device="cpu").encode_query(TEXTS, "reason").vectors
        kept[weight] = float((vectors * before).sum(-1).mean())
        assert ("cross_entropy" in result.metrics) == bool(weight)
    assert kept[1] > kept[0]


def test_a_resumed_run_equals_an_unbroken_one_and_asks_the_teacher_once(
    stage_1: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["distill.samples=2", "distill.micro_batch_size=4"]
    expected = train_distill(stage_1, recipe(tmp_path / "whole", collection_path, *more))
    broken = recipe(tmp_path / "broken", collection_path, *more)
    with pytest.raises(Stop):
        train_distill(stage_1, broken, callbacks=[StopAt(3)])
    with pytest.raises(ConfigError, match="holds the stage 'distill' already; add --resume"):
        train_distill(stage_1, broken)

    def decode_again(*args: Any) -> None:
        raise AssertionError("the replies are on the disk")

    monkeypatch.setattr(Teacher, "_replies", decode_again)
    result = train_distill(stage_1, broken, resume=True)
    assert hash_folder(result.model_path) == hash_folder(expected.model_path)
    times = {"seconds", "update_seconds", "tokens_per_second", "evaluation_seconds"}
    rows = [[{k: v for k, v in row.items() if k not in times} for row in one.log_history] for one in (result, expected)]
    assert rows[0] == rows[1]
    assert not (tmp_path / "broken" / "distill" / "checkpoints").exists(), "with what was kept for it"


def test_micro_batches_change_no_gradient(
    stage_1: Path, collection: Collection, collection_path: Path, tmp_path: Path
) -> None:
    found = []
    for size in (100, 3):
        settings = recipe(tmp_path / str(size), collection_path, f"distill.micro_batch_size={size}")
        result = train_distill(stage_1, settings.model_copy(update={"save_every": 100}))
        found.append(result.log_history[1])
    for name in ("loss", "score_kl", "cross_entropy", "reason_distance", "grad_norm", "tokens"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4), name


def test_queries_need_no_judgements_and_those_that_are_measured_on_are_left_out(collection: Collection) -> None:
    queries = {
        **collection.queries,
        "new": Query("new", "a house?"),
        "copy": Query("copy", collection.queries["q02"].text),
    }
    larger = replace(collection, queries=queries)
    chosen = {query.query_id for query in choose_queries(larger, [], ["dev", "test"])}
    assert "q02" in collection.qrels["dev"]
    assert chosen == {*collection.qrels["train"], "new"}, "no query of dev or test, and none with the text of one"
    with pytest.raises(DataError, match="no query of 'small' is left to learn from"):
        choose_queries(collection, [], ["train", "dev", "test"])


def test_a_relevant_document_with_the_id_of_its_query_is_among_those_that_teach(
    stage_1: Path, collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = {query_id: next(iter(gains)) for query_id, gains in collection.qrels["train"].items()}
    [query_id, *_] = answer
    documents = {
        (query_id if one == answer[query_id] else one): replace(document, doc_id=query_id)
        if one == answer[query_id] else document
        for one, document in collection.documents.items()
    }  # fmt: skip
    renamed = Collection("renamed", documents, collection.queries, {"train": {query_id: {query_id: 1}}})
    seen = []

    def batch(course: Course, step: int) -> Any:
        seen.append(found(course, step))
        return seen[-1]

    found = Course.batch
    monkeypatch.setattr(Course, "batch", batch)
    settings = ["distill.steps=1", "distill.batch_size=1", "distill.depth=100", "distill.evaluate_every=0"]
    train_distill(stage_1, load_recipe(None, [*SETTINGS, *settings]), run_dir=tmp_path / "run", collection=renamed)
    vector = SearchR3(stage_1, device="cpu").encode_document([documents[query_id].full_text])
    assert (seen[0].documents.numpy() @ vector[0]).max() > 0.9999 and len(seen[0].documents) == len(documents)


def test_the_best_of_several_replies_is_the_teacher(
    stage_1: Path, collection: Collection, collection_path: Path, tmp_path: Path
) -> None:
    more = ["distill.samples=4", "distill.splits=[train]", "distill.sampling_temperature=1.3"]
    model = SearchR3(stage_1, device="cpu")
    index = ExactIndex(list(collection.documents), model.encode_document(list(collection.texts().values())))
    queries = choose_queries(collection, ["train"], [])
    found = {}
    for kind in ("mean", "best"):
        settings = recipe(tmp_path, collection_path, *more, f"distill.teacher={kind}").distill
        teacher = Teacher(model, collection, index, settings, 0)
        found[kind] = teacher.lessons(queries, tmp_path / kind, Communicator())
    for several, best in zip(found["mean"], found["best"], strict=True):
        [one] = best.replies
        relevant = index.rows_of(list(collection.qrels["train"][best.query.query_id]))

        def rank(vector: torch.Tensor, relevant: Any = relevant) -> int:
            return index.ranks(vector.numpy()[None], [relevant.tolist()])[0][0]

        assert rank(one.vector) == min(rank(reply.vector) for reply in several.replies)
        mean = torch.nn.functional.normalize(sum(reply.vector for reply in several.replies), dim=0)
        torch.testing.assert_close(several.vector, mean)
    assert any(len(lesson.replies) > 1 for lesson in found["mean"]), "there was something to choose"
    unjudged = [*queries, Query("new", "a house?")]
    with pytest.raises(DataError, match="1 of 21 queries have no relevant document"):
        teacher.lessons(unjudged, tmp_path / "other", Communicator())


def test_a_model_that_decides_teaches_what_it_writes_and_decides_no_more(
    stage_1: Path, collection: Collection, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(stage_1, tmp_path / "decides")
    file = tmp_path / "decides" / "search_r3.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"gate": "policy"}))
    model = SearchR3(tmp_path / "decides", device="cpu")
    favour(model.backbone, model.backbone.embed_token_id, 50.0)
    settings = recipe(tmp_path / "run", collection_path, "distill.steps=1", "distill.evaluate_every=0")
    index = ExactIndex(list(collection.documents), model.encode_document(list(collection.texts().values())))
    queries = choose_queries(collection, ["train"], [])[:3]
    lessons = Teacher(model, collection, index, settings.distill, 0).lessons(queries, tmp_path, Communicator())
    assert [reply.reasoning_tokens for lesson in lessons for reply in lesson.replies] == [1, 1, 1]
    gates, replies = [], Teacher._replies

    def watched(self: Teacher, *given: Any) -> Any:
        gates.append(self.model.backbone.settings.gate)
        return replies(self, *given)

    monkeypatch.setattr(Teacher, "_replies", watched)
    result = train_distill(tmp_path / "decides", settings)
    assert gates == ["policy"]
    assert SearchR3(result.model_path, device="cpu").backbone.settings.gate is None


def test_score_distillation_is_the_divergence_of_two_softmaxes() -> None:
    torch.manual_seed(0)
    students, teachers, documents = (torch.nn.functional.normalize(torch.randn(n, 8), dim=-1) for n in (3, 3, 7))
    teachers.requires_grad_()
    students.requires_grad_()
    found = losses.score_distillation(students, teachers, documents, 0.1)
    views = [torch.distributions.Categorical(logits=side.detach() @ documents.T / 0.1) for side in (teachers, students)]
    expected = float(torch.distributions.kl_divergence(*views).sum())
    assert found.item() == pytest.approx(expected, rel=1e-5)
    found.backward()
    assert teachers.grad is None
    assert students.grad is not None


def test_the_command_says_what_one_glance_has_now(
    stage_1: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    where = [f"run_dir={tmp_path / 'run'}", f"collection={collection_path}"]
    assert call(monkeypatch, "distill", stage_1, *SETTINGS, *where) == 0
    said = capsys.readouterr().out
    assert "dev nDCG@10, direct: " in said
    assert "dev nDCG@10, reason: " in said
    assert str(tmp_path / "run" / "distill" / "model") in said.replace("\n", "")
    assert call(monkeypatch, "distill", stage_1, *SETTINGS, *where) == 2
    assert "add --resume" in capsys.readouterr().err


def test_the_command_reports_the_model_that_it_kept(
    stage_1: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Steps 2 and 4 are equally good: the first of them is kept. Step 6 is worse."""
    found = {0: (0.5, 0.8), 2: (0.7, 0.75), 4: (0.7, 0.72), 6: (0.6, 0.71)}
    where = [f"collection={collection_path}", "distill.steps=6", "save_every=10"]
    for keep, after in (("best", ("0.700", "0.750", "67%")), ("last", ("0.600", "0.710", "33%"))):
        values = iter([dict(zip(DEV, pair, strict=True)) for pair in found.values()])
        monkeypatch.setattr(DevSplit, "evaluate", lambda *given, values=values: next(values))
        run = [f"run_dir={tmp_path / keep}", f"distill.keep={keep}"]
        assert call(monkeypatch, "distill", stage_1, *SETTINGS, *where, *run) == 0
        said = capsys.readouterr().out
        assert f"dev nDCG@10, direct: 0.500 -> {after[0]}" in said
        assert f"dev nDCG@10, reason: 0.800 -> {after[1]}" in said
        assert f"one glance has {after[2]} now" in said


def test_what_cannot_be_distilled_is_refused_with_the_remedy(
    stage_1: Path, path: Path, collection_path: Path, tmp_path: Path
) -> None:
    for model, more, message in (
        (stage_1.parents[2] / "base", [], r"has no search_r3.json: no stage has trained it"),
        (stage_1, ["max_length=100"], "distill with max_length=100, but .* with max_length=120; set that"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_distill(model, recipe(tmp_path / "run", collection_path, *more))
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    with pytest.raises(DataError, match="a step needs 600 queries but there are 20"):
        train_distill(stage_1, recipe(tmp_path / "run", collection_path, "distill.batch_size=600"))
    with pytest.raises(ConfigError, match="teacher=best chooses among several replies"):
        recipe(tmp_path / "run", collection_path, "distill.teacher=best")
