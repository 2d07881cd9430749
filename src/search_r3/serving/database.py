"""Where a store is, what it says of itself, and LanceDB's errors on one line."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ..errors import SearchR3Error, StoreError
from ..extras import extra
from ..retrieval.encoding.fingerprint import Fingerprint

TABLE = "documents"
FORMAT = 1
METADATA_BYTES = 8 * 2**20
"""What LanceDB may cache of versions and files."""
INDEX_BYTES = 4 * 2**20
"""What it may cache of indexes, beside twice what they take on the disk."""
_KEY = "search_r3"


class StoreInfo(BaseModel):
    """What is stored with the documents for good."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    fingerprint: Fingerprint
    model: str = Field(description="What to load: absolute path, hub id, or `builtin`.")
    revision: str | None = Field(None, description="Of the model on the hub, as it was asked for.")
    prompts: str | None = Field(None, description="The prompt set that was asked for.")
    chunk_tokens: int | None = Field(None, description="Largest chunk of what is indexed.")
    chunk_overlap: int = 0
    created: str = Field(description="ISO 8601.")
    search_r3: str = Field(description="The version that made it.")

    @classmethod
    def read(cls, metadata: Mapping[bytes, bytes] | None, place: str) -> StoreInfo:
        """That of a table's schema.

        Raises:
            StoreError: the table is none of this package, or of another version.
        """
        saved = (metadata or {}).get(_KEY.encode())
        if saved is None:
            raise StoreError(f"{place} holds a table of LanceDB that search-r3 did not make; choose another place")
        values = json.loads(saved)
        if values.get("format") != FORMAT:
            raise StoreError(
                f"{place} has the format {values.get('format')!r}, this version reads {FORMAT}: use search-r3 "
                f"{values.get('search_r3')}, which made it, or index the documents into a new store"
            )
        return cls.model_validate(values)

    @property
    def metadata(self) -> dict[str, str]:
        """For a table's schema."""
        return {_KEY: self.model_dump_json()}


def exists(address: str | Path) -> bool:
    """Whether there is a store.

    Raises:
        StoreError: an object store that cannot be reached.
    """
    place, folder = place_of(address)
    if folder is not None:  # a version: a table without one was being made when its maker was killed
        return any((folder / f"{TABLE}.lance" / "_versions").glob("*.manifest"))
    with one_line(place, "look for a store"):
        return TABLE in connect(place).list_tables().tables


def place_of(address: str | Path) -> tuple[str, Path | None]:
    """What LanceDB takes, and the folder. A relative name that begins with `db` would be taken for its cloud."""
    if "://" in str(address):
        return str(address), None
    folder = Path(os.path.abspath(Path(address).expanduser()))  # noqa: PTH100 - links stay
    return str(folder), folder


def connect(place: str) -> Any:
    """LanceDB's connection."""
    os.environ.setdefault("LANCEDB_LOG", "error")
    with extra("serve"):
        import lancedb

    # Without the interval a table does not see what other processes write. Of each version something stays in both
    # caches, by default in up to 7 GiB: a server that is written to would grow for days.
    caches = lancedb.Session(
        index_cache_size_bytes=INDEX_BYTES + 2 * _index_bytes(place), metadata_cache_size_bytes=METADATA_BYTES
    )
    return lancedb.connect(place, read_consistency_interval=timedelta(0), session=caches)


def give_back() -> None:
    """Return to the system what LanceDB has freed: in many threads, a little in many places, which glibc would keep."""
    with suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _index_bytes(place: str) -> int:
    """What the indexes of a store take; where that cannot be seen, a GiB."""
    if "://" in place:
        return 2**30
    sizes = []
    for path in (Path(place) / f"{TABLE}.lance" / "_indices").rglob("*"):
        with suppress(FileNotFoundError):  # cleaned up meanwhile
            sizes.append(path.stat().st_size)
    return sum(sizes)


@contextmanager
def one_line(place: str, what: str, remedy: str = "") -> Iterator[None]:
    """Make one `StoreError` of whatever LanceDB and the disk raise."""
    try:
        yield
    except SearchR3Error:
        raise
    except (RuntimeError, ValueError, OSError, KeyError, NotImplementedError) as error:
        raise StoreError(f"{place}: cannot {what}: {_cause(error)}{remedy}") from error


def _cause(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(", /", 1)[0]  # the line of LanceDB's source
