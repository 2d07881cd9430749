"""The paper's synthetic Wikipedia set as a generator: a language model writes the queries for given articles.

Any endpoint that speaks OpenAI's chat completions serves (a hosted one, vLLM, llama.cpp, Ollama). The result is a
collection in which each query has one relevant document, the article it was written for.

Every finished article goes at once to a progress file beside the collection, so that an interrupted call can be made
again and goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..collection import Collection, Document, Qrels, Query
from .asking import Asking, ProgressFile, Standing, check_output
from .chat import ChatEndpoint
from .replies import SURROGATE, plain, read_object

ONLY_TEST = {"test": 1.0}
MAX_ARTICLE_CHARS = 12_000
"""How much of an article's text the prompt holds; about 3000 tokens of English."""
MIN_QUERY_WORDS, MAX_QUERY_WORDS = 3, 60
COPIED_WORDS = 8
"""So many words or more that stand in the article in that order count as copied, part of a sentence though they be."""

PROMPT = """\
Write {count} different question(s) that people could type into a search engine and that the article below answers.

Each question
- needs this article: neither common knowledge nor an article on a related topic answers it;
- stands alone: its reader has not seen the article, so it never says "the article" or "the text";
- is in your own words: it does not repeat the article's title and copies none of its sentences;
- has 5 to 30 words.

Reply with JSON and nothing else: {{"queries": ["...", ...]}}

Title: {title}

{text}"""


@dataclass(frozen=True)
class SyntheticReport:
    """What a call of `synthesize` made.

    Attributes:
        articles: documents of the collection.
        queries: queries of the collection.
        failed: reason -> articles that have no query for it.
        resumed: articles that an earlier, interrupted call had finished.
        prompt_tokens: of all finished articles, resumed ones included, as the endpoint counts; so are the next.
        completion_tokens: likewise.
        requests: HTTP requests of this call, retries included.
        seconds: duration of this call.
    """

    articles: int
    queries: int
    failed: dict[str, int]
    resumed: int
    prompt_tokens: int
    completion_tokens: int
    requests: int
    seconds: float


def synthesize(
    articles: Mapping[str, Document],
    out: str | Path,
    *,
    endpoint: str,
    model: str,
    api_key: str | None = None,
    queries_per_article: int = 1,
    concurrency: int = 8,
    timeout: float = 60.0,
    retries: int = 4,
    max_tokens: int = 256,
    temperature: float = 0.7,
    seed: int = 0,
    splits: Mapping[str, float] = ONLY_TEST,
    progress: Callable[[int, int], None] | None = None,
) -> SyntheticReport:
    """Have a language model write queries for articles, and save the collection as a BEIR folder.

    An article without a usable reply stays in the collection as a document without a query. The same call again asks
    only for articles that got no reply. In a notebook: `await asyncio.to_thread(synthesize, ...)`.

    Args:
        articles: doc_id -> document, in a script that parts words by spaces.
        out: the folder; a collection there is replaced at the end. `NAME.progress.jsonl` beside it is kept.
        endpoint: base address, usually ending in `/v1`.
        model: the model's name there.
        api_key: sent as a bearer token; None sends none.
        queries_per_article: queries to ask for; an article may end up with fewer.
        concurrency: requests under way at one time, at most.
        timeout: seconds for one request, from connecting to the end of the reply.
        retries: how often a request is sent again after a timeout, a lost connection, or status 408, 429 or 5xx.
        max_tokens: length of a reply; a model that reasons before it replies needs more.
        temperature: sampling temperature.
        seed: decides the splits, and goes to the endpoint as the seed of its sampling.
        splits: split -> share of the articles; a split that gets no query is left out.
        progress: called with the number of articles done and their total.

    Raises:
        DataError: an argument or the progress file cannot be used, the endpoint refuses key or model or gives no reply
            to many articles in a row, or no article got a query. `out` is then as it was.
    """
    out = Path(out).absolute()
    _check(articles, out, splits, queries_per_article, max_tokens)
    chat = ChatEndpoint(endpoint, api_key, concurrency=concurrency, timeout=timeout, retries=retries)
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    settings = {"model": model, "queries_per_article": queries_per_article, **sampling, **_hashes(articles)}
    started = time.monotonic()
    items = [_Article(article, queries_per_article) for article in articles.values()]
    with ProgressFile(out.parent / f"{out.name}.progress.jsonl", settings, "doc_id", "queries") as file:
        run = Asking(items, "articles", settings, file, chat, progress=progress and _counts(progress))
        run.run(concurrency)
    return _save(run, articles, out, _assign(articles, splits, seed), started)


def _counts(progress: Callable[[int, int], None]) -> Callable[[Standing], None]:
    return lambda standing: progress(standing.done, standing.total)


def _hashes(articles: Mapping[str, Document]) -> dict[str, str]:
    """What decides the requests beside the settings: the words of the prompt, and the articles."""
    return {
        "prompt": hashlib.sha256(f"{PROMPT}{MAX_ARTICLE_CHARS}".encode()).hexdigest(),
        "articles": Collection("", dict(articles), {}, {}).content_hash(),
    }


def _check(
    articles: Mapping[str, Document], out: Path, splits: Mapping[str, float], queries_per_article: int, max_tokens: int
) -> None:
    check_articles(articles)
    check_output(out)
    named = all(re.fullmatch(r"[\w.-]+", name) for name in splits)
    if not named or not math.isclose(sum(splits.values()), 1, abs_tol=1e-6) or min(splits.values()) <= 0:
        raise DataError(f"the splits {dict(splits)} cannot be used; expected names and positive shares that sum to 1")
    if min(queries_per_article, max_tokens) < 1:
        raise DataError(f"queries_per_article {queries_per_article}, max_tokens {max_tokens}: expected 1 or more")


def check_articles(articles: Mapping[str, Document]) -> None:
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


def read_queries(reply: str) -> list[Any]:
    """The list under `queries` in a reply, which may stand in a code fence or after reasoning.

    Example:
        >>> read_queries('<think>{?}</think> Sure: {"queries": ["who wrote it?"]}')
        ['who wrote it?']

    Raises:
        ValueError: there is none; the message says what was found.
    """
    found = read_object(reply).get("queries")
    if not isinstance(found, list) or not found:
        raise ValueError("the reply had no list of queries")
    return found


def find_fault(query: object, article: Document, others: list[str]) -> str | None:
    """Why a query cannot be used for an article that has the queries `others`; None where it can."""
    if not isinstance(query, str) or SURROGATE.search(query):
        return "a query was not text"
    if not MIN_QUERY_WORDS <= len(query.split()) <= MAX_QUERY_WORDS:
        return f"a query had not {MIN_QUERY_WORDS} to {MAX_QUERY_WORDS} words"
    words = plain(query)
    sentences = {plain(sentence) for sentence in re.split(r"(?<=[.!?])\s+|\n+", f"{article.title}\n{article.text}")}
    if words in sentences or (words.count(" ") + 1 >= COPIED_WORDS and f" {words} " in f" {plain(article.text)} "):
        return "a query was copied from the article"
    if words in map(plain, others):
        return "a query came twice"
    return None


@dataclass
class _Article:
    """An article, and the queries that were taken for it."""

    article: Document
    wanted: int

    def __post_init__(self) -> None:
        self.queries: list[str] = []

    @property
    def item_id(self) -> str:
        return self.article.doc_id

    @property
    def prompt(self) -> str:
        return PROMPT.format(count=self.wanted, title=self.article.title, text=self.article.text[:MAX_ARTICLE_CHARS])

    def take(self, reply: str) -> str | None:
        """Add the usable queries of a reply, up to the number wanted."""
        fault = "the reply had too few queries"
        for query in read_queries(reply):
            problem = find_fault(query, self.article, self.queries)
            if problem:
                fault = problem
            elif len(self.queries) < self.wanted:
                self.queries.append(" ".join(query.split()))
        return None if len(self.queries) == self.wanted else fault

    def answer(self) -> list[str]:
        return self.queries


def _save(
    run: Asking, articles: Mapping[str, Document], out: Path, split_of: Mapping[str, str], started: float
) -> SyntheticReport:
    """Write the collection, in the order of the articles, whatever was finished first.

    Raises:
        DataError: no article has a query.
    """
    queries: dict[str, Query] = {}
    qrels: dict[str, Qrels] = {}
    for doc_id, texts in run.answers().items():
        for number, text in enumerate(texts):
            query_id = f"q:{doc_id}/{number}"
            queries[query_id] = Query(query_id, text, {"source": doc_id, "model": run.settings["model"]})
            qrels.setdefault(split_of[doc_id], {})[query_id] = {doc_id: 1}
    if not queries:
        raise run.nothing("a query")
    Collection(out.name, dict(articles), queries, qrels).save(out)
    return SyntheticReport(
        articles=len(articles),
        queries=len(queries),
        failed=run.failed(),
        resumed=run.resumed,
        prompt_tokens=run.prompt_tokens,
        completion_tokens=run.completion_tokens,
        requests=run.chat.requests,
        seconds=time.monotonic() - started,
    )


def _assign(articles: Mapping[str, Document], splits: Mapping[str, float], seed: int) -> dict[str, str]:
    """doc_id -> split, by shares of the shuffled articles, with or without a query."""
    order, names, bounds = sorted(articles), list(splits), list(accumulate(splits.values()))
    random.Random(seed).shuffle(order)
    places = [bisect_right(bounds, (position + 0.5) / len(order)) for position in range(len(order))]
    return {doc_id: names[min(place, len(names) - 1)] for doc_id, place in zip(order, places, strict=True)}
