"""The command that samples reasoning and keeps the best for stage 1, or trains stage 1 on it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from .. import console
from ..errors import ConfigError
from .common import (
    CollectionOption,
    ManyValues,
    ModelArgument,
    ModelOptions,
    NewFolder,
    Overrides,
    RecipeOption,
    Resume,
    app,
    check_new,
    load_encoder,
    load_settings,
    takes_model_options,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..config import Recipe
    from ..data.collection import Collection
    from ..training.best_of_n import BestOfNReport, BestOfNSettings

Splits = Annotated[list[str] | None, typer.Option("--splits", help="Splits whose queries are meant; `rl` by default.")]
_OF_SAMPLING = ("collection=", "evaluation.dev_split=", "evaluation.test_split=")
"""Settings that sampling reads, too."""


@app.command(cls=ManyValues)
@takes_model_options
def best_of_n(
    model: ModelArgument,
    out: NewFolder,
    options: ModelOptions,
    overrides: Overrides = None,
    collection: CollectionOption = None,
    splits: Splits = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="Replies to each query.")] = 8,
    temperature: Annotated[float, typer.Option(min=0, help="Of the sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling, and of what --limit draws.")] = 0,
    min_ndcg: Annotated[float, typer.Option(min=0, max=1, help="nDCG@10 that a winner reaches; 0 keeps all.")] = 0.5,
    above_direct: Annotated[
        bool, typer.Option("--above-direct", help="Keep only winners that rank better than direct mode does.")
    ] = False,
    accept_ended: Annotated[
        bool, typer.Option("--accept-ended", help="Replies that end their turn without the embed token can win.")
    ] = False,
    style: Annotated[str, typer.Option(help="Name of the traces; see sft.reasoning_styles.")] = "own",
    drop_old: Annotated[bool, typer.Option("--replace", help="Drop the traces that winners' queries have.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Size of a random sample of the queries.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Replies decoded at once; changes results by rounding.")] = 128,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds of sampling and stage 1 on the winners; 0: none.")] = 0,
    recipe: RecipeOption = None,
    resume: Resume = False,
) -> None:
    """Sample n replies to each query, and keep the one whose vector ranks best as a trace for stage 1.

    OUT is a collection for `search-r3 sft`; after a kill the same command goes on. With --rounds it holds a run for
    each round, trained from the model that sampled; recipe and overrides are for these.

    Example: search-r3 best-of-n runs/quickstart/sft/model own --collection atlas --splits rl -n 8
    """
    from ..data.load import load_collection
    from ..data.triples import hold_out
    from ..training.best_of_n import BestOfNSettings as Settings

    settings = Settings(
        samples, temperature, seed, style, min_ndcg, above_direct, accept_ended, drop_old, limit, batch_size
    )
    if not rounds and (unused := [one for one in overrides or [] if not one.startswith(_OF_SAMPLING)]):
        raise ConfigError(f"{unused[0]} is a setting of stage 1, which only --rounds trains; give it to search-r3 sft")
    if rounds and out.exists() and not resume:
        raise ConfigError(f"{out} exists; add --resume to go on with its rounds, or choose another")
    if not rounds:
        check_new(out)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("best-of-n samples in one process; launch search-r3 sft on what it writes with several")
    training, names = load_settings(recipe, overrides), splits or ["rl"]
    data = hold_out(load_collection(collection or training.collection), names, training.evaluation.held_out)
    if rounds:
        _train(training, model, data, out, settings, rounds, names, resume, options)
    else:
        _sample(model, data, out, settings, names, options)


def _sample(
    model: str, data: Collection, out: Path, settings: BestOfNSettings, splits: Sequence[str], options: ModelOptions
) -> None:
    """One sampling."""
    from ..training.best_of_n import best_of_n as sample

    encoder = load_encoder(model, options)
    with console.watching() as watch:
        _show(sample(encoder, data, out, settings, cache=out.parent / f"{out.name}.cache", splits=splits, watch=watch))


def _train(
    recipe: Recipe,
    model: str,
    data: Collection,
    out: Path,
    settings: BestOfNSettings,
    rounds: int,
    splits: Sequence[str],
    resume: bool,
    options: ModelOptions,
) -> None:
    """Rounds of sampling and stage 1."""
    from ..training.best_of_n import train_best_of_n

    path = train_best_of_n(
        *(recipe, model, data, out, settings),
        rounds=rounds,
        splits=splits,
        resume=resume,
        load=lambda source: load_encoder(source, options),
        note=_show,
        watching=console.watching,
        live=console.live,
    )
    console.say(f"model: {path}")


def _show(report: BestOfNReport) -> None:
    """Say what a round of sampling gave."""
    left_out = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in report.left_out.items())
    console.say(f"{report.kept:,} of {report.queries:,} queries have a winner; left out: {left_out or 'none'}")
    console.say(
        f"nDCG@10: direct {report.ndcg_direct:.3f}, first reply {report.ndcg_first:.3f}, mean of all "
        f"{report.ndcg_mean:.3f}, best of {report.settings['samples']} {report.ndcg_best:.3f}"
    )
    console.say(
        f"reasoning tokens: first reply {report.tokens_first:.1f}, winners {report.tokens_kept:.1f}; embed token "
        f"forced in {report.forced_share:.1%} of the replies"
    )
