"""Models, modes and baselines on collections: everything is checked before anything is computed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

from ..data.collection import Collection
from ..data.load import load_collection
from ..data.mapped import MappedDocuments
from ..errors import ConfigError
from ..files import write_json, write_text
from ..model.encoder import SearchR3
from ..model.modes.first import has_auto
from ..model.modes.latent import trained_modes
from ..model.prompts import Mode
from ..retrieval.tokens import AUTO, LexicalTokens
from ..types import Watch
from . import instructions
from .baselines import (
    BM25_NAME,
    SENTENCE_TRANSFORMERS,
    UNSTEMMED,
    BM25System,
    PeerModel,
    SentenceTransformersSystem,
)
from .benchmark import EvaluationOptions, evaluate, measured, resolve_splits
from .instructions import NONE, OWN
from .results import Result, SystemInfo, plain
from .runs import check_ids
from .significance import Comparison, compare
from .systems import Effort, EncodedCollections, SearchR3System, System, short_name
from .table import averages, markdown, summary

REASONING_NAME, BOTH_NAME = "bm25+reasoning", "bm25+query+reasoning"
"""BM25 on what a model wrote, instead of the query and after it."""
RESULTS = "results"
"""Where in the folder of an evaluation, or of a run, its results are."""
RUNS = "runs"
"""Where rankings and judgements are in TREC's formats."""
SUMMARY = "summary.json"
"""What the last command into the folder of an evaluation found."""


@dataclass(frozen=True)
class FrontierOptions:
    """What is measured of a frontier beside the modes.

    Attributes:
        budgets: tokens that a reply may have, the embed token included.
        samples: numbers of replies whose vectors' mean is taken.
    """

    budgets: Sequence[int] = (8, 16, 32)
    samples: Sequence[int] = (4,)

    def efforts(self) -> dict[str, Effort]:
        """Suffix of the reason mode's name -> effort."""
        cut = {f"reason {budget} tokens": Effort(budget=budget) for budget in dict.fromkeys(self.budgets)}
        return cut | {f"reason mean of {count}": Effort(samples=count) for count in dict.fromkeys(self.samples)}


@dataclass(frozen=True)
class EvaluationPlan:
    """What is evaluated on what.

    Attributes:
        models: label -> directory or hub id; the label of a single one may be empty.
        modes: of each model.
        baselines: `bm25`, `bm25-unstemmed`, `bm25+reasoning`, `bm25+query+reasoning`, `sentence-transformers:NAME`.
        collections: built-in names, folders or hub ids.
        splits: names, `all`, or none for `test` (else `dev`, `validation`, `train`).
        options: how results are computed.
        batch_size: queries reasoned about at once.
        loading: what `SearchR3` takes beside a model: `device`, `dtype`, `prompts`, ...; peers take the first two.
        instructions: of the queries, each a system of its own: `own`, `none` or a text (`instructions.choose`). Without
            any, `own`, and also `none` on the splits whose queries have their own, unless the collection measures how
            rankings follow them (p-MRR).
        document_instruction: of the documents.
        language: of the texts, for BM25 (`LexicalTokens`).
        follow_mteb: leave documents with the id of their query out where mteb does; else `options` say so.
        write_runs: also write rankings and judgements in TREC's formats.
        frontier: also measure the modes with less and with more effort, and mode auto where there is a gate.
        index: the documents of the one collection as the one model has encoded them (`encode_corpus`).
        index_type: how the vectors of models are searched otherwise.
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
    language: str = AUTO
    follow_mteb: bool = False
    write_runs: bool = False
    frontier: FrontierOptions | None = None
    index: Path | None = None
    index_type: Literal["exact", "hnsw"] = "exact"


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
        ConfigError: an unknown baseline or language, a baseline without what it needs, or two collections of one name;
            before anything is computed.
        DataError: a collection that cannot be read, or lacks a split; before anything is computed.
    """
    _check_baselines(plan)
    if plan.index is not None and (len(plan.models), len(plan.collections)) != (1, 1):
        raise ConfigError(f"the index {plan.index} is of one collection and one model; evaluate these alone")
    options, held = _check_collections(plan)
    place = folder / "indexes", plan.document_instruction
    models = {
        label: EncodedCollections(
            SearchR3(source, **plan.loading), *place, index=plan.index, index_type=plan.index_type
        )
        for label, source in plan.models.items()
    }
    systems = _systems(plan, models)
    runs = folder / RUNS if plan.write_runs else None
    for source in plan.collections:
        collection = held.pop(source, None) or load_collection(source, skip_empty_documents=True)
        run = partial(evaluate, options=options[source], source=source, folder=folder / RESULTS, watch=watch, runs=runs)
        for split in resolve_splits(collection, plan.splits):
            asked = plan.instructions or instructions.choices(collection, split)
            for system in systems:
                if system.info.kind != "bm25" and system.info.settings.get("instruction", OWN) not in asked:
                    continue
                yield (result := run(system, collection, split))
                if result.system.mode == "reason" and not result.system.varied:
                    for name in (REASONING_NAME, BOTH_NAME):
                        if name in plan.baselines:
                            lexical = reasoning_baseline(result, baseline=name, language=plan.language)
                            yield run(lexical, collection, split)
        for collections in models.values():
            collections.forget(collection)


def _check_collections(plan: EvaluationPlan) -> tuple[dict[str, EvaluationOptions], dict[str, Collection]]:
    """Source -> how it is measured; raises where one cannot be. And those read that need not be read again.

    Of several whose documents are in memory none is held, lest all are.
    """
    sources: dict[str, str] = {}
    options, held = dict[str, EvaluationOptions](), dict[str, Collection]()
    for source in plan.collections:
        collection = load_collection(source, skip_empty_documents=True, mapped=True)
        if isinstance(collection.documents, MappedDocuments) or len(plan.collections) == 1:
            held[source] = collection
        name = plain(collection.name)
        if name in sources:
            pair = f"{sources[name]} and {source}"
            raise ConfigError(f"two collections are called {name!r} in files: {pair}; evaluate them into two folders")
        sources[name] = source
        for split in resolve_splits(collection, plan.splits):
            measured(collection, split, plan.options)
        if plan.write_runs:
            check_ids(collection)
        options[source] = _identical_ids(plan, source, collection)
    return options, held


def _identical_ids(plan: EvaluationPlan, source: str, collection: Collection) -> EvaluationOptions:
    if not plan.follow_mteb:
        return plan.options
    from .mteb_tasks import leaves_out_identical_ids

    rule: Literal["beir", "keep"] = "beir" if leaves_out_identical_ids(source, collection) else "keep"
    return replace(plan.options, identical_ids=rule)


def reasoning_baseline(
    result: Result, name: str | None = None, *, baseline: str = REASONING_NAME, language: str = AUTO
) -> BM25System:
    """BM25 on what a model wrote about the queries: what is left of its gain if only the words count.

    Args:
        result: of a mode that reasons.
        name: as in the tables; by default that of the baseline, with the label of the model.
        baseline: `bm25+reasoning`, or `bm25+query+reasoning`, which searches the query and what was written after it.
        language: as of `LexicalTokens`.
    """
    texts = dict(zip(result.query_ids, result.reasoning, strict=True))
    origin = result.key
    if baseline == BOTH_NAME:
        origin = f"{BOTH_NAME} {origin}"
        texts = {one: f"{query} {texts[one]}" for one, query in zip(result.query_ids, result.queries, strict=True)}
    name = name or baseline + result.system.name.removeprefix("reason")
    return BM25System(name, texts, origin, result.cost, language=language)


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
    choices = [BM25_NAME, UNSTEMMED, REASONING_NAME, BOTH_NAME, SENTENCE_TRANSFORMERS + "NAME"]
    for name in plan.baselines:
        if name not in choices[:-1] and not (name.startswith(SENTENCE_TRANSFORMERS) and name != SENTENCE_TRANSFORMERS):
            nearest = difflib.get_close_matches(name, choices, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(choices)}"
            raise ConfigError(f"unknown baseline {name!r}; {hint}")
    for name in (REASONING_NAME, BOTH_NAME):
        if name in plan.baselines and not (plan.models and "reason" in plan.modes):
            raise ConfigError(f"{name} searches what a model wrote; add --model and --modes reason")
    if lexical := [name for name in plan.baselines if name.startswith(BM25_NAME)]:
        LexicalTokens(plan.language, stemmed=lexical != [UNSTEMMED])
    if plan.frontier is not None and not plan.models:
        raise ConfigError("--frontier is of models; add --model")
    if not plan.models and not plan.baselines:
        raise ConfigError("nothing to evaluate; give --model, --baselines, or both")


def _ways(plan: EvaluationPlan, model: SearchR3) -> list[tuple[str, Mode, Effort]]:
    """Name, mode and effort of all that is measured of one model."""
    modes = [*plan.modes]
    if plan.frontier is not None:
        modes += [mode for mode in trained_modes(model.backbone) if mode not in modes]
        if has_auto(model.backbone) and "auto" not in modes:
            modes.append("auto")
    ways: list[tuple[str, Mode, Effort]] = [(mode, mode, Effort()) for mode in modes]
    if plan.frontier is not None:
        ways += [(name, "reason", effort) for name, effort in plan.frontier.efforts().items()]
    return ways


def _systems(plan: EvaluationPlan, models: Mapping[str, EncodedCollections]) -> list[System]:
    """All systems but those that wait for another's reasoning, with names that tell them apart."""
    systems: list[System] = [
        BM25System(name, language=plan.language, stemmed=name == BM25_NAME)
        for name in (BM25_NAME, UNSTEMMED)
        if name in plan.baselines
    ]
    chosen = plan.instructions or (OWN, NONE)
    for baseline in plan.baselines:
        if baseline.startswith(SENTENCE_TRANSFORMERS):
            precision = {name: plan.loading[name] for name in ("device", "dtype") if name in plan.loading}
            peer = PeerModel(baseline.removeprefix(SENTENCE_TRANSFORMERS), **precision)
            name = Path(peer.source).name
            systems += [SentenceTransformersSystem(peer, name + instructions.label(one), one) for one in chosen]
    for label, collections in models.items():
        for (title, mode, effort), choice in product(_ways(plan, collections.model), chosen):
            name = (f"{title}/{label}" if label else title) + instructions.label(choice)
            systems.append(SearchR3System(collections, mode, name, plan.batch_size, choice, effort))
    named: dict[str, SystemInfo] = {}
    for info in (system.info for system in systems):
        other = named.setdefault(info.name, info)
        if other.model != info.model:
            pair = f"{other.model} and {info.model}"
            raise ConfigError(f"two systems are called {info.name!r}: {pair}; rename a folder, or leave one out")
        if other != info:
            raise ConfigError(f"two instructions begin alike and are both called {info.name!r}; leave one out")
    return systems
