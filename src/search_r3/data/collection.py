"""Documents, queries and relevance judgements: folders in the BEIR layout, read and written line by line."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import atomic_directory, check_replaceable, read_jsonl, read_lines, write_json
from .rows import (
    KnownIds,
    bare_text,
    check_documents,
    check_judgements,
    check_lists,
    check_queries,
    check_text,
    plain_value,
    string,
)

Qrels = dict[str, dict[str, int]]
"""query_id -> doc_id -> relevance (an integer; 0 and below mean not relevant)."""
_FIELDS = {"_id", "title", "text", "query-id", "doc-ids", "excluded"}


@dataclass(frozen=True, slots=True)
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

    `text` ends with the `instruction`, where the query has one apart (`instructed`); `bare` is the text without it.
    `metadata` may hold answers and proofs: it is for training and analysis, never for a model under test.

    Example:
        >>> Query("q1", "Uzbek? Find a page.", instruction="Find a page.").bare
        'Uzbek?'
    """

    query_id: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    instruction: str = ""

    @property
    def bare(self) -> str:
        """The text without its instruction."""
        return bare_text(self.text, self.instruction)

    def without_instruction(self) -> Query:
        """The same query, asked without its instruction."""
        return replace(self, text=self.bare, instruction="")


@dataclass(frozen=True)
class Collection:
    """A test collection: documents, queries and one set of judgements per split.

    Attributes:
        name: e.g. `scifact`.
        documents: doc_id -> document, in memory or in the file that they were read from (`load(mapped=True)`).
        queries: query_id -> query.
        qrels: split -> judgements.
        excluded: query_id -> documents that are taken out of its ranking before it is measured (BRIGHT).
        pools: query_id -> the only documents that are ranked for it (reranking tasks); other queries rank all.
        changed: query -> documents that its changed instruction makes irrelevant (FollowIR's p-MRR); the query stands
            twice in `queries`, as `ID-og` and as `ID-changed`.
        without_text: how many documents (and their judgements) were left out because they hold no text.
        absent: split -> judgements of documents that are not in the corpus. Measures count them as trec_eval does,
            never found (`judgements`); training does not see them.
        dropped: what was wrong with rows that were left out -> how many; of data sets of the hub alone.

    Example:
        >>> documents = {"d1": Document("d1", "Uzbek is a language.")}
        >>> collection = Collection("tiny", documents, {"q1": Query("q1", "Uzbek?")}, {"test": {"q1": {"d1": 1}}})
        >>> collection.split("test")
        {'q1': {'d1': 1}}
    """

    name: str
    documents: Mapping[str, Document]
    queries: dict[str, Query]
    qrels: dict[str, Qrels]
    excluded: dict[str, frozenset[str]] = field(default_factory=dict)
    pools: dict[str, frozenset[str]] = field(default_factory=dict)
    changed: dict[str, frozenset[str]] = field(default_factory=dict)
    without_text: int = 0
    absent: dict[str, Qrels] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)

    def split(self, name: str) -> Qrels:
        """The judgements of one split.

        Raises:
            DataError: the collection has no such split; the message lists those it has.
        """
        if name not in self.qrels:
            raise DataError(f"collection {self.name!r} has no split {name!r}; it has: {', '.join(sorted(self.qrels))}")
        return self.qrels[name]

    def judgements(self, name: str) -> Qrels:
        """All judgements of one split, those of documents that are not in the corpus among them.

        Raises:
            DataError: as in `split`.
        """
        judged, absent = self.split(name), self.absent.get(name, {})
        both = dict.fromkeys([*judged, *absent])
        return {query_id: judged.get(query_id, {}) | absent.get(query_id, {}) for query_id in both}

    def count_absent(self, name: str) -> int:
        """The judgements of one split that name documents which are not in the corpus."""
        return sum(len(gains) for gains in self.absent.get(name, {}).values())

    def pairs(self, *, by_id: bool = False) -> Texts:
        """Pairs of doc_id and full text, in the order of the documents or of their ids; nothing is copied."""
        return Texts(self.documents, by_id)

    def texts(self) -> dict[str, str]:
        """doc_id -> full text, in the order of the documents."""
        return {doc_id: document.full_text for doc_id, document in self.documents.items()}

    def content_hash(self) -> str:
        """SHA-256 (hex) over documents, queries, judgements and lists, independent of their order on disk."""
        return self._content_hash

    @cached_property
    def _content_hash(self) -> str:
        digest = hashlib.sha256()
        for doc_id in sorted(self.documents):
            document = self.documents[doc_id]
            digest.update(json.dumps([document.doc_id, document.title, document.text]).encode())
        for query in sorted(self.queries.values(), key=lambda q: q.query_id):
            apart = [query.instruction] if query.instruction else []
            digest.update(json.dumps([query.query_id, query.text, *apart]).encode())
        digest.update(json.dumps(self.qrels, sort_keys=True).encode())
        if any(self.absent.values()):
            digest.update(json.dumps(["absent", self.absent], sort_keys=True).encode())
        for name, lists in (("excluded", self.excluded), ("pools", self.pools), ("changed", self.changed)):
            if lists:  # the hash of a collection without them stays what it is in the runs that recorded it
                digest.update(name.encode())
            for query_id in sorted(lists):
                digest.update(json.dumps([query_id, sorted(lists[query_id])]).encode())
        return digest.hexdigest()

    @classmethod
    def load(cls, folder: str | Path, *, skip_empty_documents: bool = False, mapped: bool = False) -> Collection:
        """Read a BEIR folder: `corpus.jsonl`, `queries.jsonl`, `qrels/*.tsv`.

        Three more files are read where they are, one row a query: `excluded.jsonl` (`query-id`, `excluded`),
        `pools.jsonl` (`query-id`, `doc-ids`, or `prefix` and `lines` for ids made of the prefix and a number) and
        `changed.jsonl` (`query-id` without `-og` and `-changed`, `doc-ids`). The `instruction` of a query, where it
        has one, follows its text.

        Args:
            folder: the folder.
            skip_empty_documents: leave out documents without any text, and what names them, instead of raising;
                some published collections (Cranfield) have one.
            mapped: leave the documents in `corpus.jsonl`, and read each when it is asked for.

        Raises:
            DataError: a file is missing or empty, an id is missing or doubled, a text is empty, a line is not JSON,
                a score is not an integer, or a judgement names an unknown query or a list an unknown id; file and line
                are named. A judgement of an unknown document goes to `absent`.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(f"no collection at {folder}: expected a folder with corpus.jsonl, queries.jsonl and qrels/")
        empty: set[str] = set()
        corpus = folder / "corpus.jsonl", empty if skip_empty_documents else None
        documents: Mapping[str, Document]
        if mapped:
            from .mapped import MappedDocuments

            documents = MappedDocuments(*corpus)
        else:
            documents = {document.doc_id: document for document in iter_documents(*corpus)}
        queries = {row[0]: Query(*row) for row in check_queries(_rows(folder / "queries.jsonl"))}
        ids = KnownIds(queries, documents, empty)
        paths = sorted((folder / "qrels").glob("*.tsv"))
        if not paths:
            raise DataError(f"{folder / 'qrels'}: no *.tsv file; a collection needs at least one split of judgements")
        judgements = {path.stem: check_judgements(_judgements(path), ids) for path in paths}
        for path in paths:
            if not judgements[path.stem].qrels:
                raise DataError(f"{path}: the file has no judgements")
        return cls(
            folder.resolve().name,
            documents,
            queries,
            {split: one.qrels for split, one in judgements.items()},
            excluded=check_lists(_rows(folder / "excluded.jsonl", optional=True), "excluded", ids, "excluded"),
            pools=check_lists(_pools(folder / "pools.jsonl"), "doc-ids", ids, "pools"),
            changed=check_lists(_rows(folder / "changed.jsonl", optional=True), "doc-ids", ids, "changed"),
            without_text=len(empty),
            absent={split: one.absent for split, one in judgements.items() if one.absent},
        )

    def save(self, folder: str | Path, *, reports: Mapping[str, Any] | None = None) -> None:
        """Write the collection as a BEIR folder; an existing folder is replaced only when all is written.

        Args:
            folder: where.
            reports: file name -> what stands as JSON in the folder beside the collection, e.g. how it was made.

        Raises:
            ConfigError: the folder holds something else than a collection.
        """
        check_replaceable(Path(folder), ("corpus.jsonl",))
        documents = ({"_id": d.doc_id, "title": d.title, "text": d.text} for d in self.documents.values())
        queries = (
            {"_id": q.query_id, "text": q.bare}
            | ({"instruction": q.instruction} if q.instruction else {})
            | ({"metadata": dict(q.metadata)} if q.metadata else {})
            for q in self.queries.values()
        )
        with atomic_directory(Path(folder)) as out:
            _write_rows(out / "corpus.jsonl", documents)
            _write_rows(out / "queries.jsonl", queries)
            (out / "qrels").mkdir()
            for name in self.qrels:
                with (out / "qrels" / f"{name}.tsv").open("w", encoding="utf-8") as file:
                    file.write("query-id\tcorpus-id\tscore\n")
                    for query_id, relevance in self.judgements(name).items():
                        file.writelines(f"{query_id}\t{doc_id}\t{score}\n" for doc_id, score in relevance.items())
            for name, key, lists in (
                ("excluded", "excluded", self.excluded),
                ("pools", "doc-ids", self.pools),
                ("changed", "doc-ids", self.changed),
            ):
                if lists:
                    rows = ({"query-id": query_id, key: sorted(doc_ids)} for query_id, doc_ids in lists.items())
                    _write_rows(out / f"{name}.jsonl", rows)
            for name, report in (reports or {}).items():
                write_json(out / name, report)


@dataclass(frozen=True)
class Texts:
    """Pairs of doc_id and full text, made anew in every iteration; as `Collection.pairs`."""

    documents: Mapping[str, Document]
    by_id: bool = False

    def __iter__(self) -> Iterator[tuple[str, str]]:
        doc_ids = sorted(self.documents) if self.by_id else self.documents
        return ((doc_id, self.documents[doc_id].full_text) for doc_id in doc_ids)


@dataclass(frozen=True)
class CorpusFile:
    """Pairs of doc_id and full text, read from a `corpus.jsonl` anew in every iteration, so that none needs to be held.

    Attributes:
        path: the file.
        skipped: as in `iter_documents`.

    Raises:
        DataError: in an iteration, as `iter_documents`.
    """

    path: Path
    skipped: set[str] | None = None

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return ((document.doc_id, document.full_text) for document in iter_documents(self.path, self.skipped))


def iter_documents(path: Path, skipped: set[str] | None = None) -> Iterator[Document]:
    """The documents of a `corpus.jsonl`, one line at a time.

    Args:
        path: the file.
        skipped: takes the ids of documents without any text, which are left out; without it they raise.

    Raises:
        DataError: the file is missing or empty, an id is missing or doubled, a text is empty or a line is not JSON;
            file and line are named.
    """
    for doc_id, title, text in check_documents(_rows(path), skipped):
        yield Document(doc_id, text, title)


def _rows(path: Path, *, optional: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and row for every line of a JSON Lines file; an optional file may be missing or empty."""
    if optional and not path.exists():
        return
    number = 0
    for number, row in read_jsonl(path):
        yield f"{path}:{number}", plain_row(row)
    if not number and not optional:
        raise DataError(f"{path}: the file has no rows")


def plain_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row with each field as it is taken (`plain_value`)."""
    return row | {name: plain_value(name, row[name]) for name in _FIELDS & row.keys()}


def _pools(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of `pools.jsonl`, all with `doc-ids`."""
    for place, row in _rows(path, optional=True):
        if "doc-ids" not in row and "lines" in row:
            prefix, lines = string(row, "prefix", place), row["lines"]
            if not isinstance(lines, list) or not all(type(line) is int for line in lines):
                raise DataError(f"{place}: the field 'lines' is {reprlib.repr(lines)}; expected a list of integers")
            row = {**row, "doc-ids": [f"{prefix}{line}" for line in lines]}
        yield place, row


def _judgements(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """Place, query_id, doc_id and score for every line of a qrels file."""
    for number, line in read_lines(path):
        cells = line.rstrip("\r\n").split("\t")
        if not line.strip() or (number == 1 and cells[-1] == "score"):
            continue
        if len(cells) != 3:
            raise DataError(
                f"{path}:{number}: expected 3 tab-separated columns (query-id, corpus-id, score), found {len(cells)}"
            )
        yield f"{path}:{number}", cells[0], cells[1], cells[2]


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            text = json.dumps(row, ensure_ascii=False)
            file.write(check_text(text, f"{path.name}: the row {row.get('_id', '')!r}") + "\n")
