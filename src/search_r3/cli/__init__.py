"""The command line; `console` shows what it finds. Heavy imports stand inside commands, so that `--help` is instant."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .. import __version__, console
from ..data.rows import check_text
from ..errors import SearchR3Error, StoppedError
from . import best_of_n, data, evaluation, fit, mining, plan, push, search, serve, store, training
from .common import app
from .modes import gate

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "app",
    "best_of_n",
    "data",
    "evaluation",
    "fit",
    "gate",
    "main",
    "mining",
    "plan",
    "push",
    "search",
    "serve",
    "store",
    "training",
]

INTERRUPTED = 130
"""Typer's exit status after Ctrl-C."""
TERMINATED = 143
"""The exit status of a program that SIGTERM ended."""

PANELS = {
    "Start": ("quickstart", "fit"),
    "Search and serve": ("index", "search", "serve", "mcp", "encode"),
    "Train": ("base", "plan", "sft", "probe", "best_of_n", "grpo", "distill", "gate"),
    "Measure": ("evaluate", "mteb", "report"),
    "Share": ("export", "push"),
}
"""How `--help` lists the commands."""


def _show_version(asked: bool) -> None:
    if asked:
        console.say(f"search-r3 {__version__}")
        raise typer.Exit


_panels = {name: panel for panel, names in PANELS.items() for name in names}
app.registered_commands.sort(key=lambda command: list(_panels).index(getattr(command.callback, "__name__", "")))
for _command in app.registered_commands:
    _command.rich_help_panel = _panels[getattr(_command.callback, "__name__", "")]


@app.callback()
def _every_command(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and end.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; a domain error becomes one line on stderr and exit status 2."""
    # The level stands on the handler: some libraries set their own loggers to DEBUG.
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.addFilter(_first_of_its_kind())
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, handlers=[handler])
    try:
        _check_arguments(sys.argv[1:])
        app()
    except StoppedError as stop:
        console.say(str(stop))
        sys.exit(TERMINATED)
    except SearchR3Error as error:
        console.fail(str(error), 2)
    except OSError as error:
        place = f" {error.filename}" if error.filename else ""
        console.fail(f"cannot read or write{place}: {error.strerror or error}", 2)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            console.fail(
                "stopped; a training goes on with --resume, encode and index with the same command", INTERRUPTED
            )
        if not end.code:
            _leave_the_others()
        raise


def _check_arguments(arguments: list[str]) -> None:
    """Refuse bytes that are no text before anything is computed; names of files may hold them."""
    for argument in arguments:
        names = argument, argument.partition("=")[2]
        if not any(map(os.path.exists, names)):
            check_text(argument, f"the argument {argument!r}")


def _leave_the_others() -> None:
    """End the process group of a training by several processes; its threads may abort one that ends with it open."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _first_of_its_kind() -> Callable[[logging.LogRecord], bool]:
    """A filter that lets a warning through once; of documents cut to max_length every block of a corpus warns."""
    kinds = set()

    def first(record: logging.LogRecord) -> bool:
        kind = record.name, record.msg
        new = kind not in kinds
        kinds.add(kind)
        return new

    return first
