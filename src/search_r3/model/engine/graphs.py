"""Decoding steps as CUDA graphs: one launch in the place of a thousand, which is what a step of few rows is made of.

A graph repeats kernels on the memory that they were captured with. So tokens and lengths are written into buffers
before it runs, the numbers of rows and of keys are rounded up to one of few, and all is captured anew when the cache or
the weights have moved. On other devices the same step is computed as it stands.

Shapes: `B` rows, `D` hidden size.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .attention import SlotAttention, SlotCache
from .forward import is_drivable, last_hidden

logger = logging.getLogger(__name__)

KEYS = 128
"""Numbers of keys are rounded up to multiples of this."""
# As a share of the largest state; the kernels are the same, but some of them add in any order.
_TOLERANCE = 2e-2
_CAPTURING = threading.Lock()  # torch allows one capture at a time


def can_capture(model: Any) -> bool:
    """Whether steps of a model may be captured: its layers are driven by us, and its weights stay where they are."""
    kind = next(iter(model.parameters())).device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    moves = any(hasattr(one, "device_mesh") for one in model.parameters())
    copies = any(hasattr(one, "token_indices") for one in model.modules())  # peft's rows bring a list with every pass
    return is_drivable(model) and not (casts or moves or copies)


class StepGraphs:
    """Steps of one token for each row, over one cache.

    Args:
        model: the causal LM.
        cache: keys and values; rows are its first slots.
    """

    def __init__(self, model: Any, cache: SlotCache) -> None:
        self.model, self.cache = model, cache
        self._memory = self._addresses()
        self._tokens, self._places = (
            torch.zeros(cache.values.shape[2], dtype=torch.long, device=cache.values.device) for _ in range(2)
        )
        device = cache.values.device
        self._where = _Where(device) if device.type == "cuda" else None
        self._sizes: set[tuple[int, int]] = set()  # that were wanted
        self._replays: dict[tuple[int, int], Callable[[], Tensor]] = {}
        self._works = True

    def _addresses(self) -> list[int]:
        return [self.cache.values.data_ptr(), *(weight.data_ptr() for weight in self.model.parameters())]

    def fit(self) -> bool:
        """Whether cache and weights are where they were, and nothing else forbids graphs."""
        return can_capture(self.model) and self._memory == self._addresses()

    def advance(self, tokens: Tensor, places: Tensor, keys: int) -> Tensor:
        """The states `B x D` at the next tokens of the first `B` slots.

        Args:
            tokens: `B`.
            places: `B`, tokens already in each slot.
            keys: one more than the most of them.
        """
        rows = len(tokens)
        _, _, slots, _, room, _ = self.cache.values.shape
        size = min(1 << (rows - 1).bit_length(), slots), min(-(-keys // KEYS) * KEYS, room)
        self._tokens[:rows], self._places[:rows] = tokens, places
        self._places[rows : size[0]] = 0  # in slots that nobody has
        if size in self._replays:
            return self._replays[size]()[:rows].clone()
        hidden = self._compute(*size)[:rows]
        if size in self._sizes and self._works:  # not for what comes but once
            self._capture(size, hidden)
        self._sizes.add(size)
        return hidden

    def _compute(self, rows: int, keys: int) -> Tensor:
        """One step of so many rows that see so many keys at most, from the buffers."""
        tokens, places = self._tokens[:rows, None], self._places[:rows]
        attention = SlotAttention(self.cache, places, keys)
        return last_hidden(self.model, tokens, places[:, None], torch.zeros_like(places), attention)

    def _capture(self, size: tuple[int, int], expected: Tensor) -> None:
        """Capture steps of this size; those that fail, or do not give what was just computed, are done without."""
        try:
            replay = capture(partial(self._compute, *size), self._where)
            difference = (replay()[: len(expected)] - expected).nan_to_num().abs().max()
            bound = _TOLERANCE * expected.nan_to_num().abs().max()
            problem = "" if bool(difference <= bound) else f"its states are off by {float(difference):.1e}"
        except RuntimeError as error:
            problem = str(error).strip().partition("\n")[0]
        if problem:
            self._works = False
            self._replays.clear()
            logger.warning("decoding goes on without CUDA graphs, which is slower: %s", problem)
        else:
            self._replays[size] = replay


class _Where:
    """The stream and the memory of all captures of one `StepGraphs`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self.pool: Any = torch.cuda.graph_pool_handle()


def capture(step: Callable[[], Tensor], where: _Where | None) -> Callable[[], Tensor]:
    """What repeats a step on its memory and returns the tensor that holds its result; without a place the step itself.

    Raises:
        RuntimeError: it cannot be captured.
    """
    if where is None:
        return step
    with _CAPTURING, torch.cuda.device(where.device):
        graph = torch.cuda.CUDAGraph()
        # The outer block gives the stream back, which a capture that fails does not. Other threads may go on.
        with torch.cuda.stream(torch.cuda.current_stream(where.device)):
            with torch.cuda.graph(graph, pool=where.pool, stream=where.stream, capture_error_mode="thread_local"):
                output = step()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay
