"""The commands; `console` shows what they find. Heavy imports stand inside them, so that `--help` is instant."""

from __future__ import annotations

import logging
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import console
from .errors import ConfigError, SearchR3Error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .config import Recipe
    from .model.encoder import SearchR3

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Search-R3: a language model reasons about a query, then embeds it. Train, evaluate, search.",
)
data_app = typer.Typer(no_args_is_help=True, help="Make test collections.")
app.add_typer(data_app, name="data")

RecipeOption = Annotated[Path | None, typer.Option("--recipe", "-r", help="YAML recipe; without it, the defaults.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings as key=value, e.g. grpo.steps=10.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in run_dir.")]
CollectionOption = Annotated[str, typer.Option("--collection", "-c", help="`atlas`, `atlas-wide`, or a BEIR folder.")]
ModelArgument = Annotated[str, typer.Argument(help="Model directory or hub id.")]
NewFolder = Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")]
INTERRUPTED = 130
"""Typer's exit status after Ctrl-C."""


class ModeName(StrEnum):
    """The two ways to encode a query."""

    direct = "direct"
    reason = "reason"


class IndexDType(StrEnum):
    """How the vectors of an index are stored."""

    float16 = "float16"
    float32 = "float32"


class WeightDType(StrEnum):
    """How exported weights are stored."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class BuiltIn(StrEnum):
    """Collections that are built here."""

    atlas = "atlas"
    atlas_wide = "atlas-wide"


@app.command()
def quickstart(overrides: Overrides = None, recipe: RecipeOption = None, resume: Resume = False) -> None:
    """Run the whole story: collection, stage 1, stage 2, evaluation, report."""
    from .training.run import Run

    settings = _settings(recipe, overrides)
    run = Run(settings)
    if (run.folder / "report.json").exists():
        if not resume:
            raise ConfigError(f"{run.folder} is complete; set run_dir=ANOTHER for a new run")
        console.say(f"{run.folder} is complete; for a new run remove it or set run_dir=ANOTHER.")
    else:
        for stage in ("sft", "grpo"):
            run.claim(stage, resume)
        _whole_story(settings, run)
    console.show_report(run.folder)


def _whole_story(settings: Recipe, run: Any) -> None:
    from .evaluation.report import build_report, evaluate_run, write_report
    from .training.engine import load_collection
    from .training.grpo import train_grpo
    from .training.sft import train_sft

    started = time.perf_counter()
    collection = load_collection(settings.collection)
    if not (run.folder / "collection").exists():
        collection.save(run.folder / "collection")
    splits = ", ".join(f"{name} {len(qrels)}" for name, qrels in collection.qrels.items())
    console.say(f"{collection.name}: {len(collection.documents)} documents; queries: {splits}")
    with console.live() as observe:
        sft = train_sft(settings, run, observe)
        rl = train_grpo(settings, run, sft, observe)
    rows, rewards, forced = evaluate_run(settings, collection, {"sft": sft, "rl": rl}, console.say)
    report = build_report(settings, collection, rows, rewards, forced)
    report["seconds"] = time.perf_counter() - started
    write_report(run.folder, report, run.metrics("grpo"), rewards)


@data_app.command("build")
def data_build(
    name: Annotated[BuiltIn, typer.Argument(help="Which collection.")],
    out: NewFolder,
    seed: Annotated[int, typer.Option(help="Seed of the splits.")] = 0,
) -> None:
    """Build a collection into a folder in the BEIR layout."""
    from .data.atlas import BUILT_IN

    _check_new(out)
    collection = BUILT_IN[name.value](seed)
    collection.save(out)
    console.say(f"{out}: {len(collection.documents)} documents, {len(collection.queries)} queries")


@app.command()
def base(
    out: NewFolder,
    overrides: Overrides = None,
    recipe: RecipeOption = None,
) -> None:
    """Make a small base model from scratch (section base_model)."""
    from .training.base import train_base

    settings = _settings(recipe, overrides)
    with console.live() as observe:
        known = train_base(settings.base_model, out, settings.seed, observe)
    console.say("  ".join(f"{name} {value:.4g}" for name, value in known.items()))


@app.command()
def sft(overrides: Overrides = None, recipe: RecipeOption = None, resume: Resume = False) -> None:
    """Train stage 1 into run_dir/sft/model."""
    from .training.run import Run
    from .training.sft import train_sft

    settings = _settings(recipe, overrides)
    run = Run(settings)
    run.claim("sft", resume)
    with console.live() as observe:
        path = train_sft(settings, run, observe)
    console.say(f"stage-1 model: {path}")


@app.command()
def grpo(
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    model: Annotated[Path | None, typer.Option(help="Stage-1 model; by default run_dir/sft/model.")] = None,
    resume: Resume = False,
) -> None:
    """Train stage 2 (GRPO with the retrieval reward) into run_dir/model."""
    from .evaluation.report import plot_account
    from .training.grpo import train_grpo
    from .training.run import Run

    settings = _settings(recipe, overrides)
    run = Run(settings)
    run.claim("grpo", resume)
    with console.live() as observe:
        path = train_grpo(settings, run, model or run.model_path("sft"), observe)
    console.say(f"stage-2 model: {path}")
    account = run.folder / "plots" / "account.png"
    if plot_account(run.metrics("grpo"), account):
        console.say(f"account of the live index: {account}")


@app.command()
def evaluate(
    model: ModelArgument,
    collection: CollectionOption = "atlas",
    split: Annotated[str, typer.Option(help="Split of the collection.")] = "test",
    mode: Annotated[list[ModeName] | None, typer.Option(help="Modes; both by default.")] = None,
    bm25: Annotated[bool, typer.Option(help="Add the BM25 rows.")] = True,
    out: Annotated[Path | None, typer.Option(help="JSON file to write; it must not exist.")] = None,
) -> None:
    """Evaluate a model on one split of a collection."""
    from .evaluation.benchmark import evaluate_bm25, evaluate_model, index_documents, paired_p_values
    from .files import write_json
    from .training.engine import load_collection

    if out is not None:
        _check_new(out)
    data = load_collection(collection)
    encoder = _encoder(model)
    with console.bar("documents", len(data.documents)) as bar:
        index = index_documents(encoder, data, progress=bar.advance)
    rows = [evaluate_bm25(data, split)] if bm25 else []
    for name in mode or list(ModeName):
        with console.bar(f"{name.value} queries", len(data.split(split))) as bar:
            rows.append(evaluate_model(encoder, data, split, name.value, name.value, index=index, progress=bar.advance))
        if bm25 and name is ModeName.reason:
            rows.append(evaluate_bm25(data, split, "bm25+reasoning", rows[-1].reasoning))
    records = {row.name: row.record(1000, 0) for row in rows}
    p_values = paired_p_values(rows, 10_000, 0)
    console.table(f"{data.name}, {split}", records)
    truncated = max(row.truncated for row in rows)
    if truncated:
        console.say(f"{truncated} queries were longer than the model's max_length and lost their end")
    if out is not None:
        record = {"model": model, "collection": data.name, "hash": data.content_hash(), "split": split}
        write_json(out, {**record, "rows": records, "p_values": p_values})


@app.command()
def encode(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="Index folder; an encoding that was begun there goes on.")],
    collection: CollectionOption = "atlas",
    dtype: Annotated[IndexDType, typer.Option(help="How vectors are stored.")] = IndexDType.float16,
) -> None:
    """Encode a collection of any size into an index folder; after a kill, the same command goes on."""
    from .retrieval.corpus import encode_corpus

    encoder = _encoder(model)
    with console.bar("documents") as bar:

        def start(total: int, done: int) -> None:
            if done:
                console.say(f"{done:,} of {total:,} documents are encoded already")
            bar.begin(total, done)

        documents = _documents(collection)
        index = encode_corpus(encoder, documents, out, dtype=dtype.value, on_start=start, progress=bar.advance)
    speed = f"; {bar.speed}" if bar.texts else ""
    console.say(f"{out}: {len(index):,} vectors of size {index.dimension} as {index.dtype}{speed}")


@app.command()
def export(
    model: ModelArgument,
    out: NewFolder,
    dtype: Annotated[WeightDType | None, typer.Option(help="How weights are stored; as they are by default.")] = None,
) -> None:
    """Write the direct mode of a model for sentence-transformers."""
    from .model.export import export_sentence_transformers

    _check_new(out)
    export_sentence_transformers(_encoder(model).backbone, out, dtype)
    console.say(f"{out}: load it with SentenceTransformer({str(out)!r})")


@app.command()
def search(
    model: ModelArgument,
    query: Annotated[str | None, typer.Argument(help="The query; without it, a prompt to type queries at.")] = None,
    collection: CollectionOption = "atlas",
    mode: Annotated[ModeName, typer.Option(help="Reason first, or embed at once.")] = ModeName.reason,
    k: Annotated[int, typer.Option("-k", min=1, help="Documents to show.")] = 5,
    index: Annotated[Path | None, typer.Option(help="The collection as `encode` wrote it; else it is encoded.")] = None,
) -> None:
    """Search a collection: shows the reasoning as it is written, the ranked documents and their scores."""
    from .errors import DataError
    from .evaluation.benchmark import index_documents
    from .evaluation.search import Searcher
    from .retrieval.corpus import load_corpus
    from .training.engine import load_collection

    if query is not None and not query.strip():
        raise DataError("the query is empty; give a text with at least one visible character")
    data = load_collection(collection)
    encoder = _encoder(model)
    if index is None:
        with console.bar("documents", len(data.documents)) as bar:
            encoded = index_documents(encoder, data, progress=bar.advance)
    else:
        encoded = load_corpus(encoder, data.texts().items(), index)
    searcher = Searcher(encoder, data, encoded)
    if query is not None:
        console.show_answer(searcher.stream(query, mode.value, k))
        return
    console.say(f"{len(data.documents)} documents, mode {mode.value}. Type a query; an empty line ends.")
    while text := console.ask():
        console.show_answer(searcher.stream(text, mode.value, k))


def main() -> None:
    """Run the command line; a domain error becomes one line on stderr and exit status 2."""
    # The level stands on the handler: some libraries set their own loggers to DEBUG.
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.addFilter(_first_of_its_kind())
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, handlers=[handler])
    try:
        app()
    except SearchR3Error as error:
        console.fail(str(error), 2)
    except OSError as error:
        place = f" {error.filename}" if error.filename else ""
        console.fail(f"cannot read or write{place}: {error.strerror or error}", 2)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            console.fail("stopped; a training goes on with --resume, encode with the same command", INTERRUPTED)
        raise


def _settings(recipe: Path | None, overrides: list[str] | None) -> Recipe:
    from .config import load_recipe

    settings = load_recipe(recipe, overrides or [])
    _hush()
    return settings


def _encoder(model: str) -> SearchR3:
    from .model.encoder import SearchR3

    _hush()
    return SearchR3(model)


def _documents(collection: str) -> Iterable[tuple[str, str]]:
    """Doc_ids and texts; those of a folder are read as they are needed."""
    from .data.atlas import BUILT_IN
    from .data.collection import CorpusFile

    if collection in BUILT_IN:
        return BUILT_IN[collection]().texts().items()
    return CorpusFile(Path(collection) / "corpus.jsonl")


def _check_new(path: Path) -> None:
    if path.exists():
        raise ConfigError(f"{path} exists; nothing is overwritten: remove it or choose another")


def _first_of_its_kind() -> Callable[[logging.LogRecord], bool]:
    """A filter that lets a warning through once; of documents cut to max_length every block of a corpus warns."""
    seen = set()

    def first(record: logging.LogRecord) -> bool:
        kind = record.name, record.msg
        new = kind not in seen
        seen.add(kind)
        return new

    return first


def _hush() -> None:
    """Switch off transformers' own progress bars, which would tear ours, and accelerate's notes on tied weights."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
