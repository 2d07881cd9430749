"""What prompts begin with, kept from call to call for as long as the weights stay as they are."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch

from .attention import Prefix

MOST = 4
"""Beginnings that are kept: a model has three templates before texts, and a check at its loading makes one more."""


class KeptPrefixes:
    """Keys and values of beginnings, for one model; any number of threads may ask.

    They hold for the weights with which they were computed: torch counts what is written into a tensor, and who gives a
    parameter other numbers in another way moves them. Only writing into `.data` leaves no trace; who does that calls
    `stop` first, as training does.
    """

    def __init__(self, keeps: bool = True) -> None:
        self._lock = threading.Lock()
        self._state: object = None
        self._kept: dict[tuple[int, ...], Prefix] = {}
        self.keeps = keeps

    def __reduce__(self) -> Any:
        """A copy of a model, or a pickled one, keeps its own."""
        return KeptPrefixes, (self.keeps,)

    def stop(self) -> None:
        """Forget all, and keep nothing from now on."""
        self.keeps = False
        with self._lock:
            self._kept = {}

    def get(self, model: Any, ids: tuple[int, ...], compute: Callable[[], Prefix]) -> Prefix:
        """The keys and values of these tokens in the model as it is now."""
        if not self.keeps:
            return compute()
        state = _state(model)
        with self._lock:
            if state != self._state:
                self._state, self._kept = state, {}
            prefix = self._kept.get(ids)
        if prefix is None:
            prefix = compute()
            with self._lock:
                if state == self._state and self.keeps:
                    self._kept[ids] = prefix
                    while len(self._kept) > MOST:
                        self._kept.pop(next(iter(self._kept)))
        return prefix


def _state(model: Any) -> object:
    """What tells apart two states of a model's weights, its adapters and autocast; without copying any number."""
    tensors = [*chain(model.parameters(), model.buffers())]
    if any(one.is_inference() for one in tensors):
        return object()  # they are not counted: no state is ever the same
    adapters = [
        (
            *(tuple(module.active_adapters), tuple(module.merged_adapters), module.disable_adapters),
            dict(getattr(module, "scaling", {})),
        )
        for module in model.modules()
        if hasattr(module, "merged_adapters")
    ]
    kinds = filter(torch.amp.is_autocast_available, sorted({one.device.type for one in tensors}))
    precision = [torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)]
    return [(one.data_ptr(), one.dtype, one._version) for one in tensors], adapters, precision
