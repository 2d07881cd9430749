"""The run directory: settings, metrics, rollouts and checkpoints on disk, and going on where a run stopped.

settings.yaml            the resolved recipe
metrics.jsonl            one object per step: stage, step, values (docs/metrics.md)
rollouts.jsonl           sampled rollouts with their reward parts
<stage>/checkpoints/     step-000050/ ..., the newest two; with keep=best best-000040/, the best model
<stage>/model/           the stage's model
<stage>/begun-from.json  the model that the stage learns from
<stage>/adapter/         with lora.rank above 0: the adapters alone, as peft writes them; none with frozen documents,
                         whose model holds them by themselves

Of several processes the first one writes; the folder is on a disk that all of them see.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import OutOfMemoryError

from ..config import Recipe, dump_recipe, load_recipe
from ..errors import ConfigError, RunError
from ..files import (
    find_damage,
    jsonl_line,
    leftovers,
    read_log,
    remove_leftovers,
    write_json,
    write_manifest,
    write_text,
)
from ..loader import flat_settings
from ..model.backbone import Backbone
from ..parallel import agree, first_process, is_of_a_collective
from .engine import Engine, deepspeed_plugin

logger = logging.getLogger(__name__)

KEEP_CHECKPOINTS = 2
MANIFEST = "checkpoint.json"


class Run:
    """One run directory, made on first use.

    Args:
        recipe: the resolved settings; `recipe.run_dir` is the directory.

    Raises:
        ConfigError: the directory holds a run with other settings, or something that is no run.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.folder = Path(recipe.run_dir)
        self.metrics_path, self.rollouts_path = self.folder / "metrics.jsonl", self.folder / "rollouts.jsonl"
        self.first = first_process()
        settings = self.folder / "settings.yaml"
        # Settings alone are those of a call that failed before it began: the mended call takes their place.
        if settings.exists() and not _only_leftovers(self.folder, settings):
            _check_same(load_recipe(settings), recipe, settings)
        elif not self.first:
            return  # the first process is about to make it
        elif self.folder.exists() and not _only_leftovers(self.folder, settings):
            raise ConfigError(f"{self.folder} exists and holds no run; set run_dir=ANOTHER")
        else:
            remove_leftovers(settings)
            write_text(settings, dump_recipe(recipe))

    def claim(self, stage: str, resume: bool) -> None:
        """Make sure that work on a stage may begin.

        Raises:
            ConfigError: the stage has begun already and `resume` is off.
        """
        if not self.first:
            return
        if not resume and (self.finished(stage) or self.metrics(stage)):
            raise ConfigError(
                f"{self.folder} holds the stage {stage!r} already; add --resume to go on, or set run_dir=ANOTHER"
            )
        if self.finished(stage):  # by a process that was killed before it had removed them
            shutil.rmtree(self.checkpoints_path(stage), ignore_errors=True)

    def model_path(self, stage: str) -> Path:
        """The model directory of a stage; the last stage's model is `model/` itself."""
        return self.folder / "model" if stage == "grpo" else self.folder / stage / "model"

    def adapter_path(self, stage: str) -> Path:
        """The directory of a stage's adapters."""
        return self.folder / stage / "adapter"

    def checkpoints_path(self, stage: str) -> Path:
        """The directory of a stage's checkpoints; it is gone when the stage is finished."""
        return self.folder / stage / "checkpoints"

    def checkpoint_steps(self, stage: str) -> list[int]:
        """The steps of a stage's checkpoints, ascending."""
        return [int(path.name.removeprefix("step-")) for path in self._saved(stage)]

    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Append one line to `metrics.jsonl`.

        Raises:
            RunError: a value is NaN or infinite, or the disk is full.
        """
        for name, value in values.items():
            if not math.isfinite(value):
                raise RunError(
                    f"{name} is {value} at step {step} of {stage}; the last checkpoint is intact: lower "
                    f"{stage}.learning_rate and start again, or look at the batch of that step"
                )
        self._append(self.metrics_path, [{"stage": stage, "step": step, **values}])

    def log_rollouts(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows to `rollouts.jsonl`.

        Raises:
            RunError: the disk is full.
        """
        self._append(self.rollouts_path, rows)

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """The lines of one stage so far."""
        return [row for row in read_log(self.metrics_path) if row["stage"] == stage]

    def save_checkpoint(
        self, stage: str, step: int, engine: Engine, save_extra: Callable[[Path], None] = lambda folder: None
    ) -> None:
        """Write weights, optimizer, schedule, random states and what `save_extra` adds in each process; keep two.

        Every process takes part.

        Raises:
            RunError: it could not be written; the checkpoints before it are as they were.
        """
        target = self.checkpoints_path(stage) / f"step-{step:06d}"
        if engine.communicator.all_gather(self.first and target.exists() and find_damage(target, MANIFEST) is None)[0]:
            return
        scratch = target.with_name(f".{target.name}.partial")
        try:
            agree(engine.communicator, target, lambda: self._begin(scratch))
            agree(engine.communicator, target, lambda: engine.accelerator.save_state(str(scratch)))
            agree(engine.communicator, target, lambda: save_extra(scratch))
            agree(engine.communicator, target, lambda: self._complete(scratch, target, stage, step))
        except RunError:
            if self.first:
                shutil.rmtree(scratch, ignore_errors=True)
            raise

    def _begin(self, scratch: Path) -> None:
        if self.first:
            for leftover in scratch.parent.glob(".step-*"):  # by a process that was killed while it saved
                shutil.rmtree(leftover)
            scratch.mkdir(parents=True)

    def _complete(self, scratch: Path, target: Path, stage: str, step: int) -> None:
        if not self.first:
            return
        write_manifest(scratch, MANIFEST, stage=stage, step=step)
        if target.exists():
            _discard(target)  # it is broken
        scratch.replace(target)
        for old in self._saved(stage)[:-KEEP_CHECKPOINTS]:
            _discard(old)

    def begin_from(self, stage: str, backbone: Backbone, collection: str) -> None:
        """Remember which model a stage learns from, and what; a run that goes on must begin from the same.

        Args:
            stage: its name.
            backbone: the model.
            collection: digest of the documents, queries and judgements.

        Raises:
            ConfigError: they are others.
        """
        path = self.folder / stage / "begun-from.json"
        revision, source = backbone.revision, backbone.source
        if path.exists() and self._saved(stage):
            origin = json.loads(path.read_text(encoding="utf-8"))
            if origin["revision"] != revision:
                raise ConfigError(
                    f"cannot resume: the stage {stage!r} learns from {source} now, but it began from another model "
                    f"({origin['source']}, see {path}); give that one, or set run_dir=ANOTHER"
                )
            if origin.get("collection", collection) != collection:
                raise ConfigError(
                    f"cannot resume: the collection has other documents, queries, traces or judgements than those that "
                    f"the stage {stage!r} began with; bring them back, or set run_dir=ANOTHER"
                )
        remove_leftovers(path)
        write_json(path, {"revision": revision, "source": source, "collection": collection})

    def restore(self, stage: str, engine: Engine) -> tuple[int, Path | None]:
        """Load the newest whole checkpoint of a stage; lines logged after it are dropped.

        A checkpoint whose files are not those that were written is passed over, with a warning, for the one before it.

        Returns:
            The step that the weights stand at (0 without a checkpoint) and the checkpoint's directory.

        Raises:
            RunError: there are checkpoints, and all are broken or the newest is of another version; or the logs cannot
                be read or written.
        """
        newest = agree(engine.communicator, self.folder, lambda: self._newest_whole(stage) if self.first else None)
        checkpoint = engine.communicator.all_gather(newest)[0]
        if checkpoint is not None:
            agree(engine.communicator, checkpoint, lambda: self._load(checkpoint, engine), "read")
        step = 0 if checkpoint is None else int(checkpoint.name.removeprefix("step-"))
        agree(engine.communicator, self.folder, lambda: self._drop_later(stage, step) if self.first else None)
        return step, checkpoint

    def _load(self, checkpoint: Path, engine: Engine) -> None:
        # With adapters only what learns was saved; the rest is in the model that they were put into.
        partial = self.recipe.lora.rank > 0 and deepspeed_plugin(engine.accelerator) is None  # it saves all
        try:
            engine.accelerator.load_state(str(checkpoint), **({"strict": False} if partial else {}))
        except (ValueError, RuntimeError, KeyError) as error:  # as torch says that a state does not fit
            if isinstance(error, RuntimeError) and (is_of_a_collective(error) or isinstance(error, OutOfMemoryError)):
                raise  # the checkpoint may well fit
            raise RunError(
                f"{checkpoint} does not fit this training ({str(error).splitlines()[0]}): another version of "
                f"search-r3 wrote it; go on with that one, or remove {checkpoint.parent} and the stage begins anew"
            ) from error

    def _drop_later(self, stage: str, step: int) -> None:
        for path in (self.metrics_path, self.rollouts_path):
            if path.exists():
                rows = [row for row in read_log(path) if row["stage"] != stage or (step and row["step"] <= step)]
                with _explained(path):
                    write_text(path, "".join(map(jsonl_line, rows)))

    def _newest_whole(self, stage: str) -> Path | None:
        """Removes what killed processes had begun to write, too: nobody else is at the directory of a run."""
        for target in (self.model_path(stage), self.adapter_path(stage), self.metrics_path, self.rollouts_path):
            remove_leftovers(target)
        for leftover in self.checkpoints_path(stage).glob(".step-*"):
            shutil.rmtree(leftover)
        checkpoints = self._saved(stage)
        damages: list[str] = []
        for checkpoint in reversed(checkpoints):
            fault = find_damage(checkpoint, MANIFEST)
            if fault is None:
                if damages:
                    logger.warning("broken: %s; the checkpoint before, %s, is used", ", ".join(damages), checkpoint)
                return checkpoint
            damages.append(f"the checkpoint {checkpoint} ({fault})")
        if checkpoints:
            raise RunError(
                f"every checkpoint is broken: {', '.join(damages)}; remove {checkpoints[0].parent} and go on with "
                f"--resume: the stage {stage!r} then begins anew"
            )
        return None

    def finish(self, stage: str, engine: Engine, save_model: Callable[[Path], None]) -> None:
        """Write the stage's model; its checkpoints are then no longer needed. Every process takes part.

        Raises:
            RunError: it could not be written; the checkpoints are as they were.
        """
        path = self.model_path(stage)
        agree(engine.communicator, path, lambda: save_model(path))
        if self.first:
            shutil.rmtree(self.checkpoints_path(stage), ignore_errors=True)

    def finished(self, stage: str) -> bool:
        """Whether the stage's model has been written."""
        return (self.model_path(stage) / "config.json").exists()

    def _saved(self, stage: str) -> list[Path]:
        return sorted(self.checkpoints_path(stage).glob("step-*"))

    def _append(self, path: Path, rows: Iterable[dict[str, Any]]) -> None:
        if not self.first:
            return
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.writelines(map(jsonl_line, rows))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Around the writing of a log."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror}; the checkpoints are intact: make room, then go on with --resume"
        ) from error


def _discard(checkpoint: Path) -> None:
    """Remove a checkpoint: a half-removed one is never seen."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    checkpoint.replace(hidden)
    shutil.rmtree(hidden)


def _only_leftovers(folder: Path, settings: Path) -> bool:
    """Whether a folder holds nothing but settings, or what a killed process had begun to write of them."""
    return folder.is_dir() and set(folder.iterdir()) <= {settings, *leftovers(settings)}


def _check_same(before: Recipe, now: Recipe, path: Path) -> None:
    if now.prompts is None and before.prompts == "search-r3":  # one and the same; version 0.1 wrote the name
        before = before.model_copy(update={"prompts": None})
    old, new = flat_settings(before.model_dump()), flat_settings(now.model_dump())
    for key in new | old:
        if key != "run_dir" and old.get(key) != new.get(key):
            raise ConfigError(
                f"cannot resume: {key} is {new.get(key)!r} now but {old.get(key)!r} in {path}; use the same settings, "
                "or set run_dir=ANOTHER"
            )
