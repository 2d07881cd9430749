"""The command line: the only file that prints. Heavy imports stand inside the commands, so that `--help` is instant."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import ConfigError, SearchR3Error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .config import Recipe
    from .evaluation.search import Answer
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


class ModeName(StrEnum):
    """The two ways to encode a query."""

    direct = "direct"
    reason = "reason"


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
        _print(f"{run.folder} is complete; for a new run remove it or set run_dir=ANOTHER.")
    else:
        for stage in ("sft", "grpo"):
            run.claim(stage, resume)
        _whole_story(settings, run)
    _show_report(run.folder)


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
    _print(f"{collection.name}: {len(collection.documents)} documents; queries: {splits}")
    with _live() as observe:
        sft = train_sft(settings, run, observe)
        rl = train_grpo(settings, run, sft, observe)
    rows, rewards, forced = evaluate_run(settings, collection, {"sft": sft, "rl": rl}, _print)
    report = build_report(settings, collection, rows, rewards, forced)
    report["seconds"] = time.perf_counter() - started
    write_report(run.folder, report, run.metrics("grpo"), rewards)


@data_app.command("build")
def data_build(
    name: Annotated[BuiltIn, typer.Argument(help="Which collection.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    seed: Annotated[int, typer.Option(help="Seed of the splits.")] = 0,
) -> None:
    """Build a collection into a folder in the BEIR layout."""
    from .data.atlas import BUILT_IN

    if out.exists():
        raise ConfigError(f"{out} exists; nothing is overwritten: remove it or choose another folder")
    collection = BUILT_IN[name.value](seed)
    collection.save(out)
    _print(f"{out}: {len(collection.documents)} documents, {len(collection.queries)} queries")


@app.command()
def base(
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    overrides: Overrides = None,
    recipe: RecipeOption = None,
) -> None:
    """Make a small base model from scratch (section base_model)."""
    from .training.base import train_base

    settings = _settings(recipe, overrides)
    with _live() as observe:
        known = train_base(settings.base_model, out, settings.seed, observe)
    _print("  ".join(f"{name} {value:.4g}" for name, value in known.items()))


@app.command()
def sft(overrides: Overrides = None, recipe: RecipeOption = None, resume: Resume = False) -> None:
    """Train stage 1 into run_dir/sft/model."""
    from .training.run import Run
    from .training.sft import train_sft

    settings = _settings(recipe, overrides)
    run = Run(settings)
    run.claim("sft", resume)
    with _live() as observe:
        path = train_sft(settings, run, observe)
    _print(f"stage-1 model: {path}")


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
    with _live() as observe:
        path = train_grpo(settings, run, model or run.model_path("sft"), observe)
    _print(f"stage-2 model: {path}")
    account = run.folder / "plots" / "account.png"
    if plot_account(run.metrics("grpo"), account):
        _print(f"account of the live index: {account}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Model directory or hub id.")],
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

    if out is not None and out.exists():
        raise ConfigError(f"{out} exists; nothing is overwritten: choose another file")
    data = load_collection(collection)
    encoder = _encoder(model)
    with _bar("documents", len(data.documents)) as advance:
        index = index_documents(encoder, data, progress=advance)
    rows = [evaluate_bm25(data, split)] if bm25 else []
    for name in mode or list(ModeName):
        with _bar(f"{name.value} queries", len(data.split(split))) as advance:
            rows.append(evaluate_model(encoder, data, split, name.value, name.value, index=index, progress=advance))
        if bm25 and name is ModeName.reason:
            rows.append(evaluate_bm25(data, split, "bm25+reasoning", rows[-1].reasoning))
    records = {row.name: row.record(1000, 0) for row in rows}
    p_values = paired_p_values(rows, 10_000, 0)
    _table(f"{data.name}, {split}", records)
    truncated = max(row.truncated for row in rows)
    if truncated:
        _print(f"{truncated} queries were longer than the model's max_length and lost their end")
    if out is not None:
        record = {"model": model, "collection": data.name, "hash": data.content_hash(), "split": split}
        write_json(out, {**record, "rows": records, "p_values": p_values})


@app.command()
def search(
    model: Annotated[str, typer.Argument(help="Model directory or hub id.")],
    query: Annotated[str | None, typer.Argument(help="The query; without it, a prompt to type queries at.")] = None,
    collection: CollectionOption = "atlas",
    mode: Annotated[ModeName, typer.Option(help="Reason first, or embed at once.")] = ModeName.reason,
    k: Annotated[int, typer.Option("-k", min=1, help="Documents to show.")] = 5,
) -> None:
    """Search a collection: shows the reasoning, the ranked documents and their scores."""
    from .errors import DataError
    from .evaluation.search import Searcher
    from .training.engine import load_collection

    if query is not None and not query.strip():
        raise DataError("the query is empty; give a text with at least one visible character")
    data = load_collection(collection)
    encoder = _encoder(model)
    with _bar("documents", len(data.documents)) as advance:
        searcher = Searcher(encoder, data, advance)
    if query is not None:
        _show_answer(searcher.search(query, mode.value, k))
        return
    _print(f"{len(data.documents)} documents, mode {mode.value}. Type a query; an empty line ends.")
    while text := _ask():
        _show_answer(searcher.search(text, mode.value, k))


def main() -> None:
    """Run the command line; a domain error becomes one line on stderr and exit status 2."""
    # The level stands on the handler: some libraries set their own loggers to DEBUG.
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, handlers=[handler])
    try:
        app()
    except SearchR3Error as error:
        _fail(str(error), 2)
    except OSError as error:
        place = f" {error.filename}" if error.filename else ""
        _fail(f"cannot read or write{place}: {error.strerror or error}", 2)
    except KeyboardInterrupt:
        _fail("stopped; a training goes on from its last checkpoint with --resume", 130)


def _fail(message: str, status: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def _settings(recipe: Path | None, overrides: list[str] | None) -> Recipe:
    from .config import load_recipe

    settings = load_recipe(recipe, overrides or [])
    _hush()
    return settings


def _encoder(model: str) -> SearchR3:
    from .model.encoder import SearchR3

    _hush()
    return SearchR3(model)


def _hush() -> None:
    """Switch off transformers' own progress bars, which would tear ours, and accelerate's notes on tied weights."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def _print(text: str) -> None:
    from rich import print as rich_print

    rich_print(text)


def _ask() -> str:
    try:
        return input("query> ").strip()
    except EOFError:
        return ""


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over items."""
    from rich.progress import Progress

    with Progress(transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


SHOWN = ("loss", "info_nce", "reward", "share_ge_half", "dev_ndcg@10_direct", "dev_ndcg@10_reason")


@contextmanager
def _live() -> Iterator[Callable[[str, int, int, dict[str, float]], None]]:
    """A bar per stage with a live line of its losses or rewards."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    names = {"base": "base model", "sft": "stage 1", "grpo": "stage 2"}
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    latest: dict[str, float] = {}
    tasks: dict[str, Any] = {}
    with Progress(*columns, TextColumn("{task.fields[line]}")) as progress:

        def observe(stage: str, step: int, steps: int, values: dict[str, float]) -> None:
            if stage not in tasks:
                latest.clear()
                tasks[stage] = progress.add_task(names.get(stage, stage), total=steps, line="")
            latest.update({name: values[name] for name in SHOWN if name in values})
            line = "  ".join(f"{name} {value:.3f}" for name, value in latest.items())
            progress.update(tasks[stage], completed=step, line=line)

        yield observe


def _table(title: str, rows: dict[str, dict[str, Any]]) -> None:
    from rich import print as rich_print
    from rich.table import Table

    columns = ("ndcg@10", "recall@100", "mrr@10", "tokens_per_query", "queries_per_second")
    table = Table("", "nDCG@10", "95 %", "R@100", "MRR@10", "tokens", "q/s", title=title)
    for name, row in rows.items():
        low, high = row["ndcg@10_interval"]
        cells = [f"{row[column]:.3f}" for column in columns[:3]]
        table.add_row(
            name,
            cells[0],
            f"{low:.2f}-{high:.2f}",
            *cells[1:],
            f"{row[columns[3]]:.1f}",
            f"{row[columns[4]]:.0f}",
        )
    rich_print(table)


def _show_report(folder: Path) -> None:
    import json

    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    where = report["collection"]
    _table(f"{where['name']}, {where['split']} split, seed {report['seed']}", report["rows"])
    for pair in ("reason/rl vs direct/rl", "reason/rl vs reason/sft"):
        _print(f"{pair}: p = {report['p_values'][pair]:.4f} (paired randomisation test on nDCG@10)")
    shares = report["rollouts"]
    _print(
        f"sampled rollouts with reward >= 0.5: {shares['share_ge_half_before']:.0%} before RL, "
        f"{shares['share_ge_half_after']:.0%} after; embed token forced: {shares['forced_share']:.1%}"
    )
    _print(f"{report['seconds']:.0f} s, peak memory {report['peak_memory_bytes'] / 2**30:.2f} GiB; all in {folder}/")
    # Plain, so that it can be copied from a narrow terminal; with the path by which the command was called.
    query = "what do people pay with in Tashkent?"
    print(f'Next: {sys.argv[0]} search {folder}/model --collection atlas "{query}"')


def _show_answer(answer: Answer) -> None:
    from rich import print as rich_print
    from rich.markup import escape
    from rich.table import Table

    if answer.truncated:
        _print("[yellow]the query was longer than the model's max_length and lost its end[/]")
    if answer.reasoning:
        _print(f"[dim]reasoning ({answer.reasoning_tokens} tokens):[/] {escape(answer.reasoning)}")
    if answer.forced:
        _print("[yellow]the model did not emit the embed token; it was forced[/]")
    table = Table("score", "id", "document", box=None)
    for document, score in answer.documents:
        table.add_row(f"{score:.3f}", escape(document.doc_id), escape(document.full_text))
    rich_print(table)


if __name__ == "__main__":
    main()
