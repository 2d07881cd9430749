"""What was read from a GGUF file, kept as plain files, so that it is read from there the next time.

transformers reads all metadata of such a file three times, in Python, and unpacks every block of its weights; that is
most of what a command takes. What it made is written below the folder that the hub's library gives other libraries
(`~/.cache/huggingface/assets/search-r3`, or `HF_ASSETS_CACHE`), by the digest of the file, so a file that is moved is
known, and one that is changed is not; and by the versions of the libraries, so that two environments do not replace
each other's. Nothing is lost where it cannot be kept, or is removed.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, TypeVar

from filelock import FileLock

from ...errors import ModelError
from ...files import atomic_directory, flush, hash_file, remove_leftovers, write_json

logger = logging.getLogger(__name__)

SHARE = 10
"""What is kept takes at most one part in so many of what is free on the disk."""
KEPT_VERSIONS = 2
"""Of one file, what so many sets of versions of the libraries have made is kept: the newest."""
_FACTS = "unpacked.json"
T = TypeVar("T")


class Unpacked(NamedTuple):
    """A part of what a GGUF file holds, as it is kept, or may be."""

    digest: str
    """SHA-256 of the file."""
    part: str
    """A name for it; weights go by their precision."""

    def find(self) -> Path | None:
        """The folder that holds it; None where there is none that is whole."""
        try:
            folder = self._folder()
            sizes = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
            return folder if sizes == _sizes(folder, sizes) else None
        except (OSError, ValueError, KeyError, TypeError, ImportError):  # the last where gguf is not installed
            return None

    def read(self, load: Callable[[Path], T]) -> T | None:
        """What `load` makes of the folder that holds it; None, and the folder is gone, where it is damaged.

        Of damage the sizes of files tell most; a disk that gives other bytes than it got is noticed by who reads them.
        """
        if (folder := self.find()) is None:
            return None
        try:
            return load(folder)
        except MemoryError:
            raise
        except Exception as error:  # of whatever reads it: it is read from the file itself
            logger.info("%s is damaged (%s), and is made anew", folder, error)
            shutil.rmtree(folder, ignore_errors=True)
            return None

    def keep(self, file: Path, write: Callable[[Path], None], size: int = 0) -> None:
        """Keep it, if that can be done.

        Args:
            file: from which it was read.
            write: writes it into a folder, and raises an error where it would not be read as it is now.
            size: in bytes; what is large is kept only where there is room for much more.
        """
        try:
            if hash_file(file) != self.digest:
                raise ModelError("the file was changed while it was read")
            folder = self._folder()
            folder.parent.mkdir(parents=True, exist_ok=True)
            if size * SHARE > shutil.disk_usage(folder.parent).free:
                raise ModelError(f"it needs {size:,} bytes, and the disk has not {SHARE} times as many")
            with FileLock(folder.with_name(f"{self.part}.lock")):
                if self.find() is None:
                    remove_leftovers(folder)
                    with atomic_directory(folder) as out:
                        write(out)
                        names = [path.name for path in sorted(out.iterdir())]
                        for name in names:
                            flush(out / name)
                        write_json(out / _FACTS, _sizes(out, names))
            others = {path for path in folder.parent.parent.iterdir() if path.is_dir()} - {folder.parent}
            for old in sorted(others, key=lambda path: path.stat().st_mtime)[: 1 - KEPT_VERSIONS]:
                shutil.rmtree(old, ignore_errors=True)
        except Exception as error:  # whatever it is, the model is loaded
            logger.info("the %s of a GGUF file is not kept for the next time: %s", self.part, error)

    def _folder(self) -> Path:
        from huggingface_hub import cached_assets_path, constants

        place = cached_assets_path("search-r3", "gguf", self.digest[:32], assets_dir=constants.HF_ASSETS_CACHE)
        versions = (f"{name}-{version(name)}" for name in ("gguf", "search-r3", "transformers"))
        return place / "_".join(versions) / self.part


def _sizes(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """The bytes of each file in a folder."""
    return {name: (folder / name).stat().st_size for name in names}
