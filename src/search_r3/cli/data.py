"""Commands that make collections: for tests, and of public data sets for training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .. import console
from ..errors import ConfigError
from .common import NewFolder, check_new, data_app


@data_app.command("build")
def data_build(
    name: Annotated[Literal["atlas", "atlas-wide", "stdlib"], typer.Argument(help="Which collection.")],
    out: NewFolder,
    seed: Annotated[int, typer.Option(help="Seed of the splits.")] = 0,
) -> None:
    """Build a collection into a folder in the BEIR layout."""
    from ..data.load import BUILDERS

    check_new(out)
    collection = BUILDERS[name](seed)
    collection.save(out)
    console.say(f"{out}: {len(collection.documents)} documents, {len(collection.queries)} queries")


@data_app.command("mix")
def data_mix(
    settings: Annotated[Path, typer.Argument(help="YAML file with the sources, e.g. recipes/data/paper.yaml.")],
    out: NewFolder,
) -> None:
    """Make training data from several data sets of the hub: one folder, one split for each of them.

    Example: search-r3 data mix recipes/data/paper.yaml paper-data
    """
    from ..data.mixing.mix import mix
    from ..data.mixing.mix_settings import load_mix

    check_new(out)
    mix_settings = load_mix(settings)
    with console.watching() as watch:
        reports = mix(mix_settings, out, watch)
    for name, report in reports.items():
        losses = "".join(f", {count:,} dropped: {reason}" for reason, count in report.dropped.items())
        console.say(f"{name}: {report.queries:,} queries ({report.dev:,} in dev) of {report.read:,} rows{losses}")
    total = sum(report.queries for report in reports.values())
    console.say(f"{out}: {total:,} queries; what became of each row: {out / 'mix.json'}")


@data_app.command(
    "synthesize", hidden=True, context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
)
def data_synthesize() -> None:
    """What `data triples --articles --per-query 0` does now."""
    raise ConfigError(
        "`data synthesize` is `data triples ARTICLES OUT --articles --per-query 0 --splits test` now; of its options "
        "only --queries has another name, --per-article"
    )
