"""What several training processes tell each other about the corpus: queries, what each found, what to encode.

Matrices travel as their bytes over a gloo group of their own, and nothing that grows with the corpus travels at every
step (`retrieval.sharded`). Before each exchange, and
after the last one of a step, the processes meet at a barrier that waits long and names who is missing, so that no
collective of the gradients (whose watchdog is short) ever waits for another process's work on the index. It is made of
messages to and from the first process: torch's `monitored_barrier` leaves those who came waiting for those who did not,
and cannot name a process whose connection was lost before.

A process that ends by an error of its own says so in the store that all share, and closes its connections: the others
end at their next barrier, with that error's words.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .errors import RunError, SearchR3Error
from .extras import extra
from .types import Array

T = TypeVar("T")
Number = TypeVar("Number", bound=np.generic)
PATIENCE = timedelta(minutes=30)
NAMING = timedelta(seconds=60)
"""How long the processes wait for each other, after the error of a collective, to find out which of them has died."""
LINGER = timedelta(seconds=5)
"""How long the first process stays at most, with the store that it may keep, for the others to read who is missing."""
_LOST, _OWN, _LEFT = "lost", "own-error-of-{}", "left-by-{}"
_groups = itertools.count()
_met: list[ProcessGroup] = []
"""Those that this process has met and not left: one or none."""


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
        c10d = dist.distributed_c10d
        self.default_store = c10d._get_default_store()
        """Each default group has one of its own."""
        self._store = c10d.PrefixStore(f"search-r3/{next(_groups)}", self.default_store)
        self._others = set(range(1, self.world_size)) if self.rank == 0 else set()
        """Whom the first process hears, and tells; those who are lost are taken out."""

    def barrier(self, patience: timedelta | None = None) -> None:
        """Wait for the others, on the CPU and outside every collective."""
        if self.rank == 0:
            lost = self._call_roll(patience or self.patience)
        else:
            lost = self._answer(patience or self.patience)
        if lost:
            raise RunError(
                f"rank {self.rank} of {self.world_size} lost another process: {lost}, then start again with --resume"
            )

    def leave(self, reason: str) -> None:
        """End this process's part by an error of its own: the others' next barrier says the reason."""
        with contextlib.suppress(RuntimeError):  # the first process is gone, with the store
            self._store.set(_OWN.format(self.rank), " ".join(reason.split()))
            self._store.set(_LEFT.format(self.rank), "")
            if self.rank == 0 and not self._store.check([_LOST]):
                self._store.set(_LOST, self._what_became_of([0]))
        self.close()

    def close(self) -> None:
        """End this process's part of the group, and of no other."""
        import torch.distributed as dist

        dist.destroy_process_group(self._group)
        self._group = None  # its connections close with the last reference

    def linger(self) -> None:
        """The first process stays, as the store may be its own, until the others have read what became of it."""
        deadline = time.monotonic() + LINGER.total_seconds()
        keys = [_LEFT.format(rank) for rank in self._others]
        while keys and time.monotonic() < deadline and not self._store.check(keys):
            time.sleep(0.05)

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
        """The first process hears every other one, then tells all whether to go on; returns what became of the lost."""
        import torch
        import torch.distributed as dist

        deadline = time.monotonic() + patience.total_seconds()
        receipts: dict[int, Any] = {}
        missing = []
        tokens = torch.zeros(self.world_size, 1)
        for rank in self._others:
            with contextlib.suppress(RuntimeError):  # its connection is closed
                receipts[rank] = dist.irecv(tokens[rank], group_src=rank, group=self._group)
        for rank in self._others:
            try:
                receipts[rank].wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
            except (KeyError, RuntimeError):
                missing.append(rank)
        lost = self._what_became_of(missing) if missing else ""
        if lost:
            self._store.set(_LOST, lost)
        self._others.difference_update(missing)
        for rank in self._others:
            with contextlib.suppress(RuntimeError):  # died since, or gloo has closed all connections as one was late
                dist.send(torch.tensor([float(bool(missing))]), group_dst=rank, group=self._group)
        if lost:
            self.linger()
        return lost

    def _what_became_of(self, ranks: Sequence[int]) -> str:
        """Their own words where they had any: of one that was killed nobody knows more."""
        said = {rank: self._store.get(key).decode() for rank in ranks if self._store.check([key := _OWN.format(rank)])}
        silent = ", ".join(str(rank) for rank in ranks if rank not in said)
        parts = [f"rank {rank} ended by its own error: {reason}; mend that" for rank, reason in said.items()]
        return "; ".join(parts + [f"rank {silent} did not come; look at that process's own error"] * bool(silent))

    def _answer(self, patience: timedelta) -> str:
        """Every other process reports to the first one; returns what became of the lost."""
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
            self._store.wait([_LOST], LINGER)
            lost = str(self._store.get(_LOST).decode())
            self._store.set(_LEFT.format(self.rank), "")
            return lost
        return "rank 0 did not come; look at that process's own error"


def first_process() -> bool:
    """Whether this process writes and speaks for all: of several that train together only the first one does."""
    return os.environ.get("RANK", "0") == "0"


def make_communicator() -> Communicator:
    """`ProcessGroup` where this process is one of several; they meet here if they have not met before.

    Raises:
        RunError: they were to meet, and could not.
    """
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        return Communicator()
    count = os.environ.get("WORLD_SIZE", "1")
    if int(count) > 1 and not dist.is_initialized():
        with extra("train"):
            from accelerate import PartialState

        try:
            PartialState(cpu=not torch.cuda.is_available())
            if not dist.is_initialized():  # on a GPU accelerate takes one without LOCAL_RANK for the only one
                raise ValueError(f"accelerate began no group; LOCAL_RANK is {os.environ.get('LOCAL_RANK', 'not set')}")
        except (ValueError, dist.DistError) as error:
            raise RunError(
                f"WORLD_SIZE={count} says that this process is one of several, but they could not meet: {error}; start "
                "all of them with `accelerate launch`, or this one without WORLD_SIZE"
            ) from error
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Communicator()
    everyone = _everyone()
    if everyone is None:
        everyone = ProcessGroup()
        _met[:] = [everyone]
        atexit.unregister(_leave_at_exit)
        atexit.register(_leave_at_exit)
    return everyone


def _everyone() -> ProcessGroup | None:
    """Those that this process has met, unless their default group has ended since, or another one has begun."""
    import torch.distributed as dist

    here = bool(_met) and dist.is_initialized()
    return _met[0] if here and _met[0].default_store is dist.distributed_c10d._get_default_store() else None


def leave_the_others(error: BaseException | None = None) -> None:
    """Before this process ends, by an error of its own or as planned; gloo's threads may abort one that does not.

    With an error it waits for nobody for long. Those who are in a collective of the gradients learn of it when this
    process is gone: torch keeps their connections while it is there.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    group = _everyone()
    _met.clear()
    if error is None:
        distributed.destroy_process_group()
        return
    if group is not None:
        group.leave(str(error) if isinstance(error, SearchR3Error) else f"{type(error).__name__}: {error}")
    if "gloo" in distributed.get_backend():  # NCCL would wait for the others, and aborts nothing
        _for_a_while(distributed.destroy_process_group)
    if group is not None:
        group.linger()


def _leave_at_exit() -> None:
    """A program that trains from Python knows nothing of these groups; the others hear of an error that ended it."""
    import torch.distributed as dist

    if (group := _everyone()) is None:
        return
    if (error := getattr(sys, "last_value", None)) is not None:
        leave_the_others(error)
    else:
        _met.clear()
        _for_a_while(dist.destroy_process_group if "gloo" in dist.get_backend() else group.close)


def _for_a_while(work: Callable[[], None]) -> None:
    """Do what may wait for other processes, without waiting for it for long."""
    thread = threading.Thread(target=work, daemon=True)
    with contextlib.suppress(RuntimeError):  # some versions of Python begin none at exit
        thread.start()
        thread.join(LINGER.total_seconds())


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
