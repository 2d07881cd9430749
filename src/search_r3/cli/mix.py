"""The command that makes training data from public data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import console
from .common import NewFolder, check_new, data_app


@data_app.command("mix")
def data_mix(
    settings: Annotated[Path, typer.Argument(help="YAML file with the sources, e.g. recipes/data/paper.yaml.")],
    out: NewFolder,
) -> None:
    """Make training data from several data sets of the hub: one folder, one split for each of them.

    Example: search-r3 data mix recipes/data/paper.yaml paper-data
    """
    from ..data.mixing.mix import mix
    from ..data.mixing.mix_settings import load_mix

    check_new(out)
    mix_settings = load_mix(settings)
    with console.watching() as watch:
        reports = mix(mix_settings, out, watch)
    for name, report in reports.items():
        losses = "".join(f", {count:,} dropped: {reason}" for reason, count in report.dropped.items())
        console.say(f"{name}: {report.queries:,} queries ({report.dev:,} in dev) of {report.read:,} rows{losses}")
    total = sum(report.queries for report in reports.values())
    console.say(f"{out}: {total:,} queries; what became of each row: {out / 'mix.json'}")
