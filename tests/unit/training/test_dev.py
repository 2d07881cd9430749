"""The dev evaluation of both stages, the model that is kept and the early stop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from search_r3.config import EvaluationSettings, Recipe, load_recipe
from search_r3.data.collection import Collection
from search_r3.errors import ConfigError, DataError
from search_r3.evaluation.benchmark import evaluate
from search_r3.evaluation.systems import EncodedCollections, SearchR3System
from search_r3.model.encoder import SearchR3
from search_r3.model.prompts import PLAIN_MODES
from search_r3.retrieval.index import ExactIndex
from search_r3.training.dev import DECIDING, DevSplit, Evaluations
from search_r3.training.engine import make_engine
from search_r3.training.grpo import train_grpo
from search_r3.training.run import Run
from search_r3.training.sft import train_sft
from tests.conftest import Stop, StopAt, favour

SETTINGS = [
    "max_length=120", "max_new_tokens=12", "save_every=2", "sft.steps=6", "sft.batch_size=4",
    "sft.splits={train: 1.0}", "sft.learning_rate=1e-2", "sft.evaluate_every=1", "sft.keep=best",
]  # fmt: skip


@pytest.fixture
def limited(collection: Collection) -> Collection:
    """Dev queries with excluded documents, a pool, a document of the query's id and no relevant document."""
    dev = dict(collection.split("dev")) | {"q03": {"d03": 0}}
    documents = dict(collection.documents)
    documents["q02"] = replace(documents["d02"], doc_id="q02")
    return replace(
        collection,
        documents=documents,
        qrels=collection.qrels | {"dev": dev},
        excluded={"q06": frozenset(f"d{i:02d}" for i in range(8, 40))},
        pools={"q10": frozenset(f"d{i:02d}" for i in range(8, 14))},
    )


def test_the_dev_evaluation_is_the_reports(model: SearchR3, limited: Collection, tmp_path: Path) -> None:
    recipe = Recipe(run_dir=str(tmp_path))
    favour(model.backbone, model.backbone.embed_token_id, 3.5)  # a report refuses a model that never emits it
    values = DevSplit(limited, EvaluationSettings()).evaluate(model, make_engine(model, recipe, recipe.sft))
    for mode in PLAIN_MODES:
        system = SearchR3System(EncodedCollections(model), mode)
        report = evaluate(system, limited, "dev")
        assert values[f"dev_ndcg@10_{mode}"] == pytest.approx(report.scores["ndcg@10"], abs=1e-9)
        assert len(report.query_ids) == 10, "one of eleven has no relevant document"
        plain = evaluate(system, replace(limited, excluded={}, pools={}), "dev")
        assert plain.scores["ndcg@10"] != pytest.approx(report.scores["ndcg@10"], abs=1e-3), "the limits matter"


def test_a_corpus_that_is_encoded_already_is_not_encoded_again(
    model: SearchR3, collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(run_dir=str(tmp_path))
    engine, dev = make_engine(model, recipe, recipe.grpo), DevSplit(collection, EvaluationSettings())
    expected = dev.evaluate(model, engine)
    texts = collection.texts()
    index = ExactIndex(list(texts), model.encode_document(list(texts.values())))
    monkeypatch.setattr(SearchR3, "encode_document", None)
    values = dev.evaluate(model, engine, index)
    assert {**values, "evaluation_seconds": 0} == pytest.approx({**expected, "evaluation_seconds": 0})


def test_a_split_without_relevant_documents_is_refused(collection: Collection) -> None:
    empty = replace(collection, qrels={"dev": {"q00": {"d00": 0}}})
    with pytest.raises(DataError, match=r"no query of split 'dev' in 'small' has a relevant .* evaluate_every=0"):
        DevSplit(empty, EvaluationSettings())
    with pytest.raises(ConfigError, match="keep=best, patience=None, evaluate_every=0: nothing"):
        load_recipe(None, ["sft.keep=best"])
    with pytest.raises(ConfigError, match="keep=last, patience=3, evaluate_every=0: nothing"):
        load_recipe(None, ["grpo.patience=3", "grpo.evaluate_every=0"])


def script(monkeypatch: pytest.MonkeyPatch, scores: dict[int, float]) -> dict[int, dict[str, torch.Tensor]]:
    """Evaluations with these scores, by the step of the schedule; the weights at each come back."""
    weights: dict[int, dict[str, torch.Tensor]] = {}

    def evaluate(self: Any, model: SearchR3, engine: Any, index: Any = None) -> dict[str, float]:
        step = engine.scheduler.scheduler.last_epoch
        weights[step] = {name: value.clone() for name, value in model.backbone.model.state_dict().items()}
        return {DECIDING["sft"]: scores[step], "evaluation_seconds": 0.0}

    monkeypatch.setattr(DevSplit, "evaluate", evaluate)
    return weights


def check_kept(path: Path, weights: dict[str, torch.Tensor]) -> None:
    kept = SearchR3(path, device="cpu").backbone.model.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in weights.items())


def recipe_at(folder: Path, tiny_path: Path, collection_path: Path, *more: str) -> Recipe:
    return load_recipe(
        None, [*SETTINGS, f"run_dir={folder}", f"base={tiny_path}", f"collection={collection_path}", *more]
    )


@pytest.mark.parametrize("rank", [0, 2])
def test_the_best_model_is_kept_and_a_resumed_run_keeps_the_same(
    tmp_path: Path, tiny_path: Path, collection_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    weights = script(monkeypatch, {1: 0.1, 2: 0.3, 3: 0.5, 4: 0.5, 5: 0.2, 6: 0.4})
    recipe = recipe_at(tmp_path / "run", tiny_path, collection_path, f"lora.rank={rank}")
    with pytest.raises(Stop):  # the best is newer than the last checkpoint: it is made again
        train_sft(recipe, callbacks=[StopAt(3)], resume=True)
    assert sorted(path.name for path in (tmp_path / "run" / "sft" / "checkpoints").iterdir()) == [
        "best-000002", "best-000003", "step-000002"
    ]  # fmt: skip
    with pytest.raises(Stop):
        train_sft(recipe, callbacks=[StopAt(5)], resume=True)
    run = Run(recipe)
    path = train_sft(recipe, resume=True).model_path
    assert [row[DECIDING["sft"]] for row in run.metrics("sft")] == [0.1, 0.3, 0.5, 0.5, 0.2, 0.4]
    assert not (tmp_path / "run" / "sft" / "checkpoints").exists()
    if rank:
        assert (run.adapter_path("sft") / "adapter_model.safetensors").exists()
        assert [row["loss"] for row in run.metrics("sft")]
    else:
        check_kept(path, weights[3])
        whole = recipe_at(tmp_path / "whole", tiny_path, collection_path)
        check_kept(train_sft(whole).model_path, weights[3])
        last = recipe_at(tmp_path / "last", tiny_path, collection_path, "sft.keep=last")
        check_kept(train_sft(last).model_path, weights[6])


def test_a_best_model_that_was_moved_by_a_killed_process_is_found(
    tmp_path: Path, tiny_path: Path, collection_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, {step: 1.0 / step for step in range(1, 7)})
    recipe = recipe_at(tmp_path / "run", tiny_path, collection_path, "lora.rank=2")
    with pytest.raises(Stop):
        train_sft(recipe, callbacks=[StopAt(5)], resume=True)
    run = Run(recipe)
    (run.checkpoints_path("sft") / "best-000001" / "adapter").replace(run.adapter_path("sft"))
    train_sft(recipe, resume=True)
    assert (run.adapter_path("sft") / "adapter_model.safetensors").exists()


def test_a_stage_stops_when_no_evaluation_is_better(
    tmp_path: Path, tiny_path: Path, collection_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = script(monkeypatch, {1: 0.1, 2: 0.3, 3: 0.2, 4: 0.3, 5: 0.9, 6: 0.9})
    recipe = recipe_at(tmp_path / "run", tiny_path, collection_path, "sft.patience=2")
    with pytest.raises(Stop):
        train_sft(recipe, callbacks=[StopAt(3)], resume=True)
    run = Run(recipe)
    check_kept(train_sft(recipe, resume=True).model_path, weights[2])
    assert [row["step"] for row in run.metrics("sft")] == [1, 2, 3, 4], "an equal one is not a better one"


def test_stage_2_keeps_the_model_it_began_from_where_none_is_better(
    tmp_path: Path, tiny_path: Path, collection_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["sft.steps=100", "sft.keep=last", "sft.evaluate_every=0", "sft.reasoning_styles={restate: 1.0}"]
    first = recipe_at(tmp_path / "first", tiny_path, collection_path, *options)
    stage_1 = train_sft(first).model_path
    weights = script(monkeypatch, {0: 0.5, 1: 0.4, 2: 0.3, 3: 0.6})
    more = ["grpo.steps=3", "grpo.queries_per_step=2", "grpo.group_size=3", "grpo.splits=[train]", "grpo.keep=best"]
    more += ["grpo.evaluate_every=1", "grpo.patience=2"]
    recipe = recipe_at(tmp_path / "run", tiny_path, collection_path, *more)
    run = Run(recipe)
    check_kept(train_grpo(recipe, model=stage_1).model_path, weights[0])
    assert [row["step"] for row in run.metrics("grpo")] == [0, 1, 2]


@pytest.mark.parametrize(("at_once", "kept"), [("false", 2), ("true", 1)])
def test_of_a_model_that_decides_the_value_of_auto_is_looked_at(
    model: SearchR3, tmp_path: Path, at_once: str, kept: int
) -> None:
    more = [f"run_dir={tmp_path}", f"grpo.at_once={at_once}", "grpo.reward.tokens=0.5", "max_new_tokens=10"]
    recipe = load_recipe(None, more)
    evaluations = Evaluations(Run(recipe), "grpo", recipe, make_engine(model, recipe, recipe.grpo), model, 0)
    for step, (auto, tokens, reason) in enumerate([(0.5, 0.0, 0.1), (0.7, 2.0, 0.6), (0.8, 5.0, 0.9)]):
        evaluations.add(step, {"dev_ndcg@10_auto": auto, "dev_tokens_auto": tokens, "dev_ndcg@10_reason": reason})
    assert evaluations.best_step == kept
