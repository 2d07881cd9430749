"""Any documents without judgements: folders and files of many kinds, tables, data sets of the hub, cut into chunks.

All is read as a stream: one file, or one row of a table, is in memory, and the ids of all documents. What cannot be
read is passed over and counted with the reason.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from .collection import Document
from .load import split_name
from .reading import records
from .reading.chunks import Chunking, cut, with_context
from .reading.files import read_bytes, safe_id, walk
from .reading.records import ColumnNames, Record, read_hub, read_table
from .reading.texts import SourceText, UnreadableError, read_text
from .tables import is_hub_folder

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 64 * 2**20
EXAMPLES = 3
"""Places that a report keeps for each reason."""

Source = str | os.PathLike[str]
Sources = Source | Sequence[Source] | Mapping[str, Source]


@dataclass(frozen=True, kw_only=True)
class Chunk(Document):
    r"""A part of a document, or all of it, with its place; `doc_id` is `PARENT_ID#NUMBER`, numbered from 0.

    Attributes:
        parent_id: of the document that it is from: the path below the source, or the id of a row.
        start: offset of its first character in the document's text as it was read (line ends are `\n`).
        end: offset after its last character.
        headings: the headings above its beginning, outermost first.
        page: of a PDF, from 1.
        content_hash: SHA-256 (hex) of the whole document's title and text: as long as it stays, so do its vectors.
        metadata: of a row, what was kept of its other columns.
        path: the file that it is from, as it can be opened; empty for a data set of the hub.
        source: what was read, as it was named, without its prefix.
    """

    parent_id: str
    start: int
    end: int
    headings: tuple[str, ...] = ()
    page: int | None = None
    content_hash: str
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    path: str = ""
    source: str = ""

    @property
    def full_text(self) -> str:
        """What is encoded: the title, the headings that the text does not show itself, the text."""
        return with_context(self.title, self.headings, self.text)

    @property
    def place(self) -> str:
        """Where in the document it is, for people."""
        page = [] if self.page is None else [f"page {self.page}"]
        return ", ".join([*page, *filter(None, [" > ".join(self.headings)]), f"characters {self.start}-{self.end}"])


@dataclass
class ReadReport:
    """What a reading read and what it passed over.

    Attributes:
        documents: with text.
        chunks: made of them.
        skipped: reason -> how many files, folders or rows.
        examples: reason -> the first places.
    """

    documents: int = 0
    chunks: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, place: str, reason: str) -> None:
        """Count something that is not read."""
        self.skipped[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(safe_id(place))
        logger.debug("%s is not read: %s", place, reason)

    @property
    def summary(self) -> str:
        """All of it on one line."""
        parts = f", {self.chunks:,} chunks" if self.chunks != self.documents else ""
        skipped = f"; not read: {'; '.join(self.lines())}" if self.skipped else ""
        return f"{self.documents:,} documents{parts}{skipped}"

    def lines(self) -> list[str]:
        """The reasons with their numbers and first places, the most frequent first."""
        return [
            f"{count:,} x {reason}: {', '.join(self.examples[reason])}{', ...' if count > EXAMPLES else ''}"
            for reason, count in self.skipped.most_common()
        ]


class DocumentStream:
    """Chunks of documents, read anew in every iteration; made by `read_documents`.

    Attributes:
        chunking: as in `read_documents`; another one holds from the next iteration on.
        report: of the last iteration, complete when it has ended.
    """

    def __init__(self, sources: Sources, columns: ColumnNames, chunking: Chunking | None, max_file_bytes: int) -> None:
        self._sources = [_Source.of(name, prefix) for prefix, name in _named(sources)]
        if not self._sources:
            raise DataError("no source of documents was given; give at least one file, folder or data set")
        self.chunking = chunking
        self._columns, self._max_file_bytes = columns, max_file_bytes
        self.report = ReadReport()

    @property
    def sources(self) -> list[str]:
        """What is read, as it was named, without prefixes."""
        return [source.name for source in self._sources]

    def __iter__(self) -> Iterator[Chunk]:
        self.report = report = ReadReport()
        known: set[str] = set()
        files: set[Path] = set()
        for source in self._sources:
            for document in source.read(self._columns, report, self._max_file_bytes, files):
                if document.parent_id in known:
                    raise DataError(
                        f"{document.place}: another document has the id {document.parent_id!r} already; give one "
                        "another, name another column of ids, or give one of the sources a prefix (PREFIX=SOURCE)"
                    )
                known.add(document.parent_id)
                report.documents += 1
                for chunk in _chunks(document, self.chunking, source.name):
                    report.chunks += 1
                    yield chunk
        if not report.documents:
            found = "; ".join(report.lines()) or "it is empty"
            raise DataError(f"no document with text in {', '.join(source.name for source in self._sources)}: {found}")

    def texts(self) -> EncodableTexts:
        """Pairs of doc_id and text, read anew in every iteration, for `encode_corpus`."""
        return EncodableTexts(self)


@dataclass(frozen=True)
class EncodableTexts:
    """Doc_ids and what is encoded, of a stream of documents."""

    stream: DocumentStream

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return ((chunk.doc_id, chunk.full_text) for chunk in self.stream)


def read_documents(
    sources: Sources,
    *,
    columns: Mapping[str, str | Sequence[str]] | None = None,
    chunking: Chunking | None = Chunking(),  # noqa: B008 - frozen
    max_file_bytes: int = MAX_FILE_BYTES,
) -> DocumentStream:
    r"""Read documents from wherever they are.

    Args:
        sources: one or several of

            - a folder: its text files, HTML and PDF, whatever they are called, and the rows of its tables. Hidden
              files, binaries, and files that programs made are passed over. Of a folder with a `corpus.jsonl` (BEIR),
              and of one in the hub's format, only the documents;
            - a file of these kinds: text, `.md`, `.html`, `.py`, `.pdf`;
            - a table: `.jsonl`, `.csv`, `.tsv`, `.parquet`;
            - a data set of the hub: `owner/name`, `owner/name:subset`, `owner/name@revision`.

            Ids are paths below the folder, names of files, or the ids of rows as they are. Two sources with the same
            ids need a prefix: a mapping `{prefix: source}`, or `"PREFIX=SOURCE"`, whose ids begin with `PREFIX/`.
        columns: field (`id`, `title`, `text`, `metadata`) -> column of the tables; of text and metadata also several.
            What is not named is guessed by usual names; without an id, rows are numbered.
        chunking: how texts are cut; None leaves them whole, under their own ids.
        max_file_bytes: larger files are passed over; tables may have any size.

    Returns:
        Chunks, to be iterated over as often as needed; `report` says what was passed over.

    Raises:
        DataError: a source does not exist; in an iteration: a table that was named lacks a column, two documents have
            one id, or there is no document with text at all.
        MissingExtraError: in an iteration: HTML, PDF or Parquet, and the extra `documents` is not installed.
        ConfigError: an unknown field in `columns`, or no `Chunking`.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "tea.md").write_text("# Tea\n\nGreen tea is not oxidised.")
        >>> _ = (folder / "pot.bin").write_bytes(b"\0\1")
        >>> documents = read_documents(folder)
        >>> for chunk in documents:
        ...     print(chunk.doc_id, chunk.title, chunk.place, sep="; ")
        tea.md#0; Tea; Tea, characters 0-33
        >>> documents.report.skipped
        Counter({'binary': 1})
    """
    if not isinstance(chunking, Chunking | None):
        raise ConfigError(f"chunking={chunking!r}: expected a Chunking, for instance Chunking(max_tokens=200), or None")
    return DocumentStream(sources, ColumnNames.of(columns), chunking, max_file_bytes)


def chunks_of(
    doc_id: str,
    text: str,
    title: str = "",
    *,
    metadata: Mapping[str, Any] | None = None,
    chunking: Chunking | None = Chunking(),  # noqa: B008 - frozen
    source: str = "",
) -> Iterator[Chunk]:
    """The chunks of one document that is at hand, as `read_documents` makes them.

    Example:
        >>> next(chunks_of("tea", "Green tea is not oxidised.")).doc_id
        'tea#0'
    """
    return _chunks(_Whole(doc_id, SourceText(text, title), doc_id, metadata=metadata or {}), chunking, source)


@dataclass(frozen=True)
class _Whole:
    """A document as it was read; `place` is for messages."""

    parent_id: str
    source: SourceText
    place: str
    path: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


def _chunks(document: _Whole, chunking: Chunking | None, name: str) -> Iterator[Chunk]:
    source = document.source
    content_hash = hashlib.sha256(json.dumps([source.title, source.text]).encode()).hexdigest()
    source, spans = (source, [(0, len(source.text))]) if chunking is None else cut(source, chunking)
    for number, (start, end) in enumerate(spans):
        yield Chunk(
            doc_id=document.parent_id if chunking is None else f"{document.parent_id}#{number}",
            text=source.text[start:end],
            title=source.title,
            parent_id=document.parent_id,
            start=start,
            end=end,
            headings=source.headings_at(start),
            page=source.page_at(start),
            content_hash=content_hash,
            metadata=document.metadata,
            path=document.path,
            source=name,
        )


@dataclass(frozen=True)
class _Source:
    """One source; `name` as it was given, `prefix` of its ids."""

    name: str
    prefix: str

    @classmethod
    def of(cls, source: Source, prefix: str) -> _Source:
        name = os.path.expanduser(os.fspath(source))  # noqa: PTH111 - a Path raises where there is no such user
        if os.path.exists(name):  # noqa: PTH110 - and where a name is too long
            return cls(name, prefix)
        if not prefix and "=" in name:
            prefix, _, name = name.partition("=")
            return cls.of(name, prefix)
        if isinstance(source, str) and split_name(name) is not None:
            return cls(name, prefix)
        raise DataError(f"no documents at {name}: expected a file, a folder, or a data set of the hub (owner/name)")

    def read(self, columns: ColumnNames, report: ReadReport, max_file_bytes: int, files: set[Path]) -> Iterator[_Whole]:
        """Its documents; `files` takes the files that were read, which are not read again."""
        prefix = f"{self.prefix}/" if self.prefix else ""
        path = Path(self.name)
        if (path / "corpus.jsonl").is_file():
            path = path / "corpus.jsonl"
        if not path.exists() or (path.is_dir() and is_hub_folder(path)):
            name, subset, revision = (self.name, None, None) if path.exists() else split_name(self.name) or ("", "", "")
            rows = read_hub(name, subset, revision, columns, report.skip)
            label = safe_id(Path(name).resolve().name) if Path(name).is_dir() else name
            yield from _of_rows(rows, prefix, f"{prefix}{label}", "")
        elif path.is_dir():
            for file in walk(path, report.skip):
                label = prefix + safe_id(file.relative_to(path).as_posix())
                yield from _read_file(file, label, f"{label}:", columns, report, max_file_bytes, files)
        elif path.suffix.lower() in records.SUFFIXES:
            try:
                rows = read_table(path, columns, report.skip)
                yield from _of_rows(rows, prefix, prefix + safe_id(path.name), str(path))
            except UnreadableError as reason:
                raise DataError(f"{path}: {reason}") from reason
        else:
            label = prefix + safe_id(path.name)
            yield from _read_file(path, label, "", columns, report, max_file_bytes, files)


def _named(sources: Sources) -> Iterable[tuple[str, Source]]:
    if isinstance(sources, Mapping):
        return sources.items()
    return [("", one) for one in ([sources] if isinstance(sources, str | os.PathLike) else sources)]


def _read_file(
    path: Path, label: str, row_prefix: str, columns: ColumnNames, report: ReadReport, limit: int, files: set[Path]
) -> Iterator[_Whole]:
    """The document of a file, or the rows of a table in a folder, whose ids begin with its path."""
    try:
        real = path.resolve()
    except (OSError, RuntimeError):
        report.skip(str(path), "a broken link")
        return
    if real in files:
        report.skip(str(path), "read already under another name")
        return
    files.add(real)
    try:
        if path.suffix.lower() in records.SUFFIXES and path.is_file():
            yield from _of_rows(read_table(path, columns, report.skip), row_prefix, label, str(path))
            return
        data = read_bytes(path, limit)
        if isinstance(data, str):
            raise UnreadableError(data)
        source = read_text(data, path.suffix.lower())
        if not source.text.strip():
            raise UnreadableError("without text" if data else "empty")
        yield _Whole(label, source, str(path), str(path))
    except UnreadableError as reason:
        report.skip(str(path), str(reason))


def _of_rows(rows: Iterator[tuple[str, Record]], prefix: str, label: str, path: str) -> Iterator[_Whole]:
    """The documents of a table; rows without an id take the table's label and their number."""
    for number, record in rows:
        row_id = f"{label}:{number}" if record.record_id is None else prefix + safe_id(record.record_id)
        source = SourceText(record.text, record.title)
        yield _Whole(row_id, source, f"{label}:{number}", path, record.metadata)
