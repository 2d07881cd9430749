"""Options that take several values in a row, beside arguments and settings."""

from __future__ import annotations

import json
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from search_r3.cli.common import ManyValues

app = typer.Typer()


@app.command(cls=ManyValues)
def command(
    model: str,
    out: str,
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
    splits: Annotated[list[str] | None, typer.Option("--splits")] = None,
    samples: Annotated[int, typer.Option("--samples", "-n")] = 8,
    has_all: Annotated[bool, typer.Option("--all")] = False,
) -> None:
    typer.echo(json.dumps([model, out, overrides, splits, samples, has_all]))


@pytest.mark.parametrize(
    "line",
    [
        "M O sft.steps=1 --splits a b -n 3 --all",
        "--splits a b M O sft.steps=1 -n 3 --all",
        "--splits a b M O -n 3 --all sft.steps=1",
        "M --splits a b O --all -n 3 sft.steps=1",
        "-n 3 M --all O --splits a b sft.steps=1",
        "--splits a --splits b --all M O -n 3 sft.steps=1",
        "--splits a -n 3 M --splits b O --all sft.steps=1",
    ],
)
def test_a_row_leaves_the_arguments_that_are_needed(line: str) -> None:
    done = CliRunner().invoke(app, line.split())
    assert done.exit_code == 0, done.output
    assert json.loads(done.output) == ["M", "O", ["sft.steps=1"], ["a", "b"], 3, True]


def test_a_row_keeps_one_value_and_what_is_missing_is_named() -> None:
    done = CliRunner().invoke(app, ["M", "--splits", "a"])
    assert done.exit_code == 2 and "'out'" in done.output
    assert CliRunner().invoke(app, ["M", "O", "--splits"]).exit_code == 2
