"""Metrics beside `metrics.jsonl`: TensorBoard, Weights & Biases and trackio, through accelerate."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from ..config import Recipe
from ..errors import ConfigError
from ..loader import flat_settings


def check_trackers(recipe: Recipe) -> None:
    """Make sure that the recipe's trackers are installed.

    Raises:
        ConfigError: a tracker's package is not installed.
    """
    for name in recipe.trackers:  # as their packages are called
        if find_spec(name) is None:
            raise ConfigError(
                f"trackers={list(recipe.trackers)}: the package {name} is not installed; pip install {name}, or leave "
                "it out"
            )


def start_trackers(accelerator: Any, recipe: Recipe, stage: str) -> None:
    """Open a run of the project `search-r3` in each of the recipe's trackers, with all settings."""
    if not recipe.trackers:
        return
    settings = {
        key: value if isinstance(value, int | float | str) else str(value)
        for key, value in flat_settings(recipe.model_dump(mode="json")).items()
    }
    named = {tracker: {"name": f"{recipe.name}-{stage}"} for tracker in recipe.trackers if tracker != "tensorboard"}
    accelerator.init_trackers("search-r3", config=settings, init_kwargs=named)
