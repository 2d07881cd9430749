"""The command that looks at a model before stage 2."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from .. import console
from .common import (
    DEFAULT_COLLECTION,
    CollectionOption,
    ModelArgument,
    ModelOptions,
    Overrides,
    RecipeOption,
    app,
    load_encoder,
    load_settings,
    takes_model_options,
)


@app.command()
@takes_model_options
def probe(
    model: ModelArgument,
    options: ModelOptions,
    overrides: Overrides = None,
    collection: CollectionOption = None,
    recipe: RecipeOption = None,
    queries: Annotated[int, typer.Option(min=2, help="Queries looked at, spread over grpo.splits.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Say what RL would have to work with: rewards within groups, and whether what is written is read.

    Example: search-r3 probe runs/quickstart/sft/model --collection atlas grpo.group_size=8
    """
    from ..data.load import load_collection
    from ..training.probe import probe as look

    settings = load_settings(recipe, overrides)
    data = load_collection(collection or DEFAULT_COLLECTION)
    encoder = load_encoder(model, options)
    report = look(encoder, data, settings, queries, (lambda text: None) if as_json else console.say)
    if as_json:
        console.say(json.dumps(asdict(report)))
    else:
        console.show_probe(report)
