"""By what an encoded corpus is searched: the vectors themselves, or a graph over them; its manifest says which."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from . import storage
from .approximate import ApproximateIndex
from .index import ExactIndex

IndexType = Literal["auto", "exact", "hnsw"]
HNSW_FROM = 100_000
"""Documents from which on `auto` is a graph: an exact search of so many takes longer than to encode a query."""


def open_index(folder: str | Path, *, mmap: bool = True) -> ExactIndex | ApproximateIndex:
    """The index in a folder, of the type that its manifest names.

    Args:
        folder: where `encode_corpus` put it.
        mmap: leave vectors, ids and graph on the disk, and read what is used.

    Raises:
        VectorIndexError: files are missing, damaged or do not fit together.
    """
    with storage.readable(Path(folder)):
        kind = storage.read_manifest(Path(folder))[0].get("index_type", "exact")
    return (ApproximateIndex if kind == "hnsw" else ExactIndex).load(Path(folder), mmap=mmap)


def set_index_type(folder: str | Path, index_type: IndexType) -> ExactIndex | ApproximateIndex:
    """Give the index in a folder a type, and return it; the vectors stay as they are.

    A graph is built where there is none (in memory, with a copy of the vectors in 16 bits), and its recall measured.

    Args:
        folder: where `encode_corpus` put it.
        index_type: `exact`, `hnsw`, or `auto`: a graph from 100,000 documents on.

    Raises:
        VectorIndexError: as `open_index`, or the disk refuses; the index stays as it was.
        MissingExtraError: a graph is to be built, and usearch is not installed.
    """
    folder = Path(folder)
    if _has(index := open_index(folder), index_type):
        return index
    with storage.alone(folder / ".index.lock"):
        # Who was at it before, as another shard of the same corpus, may have done it.
        return index if _has(index := open_index(folder), index_type) else _change(folder, index)


def _has(index: ExactIndex | ApproximateIndex, index_type: IndexType) -> bool:
    graph = index_type == "hnsw" or (index_type == "auto" and len(index) >= HNSW_FROM)
    return graph == isinstance(index, ApproximateIndex)


def _change(folder: Path, index: ExactIndex | ApproximateIndex) -> ExactIndex | ApproximateIndex:
    """Give an index its graph, or take it away."""
    with storage.readable(folder):
        manifest, paths = storage.read_manifest(folder)
    if isinstance(index, ApproximateIndex):
        names = index.graph_facts().keys() | {"format", "files"}
        facts = {name: value for name, value in manifest.items() if name not in names}
        writers = {name: path for name, path in paths.items() if name != "hnsw.graph"}
        storage.save_state(folder, writers, facts)
    else:
        index = ApproximateIndex(index)
        index.maintain()
        facts = {name: value for name, value in manifest.items() if name not in ("format", "files")}
        storage.save_state(folder, {**paths, **index.graph_writers()}, {**facts, **index.graph_facts()})
    return open_index(folder)
