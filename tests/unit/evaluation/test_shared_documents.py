"""A corpus is encoded once for models that differ in nothing but what encodes queries."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from search_r3 import SearchR3
from search_r3.data.collection import Collection
from search_r3.evaluation.results import Result
from search_r3.evaluation.runner import EvaluationPlan, run_plan
from search_r3.evaluation.systems import EncodedCollections
from tests.conftest import count_encoded, save_tiny
from tests.model_folders import add_query_side, make_adapter

SPLITS = ["dev", "test"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, str]:
    """A model, and what a stage with frozen documents makes of it."""
    folder = tmp_path_factory.mktemp("shared")
    save_tiny(folder / "base", tokenizer, tied=True)
    SearchR3(folder / "base", device="cpu", max_length=160, max_new_tokens=4).save_pretrained(folder / "first")
    make_adapter(folder / "side", folder / "first")
    add_query_side(shutil.copytree(folder / "first", folder / "second"), folder / "side")
    return {name: str(folder / name) for name in ("first", "second")}


def plan(models: dict[str, str], collection_path: Path) -> EvaluationPlan:
    return EvaluationPlan(models, ["direct"], [], [str(collection_path)], SPLITS, loading={"device": "cpu"})


def scores(results: list[Result]) -> dict[str, Any]:
    return {f"{result.collection.split}/{Path(result.system.model).name}": result.per_query for result in results}


@pytest.fixture(scope="module")
def separate(models: dict[str, str], collection_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folders = {name: tmp_path_factory.mktemp(name) for name in models}
    return scores(
        [one for name in models for one in run_plan(plan({"": models[name]}, collection_path), folders[name])]
    )


def test_one_call_encodes_once_and_gives_what_separate_calls_give(
    models: dict[str, str], separate: Any, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = count_encoded(monkeypatch)
    results = list(run_plan(plan(models, collection_path), tmp_path))
    assert [count for count in encoded if count > 1] == [40], "all others are the text that tells models apart"
    assert scores(results) == separate
    assert any(separate[f"{split}/first"] != separate[f"{split}/second"] for split in SPLITS)
    assert not list((tmp_path / "indexes").iterdir())


def test_vectors_that_a_stopped_call_left_are_those_of_the_other_model(
    models: dict[str, str], separate: Any, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = count_encoded(monkeypatch)
    first = run_plan(plan({"": models["first"]}, collection_path), tmp_path)
    results = [next(first)]
    first.close()  # type: ignore[attr-defined]
    results += run_plan(plan({"": models["second"]}, collection_path), tmp_path)
    assert [count for count in encoded if count > 1] == [40]
    assert scores(results) == {name: one for name, one in separate.items() if name != "test/first"}


def test_two_evaluations_at_one_time_take_nothing_from_each_other(
    models: dict[str, str], collection: Collection, tmp_path: Path
) -> None:
    first, second = (EncodedCollections(SearchR3(models[name], device="cpu"), tmp_path) for name in models)
    other = Thread(target=first.forget, args=(collection,))  # as the first one does when it is done

    def during(*_: int) -> None:
        if not other.ident:
            other.start()
            other.join(0.2)  # it has to wait

    index, _ = second.index(collection, during)
    other.join()
    assert not list(tmp_path.iterdir())
    [doc_ids] = index.search(second.model.encode_query(["where is the red house?"], "direct").vectors, 40).doc_ids
    assert set(doc_ids) == collection.documents.keys(), "what it has opened stays"


def reword(field: str) -> Callable[[str], SearchR3]:
    def load(source: str) -> SearchR3:
        prompts = SearchR3(source, device="cpu").backbone.settings.prompts
        return SearchR3(source, device="cpu", prompts=prompts.model_copy(update={field: "Say red blue."}))

    return load


@pytest.mark.parametrize(
    ("load", "shared"),
    [
        (lambda source: SearchR3(source, device="cpu", max_new_tokens=3), True),
        (reword("reason_system"), True),
        (reword("document_system"), False),
        (lambda source: SearchR3(source, device="cpu", max_length=64), False),
        (lambda source: SearchR3(source, device="cpu", truncate_dim=16), False),
        (lambda source: SearchR3(source, device="cpu", dtype="bfloat16"), False),
    ],
)
def test_what_documents_depend_on_is_never_shared(
    load: Callable[[str], SearchR3], shared: bool, models: dict[str, str], collection: Collection, tmp_path: Path
) -> None:
    one, other = EncodedCollections(SearchR3(models["first"], device="cpu"), tmp_path), load(models["second"])
    assert one.index(collection)[1] is not None
    assert (EncodedCollections(other, tmp_path).index(collection)[1] is None) == shared


def test_neither_are_other_weights_nor_another_instruction(
    models: dict[str, str], collection: Collection, tmp_path: Path
) -> None:
    model = SearchR3(models["first"], device="cpu")
    EncodedCollections(model, tmp_path).index(collection)
    assert EncodedCollections(model, tmp_path, "A page.").index(collection)[1] is not None
    with torch.no_grad():  # as weights are that were saved in bfloat16; a store takes them for the same
        for parameter in model.backbone.model.parameters():
            parameter.copy_(parameter.bfloat16())
    assert EncodedCollections(model, tmp_path).index(collection)[1] is not None


def test_nor_weights_that_are_computed_with_otherwise(
    models: dict[str, str], collection: Collection, tmp_path: Path
) -> None:
    other = shutil.copytree(models["first"], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-2}))
    EncodedCollections(SearchR3(models["first"], device="cpu"), tmp_path).index(collection)
    assert EncodedCollections(SearchR3(other, device="cpu"), tmp_path).index(collection)[1] is not None
