"""What several training processes tell each other about the corpus: queries, what each found, what to encode.

Matrices travel as their bytes over a gloo group of their own, and nothing that grows with the corpus travels at every
step (`retrieval.sharded`). Before each exchange, and
after the last one of a step, the processes meet at a barrier that waits long and names who is missing, so that no
collective of the gradients (whose watchdog is short) ever waits for another process's work on the index. It is made of
messages to and from the first process: torch's `monitored_barrier` leaves those who came waiting for those who did not,
and cannot name a process whose connection was lost before.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .errors import RunError
from .types import Array

T = TypeVar("T")
Number = TypeVar("Number", bound=np.generic)
PATIENCE = timedelta(minutes=30)
NAMING = timedelta(seconds=60)
"""How long the processes wait for each other, after the error of a collective, to find out which of them has died."""
LINGER = timedelta(seconds=5)
"""How long the first process stays, with the store that it may keep, for the others to read who is missing."""
_LOST = "search-r3/lost"


class Communicator:
    """One process's view of all of them; this one is alone."""

    rank, world_size = 0, 1

    def barrier(self, patience: timedelta | None = None) -> None:
        """Wait until every process is here, for `patience` or as long as is usual."""

    def all_gather(self, value: Any) -> list[Any]:
        """Every process's value, in rank order."""
        return [value]

    def all_gather_rows(self, rows: NDArray[Number]) -> list[NDArray[Number]]:
        """Every process's matrix, in rank order: of one dtype, and each of as many rows and columns as it has."""
        return [rows]


class ProcessGroup(Communicator):
    """The processes of the default process group, over gloo.

    Args:
        patience: how long to wait for a process that is still at work.

    Raises:
        RunError: (by every method) a process did not come; it is named where gloo can tell.
    """

    def __init__(self, patience: timedelta = PATIENCE) -> None:
        import torch.distributed as dist

        self.rank, self.world_size, self.patience = dist.get_rank(), dist.get_world_size(), patience
        self._group = dist.new_group(backend="gloo", timeout=patience)

    def barrier(self, patience: timedelta | None = None) -> None:
        """Wait for the others, on the CPU and outside every collective."""
        if self.rank == 0:
            missing = self._call_roll(patience or self.patience)
        else:
            missing = self._answer(patience or self.patience)
        if missing:
            raise RunError(
                f"rank {self.rank} of {self.world_size} lost another process: rank {missing} did not come; look at "
                "that process's own error, then start again with --resume"
            )

    def all_gather(self, value: Any) -> list[Any]:
        """Every process's value, in rank order."""
        import torch.distributed as dist

        self.barrier()
        values: list[Any] = [None] * self.world_size
        with self._naming():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def all_gather_rows(self, rows: NDArray[Number]) -> list[NDArray[Number]]:
        """Every process's matrix, in rank order; their bytes, padded to the largest matrix on the way."""
        import torch
        import torch.distributed as dist

        self.barrier()
        shapes = [torch.empty(2, dtype=torch.long) for _ in range(self.world_size)]
        with self._naming():
            dist.all_gather(shapes, torch.tensor(rows.shape), group=self._group)
        sizes = [int(shape.prod()) * rows.itemsize for shape in shapes]
        own = torch.zeros(max(sizes), dtype=torch.uint8)
        own.numpy()[: rows.nbytes] = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
        everyone = [torch.empty_like(own) for _ in sizes]
        if len(own):
            with self._naming():
                dist.all_gather(everyone, own, group=self._group)
        return [
            share.numpy()[:size].view(rows.dtype).reshape(shape.tolist())
            for share, size, shape in zip(everyone, sizes, shapes, strict=True)
        ]

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """Around a collective: the process that broke it is named, if it is gone."""
        try:
            yield
        except RuntimeError:
            self.barrier(NAMING)
            raise

    def _call_roll(self, patience: timedelta) -> str:
        """The first process hears every other one, then tells all whether to go on; returns the ranks that are lost."""
        import torch
        import torch.distributed as dist

        deadline = time.monotonic() + patience.total_seconds()
        receipts: dict[int, Any] = {}
        missing = []
        tokens = torch.zeros(self.world_size, 1)
        for rank in range(1, self.world_size):
            with contextlib.suppress(RuntimeError):  # its connection is closed
                receipts[rank] = dist.irecv(tokens[rank], group_src=rank, group=self._group)
        for rank in range(1, self.world_size):
            try:
                receipts[rank].wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
            except (KeyError, RuntimeError):
                missing.append(rank)
        ranks = ", ".join(map(str, missing))
        if ranks:
            dist.distributed_c10d._get_default_store().set(_LOST, ranks)
        for rank in set(range(1, self.world_size)) - set(missing):
            with contextlib.suppress(RuntimeError):  # died since, or gloo has closed all connections as one was late
                dist.send(torch.tensor([float(bool(missing))]), group_dst=rank, group=self._group)
        if ranks:
            time.sleep(LINGER.total_seconds())
        return ranks

    def _answer(self, patience: timedelta) -> str:
        """Every other process reports to the first one; returns the ranks that are lost."""
        import torch
        import torch.distributed as dist

        with contextlib.suppress(RuntimeError):
            dist.send(torch.ones(1), group_dst=0, group=self._group)
            answer = torch.ones(1)
            waiting: Any = dist.irecv(answer, group_src=0, group=self._group)
            waiting.wait(patience + NAMING)
            if not answer.item():
                return ""
        with contextlib.suppress(RuntimeError):  # nobody answers where the first process has died with the store
            store = dist.distributed_c10d._get_default_store()
            store.wait([_LOST], LINGER)
            return str(store.get(_LOST).decode())
        return "0"


def first_process() -> bool:
    """Whether this process writes and speaks for all: of several that train together only the first one does."""
    return os.environ.get("RANK", "0") == "0"


def make_communicator() -> Communicator:
    """`ProcessGroup` where a process group of more than one process is up."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return ProcessGroup()
    return Communicator()


def is_of_a_collective(error: RuntimeError) -> bool:
    """Whether processes could not reach each other, rather than this one having failed by itself."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error)


def name_the_missing(communicator: Communicator) -> None:
    """After an error of a collective: meet, so that whoever does not come is named.

    Raises:
        RunError: a process did not come.
    """
    if communicator.world_size > 1:
        communicator.barrier(NAMING)


def agree(communicator: Communicator, target: Path, work: Callable[[], T], verb: str = "write") -> T:
    """Do one part of writing (or what `verb` says) `target` in every process; where one fails, all raise.

    Raises:
        RunError: the part failed somewhere; the first one of those that processes raised themselves, as it is.
    """
    fault, cause = "", None
    try:
        result = work()
    except RunError as error:
        fault, cause = str(error), error.__cause__
    except Exception as error:  # of whatever library wrote the file: a full disk has many names
        fault = (
            f"cannot {verb} {target} (rank {communicator.rank}: {type(error).__name__}: "
            f"{' '.join(str(error).split())}); what was saved before is intact: mend that (of a full disk: make room), "
            "then go on with --resume"
        )
        cause = error
    faults = list(filter(None, communicator.all_gather(fault)))
    if faults:
        raise RunError(faults[0]) from cause
    return result


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


def encode_sharded(
    communicator: Communicator, shares: Sequence[Sequence[int]], encode: Callable[[Sequence[int]], Array]
) -> Array:
    """Vectors `N x D` of `N` things, of which each process encodes its share.

    Args:
        communicator: the other processes.
        shares: for every rank the places of its things, each place once.
        encode: the vectors of the things at some places, `n x D`; it is not asked for none.
    """
    own = shares[communicator.rank]
    parts = communicator.all_gather_rows(encode(own) if own else np.empty((0, 0), np.float32))
    result = np.empty((sum(map(len, shares)), max(part.shape[1] for part in parts)), np.float32)
    for share, rows in zip(shares, parts, strict=True):
        if len(share):
            result[list(share)] = rows
    return result


def gather_queries(communicator: Communicator, vectors: Array, labels: Sequence[T]) -> tuple[Array, list[T], slice]:
    """The queries of all processes together, which all of them search then.

    Args:
        communicator: the other processes.
        vectors: of this process's queries, `Q x D`; there may be none.
        labels: what names each of them; small.

    Returns:
        All vectors and labels, in rank order, and which of them are this process's.
    """
    parts = communicator.all_gather_rows(vectors)
    shares = communicator.all_gather(list(labels))
    start = sum(map(len, shares[: communicator.rank]))
    given = [part for part in parts if len(part)]
    whole = np.concatenate(given) if given else vectors
    return whole, [label for share in shares for label in share], slice(start, start + len(labels))
