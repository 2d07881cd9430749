"""Hard negatives: what retrievers rank high for a query without being an answer to it.

The documents that rank highest are often answers that nobody judged. Candidates that score almost as high as the
positive are therefore dropped, as in NV-Retriever (Moreira et al. 2024, arXiv 2407.15831, section 4): above a share of
the positive's score (`TopK-PercPos`) or above that score minus a margin (`TopK-MarginPos`).

Deviations: with several positives the best-scored one counts, since those of a query of several hops share few words
with it; a share of a negative score is taken of its size, downwards, so that it still lies below the positive.

What was searched and scored stays in a cache, in blocks of queries: a killed call goes on, and other thresholds need no
new search.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ..data.collection import Collection, Query
from ..data.restrictions import restrictions
from ..data.triples import judged_queries, listed_negatives
from ..data.writing.asking import check_output
from ..errors import DataError
from ..retrieval.metrics import rank, relevant_ids
from ..types import Watch
from .candidates import BlockCache, Judge, Retriever, Scoring, Searching, key_hash, quiet

BLOCK = 256
"""Queries searched and scored between two writes to the cache; what a kill may cost."""
REPORT = "mining.json"


@dataclass(frozen=True)
class MiningSettings:
    """Which candidates become negatives.

    Attributes:
        per_query: negatives to mine for each query.
        depth: candidates of each retriever, judged documents not counted.
        skip: so many best-ranked candidates of each retriever are left out.
        max_share: highest share of the positive's score that a negative may have (NV-Retriever: 0.95); None: no limit.
        margin: least distance of a negative's score from the positive's; None: no limit.
        sampling: `top` takes the highest scores, `random` draws.
        seed: of the drawing.
        keep: whether negatives that a query has already stay before the mined ones, those that are no false ones.

    Raises:
        DataError: a value is out of range.
    """

    per_query: int = 4
    depth: int = 50
    skip: int = 0
    max_share: float | None = 0.95
    margin: float | None = None
    sampling: Literal["top", "random"] = "top"
    seed: int = 0
    keep: bool = True

    def __post_init__(self) -> None:
        if self.per_query < 1 or not 0 <= self.skip < self.depth:
            raise DataError(
                f"per_query {self.per_query}, skip {self.skip}, depth {self.depth}: expected 1 or more negatives, and "
                "0 or more skipped of a larger depth"
            )
        if self.max_share is not None and not 0 < self.max_share <= 1:
            raise DataError(f"max_share {self.max_share}: expected a share above 0 and up to 1")
        if self.margin is not None and not 0 <= self.margin < float("inf"):
            raise DataError(f"margin {self.margin}: expected 0 or more")

    def bound(self, positive: float) -> float:
        """The highest score that a negative may have beside a positive of this score.

        Example:
            >>> MiningSettings().bound(0.8), MiningSettings(max_share=None, margin=0.1).bound(0.5)
            (0.76, 0.4)
            >>> MiningSettings(max_share=0.5).bound(-2.0)
            -3.0
        """
        bounds = [float("inf")]
        if self.max_share is not None:
            bounds.append(positive - (1 - self.max_share) * abs(positive))
        if self.margin is not None:
            bounds.append(positive - self.margin)
        return min(bounds)


@dataclass(frozen=True)
class MiningReport:
    """What was mined; it stands in `mining.json` beside the collection.

    Attributes:
        collection: the name of the collection, and its content hash.
        content_hash: of the collection that was mined.
        splits: whose queries.
        settings: as `MiningSettings`.
        retrievers: what proposed candidates.
        judge: what scored them.
        queries: of these splits.
        candidates: different documents that the retrievers found, over all queries.
        dropped: reason -> candidates dropped for it: `judged` (for the query, in any split), `excluded` (by the
            collection, or since its id is that of the query), `out_of_range` (skipped), `listed` (a negative already),
            `same_text` (as the query or a positive), `false_negative` (a score too near the positive's or above it),
            `repeated_text` (as a candidate with a higher score).
        usable: candidates left, of which `per_query` were taken.
        listed: negatives that queries had already; 0 where they are not kept.
        listed_dropped: of them, those that were dropped as `false_negative`, `same_text` or `excluded`.
        mined: negatives taken.
        fewer: queries with fewer mined negatives than wanted; those with none are among them.
        none: queries without any mined negative.
        blocks: blocks of queries.
        resumed: of them, read from the cache.
        seconds: duration of this call.
    """

    collection: str
    content_hash: str
    splits: list[str]
    settings: dict[str, Any]
    retrievers: list[dict[str, Any]]
    judge: dict[str, Any]
    queries: int
    candidates: int
    dropped: dict[str, int]
    usable: int
    listed: int
    listed_dropped: int
    mined: int
    fewer: int
    none: int
    blocks: int
    resumed: int
    seconds: float


@dataclass(frozen=True)
class QueryNegatives:
    """The mined negatives of one query, hardest first, those listed that stay, and what became of its candidates."""

    mined: list[str]
    listed: list[str]
    usable: int
    dropped: Counter[str]


def mine_negatives(
    collection: Collection,
    out: str | Path,
    retrievers: Sequence[Retriever],
    *,
    cache: str | Path,
    splits: Sequence[str] = ("train",),
    judge: Judge | None = None,
    settings: MiningSettings | None = None,
    watch: Watch = quiet,
) -> MiningReport:
    """Mine hard negatives into `metadata.negatives` of the queries of some splits, and save the collection.

    The same call after a kill goes on where it stopped and gives the same result.

    Args:
        collection: queries, positives and documents.
        out: the folder; a collection there is replaced at the end.
        retrievers: each proposes candidates.
        cache: a folder for vectors, candidates and scores; several calls may use it one after another.
        splits: whose queries.
        judge: what scores candidates and positives; by default the first retriever.
        settings: which candidates become negatives.
        watch: begins a progress bar.

    Raises:
        DataError: no retriever, an unknown split, a query without a positive, `metadata.negatives` that cannot be used,
            or a damaged cache.
        ModelError: a model gives NaN.
        VectorIndexError: the disk is full. What is done stays done.
    """
    out, started, settings = Path(out).absolute(), time.monotonic(), settings or MiningSettings()
    if not retrievers:
        raise DataError("nothing to mine with; give BM25, a model, or several of them")
    check_output(out)
    qrels = judged_queries(collection, splits)
    listed = {
        query_id: listed_negatives(collection, collection.queries[query_id], relevant_ids(relevance))
        for query_id, relevance in qrels.items()
    }
    if not settings.keep:
        listed = {query_id: [] for query_id in qrels}
    work = _Work(collection, qrels, listed, retrievers, judge or retrievers[0], settings.depth, Path(cache), watch)
    queries, results = dict(collection.queries), list[QueryNegatives]()
    for query_id, rankings, scores in work.results():
        query = queries[query_id]
        result = choose(collection, query, qrels[query_id], rankings, scores, settings, listed[query_id])
        queries[query_id] = replace(query, metadata={**query.metadata, "negatives": [*result.listed, *result.mined]})
        results.append(result)
    report = _report(work, splits, settings, results, started)
    replace(collection, queries=queries).save(out, reports={REPORT: asdict(report)})
    return report


def _report(
    work: _Work, splits: Sequence[str], settings: MiningSettings, results: Sequence[QueryNegatives], started: float
) -> MiningReport:
    dropped = sum((result.dropped for result in results), Counter[str]())
    usable = sum(result.usable for result in results)
    return MiningReport(
        collection=work.collection.name,
        content_hash=work.collection.content_hash(),
        splits=list(splits),
        settings=asdict(settings),
        retrievers=[dict(retriever.key) for retriever in work.retrievers],
        judge=dict(work.judge.key),
        queries=len(results),
        candidates=usable + dropped.total(),
        dropped=dict(sorted(dropped.items())),
        usable=usable,
        listed=(listed := sum(map(len, work.listed.values()))),
        listed_dropped=listed - sum(len(result.listed) for result in results),
        mined=sum(len(result.mined) for result in results),
        fewer=sum(len(result.mined) < settings.per_query for result in results),
        none=sum(not result.mined for result in results),
        blocks=work.blocks,
        resumed=work.resumed,
        seconds=time.monotonic() - started,
    )


def choose(
    collection: Collection,
    query: Query,
    relevance: Mapping[str, int],
    rankings: Sequence[Sequence[str]],
    scores: Mapping[str, float],
    settings: MiningSettings,
    listed: Sequence[str] = (),
) -> QueryNegatives:
    """The negatives of one query.

    Args:
        collection: holds the texts.
        query: whose negatives.
        relevance: doc_id -> judgement.
        rankings: the candidates of each retriever, best first; judged documents may be among them.
        scores: the judge's, of candidates, positives and `listed`.
        settings: which candidates become negatives.
        listed: negatives that the query has already.
    """
    documents, limits = collection.documents, restrictions(collection, query.query_id, relevance)
    open_lists = [
        [doc_id for doc_id in ranking if doc_id not in relevance and limits.allow(doc_id)] for ranking in rankings
    ]
    in_range = {doc_id for line in open_lists for doc_id in line[settings.skip : settings.depth]}
    positives = relevant_ids(relevance)
    answers = {query.text, *(documents[doc_id].full_text for doc_id in positives)}
    bound = settings.bound(max(scores[doc_id] for doc_id in positives))
    old = [
        doc_id
        for doc_id in listed
        if limits.allow(doc_id) and scores[doc_id] <= bound and documents[doc_id].full_text not in answers
    ]
    usable: list[str] = []
    dropped = Counter[str]()
    texts: set[str] = set()
    candidates = {doc_id: scores.get(doc_id, 0.0) for ranking in rankings for doc_id in ranking}
    for doc_id in rank(candidates):
        text = documents[doc_id].full_text
        reasons = {
            "judged": doc_id in relevance,
            "excluded": not limits.allow(doc_id),
            "out_of_range": doc_id not in in_range,
            "listed": doc_id in listed,
            "same_text": text in answers,
            "false_negative": candidates[doc_id] > bound,
            "repeated_text": text in texts,
        }
        reason = next((name for name, holds in reasons.items() if holds), None)
        if reason:
            dropped[reason] += 1
        else:
            usable.append(doc_id)
            texts.add(text)
    negatives = usable[: settings.per_query]
    if settings.sampling == "random" and len(usable) > settings.per_query:
        places = random.Random(f"{settings.seed}/{query.query_id}").sample(range(len(usable)), settings.per_query)
        negatives = [usable[place] for place in sorted(places)]
    return QueryNegatives(negatives, old, len(usable), dropped)


class _Work:
    """Searches and scores block after block, through the cache."""

    def __init__(
        self,
        collection: Collection,
        qrels: Mapping[str, Mapping[str, int]],
        listed: Mapping[str, Sequence[str]],
        retrievers: Sequence[Retriever],
        judge: Judge,
        depth: int,
        cache: Path,
        watch: Watch,
    ) -> None:
        self.collection, self.qrels, self.judge, self.depth = collection, qrels, judge, depth
        self.listed, self.retrievers, self.cache, self.watch = listed, retrievers, cache, watch
        # What is to be searched for; depth and judgements decide how many documents are kept of each search.
        key = {
            "collection": collection.content_hash(),
            "queries": key_hash({"ids": list(qrels)}),
            "depth": depth,
            "block": BLOCK,
            **({"pools": "ranked alone"} if collection.pools else {}),  # caches made before that rule hold others
        }
        self._searches = [
            (retriever, BlockCache(cache, "candidates", {**key, "retriever": dict(retriever.key)}))
            for retriever in retrievers
        ]
        key |= {"retrievers": [dict(retriever.key) for retriever in retrievers], "listed": key_hash(listed)}
        self._scores = BlockCache(cache, "scores", {**key, "judge": dict(judge.key)})
        self.blocks = -(-len(qrels) // BLOCK)
        self._searching: dict[int, Searching] = {}
        self._scoring: Scoring | None = None

    @property
    def resumed(self) -> int:
        """Blocks whose scores stood in the cache."""
        return self._scores.hits

    def results(self) -> Iterator[tuple[str, list[list[str]], dict[str, float]]]:
        """For each query its id, the candidates of each retriever and the judge's scores."""
        self._prepare()
        progress = self.watch("queries", len(self.qrels))
        source = iter(self.qrels)
        for number in range(self.blocks):
            block = list(islice(source, BLOCK))
            searches = [
                store.block(number, len(block), partial(self._search, retriever, block))
                for retriever, store in self._searches
            ]
            rankings = [[search[place] for search in searches] for place in range(len(block))]
            pairs = [self._to_score(query_id, lists) for query_id, lists in zip(block, rankings, strict=True)]
            scores = self._scores.block(number, len(block), partial(self._score, block, pairs))
            progress(len(block), 0)
            for query_id, lists, doc_ids, values in zip(block, rankings, pairs, scores, strict=True):
                yield query_id, lists, dict(zip(doc_ids, values, strict=True))

    def _prepare(self) -> None:
        """Have the retrievers and the judge take in the documents, those for which the cache lacks something."""
        arguments = self.collection, self.cache, self.watch
        judging = not self._scores.holds(self.blocks)
        for retriever, store in self._searches:
            if not store.holds(self.blocks) or (judging and retriever is self.judge):
                self._searching[id(retriever)] = retriever.prepare(*arguments)
        if judging:
            self._scoring = self._searching.get(id(self.judge)) or self.judge.prepare(*arguments)

    def _search(self, retriever: Retriever, block: Sequence[str]) -> list[list[str]]:
        """As many candidates as leave `depth` of them when judged and excluded documents are taken out."""
        room = [self.depth + len(self._never(query_id)) for query_id in block]
        pools = [self.collection.pools.get(query_id) for query_id in block]
        rankings = self._searching[id(retriever)].search(self._texts(block), max(room), pools)
        return [ranking[:k] for ranking, k in zip(rankings, room, strict=True)]

    def _score(self, block: Sequence[str], doc_ids: Sequence[Sequence[str]]) -> list[list[float]]:
        assert self._scoring is not None
        return self._scoring.score(self._texts(block), doc_ids)

    def _to_score(self, query_id: str, rankings: Sequence[Sequence[str]]) -> list[str]:
        """The positives, the negatives that are there, and all candidates that can become some, skipped ones too."""
        never, positives = self._never(query_id), [one for one, gain in self.qrels[query_id].items() if gain > 0]
        candidates = (doc_id for ranking in rankings for doc_id in ranking if doc_id not in never)
        return list(dict.fromkeys([*positives, *self.listed[query_id], *candidates]))

    def _never(self, query_id: str) -> set[str]:
        relevance = self.qrels[query_id]
        return {*relevance, *restrictions(self.collection, query_id, relevance).left_out}

    def _texts(self, block: Sequence[str]) -> list[str]:
        return [self.collection.queries[query_id].text for query_id in block]
