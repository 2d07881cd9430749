"""Writing to disk so that a reader sees the old content or the new, never half of it; logs and manifests."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import ConfigError, DataError, RunError


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Give a temporary directory beside `target` that replaces it when the block ends without an error.

    An existing `target` stays as it was until the new content is complete, and when the block raises. Others may read
    it as the umask says, also what a library wrote for its owner alone.
    """
    target = Path(target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = _scratch_beside(target)
    scratch.mkdir()
    try:
        yield scratch
        readable = scratch.stat().st_mode & 0o666
        for path in scratch.rglob("*"):
            if path.is_file() and readable & ~path.stat().st_mode:
                path.chmod(path.stat().st_mode | readable)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            target.replace(old / target.name)
            scratch.replace(target)
            shutil.rmtree(old)
        else:
            scratch.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Give the name of a temporary file beside `target` that replaces it when the block ends without an error."""
    target = Path(target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = _scratch_beside(target)
    try:
        yield scratch
        flush(scratch)
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


def check_replaceable(target: Path, marks: Iterable[str]) -> None:
    """Refuse to replace what is there, unless it is empty or holds one of the files `marks`, as what replaces it does.

    Raises:
        ConfigError: it is a file, or a folder of something else.
    """
    if target.is_dir():
        names = {path.name for path in target.iterdir()}
        if not names or names & set(marks):
            return
    elif not target.exists():
        return
    raise ConfigError(f"{target} is there and holds something else, so it is not replaced; choose another folder")


def _scratch_beside(target: Path) -> Path:
    """A name that nothing has yet. Those of `tempfile` are made for their owner alone, whatever the umask says."""
    return target.with_name(f".{target.name}.{os.urandom(4).hex()}")


def leftovers(target: Path) -> list[Path]:
    """Files and folders beside `target` that writers of it had begun, and could not remove since they were killed."""
    scratch_name = re.compile(rf"\.{re.escape(target.name)}(\.old)?\.[a-z0-9_]{{8}}")  # as `tempfile`'s
    return [path for path in target.parent.glob(f".{target.name}.*") if scratch_name.fullmatch(path.name)]


def remove_leftovers(target: Path) -> None:
    """Remove what killed writers of `target` left behind; only for a target that nobody else is writing.

    Where one was killed with the old folder moved aside, and before the new one was in its place, the old one is back.
    """
    for path in leftovers(target):
        if (path / target.name).exists() and not target.exists():
            (path / target.name).replace(target)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def must_be_path(name: str) -> bool:
    """Whether a name can only be meant as a path, though nothing may be there; then no hub need be asked about it.

    So are `./x`, `~/x`, `x/`, and `runs/x` where a folder `runs` is.

    Example:
        >>> must_be_path("./model"), must_be_path("owner/model")
        (True, False)
    """
    head, slash, _ = name.partition("/")
    return name.startswith((".", "~", "/")) or name.endswith("/") or "\\" in name or bool(slash and Path(head).is_dir())


def write_text(path: Path, text: str | Iterable[str]) -> None:
    """Replace the file at `path` by a text, or by the parts of a long one, in one step (UTF-8)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = _scratch_beside(path)
    try:
        with scratch.open("x", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Force a file, or the names in a folder, onto the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Replace the file at `path` by `value` as indented JSON; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def hash_file(path: Path) -> str:
    """SHA-256 (hex) over the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


NO_CONTENT = frozenset({"README.md", "gate.json"})
"""Files of a model directory on which no vector depends."""


def hash_folder(folder: Path) -> str:
    """SHA-256 (hex) over the names and bytes of all files in a folder but hidden ones and `NO_CONTENT`."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and name.name not in NO_CONTENT and not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()}\0{hash_file(path)}\n".encode())
    return digest.hexdigest()


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield `(line number, object)` for every non-blank line of a JSON Lines file.

    Raises:
        DataError: as `read_lines`, or a line is not a JSON object; the message names file and line.
    """
    for number, line in read_lines(path):
        if line.strip():
            yield number, json_object(path, number, line)


def json_object(path: Path, number: int, line: str) -> dict[str, Any]:
    """The object in a line of a file.

    Raises:
        DataError: the line is not a JSON object.
    """
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        remedy = "mend or remove the line"
        if "\r" in line.rstrip():
            remedy = "it holds a carriage return alone, which ends no line: save the file with line feeds (\\n)"
        raise DataError(f"{path}:{number}: not valid JSON ({error.msg}); {remedy}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}:{number}: expected a JSON object, found {type(value).__name__}")
    return value


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield `(line number, line)` for every line of a text file; a byte order mark before the first is dropped.

    A line ends with LF or CR LF, as in JSON Lines, and not with a CR alone.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            yield from enumerate(file, 1)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from error


def jsonl_line(row: Mapping[str, Any]) -> str:
    """One line of a JSON Lines file; NaN and infinity are refused."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; a last line that a killed process left unfinished is not one of them.

    Raises:
        RunError: a whole line is not a JSON object.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if line.endswith(b"\n"):
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise RunError(f"{path}:{number}: not a JSON object; mend or remove the line") from error
    return rows


def write_manifest(folder: Path, name: str, **facts: Any) -> None:
    """Write the digests of all files in a folder, and some facts, to the file `name` in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    write_json(
        folder / name, facts | {"files": {path.relative_to(folder).as_posix(): hash_file(path) for path in paths}}
    )


def find_damage(folder: Path, manifest: str) -> str | None:
    """What is wrong with a folder's files, compared with its manifest; None where all is well."""
    try:
        files = dict(json.loads((folder / manifest).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{manifest} cannot be read"
    for name, digest in files.items():
        path = folder / name
        try:
            if hash_file(path) != digest:
                return f"{name} is not what was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None
