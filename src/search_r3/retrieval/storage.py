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
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray

from ..errors import VectorIndexError
from ..files import flush, write_json
from .labels import DocIds, RowOf, bytes_of, ends_of
from .parts import Parts

FORMAT, READABLE = 2, (1, 2)
"""What is written, and what is read: format 1 has its doc_ids in JSON."""
FILE_DTYPES = {"bfloat16": "int16"}
"""numpy has no bfloat16: its bits are saved as these."""
MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"
"""The manifest of a state whose data files are still being filled; the next save deletes it."""
# Names of this module's making, and the scratch files of JSON whose writing was killed.
_OURS = re.compile(
    r"[a-z0-9_]+-[0-9a-f]{16}\.(npy|json|graph)|unfinished\.json|"
    r"\.(manifest|unfinished|[a-z0-9_]+-[0-9a-f]{16})\.json\..*"
)

FileWriter = Callable[[Path], None]


def save_state(
    folder: Path, writers: Mapping[str, FileWriter | Path], facts: Mapping[str, Any], name: str = MANIFEST
) -> dict[str, Path]:
    """Write a state atomically.

    Args:
        folder: made if missing; files of other origin in it are left alone.
        writers: `name.suffix` of each data file -> what writes it at the path it is given, or where it stands in
            `folder`, or below it, already.
        facts: further entries of the manifest.
        name: of the manifest.

    Returns:
        `name.suffix` -> path of each data file.

    Raises:
        VectorIndexError: the disk refuses a write; the state that stood in `folder` is unchanged.
    """
    folder = Path(folder)
    token = secrets.token_hex(8)
    paths: dict[str, Path] = {}
    with writable(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for file, write in writers.items():
                if isinstance(write, Path):
                    paths[file] = write
                else:
                    stem, suffix = file.rsplit(".", 1)
                    paths[file] = folder / f"{stem}-{token}.{suffix}"
                    write(paths[file])
                flush(paths[file])
            files = {file: path.relative_to(folder).as_posix() for file, path in paths.items()}
            write_json(folder / name, {"format": FORMAT, **facts, "files": files})
        except OSError:
            for path in folder.glob(f"*-{token}.*"):
                path.unlink(missing_ok=True)
            raise
    flush(folder)
    sweep(folder, {name, *files.values()})
    return paths


def sweep(folder: Path, keep: Set[str]) -> None:
    """Delete what earlier and killed saves left in `folder`; `keep` are the names of the files of its state."""
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in keep:
            # Windows refuses to delete a file that is still mapped; the next save deletes it.
            with suppress(OSError):
                path.unlink()


def read_manifest(folder: Path, name: str = MANIFEST) -> tuple[dict[str, Any], dict[str, Path]]:
    """The manifest of the state in `folder`, and `name.suffix` -> path of its data files.

    Raises:
        OSError, ValueError, KeyError, TypeError: there is no such state; call it within `readable`.
    """
    manifest = json.loads((folder / name).read_text(encoding="utf-8"))
    if manifest["format"] not in READABLE:
        raise ValueError(f"its format is {manifest['format']!r}, this version reads {FORMAT}")
    return manifest, {file: folder / path for file, path in manifest["files"].items()}


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Turn what a full or read-only disk raises into one error that names the folder.

    Raises:
        VectorIndexError: the block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise VectorIndexError(
            f"cannot save the index to {folder}: {error.strerror or error}; the state saved there before is unchanged; "
            "free some space and try again, or choose another folder"
        ) from error


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Wait until no other process holds a lock file, and hold it.

    Raises:
        VectorIndexError: the disk refuses.
    """
    with ExitStack() as held:
        with writable(lock.parent):
            lock.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(lock))
        yield


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
            f"{folder} holds no usable index ({what}); encode the corpus again and save the index in an empty folder"
        ) from error


def write_array(values: torch.Tensor | Parts, rows: int) -> FileWriter:
    """A writer of `values` as `.npy`, `rows` rows at a time, from whatever device they are on."""

    def write(path: Path) -> None:
        with path.open("wb") as file:
            _write_header(file, values[:0].cpu().numpy().dtype, tuple(values.shape))
            for start in range(0, len(values), rows):
                file.write(values[start : start + rows].cpu().numpy().data)

    return write


def reserve_array(shape: tuple[int, int], dtype: str) -> FileWriter:
    """A writer of an `.npy` of zeros for `write_rows` to fill; where the system can, it takes all its space now."""

    def write(path: Path) -> None:
        with path.open("wb") as file:
            _write_header(file, np.dtype(dtype), shape)
            size = file.tell() + shape[0] * shape[1] * np.dtype(dtype).itemsize
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            file.truncate(size)

    return write


def write_rows(path: Path, rows: NDArray[np.int64], values: NDArray[Any]) -> None:
    """Put `values`, `len(rows) x D`, into these rows of the `.npy` that `reserve_array` wrote with their dtype.

    Not through a memory map: where the disk is full, writing to one ends the process.
    """
    order = np.argsort(rows)
    rows, values = rows[order], values[order]
    runs = np.flatnonzero(np.diff(rows) != 1) + 1  # neighbours are written at once
    with path.open("r+b") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        start = file.tell()
        for first, end in pairwise([0, *runs.tolist(), len(rows)]):
            file.seek(start + int(rows[first]) * values[0].nbytes)
            file.write(values[first:end].data)


def read_array(path: Path, shape: tuple[int, ...], dtype: str, *, mmap: bool = False) -> NDArray[Any]:
    """The array that `write_array` wrote; mapped copy-on-write with `mmap`, so writing never reaches the file.

    Raises:
        OSError, ValueError: the file is damaged, or holds another shape or dtype than the manifest says.
    """
    array: NDArray[Any] = np.load(path, mmap_mode="c" if mmap else None, allow_pickle=False)
    if array.shape != shape or array.dtype != np.dtype(dtype):
        raise ValueError(f"{path.name} holds {array.dtype} of shape {array.shape}, not {dtype} of shape {shape}")
    return array


def read_vectors(manifest: Mapping[str, Any], paths: Mapping[str, Path], *, mmap: bool = False) -> torch.Tensor | Parts:
    """The vectors of an index, `N x D`, from its one file, or from those of its shards; call it within `readable`."""

    def read(file: str, count: int) -> torch.Tensor:
        dtype = manifest["dtype"]
        array = read_array(paths[file], (count, manifest["dimension"]), FILE_DTYPES.get(dtype, dtype), mmap=mmap)
        return torch.from_numpy(array).view(torch.bfloat16) if dtype in FILE_DTYPES else torch.from_numpy(array)

    if "shards" not in manifest:
        return read("vectors.npy", manifest["documents"])
    counts = manifest["shards"]
    owners = read_array(paths["shards.npy"], (manifest["documents"],), "int32")
    if np.bincount(owners, minlength=len(counts)).tolist() != counts:
        raise ValueError(f"{paths['shards.npy'].name} does not deal its documents to shards of {counts}")
    parts = Parts([read(shard_file(number), count) for number, count in enumerate(counts)], owners)
    return parts if mmap else parts[:]


def shard_file(number: int) -> str:
    """What a manifest calls the vectors of one of its shards, counted from 0."""
    return f"vectors_{number + 1}.npy"


def label_writers(doc_ids: Sequence[str], versions: NDArray[np.int64]) -> dict[str, FileWriter]:
    """What writes each data file of a saved index but the vectors."""
    ends = ends_of(doc_ids)

    def write_ids(path: Path) -> None:
        with path.open("wb") as file:
            _write_header(file, np.dtype(np.uint8), (int(ends[-1]),))
            file.writelines(bytes_of(doc_ids))

    return {
        "encoded_at_version.npy": write_array(torch.from_numpy(versions), len(versions)),
        "doc_ids.npy": write_ids,
        "doc_id_ends.npy": write_array(torch.from_numpy(ends), len(ends)),
    }


def read_doc_ids(paths: Mapping[str, Path], count: int) -> Sequence[str]:
    """The doc_ids that `label_writers` wrote for so many documents, in their files; call it within `readable`."""
    if "doc_ids.npy" not in paths:
        doc_ids = json.loads(paths["doc_ids.json"].read_text(encoding="utf-8"))
        if len(doc_ids) != count or not all(upper > lower for upper, lower in pairwise(doc_ids)):
            raise ValueError(f"its {len(doc_ids)} doc_ids are not {count} in descending order")
        return list(doc_ids)
    ends = read_array(paths["doc_id_ends.npy"], (count,), "int64", mmap=True)
    text = np.load(paths["doc_ids.npy"], mmap_mode="c", allow_pickle=False)
    if text.dtype != np.uint8 or text.ndim != 1:
        raise ValueError(f"{paths['doc_ids.npy'].name} holds {text.dtype} of shape {text.shape}, not bytes")
    return DocIds(text, ends)


def read_labels(
    paths: Mapping[str, Path], count: int, *, mmap: bool = False
) -> tuple[Sequence[str], Mapping[str, int], NDArray[np.int64]]:
    """Doc_ids, the row of each, and versions that `label_writers` wrote; the ids in memory unless with `mmap`."""
    doc_ids, versions = read_doc_ids(paths, count), read_array(paths["encoded_at_version.npy"], (count,), "int64")
    if mmap and isinstance(doc_ids, DocIds):
        return doc_ids, RowOf(doc_ids), versions
    doc_ids = list(doc_ids)
    return doc_ids, {doc_id: row for row, doc_id in enumerate(doc_ids)}, versions


def _write_header(file: BinaryIO, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
