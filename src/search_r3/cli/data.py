"""Commands that make test collections."""

from __future__ import annotations

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


@data_app.command(
    "synthesize", hidden=True, context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
)
def data_synthesize() -> None:
    """What `data triples --articles --per-query 0` does now."""
    raise ConfigError(
        "`data synthesize` is `data triples ARTICLES OUT --articles --per-query 0 --splits test` now; of its options "
        "only --queries has another name, --per-article"
    )
