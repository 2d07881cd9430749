"""Stage 1 of mode latent: K soft tokens in the place of a text, then the embed token, whose state is the vector.

Two objectives, beside all losses of stage 1, which train direct and reason mode as ever:

- `gircse` (arXiv 2509.24291): InfoNCE of the vector after each number of soft tokens, the mean, and a penalty where one
  more makes it worse. There the vector is a mean of states, here it is read at the embed token behind them.
- `laser`: the vector after all soft tokens learns by InfoNCE, and from the explicit view of the same weights: the
  scores that the vector behind the written trace gives the documents of the batch. Its alignment of single steps with
  segments of the trace is left out: it is worth least there, and needs traces of several paragraphs.

Shapes: `B` queries, `K` soft tokens, `D` vector size, `M` documents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ...config import SFTSettings
from .. import losses
from ..batches import Batch

LATENT_WEIGHTS = {"latent_info_nce": 1.0, "latent_rise": 1.0, "latent_kl": 10.0}
"""Loss -> its weight among those of its objective, as published."""
_NEVER = -1e4
"""Score of a document that is left out."""
_LEAST = 1e-6
"""InfoNCE of queries that are all told apart rounds to 0, which has no logarithm."""


def latent_losses(vectors: Sequence[Tensor], batch: Batch, settings: SFTSettings) -> dict[str, Tensor]:
    """The losses of mode latent, means over queries, by name; none where it is not trained.

    Args:
        vectors: of the queries, `R x D` (the direct ones, and behind them the reasoned ones), of the documents,
            `M x D`, and the latent ones, `B * K x D`.
        batch: which documents are positives and which are left out, and whose the reasoned vectors are.
        settings: objective and temperature.
    """
    if not batch.latent_steps:
        return {}
    queries, documents, latents = vectors
    latents = latents.view(-1, batch.latent_steps, latents.shape[-1])  # B x K x D
    temperature, device = settings.contrastive_temperature, latents.device
    positives, excluded = batch.positives.to(device), batch.excluded.to(device)
    if settings.latent_objective == "gircse":
        each = torch.stack(
            [losses.info_nce(one, documents, positives, excluded, temperature) for one in latents.unbind(1)]
        )
        logs = each.clamp_min(_LEAST).log()
        rises = functional.relu(logs[1:] - logs[:-1])
        return {"latent_info_nce": each.mean(), "latent_rise": rises.sum() / max(1, len(rises))}
    last = latents[:, -1]
    reasoned = torch.tensor(batch.owners[len(batch.examples) :], dtype=torch.long, device=device)
    scores = (
        torch.log_softmax((view @ documents.T / temperature).masked_fill(excluded[reasoned], _NEVER), dim=-1)
        for view in (queries[len(batch.examples) :].detach(), last[reasoned])
    )
    explicit, latent = scores
    divergence = (explicit.exp() * (explicit - latent)).sum() / max(1, len(reasoned))
    return {
        "latent_info_nce": losses.info_nce(last, documents, positives, excluded, temperature),
        "latent_kl": divergence,
    }
