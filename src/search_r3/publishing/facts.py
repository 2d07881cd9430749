"""What the files on the disk say about one trained model: its settings, its training and its results.

A model is known by the SHA-256 of its files, which every result holds: a result of another model, or of an earlier
state of this one, is not taken for its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..data.load import split_name
from ..errors import DataError, ModelError, RunError
from ..evaluation.instructions import OWN, label
from ..evaluation.report.report import METRICS, last_results
from ..evaluation.results import Result
from ..evaluation.runner import REASONING_NAME, RESULTS, SUMMARY
from ..evaluation.significance import Comparison
from ..files import hash_file, hash_folder, read_log
from ..model.settings import SETTINGS_FILE, EmbeddingSettings, read_settings
from ..model.source import ADAPTER_CONFIG, CONFIG, SMOL, ModelFiles, packaged_path

RECIPE, REPORT = "settings.yaml", "report.json"
BEFORE_RL = "before RL"
STAGES = ("sft", "grpo")


@dataclass(frozen=True)
class Facts:
    """What is known of a model; what no file says is empty."""

    settings: EmbeddingSettings  # its prompts and limits
    config: dict[str, Any]  # its config.json, or the adapter_config.json of an adapter
    adapter: bool  # whether it is an adapter (peft) instead of whole weights
    revision: str  # SHA-256 of its files
    recipe: dict[str, Any] = field(default_factory=dict)  # the settings of the run that made it
    recipe_hash: str = ""  # SHA-256 of the file that holds them
    # stage -> rows of metrics.jsonl, for the stages that made this model
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)  # report.json of the run, where its results are of this model
    # of this model (named by their mode), of its state before RL, and of baselines on the same data
    results: list[Result] = field(default_factory=list)
    # paired tests between these results in which this model takes part
    comparisons: list[Comparison] = field(default_factory=list)
    places: tuple[Path, ...] = ()  # folders from which a relative path of the run may have been meant

    @property
    def stage(self) -> str:
        """The stage that made it: `sft`, `grpo`, or empty where no run is known."""
        return list(self.metrics)[-1] if self.metrics else ""

    @property
    def own(self) -> list[Result]:
        """The results of this model itself."""
        return [result for result in self.results if is_own(result)]

    @property
    def base(self) -> str:
        """What it was trained from, as the adapter or the recipe names it: a directory, a hub id or `builtin`."""
        return str(
            (self.config.get("base_model_name_or_path") if self.adapter else None) or self.recipe.get("base", "")
        )

    def hub_id(self, source: str) -> str | None:
        """`owner/name` where a source is on the hub, of `smol` its base; None for a folder and what is built in."""
        if source == SMOL:
            source = ModelFiles(SMOL, packaged_path(SMOL)).json(ADAPTER_CONFIG)["base_model_name_or_path"]
        parts = split_name(source)
        return None if parts is None or any((place / parts[0]).exists() for place in self.places) else parts[0]


def is_own(result: Result) -> bool:
    """Whether a result in `Facts.results` is of the model itself."""
    return result.system.kind == "search-r3" and BEFORE_RL not in result.system.name


def find_model(path: Path) -> Path:
    """The model directory at a path: the path itself, or the newest model of a run.

    Raises:
        ModelError: there is neither.
    """
    if any((path / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
        return path
    if (path / RECIPE).is_file():
        for model in (path / "model", path / "sft" / "model"):
            if (model / CONFIG).is_file():
                return model
        raise ModelError(f"the run {path} has no model yet; end its training first (--resume), or give a checkpoint")
    raise ModelError(
        f"{path} is neither a model nor a run: expected {CONFIG}, {ADAPTER_CONFIG} or {RECIPE} in it; give the "
        "directory of a model or of a run"
    )


def gather_facts(model: Path, folders: Sequence[Path] = ()) -> Facts:
    """Read all that is known of a model, of the run that it lies in, and of its results.

    Args:
        model: a model directory or an adapter, as `find_model` gives it.
        folders: of `evaluate` or of other runs, beside the run's own; each has to hold a result of this model.

    Raises:
        ModelError: search_r3.json is missing or unusable.
        RunError: a file of the run is damaged.
        DataError: a folder holds no result of this model, or a damaged one.
    """
    model = model.resolve()
    adapter = not (model / CONFIG).is_file()
    revision = hash_folder(model)
    run, stage = _find_run(model)
    merged = [model.parent / "model", *([run / "model"] if run and stage == "grpo" else [])]
    states = {revision} | {hash_folder(path) for path in merged if adapter and path.is_dir()}
    before = run / "sft" / "model" if run and stage == "grpo" else None
    earlier = {hash_folder(before)} - states if before is not None and before.is_dir() else set()
    results, comparisons = _read_results(run, folders, states, earlier)
    log = read_log(run / METRICS) if run else []
    places = [Path.cwd(), *(run.parents if run else ()), *(place for one in folders for place in one.resolve().parents)]
    return Facts(
        settings=_embedding_settings(model),
        config=_read_object(model / (ADAPTER_CONFIG if adapter else CONFIG)),
        adapter=adapter,
        revision=revision,
        # Read as it stands: the run may be of a version with other settings, and a card only repeats them.
        recipe=_read_object(run / RECIPE) if run else {},
        recipe_hash=hash_file(run / RECIPE) if run else "",
        metrics={one: [row for row in log if row.get("stage") == one] for one in STAGES[: STAGES.index(stage) + 1]}
        if run
        else {},
        report=_report(run, states) if run else {},
        results=results,
        comparisons=comparisons,
        places=tuple(dict.fromkeys(places)),
    )


def _find_run(model: Path) -> tuple[Path | None, str]:
    """The run that a model lies in and the stage that made it."""
    for run, stage in ((model.parent, "grpo"), (model.parent.parent, model.parent.name)):
        if model.name in ("model", "adapter") and stage in STAGES and (run / RECIPE).is_file():
            return run, stage
    return None, ""


def _read_results(
    run: Path | None, folders: Sequence[Path], states: set[str], earlier: set[str]
) -> tuple[list[Result], list[Comparison]]:
    """The newest results, called by what they are beside this model, and the paired tests between them.

    Args:
        run: the model's own run.
        folders: of `evaluate`.
        states: what the model is known by.
        earlier: what its state before RL is known by.

    Raises:
        DataError: a folder of `evaluate` holds no result of the model.
    """
    rows, tests = list[tuple[Path, Result]](), list[tuple[Path, dict[str, Any]]]()
    of_run = [(run, REPORT)] if run is not None and (run / RESULTS).is_dir() else []
    for folder, record in [*of_run, *((folder, SUMMARY) for folder in folders)]:
        results = last_results(folder)
        if record == SUMMARY and not any(_is_of(result, states) for result in results):
            raise DataError(
                f"no result in {folder / RESULTS} is of this model as it is now; evaluate it into that folder "
                "(search-r3 evaluate --model ...), or leave the folder out"
            )
        rows += [(folder, result) for result in results]
        if (folder / record).is_file():
            tests += [(folder, row) for row in _read_object(folder / record)["comparisons"]]
    newest = _newest(rows, states, earlier)
    names = {(folder, result.place, result.system.name): name for (name, _), (folder, result) in newest.items()}
    renamed = {key: result.renamed(key[0]) for key, (_, result) in newest.items()}
    comparisons = []
    for folder, row in tests:
        place = row["collection"], row["split"]
        pair = [names.get((folder, place, row[side])) for side in ("first", "second")]
        if None not in pair and any(is_own(renamed[str(name), place]) for name in pair):
            comparisons.append(Comparison(**row | {"first": pair[0], "second": pair[1]}))
    return list(renamed.values()), comparisons


def _newest(
    rows: Sequence[tuple[Path, Result]], states: set[str], earlier: set[str]
) -> dict[tuple[str, tuple[str, str]], tuple[Path, Result]]:
    """(Name, split) -> folder and result; of each split only what is on the data of the model's newest result."""
    dated = sorted(rows, key=lambda row: str(row[1].provenance.get("date", "")))
    own = [result for _, result in dated if _is_of(result, states)]
    data = {result.place: result.collection.hash for result in own}
    keys = {result.key: _label(result) for result in own}
    newest = {}
    for folder, result in dated:
        name = _name(result, states, earlier, keys)
        if name and data.get(result.place) == result.collection.hash:
            newest[name, result.place] = folder, result
    order = [*dict.fromkeys(result.place for _, result in rows)]
    return dict(sorted(newest.items(), key=lambda item: order.index(item[0][1])))


def _name(result: Result, states: set[str], earlier: set[str], keys: Mapping[str, str]) -> str:
    """What a system is called beside the model of these results; empty where it has nothing to do with it.

    `keys` holds what their names say of their instructions.
    """
    system = result.system
    if system.varied:
        return ""
    if system.kind == "search-r3":
        if _is_of(result, states):
            return system.mode + _label(result)
        return f"{system.mode}{_label(result)}, {BEFORE_RL}" if _is_of(result, earlier) else ""
    if texts := system.settings.get("texts"):
        *baseline, key = texts.split()
        return (baseline[0] if baseline else REASONING_NAME) + keys[key] if key in keys else ""
    return system.name


def _label(result: Result) -> str:
    """What its name says of its instructions."""
    return label(result.system.settings.get("instruction", OWN))


def _is_of(result: Result, states: set[str]) -> bool:
    """Whether a result is of one of these states; that of adapters says their base's, too."""
    return result.system.revision.partition("+")[0] in states


def _report(run: Path, states: set[str]) -> dict[str, Any]:
    """The report of the run; empty where it is of another state of the model."""
    path = run / REPORT
    is_of_model = path.is_file() and any(_is_of(result, states) for result in last_results(run))
    return _read_object(path) if is_of_model else {}


def _embedding_settings(model: Path) -> EmbeddingSettings:
    settings = read_settings(model)
    if settings is None:
        raise ModelError(
            f"{model / SETTINGS_FILE} is missing: prompts and limits of the model; save it with "
            "SearchR3.save_pretrained"
        )
    return settings


def _read_object(path: Path) -> dict[str, Any]:
    """The one object in a JSON or YAML file."""
    is_yaml = path.suffix == ".yaml"
    try:
        text = path.read_text(encoding="utf-8")
        value = yaml.safe_load(text) if is_yaml else json.loads(text)
    except (json.JSONDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        kind, fault = "YAML" if is_yaml else "JSON", " ".join(str(error).split())
        raise RunError(f"{path} is not valid {kind} ({fault}); mend or remove it") from error
    if not isinstance(value, dict):
        lines = "`key: value` lines" if is_yaml else "a JSON object"
        raise RunError(f"{path}: expected {lines}, found {type(value).__name__}")
    return value
