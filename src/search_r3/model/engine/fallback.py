"""The engine for every architecture: the model's own forward pass around transformers' own cache.

States of convolutions and recurrences see padding, and caches of transformers have no slots. So sequences are decoded
together only where they are equally long, which nothing pads; slower than slots, and right.

Shapes: `B` sequences, `T` tokens, `D` hidden size.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..backbone import Backbone, pad
from .forward import length_batches
from .latent import with_soft
from .slots import PREFILL_TOKENS


@dataclass(eq=False)
class _Group:
    """Sequences of one length in one cache; `rows` are their numbers among the rows in work."""

    cache: Any
    rows: list[int]
    length: int = 0


@dataclass(frozen=True)
class _Prompt:
    """A computed prompt: its place in a cache, and the final norm's output at its end."""

    group: _Group
    place: int
    hidden: Tensor  # D


class FallbackEngine:
    """See `Engine`. Nothing is shared but the prompts of several requests.

    Args:
        backbone: a causal LM that transformers' `DynamicCache` serves.
    """

    beginning: tuple[int, ...] = ()

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.model = backbone, backbone.causal_lm.base_model
        names = inspect.signature(self.model.forward).parameters
        self._cache_name = "cache_params" if "cache_params" in names else "past_key_values"
        self._takes_positions = "position_ids" in names
        self._groups: list[_Group] = []
        self._count = 0
        self._prompts: dict[tuple[int, ...], _Prompt] = {}

    def share(self, ids: Sequence[int]) -> None:
        """See `Engine`; nothing to do."""

    @torch.no_grad()
    def encode(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """See `Engine`. Padding stands on the right, where no token of a model that looks back only sees it."""
        ids, mask = pad(sequences, self.backbone.tokenizer.pad_token_id, self.backbone.device)
        hidden = self.backbone.hidden_states(ids, None)
        return hidden[torch.arange(len(ids), device=ids.device), mask.sum(-1) - 1]

    def prompt_states(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """See `Engine`. Prompts of one length are computed together."""
        unknown = sorted(set(prompts) - self._prompts.keys(), key=len)
        for _, equals in groupby(unknown, key=len):
            group = list(equals)
            for batch in length_batches(group, PREFILL_TOKENS):
                computed = _Group(self._new_cache(), [])
                hidden = self._forward(computed, torch.tensor([group[i] for i in batch], device=self.backbone.device))
                for place, number in enumerate(batch):
                    self._prompts[group[number]] = _Prompt(computed, place, hidden[place])
        return torch.stack([self._prompts[ids].hidden for ids in prompts])

    def admit(self, prompts: Sequence[tuple[int, ...]], most: int | None = None, longest: int | None = None) -> None:
        """See `Engine`."""
        rows: dict[_Group, list[int]] = {}
        places: dict[_Group, list[int]] = {}
        for row, ids in enumerate(prompts, start=self._count):
            prompt = self._prompts[ids]
            rows.setdefault(prompt.group, []).append(row)
            places.setdefault(prompt.group, []).append(prompt.place)
        groups = [_Group(copy.deepcopy(one.cache), rows[one], one.length) for one in rows]
        for group, chosen in zip(groups, places.values(), strict=True):
            self._select(group, chosen)
        self._groups += groups
        self._count += len(prompts)

    def forget(self, keep: Collection[tuple[int, ...]]) -> None:
        """See `Engine`."""
        self._prompts = {ids: prompt for ids, prompt in self._prompts.items() if ids in keep}

    def advance(self, tokens: Tensor, soft: Mapping[int, Tensor] | None = None) -> Tensor:
        """See `Engine`. One forward pass for each length."""
        rows = [row for group in self._groups for row in group.rows]
        tokens = tokens.to(self.backbone.device)
        own = [
            {i: soft[row] for i, row in enumerate(group.rows) if row in soft} if soft else {} for group in self._groups
        ]
        hidden = torch.cat(
            [
                self._forward(group, tokens[group.rows, None], inputs)
                for group, inputs in zip(self._groups, own, strict=True)
            ]
        )
        return hidden[torch.tensor(rows, device=hidden.device).argsort()]

    def remove(self, rows: Collection[int], broken: Collection[int] = ()) -> list[int]:
        """See `Engine`; a broken row leaves nothing behind."""
        order = [row for row in range(self._count) if row not in rows]
        number = {row: place for place, row in enumerate(order)}
        for group in self._groups:
            stay = [place for place, row in enumerate(group.rows) if row in number]
            if 0 < len(stay) < len(group.rows):
                self._select(group, stay)
            group.rows = [number[group.rows[place]] for place in stay]
        self._groups = [group for group in self._groups if group.rows]
        self._count = len(order)
        return order

    def _select(self, group: _Group, places: Sequence[int]) -> None:
        group.cache.reorder_cache(torch.tensor(places, device=self.backbone.device))

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config.get_text_config())

    @torch.no_grad()
    def _forward(self, group: _Group, ids: Tensor, soft: Mapping[int, Tensor] | None = None) -> Tensor:
        """Take tokens `B x T` in behind those of a group; the final norm's output at the last of them, `B x D`."""
        options = {self._cache_name: group.cache}
        if self._takes_positions:  # some models start at 0 again where they are not told
            places = torch.arange(group.length, group.length + ids.shape[1], device=ids.device)
            options["position_ids"] = places.expand(len(ids), -1)
        what = {"inputs_embeds": with_soft(self.backbone, ids, soft)} if soft else {"input_ids": ids}
        output = self.model(**what, use_cache=True, **options)
        group.length += ids.shape[1]
        hidden: Tensor = output.last_hidden_state[:, -1]
        return hidden
