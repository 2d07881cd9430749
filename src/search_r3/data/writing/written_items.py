"""What a language model is asked to write, and what of it can be used: queries, hard negatives, triples, traces."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..collection import Document, Query
from .replies import MENTION, SPECIAL, SURROGATE, copied_share, plain, read_object

MAX_SHOWN_CHARS = 12_000
"""How much of the documents a prompt holds; about 3000 tokens of English."""
MIN_QUERY_WORDS, MAX_QUERY_WORDS = 3, 60
COPIED_WORDS = 8
"""So many words of a query or more that stand in the article in that order are a copy, of part of a sentence too."""
MAX_LIKE_WORDS = 200
"""Longer documents are not imitated in length: a passage of so many words will do."""
COPIED_RUN, MAX_COPIED = 8, 0.5
"""A passage is a copy where more than this share of its runs of so many words stand in a positive."""
TRACE_RUN, MAX_TRACE_COPIED = 5, 0.3
"""Likewise for a reasoning trace, which has to say things in its own words."""
MIN_TRACE_WORDS = 8

_QUESTION_RULES = """\
- needs this article: neither common knowledge nor an article on a related topic answers it;
- stands alone: its reader has not seen the article, so it never says "the article" or "the text";
- is in your own words, of 5 to 30 of them: it does not repeat the title and copies no sentence.
"""
_NEGATIVE_RULES = """\
- is on the topic of the query and shares words with it, in the manner of {like} and about as long ({words} words);
- does not answer it, in whole or in part: who reads it knows the answer no better than before;
- is sound in itself and could stand in a library: it mentions neither the query nor that it fails to answer it;
- copies no sentence of {like}.
"""
_SHAPE = '{{"title": "...", "text": "..."}}'

NEGATIVES_PROMPT = f"""\
Below is a search query, and what answers it. Write {{count}} different passage(s) that a search engine could take for
an answer by mistake.

Each passage
{_NEGATIVE_RULES}
Reply with JSON and nothing else: {{{{"negatives": [{_SHAPE}, ...]}}}}

Query: {{query}}

{{shown}}"""

QUERIES_PROMPT = f"""\
Write {{count}} different question(s) that people could type into a search engine and that the article below answers.

Each question
{_QUESTION_RULES}
Reply with JSON and nothing else: {{{{"queries": ["...", ...]}}}}

{{shown}}"""

TRIPLE_PROMPT = f"""\
Write a question that people could type into a search engine and that the article below answers, and {{count}} different
passage(s) that a search engine could take for an answer by mistake.

The question
{_QUESTION_RULES}
Each passage
{_NEGATIVE_RULES}
Reply with JSON and nothing else: {{{{"query": "...", "negatives": [{_SHAPE}, ...]}}}}

{{shown}}"""

TRACE_PROMPT = """\
A search engine reasons about a query before it searches: from the words of the query and from what it knows, it works
out what the relevant documents are about. Write that reasoning for the query below.

The reasoning
- leads step by step from the query to what the search has to find, in {low} to {high} words of plain sentences;
- comes from one who has not seen the documents below: they only tell you where the search has to lead. It never
  mentions them ("the document says", "according to the text");
- says everything in its own words: it copies no sentence of theirs.

Reply with JSON and nothing else: {{"reasoning": "..."}}

Query: {query}

{shown}"""


def show(documents: Sequence[Document]) -> str:
    """Documents as a prompt shows them, each cut to its part of `MAX_SHOWN_CHARS`."""
    room = MAX_SHOWN_CHARS // len(documents)
    titled = [f"Title: {document.title}\n\n" if document.title else "" for document in documents]
    return "\n\n".join(
        f"{title}{document.text[:room]}".rstrip() for title, document in zip(titled, documents, strict=True)
    )


def length_like(documents: Sequence[Document]) -> int:
    """The words that a passage should have beside these documents: their mean, `MAX_LIKE_WORDS` at most."""
    words = sum(len(document.text.split()) for document in documents) // len(documents)
    return max(1, min(words, MAX_LIKE_WORDS))


def find_query_fault(query: object, article: Document, others: Sequence[str]) -> str | None:
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


def find_passage_fault(passage: object, positives: Sequence[Document], others: Sequence[Document]) -> str | None:
    """Why a passage is no hard negative beside these positives and the passages `others`; None where it is one.

    What only a reader can see is not checked: whether it answers the query after all.
    """
    if not isinstance(passage, dict) or not isinstance(text := passage.get("text"), str):
        return "a passage had no text"
    title = passage.get("title") or ""
    if not isinstance(title, str) or SURROGATE.search(title + text):
        return "a passage had no text"
    if any(document.title for document in positives) and not title.strip():
        return "a passage had no title"
    like = length_like(positives)
    low, high = max(1, like // 3), max(30, 3 * like)
    if not low <= len(text.split()) <= high:
        return f"a passage had not {low} to {high} words"
    if SPECIAL.search(title + text):
        return "a passage held a special token"
    if copied_share(text, [document.full_text for document in positives], COPIED_RUN) > MAX_COPIED:
        return "a passage was copied from what answers the query"
    if plain(text) in {plain(other.text) for other in others}:
        return "a passage came twice"
    return None


def find_trace_fault(trace: object, positives: Sequence[Document], max_words: int) -> str | None:
    """Why a text is no reasoning trace for a query with these positives; None where it is one."""
    if not isinstance(trace, str) or SURROGATE.search(trace):
        return "the reasoning was not text"
    if not MIN_TRACE_WORDS <= len(trace.split()) <= max_words:
        return f"the reasoning had not {MIN_TRACE_WORDS} to {max_words} words"
    if SPECIAL.search(trace):
        return "the reasoning held a special token"
    if MENTION.search(trace):
        return "the reasoning mentioned the documents, which its reader does not see"
    if copied_share(trace, [document.full_text for document in positives], TRACE_RUN) > MAX_TRACE_COPIED:
        return "the reasoning was copied from the documents"
    return None


def _read_list(reply: dict[str, Any], key: str) -> list[Any]:
    """The list under a key of a reply.

    Raises:
        ValueError: there is none, or an empty one.
    """
    values = reply.get(key)
    if not isinstance(values, list) or not values:
        raise ValueError(f"the reply had no list of {key}")
    return values


def _take_passages(reply: dict[str, Any], positives: Sequence[Document], wanted: int, passages: list[Document]) -> str:
    """Add the usable passages of a reply to `passages`, up to `wanted`; returns what was wrong with the others.

    Raises:
        ValueError: there is no list of them.
    """
    titled = any(document.title for document in positives)
    fault = "the reply had too few negatives"
    for passage in _read_list(reply, "negatives"):
        problem = find_passage_fault(passage, positives, passages)
        if problem:
            fault = problem
        elif len(passages) < wanted:
            # Without titles in the corpus, a title would give the written passages away.
            title = passage["title"].strip() if titled else ""
            passages.append(Document("", passage["text"].strip(), title))
    return fault


def _rows(documents: Sequence[Document]) -> list[dict[str, str]]:
    return [{"title": document.title, "text": document.text} for document in documents]


@dataclass
class _QueryItem:
    """A query, its positives, and what was written for it."""

    query: Query
    positives: Sequence[Document]

    @property
    def item_id(self) -> str:
        """The query's id."""
        return self.query.query_id


@dataclass
class _ArticleItem:
    """An article, and what was written for it, of which `wanted` pieces are enough."""

    article: Document
    wanted: int

    @property
    def item_id(self) -> str:
        """The article's id."""
        return self.article.doc_id


@dataclass
class NegativesItem(_QueryItem):
    """Hard negatives for a query."""

    wanted: int
    _passages: list[Document] = field(default_factory=list)

    @property
    def prompt(self) -> str:
        """What is asked."""
        return NEGATIVES_PROMPT.format(
            count=self.wanted,
            like="what answers it",
            words=length_like(self.positives),
            query=self.query.text,
            shown=show(self.positives),
        )

    def take(self, reply: str) -> str | None:
        """Add the usable passages of a reply; None when they are enough."""
        fault = _take_passages(read_object(reply), self.positives, self.wanted, self._passages)
        return None if len(self._passages) == self.wanted else fault

    def answer(self) -> list[dict[str, str]]:
        """The passages."""
        return _rows(self._passages)


@dataclass
class QueriesItem(_ArticleItem):
    """Queries for an article."""

    _queries: list[str] = field(default_factory=list)

    @property
    def prompt(self) -> str:
        """What is asked."""
        return QUERIES_PROMPT.format(count=self.wanted, shown=show([self.article]))

    def take(self, reply: str) -> str | None:
        """Add the usable queries of a reply, up to the number wanted; None when they are enough."""
        fault = "the reply had too few queries"
        for query in _read_list(read_object(reply), "queries"):
            problem = find_query_fault(query, self.article, self._queries)
            if problem:
                fault = problem
            elif len(self._queries) < self.wanted:
                self._queries.append(" ".join(query.split()))
        return None if len(self._queries) == self.wanted else fault

    def answer(self) -> list[dict[str, Any]]:
        """The queries, without passages."""
        return [{"query": query, "negatives": []} for query in self._queries]


@dataclass
class TripleItem(_ArticleItem):
    """A query for an article, with its hard negatives."""

    _query: str = ""
    _passages: list[Document] = field(default_factory=list)

    @property
    def prompt(self) -> str:
        """What is asked."""
        return TRIPLE_PROMPT.format(
            count=self.wanted, like="the article", words=length_like([self.article]), shown=show([self.article])
        )

    def take(self, reply: str) -> str | None:
        """Keep the reply with the most usable passages: they belong to its query. None when they are enough."""
        values = read_object(reply)
        query, passages = values.get("query"), list[Document]()
        if problem := find_query_fault(query, self.article, []):
            return problem
        fault = _take_passages(values, [self.article], self.wanted, passages)
        if len(passages) > len(self._passages):
            self._query, self._passages = " ".join(str(query).split()), passages
        return None if len(self._passages) == self.wanted else fault

    def answer(self) -> list[dict[str, Any]]:
        """The one query with its passages; empty where no reply had both."""
        return [{"query": self._query, "negatives": _rows(self._passages)}] if self._passages else []


@dataclass
class TraceItem(_QueryItem):
    """The reasoning that leads from a query to its positives."""

    max_words: int
    _trace: str = ""

    @property
    def prompt(self) -> str:
        """What is asked."""
        return TRACE_PROMPT.format(
            low=MIN_TRACE_WORDS, high=self.max_words, query=self.query.text, shown=show(self.positives)
        )

    def take(self, reply: str) -> str | None:
        """Take the reasoning of a reply; None where it can be used."""
        trace = read_object(reply).get("reasoning")
        fault = find_trace_fault(trace, self.positives, self.max_words)
        if fault is None:
            self._trace = " ".join(str(trace).split())
        return fault

    def answer(self) -> str:
        """The reasoning."""
        return self._trace
