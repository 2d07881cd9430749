"""The next token of every row, drawn so that a row's choice depends on nothing but its own logits and its own draw.

Shapes: `B` rows, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

SUM_BLOCK = 256
# Sums of probabilities are taken in float64, which these devices lack.
_WITHOUT_FLOAT64 = {"mps"}


def choose_tokens(
    logits: Tensor, temperatures: Sequence[float], top_p: Sequence[float], draws: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """One token per row: the likeliest where the temperature is 0, else sampled by inverting the distribution.

    Args:
        logits: `B x V`, float32.
        temperatures: per row.
        top_p: per row; the smallest set of likeliest tokens that reaches this probability is sampled from.
        draws: per row, uniform in [0, 1).

    Returns:
        Ids and their log-probabilities at the row's temperature (1 where it is 0), before `top_p`, each `B`. A row with
        a logit that is NaN or plus infinity has the log-probability NaN, and its id means nothing.
    """
    if logits.device.type in _WITHOUT_FLOAT64:
        logits = logits.cpu()
    divisors = torch.tensor([temperature or 1.0 for temperature in temperatures], device=logits.device)
    scaled = logits / divisors[:, None] if any(t not in (0.0, 1.0) for t in temperatures) else logits
    largest = scaled.amax(-1, keepdim=True)
    weights = (scaled - largest).exp_()
    totals = weights.sum(-1)
    tokens = logits.argmax(-1)
    sampling = [row for row, temperature in enumerate(temperatures) if temperature > 0]
    if sampling:
        rows = torch.tensor(sampling, device=logits.device)
        targets = torch.tensor([draws[row] for row in sampling], dtype=torch.float64, device=logits.device)
        pool = weights if len(sampling) == len(weights) else weights[rows]
        if any(top_p[row] < 1 for row in sampling):
            pool = _nucleus(pool, torch.tensor([top_p[row] for row in sampling], device=logits.device))
        tokens[rows] = _inverse_cdf(pool, targets)
    return tokens, (scaled.gather(-1, tokens[:, None]) - largest)[:, 0] - totals.log()


def _nucleus(weights: Tensor, top_p: Tensor) -> Tensor:
    """Weights `B x V` with those outside each row's nucleus set to 0."""
    descending, places = weights.sort(dim=-1, descending=True)
    before = descending.cumsum(-1, dtype=torch.float64) - descending
    outside = before >= top_p[:, None] * descending.sum(-1, keepdim=True, dtype=torch.float64)
    return torch.zeros_like(weights).scatter(-1, places, descending.masked_fill(outside, 0.0))


def _inverse_cdf(weights: Tensor, draws: Tensor) -> Tensor:
    """The token at which the cumulative weight first exceeds each draw's share of the whole, `B`.

    First the block of tokens is found and then the token in it, so that only the blocks are summed up in float64.
    """
    padded = F.pad(weights, (0, -weights.shape[-1] % SUM_BLOCK))
    blocks = padded.view(len(weights), -1, SUM_BLOCK)  # B x n x SUM_BLOCK
    upto = blocks.sum(-1, dtype=torch.float64).cumsum(-1)  # B x n
    targets = (draws * upto[:, -1])[:, None]
    block = torch.searchsorted(upto, targets, right=True).clamp(max=upto.shape[-1] - 1)
    before = torch.where(block > 0, upto.gather(-1, (block - 1).clamp(min=0)), 0.0)
    rows = torch.arange(len(weights), device=weights.device)
    within = blocks[rows, block[:, 0]].cumsum(-1, dtype=torch.float64)  # B x SUM_BLOCK
    place = torch.searchsorted(within, targets - before, right=True)
    # Rounding may leave a target a hair above the block's last sum: its last token of any weight is meant.
    last = (within < within[:, -1:]).sum(-1, keepdim=True)
    tokens: Tensor = (block * SUM_BLOCK + torch.minimum(place, last))[:, 0]
    return tokens
