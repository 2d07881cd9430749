"""The first reading of a corpus: what is wrong with it, and where each document stands in the index.

Shapes: `N` documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np

from ...errors import DataError
from ...types import Rows
from ..index import descending

Documents = Iterable[tuple[str, str]]
"""Pairs of doc_id and text, the same in every iteration."""
Block = list[tuple[str, str]]


@dataclass(frozen=True)
class Survey:
    """What the first reading of the documents found."""

    doc_ids: list[str]
    """In descending order."""
    rows: Rows
    """The row of each document, in the order of reading, `N`."""
    digests: list[str]
    """The hash of all documents up to the end of each block."""
    block_size: int


@dataclass(frozen=True)
class Span:
    """Documents that are encoded into one folder: those from `first` to before `end`, in the order of reading.

    Attributes:
        doc_ids: in descending order.
        rows: the row of each among these, in the order of reading.
    """

    first: int
    end: int
    doc_ids: list[str]
    rows: Rows

    def __len__(self) -> int:
        return self.end - self.first


def survey_documents(documents: Documents, block_size: int) -> Survey:
    """Read all documents once.

    Raises:
        DataError: no documents, a doubled doc_id, a text that cannot be encoded, or an iterator.
    """
    if isinstance(documents, Iterator):
        raise DataError(
            "the documents can be read only once, and encoding reads them twice; give a list, or an object whose "
            "__iter__ begins anew"
        )
    doc_ids: list[str] = []
    digests = []
    for block, digest in _blocks(documents, block_size):
        doc_ids += [doc_id for doc_id, _ in block]
        digests.append(digest)
    if not doc_ids:
        raise DataError("an index needs at least one document; the corpus is empty")
    order = descending(doc_ids)
    rows = np.empty_like(order)
    rows[order] = np.arange(len(order))
    descending_ids = [doc_ids[place] for place in order]
    for upper, lower in pairwise(descending_ids):
        if upper == lower:
            raise DataError(f"two documents have the id {upper!r}; ids must be unique")
    return Survey(descending_ids, rows, digests, block_size)


def span_of(survey: Survey, first: int = 0, end: int | None = None) -> Span:
    """Some of the documents, by default all."""
    rows = survey.rows[first:end]
    if len(rows) == len(survey.rows):
        return Span(0, len(rows), survey.doc_ids, rows)
    order = np.argsort(rows)
    local = np.empty_like(order)
    local[order] = np.arange(len(order))
    return Span(first, first + len(rows), [survey.doc_ids[row] for row in rows[order].tolist()], local)


def remaining(documents: Documents, survey: Survey, start: int, end: int) -> Iterator[tuple[int, Block]]:
    """The documents from number `start` to before `end`, in blocks, each with the number of its first document.

    Blocks begin at multiples of the block size wherever an encoding stopped, so that it has the batches of an unbroken
    one, and vectors with the same bytes.

    Raises:
        DataError: the documents are not those that were surveyed.
    """
    size, blocks = survey.block_size, _blocks(documents, survey.block_size)
    for place, surveyed_digest in zip(range(0, end, size), survey.digests, strict=False):
        block, digest = next(blocks, ([], ""))
        if digest != surveyed_digest:
            raise DataError(
                f"the documents changed while they were encoded, somewhere between numbers {place} and "
                f"{place + size}; encode them again, unchanged or into another folder"
            )
        if rest := block[max(0, start - place) :]:
            yield max(start, place), rest


def _blocks(documents: Documents, size: int) -> Iterator[tuple[Block, str]]:
    """Each block of documents and the hash of all up to its end."""
    source, digest = iter(documents), hashlib.sha256()
    while block := list(islice(source, size)):
        for doc_id, text in block:
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"document {doc_id!r} has the text {text!r}; expected at least one visible character")
            try:
                # With the lengths, no two corpora have the same bytes.
                digest.update(f"{len(doc_id)} {len(text)} {doc_id}{text}".encode())
            except UnicodeEncodeError as error:
                raise DataError(
                    f"document {doc_id!r} holds half a surrogate pair, which is no text; mend or remove it"
                ) from error
        yield block, digest.hexdigest()
