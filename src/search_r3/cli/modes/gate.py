"""The command that fits the gate of mode auto."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ... import console
from ...errors import ConfigError
from ..common import (
    CollectionOption,
    ManyValues,
    ModelArgument,
    ModelOptions,
    app,
    check_new,
    load_encoder,
    load_settings,
    say_left_out,
    takes_model_options,
)

if TYPE_CHECKING:
    from ...model.encoder import SearchR3
    from ...model.modes.gate import Gate

Price = Annotated[
    float | None,
    typer.Option(min=0, help="What a token must earn (nDCG@10); by default half of what it earns on average."),
]
Splits = Annotated[
    list[str] | None,
    typer.Option("--splits", help="Queries to learn from, best untrained, not of dev or test; `train` by default."),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option("--recipe", "-r", help="YAML recipe: its collection, and evaluation's dev_split and test_split."),
]


@app.command(cls=ManyValues)
@takes_model_options
def gate(
    model: ModelArgument,
    options: ModelOptions,
    collection: CollectionOption = None,
    splits: Splits = None,
    price: Price = None,
    measure: Annotated[str, typer.Option(help="What the price and the labels are counted in.")] = "ndcg@10",
    limit: Annotated[int | None, typer.Option(min=1, help="Size of a random sample of the queries.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the sample and of the folds.")] = 0,
    recipe: RecipeFile = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Queries reasoned about at once.")] = 128,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the model with its gate; by default it goes into MODEL.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON, and nothing else.")] = False,
) -> None:
    """Fit the gate of mode auto: which queries are worth their reasoning, from the direct vector and its best scores.

    Example: search-r3 gate runs/quickstart/model --collection atlas --splits rl
    """
    from ...data.load import load_collection
    from ...model.modes.first import decides
    from ...training.modes.gate import fit_gate, label_queries

    if out is not None:
        check_new(out)
    settings = load_settings(recipe, None)
    encoder = load_encoder(model, options)
    if encoder.backbone.engine == "llama.cpp":
        raise ConfigError("llama.cpp's files hold no gate; leave --backend out, and give --out for a model folder")
    if decides(encoder.backbone):
        raise ConfigError(f"{model} decides itself which queries think, and takes no gate; fit one to another model")
    if out is None:
        _check_writable(model, encoder)
    data = load_collection(collection or settings.collection, skip_empty_documents=True)
    if not as_json:
        say_left_out(data)
    with console.watching() as watch:
        labelled = label_queries(
            *(encoder, data, splits or ["train"]),
            held_out=settings.evaluation.held_out,
            measure_name=measure,
            limit=limit,
            seed=seed,
            batch_size=batch_size,
            watch=watch,
        )
    fitted = fit_gate(encoder, labelled, price, seed)
    if out is None:
        fitted.save(Path(model).expanduser())
    else:
        encoder.backbone.gate = fitted
        encoder.save_pretrained(out)
    if as_json:
        console.print_rows([fitted.model_dump(mode="json", include={"price", "measure", "fitted"})])
        return
    _show(fitted)
    where = out or model
    console.say(f"gate: {where}/gate.json; use it: search-r3 search {where} --mode auto")


def _check_writable(model: str, encoder: SearchR3) -> None:
    """Refuse a model that is no directory of the user's, before anything is computed."""
    files = encoder.backbone.files
    if files is None or files.commit is not None or files.gguf is not None or not Path(model).expanduser().is_dir():
        raise ConfigError(f"{model} is no directory that a gate could be written into; give --out")


def _show(gate: Gate) -> None:
    """The report of a fit."""
    facts = gate.fitted
    console.say(
        f"{facts['queries']:,} queries: {gate.measure} direct {facts['direct']:.3f}, reason {facts['reason']:.3f} with "
        f"{gate.tokens:.1f} tokens; at {gate.price:.3g} a token reasoning pays for {facts['pays']:.0%}"
    )
    for name, what in (("by_scores", "vector and scores"), ("by_vector", "vector alone")):
        one = facts[name]
        console.say(
            f"{what}: AUC {one['auc']:.3f}, Brier {one['brier']:.3f} (of the mean {one['brier_of_mean']:.3f}); on "
            f"queries that a fold has not seen {_kept(one)}"
        )
    bins = [
        [
            f"{one['low']:.1f} to {one['high']:.1f}",
            str(one["count"]),
            f"{one['predicted']:.2f}",
            f"{one['observed']:.2f}",
        ]
        for one in facts["by_scores"]["bins"]
    ]
    console.show_grid(["probability", "queries", "said", "true"], bins, "calibration, vector and scores")
    rows = [
        [f"{one['price']:.3g}", *(_percent(one[key]) for key in ("share", "token_share", "gain_share"))]
        for one in facts["by_scores"]["prices"]
    ]
    console.show_grid(["price of a token", "thinks", "of the tokens", "of the gain"], rows, "at other prices")


def _kept(row: dict[str, float | None]) -> str:
    share, tokens, gain = (_percent(row[key]) for key in ("share", "token_share", "gain_share"))
    return f"{share} think, with {tokens} of the tokens and {gain} of the gain; worth {row['utility']:+.4f} a query"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
