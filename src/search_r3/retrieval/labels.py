"""The doc_ids of an index, in descending order: on the disk as UTF-8 and where each ends, read as they are needed.

Code points and the bytes of their UTF-8 have one order, so ids are found by bisection, with nothing in memory.

Shapes: `N` documents, `B` bytes of all ids.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, pairwise
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from ..types import Rows

AT_A_TIME = 65_536
LONG = 256
"""Bytes of an id; longer ones are compared one by one, since room for all would be that of the longest."""
DEAR, HELD = 16, 5_000_000
"""A bisection costs so much more than to hold an id; ids that are held at most."""
UTF8 = "utf-8", "surrogatepass"


class DocIds(Sequence[str]):
    """Ids that stay in their files.

    Args:
        text: all ids in UTF-8, one after the other, `B`.
        ends: the place behind each, `N`.

    Raises:
        ValueError: they are not ids in descending order.
    """

    def __init__(self, text: NDArray[np.uint8], ends: Rows) -> None:
        self._text, self._ends = np.asarray(text), np.asarray(ends)  # slices of numpy's own maps are slow to make
        if (ends[-1] if len(ends) else 0) != len(text) or not all(map(self._descend, range(0, len(ends), AT_A_TIME))):
            raise ValueError(f"its {len(ends)} doc_ids are not in descending order")

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[row] for row in range(*place.indices(len(self)))]
        row = range(len(self))[place]
        return self._text[self._start(row) : self._ends[row]].tobytes().decode(*UTF8)

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), AT_A_TIME):
            ends = self._ends[first : first + AT_A_TIME].tolist()
            start = self._start(first)
            text = self._text[start : ends[-1]].tobytes()
            for low, high in pairwise([0, *(end - start for end in ends)]):
                yield text[low:high].decode(*UTF8)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def _start(self, row: int) -> int:
        return int(self._ends[row - 1]) if row else 0

    def _descend(self, first: int) -> bool:
        """Whether the ids from this row on, a block of them and the next one, are in descending order."""
        ends = self._ends[first : first + AT_A_TIME + 1]
        start = self._start(first)
        lengths = np.diff(ends, prepend=start)
        if lengths.min() < 0 or ends[-1] > len(self._text):
            return False
        if (width := int(lengths.max())) > LONG:
            return all(upper > lower for upper, lower in pairwise(self[first : first + len(ends)]))
        padded = np.zeros((len(ends), max(width, 1)), dtype=np.uint8)
        padded[np.arange(padded.shape[1]) < lengths[:, None]] = self._text[start : ends[-1]]
        words = padded.view(f"S{padded.shape[1]}")[:, 0]
        # numpy drops zeros at the end of its words, which an id may have.
        unsure = np.flatnonzero(~(words[:-1] > words[1:]))
        return all(self[first + row] > self[first + row + 1] for row in unsure.tolist())


class RowOf(Mapping[str, int]):
    """The row of each id, by bisection; who asks for many pays for a dictionary, which is faster from then on."""

    def __init__(self, doc_ids: Sequence[str]) -> None:
        self._doc_ids, self._lookups = doc_ids, 0
        self._rows: dict[str, int] | None = None

    def __getitem__(self, doc_id: str) -> int:
        ids = self._doc_ids
        self._lookups += 1
        if self._rows is None and len(ids) <= HELD and DEAR * self._lookups > len(ids):
            self._rows = {doc_id: row for row, doc_id in enumerate(ids)}
        if self._rows is not None:
            return self._rows[doc_id]
        row = bisect_left(range(len(ids)), True, key=lambda row: ids[row] <= doc_id)
        if row == len(ids) or ids[row] != doc_id:
            raise KeyError(doc_id)
        return row

    def __iter__(self) -> Iterator[str]:
        return iter(self._doc_ids)

    def __len__(self) -> int:
        return len(self._doc_ids)


def ends_of(doc_ids: Sequence[str]) -> Rows:
    """The place behind each id in the UTF-8 of all, `N`."""
    lengths = np.fromiter((len(doc_id.encode(*UTF8)) for doc_id in doc_ids), np.int64, len(doc_ids))
    ends: Rows = lengths.cumsum()
    return ends


def bytes_of(doc_ids: Sequence[str]) -> Iterator[bytes]:
    """The UTF-8 of all ids, in pieces."""
    source: Iterator[Any] = iter(doc_ids)
    while some := list(islice(source, AT_A_TIME)):
        yield "".join(some).encode(*UTF8)
