"""The record of one system on one split: what was run, what came out, query by query; one JSON file each."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import DataError
from ..files import write_text

FORMAT = 1
ENGINE = 1
"""Raised by hand with every change after which prompts, decoding, ranking or measures give other numbers."""
PACKAGES = (
    "search-r3",
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "bm25s",
    "PyStemmer",
    "babel",
    "numpy",
    "sentence-transformers",
)
UNKNOWN = "unknown"
"""The revision of a model whose library does not tell."""
KEY_SHOWN = 12
"""Characters of the key in a file's name."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class SystemInfo(_Part):
    """What was evaluated."""

    name: str = Field(description="As in the tables, e.g. `reason` or `bm25`.")
    kind: str = Field(description="`search-r3`, `bm25` or `sentence-transformers`.")
    model: str = Field(description="Directory, hub id or package; a library and its version for BM25.")
    revision: str = Field(description="Commit on the hub, or SHA-256 of the files in a directory.")
    mode: str = Field("", description="Of `modes.MODES`; empty for others.")
    settings: dict[str, Any] = Field(description="All that the ranking depends on: prompts, limits, dtype, ...")

    @property
    def varied(self) -> bool:
        """Whether it thinks less or more than its mode does: with a budget, a price or samples of its own."""
        return not {"budget", "price", "samples"}.isdisjoint(self.settings)


class CollectionInfo(_Part):
    """What it was evaluated on."""

    name: str
    split: str
    source: str = Field(description="As it was asked for: a folder, a hub id or a built-in name.")
    hash: str = Field(description="SHA-256 of documents, queries, judgements, pools and excluded documents.")
    documents: int
    queries: int = Field(description="Queries that were measured: those of the split with a relevant document.")
    sample_of: int = Field(0, description="Number of queries that these are a sample of; 0 where all were measured.")
    without_relevant: int = Field(0, description="Queries of the split without a relevant document, left out.")
    absent: int = Field(0, description="Judgements of documents that are not in the corpus: counted, never found.")
    dropped: dict[str, int] = Field({}, description="What was wrong with rows that were left out -> how many.")
    without_text: int = Field(description="Documents without any text, which were left out.")
    identical_ids: int = Field(description="Documents left out of a ranking because they bear the id of its query.")


class Cost(_Part):
    """What it cost; times are of this machine, with all else that ran on it."""

    queries_per_second: float = Field(description="All queries at once: encoding and ranking.")
    ms_per_query: float | None = Field(description="Median over queries asked one at a time; in mode auto the mean.")
    documents_per_second: float | None = Field(description="Indexing; None where the index was there already.")
    tokens_per_query: float = Field(0.0, description="Mean tokens of reasoning.")
    thinking_share: float | None = Field(None, description="Share of queries that the gate of mode auto let think.")
    forced_share: float = Field(0.0, description="Share of queries whose embed token was forced.")
    truncated_queries: int = Field(0, description="Queries that lost their end.")
    truncated_documents: int = Field(0, description="Documents that lost their end.")


class Result(_Part):
    """One system on one split of one collection. Lists named `per query` follow `query_ids`."""

    format: int = FORMAT
    key: str = Field(
        description="SHA-256 over system, collection, split, settings and versions; a result is cached under it."
    )
    system: SystemInfo
    collection: CollectionInfo
    settings: dict[str, Any] = Field(description="Of the evaluation: depth, seed, resamples, ...")
    scores: dict[str, float] = Field(description="Measure -> mean over the queries.")
    intervals: dict[str, tuple[float, float]] = Field(description="Measure -> 95 % bootstrap interval of the mean.")
    cost: Cost
    query_ids: list[str]
    queries: list[str] = Field(description="Texts, per query.")
    per_query: dict[str, list[float]] = Field(description="Measure -> values, per query.")
    top: list[list[tuple[str, float]]] = Field(description="The 10 best (doc_id, score), per query.")
    relevant: list[dict[str, int]] = Field(description="doc_id -> judgement above 0, per query.")
    snippets: dict[str, str] = Field(description="doc_id -> beginning of its text, for all in `top` and `relevant`.")
    reasoning: list[str] = Field([], description="Per query, in reason mode.")
    reasoning_tokens: list[int] = Field([], description="Per query, in reason mode.")
    thought: list[bool] = Field([], description="Per query, in mode auto: whether the gate let it think.")
    gate: list[dict[str, float]] = Field(
        [], description="Per query, in mode auto: the probability that reasoning pays, and what adds to its log-odds."
    )
    notes: list[str] = Field([], description="What a reader of the numbers should know of this system here.")
    provenance: dict[str, Any] = Field(description="Date, versions, machine, device, threads, seconds.")

    @property
    def place(self) -> tuple[str, str]:
        """Collection and split."""
        return self.collection.name, self.collection.split

    def renamed(self, name: str) -> Result:
        """The same result of a system called otherwise."""
        return self.model_copy(update={"system": self.system.model_copy(update={"name": name})})

    def file_name(self) -> str:
        """`collection.split.system.key.json`."""
        return result_name(self.collection.name, self.collection.split, self.system.name, self.key)


def result_name(collection: str, split: str, system: str, key: str) -> str:
    """The file name of a result; other characters than letters, digits, `+`, `-`, `_` become `-`."""
    return ".".join([plain(collection), plain(split), plain(system), key[:KEY_SHOWN], "json"])


def find_result(folder: Path, collection: str, split: str, system: str, key: str) -> Path | None:
    """The file of the result with this key: that of the system's name, else of another name that it had."""
    path = folder / result_name(collection, split, system, key)
    if path.exists():
        return path
    return min(folder.glob(f"{plain(collection)}.{plain(split)}.*.{key[:KEY_SHOWN]}.json"), default=None)


def plain(part: str) -> str:
    """A name as it stands in names of files."""
    return re.sub(r"[^\w+-]+", "-", part)


def save_result(result: Result, folder: Path) -> Path:
    """Write a result into a folder in one step; returns its path."""
    path = folder / result.file_name()
    write_text(path, result.model_dump_json(indent=1) + "\n")
    return path


def load_result(path: Path) -> Result:
    """Read a result.

    Raises:
        DataError: the file is damaged, or of another format; the message says to remove it.
    """
    try:
        return Result.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (ValidationError, UnicodeDecodeError) as error:
        fault = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(str(part) for part in fault["loc"])
        raise DataError(
            f"{path} is no result of this version ({where}: {fault['msg']}); remove it and evaluate again"
        ) from error


def load_results(folder: Path) -> list[Result]:
    """All results of a folder, in the order of their names."""
    return [load_result(path) for path in sorted(folder.glob("*.*.*.*.json"))]


def provenance() -> dict[str, Any]:
    """Date, versions and machine of this process."""
    import torch

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": package_versions(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def package_versions() -> dict[str, str]:
    """Python and the packages that results depend on, those that are installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
