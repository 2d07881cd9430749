"""Collections as retrieval tasks of mteb."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from ..data.collection import Collection, Query
from ..data.restrictions import Restrictions, restrictions
from ..extras import extra
from .benchmark import judged

with extra("mteb"):
    from datasets import Dataset
    from mteb import TaskMetadata
    from mteb._evaluators.retrieval_metrics import evaluate_p_mrr_change
    from mteb.abstasks import AbsTaskRetrieval


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
    identical = not any(gains.get(query_id, 0) > 0 for query_id, gains in qrels.items())
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
        changed = {query: sorted(doc_ids) for query, doc_ids in self.collection.changed.items()}
        return evaluate_p_mrr_change(qrels, results, changed, self.k_values)


def _row(query: Query, instructed: bool) -> dict[str, str]:
    """A query as mteb holds it, with a column for instructions where one of the task's queries has one."""
    row = {"id": query.query_id, "text": query.bare}
    return row | {"instruction": query.instruction} if instructed else row


def _top_ranked(collection: Collection, query_ids: Iterable[str]) -> dict[str, list[str]] | None:
    """The documents to rank for each query; mteb skips a query that is not listed, so it is all queries or none."""
    limits = {name: restrictions(collection, name, {}, keep_identical_ids=True) for name in query_ids}
    if all(limit == Restrictions() for limit in limits.values()):
        return None
    everything = list(collection.documents)
    return {
        query_id: [
            doc_id for doc_id in (everything if limit.pool is None else sorted(limit.pool)) if limit.allow(doc_id)
        ]
        for query_id, limit in limits.items()
    }
