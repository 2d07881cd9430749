"""Processes of one training, played by threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from search_r3.parallel import Communicator

T = TypeVar("T")


class Threads(Communicator):
    """What one of them sees of the others."""

    def __init__(self, rank: int, world_size: int, slots: list[Any], meeting: threading.Barrier) -> None:
        self.rank, self.world_size, self.slots, self.meeting = rank, world_size, slots, meeting

    def barrier(self, patience: Any = None) -> None:
        self.meeting.wait(20)

    def all_gather(self, value: Any) -> list[Any]:
        self.slots[self.rank] = value
        self.meeting.wait(20)
        values = list(self.slots)
        self.meeting.wait(20)
        return values

    all_gather_rows = all_gather


def together(world_size: int, work: Callable[[Communicator], T]) -> list[T]:
    """What every process returns."""
    slots, meeting = [None] * world_size, threading.Barrier(world_size)
    results: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        try:
            results[rank] = work(Threads(rank, world_size, slots, meeting))
        except BaseException as error:
            results[rank] = error
            meeting.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, threading.BrokenBarrierError):
            raise result
    return results
