"""The paper's synthetic Wikipedia set as a generator: a language model writes the queries for given articles.

Any endpoint that speaks OpenAI's chat completions serves (a hosted one, vLLM, llama.cpp, Ollama). The result is a
collection in which each query has one relevant document, the article it was written for.

Every finished article goes at once to a progress file beside the collection, so that an interrupted call can be made
again and goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import random
import re
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import read_jsonl
from .chat import ChatEndpoint, NoReplyError, Reply
from .collection import Collection, Document, Qrels, Query

ONLY_TEST = {"test": 1.0}
MAX_ARTICLE_CHARS = 12_000
"""How much of an article's text the prompt holds; about 3000 tokens of English."""
REPLIES_PER_ARTICLE = 3
"""How often an article is asked for before its replies count as unusable."""
MIN_QUERY_WORDS, MAX_QUERY_WORDS = 3, 60
COPIED_WORDS = 8
"""So many words or more that stand in the article in that order count as copied, part of a sentence though they be."""
STOP_AFTER = 16
"""So many articles in a row without any reply end the call: the endpoint is down."""
ROW = {"doc_id", "queries", "failed", "prompt_tokens", "completion_tokens"}
"""The keys of a line in the progress file: one finished article."""
SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a letter, which JSON can carry and UTF-8 cannot."""

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
    with _ProgressFile(out.parent / f"{out.name}.progress.jsonl", settings) as file:
        run = _Run(articles, settings, file, chat, progress, resumed=len(file.rows))
        if run.resumed < len(articles):
            asyncio.run(run.ask_all(concurrency))
    return run.save(out, _assign(articles, splits, seed))


def _hashes(articles: Mapping[str, Document]) -> dict[str, str]:
    """What decides the requests beside the settings: the words of the prompt, and the articles."""
    return {
        "prompt": hashlib.sha256(f"{PROMPT}{MAX_ARTICLE_CHARS}".encode()).hexdigest(),
        "articles": Collection("", dict(articles), {}, {}).content_hash(),
    }


def _check(
    articles: Mapping[str, Document], out: Path, splits: Mapping[str, float], queries_per_article: int, max_tokens: int
) -> None:
    if not articles:
        raise DataError("no articles were given; queries are written for one or more")
    for doc_id, article in articles.items():
        if doc_id != article.doc_id or not doc_id or any(letter in doc_id for letter in "\t\r\n"):
            raise DataError(f"the article {doc_id!r} bears the id {article.doc_id!r}; expected the same, on one line")
        if not article.text.strip() or SURROGATE.search(f"{doc_id}{article.full_text}"):
            raise DataError(
                f"the article {doc_id!r} has no text, or half a letter in it (a lone surrogate); leave it out"
            )
    if out.exists() and not (out / "corpus.jsonl").is_file():
        raise DataError(f"{out} exists and is no collection, so it is not replaced; choose another folder")
    named = all(re.fullmatch(r"[\w.-]+", name) for name in splits)
    if not named or not math.isclose(sum(splits.values()), 1, abs_tol=1e-6) or min(splits.values()) <= 0:
        raise DataError(f"the splits {dict(splits)} cannot be used; expected names and positive shares that sum to 1")
    if min(queries_per_article, max_tokens) < 1:
        raise DataError(f"queries_per_article {queries_per_article}, max_tokens {max_tokens}: expected 1 or more")


def read_queries(reply: str) -> list[Any]:
    """The list under `queries` in a reply, which may stand in a code fence or after reasoning.

    Example:
        >>> read_queries('<think>{?}</think> Sure: {"queries": ["who wrote it?"]}')
        ['who wrote it?']

    Raises:
        ValueError: there is none; the message says what was found.
    """
    text = reply.rpartition("</think>")[2]
    if not text.strip():
        raise ValueError("the reply was empty")
    try:
        value = json.loads(text[text.find("{") : text.rfind("}") + 1])
    except (ValueError, RecursionError) as error:
        raise ValueError("the reply was not JSON") from error
    found = value.get("queries") if isinstance(value, dict) else None
    if not isinstance(found, list) or not found:
        raise ValueError("the reply had no list of queries")
    return found


def find_fault(query: object, article: Document, others: list[str]) -> str | None:
    """Why a query cannot be used for an article that has the queries `others`; None where it can."""
    if not isinstance(query, str) or SURROGATE.search(query):
        return "a query was not text"
    if not MIN_QUERY_WORDS <= len(query.split()) <= MAX_QUERY_WORDS:
        return f"a query had not {MIN_QUERY_WORDS} to {MAX_QUERY_WORDS} words"
    words = _plain(query)
    sentences = {_plain(sentence) for sentence in re.split(r"(?<=[.!?])\s+|\n+", f"{article.title}\n{article.text}")}
    if words in sentences or (words.count(" ") + 1 >= COPIED_WORDS and f" {words} " in f" {_plain(article.text)} "):
        return "a query was copied from the article"
    if words in map(_plain, others):
        return "a query came twice"
    return None


def _plain(text: str) -> str:
    """The words in lower case, without punctuation, joined by one space."""
    return " ".join(re.findall(r"\w+", text.lower()))


class _ProgressFile:
    """One line with the settings, then one line for every article that is done.

    Args:
        path: the file; an existing one is read, and a last line without its end (a killed process) is dropped.
        settings: what has to be the same for a file to be continued.

    Raises:
        DataError: the file was made with other settings, is damaged, or cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as file:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
            lines = read_jsonl(path)
            first = next(lines, None)
            if first:
                self._compare(first[1].get("settings"), settings)
            for number, row in lines:
                if set(row) != ROW:
                    raise DataError(f"{path}:{number}: expected the keys {', '.join(sorted(ROW))}; remove the line")
                self.rows[row["doc_id"]] = row
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}; choose another folder") from error
        if not first:
            self.add({"settings": dict(settings)})

    def _compare(self, old: Any, new: Mapping[str, Any]) -> None:
        if not isinstance(old, dict):
            raise DataError(f"{self.path}:1: no progress file of this function; choose another folder")
        changed = [f"{name} {old.get(name)!r}, now {new[name]!r}" for name in new if old.get(name) != new[name]]
        if changed:
            raise DataError(
                f"{self.path} was made with other settings ({'; '.join(changed)}); go on with the old ones, remove the "
                "file to begin anew, or choose another folder"
            )

    def add(self, row: dict[str, Any]) -> None:
        """Write a line through to the disk."""
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DataError(f"cannot write {self.path}: {error.strerror}; then make the same call again") from error
        if "doc_id" in row:
            self.rows[row["doc_id"]] = row

    def __enter__(self) -> _ProgressFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


@dataclass
class _Run:
    """The state that all workers share."""

    articles: Mapping[str, Document]
    settings: Mapping[str, Any]
    file: _ProgressFile
    chat: ChatEndpoint
    progress: Callable[[int, int], None] | None
    resumed: int
    unanswered: dict[str, str] = field(default_factory=dict)
    in_a_row: int = 0
    started: float = field(default_factory=time.monotonic)

    async def ask_all(self, concurrency: int) -> None:
        """Ask for every article that is not in the progress file."""
        pending = iter([article for doc_id, article in self.articles.items() if doc_id not in self.file.rows])
        try:
            async with self.chat, asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(self._work(pending))
        except ExceptionGroup as errors:
            first = errors.exceptions[0]
            raise first from first.__cause__

    async def _work(self, pending: Iterator[Document]) -> None:
        for article in pending:  # all workers draw from the same iterator
            try:
                self.file.add(await self._ask(article))
                self.in_a_row = 0
            except NoReplyError as error:
                self.unanswered[article.doc_id] = error.reason
                self.in_a_row += 1
                if self.in_a_row == STOP_AFTER:
                    raise DataError(
                        f"{self.chat.url} gave no reply to {STOP_AFTER} articles in a row (the last: {error.reason}"
                        f"{error.detail and ': '}{error.detail}); what is finished is in {self.file.path}: when the "
                        "endpoint works, make the same call again"
                    ) from error
            if self.progress:
                self.progress(len(self.file.rows) + len(self.unanswered), len(self.articles))

    async def _ask(self, article: Document) -> dict[str, Any]:
        """The line of the progress file for one article."""
        wanted, fault = self.settings["queries_per_article"], ""
        queries: list[str] = []
        prompt_tokens = completion_tokens = 0
        prompt = PROMPT.format(count=wanted, title=article.title, text=article.text[:MAX_ARTICLE_CHARS])
        for attempt in range(REPLIES_PER_ARTICLE):
            # Not the same seed twice, else a deterministic endpoint would give the same unusable reply again.
            seed = hashlib.sha256(f"{self.settings['seed']}/{article.doc_id}/{attempt}".encode()).digest()
            complaint = f"\n\nAn earlier reply could not be used: {fault}." if fault else ""
            reply = await self.chat.complete(
                {
                    **{name: self.settings[name] for name in ("model", "max_tokens", "temperature")},
                    "messages": [{"role": "user", "content": prompt + complaint}],
                    "seed": int.from_bytes(seed[:4]) >> 1,
                }
            )
            prompt_tokens += reply.prompt_tokens
            completion_tokens += reply.completion_tokens
            fault = _take(reply, article, queries, wanted)
            if len(queries) == wanted:
                break
        return {
            "doc_id": article.doc_id,
            "queries": queries,
            "failed": None if queries else fault,
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
        }

    def save(self, out: Path, split_of: Mapping[str, str]) -> SyntheticReport:
        """Write the collection; its order is that of the articles, whatever was finished first."""
        queries: dict[str, Query] = {}
        qrels: dict[str, Qrels] = {}
        rows = self.file.rows
        for doc_id in self.articles:
            for number, text in enumerate(rows[doc_id]["queries"] if doc_id in rows else ()):
                query_id = f"q:{doc_id}/{number}"
                queries[query_id] = Query(query_id, text, {"source": doc_id, "model": self.settings["model"]})
                qrels.setdefault(split_of[doc_id], {})[query_id] = {doc_id: 1}
        failed = Counter(row["failed"] for row in rows.values() if row["failed"]) + Counter(self.unanswered.values())
        if not queries:
            reasons = ", ".join(f"{reason}: {number}" for reason, number in failed.most_common())
            raise DataError(
                f"none of the {len(self.articles)} articles got a query ({reasons}); see what "
                f"{self.settings['model']!r} at {self.chat.url} replies, remove {self.file.path} and call again"
            )
        Collection(out.name, dict(self.articles), queries, qrels).save(out)
        return SyntheticReport(
            articles=len(self.articles),
            queries=len(queries),
            failed=dict(failed.most_common()),
            resumed=self.resumed,
            prompt_tokens=sum(row["prompt_tokens"] for row in rows.values()),
            completion_tokens=sum(row["completion_tokens"] for row in rows.values()),
            requests=self.chat.requests,
            seconds=time.monotonic() - self.started,
        )


def _take(reply: Reply, article: Document, queries: list[str], wanted: int) -> str:
    """Add the usable queries of a reply to `queries`, up to `wanted`; returns what was wrong with the reply."""
    try:
        found = read_queries(reply.text)
    except ValueError as error:
        return "the reply was cut at max_tokens" if reply.cut else str(error)
    fault = "the reply had too few queries"
    for query in found:
        problem = find_fault(query, article, queries)
        if problem:
            fault = problem
        elif len(queries) < wanted:
            queries.append(" ".join(query.split()))
    return fault


def _assign(articles: Mapping[str, Document], splits: Mapping[str, float], seed: int) -> dict[str, str]:
    """doc_id -> split, by shares of the shuffled articles, with or without a query."""
    order, names, bounds = sorted(articles), list(splits), list(accumulate(splits.values()))
    random.Random(seed).shuffle(order)
    places = [bisect_right(bounds, (position + 0.5) / len(order)) for position in range(len(order))]
    return {doc_id: names[min(place, len(names) - 1)] for doc_id, place in zip(order, places, strict=True)}
