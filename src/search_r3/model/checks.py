"""What is verified of a model when it is loaded: that its vectors and log-probabilities can be computed here."""

from __future__ import annotations

import torch

from ..errors import ModelError
from .backbone import Backbone


def check_output_layer(backbone: Backbone) -> None:
    """Refuse broken weights, and architectures that scale or cap logits after the output layer.

    Of those our log-probabilities would be wrong.
    """
    ids = torch.tensor([[backbone.embed_token_id] * 2], device=backbone.device)
    with torch.no_grad():
        expected = backbone.model(input_ids=ids).logits.float()
        logits = backbone.logits(backbone.hidden_states(ids, torch.ones_like(ids)))
    if not (torch.isfinite(expected).all() and torch.isfinite(logits).all()):
        raise ModelError(
            f"{backbone.source} computes NaN or infinity from a prompt of two tokens: its weights are broken, or its "
            "dtype is too narrow; try float32 or bfloat16"
        )
    if not torch.allclose(expected, logits, atol=1e-2, rtol=1e-2):
        name = type(backbone.model).__name__
        raise ModelError(f"{name} changes its logits after the output layer (scaling or capping): not supported yet")
