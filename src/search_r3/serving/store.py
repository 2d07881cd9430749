"""Documents with their vectors, in a folder or an object store: a thin layer over LanceDB.

A row is a chunk. Documents are written whole, all chunks in one commit, so none is ever half there. Of few rows the
vectors are held in memory and searched exactly, of many there is an index, whose recall was measured.

Shapes: `Q` queries, `N` chunks, `D` vector size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..data.documents import Chunk
from ..errors import DataError, StoreError
from ..retrieval.encoding.fingerprint import Fingerprint
from ..types import Array
from . import rows
from .database import TABLE, StoreInfo, connect, exists, give_back, one_line, place_of
from .filters import COLUMNS, Filter, fields_of, one_of, to_sql, unknown_in
from .guards import READERS, Guard, Retention
from .held import Change, Entry, Memory, Ranking, entries_of
from .ranking import Ranker, Read, first_of_each, fuse

if TYPE_CHECKING:
    import pyarrow as pa

OPTIMIZE_AFTER = 64
"""Commits after which files are put together; each slows every search."""
FUSED_DEPTH = 50
"""Hits of each list, at least, that are fused."""
_IN = 5000
"""Ids in one condition."""


class Hit(NamedTuple):
    """A chunk and its score: cosine, BM25, or of both the sum of reciprocal ranks."""

    chunk: Chunk
    score: float


class Store:
    """Documents that can be searched; `Store.create` and `Store.open` give one.

    Threads may share one. Other processes see a write as soon as it is acknowledged.

    Example:
        >>> import tempfile
        >>> from search_r3 import SearchR3, read_documents
        >>> from search_r3.serving import Fingerprint, Store, index_documents
        >>> model, folder = SearchR3("builtin"), Path(tempfile.mkdtemp())
        >>> _ = (folder / "tea.txt").write_text("Green tea is not oxidised.")
        >>> store = Store.create(folder / "my.store", Fingerprint.of(model))
        >>> index_documents(store, model, read_documents(folder / "tea.txt")).added
        1
        >>> query = model.encode_query("what is not oxidised?", "direct")
        >>> [[hit]] = store.search(query.vectors, k=1)
        >>> hit.chunk.parent_id
        'tea.txt'
    """

    def __init__(self, address: str, table: Any, guard: Guard) -> None:
        self.address, self._table, self._guard = address, table, guard
        self.info = StoreInfo.read(table.schema.metadata, address)
        self._memory = Memory(table, self.info.fingerprint.dimension)
        self._ranker = Ranker(table, self.info.fingerprint.dimension)
        self._commits = 0
        self._retention = Retention()

    @classmethod
    def create(
        cls,
        address: str | Path,
        fingerprint: Fingerprint,
        *,
        batches: Iterable[pa.RecordBatch] = (),
        **facts: Any,
    ) -> Store:
        """A new store.

        Args:
            address: a folder, `memory://`, or an object store's (`s3://bucket/name`, `gs://`, `az://`),
                whose keys are in the environment.
            fingerprint: of the model whose vectors it will hold.
            batches: of another store.
            facts: of `StoreInfo`.

        Raises:
            StoreError: there is a store already, or it cannot be written.
            MissingExtraError: the extra `serve` is not installed.
        """
        place, folder = place_of(address)
        guard = Guard(folder, f"{TABLE}.lance")
        info = StoreInfo(
            fingerprint=fingerprint,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            search_r3=version("search-r3"),
            **{"model": fingerprint.model, **facts},
        )
        schema = rows.schema_of(fingerprint.dimension, info.metadata)
        with one_line(place, "create the store"):
            database = connect(place)
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            with guard.writing():
                if exists(address):
                    raise StoreError(f"{place} is a store already; open it, or choose another place")
                table = database.create_table(TABLE, schema=schema)
                for batch in batches:
                    table.add(batch)
                return cls(place, table, guard)

    @classmethod
    def open(cls, address: str | Path, fingerprint: Fingerprint | None = None) -> Store:
        """A store that is there.

        Args:
            address: as in `create`.
            fingerprint: of the model that will search it or add to it; without one nothing is compared.

        Raises:
            StoreError: there is no store, it cannot be read, or another model made its vectors.
            MissingExtraError: the extra `serve` is not installed.
        """
        place, folder = place_of(address)
        guard = Guard(folder, f"{TABLE}.lance")
        with one_line(place, "open the store"):
            guard.set_aside_empty()
            if not exists(address):
                raise StoreError(f"{place} is no store; make one with search-r3 index {address} --model MODEL FOLDER")
            store = cls(place, connect(place).open_table(TABLE), guard)
        if fingerprint is not None:
            store.info.fingerprint.check(fingerprint, place)
        return store

    def __len__(self) -> int:
        """The number of chunks."""
        with one_line(self.address, "read"):
            return int(self._table.count_rows())

    @property
    def folder(self) -> Path | None:
        """Where it is on this machine; None of an object store."""
        return self._guard.folder

    @property
    def version(self) -> int:
        """Grows with every write."""
        return int(self._table.version)

    def versions(self) -> list[tuple[int, datetime]]:
        """The versions that `rollback` can go back to, oldest first, with the time of writing."""
        with one_line(self.address, "read"):
            return [(one["version"], one["timestamp"]) for one in self._table.list_versions()]

    def rollback(self, to: int) -> None:
        """Make the documents of an older version those of a new one."""
        with self._writing("go back to another version"):
            self._table.restore(to)

    def upsert(self, chunks: Sequence[Chunk], vectors: Array) -> int:
        """Write documents whole, in one commit: each replaces what was there under its id.

        Args:
            chunks: all chunks of each document; of doubled ids the last one counts.
            vectors: theirs, `N x D`; they are normalised.

        Returns:
            The number of documents, acknowledged: they are on the disk.

        Raises:
            StoreError: wrong shape, a vector of zeros, NaN or infinity; or the disk refuses the write, and what was
                acknowledged before is still there.
            DataError: as `rows.to_table`.
        """
        array = self._checked(vectors, len(chunks))
        if not len(chunks):
            return 0
        last = {chunk.doc_id: place for place, chunk in enumerate(chunks)}
        chunks = [chunks[place] for place in last.values()]
        table = rows.to_table(chunks, array[list(last.values())])
        parents = sorted({chunk.parent_id for chunk in chunks})
        with self._writing("write") as change:
            rows.check_names(chunks, self._rows)
            merge = self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            # Only where a document has fewer chunks than before: this reads the whole table.
            before = list(self._rows("parent_id", parents, ["id", "parent_id"]))
            if {row["id"] for row in before} - last.keys():
                merge = merge.when_not_matched_by_source_delete(one_of("parent_id", parents))
            merge.execute(table)
            change.tell(parents, table, len(parents) - len({row["parent_id"] for row in before}))
        return len(parents)

    def delete(self, doc_ids: Sequence[str]) -> int:
        """Remove documents whole; unknown ids are passed over. How many were there."""
        found = sorted({row["parent_id"] for row in self._rows("parent_id", doc_ids, ["parent_id"])})
        for start in range(0, len(found), _IN):
            with self._writing("delete") as change:
                part = found[start : start + _IN]
                there = {row["parent_id"] for row in self._rows("parent_id", part, ["parent_id"])}
                self._table.delete(one_of("parent_id", part))
                change.tell(part, more=-len(there))
        return len(found)

    def get(self, doc_id: str) -> list[Chunk]:
        """The chunks of a document in order; the one chunk of this id where there is no such document; or none."""
        for column in ("parent_id", "id"):
            if found := list(self._rows(column, [doc_id], rows.CHUNK)):
                return sorted(map(rows.chunk_of, found), key=lambda chunk: (chunk.start, chunk.end))
        return []

    def documents(self, where: Filter | None = None) -> list[Entry]:
        """All documents, or those with a chunk that the filter lets through, by their ids."""
        if where is None:
            with one_line(self.address, "read"):
                held = self._memory.now()
            if not held.many:
                return list(held.entries)
        return entries_of(self._scan(["parent_id", "title", "path", "source"], where))

    def page(self, after: str = "", limit: int = 100) -> tuple[list[Entry], int]:
        """The documents behind an id, in the order of their ids and at most so many; and how many there are in all."""
        with one_line(self.address, "read"):
            return self._memory.page(after, limit), self._memory.total()

    def fields(self, rows: int = 10_000, values: int = 50) -> list[dict[str, Any]]:
        """What a filter can name, as `filters.fields_of` has it, from the first chunks that are read."""
        columns = [*COLUMNS[1:], "metadata"]  # every chunk has an id of its own
        return fields_of(islice(self._scan(columns, None), rows), values)

    def check_filter(self, where: Filter) -> None:
        """Refuse a filter that names what no document has, mostly misspelt; an empty store has all names.

        Raises:
            DataError: such a name, with those that there are; or as `filters.to_sql`.
        """
        to_sql(where)
        if unknown := unknown_in(where, self._scan(["metadata"], None)):
            known = ", ".join(one["name"] for one in self.fields(values=0))
            raise DataError(
                f"filter: no document has {', '.join(map(repr, unknown))}; those that can be named are {known}"
            )

    def revisions(self) -> dict[str, tuple[str, str]]:
        """doc_id -> source and revision (`rows.revision_of`)."""
        return {
            row["parent_id"]: (row["source"], row["revision"])
            for row in self._scan(["parent_id", "source", "revision"], None)
        }

    def vectors_of(self, chunks: Sequence[Chunk]) -> dict[str, Array]:
        """full_text -> vector of what is stored already of these documents, or of others with their content."""
        known = {}
        for column, values in (
            ("parent_id", {chunk.parent_id for chunk in chunks}),
            ("content_hash", {chunk.content_hash for chunk in chunks}),
        ):
            for row in self._rows(column, sorted(values), ["full_text", "vector"]):
                known[row["full_text"]] = np.array(row["vector"], dtype=np.float32)
        return known

    def unchanged(self) -> AbstractContextManager[None]:
        """Keep writers waiting, of this process and of others on this machine, while something long is read."""
        return self._guard.unchanged()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows, as they are at the beginning."""
        with one_line(self.address, "read"):
            yield from self._table.search().to_batches()

    def indexed(self) -> dict[str, int]:
        """Index -> the rows that it finds."""
        with one_line(self.address, "read"):
            stats = {name: self._table.index_stats(name) for name in sorted(self._ranker.indices())}
            return {name: one.num_indexed_rows + one.num_unindexed_rows for name, one in stats.items()}

    def search(
        self,
        vectors: Array | None = None,
        *,
        texts: Sequence[str] | None = None,
        k: int = 10,
        where: Filter | None = None,
        by_document: bool = True,
    ) -> list[list[Hit]]:
        """The best chunks for each query, best first.

        Args:
            vectors: of the queries, `Q x D`: ranked by cosine.
            texts: of the queries: ranked by BM25. With both, ranks are fused (`FUSION`).
            k: hits for each query.
            where: which documents are searched (`filters.to_sql`).
            by_document: of each document only its best chunk.

        Raises:
            StoreError: vectors of another size or not finite, or the store cannot be read.
            DataError: a filter that cannot be understood, or k below 1.
        """
        if k < 1:
            raise DataError(f"a search returns at least 1 document; k was {k}")
        if vectors is None and texts is None:
            raise DataError("a search needs vectors, texts, or both")
        queries = None if vectors is None else self._checked(vectors, None)
        if queries is not None and texts is not None and len(queries) != len(texts):
            raise DataError(f"{len(texts)} texts for {len(queries)} vectors; give one for each")
        condition = to_sql(where) if where else None
        depth = max(FUSED_DEPTH, 4 * k) if queries is not None and texts is not None else k
        read: Read = {}
        with one_line(self.address, "search"):
            memory = self._memory.now()
            while True:
                lists: list[list[Ranking]] = []
                if queries is not None:
                    lists.append(self._ranker.nearest(memory, queries, depth, condition, read))
                if texts is not None:
                    words = (self._ranker.with_words(memory, text, depth, condition, read) for text in texts)
                    lists.append(list(words))
                best = [first_of_each(fuse(rankings), by_document) for rankings in zip(*lists, strict=True)]
                ended = (all(len(one) < depth for one in rankings) for rankings in zip(*lists, strict=True))
                if all(len(one) >= k or end for one, end in zip(best, ended, strict=True)):
                    break
                depth *= 4
        best = [one[:k] for one in best]
        names = {name for one in best for name, _ in one}
        read |= memory.rows(names - read.keys())
        read |= {row["id"]: row for row in self._rows("id", sorted(names - read.keys()), rows.CHUNK)}
        # What was deleted meanwhile is no hit.
        return [[Hit(rows.chunk_of(read[name]), score) for name, score in one if name in read] for one in best]

    def compact(self, *, keep: timedelta = READERS) -> None:
        """Put files together, bring all rows into the indexes, and remove versions that are older.

        Raises:
            StoreError: the disk refuses it; all documents are still there.
        """
        with self._writing("compact") as change:
            self._optimize(keep)
            change.tell()

    def _optimize(self, keep: timedelta) -> None:
        self._table.optimize(cleanup_older_than=keep)
        self._ranker.keep_indices()
        give_back()
        self._commits = 0

    @property
    def index(self) -> dict[str, str]:
        """What is known of the index of vectors; empty without one."""
        return self._ranker.index()

    def _checked(self, vectors: Array, count: int | None) -> Array:
        array = np.asarray(vectors, dtype=np.float32)
        size = self.info.fingerprint.dimension
        if array.ndim != 2 or array.shape[1] != size or (count is not None and len(array) != count):
            expected = "Q" if count is None else count
            raise StoreError(
                f"expected vectors of shape {expected} x {size}, found {' x '.join(map(str, array.shape))}"
            )
        norms = np.linalg.norm(array.astype(np.float64), axis=1, keepdims=True)
        if not (np.isfinite(norms) & (norms > 0)).all():
            raise StoreError("a vector is NaN, infinite or zero; the model that made it is broken")
        result: Array = (array / norms).astype(np.float32)
        return result

    def _rows(self, column: str, values: Sequence[str], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The rows in which a column has one of these values."""
        for start in range(0, len(values), _IN):
            yield from self._scan(columns, None, one_of(column, values[start : start + _IN]))

    def _scan(self, columns: Sequence[str], where: Filter | None, condition: str = "") -> Iterator[dict[str, Any]]:
        condition = condition or (to_sql(where) if where else "")
        with one_line(self.address, "read"):
            query = self._table.search().select(list(columns))
            query = query.where(condition) if condition else query
            for batch in query.to_batches():
                yield from batch.to_pylist()

    @contextmanager
    def _writing(self, what: str) -> Iterator[Change]:
        """A commit on the newest version, without another writer, on the disk at the end; now and then, upkeep."""
        remedy = "; what was acknowledged before is unchanged: mend this and try again"
        with one_line(self.address, what, remedy), self._guard.writing(), self._memory.writing() as change:
            yield change
            self._commits += 1
            fragments = self._table.stats()["fragment_stats"]["num_small_fragments"]
            if max(self._commits, fragments) >= OPTIMIZE_AFTER:
                self._optimize(self._retention.age())
            elif not (change.told and self._ranker.has_words):
                self._ranker.keep_indices()
