"""The edges of a training: what it is asked for, who is told of its steps, what it leaves.

Callbacks are those of transformers' `Trainer`: instances of `transformers.TrainerCallback`, told with the same
arguments. `args` is the recipe here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from ..config import Recipe, load_recipe
from ..data.collection import Collection
from ..data.load import load_collection
from ..errors import ConfigError
from ..loader import parse_settings
from ..model.encoder import SearchR3
from ..parallel import make_communicator
from .dev import Evaluations
from .engine import Engine
from .guard import Guard
from .run import Run

RecipeLike = Recipe | Mapping[str, Any] | str | os.PathLike[str] | None
"""A recipe, a mapping nested as a recipe file is, the path of such a file, or None for the defaults."""

PLACES = {"run_dir": "run_dir", "base": "model"}
"""Setting -> the argument that comes over it."""


@dataclass(frozen=True)
class TrainingResult:
    """What a training left.

    Attributes:
        model_path: the model directory; `SearchR3(result.model_path)` loads it.
        recipe: all settings that it ran with; `train_grpo(result.recipe)` goes on in the same run.
        log_history: the values of every step, as in `metrics.jsonl` (docs/metrics.md).
    """

    model_path: Path
    recipe: Recipe
    log_history: list[dict[str, Any]]

    @property
    def metrics(self) -> dict[str, Any]:
        """The values of the last step."""
        return self.log_history[-1] if self.log_history else {}


class Callbacks:
    """Those who are told of a training.

    Args:
        callbacks: instances or classes of `transformers.TrainerCallback`.
        args: the settings, which they get as `args`.
        stage: `sft`, `grpo`, `distill` or `base`; they get it as the keyword `stage`.

    Attributes:
        state: `global_step`, `max_steps`, `log_history`, `is_world_process_zero`, `is_local_process_zero` are kept.
        control: `should_training_stop` and `should_save` are obeyed.

    Raises:
        ConfigError: one is no callback.
    """

    def __init__(self, callbacks: Iterable[Any], args: Any, stage: str) -> None:
        if not isinstance(callbacks, Iterable):
            raise ConfigError(
                f"callbacks: {callbacks!r} is no list of callbacks; give [{type(callbacks).__name__}(...)]"
            )
        self.callbacks = [one() if isinstance(one, type) else one for one in callbacks]
        for one in self.callbacks:
            if not isinstance(one, TrainerCallback):
                raise ConfigError(
                    f"callbacks: {one!r} is no transformers.TrainerCallback; derive it from that class, and override "
                    "on_step_end, on_log, on_evaluate or on_save"
                )
        self.args = args
        self.state, self.control = TrainerState(), TrainerControl()
        self.keywords: dict[str, Any] = {"stage": stage}

    def tell(self, event: str, **keywords: Any) -> None:
        """Call one method of all; what it returns, if anything, is the new control."""
        for one in self.callbacks:
            answer = getattr(one, event)(self.args, self.state, self.control, **self.keywords, **keywords)
            self.control = self.control if answer is None else answer

    def step(self, step: int, values: dict[str, float]) -> None:
        """Tell of a step that is done; 0: of an evaluation before the first."""
        self.state.global_step, self.control.should_save = step, False
        if step:
            self.tell("on_step_end")
        self.state.log_history.append({**values, "step": step})
        self.tell("on_log", logs=values)
        if metrics := {name: value for name, value in values.items() if name.startswith("dev_")}:
            self.tell("on_evaluate", metrics=metrics)


class Session:
    """One call of `train_sft`, `train_grpo` or `train_distill`.

    Args:
        stage: `sft`, `grpo` or `distill`.
        recipe: the settings.
        collection: instead of the recipe's.
        callbacks: who is told.
        resume: whether to go on with a stage that has begun.
        places: settings that come over those of the recipe, where they are not None: `run_dir`, `base`.

    Attributes:
        recipe: all settings.
        run: its directory; the stage is claimed.
        evaluations: those so far, once the training has begun.
        stopped: whether it is to end: a callback of any process has asked for it, or patience has run out.

    Raises:
        ConfigError: a setting cannot be used, `collection` is no `Collection`, the run directory holds another run, or
            the stage has begun and `resume` is off.
    """

    def __init__(
        self,
        stage: str,
        recipe: RecipeLike,
        collection: Collection | None,
        callbacks: Iterable[Any],
        resume: bool,
        **places: str | os.PathLike[str] | None,
    ) -> None:
        make_communicator()  # from here on an error of one process ends all
        self.stage, self._collection = stage, collection
        self.recipe = resolve(recipe, places, collection)
        self._callbacks = Callbacks(callbacks, self.recipe, stage)
        self.run = Run(self.recipe)
        self.run.claim(stage, resume)

    def collection(self) -> Collection:
        """What is trained on."""
        return self._collection or load_collection(self.recipe.collection)

    def begin_from(self, model: SearchR3, collection: Collection) -> None:
        """Remember what the stage learns from; see `Run.begin_from`."""
        if self.run.first:
            self.run.begin_from(self.stage, model.backbone, _digest(collection))

    def begin(self, model: SearchR3, engine: Engine, guard: Guard, start: int) -> None:
        """Before the first step: callbacks are told; from here on they get the model as the keyword `model`."""
        self.evaluations = Evaluations(self.run, self.stage, self.recipe, engine, model, start)
        self._engine, self._guard = engine, guard
        state = self._callbacks.state
        state.global_step = start
        state.max_steps = self.recipe.stage(self.stage).steps
        state.log_history = self.run.metrics(self.stage)
        state.is_world_process_zero = self.run.first
        state.is_local_process_zero = engine.accelerator.is_local_main_process
        self._callbacks.keywords["model"] = model
        self.stopped = self.evaluations.stopped
        guard.on_save = self._saved
        self._callbacks.tell("on_train_begin")

    def _saved(self) -> None:
        step = self._callbacks.state.global_step
        self._callbacks.tell("on_save", checkpoint=self.run.checkpoints_path(self.stage) / f"step-{step:06d}")

    def evaluated(self, values: dict[str, float], step: int = 0) -> None:
        """The evaluation before the first step, or the end of another one: metrics are logged, callbacks are told.

        Raises:
            RunError: as `Evaluations.add`.
        """
        self.run.log(self.stage, step, values)
        self.evaluations.add(step, values)
        self._callbacks.step(step, values)

    def after(self, step: int, values: dict[str, float]) -> None:
        """The end of a step: it is logged, callbacks are told, then what is due, or what they asked for, is saved.

        Raises:
            RunError: as `Evaluations.add` and `Guard.after`.
            StoppedError: as `Guard.after`.
        """
        self._engine.track(self.stage, step, values)
        self.evaluated(values, step)
        control = self._callbacks.control
        wishes = self._engine.communicator.all_gather((control.should_training_stop, control.should_save))
        self.stopped = self.evaluations.stopped or any(stop for stop, _ in wishes)
        self._guard.after(step, any(save for _, save in wishes))

    def end(self) -> TrainingResult:
        """After the model was written, now or before: callbacks of this training are told; what it left."""
        if "model" in self._callbacks.keywords:
            self._callbacks.tell("on_train_end")
        return TrainingResult(self.run.model_path(self.stage), self.recipe, self.run.metrics(self.stage))


def check_place(name: str, value: object) -> None:
    """Refuse what is no path and no name, under the name of the argument that it was given as.

    Raises:
        ConfigError: as said.
    """
    if not isinstance(value, str | os.PathLike | None):
        raise ConfigError(f"{name}: expected a path or a name, found {type(value).__name__}")


def resolve(
    recipe: RecipeLike, places: Mapping[str, str | os.PathLike[str] | None], collection: Collection | None
) -> Recipe:
    """All settings of a call; see `Session`.

    Raises:
        ConfigError: one cannot be used, or `collection` is no `Collection`.
    """
    if recipe is None or isinstance(recipe, str | os.PathLike):
        recipe = load_recipe(None if recipe is None else Path(recipe))
    elif not isinstance(recipe, Recipe):
        recipe = parse_settings(Recipe, recipe)
    for name, value in places.items():
        check_place(PLACES[name], value)
    if not isinstance(collection, Collection | None):
        raise ConfigError(
            f"collection: expected a Collection, found {type(collection).__name__}; give load_collection(...) or "
            "read_pairs(...).collection, or name it in the recipe: {'collection': NAME}"
        )
    updates: dict[str, Any] = {name: os.fspath(value) for name, value in places.items() if value is not None}
    if collection is not None:
        updates["collection"] = f"{collection.name} (given from Python, {_digest(collection)[:16]})"
        if "train" in collection.qrels:
            if "splits" not in recipe.sft.model_fields_set:
                updates["sft"] = recipe.sft.model_copy(update={"splits": {"train": 1.0}})
            if "splits" not in recipe.grpo.model_fields_set and "rl" not in collection.qrels:
                updates["grpo"] = recipe.grpo.model_copy(update={"splits": ("train",)})
    return recipe.model_copy(update=updates)


def _digest(collection: Collection) -> str:
    """SHA-256 over all that training reads: the content, and traces and negatives in the queries' metadata."""
    digest = hashlib.sha256(collection.content_hash().encode())
    for query_id in sorted(collection.queries):
        metadata = dict(collection.queries[query_id].metadata)
        digest.update(json.dumps([query_id, metadata], sort_keys=True, default=str).encode())
    return digest.hexdigest()
