"""One system on one split: rankings, measures query by query, cost, provenance; what is known already is not redone."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from ..data.collection import Collection, Qrels
from ..errors import ConfigError, DataError, ModelError
from ..retrieval.lexical import Scored
from ..retrieval.metrics import MEASURES, measure, p_mrr, relevant_ids
from ..retrieval.ranking import RankRequest, make_requests
from ..types import Watch
from .results import FORMAT, UNKNOWN, CollectionInfo, Cost, Result, SystemInfo, find_result, load_result, save_result
from .significance import bootstrap_intervals
from .systems import Answers, Searchable, System

PACKAGES = (
    "search-r3",
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "bm25s",
    "babel",
    "numpy",
    "sentence-transformers",
)
TOP = 10
"""Documents of each ranking that a result keeps."""
SNIPPET = 240
"""Characters of a document that a result keeps."""
CHANGED_DEPTH = 1000
"""Least depth where a changed instruction is measured: p-MRR compares ranks far down (as mteb does)."""


@dataclass(frozen=True)
class EvaluationOptions:
    """How results are computed.

    Attributes:
        depth: documents ranked for each query.
        keep_identical_ids: rank the document that bears the id of its query. By default it is left out unless it is
            judged relevant, as BEIR does: it is the query itself.
        latency_queries: queries asked one at a time, evenly spread over the split; 0 measures no latency.
        bootstrap: resamples of the intervals.
        seed: of the resampling.
    """

    depth: int = 100
    keep_identical_ids: bool = False
    latency_queries: int = 16
    bootstrap: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.depth < 100:
            raise ConfigError(f"depth={self.depth}: the measures look at 100 documents")


def resolve_splits(collection: Collection, names: Sequence[str]) -> list[str]:
    """The splits to evaluate: those named, all with `all`, or `test`, else `dev`, `validation` or `train` for none.

    Raises:
        DataError: the collection has no such split.
    """
    if list(names) == ["all"]:
        return sorted(collection.qrels)
    if names:
        for name in names:
            collection.split(name)
        return list(dict.fromkeys(names))
    for name in ("test", "dev", "validation", "train"):
        if name in collection.qrels:
            return [name]
    raise DataError(
        f"collection {collection.name!r} has neither test, dev, validation nor train; name a split of it: "
        f"{', '.join(sorted(collection.qrels))}"
    )


def evaluate(
    system: System,
    collection: Collection,
    split: str,
    options: EvaluationOptions | None = None,
    *,
    source: str = "",
    folder: Path | None = None,
    watch: Watch | None = None,
) -> Result:
    """One system on one split.

    Args:
        system: what ranks.
        collection: what is ranked.
        split: the judgements; queries without a relevant document are left out.
        options: how.
        source: where the collection came from, for the record.
        folder: where the result is looked up, and written when it is new; nothing is written without it.
        watch: told of the progress.

    Raises:
        DataError: no such split, no query in it has a relevant document, or a damaged result in the folder.
        ModelError: the model gives NaN, or never emits the embed token in reason mode.
    """
    options = options or EvaluationOptions()
    key = _key(system.info, collection, split, options)
    name = system.info.name
    path = find_result(folder, collection.name, split, name, key) if folder is not None else None
    if path is not None:
        result = load_result(path)
        if result.key != key:
            raise DataError(f"{path} holds a result of another evaluation; remove it and evaluate again")
        if result.system.name == name:
            return result
        result = result.renamed(name)
    else:
        result = _measure_system(system, collection, split, options, source or collection.name, key, watch)
    if folder is not None:
        save_result(result, folder)
    return result


def _key(info: SystemInfo, collection: Collection, split: str, options: EvaluationOptions) -> str:
    """The hash of all that a result depends on: not what the model is called or where it lies, but what it holds."""
    facts = {
        "format": FORMAT,
        "system": info.model_dump(exclude={"name"} if info.revision == UNKNOWN else {"name", "model"}),
        "collection": [collection.content_hash(), split],
        "settings": asdict(options),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def judged(collection: Collection, split: str) -> Qrels:
    """The queries of a split that have a relevant document.

    Raises:
        DataError: there is no such split, or no such query in it.
    """
    qrels = {query_id: gains for query_id, gains in collection.split(split).items() if relevant_ids(gains)}
    if not qrels:
        raise DataError(f"no query of split {split!r} in {collection.name!r} has a relevant document")
    return qrels


def _measure_system(
    system: System,
    collection: Collection,
    split: str,
    options: EvaluationOptions,
    source: str,
    key: str,
    watch: Watch | None,
) -> Result:
    qrels = judged(collection, split)
    requests = make_requests(collection, qrels, options.keep_identical_ids)
    depth = max(options.depth, CHANGED_DEPTH) if collection.changed else options.depth
    label = system.info.name
    started = time.perf_counter()
    index = system.index(collection, watch(f"{label}: documents", len(collection.documents)) if watch else None)
    ready = time.perf_counter()
    answers = index.answer(requests, depth, watch(f"{label}: queries", len(requests)) if watch else None)
    end = time.perf_counter()
    if answers.forced and all(answers.forced):
        settings = system.info.settings
        raise ModelError(
            f"{system.info.model} emitted {settings['embed_token']} for none of {len(requests)} queries within "
            f"{settings['max_new_tokens']} tokens; train stage 1 (search-r3 sft) first, or evaluate the mode direct"
        )
    rankings = {
        request.query_id: [doc_id for doc_id, _ in ranking]
        for request, ranking in zip(requests, answers.rankings, strict=True)
    }
    rows = [measure(rankings[query_id], gains) for query_id, gains in qrels.items()]
    per_query = {name: [row[name] for row in rows] for name in MEASURES}
    scores = {name: fmean(values) for name, values in per_query.items()}
    intervals = bootstrap_intervals(per_query, options.bootstrap, options.seed)
    if p_mrrs := _p_mrr(collection, split, index, rankings, depth, options.keep_identical_ids):
        scores["p-mrr"] = fmean(p_mrrs)
        intervals |= bootstrap_intervals({"p-mrr": p_mrrs}, options.bootstrap, options.seed)
    latency = _latency(index, requests, depth, options.latency_queries)
    top = [ranking[:TOP] for ranking in answers.rankings]
    relevant = [{doc_id: gain for doc_id, gain in gains.items() if gain > 0} for gains in qrels.values()]
    return Result(
        key=key,
        system=system.info,
        collection=_collection_info(collection, split, source, requests, qrels),
        settings=asdict(options) | {"depth": depth},
        scores=scores,
        intervals=intervals,
        cost=_cost(system, answers, len(requests) / (end - ready), latency, index.documents_per_second),
        query_ids=list(qrels),
        queries=[request.text for request in requests],
        per_query=per_query,
        top=top,
        relevant=relevant,
        snippets=_snippets(collection, top, relevant),
        reasoning=answers.reasoning,
        reasoning_tokens=answers.reasoning_tokens,
        provenance=provenance() | {"seconds": {"documents": ready - started, "queries": end - ready}},
    )


def _collection_info(
    collection: Collection, split: str, source: str, requests: Sequence[RankRequest], qrels: Qrels
) -> CollectionInfo:
    return CollectionInfo(
        name=collection.name,
        split=split,
        source=source,
        hash=collection.content_hash(),
        documents=len(collection.documents),
        queries=len(qrels),
        without_text=collection.without_text,
        identical_ids=sum(request.query_id in request.left_out for request in requests),
    )


def _cost(system: System, answers: Answers, speed: float, latency: float | None, indexing: float | None) -> Cost:
    """The price of a system, with that of what it searches for where another system wrote it."""
    before = system.before
    if before is not None:
        speed = 1 / (1 / speed + 1 / before.queries_per_second)
        latency = None if latency is None or before.ms_per_query is None else latency + before.ms_per_query
    return Cost(
        queries_per_second=speed,
        ms_per_query=latency,
        documents_per_second=indexing,
        tokens_per_query=fmean(answers.reasoning_tokens or [0]) if before is None else before.tokens_per_query,
        forced_share=fmean(answers.forced or [0]),
        truncated_queries=answers.truncated,
    )


def _latency(index: Searchable, requests: Sequence[RankRequest], depth: int, count: int) -> float | None:
    """Median milliseconds of queries asked one at a time."""
    if not count:
        return None
    seconds = []
    for i in np.linspace(0, len(requests) - 1, min(count, len(requests))).round().astype(int):
        started = time.perf_counter()
        index.answer([requests[i]], depth)
        seconds.append(time.perf_counter() - started)
    return 1000 * median(seconds)


def _p_mrr(
    collection: Collection,
    split: str,
    index: Searchable,
    rankings: Mapping[str, Sequence[str]],
    depth: int,
    keep_identical_ids: bool,
) -> list[float]:
    """p-MRR of each query that stands in the split with both of its instructions.

    Where the changed instruction leaves no relevant document, the query has no nDCG, but its ranking counts here.
    """
    qrels = collection.split(split)
    lost = {
        query: doc_ids
        for query, doc_ids in collection.changed.items()
        if f"{query}-og" in qrels and f"{query}-changed" in qrels
    }
    pairs = [f"{query}-{kind}" for query in lost for kind in ("og", "changed")]
    unranked: Qrels = {query_id: {} for query_id in pairs if query_id not in rankings}
    if unranked:
        answers = index.answer(make_requests(collection, unranked, keep_identical_ids), depth)
        doc_ids = ([doc_id for doc_id, _ in ranking] for ranking in answers.rankings)
        rankings = {**rankings, **dict(zip(unranked, doc_ids, strict=True))}
    before, after = ({query: rankings[f"{query}-{kind}"] for query in lost} for kind in ("og", "changed"))
    return list(p_mrr(before, after, lost).values())


def _snippets(collection: Collection, top: Sequence[Scored], relevant: Sequence[Mapping[str, int]]) -> dict[str, str]:
    doc_ids = {doc_id for ranking in top for doc_id, _ in ranking}.union(*relevant)
    return {doc_id: collection.documents[doc_id].full_text[:SNIPPET] for doc_id in sorted(doc_ids)}


def provenance() -> dict[str, Any]:
    """Date, versions and machine of this process."""
    import torch

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": package_versions(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def package_versions() -> dict[str, str]:
    """Python and the packages that results depend on, those that are installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
