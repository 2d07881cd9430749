"""The model as training runs it: all that a step computes is asked of one module, in one call of its `forward`.

Wrappers of many processes (DDP, FSDP2, DeepSpeed) act on the forward pass of the module that they were given; what goes
around it is not synchronised, or meets weights that are not there.

Shapes: `B` sequences, `T` tokens, `D` hidden size, `V` vocabulary, `S` chosen places.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model.backbone import Backbone, vectors_at
from .modes.think import think

Reference = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(ids, mask, places) -> logits`: the model that a KL term stays close to, without gradients; see `make_reference`."""


class Policy(torch.nn.Module):
    """A causal LM, with adapters or without, that answers with logits at chosen places and with search embeddings.

    Args:
        backbone: its model is the one that learns.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone, self.model = backbone, backbone.model
        self.needs_mask = not backbone.looks_back_only()

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        *,
        embed: Tensor | None = None,
        places: Sequence[Tensor] = (),
        adapters: bool = True,
        latent_steps: int = 0,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Compute sequences.

        Args:
            ids: `B x T`, padded on the right.
            mask: `B x T`; it goes to the model only where that looks ahead, since any mask costs SDPA its flash kernel.
            embed: `B`, the position of the embed token in each sequence.
            places: masks `B x T` (bool) of the positions whose next-token logits are wanted.
            adapters: False computes with the frozen weights alone.
            latent_steps: K; above 0 the sequences are prompts, and the vectors, `B x K x D`, are those of `think`.

        Returns:
            The search embeddings `B x D` at `embed` (float32, L2-normalised), and for each of `places` its logits
            `S x V` (float32), row by row.
        """
        if latent_steps:
            return think(self.backbone, ids, mask, latent_steps, self.needs_mask), []
        with contextlib.nullcontext() if adapters else self.model.disable_adapter():
            hidden = self.backbone.hidden_states(ids, mask if self.needs_mask else None)
            logits = [self.backbone.logits(hidden[place]) for place in places[:1]]
            vectors = None if embed is None else vectors_at(hidden, embed)
            logits += [self.backbone.logits(hidden[place]) for place in places[1:]]
        return vectors, logits

    def tie_weights(self) -> None:
        """Make tied tables one tensor again, after a wrapper has moved them."""
        self.backbone.causal_lm.tie_weights()


def make_reference(policy: Any, copy: Policy | None) -> Reference:
    """The reference of a KL term: a frozen copy, or, where adapters learn, the policy without them."""

    @torch.no_grad()
    def reference(ids: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        _, [logits] = (
            policy(ids, mask, places=[places], adapters=False) if copy is None else copy(ids, mask, places=[places])
        )
        return torch.as_tensor(logits)

    return reference
