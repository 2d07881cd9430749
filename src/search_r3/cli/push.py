"""The command that puts a model on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import console
from .common import ManyValues, app


@app.command(cls=ManyValues)
def push(
    model: Annotated[Path, typer.Argument(help="Run (its newest model), model directory, or adapter (peft).")],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; made if it does not exist.")],
    results: Annotated[
        list[Path] | None,
        typer.Option(help="Folders of `evaluate` with results of this model; those of its run are taken anyway."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str, typer.Option(help="Branch to commit to; made if it does not exist.")] = "main",
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Model and card by search-r3 push",
    license_id: Annotated[
        str | None, typer.Option("--license", help="For the card, as the hub spells it, e.g. `apache-2.0`.")
    ] = None,
    replace_card: Annotated[
        bool, typer.Option("--replace-card", help="Replace a card on the hub that somebody else wrote or changed.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show files and card; nothing leaves the machine.")
    ] = False,
) -> None:
    """Put a model on the Hugging Face hub, with a model card written from its run's own results, in one commit.

    Example: search-r3 push runs/quickstart OWNER/NAME --results runs/evaluation --private
    """
    from ..publishing.card import model_card
    from ..publishing.facts import find_model, gather_facts
    from ..publishing.hub import CARD, check_files, check_repo_id, hub_errors, upload

    check_repo_id(repo_id)
    folder = find_model(model)
    files = check_files(folder)
    facts = gather_facts(folder, results or [])
    card = model_card(facts, repo_id, license_id)
    if facts.adapter and facts.hub_id(facts.base) is None:
        console.say(
            f"note: the adapter's base model is {facts.base or 'not named'}, no model of the hub: others lack it; the "
            "run itself (its merged model) can be pushed instead"
        )
    size = sum(path.stat().st_size for path in files.values()) / 1e6
    if dry_run:
        for name, path in files.items():
            console.say(f"{path.stat().st_size:>14,}  {name}")
        console.say(f"{len(card.encode()):>14,}  {CARD} (of {len(facts.own)} results)\n\n{card}")
        console.say(f"nothing was uploaded: {len(files) + 1} files, {size:,.1f} MB, for {repo_id}, branch {revision}")
        return
    with hub_errors(repo_id):
        commit = upload(files, card, repo_id, private, revision, message, replace_card)
    for note in commit.notes:
        console.say(note)
    console.say(f"{commit.url}: {len(files)} files of {folder}, {size:,.1f} MB, {len(facts.own)} results in the card")
