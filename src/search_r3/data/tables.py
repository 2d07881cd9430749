"""The configs, splits and rows of a data set on the Hugging Face hub, or of a local directory in its format.

All is read through the library `datasets`. Code of a data set is never run: the versions of `datasets` that this
package admits cannot.
"""

from __future__ import annotations

import hashlib
import os
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..extras import extra
from .rows import plain_value

PARTS = {
    "corpus": "corpus",
    "queries": "queries",
    "default": "qrels",
    "qrels": "qrels",
    "top_ranked": "top_ranked",
    "instruction": "instruction",
    "qrel_diff": "qrel_diff",
}
"""Name of a config, without its subset -> the part that it holds."""
BATCH = 1000
PATTERN_SIGNS = re.compile(r"[*?\[]|::|://")

Columns = Mapping[str, tuple[str, ...]]
"""Field -> the names that its column may have."""


def is_hub_folder(folder: Path) -> bool:
    """Whether a directory has configs in its README.md, or the sub-folders of a known layout."""
    return _has_configs(folder) or bool(_part_folders(folder))


@dataclass(frozen=True)
class Repository:
    """A data set on the hub, or in a directory."""

    source: str  # its id or path
    revision: str | None  # branch, tag or commit on the hub
    scratch: str  # a folder for what lasts no longer than the reading

    @property
    def local(self) -> bool:
        """Whether it is a directory."""
        return Path(self.source).is_dir()

    @property
    def name(self) -> str:
        """Its name without owner or path."""
        return Path(self.source).resolve().name if self.local else self.source.rpartition("/")[2]

    def configs(self) -> list[str]:
        """The names of its configs."""
        if folders := _part_folders(Path(self.source)):
            return folders
        with extra("eval"):
            from datasets import get_dataset_config_names

        with self.errors_at(self.source):
            return list(get_dataset_config_names(self._place(), revision=self.revision))

    def _place(self) -> str:
        return plain_path(Path(self.source), self.scratch) if self.local else self.source

    def tables(self, config: str, *, streaming: bool = False) -> dict[str, Table]:
        """Split -> table of one config; with `streaming` only those rows of the hub are downloaded that are read."""
        with extra("eval"):
            from datasets import load_dataset

        place = f"{self.source}, config {config!r}"
        options: dict[str, Any] = {"revision": self.revision}
        if self.local:
            # datasets' cache answers with the old content of a local file that has changed, hence no cache.
            options = {"streaming": True, "cache_dir": self.scratch}
        elif streaming:
            options["streaming"] = True
        options["data_dir" if _part_folders(Path(self.source)) else "name"] = config
        with self.errors_at(place):
            splits = load_dataset(self._place(), **options)
        return {str(split): Table(self, f"{place}, split {split!s}", data) for split, data in splits.items()}

    @contextmanager
    def errors_at(self, place: str) -> Iterator[None]:
        """Turn whatever the libraries raise into a DataError; they have no common base class."""
        try:
            yield
        except Exception as error:
            lines = str(error).strip().splitlines() or ["no data that can be read"]
            reason = textwrap.shorten(lines[0], 240, placeholder=" ...")
            what = "mend the folder" if self.local else "check id, revision and network (no folder has that name)"
            raise DataError(f"{place}: cannot be read: {reason} ({type(error).__name__}); {what}") from error


@dataclass(frozen=True)
class Table:
    """One split of one config."""

    repository: Repository
    place: str
    data: Any

    def rows(self, columns: Columns, optional: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
        """Place and fields of every row: ids as strings, a missing text as the empty one.

        Args:
            columns: the fields.
            optional: those that may have no column.
        """
        with self.repository.errors_at(self.place):
            batches = self.data.iter(batch_size=BATCH)
        column_of: dict[str, str] = {}
        number = 0
        while True:
            with self.repository.errors_at(self.place):
                batch = next(batches, None)
            if batch is None:
                break
            column_of = column_of or self._choose(columns, optional, list(batch))
            for values in zip(*(batch[column] for column in column_of.values()), strict=True):
                row = {name: plain_value(name, value) for name, value in zip(column_of, values, strict=True)}
                yield f"{self.place}, row {number}", row
                number += 1
        if not number:
            raise DataError(f"{self.place}: no rows")

    def _choose(self, columns: Columns, optional: tuple[str, ...], present: list[str]) -> dict[str, str]:
        column_of = {}
        for field, names in columns.items():
            if matches := [name for name in names if name in present]:
                column_of[field] = matches[0]
            elif field not in optional:
                raise DataError(f"{self.place}: no column {' or '.join(map(repr, names))}; it has {quoted(present)}")
        return column_of


def plain_path(path: Path, scratch: str) -> str:
    """A path for `datasets`, which reads paths as patterns and as chains of URLs: by links where it holds their signs.

    Args:
        path: a file or a folder; of a folder each file has a link, since `datasets` resolves one to the folder.
        scratch: where links may be.
    """
    whole = path.resolve()
    if not PATTERN_SIGNS.search(f"{path.absolute()}{whole}"):
        return str(path)
    link = Path(scratch) / f"link-{hashlib.sha256(os.fsencode(whole)).hexdigest()[:16]}{path.suffix}"
    for file in [whole] if whole.is_file() else filter(Path.is_file, whole.rglob("*")):
        target = link / file.relative_to(whole)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_symlink():
            target.symlink_to(file)
    return str(link)


def find_layouts(configs: Iterable[str]) -> dict[str, dict[str, str]]:
    """Subset -> part -> config, for the subsets (empty where there are none) with documents and queries."""
    layouts: dict[str, dict[str, str]] = defaultdict(dict)
    names = list(configs)
    for config in names:
        head, _, tail = config.rpartition("-")
        first, _, rest = config.partition("-")
        subset, part = ("", config) if config in PARTS else (head, tail) if tail in PARTS else (rest, first)
        # Of two names for the judgements MTEB reads `default` without a subset and `SUBSET-qrels` with one.
        if part in PARTS and (PARTS[part] not in layouts[subset] or part == ("qrels" if subset else "default")):
            layouts[subset][PARTS[part]] = config
    if "query" in names:  # older MTEB sets: one config of queries, also for several subsets
        for layout in layouts.values():
            layout["queries"] = "query"
    return {subset: layout for subset, layout in layouts.items() if {"corpus", "queries"} <= layout.keys()}


def is_bright(configs: Iterable[str]) -> bool:
    """Whether the configs are those of BRIGHT."""
    return {"documents", "examples"} <= set(configs)


def _has_configs(folder: Path) -> bool:
    readme = folder / "README.md"
    if not readme.is_file():
        return False
    head = readme.read_text(encoding="utf-8", errors="replace").partition("\n---")[0]
    return head.startswith("---") and "configs:" in head


def _part_folders(folder: Path) -> list[str]:
    """The sub-folders of a directory without configs, if they are named as those of a known layout."""
    if not folder.is_dir() or _has_configs(folder):
        return []
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    return names if find_layouts(names) or is_bright(names) else []


def quoted(names: Iterable[str]) -> str:
    """Names for a message."""
    return ", ".join(map(repr, sorted(names)))
