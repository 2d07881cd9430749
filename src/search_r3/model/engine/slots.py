"""The fast engine: keys and values by slots, and what sequences begin with together computed once.

Shapes: `B` sequences, `T` tokens, `L` layers, `h` key-value heads, `d` head size, `D` hidden size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backbone import Backbone
from .attention import Prefix, SlotAttention, SlotCache
from .forward import compute_prefix, last_hidden, length_batches, prefill
from .graphs import StepGraphs, can_capture
from .latent import with_soft

# Tokens of prompts that are computed together; it bounds memory and does not change results.
PREFILL_TOKENS = 4096


@dataclass(frozen=True)
class _Prompt:
    """A computed prompt: keys and values after its prefix, and the final norm's output at its end."""

    prefix: Prefix | None
    values: Tensor  # L x 2 x h x T x d
    hidden: Tensor  # D


class SlotEngine:
    """See `Engine`. Row i holds slot i; when rows leave, the last ones move into their slots.

    Args:
        backbone: its layers are attention with keys and values of one shape, with windows or without.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.model = backbone, backbone.causal_lm
        self.beginning: tuple[int, ...] = ()
        self._lengths: list[int] = []  # tokens in each slot
        self._places: Tensor | None = None  # the same on the device, until rows come or go
        self._cache: SlotCache | None = None
        self._graphs: StepGraphs | None = None
        self._prefixes: dict[tuple[int, ...], Prefix] = {}
        self._prompts: dict[tuple[int, ...], _Prompt] = {}

    def share(self, ids: Sequence[int]) -> None:
        """See `Engine`."""
        self.beginning = tuple(ids)
        self._prefixes[self.beginning] = self._prefix(self.beginning)

    def encode(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """See `Engine`."""
        start = len(self.beginning)
        hidden, _ = prefill(self.model, [ids[start:] for ids in sequences], self._prefixes.get(self.beginning))
        return hidden

    def prompt_states(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """See `Engine`. Prompts of like length are computed together."""
        by_prefix: dict[Prefix | None, list[tuple[int, ...]]] = {}
        unknown = sorted(set(prompts) - self._prompts.keys())
        for ids in unknown:
            by_prefix.setdefault(self._prefix_of(ids, len(unknown)), []).append(ids)
        for prefix, group in by_prefix.items():
            rest = [ids[len(prefix.ids) if prefix is not None else 0 :] for ids in group]
            for batch in length_batches(rest, PREFILL_TOKENS):
                hidden, cache = prefill(self.model, [rest[i] for i in batch], prefix, keep=True)
                assert cache is not None
                for row, place in enumerate(batch):
                    values = cache[:, :, row, :, : len(rest[place])]
                    self._prompts[group[place]] = _Prompt(prefix, values, hidden[row])
        return torch.stack([self._prompts[ids].hidden for ids in prompts])

    def _prefix_of(self, ids: tuple[int, ...], company: int) -> Prefix | None:
        """The template before the text, computed when another prompt can use it, of this call or of a later one."""
        template = self.backbone.prompt_encoder.prefix_of(ids)
        if template and template not in self._prefixes and (company > 1 or self.backbone.prefixes.keeps):
            self._prefixes[template] = self._prefix(template)
        return self._prefixes.get(template) if len(template) < len(ids) else None

    def _prefix(self, ids: tuple[int, ...]) -> Prefix:
        return self.backbone.prefixes.get(self.model, ids, lambda: compute_prefix(self.model, ids))

    def admit(self, prompts: Sequence[tuple[int, ...]], most: int | None = None, longest: int | None = None) -> None:
        """See `Engine`."""
        if self._cache is None:
            self._cache = SlotCache(self._prompts[prompts[0]].values)
        slots: dict[tuple[int, ...], list[int]] = {}
        for slot, ids in enumerate(prompts, start=len(self._lengths)):
            slots.setdefault(ids, []).append(slot)
        needed = len(self._lengths) + len(prompts)
        if longest is not None:
            self._cache.reserve(max(needed, most or 0), longest, most)
        self._cache.reserve(needed, max(map(len, slots)) + 1, most)
        self._lengths += map(len, prompts)
        self._places = None
        if self._graphs is not None and not self._graphs.fit():
            self._graphs = None
        for ids, places in slots.items():
            prompt, start = self._prompts[ids], 0
            if prompt.prefix is not None:
                start = len(prompt.prefix.ids)
                self._cache.write(places, 0, prompt.prefix.values)
            self._cache.write(places, start, prompt.values)

    def forget(self, keep: Collection[tuple[int, ...]]) -> None:
        """See `Engine`."""
        self._prompts = {ids: prompt for ids, prompt in self._prompts.items() if ids in keep}

    def advance(self, tokens: Tensor, soft: Mapping[int, Tensor] | None = None) -> Tensor:
        """See `Engine`."""
        assert self._cache is not None
        if self._cache.reserve(len(tokens), max(self._lengths) + 1):
            self._graphs = None
        if self._places is None:
            self._places = torch.tensor(self._lengths, device=self.backbone.device)
        tokens = tokens.to(self.backbone.device)
        hidden = self._step(tokens, self._places, max(self._lengths) + 1, soft)
        self._lengths, self._places = [length + 1 for length in self._lengths], self._places + 1
        return hidden

    def _step(self, tokens: Tensor, places: Tensor, keys: int, soft: Mapping[int, Tensor] | None) -> Tensor:
        assert self._cache is not None
        if self.backbone.graphs and not soft:
            if self._graphs is None and can_capture(self.model):
                self._graphs = StepGraphs(self.model, self._cache)
            if self._graphs is not None:
                return self._graphs.advance(tokens, places, keys)
        attention = SlotAttention(self._cache, places, keys, self._lengths)
        ids = tokens[:, None]
        inputs = with_soft(self.backbone, ids, soft) if soft else None
        return last_hidden(self.model, ids, places[:, None], torch.zeros_like(places), attention, inputs)

    def remove(self, rows: Collection[int], broken: Collection[int] = ()) -> list[int]:
        """See `Engine`."""
        assert self._cache is not None
        for row in broken:
            # Who takes the slot masks what is left in it, and a masked NaN would still spoil a sum.
            self._cache.clear(row)
        order = list(range(len(self._lengths)))
        for row in sorted(rows, reverse=True):
            last = len(order) - 1
            if row != last:
                self._cache.move(last, row)
                order[row] = order[last]
            order.pop()
        self._lengths, self._places = [self._lengths[row] for row in order], None
        return order
