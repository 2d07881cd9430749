"""The model card: README.md of a model on the hub, written from what the files of its run say and from nothing else.

The words are in card.md.jinja, the front matter in the hub's own format (`ModelCardData`, `model-index`); a number that
no file holds is left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path, PureWindowsPath
from statistics import fmean
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from ..evaluation.instructions import INSTRUCTIONS
from ..evaluation.results import package_versions
from ..evaluation.table import AVERAGED, markdown
from ..retrieval.metrics import MAIN
from .facts import BEFORE_RL, STAGES, Facts

TAGS = ("search-r3", "retrieval", "reasoning", "sentence-similarity")
PIPELINE = "feature-extraction"
WINDOW = 10
"""Steps whose mean stands for the end of a training: single steps are noisy."""
UNUSED = ("name", "run_dir", "base_model", "evaluation", "trackers")
"""Settings that did not form the model, or that name places on a machine."""
_MARK = "<!-- written by search-r3 push, sha256 "


def model_card(facts: Facts, repo_id: str, license_id: str | None = None) -> str:
    """README.md for a model folder.

    Args:
        facts: of the model, as `gather_facts` read them.
        repo_id: `owner/name` of the model on the hub.
        license_id: as the hub spells it, e.g. `apache-2.0`; no file says it.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(  # noqa: S701 - Markdown, not HTML
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["source"] = lambda source, kind="": _link(facts, str(source), kind)
    unused = (*UNUSED, *(stage for stage in STAGES if stage not in facts.metrics))
    recipe = {key: _without_folders(facts, value) for key, value in facts.recipe.items() if key not in unused}
    text = environment.get_template("card.md.jinja").render(
        facts=facts,
        settings=facts.settings,
        size=facts.config.get("hidden_size"),
        repo_id=repo_id,
        name=repo_id.rpartition("/")[2],
        front_matter=_front_matter(facts, repo_id, license_id).to_yaml(),
        prompts=json.dumps(facts.settings.prompts.model_dump(), indent=2, ensure_ascii=False),
        courses={stage: _course(rows) for stage, rows in facts.metrics.items() if rows},
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip("\n"),
        before_rl=BEFORE_RL,
        earlier=any(BEFORE_RL in result.system.name for result in facts.results),
        tables=markdown(facts.results, facts.comparisons),
        rollouts=facts.report.get("rollouts", {}),
        collections=[result.collection for result in {one.place: one for one in facts.own}.values()],
        evaluated=_evaluations(facts),
        version=package_versions().get("search-r3", ""),
    )
    return f"{text}{_MARK}{_digest(text)} -->\n"


def is_own_card(text: str) -> bool:
    """Whether `model_card` wrote this text and nobody changed it since."""
    body, mark, end = text.partition(_MARK)
    return bool(mark) and end.strip() == f"{_digest(body)} -->"


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def _front_matter(facts: Facts, repo_id: str, license_id: str | None) -> ModelCardData:
    results = [
        EvalResult(
            task_type="information-retrieval",
            task_name="Information retrieval",
            dataset_type=facts.hub_id(result.collection.source) or result.collection.name,
            dataset_name=result.collection.name,
            dataset_split=result.collection.split,
            dataset_args={"sha256": result.collection.hash},
            metric_type=measure.replace("@", "_at_"),
            metric_name=f"{measure}, {result.system.name}" + (", a sample" if result.collection.sample_of else ""),
            metric_value=result.scores[measure],
            metric_args={
                "mode": result.system.mode,
                **{key: result.system.settings[key] for key in INSTRUCTIONS if key in result.system.settings},
                "interval_95": list(result.intervals[measure]),
                **({"sample_of": result.collection.sample_of} if result.collection.sample_of else {}),
            },
        )
        for result in facts.own
        for measure in AVERAGED
        if measure in result.scores
    ]
    datasets = facts.hub_id(str(facts.recipe.get("collection", "")))
    return ModelCardData(
        # Not `transformers`: the code that the hub would show for it gives no search vectors.
        library_name="peft" if facts.adapter else "search-r3",
        pipeline_tag=PIPELINE,
        tags=list(TAGS),
        base_model=facts.hub_id(facts.base),
        datasets=[datasets] if datasets else None,
        license=license_id,
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )


def _course(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How one stage went: its length, each logged value at its beginning and at its end, and its dev evaluations."""
    steps = [row for row in rows if row["step"] > 0]
    last = steps[-WINDOW:]
    decided = [row for row in rows if f"dev_{MAIN}_reason" in row]
    keys = {key for row in last for key, value in row.items() if isinstance(value, int | float)}
    return {
        "steps": steps[-1]["step"] if steps else 0,
        "window": len(last),
        "best": max(decided, key=lambda row: row[f"dev_{MAIN}_reason"])["step"] if decided else None,
        "seconds": sum(row.get("seconds", 0) for row in steps),
        "first": {key: next(row[key] for row in steps if key in row) for key in keys},
        "last": {key: fmean(row[key] for row in last if key in row) for key in keys},
        "dev": {key: [row for row in rows if key in row] for key in (f"dev_{MAIN}_direct", f"dev_{MAIN}_reason")},
    }


def _evaluations(facts: Facts) -> dict[str, list[str]]:
    """With which versions, on which machines and when the model was evaluated."""
    records = [result.provenance for result in facts.own]
    versions = [record.get("versions", {}) for record in records]
    packages = ("search-r3", "torch", "transformers")
    table = {
        "with": [f"{name} {each[name]}" for name in packages for each in versions if name in each],
        "on": [", ".join(str(each[key]) for key in ("device", "machine") if key in each) for each in records],
        "at": [str(each["date"]) for each in records if "date" in each],
    }
    return {heading: list(dict.fromkeys(filter(None, values))) for heading, values in table.items()}


def _link(facts: Facts, source: str, kind: str = "") -> str:
    """A model or a collection in words; of a folder only its last name."""
    if source == "builtin":
        return "the small model that the package carries"
    if (hub_id := facts.hub_id(source)) is not None:
        return f"[{source}](https://huggingface.co/{kind}{hub_id})"
    return f"`{_last_name(source)}`" if source else ""


def _without_folders(facts: Facts, value: Any) -> Any:
    """Settings without the folders of a machine: of each only its last name."""
    if isinstance(value, dict):
        return {key: _without_folders(facts, inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(facts, inner) for inner in value]
    return _last_name(value) if isinstance(value, str) and facts.hub_id(value) is None else value


def _last_name(source: str) -> str:
    is_path = "/" in source or "\\" in source
    return (PureWindowsPath(source).name or source) if is_path else source
