"""The command that makes a model of a user's own pairs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import console
from ..errors import ConfigError, ModelError
from ..parallel import first_process, make_communicator
from .common import Overrides, RecipeOption, Resume, app, columns_of, load_settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..config import Recipe
    from ..data.pairs import Pairs

RECORD = "pairs.json"
"""What the collection of a run was made of."""
FIXED = ("run_dir", "collection", "sft.splits", "grpo.splits")
"""Settings that this command sets."""
RL_SHARE = 0.3
"""Of the queries that are trained on, those that are kept for stage 2."""
PASSES, LEAST_STEPS, MOST_STEPS, BATCH = 3, 100, 2000, 32
"""Without a recipe stage 1 makes so many passes over the pairs, but not fewer or more steps than these."""
OF_A_REAL_BASE = (
    "max_length=512", "lora.rank=16", "lora.embed_row_rate=3.0", "embed_start=end_of_turn", "sft.learning_rate=2e-4",
    "grpo.learning_rate=1e-4",
)  # fmt: skip
"""Without a recipe, for other bases than the package's own: adapters, at a rate between those of `smol-sft.yaml` and of
`qwen2.5-1.5b-sft-lora.yaml`."""


@app.command()
def fit(
    pairs: Annotated[Path, typer.Argument(help="The file: .jsonl, .csv, .tsv or .parquet.")],
    out: Annotated[Path, typer.Option(help="Folder of the run: its collection, models and results.")],
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            "--column",
            help="Which column holds what, as FIELD=COLUMN; fields: query, document, negative, title, reasoning, id. "
            "By default usual names; repeat it.",
        ),
    ] = None,
    dev_share: Annotated[float, typer.Option(help="Share of the queries that is measured on, not trained.")] = 0.1,
    rl: Annotated[
        bool, typer.Option("--rl", help="Train stage 2, too: on 30 % of the queries, kept from stage 1.")
    ] = False,
    resume: Resume = False,
) -> None:
    """Train on pairs of queries and documents in one file, and measure on queries that were held out.

    Example: search-r3 fit pairs.jsonl --out runs/mine base=HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from ..data.pairs import read_pairs
    from ..model.source import find_files
    from ..training.grpo import train_grpo
    from ..training.sft import train_sft

    shares = {"dev_share": dev_share, "rl_share": RL_SHARE if rl else 0.0}
    data = read_pairs(pairs, columns=columns_of(column), **shares)
    settings = _settings(data, out, recipe, overrides or [], rl)
    _say_what_was_read(pairs, data)
    if settings.base == "builtin":
        console.say(
            "base: builtin, which knows little but atlas and shows that all runs; base=smol or another is a better one"
        )
    find_files(settings.base)  # a base that is not there fails first
    make_communicator()  # from here on an error of one process ends all
    _claim(settings, ("sft", "grpo") if rl else ("sft",), resume)
    _prepare(pairs, data, settings, shares)
    with console.live() as live:
        models = {"sft": train_sft(settings, callbacks=[live], resume=resume).model_path}
        if rl:
            models["rl"] = train_grpo(settings, callbacks=[live], resume=resume).model_path
    if first_process():
        _measure(settings, models)
        model, query = list(models.values())[-1], data.collection.queries[next(iter(data.collection.split("dev")))]
        console.show_next("search", str(model), "--documents", settings.collection, query.text)


def _settings(data: Pairs, out: Path, recipe: Path | None, overrides: list[str], rl: bool) -> Recipe:
    """The recipe's settings, or without one some that suit the number of the pairs and the base; then the overrides."""
    if fixed := [key for key in FIXED if any(one.partition("=")[0] == key for one in overrides)]:
        raise ConfigError(f"{fixed[0]} cannot be set here: `fit` trains on the file's own split in the folder of --out")
    queries = len(data.collection.split("train"))
    explored = len(data.collection.split("rl")) if rl else queries
    defaults: list[str] = []
    if recipe is None:
        steps = min(max(LEAST_STEPS, PASSES * queries // BATCH), MOST_STEPS)
        defaults = [
            *(f"name={json.dumps(out.name)}", "max_length=256", f"sft.steps={steps}", f"sft.batch_size={BATCH}"),
            *("sft.batching=homogeneous", "sft.random_negatives=0", f"grpo.queries_per_step={min(16, explored)}"),
        ]
        if load_settings(None, overrides).base != "builtin":
            defaults += OF_A_REAL_BASE
    settings = load_settings(recipe, [*defaults, *overrides])
    if rl and settings.grpo.queries_per_step > explored:
        raise ConfigError(
            f"grpo.queries_per_step={settings.grpo.queries_per_step}, but {explored} of the queries are kept for "
            "stage 2; lower it"
        )
    return settings.model_copy(
        update={
            "run_dir": str(out),
            "collection": str(out / "collection"),
            "sft": settings.sft.model_copy(update={"splits": {"train": 1.0}}),
            "grpo": settings.grpo.model_copy(update={"splits": ("rl" if rl else "train",)}),
        }
    )


def _claim(settings: Recipe, stages: Sequence[str], resume: bool) -> None:
    """Make sure that the folder may be written, before anything is."""
    from ..training.run import Run

    try:
        run = Run(settings)
        for stage in stages:
            run.claim(stage, resume)
    except ConfigError as error:
        raise ConfigError(str(error).replace("set run_dir=ANOTHER", "give another --out")) from error


def _say_what_was_read(path: Path, data: Pairs) -> None:
    columns = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in data.columns.items())
    console.say(f"{path}: {data.report.documents:,} rows ({columns})")
    for line in data.report.lines():
        console.say(f"not read: {line}")
    splits = ", ".join(f"{name} {len(qrels):,}" for name, qrels in data.collection.qrels.items())
    twice = f"; {data.duplicates:,} pairs stood there twice" if data.duplicates else ""
    console.say(f"{len(data.collection.documents):,} documents; queries: {splits}{twice}")


def _prepare(path: Path, data: Pairs, settings: Recipe, shares: Mapping[str, float]) -> None:
    """Write the collection, with hard negatives where the file has none; one of the processes does.

    Raises:
        ConfigError: the collection there was made of other pairs.
    """
    from ..files import hash_file, write_json

    folder, record_path = Path(settings.collection), Path(settings.run_dir) / RECORD
    columns = {name: list(several) for name, several in data.columns.items()}
    record = {"sha256": hash_file(path), "columns": columns, **shares}
    before = json.loads(record_path.read_text(encoding="utf-8")) if record_path.exists() else record
    if {**before, "source": None} != {**record, "source": None}:
        raise ConfigError(
            f"{folder.parent} was made of other pairs, columns or shares ({before['source']}, see {record_path}); give "
            "those, or another --out"
        )

    if first_process():
        write_json(record_path, record | {"source": str(path)})
        if not folder.exists() and "negative" in data.columns:
            data.collection.save(folder)
        elif not folder.exists():
            _mine(data, folder)
    make_communicator().barrier()


def _mine(data: Pairs, folder: Path) -> None:
    from ..mining.candidates import LexicalRetriever
    from ..mining.mining import mine_negatives

    cache = folder.with_name(f"{folder.name}.cache")
    with console.watching() as watch:
        report = mine_negatives(data.collection, folder, [LexicalRetriever()], cache=cache, watch=watch)
    shutil.rmtree(cache)
    console.say(f"hard negatives by BM25: {report.mined:,}; {report.none:,} queries have none")


def _measure(settings: Recipe, models: dict[str, Path]) -> None:
    """Show BM25, the base, which has learned no reasoning, and what became of it, on the queries that were held out."""
    from ..evaluation.benchmark import EvaluationOptions
    from ..evaluation.results import Result
    from ..evaluation.runner import EvaluationPlan, run_plan, write_summary

    folder, measured = Path(settings.run_dir), settings.evaluation
    prompts = {} if settings.prompts is None else {"prompts": settings.prompts}
    trained = {name: str(path) for name, path in models.items()}
    direct = EvaluationPlan(
        models={"base": settings.base, **trained},
        modes=["direct"],
        baselines=["bm25"],
        collections=[settings.collection],
        splits=["dev"],
        options=EvaluationOptions(bootstrap=measured.bootstrap, seed=settings.seed),
        batch_size=measured.batch_size,
        loading={"dtype": settings.dtype, "max_length": settings.max_length, **prompts},
    )
    results: list[Result] = []
    with console.watching() as watch:
        results += run_plan(direct, folder, watch)
        try:
            results += run_plan(replace(direct, models=trained, modes=["reason"], baselines=[]), folder, watch)
        except ModelError as error:
            console.aside(f"reason mode is not measured: {error}")
    console.show_results(results)
    write_summary(results, folder, measured.permutations, settings.seed)
