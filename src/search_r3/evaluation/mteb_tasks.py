"""Suites of mteb's tasks, parts of them, and collections as tasks."""

from __future__ import annotations

import hashlib
import json
import random
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from statistics import fmean
from typing import Any, cast

from ..data.collection import Collection, Query
from ..data.load import split_name
from ..data.restrictions import Restrictions, restrictions
from ..errors import DataError
from ..extras import extra
from ..retrieval.metrics import p_mrr, rank
from .benchmark import judged

with extra("mteb"):
    import mteb
    from datasets import Dataset
    from mteb import AbsTask, TaskMetadata
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.abstasks.aggregated_task import AbsTaskAggregate

_BRIGHT_SUBSETS = (
    *("Biology", "EarthScience", "Economics", "Psychology", "Robotics", "Stackoverflow", "SustainableLiving"),
    *("Pony", "Leetcode", "Aops", "TheoremQATheorems", "TheoremQAQuestions"),
)
BRIGHT = tuple(f"Bright{subset}Retrieval" for subset in _BRIGHT_SUBSETS)
"""The twelve subsets of BRIGHT with passages. Its `Long` tasks rank whole pages by recall@1, another experiment."""
FOLLOWIR = ("Robust04InstructionRetrieval", "News21InstructionRetrieval", "Core17InstructionRetrieval")
PAPER = (
    *("SciFact", "CQADupstackRetrieval", "LitSearchRetrieval", "MedicalQARetrieval", "DS1000Retrieval"),
    *("MKQARetrieval", "BrowseCompPlusRetrieval", *BRIGHT, *FOLLOWIR),
)
"""The collections that the paper reports on, as mteb names them."""
SUITES: dict[str, tuple[str, ...]] = {"paper": PAPER, "bright": BRIGHT, "followir": FOLLOWIR}
"""Names that stand for several tasks."""


def suite_tasks(names: str | Sequence[str], subsets: Sequence[str] = ()) -> list[AbsTask]:
    """The mteb tasks of suites (`SUITES`) and of single tasks, each once, in the order of the names.

    Args:
        names: names of suites or of mteb tasks.
        subsets: of tasks that have several, those with these names or languages (as mteb writes them: `deu`).

    Raises:
        DataError: a task without such a subset, or unknown names; all of them are in the message, with the nearest
            known ones.
    """
    names = [names] if isinstance(names, str) else names
    tasks, unknown = [], []
    for name in dict.fromkeys(task for suite in names for task in SUITES.get(suite, (suite,))):
        try:
            task = mteb.get_task(name)
            chosen = choose_subsets(task, subsets) if subsets else None
            tasks.append(task if chosen is None else mteb.get_task(name, hf_subsets=chosen))
        except KeyError:
            unknown.append(name)
    if unknown:
        choices = [*SUITES, *(task.metadata.name for task in mteb.get_tasks(exclude_superseded=False))]
        raise DataError("; ".join(_nearest(name, choices) for name in unknown))
    return tasks


def collection_task(
    collection: Collection, split: str = "test", *, languages: Sequence[str] = ("eng-Latn",)
) -> AbsTaskRetrieval:
    """One split of a collection as a retrieval task of mteb; nothing is downloaded.

    Queries without a relevant document are left out. Pools and excluded documents become mteb's `top_ranked`. A
    document with the query's id is dropped from its ranking, unless some query's own document is relevant to it: then
    equal ids mean nothing. The main score is `ndcg_at_10`, or `p-MRR` where instructions change. The task's name ends
    with a hash of its contents, because mteb takes results of that name for results on the same data.

    Args:
        collection: documents, queries and judgements.
        split: the split.
        languages: of the texts, as mteb writes them.

    Raises:
        DataError: there is no such split, or no query of it has a relevant document.
    """
    qrels = judged(collection, split)
    revision = hashlib.sha256(json.dumps([collection.content_hash(), split]).encode()).hexdigest()
    name = re.sub(r"[^\w.-]+", "_", collection.name)
    metadata = TaskMetadata(
        name=f"{name}-{split}-{revision[:8]}",
        description=f"The split {split} of the collection {collection.name}.",
        dataset={"path": f"local/{name}", "revision": revision},
        type="Retrieval",
        category="t2t",
        eval_splits=[split],
        eval_langs=list(languages),
        main_score="p-MRR" if collection.changed else "ndcg_at_10",
        prompt={},  # None would stand for mteb's general one
    )
    # mteb keeps the metadata in the class: unloading a task deletes those of the instance.
    identical = _no_own_document(qrels)
    kind = type("CollectionTask", (_CollectionTask,), {"metadata": metadata, "ignore_identical_ids": identical})
    return cast("AbsTaskRetrieval", kind(collection, qrels))


class _CollectionTask(AbsTaskRetrieval):
    """What `collection_task` makes, but for the metadata."""

    def __init__(self, collection: Collection, qrels: Mapping[str, Mapping[str, int]]) -> None:
        super().__init__()
        self.collection = collection
        self.qrels = qrels

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        queries, documents = self.collection.queries, self.collection.documents.values()
        instructed = any(queries[query_id].instruction for query_id in self.qrels)
        corpus = [{"id": document.doc_id, "title": document.title, "text": document.text} for document in documents]
        data: Any = {
            "corpus": Dataset.from_list(corpus),
            "queries": Dataset.from_list([_row(queries[query_id], instructed) for query_id in self.qrels]),
            "relevant_docs": self.qrels,
            "top_ranked": _top_ranked(self.collection, self.qrels),
        }
        self.dataset = {"default": {self.metadata.eval_splits[0]: data}}
        self.data_loaded = True

    def task_specific_scores(self, scores: Any, qrels: Any, results: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if not self.collection.changed:
            return {}
        rankings = {query_id: rank(scores_of) for query_id, scores_of in results.items()}
        lost = {
            query: doc_ids
            for query, doc_ids in self.collection.changed.items()
            if f"{query}-og" in rankings and f"{query}-changed" in rankings
        }
        before, after = ({query: rankings[f"{query}-{kind}"] for query in lost} for kind in ("og", "changed"))
        return {"p-MRR": fmean(p_mrr(before, after, lost).values()) if lost else 0.0}


def leaves_out_identical_ids(source: str, collection: Collection) -> bool:
    """Whether mteb leaves the document with the id of its query out of the ranking.

    Of a data set of the hub, where it does so in a task on it; of another collection, as in `collection_task`.

    Args:
        source: as it was asked for.
        collection: what is there.
    """
    parts = split_name(source)
    if parts is None or Path(parts[0]).is_dir():
        return all(map(_no_own_document, collection.qrels.values()))
    tasks = mteb.get_tasks(modalities=["text"], exclude_superseded=False)
    of_source = [task for task in tasks if str(task.metadata.dataset.get("path", "")).lower() == parts[0].lower()]
    return any(getattr(task, "ignore_identical_ids", False) for task in of_source)


def _no_own_document(qrels: Mapping[str, Mapping[str, int]]) -> bool:
    """Whether no query has a relevant document with its own id."""
    return not any(gains.get(query_id, 0) > 0 for query_id, gains in qrels.items())


def choose_subsets(task: AbsTask, names: Sequence[str]) -> list[str]:
    """The subsets of a task that have these names or are in these languages; of a task without subsets, its only one.

    Raises:
        DataError: none is; the message lists them.
    """
    languages = task.metadata.hf_subsets_to_langscripts
    if not task.metadata.is_multilingual:
        return list(languages)
    chosen = [
        subset
        for subset, scripts in languages.items()
        if subset in names or any(script.partition("-")[0] in names for script in scripts)
    ]
    if not chosen:
        codes = {script.partition("-")[0] for scripts in languages.values() for script in scripts}
        raise DataError(
            f"{task.metadata.name} has no subset {', '.join(names)}; it has "
            f"{textwrap.shorten(', '.join(languages), 160)}, in the languages "
            f"{textwrap.shorten(', '.join(sorted(codes)), 160)}"
        )
    return chosen


def sample_queries(task: AbsTask, count: int, seed: int) -> None:
    """Let a retrieval task measure a random sample of the queries of each split; both of a changed pair, or neither.

    Raises:
        DataError: the task is no retrieval task.
    """
    if isinstance(task, AbsTaskAggregate):
        for one in task.metadata.tasks:
            sample_queries(one, count, seed)
        return
    if not isinstance(task, AbsTaskRetrieval):
        raise DataError(f"{task.metadata.name} is no retrieval task: it has no queries to take a sample of")
    load = task.load_data

    def load_sample(*args: Any, **kwargs: Any) -> None:
        if task.data_loaded:
            return
        load(*args, **kwargs)
        task.convert_v1_dataset_format_to_v2(num_proc=None)
        for splits in task.dataset.values():
            for data in splits.values():
                names = sorted({_query_of(one) for one in data["relevant_docs"]})
                chosen = set(random.Random(seed).sample(names, min(count, len(names))))
                data["relevant_docs"] = {  # mteb asks no query that has none
                    one: gains for one, gains in data["relevant_docs"].items() if _query_of(one) in chosen
                }

    task.load_data = load_sample  # type: ignore[method-assign]


def _query_of(query_id: str) -> str:
    """The query that an original or changed instruction belongs to."""
    return re.sub(r"-(og|changed)$", "", query_id)


def _row(query: Query, instructed: bool) -> dict[str, str]:
    """A query as mteb holds it, with a column for instructions where one of the task's queries has one."""
    row = {"id": query.query_id, "text": query.bare}
    return row | {"instruction": query.instruction} if instructed else row


def _top_ranked(collection: Collection, query_ids: Iterable[str]) -> dict[str, list[str]] | None:
    """The documents to rank for each query; mteb skips a query that is not listed, so it is all queries or none."""
    limits = {name: restrictions(collection, name, {}, "keep") for name in query_ids}
    if all(limit == Restrictions() for limit in limits.values()):
        return None
    everything = list(collection.documents)
    return {
        query_id: [
            doc_id for doc_id in (everything if limit.pool is None else sorted(limit.pool)) if limit.allow(doc_id)
        ]
        for query_id, limit in limits.items()
    }


def _nearest(name: str, choices: Sequence[str]) -> str:
    lower = {choice.lower(): choice for choice in choices}
    nearest = ", ".join(lower[choice] for choice in get_close_matches(name.lower(), lower, n=3))
    return f"{name!r} is neither a suite nor a task of mteb" + (f"; nearest: {nearest}" if nearest else "")
