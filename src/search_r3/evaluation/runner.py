"""Models, modes and baselines on collections: everything is checked before anything is computed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..data.load import load_collection
from ..errors import ConfigError
from ..files import write_json, write_text
from ..model.encoder import SearchR3
from ..model.prompts import Mode
from ..types import Watch
from . import instructions
from .benchmark import EvaluationOptions, evaluate, judged, resolve_splits
from .instructions import NONE, OWN
from .results import Result, SystemInfo
from .significance import Comparison, compare
from .systems import (
    SENTENCE_TRANSFORMERS,
    BM25System,
    EncodedCollections,
    SearchR3System,
    SentenceTransformersSystem,
    System,
    short_name,
)
from .table import averages, markdown, summary

BM25_NAME, REASONING_NAME = "bm25", "bm25+reasoning"
RESULTS = "results"
"""Where in the folder of an evaluation, or of a run, its results are."""
SUMMARY = "summary.json"
"""What the last command into the folder of an evaluation found."""


@dataclass(frozen=True)
class EvaluationPlan:
    """What is evaluated on what.

    Attributes:
        models: label -> directory or hub id; the label of a single one may be empty.
        modes: of each model.
        baselines: `bm25`, `bm25+reasoning`, `sentence-transformers:NAME`.
        collections: built-in names, folders or hub ids.
        splits: names, `all`, or none for `test` (else `dev`, `validation`, `train`).
        options: how results are computed.
        batch_size: queries reasoned about at once.
        loading: what `SearchR3` takes beside a model: `device`, `dtype`, `prompts`, ...
        instructions: of the queries, each a system of its own: `own`, `none` or a text (`instructions.choose`). Without
            any, `own`, and also `none` on the splits whose queries have their own, unless the collection measures how
            rankings follow them (p-MRR).
        document_instruction: of the documents.
    """

    models: dict[str, str]
    modes: Sequence[Mode]
    baselines: Sequence[str]
    collections: Sequence[str]
    splits: Sequence[str] = ()
    options: EvaluationOptions = field(default_factory=EvaluationOptions)
    batch_size: int = 128
    loading: Mapping[str, Any] = field(default_factory=dict)
    instructions: Sequence[str] = ()
    document_instruction: str = ""


def label_models(sources: Sequence[str]) -> dict[str, str]:
    """Label -> source of models: none for a single one, else what `LABEL=SOURCE` says, or a name from the path.

    Example:
        >>> label_models(["runs/a/sft/model", "best=runs/a/model"])
        {'sft': 'runs/a/sft/model', 'best': 'runs/a/model'}

    Raises:
        ConfigError: two models with one label.
    """
    labels: dict[str, str] = {}
    for model in sources:
        label, equals, source = model.partition("=")
        if not equals or "/" in label or Path(model).exists():
            label, source = short_name(model), model
        if label in labels:
            raise ConfigError(f"two models are called {label!r}; name them: --model NAME={source}")
        labels[label] = source
    return {"": sources[0]} if list(labels.values()) == list(sources) and len(sources) == 1 else labels


def run_plan(plan: EvaluationPlan, folder: Path, watch: Watch | None = None) -> Iterator[Result]:
    """Evaluate, collection by collection; each result is on the disk before it is given.

    Args:
        plan: what is evaluated.
        folder: where results are looked up and written.
        watch: told of the progress.

    Raises:
        ConfigError: an unknown baseline, one without what it needs, or two collections of one name; before anything
            is computed.
        DataError: a collection that cannot be read, or lacks a split; before anything is computed.
    """
    _check_baselines(plan)
    source_of: dict[str, str] = {}
    for source in plan.collections:
        collection = load_collection(source, skip_empty_documents=True)
        if collection.name in source_of:
            pair = f"{source_of[collection.name]} and {source}"
            raise ConfigError(f"two collections are called {collection.name!r}: {pair}; evaluate them into two folders")
        source_of[collection.name] = source
        for split in resolve_splits(collection, plan.splits):
            judged(collection, split)
    models = {
        label: EncodedCollections(SearchR3(source, **plan.loading), folder / "indexes", plan.document_instruction)
        for label, source in plan.models.items()
    }
    systems = _systems(plan, models)
    for source in plan.collections:
        collection = load_collection(source, skip_empty_documents=True)
        run = partial(evaluate, options=plan.options, source=source, folder=folder / RESULTS, watch=watch)
        for split in resolve_splits(collection, plan.splits):
            asked = plan.instructions or instructions.choices(collection, split)
            for system in systems:
                if system.info.kind == "search-r3" and system.info.settings.get("instruction", OWN) not in asked:
                    continue
                yield (result := run(system, collection, split))
                if REASONING_NAME in plan.baselines and result.system.mode == "reason":
                    yield run(reasoning_baseline(result), collection, split)
        for collections in models.values():
            collections.forget(collection)


def reasoning_baseline(result: Result, name: str | None = None) -> BM25System:
    """BM25 on what a model wrote about the queries: what is left of its gain if only the words count.

    Args:
        result: of a mode that reasons.
        name: as in the tables; by default `bm25+reasoning`, with the label of the model.
    """
    texts = dict(zip(result.query_ids, result.reasoning, strict=True))
    name = name or REASONING_NAME + result.system.name.removeprefix("reason")
    return BM25System(name, texts, result.key, result.cost)


def write_summary(results: Sequence[Result], folder: Path, permutations: int, seed: int) -> list[Comparison]:
    """Write `summary.json` and `summary.md` over these results; returns the comparisons in them."""
    comparisons = compare(results, permutations, seed)
    rows = [
        {"collection": result.collection.name, "split": result.collection.split, "system": result.system.name}
        | summary(result, results)
        | {"key": result.key}
        for result in results
    ]
    record = {
        "rows": rows,
        "means": averages(results),
        "comparisons": [comparison.record() for comparison in comparisons],
    }
    write_json(folder / SUMMARY, record)
    write_text(folder / "summary.md", markdown(results, comparisons))
    return comparisons


def _check_baselines(plan: EvaluationPlan) -> None:
    choices = [BM25_NAME, REASONING_NAME, SENTENCE_TRANSFORMERS + "NAME"]
    for name in plan.baselines:
        if name not in choices[:2] and not (name.startswith(SENTENCE_TRANSFORMERS) and name != SENTENCE_TRANSFORMERS):
            nearest = difflib.get_close_matches(name, choices, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(choices)}"
            raise ConfigError(f"unknown baseline {name!r}; {hint}")
    if REASONING_NAME in plan.baselines and not (plan.models and "reason" in plan.modes):
        raise ConfigError(f"{REASONING_NAME} searches what a model wrote; add --model and --modes reason")
    if not plan.models and not plan.baselines:
        raise ConfigError("nothing to evaluate; give --model, --baselines, or both")


def _systems(plan: EvaluationPlan, models: Mapping[str, EncodedCollections]) -> list[System]:
    """All systems but those that wait for another's reasoning, with names that tell them apart."""
    systems: list[System] = [BM25System()] if BM25_NAME in plan.baselines else []
    for name in plan.baselines:
        if name.startswith(SENTENCE_TRANSFORMERS):
            systems.append(SentenceTransformersSystem(name.removeprefix(SENTENCE_TRANSFORMERS)))
    for label, collections in models.items():
        for mode in plan.modes:
            for choice in plan.instructions or (OWN, NONE):
                name = (f"{mode}/{label}" if label else mode) + instructions.label(choice)
                systems.append(SearchR3System(collections, mode, name, plan.batch_size, choice))
    named: dict[str, SystemInfo] = {}
    for info in (system.info for system in systems):
        other = named.setdefault(info.name, info)
        if other.model != info.model:
            pair = f"{other.model} and {info.model}"
            raise ConfigError(f"two systems are called {info.name!r}: {pair}; rename a folder, or leave one out")
        if other != info:
            raise ConfigError(f"two instructions begin alike and are both called {info.name!r}; leave one out")
    return systems
