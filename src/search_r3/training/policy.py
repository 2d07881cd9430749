"""The model as training runs it: all that a step computes is asked of one module, in one call of its `forward`.

Wrappers of many processes (DDP, FSDP2, DeepSpeed) act on the forward pass of the module that they were given; what goes
around it is not synchronised, or meets weights that are not there. The output layer is therefore computed in it too, a
chunk of positions at a time: logits of a whole pass, `S x V` in float32, would be the largest tensors of a training.

Shapes: `B` sequences, `T` tokens, `D` hidden size, `V` vocabulary, `S` chosen places, `P` those of a KL.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..model.backbone import Backbone, vectors_at
from . import losses
from .modes.think import Words, think

LOGITS_AT_A_TIME = 2**25
"""Logits, positions times vocabulary, that are held at once: 128 MiB in float32."""

Reference = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(ids, mask, places) -> S x D`: the states of the model that a KL term stays close to; see `make_reference`."""


class Tokens(NamedTuple):
    """Tokens whose log-probabilities are wanted.

    Attributes:
        places: `B x T` (bool), True at the positions that predict them.
        ids: `S`, the tokens, row by row.
        sampling_temperature: of the distribution.
        reference: `S x D`, the reference's states at these places, where its log-probabilities are wanted, too.
    """

    places: Tensor
    ids: Tensor
    sampling_temperature: float = 1.0
    reference: Tensor | None = None


class Answer(NamedTuple):
    """What a forward pass gives of what it was asked for; None of all else.

    Attributes:
        vectors: search embeddings `B x D`, float32, L2-normalised; behind soft tokens `B x K x D`.
        logprobs: `S`, of the tokens; of soft tokens' words, weighted sums, `B x K`.
        reference_logprobs: `S`, the reference's; they have no gradient.
        kl: `P`, `KL(reference || policy)` in nats at each place.
        states: `S x D`, where the output layer reads.
    """

    vectors: Tensor | None = None
    logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    kl: Tensor | None = None
    states: Tensor | None = None


class Policy(torch.nn.Module):
    """A causal LM, with adapters or without, that answers with search embeddings and with what its logits say.

    Args:
        backbone: its model is the one that learns; from now on its logits are in float32, while it samples too.
        frozen: the reference of a KL term, where it has weights of its own; else it is the policy without its adapters.
    """

    def __init__(self, backbone: Backbone, frozen: Backbone | None = None) -> None:
        super().__init__()
        self.backbone, self.model, self.frozen = backbone, backbone.model, frozen
        backbone.float32_logits = True
        self.needs_mask = not backbone.looks_back_only()
        self.vocabulary = int(backbone.causal_lm.config.get_text_config().vocab_size)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        *,
        embed: Tensor | None = None,
        tokens: Tokens | None = None,
        kl: tuple[Tensor, Tensor] | None = None,
        states: Tensor | None = None,
        adapters: bool = True,
        words: Words | None = None,
    ) -> Answer:
        """Compute sequences.

        Args:
            ids: `B x T`, padded on the right.
            mask: `B x T`; it goes to the model only where that looks ahead, since any mask costs SDPA its flash kernel.
            embed: `B`, the position of the embed token in each sequence.
            tokens: whose log-probabilities are wanted.
            kl: places, `B x T` (bool), where the KL is wanted, and the reference's states there, `P x D`.
            states: places, `B x T` (bool), whose states are wanted.
            adapters: False computes with the frozen weights alone.
            words: what soft tokens are to say behind these prompts; the answer is then that of `think`.
        """
        if words is not None:
            return Answer(*think(self.backbone, ids, mask, words, self.needs_mask))
        with contextlib.nullcontext() if adapters else self.model.disable_adapter():
            hidden = self.backbone.hidden_states(ids, mask if self.needs_mask else None)
        logprobs, reference_logprobs = (None, None) if tokens is None else self._logprobs(hidden, tokens)
        return Answer(
            None if embed is None else vectors_at(hidden, embed),
            logprobs,
            reference_logprobs,
            None if kl is None else self._in_chunks(self._kl, hidden[kl[0]], kl[1]),
            None if states is None else hidden[states],
        )

    def _logprobs(self, hidden: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        def own(states: Tensor, ids: Tensor) -> Tensor:
            return losses.chosen_logprobs(self.backbone.logits(states), ids, tokens.sampling_temperature)

        def others(states: Tensor, ids: Tensor) -> Tensor:
            return losses.chosen_logprobs(self._reference_logits(states), ids, tokens.sampling_temperature)

        logprobs = self._in_chunks(own, hidden[tokens.places], tokens.ids)
        if tokens.reference is None:
            return logprobs, None
        with torch.no_grad():
            return logprobs, self._in_chunks(others, tokens.reference, tokens.ids)

    def _kl(self, states: Tensor, reference: Tensor) -> Tensor:
        return losses.kl_to_base(self.backbone.logits(states), self._reference_logits(reference))

    @torch.no_grad()
    def _reference_logits(self, states: Tensor) -> Tensor:
        return (self.frozen or self.backbone).logits(states, adapters=False)

    def _in_chunks(self, compute: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """What `compute` gives for the rows of these tensors, `S x ...`, a chunk of them at a time; `S`.

        More than one chunk keep none of their logits: they are computed again in the backward pass.
        """
        size = max(1, LOGITS_AT_A_TIME // self.vocabulary)
        if len(rows[0]) <= size:
            return compute(*rows)
        parts = zip(*(torch.split(one, size) for one in rows), strict=True)
        return torch.cat([checkpoint(compute, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])

    def tie_weights(self) -> None:
        """Make tied tables one tensor again, after a wrapper has moved them."""
        self.backbone.causal_lm.tie_weights()


def any_token(ids: Tensor) -> Tokens:
    """A token that nobody asks about: a gradient path through the output layer, as DDP expects of every pass."""
    places = torch.zeros_like(ids, dtype=torch.bool)
    places[0, 0] = True
    return Tokens(places, ids[0, :1])


def make_reference(policy: Any, frozen: Backbone | None) -> Reference:
    """The reference of a KL term: a frozen copy, or, where adapters learn, the policy without them.

    What is made of its states is asked of the policy, which has the output layers of both at hand.
    """
    own = None if frozen is None else Policy(frozen)

    @torch.no_grad()
    def reference(ids: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        answer = policy(ids, mask, states=places, adapters=False) if own is None else own(ids, mask, states=places)
        return torch.as_tensor(answer.states)

    return reference
