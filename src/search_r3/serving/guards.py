"""What LanceDB leaves to its user in a folder: one writer at a time, writes that reach the disk, a version that opens.

Two processes that upsert the same new ids make duplicates, without an error. A commit is a write and a link, and
neither is flushed: after a power cut the newest manifest may be empty, and then nothing opens. What is elsewhere (an
object store, memory) has no such files; there one process may write.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import filelock

from ..errors import StoreError
from ..files import flush

logger = logging.getLogger(__name__)

LOCK = "write.lock"
LOCK_SECONDS = 600.0
"""How long a writer waits for another one, which may be building an index."""
SET_ASIDE = "set-aside"
VERSIONS_FOR = timedelta(hours=1)
"""How long versions stay, for readers and for `rollback`."""
ROUNDS = 4
"""Of many writes, those between so many rounds of upkeep stay: each version slows every read and write."""
READERS = timedelta(minutes=1)
"""What is younger may be in use."""


class Retention:
    """How old the versions are that stay; asked once at each round of upkeep.

    Args:
        clock: the time.
    """

    def __init__(self, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._clock, self._rounds = clock, deque[datetime](maxlen=ROUNDS)

    def age(self) -> timedelta:
        """The time since `ROUNDS` rounds ago, from `READERS` to `VERSIONS_FOR`; the latter while there were fewer."""
        now = self._clock()
        age = now - self._rounds[0] if len(self._rounds) == ROUNDS else VERSIONS_FOR
        self._rounds.append(now)
        return max(min(age, VERSIONS_FOR), READERS)


class Guard:
    """Guards the writes to one table.

    Args:
        folder: of the store; None where it is no folder of this machine.
        table: the table's folder in it.
    """

    def __init__(self, folder: Path | None, table: str) -> None:
        self.folder = folder
        self._table = Path() if folder is None else folder / table
        self._mutex = threading.RLock()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep other writers out; when the block ends, all that it wrote is on the disk.

        Raises:
            StoreError: another process has been writing for too long.
        """
        with self._mutex, self._locked():
            before = set(self._files())
            yield
            self._flush(before)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Keep writers out while something is read; not where nothing can be written, the lock neither."""
        if self.folder is None or not os.access(self.folder, os.W_OK):
            yield
            return
        with self._mutex, self._locked():
            yield

    def set_aside_empty(self) -> None:
        """Move newest versions whose manifest is empty, or zeros, out of the way, with a warning.

        No writer leaves one: it is written whole and then linked. A power cut does.
        """
        if not self._empty():
            return
        with self._mutex, self._locked():
            for path in self._empty():
                target = self._store / SET_ASIDE / path.name
                target.parent.mkdir(exist_ok=True)
                path.replace(target)
            for path in {self._table / "_versions", self._store}:
                flush(path)
        logger.warning(
            "%s: the newest version was not written whole (a power cut?) and is set aside in %s; what was acknowledged "
            "before it is there, search-r3 store verify looks at all of it",
            *(self._store, self._store / SET_ASIDE),
        )

    @property
    def _store(self) -> Path:
        assert self.folder is not None
        return self.folder

    def _empty(self) -> list[Path]:
        empty = []
        # Named by how far their number is from the largest one: the newest comes first.
        for path in sorted(self._table.glob("_versions/*.manifest")) if self.folder else ():
            with suppress(FileNotFoundError):
                if path.read_bytes().strip(b"\0"):
                    break
                empty.append(path)
        return empty

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if self.folder is None:
            yield
            return
        lock = filelock.FileLock(self.folder / LOCK, timeout=LOCK_SECONDS)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise StoreError(
                f"{self.folder}: another process has been writing for {LOCK_SECONDS:.0f} s; wait for it, or end it"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def _files(self) -> Iterator[str]:
        for folder, _, names in os.walk(self._table) if self.folder else ():
            for name in names:
                yield os.path.join(folder, name)  # noqa: PTH118 - thousands of them

    def _flush(self, before: set[str]) -> None:
        """Force new files onto the disk, then their names. Files never change but for a hint at the newest version."""
        new = [path for path in self._files() if path not in before or path.endswith(".json")]
        folders = {parent for path in new for parent in Path(path).parents if self._store in (parent, *parent.parents)}
        for path in [*map(Path, new), *sorted(folders, reverse=True)]:
            with suppress(FileNotFoundError):  # cleaned up meanwhile
                flush(path)
