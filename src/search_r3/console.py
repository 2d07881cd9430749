"""What the command line shows: the only file that prints. Rich is imported where it is used: `--help` is instant."""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from rich.progress import Progress, TaskID

    from .evaluation.search import Answer


def fail(message: str, status: int) -> NoReturn:
    """End the program with one line on stderr."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def say(text: str) -> None:
    """Show one line as it is, however narrow the terminal: a path in it can be copied."""
    from rich import get_console

    get_console().print(text, markup=False, soft_wrap=True)


def ask() -> str:
    """A query typed at the prompt; empty at the end of the input."""
    try:
        return input("query> ").strip()
    except EOFError:
        return ""


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

    def advance(self, texts: int, tokens: int) -> None:
        """Count texts and tokens done since the last call."""
        self.texts += texts
        self.tokens += tokens
        self._progress.update(self._task, advance=texts, speed=self.speed)

    @property
    def speed(self) -> str:
        """Texts and tokens per second since the beginning."""
        seconds = time.perf_counter() - self._started
        return f"{self.texts / seconds:,.1f}/s, {self.tokens / seconds:,.0f} tokens/s"


@contextmanager
def bar(what: str, total: int | None = None) -> Iterator[Bar]:
    """A progress bar that vanishes at the end; without a total it waits for `begin`."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[speed]}"), transient=True) as progress:
        yield Bar(progress, progress.add_task(what, total=total, speed=""))


SHOWN = ("loss", "info_nce", "reward", "share_ge_half", "dev_ndcg@10_direct", "dev_ndcg@10_reason")


@contextmanager
def live() -> Iterator[Callable[[str, int, int, dict[str, float]], None]]:
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


def table(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """Show the rows of an evaluation, by name."""
    from rich import print as rich_print
    from rich.table import Table

    columns = ("ndcg@10", "recall@100", "mrr@10", "tokens_per_query", "queries_per_second")
    shown = Table("", "nDCG@10", "95 %", "R@100", "MRR@10", "tokens", "q/s", title=title)
    for name, row in rows.items():
        low, high = row["ndcg@10_interval"]
        cells = [f"{row[column]:.3f}" for column in columns[:3]]
        shown.add_row(
            name,
            cells[0],
            f"{low:.2f}-{high:.2f}",
            *cells[1:],
            f"{row[columns[3]]:.1f}",
            f"{row[columns[4]]:.0f}",
        )
    rich_print(shown)


def show_report(folder: Path) -> None:
    """Show the report of a run."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    where = report["collection"]
    table(f"{where['name']}, {where['split']} split, seed {report['seed']}", report["rows"])
    for pair in ("reason/rl vs direct/rl", "reason/rl vs reason/sft"):
        say(f"{pair}: p = {report['p_values'][pair]:.4f} (paired randomisation test on nDCG@10)")
    shares = report["rollouts"]
    say(
        f"sampled rollouts with reward >= 0.5: {shares['share_ge_half_before']:.0%} before RL, "
        f"{shares['share_ge_half_after']:.0%} after; embed token forced: {shares['forced_share']:.1%}"
    )
    say(f"{report['seconds']:.0f} s, peak memory {report['peak_memory_bytes'] / 2**30:.2f} GiB; all in {folder}/")
    # Plain, so that it can be copied from a narrow terminal; with the path by which the command was called.
    query = "what do people pay with in Tashkent?"
    print(f'Next: {sys.argv[0]} search {folder}/model --collection atlas "{query}"')


def show_answer(pieces: Iterable[str | Answer]) -> None:
    """Show reasoning while it is written, and then the answer that ends it."""
    from rich import get_console
    from rich.markup import escape
    from rich.table import Table

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
        shown = Table("score", "id", "document", box=None)
        for document, score in piece.documents:
            shown.add_row(f"{score:.3f}", escape(document.doc_id), escape(document.full_text))
        console.print(shown)
