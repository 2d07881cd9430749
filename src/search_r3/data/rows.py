"""The checks on what a collection is read from: ids, texts, judgements and lists of documents.

A row comes with its place (file and line, or data set, config, split and row); every error begins with it. Where the
data is somebody else's (`KnownIds.dropped`, the argument `dropped`), a row that cannot be used is left out and counted.
"""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ..errors import DataError

NamedRows = Iterable[tuple[str, Mapping[str, Any]]]
"""Pairs of place and row."""
Judged = dict[str, dict[str, int]]
"""query_id -> doc_id -> relevance."""


class Judgements(NamedTuple):
    """The rows of a split, apart: on documents of the corpus, and on others, which no ranking can hold."""

    qrels: Judged
    absent: Judged


@dataclass(frozen=True)
class KnownIds:
    """The ids that judgements and lists may name.

    Attributes:
        queries: ids of the queries.
        documents: ids of the documents.
        skipped: ids of documents that were left out because they hold no text; what names them is left out too.
        queries_in: what holds the queries, for messages.
        documents_in: what holds the documents.
        dropped: counts rows that cannot be used, by what is wrong with them; without it they raise.
    """

    queries: Container[str]
    documents: Container[str]
    skipped: Container[str] = frozenset()
    queries_in: str = "queries.jsonl"
    documents_in: str = "corpus.jsonl"
    dropped: Counter[str] | None = None

    def refuse(self, place: str, kind: str, fault: str) -> None:
        """Count a row that cannot be used as one of its kind, or raise a DataError that says what is wrong."""
        refuse(self.dropped, place, kind, fault)

    def has_query(self, query_id: str, place: str) -> bool:
        """Whether the query is there; an unknown one is refused."""
        if query_id in self.queries:
            return True
        self.refuse(place, "judgements or lists of unknown queries", f"query {query_id!r} is not in {self.queries_in}")
        return False

    def has_document(self, doc_id: str, place: str) -> bool:
        """Whether the document is there (True) or was left out (False); an unknown one is refused."""
        if doc_id in self.documents:
            return True
        if doc_id not in self.skipped:
            self.refuse(place, "unknown documents in lists", f"document {doc_id!r} is not in {self.documents_in}")
        return False


def refuse(dropped: Counter[str] | None, place: str, kind: str, fault: str) -> None:
    """Count a row that cannot be used, or raise a DataError where nothing counts them."""
    if dropped is None:
        raise DataError(f"{place}: {fault}")
    dropped[kind] += 1


def check_documents(
    rows: NamedRows, skipped: set[str] | None, dropped: Counter[str] | None = None
) -> Iterator[tuple[str, str, str]]:
    """Id, title and text of every document; one without any text goes to `skipped`, or raises where that is None."""
    for place, row in _unique(rows, dropped):
        doc_id, title, text = row["_id"], string(row, "title", place, ""), string(row, "text", place)
        if (title + text).strip():
            yield doc_id, title, text
        elif skipped is not None:
            skipped.add(doc_id)
        else:
            raise DataError(f"{place}: document {doc_id!r} has no text; remove it or skip_empty_documents")


def check_queries(
    rows: NamedRows, dropped: Counter[str] | None = None
) -> Iterator[tuple[str, str, Mapping[str, Any], str]]:
    """Id, text, metadata and instruction of every query; the instruction, if any, follows the text as in MTEB."""
    for place, row in _unique(rows, dropped):
        text = string(row, "text", place)
        if not text.strip():
            fault = f"query {row['_id']!r} has no text; remove it or give it text"
            refuse(dropped, place, "queries without text", fault)
            continue
        instruction = "" if row.get("instruction") is None else string(row, "instruction", place)
        instruction = instruction if instruction.strip() else ""
        metadata = row.get("metadata") or {}
        if not isinstance(metadata, Mapping):  # some collections have a text there, or a list
            metadata = {"metadata": metadata}
        yield row["_id"], instructed(text, instruction), metadata, instruction


def instructed(text: str, instruction: str) -> str:
    """A text and its instruction as the one text that is encoded."""
    return f"{text} {instruction}" if instruction.strip() else text


def bare_text(text: str, instruction: str) -> str:
    """The text that `instructed` made one with this instruction."""
    return text.removesuffix(f" {instruction}") if instruction.strip() else text


def check_judgements(rows: Iterable[tuple[str, str, str, Any]], ids: KnownIds, *, repeats: bool = False) -> Judgements:
    """The judgements of a split, from place, query_id, doc_id and score.

    A judgement of a document that is not in the corpus is kept apart, for what measures: as trec_eval reads it, the
    document counts and is never found (ArguAna has one). One of a document that was left out for want of text is not.

    Args:
        rows: the judgements.
        ids: what they may name.
        repeats: accept a pair that is judged again with the same score.

    Raises:
        DataError: a broken row, or not one that names a document of the corpus.
    """
    judgements, where = Judgements({}, {}), ""
    for place, query_id, doc_id, score in rows:
        relevance = _integer(score)
        if relevance is None:
            ids.refuse(place, "judgements without a whole score", f"the score {score!r} is not an integer")
            continue
        if not ids.has_query(query_id, place) or doc_id in ids.skipped:
            continue
        absent = doc_id not in ids.documents
        where = where or (f"{place}: document {doc_id!r} is not in {ids.documents_in}" if absent else "")
        relevance_of = (judgements.absent if absent else judgements.qrels).setdefault(query_id, {})
        if doc_id in relevance_of and not (repeats and relevance_of[doc_id] == relevance):
            fault = f"the pair {query_id!r}, {doc_id!r} is judged in an earlier row too"
            ids.refuse(place, "judgements of a pair that was judged otherwise", fault)
            continue
        relevance_of[doc_id] = relevance
    if where and not judgements.qrels:
        raise DataError(f"{where}, and no other document of these judgements is; another corpus belongs to them")
    return judgements


def check_lists(
    rows: NamedRows, key: str, ids: KnownIds, kind: Literal["excluded", "pools", "changed"]
) -> dict[str, frozenset[str]]:
    """query_id -> documents, from rows of `query-id` and a list of document ids under `key`.

    Excluded documents may be unknown, since BRIGHT's lists name some: they cannot be ranked and are left out. A pool
    holds at least one document. A changed query is named without `-og` and `-changed`; both must be there.
    """
    documents_of: dict[str, frozenset[str]] = {}
    for place, row in rows:
        query_id = string(row, "query-id", place)
        if query_id in documents_of:
            fault = f"query {query_id!r} has a list in an earlier row too; join the two"
            ids.refuse(place, "second lists of a query", fault)
            continue
        names = (f"{query_id}-og", f"{query_id}-changed") if kind == "changed" else (query_id,)
        if not all([ids.has_query(name, place) for name in names]):
            continue
        doc_ids = strings(row, key, place)
        if kind == "excluded":
            documents_of[query_id] = frozenset(doc_id for doc_id in doc_ids if doc_id in ids.documents)
        else:
            documents_of[query_id] = frozenset(doc_id for doc_id in doc_ids if ids.has_document(doc_id, place))
        if kind == "pools" and not documents_of[query_id]:
            raise DataError(f"{place}: the pool of query {query_id!r} has no document to rank; remove the row")
    return {query_id: doc_ids for query_id, doc_ids in documents_of.items() if doc_ids or kind != "excluded"}


def plain_value(field: str, value: Any) -> Any:
    """A field as it is taken, whatever the file's format: ids as strings, a missing text as the empty one."""
    if field in ("text", "title"):
        return "" if value is None else value
    if isinstance(value, list):
        return [str(one) if type(one) is int else one for one in value]
    return str(value) if field.endswith("id") and type(value) is int else value


def string(row: Mapping[str, Any], key: str, place: str, default: str | None = None) -> str:
    """The string under `key`, or a DataError."""
    value = row.get(key, default)
    if not isinstance(value, str):
        raise DataError(f"{place}: the field {key!r} {_value_text(row, key)}; expected a string")
    return check_text(value, f"{place}: the field {key!r}")


def check_text(text: str, what: str) -> str:
    """The text, or a DataError where it cannot be written as UTF-8: half a letter, or bytes that were no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        fault = "a byte that is no UTF-8" if 0xDC80 <= ord(text[error.start]) <= 0xDCFF else "half a surrogate pair"
        raise DataError(f"{what} holds {fault}, which is no text; mend or remove it") from error
    return text


def folded(text: str) -> str:
    """A text without its case and its blanks, by which two queries are the same one.

    Example:
        >>> folded(" Who wrote  it? ")
        'who wrote it?'
    """
    return " ".join(text.casefold().split())


def strings(row: Mapping[str, Any], key: str, place: str) -> list[str]:
    """The list of document ids under `key`, or a DataError."""
    value = row.get(key)
    if not isinstance(value, list) or not all(isinstance(doc_id, str) for doc_id in value):
        raise DataError(f"{place}: the field {key!r} {_value_text(row, key)}; expected a list of document ids")
    return value


def _unique(rows: NamedRows, dropped: Counter[str] | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows, with their `_id` checked."""
    row_ids: set[str] = set()
    for place, row in rows:
        row_id = string(row, "_id", place)
        if not row_id or any(c in row_id for c in "\t\r\n"):
            raise DataError(f"{place}: the _id {row_id!r} is empty or holds a tab or a line break")
        if row_id in row_ids:
            fault = f"the _id {row_id!r} stands in an earlier row too; ids must be unique"
            refuse(dropped, place, "documents or queries with the id of an earlier one", fault)
            continue
        row_ids.add(row_id)
        yield place, row


def _integer(score: Any) -> int | None:
    """A score as text or number (MTEB's are often floats, and some files write `1.0`); None where it is not whole."""
    try:
        number = float(score)
        return int(number) if number == int(number) else None
    except (TypeError, ValueError, OverflowError):
        return None


def _value_text(row: Mapping[str, Any], key: str) -> str:
    return f"is {reprlib.repr(row[key])}" if key in row else "is missing"
