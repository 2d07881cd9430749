"""What the command line shows: the only file that prints. Rich is imported where it is used: `--help` is instant."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections import Counter
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any, NoReturn

from .data.rows import check_text
from .errors import DataError
from .parallel import first_process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from rich.progress import Progress, TaskID
    from transformers import TrainerCallback

    from .evaluation.mteb import TaskScore
    from .evaluation.results import Result
    from .evaluation.search import Answer
    from .evaluation.significance import Comparison
    from .planning.plan import MemoryPlan
    from .serving.held import Entry
    from .serving.store import Store
    from .training.probe import ProbeReport


def fail(message: str, status: int) -> NoReturn:
    """End the program with one line on stderr."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def say(text: str) -> None:
    """Show one line as it is, however narrow the terminal: a path in it can be copied."""
    from rich import get_console

    if first_process():
        get_console().print(text, markup=False, emoji=False, soft_wrap=True)


def aside(text: str) -> None:
    """Show one line that is no result, on stderr."""
    print(text, file=sys.stderr)


def ask(prompt: str) -> str:
    """A query typed at the prompt; empty at the end of the input.

    Raises:
        DataError: it is no UTF-8.
    """
    try:
        return check_text(input(prompt).strip(), "the query")
    except EOFError:
        return ""
    except UnicodeDecodeError as error:
        raise DataError(f"the input is no UTF-8 text (byte {error.start} of it); send it as UTF-8") from error


class Bar:
    """One line of a progress display over documents or queries, with its speed."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task
        self.texts = self.tokens = 0
        self._started = time.perf_counter()

    def begin(self, total: int, done: int = 0) -> None:
        """Start the clock, at `done` of `total`; what was done before does not count for the speed."""
        self._progress.reset(self._task, total=total, completed=done)
        self._started = time.perf_counter()

    def advance(self, texts: int, tokens: int, note: str = "") -> None:
        """Count texts and tokens done since the last call; `note` is shown after the speed."""
        self.texts += texts
        self.tokens += tokens
        self._progress.update(self._task, advance=texts, speed=self.speed + note)

    @property
    def speed(self) -> str:
        """Texts and tokens per second since the beginning."""
        seconds = time.perf_counter() - self._started
        return f"{self.texts / seconds:,.1f}/s, {self.tokens / seconds:,.0f} tokens/s"


@contextmanager
def bar(what: str, total: int | None = None) -> Iterator[Bar]:
    """A progress bar that vanishes at the end; without a total it waits for `begin`."""
    with _progress() as progress:
        yield Bar(progress, progress.add_task(what, total=total, speed=""))


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    speed = TextColumn("{task.fields[speed]}")
    # On stderr: results that are piped hold nothing else, and what is said meanwhile stays where it belongs.
    screen, redirect = Console(stderr=True), sys.stdout.isatty()
    off = not screen.is_terminal  # rich would end a bar that nobody sees with an empty line
    return Progress(*columns, speed, console=screen, redirect_stdout=redirect, transient=True, disable=off)


LIVE_VALUES = {
    "dev_ndcg@10_reason": "dev reason",
    "dev_ndcg@10_direct": "direct",
    "loss": "loss",
    "info_nce": "info_nce",
    "reward": "reward",
    "share_ge_half": "share_ge_half",
    "teacher_cosine": "teacher_cosine",
}


@contextmanager
def live() -> Iterator[TrainerCallback]:
    """A callback of trainings that draws a bar per stage with a live line of its losses or rewards."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column
    from transformers import TrainerCallback

    names = {"base": "base model", **STAGE_NAMES}
    rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # what is cut in a narrow terminal
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    line = TextColumn("{task.fields[line]}", table_column=rest)
    tasks: dict[str, Any] = {}
    latest: dict[str, float] = {}
    with Progress(*columns, line, expand=True, disable=not first_process()) as progress:

        class Live(TrainerCallback):  # type: ignore[misc]  # untyped there
            def on_log(
                self, args: Any, state: Any, control: Any, *, logs: Mapping[str, float], stage: str, **keywords: Any
            ) -> None:
                if stage not in tasks:
                    latest.clear()
                    tasks[stage] = progress.add_task(names[stage], total=state.max_steps, line="")
                latest.update({name: logs[name] for name in LIVE_VALUES if name in logs})
                line = "  ".join(f"{shown} {latest[name]:.3f}" for name, shown in LIVE_VALUES.items() if name in latest)
                progress.update(tasks[stage], completed=state.global_step, line=line)

        yield Live()


@contextmanager
def watching() -> Iterator[Callable[[str, int | None], Callable[[int, int], None]]]:
    """A progress bar for one thing after another; each call begins the next."""
    with _progress() as progress:
        tasks: list[TaskID] = []

        def watch(what: str, total: int | None) -> Callable[[int, int], None]:
            for task in tasks:
                progress.remove_task(task)
            tasks[:] = [progress.add_task(what, total=total, speed="")]
            return Bar(progress, tasks[0]).advance

        yield watch


def show_results(results: Sequence[Result]) -> None:
    """Show the results of one split."""
    from .evaluation.table import notes, queries_text, summary

    where, info = results[0].place, results[0].collection
    title = f"{where[0]}, {where[1]}: {queries_text(results[0])} queries, {info.documents:,} documents"
    table(title, {result.system.name: summary(result, results) for result in results})
    for result in results:
        if "p-mrr" in result.scores:
            low, high = result.intervals["p-mrr"]
            say(f"{result.system.name}: p-MRR {result.scores['p-mrr']:+.3f} (95 %: {low:+.3f} to {high:+.3f})")
    for note in notes(results):
        say(note)


def table(title: str, rows: Mapping[str, dict[str, Any]]) -> None:
    """Show rows of `summary`, by the name of the system; narrow enough for 80 columns.

    `tok` are reasoning tokens per query, `ms` is `Cost.ms_per_query`, `gain` nDCG@10 per 100 tokens of reasoning.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Column

    from .evaluation.table import shorten

    columns = [Column(overflow="fold")]
    columns += [Column(name, no_wrap=True) for name in ("nDCG@10", "95 %", "R@100", "MRR@10")]
    columns += [Column(name, no_wrap=True, justify="right") for name in ("tok", "ms", "q/s", "docs/s", "gain")]
    lines = []
    for name, row in rows.items():
        low, high = row["ndcg@10_interval"]
        cells = [f"{row['ndcg@10']:.3f}", f"{low:.2f}-{high:.2f}", f"{row['recall@100']:.3f}", f"{row['mrr@10']:.3f}"]
        cost = [row[key] for key in ("ms_per_query", "queries_per_second", "documents_per_second")]
        gain = "" if row["gain_per_100_tokens"] is None else f"{row['gain_per_100_tokens']:+.3f}"
        lines.append([name, *cells, f"{row['tokens_per_query']:.1f}", *map(shorten, cost), gain])
    show_grid(columns, lines, title=title, box=SIMPLE_HEAD, show_edge=False, padding=0)


def show_grid(columns: Iterable[Any], rows: Iterable[Sequence[str]], title: str, **options: Any) -> None:
    """Show a table of rich, names in it as they are; `options` are those of its `Table`."""
    from rich import print as rich_print
    from rich.table import Table
    from rich.text import Text

    grid = Table(*columns, title=Text(title), **options)
    for row in rows:
        grid.add_row(*map(Text, row))
    rich_print(grid)


MOST_TESTS = 20


def show_comparisons(results: Sequence[Result], comparisons: Sequence[Comparison]) -> None:
    """Show means over splits and paired tests; of many tests only how many there are."""
    from .evaluation.table import AVERAGED, averages

    if means := averages(results):
        splits = len({result.place for result in results})
        lines = [[name, *(f"{row[key]:.3f}" for key in AVERAGED)] for name, row in means.items()]
        show_grid(["", *AVERAGED], lines, title=f"mean over {splits} splits")
    if 0 < len(comparisons) <= MOST_TESTS:
        lines = []
        for one in comparisons:
            numbers = f"{one.difference:+.3f}", f"{one.p:.4f}", f"{one.p_holm:.4f}"
            lines.append([f"{one.collection}, {one.split}: {one.first}", one.second, *numbers])
        columns = ["nDCG@10 of", "minus that of", "", "p", "p (Holm)"]
        show_grid(columns, lines, title="paired randomisation tests")
    elif comparisons:
        sure = sum(one.p_holm < 0.05 for one in comparisons)
        say(f"{len(comparisons)} paired tests, {sure} with p < 0.05 after Holm's correction: see summary.md")


def show_mteb(scores: Sequence[TaskScore]) -> None:
    """Show the main score of each task in each mode, and what it is a part of."""
    from .evaluation.instructions import short
    from .evaluation.table import truncation_notes

    lines = []
    for one in scores:
        tokens = f"{fmean(one.tokens_per_query.values()):.1f}" if one.tokens_per_query else ""
        lines.append([one.task, one.mode, short(one.instruction), one.measure, f"{one.score:.4f}", tokens])
    title = ", ".join(["mteb", *dict.fromkeys(one.part for one in scores if one.part)])
    show_grid(["task", "mode", "instruction", "measure", "score", "tokens/query"], lines, title=title)
    for one in scores:
        name = ", ".join((one.task, one.mode, short(one.instruction)))
        for note in truncation_notes(name, one.truncated_queries, one.truncated_documents):
            say(note)


def show_report(folder: Path) -> None:
    """Show the report of a run."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    where = report["collection"]
    table(f"{where['name']}, {where['split']} split, seed {report['seed']}", report["rows"])
    for one in report["comparisons"]:
        if one["first"] == "reason/rl" and one["second"] in ("direct/rl", "reason/sft"):
            p = f"p = {one['p']:.4f}, {one['p_holm']:.4f} after Holm's correction"
            say(f"{one['first']} vs {one['second']}: {p} (paired randomisation test on nDCG@10)")
    shares = report["rollouts"]
    say(
        f"sampled rollouts with reward >= 0.5: {shares['share_ge_half_before']:.0%} before RL, "
        f"{shares['share_ge_half_after']:.0%} after; embed token forced: {shares['forced_share']:.1%}"
    )
    peak = report["peak_memory_bytes"]
    memory = "" if peak is None else f", peak memory {peak / 2**30:.2f} GiB"
    say(f"{report['seconds']:.0f} s{memory}; all in {folder}/, to look at: {folder}/report.html")
    show_next("search", f"{folder}/model", "--collection", "atlas", "what do people pay with in Tashkent?")
    show_next("index", "atlas.store", "--collection", "atlas", "--model", f"{folder}/model", extra="serve")


def show_next(*words: str, extra: str = "") -> None:
    """Show a command that comes next, and the extra that it needs."""
    if first_process():
        needs = f" (pip install 'search-r3[{extra}]')" if extra else ""
        # Plain, so that it can be copied from a narrow terminal; with the path by which the command was called.
        print(f"Next{needs}: {shlex.join([sys.argv[0], *words])}")


STAGE_NAMES = {"sft": "stage 1", "grpo": "stage 2", "distill": "distillation"}


def show_plan(plan: MemoryPlan, base: str, gpu_bytes: float, remedy: str) -> None:
    """Show what a stage takes; `remedy` are the overrides with which it fits, empty where it does or none is known."""
    from rich import print as rich_print
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    def gigabytes(value: float) -> str:
        return f"{value / 1e9:,.2f}"

    weights = ", ".join(f"{name} {value / 1e6:,.1f} M" for name, value in plan.parameters.items() if value)
    say(f"{STAGE_NAMES[plan.stage]}, {base}, {plan.gpus} x {gigabytes(gpu_bytes)} GB, {plan.strategy}")
    say(f"parameters: {weights}")
    grid = Table("GB per GPU", title="", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1))
    for phase in plan.phases:
        grid.add_column(phase, justify="right")
    for part in dict.fromkeys(part for parts in plan.phases.values() for part in parts):
        grid.add_row(part, *(gigabytes(parts[part]) if part in parts else "" for parts in plan.phases.values()))
    grid.add_section()
    grid.add_row("sum", *(gigabytes(sum(parts.values())) for parts in plan.phases.values()))
    rich_print(grid)
    say("memory of the machine: " + ", ".join(f"{name} {gigabytes(value)} GB" for name, value in plan.host.items()))
    tokens = ", ".join(f"{name} {value:,}" for name, value in plan.tokens.items())
    say(f"tokens per step: {sum(plan.tokens.values()):,} ({tokens}); {sum(plan.flops.values()) / 1e15:,.2f} PFLOP")
    for line in plan.time_lines():
        say(line)
    verdict = "fits" if plan.fits(gpu_bytes) else "does not fit"
    own = f"{gigabytes(plan.context)} of CUDA's own, 10 % kept free"
    say(f"{verdict}: {gigabytes(plan.peak)} GB at the peak ({plan.peak_phase}), {own}")
    if not plan.fits(gpu_bytes):
        say(f"change first: {remedy}" if remedy else "no setting of the recipe is enough: use more or larger GPUs")
    say("")


def show_probe(report: ProbeReport) -> None:
    """Show what a probe found: its values, then a sentence for each finding."""
    from rich import print as rich_print
    from rich.table import Table

    grid = Table("value", f"of {report.queries} queries", box=None)
    for name, value in report.values.items():
        grid.add_row(name, f"{value:.3f}")
    rich_print(grid)
    for finding in report.findings:
        say(f"{finding.text} Mend {finding.mend}.")


def show_answer(pieces: Iterable[str | Answer]) -> None:
    """Show reasoning while it is written, and then the answer that ends it."""
    from rich import get_console
    from rich.table import Table
    from rich.text import Text

    from .data.documents import Chunk
    from .evaluation.search import snippet

    console = get_console()
    reasoning = False
    for piece in pieces:
        if isinstance(piece, str):
            if not reasoning:
                console.print("[dim]reasoning:[/] ", end="")
            console.out(piece, end="", highlight=False)
            reasoning = True
            continue
        if reasoning:
            console.print(f" [dim]({piece.reasoning_tokens} tokens)[/]", highlight=False)
        if piece.truncated:
            console.print("[yellow]the query was longer than the model's max_length and lost its end[/]")
        if piece.forced:
            console.print("[yellow]the model did not emit the embed token; it was forced[/]")
        grid = Table("score", box=None)
        grid.add_column("document", overflow="fold")
        grid.add_column("text")
        for document, score in piece.documents:
            name, text = Text(document.doc_id), Text(snippet(document.full_text, piece.query))
            if isinstance(document, Chunk):
                name = Text.assemble(document.parent_id, "\n", (document.place, "dim"))
                text = Text(snippet(document.text, piece.query))
                if document.title:
                    text = Text.assemble((document.title, "bold"), "\n", text)
            grid.add_row(f"{score:.3f}", name, text)
        console.print(grid if piece.documents else "[yellow]no document was found[/]")


def print_answer(pieces: Iterable[str | Answer]) -> None:
    """Print the answer alone, as one line of JSON."""
    for piece in pieces:
        if not isinstance(piece, str):
            print(json.dumps(piece.as_dict(), ensure_ascii=False))


def print_rows(rows: Iterable[Mapping[str, Any]]) -> None:
    """Print rows alone, a line of JSON each."""
    for row in rows:
        print(json.dumps(row, ensure_ascii=False))


def show_store(store: Store, entries: Sequence[Entry], top: int) -> None:
    """Show what a store holds, and its first documents."""
    info, index = store.info, store.index
    chunks = sum(entry.chunks for entry in entries)
    say(f"{store.address}: {len(entries):,} documents, {chunks:,} chunks, vectors of size {info.fingerprint.dimension}")
    say(f"model: {info.model}; made {info.created}; versions kept: {len(store.versions())}")
    if index:
        built = f"{index['kind']}, built of {int(index['rows']):,} vectors"
        say(f"index: {built}, recall@10 {index['recall']} against exact search")
    for source, count in Counter(entry.source for entry in entries).items():
        say(f"source: {source}: {count:,} documents")
    if top and entries:
        rows = [[entry.doc_id, entry.title, str(entry.chunks)] for entry in entries[:top]]
        show_grid(["document", "title", "chunks"], rows, title=f"first {len(rows)} of {len(entries):,}")
