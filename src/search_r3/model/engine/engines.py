"""What computes hidden states for encoding and decoding: one interface, and the three that have it.

Shapes: `B` sequences, `D` hidden size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from ..backbone import Backbone
from ..llamacpp.backbone import LlamaCppBackbone
from ..llamacpp.engine import LlamaCppEngine
from .fallback import FallbackEngine
from .slots import SlotEngine


class Engine(Protocol):
    """Computes sequences whole, and rows in work, numbered from 0, one token at a time.

    All its states are outputs of the final norm, where the output layer and the vectors read; what they give tell
    `Backbone.logits` and `Backbone.vectors`.
    """

    beginning: tuple[int, ...]
    """What all sequences of `encode` are taken to begin with."""

    def share(self, ids: Sequence[int]) -> None:
        """Compute what all sequences of `encode` will begin with (and go on after), where that saves anything."""
        ...

    def encode(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """The states at the last tokens, `B x D`."""
        ...

    def prompt_states(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """The states at the last tokens, `B x D`; each distinct prompt is computed once and kept until `forget`."""
        ...

    def admit(self, prompts: Sequence[tuple[int, ...]], most: int | None = None, longest: int | None = None) -> None:
        """Take prompts that `prompt_states` has computed into work, as the next rows, of `most` that there may be.

        With `longest` room for all of them, of so many tokens each, is reserved at once; else as it is needed.
        """
        ...

    def forget(self, keep: Collection[tuple[int, ...]]) -> None:
        """Drop what is kept of other prompts."""
        ...

    def advance(self, tokens: Tensor, soft: Mapping[int, Tensor] | None = None) -> Tensor:
        """Give every row its next token of `B`, those in `soft` an input `D` in its place; the states there, `B x D`.

        Nothing in it should wait for the device, where the device is another.
        """
        ...

    def remove(self, rows: Collection[int], broken: Collection[int] = ()) -> list[int]:
        """Take rows out of work, those in `broken` with states that are not finite.

        Returns:
            The old numbers of the rows that stay, in their new order.
        """
        ...


def make_engine(backbone: Backbone) -> Engine:
    """The engine that was found right for this model when it was loaded."""
    if isinstance(backbone, LlamaCppBackbone):
        return LlamaCppEngine(backbone)
    return SlotEngine(backbone) if backbone.engine == "fast" else FallbackEngine(backbone)
