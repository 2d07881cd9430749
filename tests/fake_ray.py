"""The functions of Ray that are used, in this process, so that what is asked of Ray can be tested without it.

It is strict where Ray is: everything that an actor gets is pickled, a pool of actors has a fixed size and books CPUs,
and a cluster that was joined takes no sizes. An actor that dies (`Died`) is started anew, and gets its batch again.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import numpy as np

LOCAL_ONLY = {"num_cpus", "object_store_memory", "include_dashboard"}


class RayError(Exception):
    """As `ray.exceptions.RayError`."""


class Died(BaseException):
    """Kills the actor in which it is raised."""


@dataclass
class _Pool:
    size: int


class FakeRay:
    """Stands for the module `ray`.

    Args:
        cluster: the CPUs and GPUs of a cluster that can be joined; without it there is none.
    """

    def __init__(self, cluster: dict[str, float] | None = None) -> None:
        self.cluster, self.resources = cluster, dict[str, float]()
        self.starts = 0
        self.exceptions = SimpleNamespace(RayError=RayError)
        self.data = SimpleNamespace(
            from_items=self._from_items,
            ActorPoolStrategy=lambda *, size: _Pool(size),
            DataContext=SimpleNamespace(get_current=lambda: SimpleNamespace(enable_progress_bars=True)),
        )

    def is_initialized(self) -> bool:
        return bool(self.resources)

    def init(self, *, address: str, log_to_driver: bool, logging_level: int, **options: Any) -> None:
        if address == "local":
            assert options.keys() <= LOCAL_ONLY
            self.resources = {"CPU": float(options["num_cpus"])}
            return
        if options:
            raise ValueError(f"an existing cluster takes no {sorted(options)}")
        if self.cluster is None:
            raise ConnectionError(f"could not find any running Ray instance at {address}")
        self.resources = dict(self.cluster)

    def shutdown(self) -> None:
        assert self.resources
        self.resources = {}

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True}, {"Alive": False}]

    def _from_items(self, items: list[dict[str, Any]], *, override_num_blocks: int) -> Any:
        assert override_num_blocks == len(items)
        return SimpleNamespace(map_batches=lambda kind, **how: _Rows(self, items, kind, **how))


class _Rows:
    def __init__(
        self,
        ray: FakeRay,
        items: list[dict[str, Any]],
        kind: type,
        *,
        batch_size: int,
        batch_format: str,
        compute: _Pool,
        fn_constructor_kwargs: dict[str, Any],
        num_cpus: float,
        num_gpus: float = 0,
    ) -> None:
        assert (batch_size, batch_format) == (1, "numpy")
        assert num_cpus * compute.size <= ray.resources["CPU"] - 1, "deadlock: no CPU is left for Ray's own tasks"
        assert num_gpus * compute.size <= ray.resources.get("GPU", 0)
        self._ray, self._items, self._kind = ray, items, kind
        self._arguments = pickle.dumps(fn_constructor_kwargs)
        self._actors = [self._start() for _ in range(compute.size)]

    def _start(self) -> Any:
        self._ray.starts += 1
        return self._kind(**pickle.loads(self._arguments))

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        turns = list(zip(self._items, cycle(range(len(self._actors))), strict=False))
        for item, turn in reversed(turns):  # in no order that anybody promised
            batch = {name: np.array([value]) for name, value in item.items()}
            while True:
                try:
                    columns = self._actors[turn](batch)
                    break
                except Died:
                    self._actors[turn] = self._start()
                except Exception as error:
                    raise RayError(f"The task failed.\n{error}") from None
            yield from (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
