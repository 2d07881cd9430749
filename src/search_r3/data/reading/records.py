"""Rows of tables that name no columns of ours: JSON Lines, CSV, TSV, Parquet, and data sets of the hub."""

from __future__ import annotations

import codecs
import csv
import json
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from ...errors import ConfigError, DataError
from ...extras import extra
from ..tables import Repository, find_layouts, is_bright, quoted
from .files import Skip
from .texts import UnreadableError, clean, encoding_of

SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
GUESSES = {
    "id": ("_id", "id", "doc_id", "docid", "document_id", "uuid"),
    "title": ("title", "headline"),
    "text": ("text", "contents", "content", "body", "passage", "document", "abstract"),
    "metadata": ("metadata",),
}
"""Field -> the columns that are taken for it where none is named, the first that is there."""
_BLOCK = 2**20
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,14})(\.\d{1,15})?")
"""Not 007, nor what is too long to be compared as one."""


@dataclass(frozen=True)
class ColumnNames:
    """Which columns of a table hold what; what is not named is guessed (`GUESSES`).

    Attributes:
        id: empty: rows are numbered.
        title: empty: none.
        text: one or several, which are joined by blank lines.
        metadata: kept beside the text.
    """

    id: str | None = None
    title: str | None = None
    text: tuple[str, ...] = ()
    metadata: tuple[str, ...] = ()

    @classmethod
    def of(cls, columns: Mapping[str, str | Sequence[str]] | None) -> ColumnNames:
        """The names as a user gives them.

        Raises:
            ConfigError: an unknown field, or several columns where one is expected.
        """
        names: dict[str, Any] = {}
        for field, value in (columns or {}).items():
            if field not in GUESSES:
                raise ConfigError(f"columns: unknown field {field!r}; expected {', '.join(GUESSES)}")
            several = (value,) if isinstance(value, str) else tuple(value)
            if field in ("id", "title") and len(several) != 1:
                raise ConfigError(f"columns: {field} is one column, found {len(several)}")
            names[field] = several if field in ("text", "metadata") else several[0]
        return cls(**names)

    def choose(self, present: Sequence[str], *, strict: bool = True) -> dict[str, tuple[str, ...]]:
        """Field -> columns, of those that a table has.

        Raises:
            UnreadableError: a named column is not there (if `strict`), or none can be taken for the text.
        """
        lower = {name.lower(): name for name in reversed(present)}
        columns: dict[str, tuple[str, ...]] = {
            field: next(((lower[name],) for name in names if name in lower), ()) for field, names in GUESSES.items()
        }
        if len(present) == 1 and not any(columns.values()):
            columns["text"] = tuple(present)
        columns |= self.named()
        if strict and (missing := sorted({one for names in columns.values() for one in names} - set(present))):
            raise UnreadableError(f"no column {missing[0]!r}; it has {quoted(present) or 'none'}")
        columns = {field: tuple(one for one in names if one in present) for field, names in columns.items()}
        if not columns["text"]:
            raise UnreadableError(f"no column that is known to hold text; it has {quoted(present) or 'none'}")
        return columns

    def named(self) -> dict[str, tuple[str, ...]]:
        """Field -> columns, of the fields for which something is named."""
        named = {"id": None if self.id is None else (self.id,), "title": None if self.title is None else (self.title,)}
        several = {"text": self.text or None, "metadata": self.metadata or None}
        return {field: tuple(filter(None, names)) for field, names in (named | several).items() if names is not None}


@dataclass(frozen=True)
class Record:
    """A row: its id (None where the table has none), title, text and metadata."""

    record_id: str | None
    title: str
    text: str
    metadata: Mapping[str, Any]


def read_table(path: Path, names: ColumnNames, skip: Skip) -> Iterator[tuple[str, Record]]:
    """Number (of the line, or of the row, from 1) and record of every row of a file, one after the other.

    A row that is broken or has no text is told to `skip`.

    Raises:
        UnreadableError: the file is damaged, or lacks a column.
        MissingExtraError: Parquet, and the extra `documents` is not installed.
    """
    columns: dict[str, tuple[str, ...]] = {}
    keys: tuple[str, ...] = ()
    is_text = path.suffix.lower() in (".csv", ".tsv")

    def needed(present: Sequence[str]) -> list[str]:
        return [one for several in names.choose(present).values() for one in several]

    for number, row in read_rows(path, skip, needed):
        place = f"{path}:{number}"
        if not columns or keys != tuple(row):  # rows of JSON Lines may differ
            try:
                columns = names.choose(list(row), strict=not columns)
            except UnreadableError:
                if not columns:
                    raise
                skip(place, "a row without text")
                continue
            keys = tuple(row)
        if (record := _record(row, columns, place, skip, _typed if is_text else _plain)) is not None:
            yield str(number), record


def read_rows(
    path: Path, skip: Skip, needed: Callable[[Sequence[str]], Sequence[str]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number (of the line, or of the row, from 1) and columns of every row of a file, one after the other.

    Args:
        path: the file.
        skip: told of lines that are broken, and of a table without rows.
        needed: of the columns that there are, those that are read of Parquet; of other files all are.

    Raises:
        UnreadableError: the file is damaged.
        MissingExtraError: Parquet, and the extra `documents` is not installed.
    """
    suffix = path.suffix.lower()
    try:
        if suffix not in (".parquet", ".csv", ".tsv"):
            yield from _json_lines(path, skip)
            return
        number = 0
        for number, row in _parquet(path, needed) if suffix == ".parquet" else _csv(path, suffix, skip):
            yield number, row
        if not number:
            skip(str(path), "a table without rows")
    except OSError as error:
        raise UnreadableError(f"unreadable ({error.strerror or error})") from error


def read_hub(
    source: str, subset: str | None, revision: str | None, names: ColumnNames, skip: Skip
) -> Iterator[tuple[str, Record]]:
    """Number (`SPLIT:ROW`) and record of the rows of a data set; of a collection those of its documents.

    Raises:
        DataError: it cannot be read, has several configs of which none was asked for, or lacks a column.
    """
    with ExitStack() as stack:
        repository = Repository(source, revision, stack.enter_context(tempfile.TemporaryDirectory()))
        config, only = _config(repository, subset)
        named = names.named()
        # Guessed fields take a name that no column has.
        fields: dict[str, tuple[str, ...]] = {one: (one,) for several in named.values() for one in several}
        fields |= {f"?{field}": guesses for field, guesses in GUESSES.items() if field not in named}
        columns: dict[str, tuple[str, ...]] = {field: named.get(field) or (f"?{field}",) for field in GUESSES}
        optional = ("?id", "?title", "?metadata")
        for split, table in repository.tables(config, streaming=True).items():
            if only not in (None, split):
                continue
            for number, (place, row) in enumerate(table.rows(fields, optional)):
                present: dict[str, tuple[str, ...]] = {
                    field: tuple(one for one in several if one in row) for field, several in columns.items()
                }
                if (record := _record(row, present, place, skip, _plain)) is not None:
                    yield f"{split}:{number}", record


def _config(repository: Repository, subset: str | None) -> tuple[str, str | None]:
    """The config that holds documents, and its only split that is asked for (None: all)."""
    configs = repository.configs()
    if is_bright(configs):
        if subset is None:
            raise DataError(f"{repository.source}: it has several domains; ask for one as the subset")
        return "documents", subset
    layouts = find_layouts(configs)
    if layouts and (subset or "") in layouts:
        return layouts[subset or ""]["corpus"], None
    if subset in configs:
        return str(subset), None
    if subset is None and len(layouts) == 1:
        return next(iter(layouts.values()))["corpus"], None
    if subset is None and (len(configs) == 1 or "default" in configs):
        return configs[0] if len(configs) == 1 else "default", None
    fault = "it has several subsets" if subset is None else f"no subset {subset!r}"
    raise DataError(f"{repository.source}: {fault}; ask for one of {quoted(filter(None, layouts or configs))}")


def _record(
    row: Mapping[str, Any], columns: Mapping[str, Sequence[str]], place: str, skip: Skip, read: Callable[[Any], Any]
) -> Record | None:
    values = [row[name] for name in columns["text"]]
    if any(value is not None and not isinstance(value, str | int | float) for value in values):
        skip(place, "a row whose text is no string")
        return None
    text = "\n\n".join(clean(str(value)) for value in values if value is not None)
    titles = [row[name] for name in columns["title"] if row[name] is not None]
    title = " ".join(clean(str(titles[0])).split()) if titles else ""
    if not (title + text).strip():
        skip(place, "a row without text")
        return None
    ids = [row[name] for name in columns["id"] if row[name] not in (None, "")]
    metadata = {name.lstrip("?"): read(row[name]) for name in columns["metadata"] if row[name] is not None}
    if len(metadata) == 1 and isinstance(only := next(iter(metadata.values())), dict):
        metadata = only
    return Record(clean(str(ids[0])) if ids else None, title, text, metadata)


def _json_lines(path: Path, skip: Skip) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            skip(f"{path}:{number}", "a line that is not JSON")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            skip(f"{path}:{number}", "a line that is no JSON object")


def _csv(path: Path, suffix: str, skip: Skip) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # texts are longer than the 128 KiB that it admits
    encoding = _encoding(path)
    with path.open(encoding=encoding, errors="replace", newline="") as lines:
        delimiter = "\t" if suffix == ".tsv" else max(",;\t", key=lines.readline().count)
    is_quoted = suffix != ".tsv" or _is_quoted(path, encoding)
    rows = filter(None, _cells(path, encoding, delimiter, is_quoted=is_quoted))
    names = next(rows, [])
    for number, row in enumerate(rows, 1):
        if len(row) > len(names):
            skip(f"{path}:{number}", "a row with more cells than there are columns")
        else:
            yield number, dict(zip_longest(names, row))


def _is_quoted(path: Path, encoding: str) -> bool:
    """Whether quotation marks in a TSV file stand around cells, as in CSV; where they do not, they are text."""
    try:
        rows = _cells(path, encoding, "\t", is_quoted=True)
        return not any("\t" in cell and "\n" in cell for row in rows for cell in row)
    except UnreadableError:
        return False


def _cells(path: Path, encoding: str, delimiter: str, *, is_quoted: bool) -> Iterator[list[str]]:
    """The cells of each row. A quotation that does not end where its cell ends has swallowed the rows after it."""
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE
    with path.open(encoding=encoding, errors="replace", newline="") as lines:
        rows, line = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=is_quoted), 1
        try:
            for row in rows:
                yield row
                line = rows.line_num + 1
        except csv.Error as error:
            raise UnreadableError(
                f'line {line}: a quotation does not end where its cell does; write each " in one twice'
            ) from error


def _parquet(path: Path, needed: Callable[[Sequence[str]], Sequence[str]]) -> Iterator[tuple[int, dict[str, Any]]]:
    with extra("documents"):
        import pyarrow
        from pyarrow import parquet
    try:
        with parquet.ParquetFile(path) as file:
            columns = list(needed(file.schema_arrow.names))
            number = 0
            for batch in file.iter_batches(batch_size=1000, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        raise UnreadableError("a damaged Parquet file") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding=_encoding(path), errors="replace", newline="\n") as lines:  # as `files.read_lines`
        yield from enumerate(lines, 1)


def _encoding(path: Path) -> str:
    """As all of the file tells it: what is no UTF-8 may come late."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        block = file.read(_BLOCK)
        encoding = encoding_of(block)
        while block and encoding == "utf-8":
            try:
                decoder.decode(block)
            except UnicodeDecodeError:
                return encoding_of(block)
            block = file.read(_BLOCK)
    return encoding


def _typed(cell: str) -> Any:
    """A cell of a table that knows texts alone; what is written as a number is one, so that filters can compare it."""
    return json.loads(cell) if _NUMBER.fullmatch(cell) else _plain(cell)


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, Mapping):
        return {clean(str(name)): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return clean(str(value))
