"""The files below a folder: what is read of them and what is passed over, and why."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

Skip = Callable[[str, str], None]
"""Told of a place and of the reason why it is not read."""

MACHINE_MADE = ("CACHEDIR.TAG", "pyvenv.cfg", "documents.lance")
"""What marks a folder as a cache, a Python environment or a store (`serving`)."""
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def walk(root: Path, skip: Skip) -> Iterator[Path]:
    """The files below a folder, by name; what is read no deeper is told to `skip`.

    Hidden files and folders are passed over, links to folders (which may be loops), `node_modules`, and folders that
    say that they are a cache, a Python environment or a store. Without recursion: folders may nest deeper than calls.
    """
    pending = _children(root, skip)
    while pending:
        entry = pending.pop()
        path = Path(entry.path)
        if entry.name.startswith("."):
            skip(entry.path, "hidden")
        elif entry.is_dir(follow_symlinks=False):
            if entry.name == "node_modules" or any(os.path.lexists(path / mark) for mark in MACHINE_MADE):
                skip(entry.path, "a folder that programs made")
            else:
                pending += _children(path, skip)
        elif entry.is_symlink() and path.is_dir():
            skip(entry.path, "a link to a folder (name the folder as a source)")
        else:
            yield path


def read_bytes(path: Path, limit: int) -> bytes | str:
    """The content of a file, or the reason why it is not read."""
    try:
        if not path.exists():
            return "a broken link" if path.is_symlink() else "gone while it was read"
        if not path.is_file():  # a pipe would never end
            return "not a regular file"
        if path.stat().st_size > limit:
            return f"larger than {limit / 2**20:,.0f} MiB"
        return path.read_bytes()
    except OSError as error:
        return f"unreadable ({error.strerror or error})"


def safe_id(text: str) -> str:
    r"""A name as an id, or a part of one: what breaks lines, tables or UTF-8 is escaped.

    Example:
        >>> safe_id("line\nbreak.txt")
        'line\\nbreak.txt'
    """
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def _children(folder: Path, skip: Skip) -> list[os.DirEntry[str]]:
    """The entries of a folder in descending order."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name, reverse=True)
    except OSError as error:
        skip(str(folder), f"unreadable ({error.strerror or error})")
        return []
