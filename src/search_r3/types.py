"""Types that every room shares.

Shapes: `N` rows, `D` vector size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
"""Vectors or scores."""
Rows = NDArray[np.int64]
"""Row numbers of documents in an index."""
Progress = Callable[[int, int], None]
"""Told of the texts and tokens that are done since its last call."""
Watch = Callable[[str, int | None], Progress]
"""Told what begins and how many texts it has, where that is known; returns what is told of the progress."""


class DocumentEncoder(Protocol):
    """Encodes documents with the current weights; `SearchR3` is one."""

    @property
    def dimension(self) -> int:
        """The size of a vector, `D`."""
        ...

    def encode_document(self, texts: Sequence[str], *, progress: Progress | None = None) -> Array:
        """Vectors `N x D`, L2-normalised."""
        ...

    def count_document_tokens(self, texts: Sequence[str]) -> list[int]:
        """The tokens that each text takes, prompt included."""
        ...
