"""Vectors that lie in several files, read as if they were one.

Shapes: `N` vectors in all, `D` vector size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ..types import Rows


class Parts:
    """Vectors of an index that lie in several tensors, `N x D`, for what else is one tensor; nothing is copied.

    The rows of a part ascend in the whole, so that a block of the whole is one run of each part.

    Args:
        tensors: of one dtype and on one device; memory-mapped ones stay where they are.
        owners: the number of the tensor that holds each row, `N`.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], owners: NDArray[np.integer]) -> None:
        self._tensors = tensors
        self._rows: list[Rows] = [np.flatnonzero(owners == number) for number in range(len(tensors))]
        self.shape = torch.Size([len(owners), tensors[0].shape[1]])
        self.dtype, self.device = tensors[0].dtype, tensors[0].device

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """A copy of some rows."""
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            found = self._tensors[0].new_empty((max(0, stop - start), self.shape[1]))
            for held, tensor in zip(self._rows, self._tensors, strict=True):
                low, high = np.searchsorted(held, (start, stop))
                found[torch.from_numpy(held[low:high] - start)] = tensor[low:high]
            return found
        found = self._tensors[0].new_empty((len(rows), self.shape[1]))
        for tensor, wanted, places in self._places(rows):
            found[wanted] = tensor[places]
        return found

    def __setitem__(self, rows: torch.Tensor, vectors: torch.Tensor) -> None:
        for tensor, wanted, places in self._places(rows):
            tensor[places] = vectors[wanted]

    def float(self) -> torch.Tensor:
        """All vectors in one tensor, as float32."""
        return self[:].float()

    def to(self, device: str | torch.device) -> Parts | torch.Tensor:
        """Itself on its own device; on another one all vectors in one tensor."""
        return self if torch.device(device).type == self.device.type else self[:].to(device)

    def _places(self, rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Of each part its tensor, which of these rows it holds, and where."""
        wanted = rows.cpu().numpy()
        for held, tensor in zip(self._rows, self._tensors, strict=True):
            places = np.minimum(np.searchsorted(held, wanted), len(held) - 1)
            own = np.flatnonzero(held[places] == wanted)
            yield tensor, torch.from_numpy(own), torch.from_numpy(places[own])
