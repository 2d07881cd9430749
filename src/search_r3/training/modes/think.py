"""Soft tokens with gradients: the forward pass of mode latent in training.

They depend on each other, so K of them cost K + 1 passes over the prompt; nothing is cached, so that it works wherever
every other forward pass of training does. The pass that reads a soft token also reads an embed token behind it, so that
the vectors after each number of them come with it; a model that looks ahead takes K - 1 more.

Shapes: `B` queries, `T` tokens of a prompt, `K` soft tokens, `D` hidden size, `W` words.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...model.backbone import Backbone, vectors_at
from ...model.engine.latent import soft_tokens


class Words(NamedTuple):
    """What soft tokens are to say: `ids` of tokens and their `weights`, each `B x K x W`; a weight of 0 is padding.

    `W` is 0 where they are to say nothing.
    """

    ids: Tensor
    weights: Tensor


def think(
    backbone: Backbone, ids: Tensor, mask: Tensor, words: Words, needs_mask: bool
) -> tuple[Tensor, Tensor | None]:
    """Vectors after each number of soft tokens, with gradients through all of them, and how well these say their words.

    Args:
        backbone: the model.
        ids: `B x T`, prompts padded on the right.
        mask: `B x T`.
        words: of each soft token.
        needs_mask: whether the model looks ahead.

    Returns:
        The vectors, `B x K x D`, float32, L2-normalised; the weighted sums of the words' log-probabilities, `B x K`, or
        None where there are no words.
    """
    table = backbone.causal_lm.get_input_embeddings()
    rows, ends, steps = torch.arange(len(ids), device=ids.device), mask.sum(-1), words.ids.shape[1]
    room = ids.new_full((len(ids), steps + 1), backbone.embed_token_id)
    # Embed tokens behind each prompt, in the places of its padding too: B x (T + K + 1) x D.
    inputs = table(torch.cat([ids.masked_fill(mask == 0, backbone.embed_token_id), room], dim=1))
    places = torch.arange(inputs.shape[1], device=ids.device)

    def states(more: int) -> Tensor:
        """Of the prompts and `more` inputs behind them."""
        fed = inputs[:, : ids.shape[1] + more]
        seen = (places[: fed.shape[1]] < (ends + more)[:, None]).long() if needs_mask else None
        return backbone.hidden_states(None, seen, fed)

    said, vectors, hidden = [], [], states(0)
    for step in range(steps):
        if step and needs_mask:
            hidden = states(step)  # the soft token's state has seen the embed token behind it
        logits = backbone.logits(hidden[rows, ends + step - 1])
        if words.ids.shape[-1]:  # else one more B x V would be kept for the backward pass
            logprobs = torch.log_softmax(logits, dim=-1).gather(-1, words.ids[:, step])  # B x W
            said.append((logprobs * words.weights[:, step]).sum(-1))
        inputs = inputs.index_put((rows, ends + step), soft_tokens(backbone, logits).to(inputs))
        hidden = states(step + 2)
        vectors.append(vectors_at(hidden, ends + step + 1))
    return torch.stack(vectors, dim=1), torch.stack(said, dim=1) if said else None
