"""Where queries meet keys: attention over sequences that are computed whole, and over slots of sequences in work.

Shapes: `B` sequences, `T` tokens, `P` tokens of a common beginning, `L` layers, `H` heads, `h` key-value heads, `d`
head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from ...errors import ModelError

OURS = "search_r3"


class Attention(Protocol):
    """Where queries meet keys: `B x H x T x d` and twice `B x h x T x d` in, `B x H x T x d` out."""

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """Attend in one layer; `query` holds the last positions alone where the caller wants no others.

        With a window a query sees that many keys at most, its own the last of them.
        """
        ...


@dataclass(frozen=True, eq=False)
class Prefix:
    """Tokens that several sequences begin with, and their keys and values, `L x 2 x h x P x d`."""

    ids: tuple[int, ...]
    values: Tensor


class CausalAttention:
    """Attention within right-padded sequences that may share a beginning.

    A padded position is the key of no real one, since it comes later; so no mask is needed up to the length of a
    window, and the fast kernels are taken.

    Args:
        lengths: `B`, tokens of each sequence without the shared beginning.
        prefix: the shared beginning.
        keep: whether the keys and values of all layers are collected.
    """

    def __init__(self, lengths: Tensor, prefix: Prefix | None = None, keep: bool = False) -> None:
        self.lengths, self.prefix, self.keep = lengths, prefix, keep
        self._kept: dict[int, Tensor] = {}  # by layer, 2 x B x h x T x d
        self._bands: dict[int, Tensor] = {}  # by window, T x (P + T)
        self.shared = len(prefix.ids) if prefix is not None else 0

    def values(self) -> Tensor:
        """The keys and values that were collected, `L x 2 x B x h x T x d`."""
        return torch.stack([self._kept[layer] for layer in range(len(self._kept))])

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """See `Attention`."""
        if self.keep:
            self._kept[layer] = torch.stack([key, value])
        if self.prefix is not None:
            before = self.prefix.values[layer].unsqueeze(1).expand(-1, len(key), -1, -1, -1)
            key, value = torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)
        if query.shape[2] + self.shared < key.shape[2]:
            return _one_query(query, key, value, _seen(self.lengths + self.shared - 1, key.shape[2], window), scale)
        banded = window is not None and window < key.shape[2]
        if not banded:
            # The causal kernels want as many queries as keys; those of the beginning are made up and thrown away.
            query = F.pad(query, (0, 0, self.shared, 0))
        grouped = query.shape[1] != key.shape[1]
        if grouped and query.is_cuda and query.dtype == torch.float32:
            # CUDA's fast kernels take no grouped heads in float32; the slow one is slower than this (docs/results.md).
            key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for part in (key, value))
            grouped = False
        mask = self._band(window, key) if banded and window is not None else None
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=not banded, scale=scale, enable_gqa=grouped
        )
        return attended if banded else attended[:, :, self.shared :]

    def _band(self, window: int, key: Tensor) -> Tensor:
        if window not in self._bands:
            places = torch.arange(self.shared, key.shape[2], device=key.device)
            self._bands[window] = _seen(places, key.shape[2], window)
        return self._bands[window]


def _seen(places: Tensor, keys: int, window: int | None) -> Tensor:
    """Which of so many keys the queries at these places see, `len(places) x keys`."""
    columns = torch.arange(keys, device=places.device)
    seen = columns <= places[:, None]
    if window is not None and window < keys:
        seen &= columns > places[:, None] - window
    return seen


def _one_query(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """One position per sequence: `B x H x 1 x d`. Heads that share keys stand in the place of positions."""
    batch, heads, _, size = query.shape
    grouped = query.view(batch, key.shape[1], heads // key.shape[1], size)
    mask = None if visible is None else visible[:, None, None].expand(-1, -1, grouped.shape[2], -1)
    attended = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
    return attended.reshape(batch, heads, 1, size)


class SlotCache:
    """Keys and values of sequences that are being decoded; each has a slot, and slots are reused.

    Args:
        example: keys and values of some sequence, `L x 2 x h x T x d`.
    """

    def __init__(self, example: Tensor) -> None:
        layers, _, heads, _, size = example.shape
        self.values = example.new_zeros((layers, 2, 0, heads, 0, size))

    def reserve(self, slots: int, tokens: int, most: int | None = None) -> bool:
        """Make room for that many sequences of that many tokens; there will never be more than `most` sequences.

        Returns:
            Whether all has moved.
        """
        more, longer = (
            # Every growth is a copy, so the room grows by a half at least.
            max(needed - room, room // 2) if needed > room else 0
            for needed, room in ((slots, self.values.shape[2]), (tokens, self.values.shape[4]))
        )
        if more and most is not None:
            more = min(more, max(slots, most) - self.values.shape[2])
        if more or longer:  # filled with zeros, since a masked NaN would still spoil a sum
            self.values = F.pad(self.values, (0, 0, 0, longer, 0, 0, 0, more))
        return bool(more or longer)

    def write(self, slots: Sequence[int], start: int, values: Tensor) -> None:
        """Store `L x 2 x h x T x d` from position `start` on in each of the slots."""
        places = torch.tensor(slots, device=values.device)
        self.values[:, :, places, :, start : start + values.shape[3]] = values.unsqueeze(2)

    def move(self, source: int, target: int) -> None:
        """Let `target` hold what `source` holds."""
        self.values[:, :, target] = self.values[:, :, source]

    def clear(self, slot: int) -> None:
        """Forget what a slot holds; needed only where that is not finite."""
        self.values[:, :, slot] = 0


class SlotAttention:
    """Attention of one new token per slot, for the first `B` slots of a cache.

    Args:
        cache: it receives the new keys and values.
        lengths: `B`, tokens already in each slot, on the cache's device.
        keys: how many of the cache are read; more than any length.
        known: the lengths, where more than the device may know them; then what they spare is spared.
    """

    def __init__(self, cache: SlotCache, lengths: Tensor, keys: int, known: Sequence[int] | None = None) -> None:
        self.cache, self.keys, self.lengths = cache, keys, lengths
        self.rows = torch.arange(len(lengths), device=lengths.device)
        self.alone = known[0] if known is not None and len(known) == 1 else None
        ragged = known is None or min(known) + 1 < keys
        self._visible: dict[int | None, Tensor | None] = {None: _seen(lengths, keys, None) if ragged else None}

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """See `Attention`; `T` is 1."""
        keys, values = self.cache.values[layer, :, : len(query)]
        if self.alone is None:
            keys[self.rows, :, self.lengths] = key[:, :, 0]
            values[self.rows, :, self.lengths] = value[:, :, 0]
        else:  # the same by a plain copy, which costs a fifth
            keys[0, :, self.alone], values[0, :, self.alone] = key[0, :, 0], value[0, :, 0]
        if window is not None and window >= self.keys:
            window = None
        if window not in self._visible:
            self._visible[window] = _seen(self.lengths, self.keys, window)
        return _one_query(query, keys[:, :, : self.keys], values[:, :, : self.keys], self._visible[window], scale)


# The attention of the forward pass that runs in this thread; none in a forward pass of anybody else, as training's.
_CURRENT: ContextVar[Attention | None] = ContextVar("attention", default=None)


@contextmanager
def attending(attention: Attention) -> Iterator[None]:
    """Let the forward passes of models whose attention is `OURS` attend so."""
    token = _CURRENT.set(attention)
    try:
        yield
    finally:
        _CURRENT.reset(token)


@cache
def register() -> None:
    """Make `OURS` known to transformers: it is `sdpa` except within `attending`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(OURS, _attend)
    AttentionMaskInterface.register(OURS, _mask)


def _mask(**options: Any) -> Tensor | None:
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(**options) if _CURRENT.get() is None else None


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    attention = _CURRENT.get()
    if attention is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return result
    odd = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if attention_mask is not None:
        odd.append("a mask of its own")
    if odd:
        raise ModelError(f"the attention of {type(module).__name__} uses {odd[0]}, which our own does not know")
    scale, window = options["scaling"], options.get("sliding_window")
    return attention(module.layer_idx, query, key, value, scale, window).transpose(1, 2), None


class WindowRecorder:
    """An attention for one token, which sees itself alone: it notes the window that each layer asks for."""

    def __init__(self) -> None:
        self.windows: dict[int, int | None] = {}

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """See `Attention`; `T` is 1."""
        self.windows[layer] = window
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
