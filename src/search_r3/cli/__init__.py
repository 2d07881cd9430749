"""The command line; `console` shows what it finds. Heavy imports stand inside commands, so that `--help` is instant."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from .. import __version__, console
from ..data.rows import check_text
from ..errors import SearchR3Error, StoppedError
from ..parallel import leave_the_others
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
        leave_the_others()
        sys.exit(TERMINATED)
    except SearchR3Error as error:
        _fail(error, str(error))
    except OSError as error:
        place = f" {error.filename}" if error.filename else ""
        _fail(error, f"cannot read or write{place}: {error.strerror or error}")
    except SystemExit as end:
        if end.code == INTERRUPTED:
            console.fail(
                "stopped; a training goes on with --resume, encode and index with the same command", INTERRUPTED
            )
        if not end.code:
            leave_the_others()
        raise
    except Exception as error:
        leave_the_others(error)
        raise


def _fail(error: Exception, message: str) -> NoReturn:
    """End by one line; the other processes of a training hear of it."""
    console.aside(f"error: {message}")
    leave_the_others(error)
    sys.exit(2)


def _check_arguments(arguments: list[str]) -> None:
    """Refuse bytes that are no text before anything is computed; names of files may hold them."""
    for argument in arguments:
        names = argument, argument.partition("=")[2]
        if not any(map(os.path.exists, names)):
            check_text(argument, f"the argument {argument!r}")


def _first_of_its_kind() -> Callable[[logging.LogRecord], bool]:
    """A filter that lets a warning through once; of documents cut to max_length every block of a corpus warns."""
    kinds = set()

    def first(record: logging.LogRecord) -> bool:
        if record.levelno > logging.WARNING or record.exc_info:
            return True
        kind = record.name, record.msg
        new = kind not in kinds
        kinds.add(kind)
        return new

    return first
