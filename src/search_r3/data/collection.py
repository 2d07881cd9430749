"""Documents, queries and relevance judgements: folders in the BEIR layout, read and written line by line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import atomic_directory, read_jsonl

Qrels = dict[str, dict[str, int]]
"""query_id -> doc_id -> relevance (an integer; 0 and below mean not relevant)."""


@dataclass(frozen=True)
class Document:
    """One document of a collection."""

    doc_id: str
    text: str
    title: str = ""

    @property
    def full_text(self) -> str:
        """Title and text joined by one space, as BEIR does; what is encoded and what BM25 reads."""
        return f"{self.title} {self.text}".strip()


@dataclass(frozen=True)
class Query:
    """One query.

    `metadata` may hold answers and proofs: it is for training and analysis, never for a model under test.
    """

    query_id: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Collection:
    """A test collection: documents, queries and one set of judgements per split.

    Example:
        >>> documents = {"d1": Document("d1", "Uzbek is a language.")}
        >>> collection = Collection("tiny", documents, {"q1": Query("q1", "Uzbek?")}, {"test": {"q1": {"d1": 1}}})
        >>> collection.split("test")
        {'q1': {'d1': 1}}
    """

    name: str
    documents: dict[str, Document]
    queries: dict[str, Query]
    qrels: dict[str, Qrels]

    def split(self, name: str) -> Qrels:
        """The judgements of one split.

        Raises:
            DataError: the collection has no such split; the message lists those it has.
        """
        if name not in self.qrels:
            raise DataError(f"collection {self.name!r} has no split {name!r}; it has: {', '.join(sorted(self.qrels))}")
        return self.qrels[name]

    def texts(self) -> dict[str, str]:
        """doc_id -> full text, in the order of the documents."""
        return {doc_id: document.full_text for doc_id, document in self.documents.items()}

    def content_hash(self) -> str:
        """SHA-256 (hex) over documents, queries and judgements, independent of their order on disk."""
        digest = hashlib.sha256()
        for document in sorted(self.documents.values(), key=lambda d: d.doc_id):
            digest.update(json.dumps([document.doc_id, document.title, document.text]).encode())
        for query in sorted(self.queries.values(), key=lambda q: q.query_id):
            digest.update(json.dumps([query.query_id, query.text]).encode())
        digest.update(json.dumps(self.qrels, sort_keys=True).encode())
        return digest.hexdigest()

    @classmethod
    def load(cls, folder: str | Path, *, skip_empty_documents: bool = False) -> Collection:
        """Read a BEIR folder: `corpus.jsonl`, `queries.jsonl`, `qrels/*.tsv`.

        Args:
            folder: the folder.
            skip_empty_documents: leave out documents without any text, and judgements of them, instead of raising;
                some published collections (Cranfield) have one.

        Raises:
            DataError: a file is missing or empty, an id is missing or doubled, a text is empty, a line is not JSON,
                a score is not an integer, or a judgement names an unknown id; file and line are named.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(f"no collection at {folder}: expected a folder with corpus.jsonl, queries.jsonl and qrels/")
        empty: set[str] = set()
        corpus = iter_documents(folder / "corpus.jsonl", empty if skip_empty_documents else None)
        documents = {document.doc_id: document for document in corpus}
        queries: dict[str, Query] = {}
        for place, row in _rows(folder / "queries.jsonl"):
            text = _string(row, "text", place)
            if not text.strip():
                raise DataError(f"{place}: query {row['_id']!r} has no text; remove it or give it text")
            queries[row["_id"]] = Query(row["_id"], text, row.get("metadata") or {})
        paths = sorted((folder / "qrels").glob("*.tsv"))
        if not paths:
            raise DataError(f"{folder / 'qrels'}: no *.tsv file; a collection needs at least one split of judgements")
        qrels = {path.stem: _read_qrels(path, queries, documents, empty) for path in paths}
        return cls(folder.resolve().name, documents, queries, qrels)

    def save(self, folder: str | Path) -> None:
        """Write the collection as a BEIR folder; an existing folder is replaced only when all is written."""
        with atomic_directory(Path(folder)) as out:
            with (out / "corpus.jsonl").open("w", encoding="utf-8") as file:
                for document in self.documents.values():
                    row: dict[str, Any] = {
                        "_id": document.doc_id,
                        "title": document.title,
                        "text": document.text,
                    }
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            with (out / "queries.jsonl").open("w", encoding="utf-8") as file:
                for query in self.queries.values():
                    row = {"_id": query.query_id, "text": query.text}
                    if query.metadata:
                        row["metadata"] = dict(query.metadata)
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            (out / "qrels").mkdir()
            for name, judgements in self.qrels.items():
                with (out / "qrels" / f"{name}.tsv").open("w", encoding="utf-8") as file:
                    file.write("query-id\tcorpus-id\tscore\n")
                    for query_id, relevance in judgements.items():
                        file.writelines(f"{query_id}\t{doc_id}\t{score}\n" for doc_id, score in relevance.items())


@dataclass(frozen=True)
class CorpusFile:
    """Pairs of doc_id and full text, read from a `corpus.jsonl` anew in every iteration, so that none needs to be held.

    Raises:
        DataError: in an iteration, as `iter_documents`.
    """

    path: Path

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return ((document.doc_id, document.full_text) for document in iter_documents(self.path))


def iter_documents(path: Path, skipped: set[str] | None = None) -> Iterator[Document]:
    """The documents of a `corpus.jsonl`, one line at a time.

    Args:
        path: the file.
        skipped: takes the ids of documents without any text, which are left out; without it they raise.

    Raises:
        DataError: the file is missing or empty, an id is missing or doubled, a text is empty or a line is not JSON;
            file and line are named.
    """
    for place, row in _rows(path):
        title, text = _string(row, "title", place, ""), _string(row, "text", place)
        if (title + text).strip():
            yield Document(row["_id"], text, title)
        elif skipped is not None:
            skipped.add(row["_id"])
        else:
            raise DataError(f"{place}: document {row['_id']!r} has no text; remove it or skip_empty_documents")


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `(place, row)` for a corpus or queries file, with the `_id` checked."""
    seen: set[str] = set()
    for number, row in read_jsonl(path):
        place = f"{path}:{number}"
        row_id = _string(row, "_id", place)
        if not row_id or any(c in row_id for c in "\t\r\n"):
            raise DataError(f"{place}: the _id {row_id!r} is empty or holds a tab or a line break")
        if row_id in seen:
            raise DataError(f"{place}: the _id {row_id!r} stands on an earlier line too; ids must be unique")
        seen.add(row_id)
        yield place, row
    if not seen:
        raise DataError(f"{path}: the file has no rows")


def _string(row: Mapping[str, Any], key: str, place: str, default: str | None = None) -> str:
    value = row.get(key, default)
    if not isinstance(value, str):
        what = "is missing" if key not in row else f"is {value!r}"
        raise DataError(f"{place}: the field {key!r} {what}; expected a string")
    return value


def _read_qrels(
    path: Path, queries: Mapping[str, Query], documents: Mapping[str, Document], skipped: set[str]
) -> Qrels:
    qrels: Qrels = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}:{number}"
            cells = line.rstrip("\r\n").split("\t")
            if not line.strip() or (number == 1 and cells[-1] == "score"):
                continue
            if len(cells) != 3:
                raise DataError(
                    f"{place}: expected 3 tab-separated columns (query-id, corpus-id, score), found {len(cells)}"
                )
            query_id, doc_id, score = cells
            try:
                relevance = int(score)
            except ValueError as error:
                raise DataError(f"{place}: the score {score!r} is not an integer") from error
            if query_id not in queries:
                raise DataError(f"{place}: query {query_id!r} is not in queries.jsonl")
            if doc_id in skipped:
                continue
            if doc_id not in documents:
                raise DataError(f"{place}: document {doc_id!r} is not in corpus.jsonl")
            if doc_id in qrels.setdefault(query_id, {}):
                raise DataError(f"{place}: the pair {query_id!r}, {doc_id!r} is judged on an earlier line too")
            qrels[query_id][doc_id] = relevance
    if not qrels:
        raise DataError(f"{path}: the file has no judgements")
    return qrels
