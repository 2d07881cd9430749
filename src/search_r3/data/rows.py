"""The checks on what a collection is read from: ids, texts, judgements and lists of documents.

A row comes with its place (file and line, or data set, config, split and row); every error begins with it.
"""

from __future__ import annotations

import reprlib
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import DataError

NamedRows = Iterable[tuple[str, Mapping[str, Any]]]
"""Pairs of place and row."""


@dataclass(frozen=True)
class KnownIds:
    """The ids that judgements and lists may name.

    Attributes:
        queries: ids of the queries.
        documents: ids of the documents.
        skipped: ids of documents that were left out because they hold no text; what names them is left out too.
        queries_in: what holds the queries, for messages.
        documents_in: what holds the documents.
    """

    queries: Container[str]
    documents: Container[str]
    skipped: Container[str] = frozenset()
    queries_in: str = "queries.jsonl"
    documents_in: str = "corpus.jsonl"

    def check_query(self, query_id: str, place: str) -> None:
        """Raise a DataError for an unknown query."""
        if query_id not in self.queries:
            raise DataError(f"{place}: query {query_id!r} is not in {self.queries_in}")

    def keeps(self, doc_id: str, place: str) -> bool:
        """Whether the document is there (True) or was left out (False); a DataError for an unknown one."""
        if doc_id in self.documents:
            return True
        if doc_id in self.skipped:
            return False
        raise DataError(f"{place}: document {doc_id!r} is not in {self.documents_in}")


def check_documents(rows: NamedRows, skipped: set[str] | None) -> Iterator[tuple[str, str, str]]:
    """Id, title and text of every document; one without any text goes to `skipped`, or raises where that is None."""
    for place, row in _unique(rows):
        doc_id, title, text = row["_id"], string(row, "title", place, ""), string(row, "text", place)
        if (title + text).strip():
            yield doc_id, title, text
        elif skipped is not None:
            skipped.add(doc_id)
        else:
            raise DataError(f"{place}: document {doc_id!r} has no text; remove it or skip_empty_documents")


def check_queries(rows: NamedRows) -> Iterator[tuple[str, str, Mapping[str, Any], str]]:
    """Id, text, metadata and instruction of every query; the instruction, if any, follows the text as in MTEB."""
    for place, row in _unique(rows):
        text = string(row, "text", place)
        if not text.strip():
            raise DataError(f"{place}: query {row['_id']!r} has no text; remove it or give it text")
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


def check_judgements(
    rows: Iterable[tuple[str, str, str, Any]], ids: KnownIds, *, repeats: bool = False
) -> dict[str, dict[str, int]]:
    """query_id -> doc_id -> relevance, from place, query_id, doc_id and score.

    Args:
        rows: the judgements.
        ids: what they may name.
        repeats: accept a pair that is judged again with the same score.
    """
    qrels: dict[str, dict[str, int]] = {}
    for place, query_id, doc_id, score in rows:
        relevance = _integer(score, place)
        ids.check_query(query_id, place)
        if not ids.keeps(doc_id, place):
            continue
        relevance_of = qrels.setdefault(query_id, {})
        if doc_id in relevance_of and not (repeats and relevance_of[doc_id] == relevance):
            raise DataError(f"{place}: the pair {query_id!r}, {doc_id!r} is judged in an earlier row too")
        relevance_of[doc_id] = relevance
    return qrels


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
            raise DataError(f"{place}: query {query_id!r} has a list in an earlier row too; join the two")
        for name in (f"{query_id}-og", f"{query_id}-changed") if kind == "changed" else (query_id,):
            ids.check_query(name, place)
        doc_ids = strings(row, key, place)
        if kind == "excluded":
            documents_of[query_id] = frozenset(doc_id for doc_id in doc_ids if doc_id in ids.documents)
        else:
            documents_of[query_id] = frozenset(doc_id for doc_id in doc_ids if ids.keeps(doc_id, place))
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


def strings(row: Mapping[str, Any], key: str, place: str) -> list[str]:
    """The list of document ids under `key`, or a DataError."""
    value = row.get(key)
    if not isinstance(value, list) or not all(isinstance(doc_id, str) for doc_id in value):
        raise DataError(f"{place}: the field {key!r} {_value_text(row, key)}; expected a list of document ids")
    return value


def _unique(rows: NamedRows) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows, with their `_id` checked."""
    row_ids: set[str] = set()
    for place, row in rows:
        row_id = string(row, "_id", place)
        if not row_id or any(c in row_id for c in "\t\r\n"):
            raise DataError(f"{place}: the _id {row_id!r} is empty or holds a tab or a line break")
        if row_id in row_ids:
            raise DataError(f"{place}: the _id {row_id!r} stands in an earlier row too; ids must be unique")
        row_ids.add(row_id)
        yield place, row


def _integer(score: Any, place: str) -> int:
    """A score as text or number; MTEB's are often floats, and some files write `1.0`."""
    try:
        number = float(score)
        if number == int(number):
            return int(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise DataError(f"{place}: the score {score!r} is not an integer")


def _value_text(row: Mapping[str, Any], key: str) -> str:
    return f"is {reprlib.repr(row[key])}" if key in row else "is missing"
