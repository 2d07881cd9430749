"""What is held in memory of a store of few chunks: vectors with an exact index, chunks, the list of documents.

LanceDB would take milliseconds for each query. What is held of a version never changes, so searches wait for nobody. A
write of this process makes the next version of it, of which only what was written is new; after a write of another
process all is read anew.

Shapes: `Q` queries, `N` chunks, `D` vector size.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ..extras import extra
from ..types import Array
from .filters import quote
from .rows import CHUNK

IN_MEMORY = 20_000
"""Chunks from which on there is an index on the disk instead."""
CHUNK_BYTES = 64 * 2**20
"""Texts and facts of the chunks are held, too, if they take no more."""

Ranking = list[tuple[str, str, float]]
"""Ids of chunks and documents with scores, best first; equal scores by id, the larger first, as everywhere."""


class Entry(NamedTuple):
    """A document of a store: its id, title, path, source, and number of chunks."""

    doc_id: str
    title: str
    path: str
    source: str
    chunks: int


@dataclass
class Change:
    """What a write changes. Before it was `told`, it may be everything."""

    told: bool = False
    documents: Collection[str] = ()
    rows: Any = None
    more: int = 0

    def tell(self, documents: Collection[str] = (), rows: Any = None, more: int = 0) -> None:
        """These documents are no longer what they were; `rows` (a table of `rows.to_table`) are theirs now.

        Args:
            documents: ids.
            rows: none of a document that was removed.
            more: by so many the number of documents grew.
        """
        self.told, self.documents, self.rows, self.more = True, documents, rows, more


class _Document(NamedTuple):
    facts: tuple[str, str, str]
    names: list[str]


@dataclass(frozen=True)
class Held:
    """A version of the table. Where there are many chunks it is empty.

    Attributes:
        many: whether there are.
        names: ids of the chunks.
        matrix: their vectors, `N x D`.
        parents: id of a chunk -> of its document.
        documents: id -> title, path, source, and the ids of the chunks.
        whole: whether texts and facts are held, too: `chunks` in the `places`, what was written since then in `fresh`.
        size: the bytes of that, once more for each time that a row was written.
    """

    many: bool = False
    names: Sequence[str] = ()
    matrix: Array = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    parents: dict[str, str] = field(default_factory=dict)
    documents: dict[str, _Document] = field(default_factory=dict)
    whole: bool = False
    chunks: Any = None
    places: dict[str, int] = field(default_factory=dict)
    fresh: dict[str, dict[str, Any]] = field(default_factory=dict)
    size: int = 0

    @cached_property
    def entries(self) -> list[Entry]:
        """The documents by their ids."""
        return [Entry(doc_id, *one.facts, len(one.names)) for doc_id, one in sorted(self.documents.items())]

    @cached_property
    def _index(self) -> Any:
        from ..retrieval.index import ExactIndex

        return ExactIndex(self.names, self.matrix)

    def nearest(self, queries: Array, depth: int) -> list[Ranking]:
        """The nearest chunks of each query by cosine."""
        if not self.names:
            return [[] for _ in queries]
        result = self._index.search(queries, depth)
        return [
            [(name, self.parents[name], score) for name, score in zip(line, scores.tolist(), strict=True)]
            for line, scores in zip(result.doc_ids, result.scores, strict=True)
        ]

    def rows(self, names: Collection[str]) -> dict[str, dict[str, Any]]:
        """The rows of these chunks by id, of those that are held."""
        rows = {name: self.fresh[name] for name in names if name in self.fresh}
        if places := sorted(self.places[name] for name in names if name in self.places):
            rows.update((row["id"], row) for row in self.chunks.take(places).to_pylist())
        return rows

    def after(self, changes: Sequence[Change]) -> Held | None:
        """What the next version holds; None where it has to be read."""
        if self.many:
            return self
        size = self.size + sum(change.rows.nbytes for change in changes if change.rows is not None)
        if self.whole and size > CHUNK_BYTES:
            return None
        parents, documents = dict(self.parents), dict(self.documents)
        places, fresh, vectors = dict(self.places), dict(self.fresh), dict[str, Array]()
        by_name: list[dict[str, Any]] = [parents, places, fresh, vectors]
        for change in changes:
            for doc_id in documents.keys() & set(change.documents):
                for name in documents.pop(doc_id).names:
                    for known in by_name:
                        known.pop(name, None)
            if change.rows is None:
                continue
            rows = change.rows.select(CHUNK).to_pylist()
            if any(row["id"] in parents for row in rows):  # a chunk that went from one document to another
                return None
            vectors |= {row["id"]: line for row, line in zip(rows, matrix_of(change.rows["vector"]), strict=True)}
            fresh |= {row["id"]: row for row in rows} if self.whole else {}
            _add(rows, parents, documents)
        if len(parents) >= IN_MEMORY:
            return None
        kept = [place for place, name in enumerate(self.names) if name in parents and name not in vectors]
        names = [*(self.names[place] for place in kept), *vectors]
        matrix = (
            np.concatenate([self.matrix[kept], *(line[None] for line in vectors.values())]) if names else self.matrix
        )
        return Held(False, names, matrix, parents, documents, self.whole, self.chunks, places, fresh, size)


class Memory:
    """Holds the newest version of a table whose vectors are normalised. Threads may share it."""

    def __init__(self, table: Any, dimension: int) -> None:
        self._table, self._dimension = table, dimension
        self._mutex = threading.Lock()
        self._held, self._version = Held(), -1
        self._changes: list[Change] = []  # since then, up to that version
        self._total: int | None = None
        self._writing = False

    def now(self) -> Held:
        """The newest version; while this process is writing, that before the write."""
        with self._mutex:
            self._refresh()
            return self._held

    def total(self) -> int:
        """The number of documents, however many there are; read once, and then counted on."""
        with self._mutex:
            self._refresh()
            if not self._held.many:
                return len(self._held.documents)
            if self._total is None:
                batches = self._table.search().select(["parent_id"]).to_batches()
                total = len(set().union(*(batch["parent_id"].unique().to_pylist() for batch in batches)))
                if self._table.version != self._version:  # a write that goes on, and will be counted when it ends
                    return total
                self._total = total
            return self._total

    def page(self, after: str, limit: int) -> list[Entry]:
        """The documents behind an id, in the order of their ids, at most so many."""
        held = self.now()
        if held.many:
            return self._page_read(after, limit)
        start = bisect_right(held.entries, after, key=lambda entry: entry.doc_id)
        return held.entries[start : start + limit]

    @contextmanager
    def writing(self) -> Iterator[Change]:
        """A write; the caller holds the store's lock, and tells what it changed."""
        self._table.checkout_latest()
        before, change = self._table.version, Change()
        with self._mutex:
            self._writing = self._version == before
        try:
            yield change
            after = self._table.version if change.told else before
        finally:
            with self._mutex:
                self._writing = False
        with self._mutex:
            if self._version != before or before == after:
                return
            self._version = after
            self._total = None if self._total is None else self._total + change.more
            self._changes += [] if self._held.many else [change]
            few_again = self._held.many and self._table.count_rows() < IN_MEMORY
            # What nobody has searched for is not kept.
            if few_again or sum(one.rows.nbytes for one in self._changes if one.rows is not None) > CHUNK_BYTES:
                self._held, self._version, self._changes = Held(), -1, []

    def _refresh(self) -> None:
        version = self._version if self._writing else self._table.version
        if version != self._version:
            self._held, self._version, self._total, self._changes = self._read(), version, None, []
        if self._changes:
            self._held, self._changes = self._held.after(self._changes) or self._read(), []

    def _page_read(self, after: str, limit: int) -> list[Entry]:
        """Of many: the ids in their order, until the last document of the page is whole; then the rest of its rows."""
        with extra("serve"):
            from lancedb.query import ColumnOrdering

        depth, ids, ended = limit, list[str](), False
        while len(set(ids)) <= limit and not ended:
            depth *= 4
            query = self._table.search().select(["parent_id"]).where(f"parent_id > {quote(after)}").limit(depth)
            query = query.order_by([ColumnOrdering(column_name="parent_id")])
            ids = query.to_arrow()["parent_id"].to_pylist()
            ended = len(ids) < depth
        page = list(dict.fromkeys(ids))[:limit]
        if not page:
            return []
        condition = f"parent_id > {quote(after)} AND parent_id <= {quote(page[-1])}"
        query = self._table.search().select(["parent_id", "title", "path", "source"]).where(condition)
        return entries_of(row for batch in query.to_batches() for row in batch.to_pylist())

    def _read(self) -> Held:
        """All rows, in one pass."""
        with extra("serve"):
            import pyarrow as pa

        count = self._table.count_rows()
        if count >= IN_MEMORY:
            return Held(many=True)
        parents, documents = dict[str, str](), dict[str, _Document]()
        vectors, chunks, size = [np.zeros((0, self._dimension), np.float32)], list[Any](), 0
        for batch in self._table.search().select([*CHUNK, "vector"]).to_batches():
            vectors.append(matrix_of(batch["vector"]))
            _add(batch.select(["id", "parent_id", "title", "path", "source"]).to_pylist(), parents, documents)
            chunk = batch.select(CHUNK)
            size += chunk.nbytes
            chunks = [*chunks, chunk] if size <= CHUNK_BYTES else []
        table = pa.Table.from_batches(chunks).combine_chunks() if chunks else None
        names, whole = list(parents), size <= CHUNK_BYTES
        places = {name: place for place, name in enumerate(names)} if table is not None else {}
        return Held(False, names, np.concatenate(vectors), parents, documents, whole, table, places, {}, size)


def entries_of(rows: Iterable[Mapping[str, Any]]) -> list[Entry]:
    """The documents of rows, by their ids."""
    entries: dict[str, Entry] = {}
    for row in rows:
        known = entries.get(row["parent_id"])
        count = 1 if known is None else known.chunks + 1
        entries[row["parent_id"]] = Entry(row["parent_id"], row["title"], row["path"], row["source"], count)
    return [entries[doc_id] for doc_id in sorted(entries)]


def matrix_of(column: Any) -> Array:
    """A column of vectors, `N x D`."""
    with extra("serve"):
        import pyarrow as pa

    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    values: Array = whole.flatten().to_numpy().reshape(-1, whole.type.list_size)
    return values


def _add(rows: Iterable[dict[str, Any]], parents: dict[str, str], documents: dict[str, _Document]) -> None:
    """Take rows into the chunks' documents and the documents' chunks."""
    names: dict[str, list[str]] = {}
    facts: dict[str, tuple[str, str, str]] = {}
    for row in rows:
        doc_id = parents[row["id"]] = row["parent_id"]
        names.setdefault(doc_id, []).append(row["id"])
        facts[doc_id] = row["title"], row["path"], row["source"]
    for doc_id, own in names.items():
        before = documents[doc_id].names if doc_id in documents else []
        documents[doc_id] = _Document(facts[doc_id], before + own)
