"""Soft tokens: what the model would write next, as the mean of all tokens' inputs instead of one of them.

GIRCSE (arXiv 2509.24291) and LaSER feed them back instead of a text; nothing is sampled, and a step costs what a token
does.

Shapes: `B` sequences, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..backbone import Backbone


def soft_tokens(backbone: Backbone, logits: Tensor) -> Tensor:
    """The inputs `B x D` that follow logits `B x V`: `softmax(logits) @ table`, in the precision of the table."""
    table = backbone.causal_lm.get_input_embeddings()
    weight: Tensor = table.weight  # where adapters hold the embed token's row, peft gives it with that one
    inputs = torch.softmax(logits, dim=-1).to(weight.dtype) @ weight
    scale = getattr(table, "embed_scale", None)  # Gemma's
    return inputs if scale is None else inputs * scale.to(weight.dtype)


def with_soft(backbone: Backbone, ids: Tensor, soft: Mapping[int, Tensor]) -> Tensor:
    """The inputs `B x 1 x D` of tokens `B x 1`, with soft ones in their rows."""
    inputs: Tensor = backbone.causal_lm.get_input_embeddings()(ids).clone()
    rows = torch.tensor(list(soft), device=ids.device)
    inputs[rows, 0] = torch.stack(list(soft.values())).to(inputs)
    return inputs
