"""Soft tokens with gradients: the forward pass of mode latent in training.

They depend on each other, so K of them cost K + 1 passes over the prompt; nothing is cached, so that it works wherever
every other forward pass of training does.

Shapes: `B` queries, `T` tokens of a prompt, `K` soft tokens, `D` hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ...model.backbone import Backbone
from ...model.engine.latent import soft_tokens


def think(backbone: Backbone, ids: Tensor, mask: Tensor, steps: int, needs_mask: bool) -> Tensor:
    """Vectors after each number of soft tokens, with gradients through all of them.

    Args:
        backbone: the model.
        ids: `B x T`, prompts padded on the right.
        mask: `B x T`.
        steps: K.
        needs_mask: whether the model looks ahead.

    Returns:
        `B x K x D`, float32, L2-normalised.
    """
    table = backbone.causal_lm.get_input_embeddings()
    rows, ends, width = torch.arange(len(ids), device=ids.device), mask.sum(-1), ids.shape[1]
    room = ids.new_full((len(ids), steps + 1), backbone.embed_token_id)
    inputs = table(torch.cat([ids, room], dim=1))  # B x (T + K + 1) x D
    embed = table(room[:, 0])
    places = torch.arange(inputs.shape[1], device=ids.device)

    def states(fed: Tensor, step: int) -> Tensor:
        seen = (places[: fed.shape[1]] <= (ends + step)[:, None]).long() if needs_mask else None
        return backbone.hidden_states(None, seen, fed)

    hidden = states(inputs[:, :width], -1)[rows, ends - 1]
    vectors = []
    for step in range(1, steps + 1):
        inputs = inputs.index_put((rows, ends + step - 1), soft_tokens(backbone, hidden).to(inputs))
        fed = inputs.index_put((rows, ends + step), embed)[:, : width + step + 1]
        all_states = states(fed, step)
        hidden = all_states[rows, ends + step - 1]
        vectors.append(functional.normalize(all_states[rows, ends + step].float(), dim=-1))
    return torch.stack(vectors, dim=1)
