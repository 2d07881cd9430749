"""What the commands share: the application, options, and how a model is loaded for them."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer
from typer.core import TyperCommand, TyperOption

from .. import console
from ..errors import ConfigError, ModelError

if TYPE_CHECKING:
    from ..config import Recipe
    from ..data.collection import Collection
    from ..model.encoder import SearchR3
    from ..model.prompts import Mode

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Search-R3: a language model reasons about a query, then embeds it. Train, evaluate, search.",
)
data_app = typer.Typer(no_args_is_help=True, help="Make collections: for tests, and for training.")
app.add_typer(data_app, name="data", rich_help_panel="Train")

RecipeOption = Annotated[Path | None, typer.Option("--recipe", "-r", help="YAML recipe; without it, the defaults.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings as key=value, e.g. grpo.steps=10.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in run_dir.")]
DEFAULT_COLLECTION = "atlas"
CollectionOption = Annotated[
    str | None,
    typer.Option(
        "--collection",
        "-c",
        help=f"`atlas`, `atlas-wide`, `stdlib`, a folder, or a hub id; by default `{DEFAULT_COLLECTION}`.",
    ),
]
ModelArgument = Annotated[str, typer.Argument(help="Model directory, GGUF file, hub id, or `smol`.")]
NewFolder = Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")]
DocumentInstruction = Annotated[
    str, typer.Option("--document-instruction", help="Follows each document; the index knows it.")
]
IndexDType = Literal["float16", "float32"]
WeightDType = Literal["float16", "bfloat16", "float32"]


class ModeName(StrEnum):
    """`modes.MODES` as an enumeration, since typer takes no list of Literals."""

    direct = "direct"
    reason = "reason"
    latent = "latent"
    auto = "auto"


def _option(help_text: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel="Model", **limits)


@dataclass(frozen=True)
class ModelOptions:
    """The options of every command that loads a model; a command takes them by `takes_model_options`."""

    device: Annotated[str | None, _option("`cpu`, `cuda`, `mps`, ...; by default a GPU where there is one.")] = None
    dtype: Annotated[
        str, _option("Precision it computes in: `float32`, `bfloat16`, `float16`; `auto`: bfloat16 on CUDA.")
    ] = "auto"
    backend: Annotated[
        Literal["torch", "llama.cpp"],
        _option("What computes: `torch`, or `llama.cpp` with a file of `export --gguf`, for one query at a time."),
    ] = "torch"
    revision: Annotated[str | None, _option("Branch, tag or commit on the hub.")] = None
    prompts: Annotated[str | None, _option("Name of the prompt set; by default the model's own.")] = None
    max_length: Annotated[int | None, _option("Longest prompt in tokens, instead of the model's own limit.", min=8)] = (
        None
    )
    max_new_tokens: Annotated[int | None, _option("Reasoning budget in tokens, instead of the model's own.", min=1)] = (
        None
    )

    def loading(self) -> dict[str, Any]:
        """What of it `SearchR3` takes."""
        return {name: getattr(self, name) for name in _LOADING}


_LOADING = ("device", "dtype", "backend", "revision", "prompts", "max_length", "max_new_tokens")
Untrained = Annotated[bool, _option("Use a base that no stage has trained: its vectors mean nothing.", "--untrained")]


def takes_model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command whose function takes `options` the options of `ModelOptions`; Typer itself has no groups."""
    own = [
        parameter
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items()
        if name != "options"
    ]
    hints = get_type_hints(ModelOptions, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(ModelOptions)
    ]

    @functools.wraps(command)
    def with_options(**values: Any) -> None:
        command(options=ModelOptions(**{each.name: values.pop(each.name) for each in shared}), **values)

    with_options.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    return with_options


class ManyValues(TyperCommand):
    """A command whose options of several values take them in a row: `--modes direct reason`.

    Where it takes settings too, one of these (`sft.steps=10`) ends the row. Arguments that it cannot do without end the
    last row where they stand nowhere else: `--splits dev test MODEL`.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the name of such an option before each of its values."""
        options = [param for param in self.params if isinstance(param, TyperOption)]
        many = {name for param in options if param.multiple for name in param.opts}
        single = {name for param in options if not (param.multiple or param.is_flag) for name in param.opts}
        missing = sum(param.required for param in self.params if not isinstance(param, TyperOption))
        settings = _setting_names() if any(param.name == "overrides" for param in self.params) else frozenset()
        parts: list[tuple[str, list[str]]] = [("", [])]
        for arg in args:
            option, values = parts[-1]
            key, equals, _ = arg.partition("=")
            is_setting = bool(equals) and key.partition(".")[0] in settings
            if arg.startswith("-"):
                parts.append((arg, []))
            elif (option in many and not (values and is_setting)) or (option in single and not values):
                values.append(arg)
            else:
                parts.append(("", [arg]))
                missing -= not is_setting
        repeated: list[str] = []
        for option, values in reversed(parts):
            row = [option, *values] if option else values
            if option in many and values:
                size = max(1, len(values) - max(0, missing))
                row = [*(one for value in values[:size] for one in (option, value)), *values[size:]]
                missing = 0
            repeated[:0] = row
        return super().parse_args(ctx, repeated)


def _setting_names() -> frozenset[str]:
    from ..config import Recipe

    return frozenset(Recipe.model_fields)


def load_settings(recipe: Path | None, overrides: list[str] | None) -> Recipe:
    """The settings of a training."""
    from ..config import load_recipe

    settings = load_recipe(recipe, overrides or [])
    hush()
    return settings


def load_encoder(model: str, options: ModelOptions, untrained: bool = True) -> SearchR3:
    """A model to encode with.

    Raises:
        ModelError: it cannot be loaded; or no stage has trained it and this is not wanted.
    """
    from ..model.encoder import SearchR3
    from ..model.loading import load_backbone

    hush()
    if untrained:
        return SearchR3(model, **options.loading())
    backbone = load_backbone(model, **options.loading())
    if not backbone.trained:
        raise ModelError(
            f"{model} is a base that no stage has trained: its vectors mean nothing; train it "
            f"(search-r3 sft base={model}), or add --untrained"
        )
    return SearchR3(backbone)


def mode_of(encoder: SearchR3, mode: ModeName | None) -> Mode:
    """The mode that was asked for, or the model's own."""
    return encoder.backbone.settings.mode if mode is None else mode.value


def columns_of(options: list[str] | None) -> dict[str, list[str]]:
    """Field -> columns, of options `--column FIELD=COLUMN`."""
    names: dict[str, list[str]] = {}
    for one in options or ():
        field, sign, column = one.partition("=")
        if not sign:
            raise ConfigError(f"--column {one}: expected FIELD=COLUMN, for instance text=body")
        names.setdefault(field, []).append(column)
    return names


def say_without_text(count: int) -> None:
    """Say how many documents are left out."""
    if count:
        console.aside(f"{count:,} documents without any text are left out")


def say_left_out(collection: Collection) -> None:
    """Say what of a collection is left out, and what can't be found in it."""
    say_without_text(collection.without_text)
    for what, count in collection.dropped.items():
        console.aside(f"{count:,} {what} are left out")
    if absent := sum(map(collection.count_absent, collection.absent)):
        console.aside(f"{absent:,} judgements name documents that are not in the corpus")


def check_new(path: Path) -> None:
    """Refuse to write over something."""
    if path.exists():
        raise ConfigError(f"{path} exists; nothing is overwritten: remove it or choose another")


def hush() -> None:
    """Switch off transformers' own progress bars, which would tear ours, and accelerate's notes on tied weights.

    A download is still shown on a terminal: it is over before a bar of ours begins.
    """
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    downloads = sys.stderr.isatty() and not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # the hub's too
    if downloads:
        enable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
