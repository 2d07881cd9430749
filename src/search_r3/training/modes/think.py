"""Soft tokens with gradients: the forward pass of mode latent in training.

They depend on each other, so K of them cost K + 1 passes over the prompt; nothing is cached, so that it works wherever
every other forward pass of training does.

Shapes: `B` queries, `T` tokens of a prompt, `K` soft tokens, `D` hidden size, `W` words.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ...model.backbone import Backbone
from ...model.engine.latent import soft_tokens


class Words(NamedTuple):
    """What soft tokens are to say: `ids` of tokens and their `weights`, each `B x K x W`; a weight of 0 is padding."""

    ids: Tensor
    weights: Tensor


def think(backbone: Backbone, ids: Tensor, mask: Tensor, words: Words, needs_mask: bool) -> tuple[Tensor, Tensor]:
    """Vectors behind K soft tokens, with gradients through all of them, and how well these say their words.

    Args:
        backbone: the model.
        ids: `B x T`, prompts padded on the right.
        mask: `B x T`.
        words: of each soft token.
        needs_mask: whether the model looks ahead.

    Returns:
        The vectors, `B x D`, float32, L2-normalised; the weighted sums of the words' log-probabilities, `B x K`.
    """
    table = backbone.causal_lm.get_input_embeddings()
    rows, ends, steps = torch.arange(len(ids), device=ids.device), mask.sum(-1), words.ids.shape[1]
    room = ids.new_full((len(ids), steps + 1), backbone.embed_token_id)
    inputs = table(torch.cat([ids, room], dim=1).index_put((rows, ends + steps), room[:, 0]))  # B x (T + K + 1) x D
    places = torch.arange(inputs.shape[1], device=ids.device)

    def state(more: int) -> Tensor:
        """Of the last of `more` inputs behind the prompt, `B x D`."""
        fed = inputs[:, : ids.shape[1] + more]
        seen = (places[: fed.shape[1]] < (ends + more)[:, None]).long() if needs_mask else None
        return backbone.hidden_states(None, seen, fed)[rows, ends + more - 1]

    said = []
    for step in range(steps):
        logits = backbone.logits(state(step))
        logprobs = torch.log_softmax(logits, dim=-1).gather(-1, words.ids[:, step])  # B x W
        said.append((logprobs * words.weights[:, step]).sum(-1))
        inputs = inputs.index_put((rows, ends + step), soft_tokens(backbone, logits).to(inputs))
    vectors = functional.normalize(state(steps + 1).float(), dim=-1)
    return vectors, torch.stack(said, dim=1)
