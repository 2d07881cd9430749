"""What several training processes tell each other about the corpus: what to encode, and the vectors.

Each process searches, fits and mends by itself, on the same data and with the same result; only the encoding is
divided, by the first process's choice. The vectors travel over a gloo group of their own. Before each exchange, and
after the last one of a step, the processes meet at a barrier that waits long and names who is missing, so that no
collective of the gradients (whose watchdog is short) ever waits for another process's work on the index.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from ..errors import RunError
from ..retrieval.index import Array

PATIENCE = timedelta(minutes=30)
LINGER = timedelta(seconds=5)
"""How long the first process stays, with the store that it may keep, for the others to read who is missing."""
_LOST = "search-r3/lost"
_MISSING = re.compile(r"Ranks? ([\d, ]+) failed to pass")


class Exchange(Protocol):
    """One process's view of all of them."""

    rank: int
    world_size: int

    def meet(self, patience: timedelta | None = None) -> None:
        """Wait until every process is here, for `patience` or as long as is usual."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in rank order."""
        ...

    def gather_rows(self, rows: Array, counts: Sequence[int]) -> list[Array]:
        """Every process's matrix, in rank order; `counts[r]` is the number of rows of rank `r`."""
        ...


class Alone:
    """A single process."""

    rank, world_size = 0, 1

    def meet(self, patience: timedelta | None = None) -> None:
        """There is nobody to wait for."""

    def gather(self, value: Any) -> list[Any]:
        """The value."""
        return [value]

    def gather_rows(self, rows: Array, counts: Sequence[int]) -> list[Array]:
        """The matrix."""
        return [rows]


class Together:
    """The processes of the default process group, over gloo.

    Args:
        patience: how long to wait for a process that is still at work.

    Raises:
        RunError: (by every method) a process did not come; it is named where gloo can tell.
    """

    def __init__(self, patience: timedelta = PATIENCE) -> None:
        self.rank, self.world_size, self.patience = dist.get_rank(), dist.get_world_size(), patience
        self._group = dist.new_group(backend="gloo", timeout=patience)

    def meet(self, patience: timedelta | None = None) -> None:
        """Wait for the others, on the CPU and outside every collective."""
        try:
            dist.monitored_barrier(self._group, timeout=patience or self.patience, wait_all_ranks=True)
        except RuntimeError as error:
            raise self._lost(error) from error

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in rank order."""
        self.meet()
        values: list[Any] = [None] * self.world_size
        try:
            dist.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            raise self._lost(error) from error
        return values

    def gather_rows(self, rows: Array, counts: Sequence[int]) -> list[Array]:
        """Every process's matrix, in rank order; padded to the largest share on the way."""
        self.meet()
        own = torch.zeros((max(counts), rows.shape[1]))
        own[: len(rows)] = torch.from_numpy(np.ascontiguousarray(rows))
        everyone = [torch.empty_like(own) for _ in counts]
        try:
            dist.all_gather(everyone, own, group=self._group)
        except RuntimeError as error:
            raise self._lost(error) from error
        return [share[:count].numpy() for share, count in zip(everyone, counts, strict=True)]

    def _lost(self, error: RuntimeError) -> RunError:
        """The error that names who is missing: the first process finds out, and tells the others through the store."""
        said, named = " ".join(str(error).split()), "0"
        store = dist.distributed_c10d._get_default_store()
        with contextlib.suppress(RuntimeError):  # nobody answers where the first process itself has died
            if self.rank == 0:
                found = _MISSING.search(said)
                store.set(_LOST, found[1].strip() if found else "unknown")
                time.sleep(LINGER.total_seconds())
            else:
                store.wait([_LOST], LINGER)
            named = store.get(_LOST).decode()
        return RunError(
            f"rank {self.rank} of {self.world_size} lost another process: rank {named} did not come ({said}); look at "
            "that process's own error, then start again with --resume"
        )


def make_exchange() -> Exchange:
    """`Together` where a process group of more than one process is up, else `Alone`."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return Together()
    return Alone()


def divide(lengths: Sequence[int], world_size: int) -> list[list[int]]:
    """Deal items to ranks so that the ranks' sums of `lengths` are nearly equal: longest first, to and fro.

    Returns:
        For every rank the places of its items.
    """
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for turn, place in enumerate(order):
        round_, seat = divmod(turn, world_size)
        shares[seat if round_ % 2 == 0 else world_size - 1 - seat].append(place)
    return shares
