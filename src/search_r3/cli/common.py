"""What the commands share: the application, options, and how a model is loaded for them."""

from __future__ import annotations

import logging
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperOption

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..config import Recipe
    from ..model.encoder import SearchR3

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Search-R3: a language model reasons about a query, then embeds it. Train, evaluate, search.",
)
data_app = typer.Typer(no_args_is_help=True, help="Make collections: for tests, and for training.")
app.add_typer(data_app, name="data")

RecipeOption = Annotated[Path | None, typer.Option("--recipe", "-r", help="YAML recipe; without it, the defaults.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings as key=value, e.g. grpo.steps=10.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in run_dir.")]
CollectionOption = Annotated[
    str, typer.Option("--collection", "-c", help="`atlas`, `atlas-wide`, `stdlib`, a folder, or a hub id.")
]
ModelArgument = Annotated[str, typer.Argument(help="Model directory or hub id.")]
NewFolder = Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")]
DeviceOption = Annotated[str | None, typer.Option(help="`cpu`, `cuda`, ...; by default a GPU where there is one.")]
DocumentInstruction = Annotated[
    str, typer.Option("--document-instruction", help="Follows each document; the index knows it.")
]
IndexDType = Literal["float16", "float32"]
WeightDType = Literal["float16", "bfloat16", "float32"]


class ModeName(StrEnum):
    """The two ways to encode a query; an enumeration, since typer takes no list of Literals."""

    direct = "direct"
    reason = "reason"


class ManyValues(TyperCommand):
    """A command whose options of several values take them in a row: `--modes direct reason`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the name of such an option before each of its values."""
        many = {
            name: param
            for param in self.params
            if isinstance(param, TyperOption) and param.multiple
            for name in param.opts
        }
        repeated: list[str] = []
        current: str | None = None
        values = 0
        for arg in args:
            if arg.startswith("-"):
                current, values = (arg, 0) if arg in many else (None, 0)
                repeated.append(arg)
                continue
            if current is not None and values:
                repeated.append(current)
            repeated.append(arg)
            values += 1
        return super().parse_args(ctx, repeated)


def load_settings(recipe: Path | None, overrides: list[str] | None) -> Recipe:
    """The settings of a training."""
    from ..config import load_recipe

    settings = load_recipe(recipe, overrides or [])
    hush()
    return settings


def load_encoder(model: str, **options: Any) -> SearchR3:
    """A model to search with."""
    from ..model.encoder import SearchR3

    hush()
    return SearchR3(model, **options)


def check_new(path: Path) -> None:
    """Refuse to write over something."""
    if path.exists():
        raise ConfigError(f"{path} exists; nothing is overwritten: remove it or choose another")


def hush() -> None:
    """Switch off transformers' own progress bars, which would tear ours, and accelerate's notes on tied weights."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
