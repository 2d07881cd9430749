"""Data that a language model writes: queries, hard negatives, whole triples and reasoning traces.

The paper trains on 100,000 triples whose hard negatives an LLM wrote (Qwen3-32B), and measures on queries that one
wrote for articles of Wikipedia. Any endpoint that speaks OpenAI's chat completions serves. What is written ends in the
metadata of queries: `negatives`, a list of doc_ids, whose documents join the corpus as `written/HASH`; and `reasoning`,
a mapping from style to text.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ...errors import DataError
from ..collection import Collection, Document, Query
from ..generators.splits import divide_groups
from ..triples import judged_queries, listed_negatives, reasoning_traces
from .asking import Asking, Item, Prices, ProgressFile, Standing, check_output
from .chat import ChatEndpoint
from .replies import SURROGATE
from .written_items import (
    MAX_SHOWN_CHARS,
    MIN_TRACE_WORDS,
    NEGATIVES_PROMPT,
    QUERIES_PROMPT,
    TRACE_PROMPT,
    TRIPLE_PROMPT,
    negatives_item,
    queries_item,
    trace_item,
    triple_item,
)

T = TypeVar("T")
Merge = Callable[[Mapping[str, Any]], tuple[Collection, int, int]]
"""Puts answers into a collection; returns it with the numbers of queries and of passages that were written."""
TRAIN = {"train": 1.0}
PREFIX = "written/"
"""How the ids of written documents and queries begin."""


@dataclass(frozen=True)
class Writer:
    """The model that writes, and how it is asked.

    Attributes:
        endpoint: base address, usually ending in `/v1`.
        model: the model's name there.
        api_key: sent as a bearer token; None sends none.
        concurrency: requests under way at one time, at most.
        timeout: seconds for one request, from connecting to the end of the reply.
        retries: how often a request is sent again after a timeout, a lost connection, or status 408, 429 or 5xx.
        max_tokens: length of a reply; a model that reasons before it replies needs more.
        temperature: sampling temperature.
        seed: decides a sample, and goes to the endpoint as the seed of its sampling.
        prices: for the cost; None where it is not to be computed.
        limit: size of a random sample of what is written for; the same call with a larger one goes on.
        on_start: called once with what the whole may take.
        progress: called after every item.
    """

    endpoint: str
    model: str
    api_key: str | None = None
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 4
    max_tokens: int = 1024
    temperature: float = 0.7
    seed: int = 0
    prices: Prices | None = None
    limit: int | None = None
    on_start: Callable[[Standing], None] | None = None
    progress: Callable[[Standing], None] | None = None


@dataclass(frozen=True)
class WrittenReport:
    """What a call wrote.

    Attributes:
        asked: queries or articles that the model was asked about, by earlier calls too.
        written: those for which it wrote something usable.
        queries: queries that have something new, or are new.
        passages: hard negatives written, over all queries.
        failed: reason -> those that have nothing for it.
        words: reason -> what the endpoint said to it, the first time.
        resumed: finished by an earlier, interrupted call.
        prompt_tokens: as the endpoint counts, earlier calls included; so are the next.
        completion_tokens: likewise.
        cost: of these tokens; None without prices.
        uncounted: finished ones whose tokens the endpoint did not count; `cost` lacks them.
        requests: HTTP requests of this call, retries included.
        seconds: duration of this call.
    """

    asked: int
    written: int
    queries: int
    passages: int
    failed: dict[str, int]
    words: dict[str, str]
    resumed: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    uncounted: int
    requests: int
    seconds: float


def write_negatives(
    collection: Collection, out: str | Path, writer: Writer, *, splits: Sequence[str] = ("train",), per_query: int = 1
) -> WrittenReport:
    """Have a language model write hard negatives for queries that have positives, and save the collection with them.

    They stand first in `metadata.negatives`. The same call again asks only for queries that got no reply.

    Args:
        collection: its queries and positives.
        out: the folder; a collection there is replaced at the end. `NAME.progress.jsonl` beside it is kept.
        writer: the model.
        splits: whose queries.
        per_query: passages to ask for; a query may end up with fewer.

    Raises:
        DataError: an argument or the progress file cannot be used, the endpoint refuses key or model or gives no reply
            to many queries in a row, or no query got a negative. `out` is then as it was.
    """
    if per_query < 1:
        raise DataError(f"per_query {per_query}: expected 1 or more")
    positives = _positives(collection, splits)
    query_ids = _sample(list(positives), writer)
    old = {
        query_id: listed_negatives(
            collection, collection.queries[query_id], {one.doc_id for one in positives[query_id]}
        )
        for query_id in query_ids
    }
    items = [negatives_item(collection.queries[query_id], positives[query_id], per_query) for query_id in query_ids]
    settings = {"written": "negatives", "per_query": per_query, "collection": collection.content_hash()}

    def merge(answers: Mapping[str, Any]) -> tuple[Collection, int, int]:
        documents, queries = dict(collection.documents), dict(collection.queries)
        for query_id, passages in answers.items():
            doc_ids = dict.fromkeys([*_add_documents(documents, passages), *old[query_id]])
            queries[query_id] = _with(queries[query_id], negatives=list(doc_ids))
        passages = sum(map(len, answers.values()))
        return replace(collection, documents=documents, queries=queries), len(answers), passages

    return _write(items, "queries", "a hard negative", out, writer, {**settings, **_hash(NEGATIVES_PROMPT)}, merge)


def write_triples(
    articles: Mapping[str, Document],
    out: str | Path,
    writer: Writer,
    *,
    splits: Mapping[str, float] = TRAIN,
    per_query: int = 1,
    per_article: int = 1,
) -> WrittenReport:
    """Have a language model write queries for articles, each with its hard negatives, and save them as a collection.

    An article for which nothing can be used stays in the corpus. The same call again asks only for articles that got
    no reply. In a notebook: `await asyncio.to_thread(write_triples, ...)`.

    Args:
        articles: doc_id -> document, in a script that parts words by spaces; all of them stand in the corpus.
        out: as in `write_negatives`.
        writer: the model.
        splits: split -> share of the articles, whose queries are in it; a split that gets no query is left out.
        per_query: passages to ask for; a query may end up with fewer. 0: queries alone, to measure on.
        per_article: queries to ask for, of which an article may get fewer; above 1 only without passages.

    Raises:
        DataError: as in `write_negatives`.
    """
    _check_articles(articles)
    if per_query < 0 or per_article < 1 or (per_query and per_article > 1):
        raise DataError(
            f"per_query {per_query}, per_article {per_article}: expected 0 passages or more, and one query for each "
            "article, or several without passages (per_query 0)"
        )
    split_of = _divide(articles, splits, writer.seed)
    sample = [articles[doc_id] for doc_id in _sample(list(articles), writer)]
    items = [triple_item(one, per_query) if per_query else queries_item(one, per_article) for one in sample]

    def merge(answers: Mapping[str, Any]) -> tuple[Collection, int, int]:
        documents, queries = dict(articles), dict[str, Query]()
        qrels: dict[str, dict[str, dict[str, int]]] = {}
        passages = 0
        for doc_id, triples in answers.items():
            for triple in triples:
                query_id = PREFIX + hashlib.sha256(f"{doc_id}\0{triple['query']}".encode()).hexdigest()[:16]
                metadata: dict[str, Any] = {"source": doc_id, "model": writer.model}
                if per_query:
                    metadata["negatives"] = _add_documents(documents, triple["negatives"])
                queries[query_id] = Query(query_id, triple["query"], metadata)
                qrels.setdefault(split_of[doc_id], {})[query_id] = {doc_id: 1}
                passages += len(triple["negatives"])
        return Collection(Path(out).name, documents, queries, qrels), len(queries), passages

    content = Collection("", dict(articles), {}, {}).content_hash()
    settings = {"written": "triples", "articles": content, "per_query": per_query, "per_article": per_article}
    result = "a query with a hard negative" if per_query else "a query"
    settings |= _hash(TRIPLE_PROMPT if per_query else QUERIES_PROMPT)
    return _write(items, "articles", result, out, writer, settings, merge)


def write_traces(
    collection: Collection,
    out: str | Path,
    writer: Writer,
    *,
    splits: Sequence[str] = ("train",),
    style: str = "written",
    max_words: int = 120,
) -> WrittenReport:
    """Have a language model write the reasoning that leads from a query to its positives, and save the collection.

    It stands in `metadata.reasoning` under its style, beside the traces that are there; one of the same style is
    replaced.

    Args:
        collection: its queries and positives.
        out: as in `write_negatives`.
        writer: the model.
        splits: whose queries.
        style: the name of the traces; where a query has several styles, `sft.reasoning_styles` weighs them.
        max_words: length of a trace, at most.

    Raises:
        DataError: as in `write_negatives`.
    """
    if not style.strip() or max_words < MIN_TRACE_WORDS:
        raise DataError(f"style {style!r}, max_words {max_words}: expected a name, and {MIN_TRACE_WORDS} words or more")
    positives = _positives(collection, splits)
    query_ids = _sample(list(positives), writer)
    old = {query_id: reasoning_traces(collection.queries[query_id]) for query_id in query_ids}
    items = [trace_item(collection.queries[query_id], positives[query_id], max_words) for query_id in query_ids]
    settings = {"written": "traces", "max_words": max_words, "collection": collection.content_hash()}

    def merge(answers: Mapping[str, Any]) -> tuple[Collection, int, int]:
        queries = dict(collection.queries)
        for query_id, trace in answers.items():
            queries[query_id] = _with(queries[query_id], reasoning={**old[query_id], style: trace})
        return replace(collection, queries=queries), len(answers), 0

    return _write(items, "queries", "a reasoning trace", out, writer, {**settings, **_hash(TRACE_PROMPT)}, merge)


def _write(
    items: Sequence[Item],
    what: str,
    result: str,
    out: str | Path,
    writer: Writer,
    settings: Mapping[str, Any],
    merge: Merge,
) -> WrittenReport:
    """Ask about the items, merge the answers into a collection and save it with a report."""
    out, started = Path(out).absolute(), time.monotonic()
    check_output(out)
    if writer.max_tokens < 1:
        raise DataError(f"max_tokens {writer.max_tokens}: expected 1 or more")
    chat = ChatEndpoint(
        writer.endpoint,
        writer.api_key,
        concurrency=writer.concurrency,
        timeout=writer.timeout,
        retries=writer.retries,
    )
    sampling = {name: getattr(writer, name) for name in ("model", "max_tokens", "temperature", "seed")}
    settings = {**settings, **sampling}
    with ProgressFile(out.parent / f"{out.name}.progress.jsonl", settings) as file:
        run = Asking(items, what, settings, file, chat, prices=writer.prices, progress=writer.progress)
        if writer.on_start:
            writer.on_start(run.estimate())
        run.run(writer.concurrency)
    answers = run.answers()
    if not answers:
        raise run.nothing(result)
    collection, queries, passages = merge(answers)
    report = WrittenReport(
        asked=len(items),
        written=len(answers),
        queries=queries,
        passages=passages,
        failed=run.failed(),
        words=run.words,
        resumed=run.resumed,
        prompt_tokens=run.prompt_tokens,
        completion_tokens=run.completion_tokens,
        cost=run.standing().cost,
        uncounted=run.uncounted(),
        requests=chat.requests,
        seconds=time.monotonic() - started,
    )
    collection.save(out, reports={"written.json": {"settings": settings, **asdict(report)}})
    return report


def _positives(collection: Collection, splits: Sequence[str]) -> dict[str, list[Document]]:
    """query_id -> its positives, the most relevant first; all of them fit to be sent.

    Raises:
        DataError: as `judged_queries`, or a text holds half a letter.
    """
    positives = {}
    for query_id, relevance in judged_queries(collection, splits).items():
        doc_ids = sorted(
            (doc_id for doc_id in relevance if relevance[doc_id] > 0), key=lambda one: (-relevance[one], one)
        )
        positives[query_id] = [collection.documents[doc_id] for doc_id in doc_ids]
        texts = [collection.queries[query_id].text, *(document.full_text for document in positives[query_id])]
        if any(SURROGATE.search(text) for text in texts):
            raise DataError(f"query {query_id!r} or a positive of it holds half a letter (a lone surrogate); mend it")
    return positives


def _sample(ids: list[T], writer: Writer) -> list[T]:
    """The first `limit` of a random order, in their own order, so that a smaller sample is part of a larger one."""
    if writer.limit is None or writer.limit >= len(ids):
        return ids
    if writer.limit < 1:
        raise DataError(f"limit {writer.limit}: expected 1 or more")
    order = random.Random(writer.seed).sample(range(len(ids)), len(ids))[: writer.limit]
    return [ids[place] for place in sorted(order)]


def _add_documents(documents: dict[str, Document], passages: Sequence[Mapping[str, str]]) -> list[str]:
    """Add written passages to the documents; returns their doc_ids."""
    added = []
    for passage in passages:
        title, text = passage["title"], passage["text"]
        doc_id = PREFIX + hashlib.sha256(f"{title}\0{text}".encode()).hexdigest()[:16]
        documents[doc_id] = Document(doc_id, text, title)
        added.append(doc_id)
    return added


def _with(query: Query, **metadata: Any) -> Query:
    return replace(query, metadata={**query.metadata, **metadata})


def _hash(prompt: str) -> dict[str, str]:
    return {"prompt": hashlib.sha256(f"{prompt}{MAX_SHOWN_CHARS}".encode()).hexdigest()}


def _divide(articles: Mapping[str, Document], splits: Mapping[str, float], seed: int) -> dict[str, str]:
    """doc_id -> split, by shares of the shuffled articles, with or without a query.

    Raises:
        DataError: a split has no usable name, or the shares are not positive with the sum 1.
    """
    fit = all(re.fullmatch(r"[\w.-]+", name) for name in splits)
    if not fit or not math.isclose(sum(splits.values()), 1, abs_tol=1e-6) or min(splits.values()) <= 0:
        raise DataError(
            f"the splits {dict(splits)} cannot be used; expected names of letters, digits, '.', '-' and '_', and "
            "positive shares that sum to 1"
        )
    return divide_groups(dict.fromkeys(articles, 1), splits, seed)


def _check_articles(articles: Mapping[str, Document]) -> None:
    """Refuse what nothing can be written for.

    Raises:
        DataError: there are none, an id is not that of its article, or a text is empty or holds half a letter.
    """
    if not articles:
        raise DataError("no articles were given; queries are written for one or more")
    for doc_id, article in articles.items():
        if doc_id != article.doc_id or not doc_id or any(letter in doc_id for letter in "\t\r\n"):
            raise DataError(f"the article {doc_id!r} bears the id {article.doc_id!r}; expected the same, on one line")
        if not article.text.strip() or SURROGATE.search(f"{doc_id}{article.full_text}"):
            raise DataError(
                f"the article {doc_id!r} has no text, or half a letter in it (a lone surrogate); leave it out"
            )
