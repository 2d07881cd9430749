"""The documents of a `corpus.jsonl` that stay there: in memory is where each of them stands."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import json_object
from .collection import Document, plain_row
from .rows import check_documents


class MappedDocuments(Mapping[str, Document]):
    """doc_id -> document, read from the file when it is asked for; memory holds the ids alone.

    Args:
        path: a `corpus.jsonl`, which must stay as it is.
        skipped: as of `iter_documents`.

    Raises:
        DataError: as `iter_documents`; when a document is read, that the file has changed.
    """

    def __init__(self, path: Path, skipped: set[str] | None = None) -> None:
        self._path = path
        lines = _Lines(path)
        self._starts = {doc_id: lines.start for doc_id, _, _ in check_documents(lines, skipped)}
        with path.open("rb") as file:
            self._file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __getitem__(self, doc_id: str) -> Document:
        start = self._starts[doc_id]
        end = self._file.find(b"\n", start)
        try:
            row = plain_row(json.loads(self._file[start : end if end >= 0 else None]))
            if row["_id"] == doc_id:
                return Document(doc_id, row["text"], row.get("title", ""))
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise DataError(f"{self._path} has changed since it was read, at document {doc_id!r}; begin again")

    def __contains__(self, doc_id: object) -> bool:
        return doc_id in self._starts

    def __iter__(self) -> Iterator[str]:
        return iter(self._starts)

    def __len__(self) -> int:
        return len(self._starts)


class _Lines:
    """Place and row of every line; `start` is where the line of the last row begins, in bytes."""

    def __init__(self, path: Path) -> None:
        self.path, self.start = path, 0

    def __iter__(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        place = rows = 0
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    blank = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                    self.start, place = place + len(line) - len(blank), place + len(line)
                    if blank.strip():
                        rows += 1
                        yield f"{self.path}:{number}", plain_row(json_object(self.path, number, blank.decode()))
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from error
        if not rows:
            raise DataError(f"{self.path}: the file has no rows")
