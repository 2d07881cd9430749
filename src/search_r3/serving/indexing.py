"""Bringing a store up to date with folders, files and collections: only what changed is encoded.

A document is new or changed where its revision differs from the stored one: then it is written anew, whole. Vectors of
texts that are stored already, of the document before its change or of one that was moved, are taken over. Documents
are acknowledged block by block; a call that was killed has done what was acknowledged, and the next one goes on.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..data.documents import Chunk, DocumentStream
from ..data.reading.files import safe_id
from ..errors import DataError
from ..types import Array, Progress
from .rows import revision_of
from .store import Store

if TYPE_CHECKING:
    from ..model.encoder import SearchR3

BLOCK = {"cpu": 256, "cuda": 8192}
"""Chunks, at least, that are encoded and written at once, by device; they are what a kill may cost."""


@dataclass
class IndexReport:
    """What an indexing did, in documents but for the last two.

    Attributes:
        added: they were not there.
        changed: they were, with other content, place or metadata.
        unchanged: nothing was done.
        removed: they are no longer where they were read from.
        encoded: chunks.
        taken_over: chunks whose text had a vector already.
    """

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    encoded: int = 0
    taken_over: int = 0

    @property
    def documents(self) -> int:
        """How many were read."""
        return self.added + self.changed + self.unchanged

    @property
    def summary(self) -> str:
        """All of it on one line."""
        names = {"new": self.added, "changed": self.changed, "unchanged": self.unchanged, "removed": self.removed}
        parts = [f"{count:,} {name}" for name, count in names.items() if count]
        taken = f", {self.taken_over:,} taken over" if self.taken_over else ""
        return f"documents: {', '.join(parts) or 'none'}; chunks: {self.encoded:,} encoded{taken}"


def index_documents(
    store: Store,
    model: SearchR3,
    documents: DocumentStream | Iterable[Chunk],
    *,
    sources: Sequence[str] | None = None,
    block: int | None = None,
    progress: Progress | None = None,
) -> IndexReport:
    """Make a store hold these documents.

    Args:
        store: opened with the model's fingerprint.
        model: the encoder.
        documents: chunks, those of a document one after the other; read once.
        sources: documents of these that are not among them are removed at the end; by default what the stream reads.
        block: see `BLOCK`.
        progress: called with the numbers of chunks and tokens encoded since its last call; for each document, too.

    Raises:
        DataError: a document has the id of one from another source, or a source lies within another that is stored; or
            what reading them raises. What is done stays done.
        StoreError: the store cannot be read or written; the same.
    """
    named = documents.sources if sources is None and isinstance(documents, DocumentStream) else sources or ()
    roots = {root_of(name) for name in named}
    stored = store.revisions()
    _check_roots(roots, {root for root, _ in stored.values()}, store.address)
    size = block or BLOCK.get(model.backbone.device.type, BLOCK["cuda"])
    report, seen, waiting = IndexReport(), set[str](), list[Chunk]()
    for parent_id, group in groupby(_rooted(documents), key=lambda chunk: chunk.parent_id):
        chunks = list(group)
        root, revision = stored.get(parent_id, (chunks[0].source, ""))
        if parent_id in seen or root != chunks[0].source:
            raise DataError(
                f"document {parent_id!r} of {chunks[0].source} has the id of one from {root}; give its source a prefix "
                f"(PREFIX=SOURCE), or delete the other first: search-r3 store delete STORE {shlex.quote(parent_id)}, "
                "or, if all of them were moved, --source SOURCE"
            )
        seen.add(parent_id)
        if progress is not None:
            progress(0, 0)
        now = revision_of(chunks)
        report.unchanged += revision == now
        report.added += not revision
        report.changed += revision not in ("", now)
        waiting += chunks if revision != now else []
        if len(waiting) >= size:
            store.upsert(waiting, _vectors(store, model, waiting, report, progress))
            waiting.clear()
    if waiting:
        store.upsert(waiting, _vectors(store, model, waiting, report, progress))
    report.removed = store.delete([name for name, (root, _) in stored.items() if root in roots and name not in seen])
    if report.added or report.changed or report.removed:
        store.compact()
    return report


def root_of(source: str) -> str:
    """A source under the name by which the store knows it: of a file or folder the absolute path."""
    return safe_id(os.path.abspath(source) if os.path.exists(source) else source)  # noqa: PTH100, PTH110 - links stay


def _rooted(documents: Iterable[Chunk]) -> Iterator[Chunk]:
    for chunk in documents:
        path = safe_id(os.path.abspath(chunk.path)) if chunk.path else ""  # noqa: PTH100
        yield replace(chunk, source=root_of(chunk.source), path=path)


def _check_roots(named: set[str], stored: set[str], place: str) -> None:
    """Refuse a folder within a stored one, or around it: a file would be there twice, under two ids."""
    for root in named:
        for other in stored - named:
            inner, outer = sorted((Path(root), Path(other)), key=lambda path: len(path.parts), reverse=True)
            if inner.is_absolute() and outer.is_absolute() and outer in inner.parents:
                raise DataError(
                    f"{root} and {other}, which {place} holds, lie within each other: files would be there twice. "
                    f"Index {other} again, which encodes only what changed, or delete its documents first (search-r3 "
                    f"store delete STORE --source {other})"
                )


def _vectors(
    store: Store, model: SearchR3, chunks: Sequence[Chunk], report: IndexReport, progress: Progress | None
) -> Array:
    """The vectors of these chunks; each text is encoded once, and what is stored already is not."""
    known = store.vectors_of(chunks)
    texts = [text for text in dict.fromkeys(chunk.full_text for chunk in chunks) if text not in known]
    report.encoded += len(texts)
    report.taken_over += len(chunks) - len(texts)
    if texts:
        instruction = store.info.fingerprint.instruction
        vectors = model.encode_document(texts, instruction=instruction, progress=progress)
        known |= dict(zip(texts, vectors, strict=True))
    return np.stack([known[chunk.full_text] for chunk in chunks])
