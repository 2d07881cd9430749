"""Index folders that survive a kill: data files with fresh names, then a manifest that names them.

A save writes every data file under a name that was never used, flushes it to the disk, replaces `manifest.json` in
one step and only then deletes the files of the state before. A reader follows the manifest alone, so a process killed
at any moment leaves the old state or the new one; what a killed save left behind is deleted by the next one. One
process may save into a folder at a time.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import VectorIndexError
from ..files import write_json

FORMAT = 1
MANIFEST = "manifest.json"
# Names of this module's making, and the scratch files of JSON whose writing was killed.
_OURS = re.compile(r"[a-z0-9_]+-[0-9a-f]{16}\.(npy|json|graph)|\.(manifest|[a-z0-9_]+-[0-9a-f]{16})\.json\..*")

Writer = Callable[[Path], None]


def save_state(folder: Path, writers: Mapping[str, Writer], facts: Mapping[str, Any]) -> None:
    """Write a state atomically.

    Args:
        folder: made if missing; files of other origin in it are left alone.
        writers: `name.suffix` of each data file -> what writes it at the path it is given.
        facts: further entries of the manifest.

    Raises:
        VectorIndexError: the disk refuses a write; the state that stood in `folder` is unchanged.
    """
    folder = Path(folder)
    token = secrets.token_hex(8)
    files: dict[str, str] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, write in writers.items():
            stem, suffix = name.rsplit(".", 1)
            path = folder / f"{stem}-{token}.{suffix}"
            write(path)
            _flush(path)
            files[name] = path.name
        write_json(folder / MANIFEST, {"format": FORMAT, **facts, "files": files})
    except OSError as error:
        for path in folder.glob(f"*-{token}.*"):
            path.unlink(missing_ok=True)
        raise VectorIndexError(
            f"cannot save the index to {folder}: {error.strerror or error}; the state saved there before is unchanged; "
            "free some space or choose another folder"
        ) from error
    _flush(folder)
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in files.values():
            # Windows refuses to delete a file that is still mapped; the next save deletes it.
            with suppress(OSError):
                path.unlink()


def read_manifest(folder: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """The manifest of the state in `folder`, and `name.suffix` -> path of its data files.

    Raises:
        OSError, ValueError, KeyError, TypeError: there is no such state; call it within `readable`.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if manifest["format"] != FORMAT:
        raise ValueError(f"its format is {manifest['format']!r}, this version reads {FORMAT}")
    return manifest, {name: folder / file for name, file in manifest["files"].items()}


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turn whatever a damaged folder makes a reader raise into one error that names the folder.

    Raises:
        VectorIndexError: the block raised what missing, truncated or foreign files raise.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RuntimeError) as error:
        what = f"no {error} in it" if isinstance(error, KeyError) else error
        raise VectorIndexError(
            f"{folder} holds no usable index ({what}); encode the corpus again and save the index there"
        ) from error


def write_array(values: torch.Tensor, rows: int) -> Writer:
    """A writer of `values` as `.npy`, `rows` rows at a time, from whatever device they are on."""

    def write(path: Path) -> None:
        with path.open("wb") as file:
            descr = np.lib.format.dtype_to_descr(values[:0].cpu().numpy().dtype)
            header = {"descr": descr, "fortran_order": False, "shape": tuple(values.shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, len(values), rows):
                file.write(values[start : start + rows].cpu().numpy().data)

    return write


def read_array(path: Path, shape: tuple[int, ...], dtype: str, *, mmap: bool = False) -> NDArray[Any]:
    """The array that `write_array` wrote; mapped copy-on-write with `mmap`, so writing never reaches the file.

    Raises:
        OSError, ValueError: the file is damaged, or holds another shape or dtype than the manifest says.
    """
    array: NDArray[Any] = np.load(path, mmap_mode="c" if mmap else None, allow_pickle=False)
    if array.shape != shape or array.dtype != np.dtype(dtype):
        raise ValueError(f"{path.name} holds {array.dtype} of shape {array.shape}, not {dtype} of shape {shape}")
    return array


def _flush(path: Path) -> None:
    """Force a file, or the names in a folder, onto the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
