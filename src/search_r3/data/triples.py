"""Training examples for stage 1: a query, its positives, negatives, and reasoning traces where the data has them."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..errors import ConfigError, DataError
from .collection import Collection, Query
from .restrictions import Restrictions, restrictions
from .rows import folded

logger = logging.getLogger(__name__)

LexicalSearch = Callable[[Sequence[str], int, Sequence[frozenset[str] | None]], list[list[str]]]
"""`(texts, k, pools) -> doc_ids of the k best documents of each text`, of its pool where it has one; `BM25.search`."""


@dataclass(frozen=True)
class TrainingExample:
    """One query with what stage 1 needs.

    `reasoning` maps a style to a trace; `negative_ids` lists hard negatives, best first: those that the data set names,
    else mined ones. `limits` is what a ranking of the query may hold; nothing that it leaves out is a negative.
    """

    query: Query
    positive_ids: tuple[str, ...]
    negative_ids: tuple[str, ...]
    reasoning: Mapping[str, str]
    limits: Restrictions = field(default_factory=Restrictions)


def training_examples(
    collection: Collection, split: str, search: LexicalSearch | None = None, mined: int = 0
) -> list[TrainingExample]:
    """The examples of one split, with the hard negatives that `metadata.negatives` lists, or else up to `mined` others.

    What is relevant to a query is what any split says of it. A mined negative is never a document judged for the query,
    nor one with the text of a positive. No negative is a document that a ranking of the query cannot hold
    (`restrictions`). Only queries without listed negatives are searched for.

    Raises:
        DataError: the split is unknown, no query has a positive document, or `metadata.negatives` cannot be used.
    """
    qrels = judged_queries(collection, [split])
    positives = {
        query_id: tuple(d for d, gain in relevance.items() if gain > 0) for query_id, relevance in qrels.items()
    }
    limits = {query_id: restrictions(collection, query_id, relevance) for query_id, relevance in qrels.items()}
    negatives: dict[str, list[str]] = {}
    for query_id, relevant in positives.items():
        listed = listed_negatives(collection, collection.queries[query_id], relevant)
        negatives[query_id] = [doc_id for doc_id in listed if limits[query_id].allow(doc_id)]
    # An empty list says that all candidates were found to be false negatives: they are not brought back.
    bare = [query_id for query_id in negatives if "negatives" not in collection.queries[query_id].metadata]
    if search is not None and mined > 0 and bare:
        useless = max(len(qrels[query_id]) + len(limits[query_id].left_out) for query_id in bare)
        texts = [collection.queries[query_id].text for query_id in bare]
        rankings = search(texts, mined + useless + 8, [limits[query_id].pool for query_id in bare])
        for query_id, ranking in zip(bare, rankings, strict=True):
            same = {collection.documents[doc_id].full_text for doc_id in positives[query_id]}
            negatives[query_id] = [
                doc_id
                for doc_id in ranking
                if doc_id not in qrels[query_id]
                and limits[query_id].allow(doc_id)
                and collection.documents[doc_id].full_text not in same
            ][:mined]
    return [
        TrainingExample(
            collection.queries[query_id],
            relevant,
            tuple(negatives[query_id]),
            reasoning_traces(collection.queries[query_id]),
            limits[query_id],
        )
        for query_id, relevant in positives.items()
    ]


def listed_negatives(collection: Collection, query: Query, positive_ids: Container[str]) -> list[str]:
    """The hard negatives in `metadata.negatives`, hardest first, each once; empty where there are none.

    Raises:
        DataError: it is no list of doc_ids, or names an unknown document or a positive of the query.
    """
    value = query.metadata.get("negatives") or []
    if not isinstance(value, list) or not all(isinstance(doc_id, str) for doc_id in value):
        raise DataError(f"query {query.query_id!r}: metadata.negatives must be a list of doc_ids")
    for doc_id in value:
        if doc_id not in collection.documents:
            raise DataError(f"query {query.query_id!r}: metadata.negatives names {doc_id!r}, no document here")
        if doc_id in positive_ids:
            raise DataError(f"query {query.query_id!r}: metadata.negatives names {doc_id!r}, a positive of the query")
    return list(dict.fromkeys(value))


def judgements(collection: Collection, query_ids: Iterable[str]) -> dict[str, dict[str, int]]:
    """query_id -> doc_id -> relevance of these queries, as judged in any split; empty where none judges one."""
    judged: dict[str, dict[str, int]] = {query_id: {} for query_id in query_ids}
    for qrels in collection.qrels.values():
        for query_id in judged.keys() & qrels.keys():
            judged[query_id] |= qrels[query_id]
    return judged


def judged_queries(collection: Collection, splits: Sequence[str]) -> dict[str, dict[str, int]]:
    """query_id -> doc_id -> relevance of the queries of these splits, in their order, as judged in any split.

    Queries without a positive document in the corpus are left out; a warning counts them, and judgements of documents
    that are not in the corpus.

    Raises:
        DataError: no split was named, one is unknown, or no query has a positive document.
    """
    if not splits:
        raise DataError("no split was named; give one or more of: " + ", ".join(sorted(collection.qrels)))
    judged = judgements(collection, (query_id for split in splits for query_id in collection.split(split)))
    names = ", ".join(splits)
    if absent := sum(collection.count_absent(split) for split in splits):
        logger.warning("%d judgements of %s name documents that are not in the corpus and are left out", absent, names)
    empty = [query_id for query_id, gains in judged.items() if not any(gain > 0 for gain in gains.values())]
    if len(empty) == len(judged):
        raise DataError(f"no query of {names} has a document of the corpus with a score above 0; name another split")
    if empty:
        logger.warning(
            "%d queries of %s have no document with a score above 0 and are left out; the first is %r",
            *(len(empty), names, empty[0]),
        )
    return {query_id: gains for query_id, gains in judged.items() if query_id not in set(empty)}


def hold_out(collection: Collection, splits: Sequence[str], held_out: Sequence[str]) -> Collection:
    """The collection without those queries of the training splits that stand in a held-out split too; a warning counts.

    A split that is named as both is trained on whole, with a warning: it measures nothing afterwards. A query stands in
    both under one id, or with the same text (whatever its case, its blanks and its instruction) and the same pool: a
    question about a text of its own (babi) is another one.

    Args:
        collection: documents, queries and judgements; what the other splits say of a query stays.
        splits: what is trained on.
        held_out: what is measured on; a split that is not there holds nothing.
    """
    for split in sorted(set(splits) & set(held_out)):
        logger.warning(
            "the split %r is trained on and is evaluation.dev_split or test_split: what has been learned measures "
            "nothing; leave it out of the training, or name another split there",
            split,
        )
    held_out = [split for split in held_out if split not in splits]

    def content(query_id: str) -> tuple[str, frozenset[str] | None]:
        return folded(collection.queries[query_id].bare), collection.pools.get(query_id)

    measured = {content(query_id) for split in held_out for query_id in collection.qrels.get(split, {})}
    qrels = dict(collection.qrels)
    for split in splits:
        qrels[split] = {
            query_id: relevance
            for query_id, relevance in collection.split(split).items()
            if content(query_id) not in measured
        }
    lost = [query_id for split in splits for query_id in collection.qrels[split] if query_id not in qrels[split]]
    if lost:
        logger.warning(
            "%d queries of %s are not trained on, since %s holds them too, by id or by text; the first is %r",
            *(len(lost), ", ".join(splits), " or ".join(held_out), lost[0]),
        )
    return replace(collection, qrels=qrels)


def reasoning_traces(query: Query) -> dict[str, str]:
    """The traces in `metadata.reasoning`: a mapping from style to text, or one text (style `trace`)."""
    value = query.metadata.get("reasoning") or {}
    if isinstance(value, str):
        return {"trace": value}
    if isinstance(value, Mapping) and all(isinstance(text, str) for text in value.values()):
        return {str(style): text for style, text in value.items() if text.strip()}
    raise DataError(f"query {query.query_id!r}: metadata.reasoning must be a text or a mapping from style to text")


def draw_negatives(
    example: TrainingExample, doc_ids: Sequence[str], random_count: int, mined_count: int, rng: random.Random
) -> list[str]:
    """Negatives for one use of an example: mined ones first, the rest random documents that are not its positives.

    Where fewer were mined than asked for, random ones fill the place, so that every example has the same number. None
    is left out of the query's rankings; where it has a pool, others come after the pool is used up.
    """
    chosen = rng.sample(example.negative_ids, min(mined_count, len(example.negative_ids)))
    taken, count = {*chosen, *example.positive_ids, *example.limits.left_out}, random_count + mined_count
    if example.limits.pool is not None:
        pool = sorted(example.limits.pool - taken)
        chosen += rng.sample(pool, min(len(pool), count - len(chosen)))
        taken.update(chosen)
    if len(doc_ids) - len(taken) < count - len(chosen):
        raise DataError(f"the corpus of {len(doc_ids)} documents is too small for the negatives asked for")
    while len(chosen) < count:
        doc_id = rng.choice(doc_ids)
        if doc_id not in taken:
            taken.add(doc_id)
            chosen.append(doc_id)
    return chosen


def draw_trace(example: TrainingExample, styles: Mapping[str, float], rng: random.Random) -> tuple[str, str]:
    """Style and text of one reasoning trace, by the weight of its style; both empty for a query without traces.

    Raises:
        ConfigError: no style of a query with several traces has a weight.
    """
    traces = example.reasoning
    if len(traces) <= 1:
        return next(iter(traces.items()), ("", ""))
    weighted = [style for style in traces if styles.get(style, 0) > 0]
    if not weighted:
        raise ConfigError(
            f"query {example.query.query_id!r} has reasoning styles {', '.join(traces)}, none of which has a weight in "
            f"sft.reasoning_styles ({', '.join(styles)})"
        )
    style = rng.choices(weighted, [styles[style] for style in weighted])[0]
    return style, traces[style]


def likeliest_trace(example: TrainingExample, styles: Mapping[str, float], left_out: Container[str] = ()) -> str:
    """The trace of the style that weighs most, but for styles that are left out; empty where there is none."""
    traces = {style: text for style, text in example.reasoning.items() if style not in left_out}
    return max(traces.items(), key=lambda one: styles.get(one[0], 0.0), default=("", ""))[1]


def draw_uninstructed(queries: Sequence[Query], share: float, rng: random.Random) -> list[Query]:
    """The queries, a share of those with an instruction without it; others draw no random number."""
    return [
        query.without_instruction() if share and query.instruction and rng.random() < share else query
        for query in queries
    ]


def swap_traces(traces: list[str], rows: Sequence[int], share: float, rng: random.Random) -> frozenset[int]:
    """Give a share of these rows, where they have a trace, another one's, in a ring; returns which."""
    chosen = [row for row in rows if traces[row] and share and rng.random() < share]
    if len({traces[row] for row in chosen}) < 2:
        return frozenset()
    others = [traces[row] for row in (*chosen[1:], chosen[0])]
    swapped = [row for row, other in zip(chosen, others, strict=True) if traces[row] != other]
    for row, other in zip(chosen, others, strict=True):
        traces[row] = other
    return frozenset(swapped)
