"""The run directory: settings, metrics, rollouts and checkpoints on disk, and going on where a run stopped.

settings.yaml            the resolved recipe
metrics.jsonl            one object per step: stage, step, values (docs/metrics.md)
rollouts.jsonl           sampled rollouts with their reward parts
<stage>/checkpoints/     step-000050/ ..., the newest two
<stage>/model/           the stage's model
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..config import Recipe, dump_recipe, load_recipe
from ..errors import ConfigError, RunError
from ..files import atomic_directory, write_json, write_text

Observer = Callable[[str, int, int, dict[str, float]], None]
"""`(stage, step, steps, values)`: called after every step; the command line draws its live line from it."""

KEEP_CHECKPOINTS = 2


def silent(stage: str, step: int, steps: int, values: dict[str, float]) -> None:
    """The observer that shows nothing."""


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
        settings = self.folder / "settings.yaml"
        if settings.exists():
            _check_same(load_recipe(settings), recipe, settings)
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ConfigError(f"{self.folder} exists and holds no run; set run_dir=ANOTHER")
        else:
            write_text(settings, dump_recipe(recipe))

    def claim(self, stage: str, resume: bool) -> None:
        """Make sure that work on a stage may begin.

        Raises:
            ConfigError: the stage has begun already and `resume` is off.
        """
        if not resume and (self.finished(stage) or self.metrics(stage)):
            raise ConfigError(
                f"{self.folder} holds the stage {stage!r} already; add --resume to go on, or set run_dir=ANOTHER"
            )

    @property
    def metrics_path(self) -> Path:
        """`metrics.jsonl`."""
        return self.folder / "metrics.jsonl"

    @property
    def rollouts_path(self) -> Path:
        """`rollouts.jsonl`."""
        return self.folder / "rollouts.jsonl"

    def model_path(self, stage: str) -> Path:
        """The model directory of a stage; the last stage's model is `model/` itself."""
        return self.folder / "model" if stage == "grpo" else self.folder / stage / "model"

    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Append one line to `metrics.jsonl`.

        Raises:
            RunError: a value is NaN or infinite; training must not go on from there.
        """
        for name, value in values.items():
            if not math.isfinite(value):
                raise RunError(
                    f"{name} is {value} at step {step} of {stage}; the last checkpoint is intact: lower "
                    f"{stage}.learning_rate and start again, or look at the batch of that step"
                )
        _append(self.metrics_path, [{"stage": stage, "step": step, **values}])

    def log_rollouts(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows to `rollouts.jsonl`."""
        _append(self.rollouts_path, rows)

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """The lines of one stage so far."""
        return [row for row in _rows(self.metrics_path) if row["stage"] == stage]

    def save_checkpoint(self, stage: str, step: int, accelerator: Any, save_extra: Callable[[Path], None]) -> None:
        """Write weights, optimizer, schedule, random states and what `save_extra` adds; keep the newest two."""
        with atomic_directory(self._checkpoints(stage) / f"step-{step:06d}") as out:
            accelerator.save_state(str(out))
            save_extra(out)
            write_json(out / "checkpoint.json", {"stage": stage, "step": step})
        for old in self._saved(stage)[:-KEEP_CHECKPOINTS]:
            shutil.rmtree(old)

    def restore(self, stage: str, accelerator: Any) -> tuple[int, Path | None]:
        """Load the newest checkpoint of a stage; lines logged after it are dropped.

        Returns:
            The step that the weights stand at (0 without a checkpoint) and the checkpoint's directory.
        """
        saved = self._saved(stage)
        step = int(saved[-1].name.removeprefix("step-")) if saved else 0
        if saved:
            accelerator.load_state(str(saved[-1]))
        for path in (self.metrics_path, self.rollouts_path):
            if path.exists():
                kept = [row for row in _rows(path) if row["stage"] != stage or (saved and row["step"] <= step)]
                write_text(path, "".join(_line(row) for row in kept))
        return step, saved[-1] if saved else None

    def finish(self, stage: str, save_model: Callable[[Path], None]) -> None:
        """Write the stage's model; its checkpoints are then no longer needed."""
        save_model(self.model_path(stage))
        shutil.rmtree(self._checkpoints(stage), ignore_errors=True)

    def finished(self, stage: str) -> bool:
        """Whether the stage's model has been written."""
        return (self.model_path(stage) / "config.json").exists()

    def _checkpoints(self, stage: str) -> Path:
        return self.folder / stage / "checkpoints"

    def _saved(self, stage: str) -> list[Path]:
        return sorted(path.parent for path in self._checkpoints(stage).glob("step-*/checkpoint.json"))


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; a last line that a killed process left unfinished is not one of them."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(_line(row) for row in rows)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _check_same(saved: Recipe, given: Recipe, path: Path) -> None:
    old, new = _flat(saved.model_dump()), _flat(given.model_dump())
    for key, value in new.items():
        if key != "run_dir" and old[key] != value:
            raise ConfigError(
                f"cannot resume: {key} is {value!r} now but {old[key]!r} in {path}; use the same settings, "
                "or set run_dir=ANOTHER"
            )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{name}."))
        else:
            flat[name] = value
    return flat
