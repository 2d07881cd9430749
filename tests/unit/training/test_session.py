"""Training from Python: what callbacks are told and can ask for, collections that are given, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from search_r3 import Recipe, SearchR3, train_grpo, train_sft
from search_r3.config import SFTSettings
from search_r3.data.collection import Collection
from search_r3.errors import ConfigError
from search_r3.model.encoder import SearchR3 as Encoder
from search_r3.parallel import Communicator
from search_r3.training.run import Run
from tests.conftest import Stop, StopAt


def settings(folder: Path, base: Path, **sft: Any) -> dict[str, Any]:
    return {
        "run_dir": str(folder), "base": str(base), "max_length": 120, "max_new_tokens": 16, "save_every": 2,
        "sft": {"steps": 3, "batch_size": 4, **sft},
        "grpo": {"steps": 2, "queries_per_step": 2, "group_size": 3, "evaluate_every": 2},
    }  # fmt: skip


class Diary(transformers.TrainerCallback):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.entries: list[tuple[Any, ...]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        self.entries.append(("begin", keywords["stage"], args.run_dir, state.max_steps, type(keywords["model"])))

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        self.entries.append(("step", state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **keywords: Any) -> None:
        assert state.log_history[-1] == {**logs, "step": state.global_step}
        self.entries.append(("log", state.global_step, "loss" in logs))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **keywords: Any) -> None:
        self.entries.append(("evaluate", state.global_step, sorted(metrics)))

    def on_save(self, args: Any, state: Any, control: Any, checkpoint: Path, **keywords: Any) -> None:
        self.entries.append(("save", checkpoint.name, (checkpoint / "checkpoint.json").exists()))

    def on_train_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        self.entries.append(("end", Run(args).finished(keywords["stage"])))


MEASURES = ["dev_ndcg@10_direct", "dev_ndcg@10_reason"]


def test_callbacks_are_told_of_every_step_as_those_of_transformers_are(
    tmp_path: Path, tiny_path: Path, collection: Collection
) -> None:
    diary, folder = Diary(), str(tmp_path / "run")
    recipe = settings(tmp_path / "run", tiny_path, evaluate_every=3, learning_rate=1e-2)
    result = train_sft(recipe, collection=collection, callbacks=[diary])
    assert diary.entries == [
        ("begin", "sft", folder, 3, Encoder), ("step", 1), ("log", 1, True), ("step", 2), ("log", 2, True),
        ("save", "step-000002", True), ("step", 3), ("log", 3, True), ("evaluate", 3, MEASURES), ("end", True),
    ]  # fmt: skip
    assert [row["step"] for row in result.log_history] == [1, 2, 3]
    rates = [row["learning_rate"] for row in result.log_history]
    assert rates == pytest.approx([1e-2 / 21, 2e-2 / 21, 3e-2 / 21]), "of these steps, of a warm-up of 20"
    assert result.metrics["dev_ndcg@10_direct"] == Run(result.recipe).metrics("sft")[-1]["dev_ndcg@10_direct"]
    assert SearchR3(result.model_path, device="cpu").backbone.trained
    told = len(diary.entries)
    again = train_sft(recipe, collection=collection, callbacks=[diary], resume=True)
    assert again == result and len(diary.entries) == told, "a finished stage is not trained, nor told of"


def test_stage_2_goes_on_in_the_same_run_and_tells_of_the_evaluation_before_the_first_step(
    tmp_path: Path, tiny_path: Path, collection: Collection
) -> None:
    recipe = settings(tmp_path / "run", tiny_path, steps=120, learning_rate=1e-2, reasoning_styles={"restate": 1.0})
    first = train_sft(recipe, collection=collection)
    diary = Diary()
    result = train_grpo(first.recipe, collection=collection, callbacks=[diary])
    assert result.model_path == tmp_path / "run" / "model"
    assert diary.entries == [
        ("begin", "grpo", first.recipe.run_dir, 2, Encoder), ("log", 0, False), ("evaluate", 0, MEASURES),
        ("step", 1), ("log", 1, True), ("step", 2), ("log", 2, True), ("evaluate", 2, MEASURES),
        ("save", "step-000002", True), ("end", True),
    ]  # fmt: skip
    other = {**first.recipe.model_dump(), "run_dir": str(tmp_path / "other")}
    same = train_grpo(other, model=first.model_path, collection=collection).model_path
    one, two = (load_file(path / "model.safetensors") for path in (same, result.model_path))
    assert all(torch.equal(one[name], two[name]) for name in one), "callbacks that only look change nothing"


class Asks(transformers.TrainerCallback):
    """Asks for a checkpoint at step 1 and for the end at step 2."""

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        control.should_save = state.global_step == 1
        control.should_training_stop = state.global_step == 2


@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_callback_can_have_a_checkpoint_written_and_end_the_stage_with_its_model(
    tmp_path: Path, tiny_path: Path, collection: Collection, keep: str
) -> None:
    diary = Diary()
    recipe = settings(tmp_path / "run", tiny_path, steps=9, evaluate_every=5, keep=keep, learning_rate=1e-2)
    result = train_sft(recipe, collection=collection, callbacks=[Asks, diary])
    saves = [entry[1] for entry in diary.entries if entry[0] == "save"]
    assert saves == ["step-000001", "step-000002"], "the second is that of save_every"
    assert [row["step"] for row in result.log_history] == [1, 2]
    assert diary.entries[-1] == ("end", True)
    one, two = load_file(result.model_path / "model.safetensors"), load_file(tiny_path / "model.safetensors")
    assert any(not torch.equal(one[name], two[name]) for name in two if one[name].shape == two[name].shape)


def test_a_stop_that_another_process_asks_for_holds_for_this_one(
    tmp_path: Path, tiny_path: Path, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(self: Communicator, value: Any) -> list[Any]:
        return [value, (True, False)] if isinstance(value, tuple) else [value]

    monkeypatch.setattr(Communicator, "all_gather", gather)
    result = train_sft(settings(tmp_path / "run", tiny_path), collection=collection)
    assert [row["step"] for row in result.log_history] == [1]


def test_what_a_callback_raises_ends_the_training_and_leaves_the_checkpoint(
    tmp_path: Path, tiny_path: Path, collection: Collection
) -> None:
    recipe = settings(tmp_path / "run", tiny_path, steps=4)
    with pytest.raises(Stop):
        train_sft(recipe, collection=collection, callbacks=[StopAt(3)])
    with pytest.raises(ConfigError, match="holds the stage 'sft' already; add --resume"):
        train_sft(recipe, collection=collection)
    diary = Diary()
    result = train_sft(recipe, collection=collection, callbacks=[diary], resume=True)
    assert ("step", 3) in diary.entries and ("step", 2) not in diary.entries, "it goes on after step 2"
    assert [row["step"] for row in result.log_history] == [1, 2, 3, 4]


def test_a_given_collection_is_trained_as_one_that_is_named(
    tmp_path: Path, tiny_path: Path, collection: Collection, collection_path: Path
) -> None:
    given = train_sft(settings(tmp_path / "given", tiny_path), collection=collection)
    named = Recipe(
        run_dir="nowhere", base="nothing", collection=str(collection_path), max_length=120, max_new_tokens=16,
        sft=SFTSettings(steps=3, batch_size=4, splits={"train": 1.0}),
    )  # fmt: skip
    read = train_sft(named, run_dir=tmp_path / "named", model=tiny_path)
    one, two = (load_file(result.model_path / "model.safetensors") for result in (given, read))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert given.recipe.sft.splits == {"train": 1.0} and given.recipe.grpo.splits == ("train",)
    assert read.recipe.run_dir == str(tmp_path / "named") and read.recipe.base == str(tiny_path)
    kept = replace(collection, qrels={**collection.qrels, "rl": collection.qrels["dev"]})
    divided = train_sft(settings(tmp_path / "divided", tiny_path), collection=kept).recipe
    assert divided.sft.splits == {"train": 1.0} and divided.grpo.splits == ("rl",), "stage 2 has its own queries"


def test_a_run_does_not_go_on_with_another_collection(tmp_path: Path, tiny_path: Path, collection: Collection) -> None:
    recipe = settings(tmp_path / "run", tiny_path, splits={"train": 0.5, "dev": 0.5})
    result = train_sft(recipe, collection=collection)
    assert result.recipe.sft.splits == {"train": 0.5, "dev": 0.5}, "what the recipe sets stays"
    query = collection.queries["q00"]
    traced = {**collection.queries, "q00": replace(query, metadata={"reasoning": "Another."})}
    for other in (replace(collection, queries=traced), replace(collection, qrels={"train": {"q00": {"d00": 1}}})):
        with pytest.raises(ConfigError, match=r"cannot resume: collection is 'small \(given from Python, "):
            train_sft(recipe, collection=other, resume=True)


def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"unknown setting 'sft.step'; did you mean 'steps'"):
        train_sft({"sft": {"step": 3}}, run_dir=folder)
    with pytest.raises(ConfigError, match=r"cannot read the recipe nowhere.yaml"):
        train_sft("nowhere.yaml", run_dir=folder)
    with pytest.raises(ConfigError, match=r"callbacks: .* is no transformers.TrainerCallback; derive it"):
        train_sft(run_dir=folder, callbacks=[print])
    with pytest.raises(ConfigError, match=r"callbacks: .* is no list of callbacks; give \[Diary\(...\)\]"):
        train_sft(run_dir=folder, callbacks=Diary())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"collection: expected a Collection, found str; give load_collection"):
        train_sft(run_dir=folder, collection="atlas")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"model: expected a path or a name, found Diary"):
        train_sft(run_dir=folder, model=Diary())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"model: expected a path or a name, found Diary"):
        train_grpo(run_dir=folder, model=Diary())  # type: ignore[arg-type]
    assert not folder.exists()
