"""One system on one split: rankings, measures query by query, cost, provenance; what is known already is not redone."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median

import numpy as np

from ..data.collection import Collection, Qrels
from ..data.restrictions import IdenticalIds
from ..errors import ConfigError, DataError, ModelError
from ..retrieval.lexical import Scored
from ..retrieval.metrics import DEPTH, MEASURES, measure, p_mrr, relevant_ids
from ..retrieval.ranking import RankRequest, make_requests
from ..types import Watch
from .results import (
    ENGINE,
    FORMAT,
    UNKNOWN,
    CollectionInfo,
    Cost,
    Result,
    SystemInfo,
    find_result,
    load_result,
    provenance,
    result_name,
    save_result,
)
from .runs import run_path, write_qrels, write_run
from .significance import bootstrap_intervals
from .systems import Answers, Ranking, Searchable, System

TOP = 10
"""Documents of each ranking that a result keeps."""
SNIPPET = 240
"""Characters of a document that a result keeps."""
CHANGED_DEPTH = 1000
"""Least depth where a changed instruction is measured: p-MRR compares ranks far down (as mteb does)."""
CHANGED_MEASURES = ("ndcg@5", "ndcg@10", "map")
"""What is also measured after the changed instructions (FollowIR), as `changed/...`."""
ABSENT = "(not in the corpus)"
"""What stands for the text of a document that was judged and is not there."""


@dataclass(frozen=True)
class EvaluationOptions:
    """How results are computed.

    Attributes:
        depth: documents ranked for each query; measures that look deeper are not computed.
        identical_ids: what becomes of a document that bears the id of its query.
        latency_queries: queries asked one at a time, evenly spread over the split; 0 measures no latency.
        bootstrap: resamples of the intervals.
        seed: of the resampling and of the sample.
        queries: size of a random sample of each split's queries; 0 measures all.
    """

    depth: int = DEPTH
    identical_ids: IdenticalIds = "unless-relevant"
    latency_queries: int = 16
    bootstrap: int = 1000
    seed: int = 0
    queries: int = 0

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
    runs: Path | None = None,
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
        runs: folder for the rankings and the judgements in TREC's formats; where a known result has no rankings there,
            it is computed again.

    Raises:
        DataError: no such split, no query in it has a relevant document, or a damaged result in the folder.
        ModelError: the model gives NaN, or never emits the embed token in reason mode.
    """
    options = options or EvaluationOptions()
    key = _key(system.info, collection, split, options)
    name = system.info.name
    path = find_result(folder, collection.name, split, name, key) if folder is not None else None
    run = runs and run_path(runs, result_name(collection.name, split, name, key))
    if path is not None and (run is None or run.exists()):
        result = load_result(path)
        if result.key != key:
            raise DataError(f"{path} holds a result of another evaluation; remove it and evaluate again")
        if result.system.name == name:
            return result
        result = result.renamed(name)
    else:
        result, rankings = _measure_system(system, collection, split, options, source or collection.name, key, watch)
        if runs is not None:
            write_qrels(runs, result, measured(collection, split, options))
            write_run(runs, result, rankings)
    if folder is not None:
        save_result(result, folder)
    return result


def _key(info: SystemInfo, collection: Collection, split: str, options: EvaluationOptions) -> str:
    """The hash of all that a result depends on: not what the model is called or where it lies, but what it holds."""
    facts = {
        "format": FORMAT,
        "versions": [ENGINE, version("search-r3"), "" if info.kind == "bm25" else version("transformers")],
        "system": info.model_dump(exclude={"name"} if info.revision == UNKNOWN else {"name", "model"}),
        "collection": [collection.content_hash(), split],
        "settings": asdict(options),
    }
    if info.mode == "auto" and options.latency_queries:
        facts["milliseconds"] = "mean"  # so that no stored median is taken for it
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def judged(collection: Collection, split: str) -> Qrels:
    """The queries of a split that have a relevant document, with all their judgements (`Collection.judgements`).

    Raises:
        DataError: there is no such split, or no such query in it.
    """
    qrels = {query_id: gains for query_id, gains in collection.judgements(split).items() if relevant_ids(gains)}
    if not qrels:
        raise DataError(f"no query of split {split!r} in {collection.name!r} has a relevant document")
    return qrels


def measured(collection: Collection, split: str, options: EvaluationOptions) -> Qrels:
    """The queries that are measured: of those judged, where instructions change, with the original ones; a sample.

    Raises:
        DataError: as `judged`, or all of these have changed instructions.
    """
    qrels = _originals(collection, judged(collection, split))
    if not qrels:
        raise DataError(f"no query of split {split!r} in {collection.name!r} has its original instruction")
    if 0 < options.queries < len(qrels):
        chosen = set(random.Random(options.seed).sample(sorted(qrels), options.queries))
        return {query_id: gains for query_id, gains in qrels.items() if query_id in chosen}
    return qrels


def _originals(collection: Collection, qrels: Qrels) -> Qrels:
    """The judgements without those of queries whose instruction was changed."""
    changed = {f"{query}-changed" for query in collection.changed}
    return {query_id: gains for query_id, gains in qrels.items() if query_id not in changed}


def _measure_system(
    system: System,
    collection: Collection,
    split: str,
    options: EvaluationOptions,
    source: str,
    key: str,
    watch: Watch | None,
) -> tuple[Result, list[Ranking]]:
    """The result, and all rankings in the order of its queries."""
    qrels = measured(collection, split, options)
    requests = make_requests(collection, qrels, options.identical_ids)
    depth = max(options.depth, CHANGED_DEPTH) if collection.changed else options.depth
    label = system.info.name
    started = time.perf_counter()
    index = system.index(collection, watch(f"{label}: documents", len(collection.documents)) if watch else None)
    ready = time.perf_counter()
    answers = index.answer(requests, depth, watch(f"{label}: queries", len(requests)) if watch else None)
    end = time.perf_counter()
    if answers.forced and all(answers.forced) and "budget" not in system.info.settings:
        settings = system.info.settings
        raise ModelError(
            f"{system.info.model} emitted {settings['embed_token']} for none of {len(requests)} queries within "
            f"{settings['max_new_tokens']} tokens; train stage 1 (search-r3 sft) first, or evaluate the mode direct"
        )
    rankings = _doc_ids(requests, answers.rankings)
    per_query = _per_query(rankings, qrels, depth)
    scores = {name: fmean(values) for name, values in per_query.items()}
    intervals = bootstrap_intervals(per_query, options.bootstrap, options.seed)
    followed, more = _changed(collection, split, index, rankings, depth, options)
    if followed:
        scores["p-mrr"] = fmean(followed)
        scores |= more
        intervals |= bootstrap_intervals({"p-mrr": followed}, options.bootstrap, options.seed)
    latency = _latency(index, requests, depth, options.latency_queries, system.info.mode)
    top = [ranking.best(TOP) for ranking in answers.rankings]
    relevant = [{doc_id: gain for doc_id, gain in gains.items() if gain > 0} for gains in qrels.values()]
    result = Result(
        key=key,
        system=system.info,
        collection=_collection_info(collection, split, source, requests, qrels),
        settings=asdict(options) | {"depth": depth},
        scores=scores,
        intervals=intervals,
        cost=_cost(system, answers, len(requests) / (end - ready), latency, index),
        query_ids=list(qrels),
        queries=[request.text for request in requests],
        per_query=per_query,
        top=top,
        relevant=relevant,
        snippets=_snippets(collection, top, relevant),
        reasoning=answers.reasoning,
        reasoning_tokens=answers.reasoning_tokens,
        thought=answers.thought,
        gate=answers.gate,
        notes=answers.notes,
        provenance=provenance() | {"seconds": {"documents": ready - started, "queries": end - ready}},
    )
    return result, answers.rankings


def _doc_ids(requests: Sequence[RankRequest], rankings: Sequence[Ranking]) -> dict[str, list[str]]:
    return {request.query_id: ranking.doc_ids for request, ranking in zip(requests, rankings, strict=True)}


def _per_query(rankings: Mapping[str, Sequence[str]], qrels: Qrels, depth: int) -> dict[str, list[float]]:
    """Measure -> its value for each query, for the measures that look no deeper than the rankings reach."""
    rows = [measure(rankings[query_id], gains) for query_id, gains in qrels.items()]
    names = [name for name in MEASURES if int(name.partition("@")[2] or 0) <= depth]
    return {name: [row[name] for row in rows] for name in names}


def _collection_info(
    collection: Collection, split: str, source: str, requests: Sequence[RankRequest], qrels: Qrels
) -> CollectionInfo:
    every = len(_originals(collection, judged(collection, split)))
    return CollectionInfo(
        name=collection.name,
        split=split,
        source=source,
        hash=collection.content_hash(),
        documents=len(collection.documents),
        queries=len(qrels),
        sample_of=every if len(qrels) < every else 0,
        without_relevant=len(_originals(collection, collection.judgements(split))) - every,
        absent=collection.count_absent(split),
        dropped=collection.dropped,
        without_text=collection.without_text,
        identical_ids=sum(request.query_id in request.left_out for request in requests),
    )


def _cost(system: System, answers: Answers, speed: float, latency: float | None, index: Searchable) -> Cost:
    """The price of a system, with that of what it searches for where another system wrote it."""
    before = system.before
    if before is not None:
        speed = 1 / (1 / speed + 1 / before.queries_per_second)
        latency = None if latency is None or before.ms_per_query is None else latency + before.ms_per_query
    return Cost(
        queries_per_second=speed,
        ms_per_query=latency,
        documents_per_second=index.documents_per_second,
        tokens_per_query=fmean(answers.reasoning_tokens or [0]) if before is None else before.tokens_per_query,
        thinking_share=fmean(answers.thought) if answers.thought else None,
        forced_share=fmean(answers.forced or [0]),
        truncated_queries=answers.truncated,
        truncated_documents=index.truncated_documents,
    )


def _latency(index: Searchable, requests: Sequence[RankRequest], depth: int, count: int, mode: str) -> float | None:
    """Milliseconds of queries asked one at a time: the median; in mode auto the mean.

    A query takes either direct's or reason's time there, so the median would be one of the two, whatever the share.
    """
    if not count:
        return None
    seconds = []
    for i in np.linspace(0, len(requests) - 1, min(count, len(requests))).round().astype(int):
        started = time.perf_counter()
        index.answer([requests[i]], depth)
        seconds.append(time.perf_counter() - started)
    return 1000 * (fmean(seconds) if mode == "auto" else median(seconds))


def _changed(
    collection: Collection,
    split: str,
    index: Searchable,
    rankings: Mapping[str, Sequence[str]],
    depth: int,
    options: EvaluationOptions,
) -> tuple[list[float], dict[str, float]]:
    """p-MRR of each query that stands in the split with both of its instructions, and means after the changed ones.

    Where the changed instruction leaves no relevant document, the query has no nDCG, but its ranking counts here.
    """
    qrels = collection.judgements(split)
    lost = {
        query: doc_ids
        for query, doc_ids in collection.changed.items()
        if f"{query}-og" in qrels and f"{query}-changed" in qrels and (f"{query}-og" in rankings or not options.queries)
    }
    unranked = {f"{query}-{kind}": qrels[f"{query}-{kind}"] for query in lost for kind in ("og", "changed")}
    unranked = {query_id: gains for query_id, gains in unranked.items() if query_id not in rankings}
    if unranked:
        requests = make_requests(collection, unranked, options.identical_ids)
        rankings = {**rankings, **_doc_ids(requests, index.answer(requests, depth).rankings)}
    before, after = ({query: rankings[f"{query}-{kind}"] for query in lost} for kind in ("og", "changed"))
    judged_changed = {f"{query}-changed": qrels[f"{query}-changed"] for query in lost}
    judged_changed = {query_id: gains for query_id, gains in judged_changed.items() if relevant_ids(gains)}
    means = {}
    if judged_changed:
        values = _per_query(rankings, judged_changed, depth)
        means = {f"changed/{name}": fmean(values[name]) for name in CHANGED_MEASURES}
    return list(p_mrr(before, after, lost).values()), means


def _snippets(collection: Collection, top: Sequence[Scored], relevant: Sequence[Mapping[str, int]]) -> dict[str, str]:
    doc_ids = {doc_id for ranking in top for doc_id, _ in ranking}.union(*relevant)
    documents = collection.documents
    return {
        doc_id: documents[doc_id].full_text[:SNIPPET] if doc_id in documents else ABSENT for doc_id in sorted(doc_ids)
    }
