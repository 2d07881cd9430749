"""What a language model is asked to write, and what of it can be used: queries, hard negatives, triples, traces."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..collection import Document, Query
from .asking import Item
from .replies import MENTION, SPECIAL, SURROGATE, copied_share, plain

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


def find_passage_fault(passage: object, positives: Sequence[Document], others: Sequence[str]) -> str | None:
    """Why a passage is no hard negative beside these positives and the texts `others`; None where it is one.

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
    if plain(text) in map(plain, others):
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


def _take_passages(
    reply: dict[str, Any], positives: Sequence[Document], wanted: int, before: Sequence[dict[str, str]] = ()
) -> tuple[list[dict[str, str]], str]:
    """The passages so far with the usable ones of a reply, up to `wanted`; and, of too few, what was wrong with others.

    Raises:
        ValueError: there is no list of them.
    """
    titled = any(document.title for document in positives)
    passages, fault = list(before), "the reply had too few negatives"
    for passage in _read_list(reply, "negatives"):
        problem = find_passage_fault(passage, positives, [other["text"] for other in passages])
        if problem:
            fault = problem
        elif len(passages) < wanted:
            # Without titles in the corpus, a title would give the written passages away.
            passages.append({"title": passage["title"].strip() if titled else "", "text": passage["text"].strip()})
    return passages, "" if len(passages) == wanted else fault


def negatives_item(query: Query, positives: Sequence[Document], wanted: int) -> Item:
    """Hard negatives for a query; the answer is a list of passages."""

    def prompt() -> str:
        like, words = "what answers it", length_like(positives)
        return NEGATIVES_PROMPT.format(count=wanted, like=like, words=words, query=query.text, shown=show(positives))

    return Item(query.query_id, prompt, lambda reply, passages: _take_passages(reply, positives, wanted, passages), [])


def queries_item(article: Document, wanted: int) -> Item:
    """Queries for an article; the answer is a list of them, as of triples without passages."""

    def take(reply: dict[str, Any], before: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
        queries, fault = [one["query"] for one in before], "the reply had too few queries"
        for query in _read_list(reply, "queries"):
            problem = find_query_fault(query, article, queries)
            if problem:
                fault = problem
            elif len(queries) < wanted:
                queries.append(" ".join(query.split()))
        answer = [{"query": query, "negatives": []} for query in queries]
        return answer, "" if len(queries) == wanted else fault

    return Item(article.doc_id, lambda: QUERIES_PROMPT.format(count=wanted, shown=show([article])), take, [])


def triple_item(article: Document, wanted: int) -> Item:
    """A query for an article with its hard negatives; the answer is a list of the one, or empty: no reply had both."""

    def prompt() -> str:
        like, words = "the article", length_like([article])
        return TRIPLE_PROMPT.format(count=wanted, like=like, words=words, shown=show([article]))

    def take(reply: dict[str, Any], before: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
        """Keep the reply with the most usable passages: they belong to its query."""
        query = reply.get("query")
        if problem := find_query_fault(query, article, []):
            return before, problem
        passages, fault = _take_passages(reply, [article], wanted)
        if len(passages) > max((len(one["negatives"]) for one in before), default=0):
            return [{"query": " ".join(str(query).split()), "negatives": passages}], fault
        return before, fault

    return Item(article.doc_id, prompt, take, [])


def trace_item(query: Query, positives: Sequence[Document], max_words: int) -> Item:
    """The reasoning that leads from a query to its positives; the answer is a text."""

    def prompt() -> str:
        return TRACE_PROMPT.format(low=MIN_TRACE_WORDS, high=max_words, query=query.text, shown=show(positives))

    def take(reply: dict[str, Any], before: str) -> tuple[str, str]:
        trace = reply.get("reasoning")
        if fault := find_trace_fault(trace, positives, max_words):
            return before, fault
        return " ".join(str(trace).split()), ""

    return Item(query.query_id, prompt, take, "")
