"""Commands that evaluate and report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .. import console
from ..errors import ConfigError
from .common import (
    DocumentInstruction,
    ManyValues,
    ModelOptions,
    ModeName,
    app,
    check_new,
    hush,
    load_encoder,
    say_left_out,
    takes_model_options,
)

if TYPE_CHECKING:
    from ..evaluation.results import Result
    from ..evaluation.runner import EvaluationPlan, FrontierOptions
    from ..model.prompts import Mode

Models = Annotated[
    list[str] | None,
    typer.Option("--model", "-m", help="Directory, GGUF file or hub id; NAME=SOURCE to name one of several."),
]
Splits = Annotated[
    list[str] | None,
    typer.Option("--splits", help="Splits of collections, or `all`; by default test, else dev or train."),
]
Modes = Annotated[
    list[ModeName] | None, typer.Option("--modes", help="`direct`, `reason` (both by default), `latent`, `auto`.")
]
Instructions = Annotated[
    list[str] | None,
    typer.Option(
        "--instruction",
        help="Instruction of the queries: `own` (the query's or the task's), `none`, or a text for those without one; "
        "several are systems of their own.",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Queries reasoned about at once; changes results by rounding.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the intervals, of the tests, and of `--queries`.")]
Sample = Annotated[
    int | None, typer.Option("--queries", min=1, help="Measure a random sample of so many queries of each split.")
]
IdenticalIds = Literal["unless-relevant", "beir", "mteb", "keep"]


Collections = Annotated[
    list[str] | None,
    typer.Option(
        "--collections",
        "-c",
        help="Built-in names, folders, or hub ids (OWNER/NAME, then :SUBSET, @REVISION); `atlas` by default.",
    ),
]
Baselines = Annotated[
    list[str] | None,
    typer.Option(
        "--baselines",
        help="`bm25` (stemmed, as mteb's), `bm25-unstemmed`, `bm25+reasoning`, `bm25+query+reasoning`, "
        "`sentence-transformers:NAME` (or NAME@REVISION).",
    ),
]
Language = Annotated[
    str, typer.Option(help="Of the texts, for BM25: `en`, `de`, `zh`, ...; `auto` tells scripts without spaces.")
]
Rule = Annotated[
    IdenticalIds,
    typer.Option(
        "--identical-ids",
        help="A document with the id of its query is left out: unless it is relevant; always (`beir`); where mteb "
        "does; never (`keep`).",
    ),
]
Frontier = Annotated[
    bool,
    typer.Option(
        "--frontier", help="Also quality against tokens and time: auto at prices, budgets, means of samples, oracle."
    ),
]
Budgets = Annotated[
    list[int] | None,
    typer.Option(
        "--budgets", min=1, help="Of --frontier: tokens of a reply with its embed token; 8, 16 and 32 by default."
    ),
]
Samples = Annotated[
    list[int] | None, typer.Option("--samples", min=2, help="Of --frontier, replies to a query; 4 by default.")
]
GivenIndex = Annotated[
    Path | None, typer.Option(help="The documents of the one collection as `encode` wrote them with the one model.")
]
IndexTypeOption = Annotated[
    Literal["exact", "hnsw"],
    typer.Option(help="Search exactly, or by a graph, whose recall is shown; an --index has its own."),
]
Out = Annotated[Path, typer.Option(help="Folder of the results; what is in it already is not repeated.")]


@app.command(cls=ManyValues)
@takes_model_options
def evaluate(
    options: ModelOptions,
    model: Models = None,
    collections: Collections = None,
    splits: Splits = None,
    modes: Modes = None,
    instruction: Instructions = None,
    document_instruction: DocumentInstruction = "",
    baselines: Baselines = None,
    language: Language = "auto",
    out: Out = Path("runs/evaluation"),
    frontier: Frontier = False,
    budgets: Budgets = None,
    samples: Samples = None,
    runs: Annotated[bool, typer.Option("--runs", help="Write rankings and judgements in TREC's formats, too.")] = False,
    queries: Sample = None,
    depth: Annotated[int, typer.Option(min=100, help="Documents ranked for each query.")] = 1000,
    identical_ids: Rule = "unless-relevant",
    latency_queries: Annotated[int, typer.Option(min=0, help="Queries asked one at a time, for ms/query.")] = 16,
    permutations: Annotated[int, typer.Option(min=100, help="Of the paired randomisation tests.")] = 10_000,
    bootstrap: Annotated[int, typer.Option(min=100, help="Resamples of the intervals.")] = 1000,
    seed: Seed = 0,
    batch_size: BatchSize = 128,
    index: GivenIndex = None,
    index_type: IndexTypeOption = "exact",
) -> None:
    """Evaluate models and baselines on collections; a stopped evaluation goes on with the same command.

    Where queries have instructions of their own, models are measured with and without them.

    Example: search-r3 evaluate --model runs/quickstart/model --collections atlas --baselines bm25 bm25+reasoning
    """
    from ..evaluation.benchmark import EvaluationOptions
    from ..evaluation.runner import EvaluationPlan, label_models, write_summary

    hush()
    follow_mteb = identical_ids == "mteb"
    rule = "unless-relevant" if identical_ids == "mteb" else identical_ids
    plan = EvaluationPlan(
        label_models(model) if model else {},
        _modes(modes),
        list(dict.fromkeys(baselines or [])),
        list(dict.fromkeys(collections or ["atlas"])),
        splits or [],
        EvaluationOptions(depth, rule, latency_queries, bootstrap, seed, queries or 0),
        batch_size,
        options.loading(),
        _instructions(instruction),
        document_instruction,
        language,
        follow_mteb,
        runs,
        *(_frontier(frontier, budgets, samples), index, index_type),
    )
    results = _run(plan, out)
    comparisons = write_summary(results, out, permutations, seed)
    console.show_comparisons(results, comparisons)
    if frontier:
        _show_frontier(results, out, permutations, seed)
    console.say(f"tables: {out}/summary.md; records: {out}/results; a page to look at: search-r3 report {out}")


def _modes(names: list[ModeName] | None) -> list[Mode]:
    """The modes, each once; by default those of every model."""
    from ..modes import PLAIN_MODES

    return [name.value for name in dict.fromkeys(names)] if names else [*PLAIN_MODES]


def _show_frontier(results: list[Result], out: Path, permutations: int, seed: int) -> None:
    """Write the frontier of each split, and show it."""
    from ..evaluation.frontier.record import COLUMNS, cells, write_frontier

    for split in write_frontier(results, out, permutations, seed):
        title = f"frontier: {split['collection']}, {split['split']}"
        console.show_grid(COLUMNS, [cells(row) for row in split["points"]], title)
        for axis, areas in split["areas"].items():
            values = ", ".join(f"{family} {value:.3f}" for family, value in areas.items())
            values = values or "none, since reasoning costs nothing or gains nothing"
            console.say(f"area under it by {axis} (0.5: thinking at random): {values}")


def _frontier(wanted: bool, budgets: list[int] | None, samples: list[int] | None) -> FrontierOptions | None:
    """What of a frontier is measured."""
    from ..evaluation.runner import FrontierOptions as Options

    if not wanted:
        if budgets or samples:
            raise ConfigError("--budgets and --samples are for --frontier; add it")
        return None
    given = {"budgets": budgets, "samples": samples}
    return Options(**{name: tuple(values) for name, values in given.items() if values})


def _instructions(texts: list[str] | None) -> list[str]:
    """The instructions, each once; none where none is given."""
    if texts and not all(text.strip() for text in texts):
        raise ConfigError("--instruction is empty; give a text, `own`, or `none`")
    return list(dict.fromkeys(text.strip() for text in texts or []))


def _run(plan: EvaluationPlan, out: Path) -> list[Result]:
    """Evaluate, and show each split when it is complete."""
    from ..evaluation.runner import run_plan

    results: list[Result] = []
    with console.watching() as watch:
        for result in run_plan(plan, out, watch):
            if results and result.place != results[-1].place:
                console.show_results([other for other in results if other.place == results[-1].place])
            results.append(result)
    console.show_results([other for other in results if other.place == results[-1].place])
    return results


@app.command(cls=ManyValues)
@takes_model_options
def mteb(
    model: Annotated[str, typer.Option("--model", "-m", help="Directory, GGUF file or hub id.")],
    tasks: Annotated[
        list[str],
        typer.Option("--tasks", help="Tasks of mteb, suites (`paper`, `bright`, `followir`), folders."),
    ],
    options: ModelOptions,
    splits: Splits = None,
    modes: Modes = None,
    instruction: Instructions = None,
    queries: Sample = None,
    subsets: Annotated[
        list[str] | None,
        typer.Option("--subsets", help="Of tasks in several languages, those alone, as `en` or `deu`."),
    ] = None,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder of mteb's own result files; they are not computed again.")] = Path(
        "runs/mteb"
    ),
    batch_size: BatchSize = 128,
) -> None:
    """Run tasks of MTEB through the library mteb, each mode as a model of its own, with the prompts of the tasks.

    Example: search-r3 mteb --model MODEL --tasks SciFact NFCorpus --modes direct reason
    """
    from ..data.load import load_collection
    from ..evaluation.benchmark import resolve_splits
    from ..evaluation.instructions import OWN
    from ..evaluation.mteb import run_mteb
    from ..evaluation.mteb_tasks import collection_task, suite_tasks

    folders = [name for name in tasks if Path(name).is_dir()]
    if splits and len(folders) < len(tasks):
        raise ConfigError("--splits is for folders; mteb's own tasks have their splits in mteb: leave it out")
    mteb_tasks = suite_tasks([name for name in tasks if name not in folders], subsets or [])
    for folder in folders:
        collection = load_collection(folder, skip_empty_documents=True)
        say_left_out(collection)
        mteb_tasks += [collection_task(collection, split) for split in resolve_splits(collection, splits or [])]
    instructions = _instructions(instruction) or [OWN]
    encoder = load_encoder(model, options)
    choices: dict[str, Any] = {"instructions": instructions, "queries": queries, "seed": seed}
    scores = run_mteb(encoder, _modes(modes), mteb_tasks, out, batch_size=batch_size, **choices)
    console.show_mteb(scores)
    console.say(f"mteb's result files: {out}/results")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of `quickstart` or `evaluate`.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")] = Path("runs/report"),
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    permutations: Annotated[int, typer.Option(min=100, help="Of the paired randomisation tests.")] = 10_000,
    seed: Seed = 0,
) -> None:
    """Write one page (HTML) and plots (PNG) of runs: quality, cost, and which queries reasoning helps or hurts."""
    from ..evaluation.report.report import write_runs_page

    check_new(out)
    page = write_runs_page(runs, out, title, permutations, seed)
    console.say(f"page: {page}; plots: {out}/plots")
