"""Commands that train."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console
from ..errors import ConfigError, MissingExtraError
from .common import ManyValues, ModelArgument, NewFolder, Overrides, RecipeOption, Resume, app, load_settings

if TYPE_CHECKING:
    from ..config import Recipe
    from ..training.run import Run


@app.command()
def quickstart(overrides: Overrides = None, recipe: RecipeOption = None, resume: Resume = False) -> None:
    """Run the whole story: collection, stage 1, stage 2, evaluation, report."""
    from ..training.run import Run

    settings = load_settings(recipe, overrides)
    run = Run(settings)
    if (run.folder / "report.json").exists():
        if not resume:
            raise ConfigError(f"{run.folder} is complete; set run_dir=ANOTHER for a new run")
        console.say(f"{run.folder} is complete; for a new run remove it or set run_dir=ANOTHER.")
    else:
        for stage in ("sft", "grpo"):
            run.claim(stage, resume)
        _whole_story(settings, run, resume)
    console.show_report(run.folder)


def _whole_story(settings: Recipe, run: Run, resume: bool) -> None:
    from ..data.load import load_collection
    from ..evaluation.report.report import build_report, evaluate_run, write_report
    from ..training.grpo import train_grpo
    from ..training.sft import train_sft

    started = time.perf_counter()
    collection = load_collection(settings.collection)
    if not (run.folder / "collection").exists():
        collection.save(run.folder / "collection")
    splits = ", ".join(f"{name} {len(qrels)}" for name, qrels in collection.qrels.items())
    console.say(f"{collection.name}: {len(collection.documents)} documents; queries: {splits}")
    with console.live() as live:
        sft = train_sft(settings, callbacks=[live], resume=resume)
        rl = train_grpo(settings, callbacks=[live], resume=resume)
    models, results_folder = {"sft": sft.model_path, "rl": rl.model_path}, run.folder / "results"
    results, rewards, forced = evaluate_run(settings, collection, models, results_folder, console.say)
    report = build_report(settings, collection, results, rewards, forced)
    report["seconds"] = time.perf_counter() - started
    write_report(run.folder, report, results, run.metrics("grpo"), rewards)


@app.command(cls=ManyValues)
def base(
    out: NewFolder,
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    texts: Annotated[
        list[Path] | None,
        typer.Option(help="Instead of atlas: .jsonl (`text` or `messages`) and .txt files, or folders of them."),
    ] = None,
) -> None:
    """Make a small base model from scratch (section base_model)."""
    from ..pretraining.base import train_base

    settings = load_settings(recipe, overrides)
    with console.live() as live:
        recall = train_base(settings.base_model, out, settings.seed, [live], texts or [])
    console.say("  ".join(f"{name} {value:.4g}" for name, value in recall.items()))


@app.command()
def sft(overrides: Overrides = None, recipe: RecipeOption = None, resume: Resume = False) -> None:
    """Train stage 1 into run_dir/sft/model."""
    from ..training.sft import train_sft

    settings = load_settings(recipe, overrides)
    with console.live() as live:
        result = train_sft(settings, callbacks=[live], resume=resume)
    console.say(f"stage-1 model: {result.model_path}")


@app.command()
def grpo(
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    model: Annotated[
        str | None, typer.Option(help="Stage-1 model, a directory or a hub id; by default run_dir/sft/model.")
    ] = None,
    resume: Resume = False,
) -> None:
    """Train stage 2 (GRPO with the retrieval reward) into run_dir/model."""
    from ..evaluation.report.plots import plot_account
    from ..training.grpo import train_grpo

    settings = load_settings(recipe, overrides)
    with console.live() as live:
        result = train_grpo(settings, model=model, callbacks=[live], resume=resume)
    console.say(f"stage-2 model: {result.model_path}")
    account = Path(settings.run_dir) / "plots" / "account.png"
    try:
        if plot_account(result.log_history, account):
            console.say(f"account of the live index: {account}")
    except MissingExtraError as error:  # the training is done and saved
        console.say(f"no plot of the account: {error}")


@app.command()
def distill(
    model: ModelArgument, overrides: Overrides = None, recipe: RecipeOption = None, resume: Resume = False
) -> None:
    """Teach a model's direct vectors what its reasoning finds, into run_dir/distill/model (section distill).

    It needs queries, and no judgements. Documents stay as they are, so an index of MODEL stays valid.

    Example: search-r3 distill runs/quickstart/model collection=atlas run_dir=runs/distilled
    """
    from ..training.modes.distill import train_distill

    settings = load_settings(recipe, overrides)
    with console.live() as live:
        result = train_distill(model, settings, callbacks=[live], resume=resume)
    console.say(f"distilled model: {result.model_path}")
    _show_before_and_after(result.log_history, settings.distill.keep == "best")


def _show_before_and_after(rows: list[dict[str, Any]], best: bool) -> None:
    """Say what dev evaluations found before and after, and how much of reasoning's gain direct mode has now.

    Args:
        rows: of `metrics.jsonl`.
        best: whether the model of the best evaluation was kept, as `Evaluations` finds it, and not the last one.
    """
    from ..training.modes.distill import gain_kept

    measured = [row for row in rows if "dev_ndcg@10_direct" in row]
    if len(measured) < 2:
        return
    first = measured[0]
    kept = max(measured, key=lambda row: row["dev_ndcg@10_direct"]) if best else measured[-1]
    for mode in ("direct", "reason"):
        console.say(f"dev nDCG@10, {mode}: {first[f'dev_ndcg@10_{mode}']:.3f} -> {kept[f'dev_ndcg@10_{mode}']:.3f}")
    share = gain_kept(first, kept)
    if share is not None:
        console.say(f"of what reasoning added to direct mode, one glance has {share:.0%} now")
