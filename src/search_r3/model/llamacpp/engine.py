"""The engine on llama.cpp: every sequence in work is one of its sequences, in one cache with kept beginnings.

Shapes: `B` sequences, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from .backbone import LlamaCppBackbone
from .runtime import Token


class LlamaCppEngine:
    """See `Engine`. A state is what the final norm gives, `D`, and the logits, `V`.

    Of the embed token the first alone is computed, of other tokens the second alone; the rest is zero.

    Args:
        backbone: the model; its cache is shared by all engines.
    """

    def __init__(self, backbone: LlamaCppBackbone) -> None:
        self.backbone, self.cache = backbone, backbone.cache
        self.beginning: tuple[int, ...] = ()
        self._rows: list[int] = []  # the sequence of each row
        self._lengths: list[int] = []
        self._prompts: dict[tuple[int, ...], tuple[int, Tensor]] = {}  # sequence and state
        self._taken: set[int] = set()
        weakref.finalize(self, self.cache.release, self._taken).atexit = False

    def share(self, ids: Sequence[int]) -> None:
        """See `Engine`."""
        self.beginning = tuple(ids)

    def encode(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """See `Engine`; many are computed in turns, as many at once as the cache has room for."""
        parts, waiting = [], [tuple(ids) for ids in sequences]
        while waiting:
            count = self.cache.room([len(ids) for ids in waiting])
            places, states = self._computed(waiting[:count])
            self._free(places)
            parts.append(states[:, : self.backbone.dimension])
            waiting = waiting[count:]
        return torch.cat(parts)

    def prompt_states(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """See `Engine`."""
        unknown = sorted(set(prompts) - self._prompts.keys())
        if unknown:
            places, states = self._computed(unknown)
            self._prompts |= dict(zip(unknown, zip(places, states, strict=True), strict=True))
        return torch.stack([self._prompts[ids][1] for ids in prompts])

    def admit(self, prompts: Sequence[tuple[int, ...]], most: int | None = None, longest: int | None = None) -> None:
        """See `Engine`."""
        for ids in prompts:
            self._rows.append(self._take(1)[0])
            self._lengths.append(len(ids))
            self.cache.copy(self._prompts[ids][0], self._rows[-1])

    def forget(self, keep: Collection[tuple[int, ...]]) -> None:
        """See `Engine`. One prompt is kept at most, since each takes room in the cache."""
        kept = next((ids for ids in reversed(self._prompts) if ids in keep), None)
        self._free([place for ids, (place, _) in self._prompts.items() if ids != kept])
        self._prompts = {} if kept is None else {kept: self._prompts[kept]}

    def advance(self, tokens: Tensor, soft: Mapping[int, Tensor] | None = None) -> Tensor:
        """See `Engine`; no request for soft tokens comes so far (`modes.latent`)."""
        assert not soft
        places = zip(tokens.tolist(), self._lengths, self._rows, strict=True)
        states = self._states([Token(token, length, row, True) for token, length, row in places])
        self._lengths = [length + 1 for length in self._lengths]
        return states

    def remove(self, rows: Collection[int], broken: Collection[int] = ()) -> list[int]:
        """See `Engine`."""
        order = [row for row in range(len(self._rows)) if row not in rows]
        self._free([self._rows[row] for row in rows])
        self._rows = [self._rows[row] for row in order]
        self._lengths = [self._lengths[row] for row in order]
        return order

    def _computed(self, sequences: Sequence[tuple[int, ...]]) -> tuple[list[int], Tensor]:
        """Sequences of the cache that hold these ids, and their last states; kept beginnings are not computed anew."""
        places = self._take(len(sequences))
        try:
            tokens = []
            for ids, place in zip(sequences, places, strict=True):
                template = self.backbone.prompt_encoder.prefix_of(ids)
                start = self.cache.begin(template, place) if len(template) < len(ids) else 0
                last = len(ids) - 1
                tokens += [Token(ids[at], at, place, at == last) for at in range(start, len(ids))]
            return places, self._states(tokens)
        except BaseException:
            self._free(places)
            raise

    def _states(self, tokens: Sequence[Token]) -> Tensor:
        """The states of those tokens that have an output, `B x (D + V)`."""
        return torch.from_numpy(self.cache.compute(tokens, self.backbone.embed_token_id))

    def _take(self, count: int) -> list[int]:
        places = self.cache.take(count)
        self._taken.update(places)
        return places

    def _free(self, places: Collection[int]) -> None:
        self._taken.difference_update(places)
        self.cache.release(places)
