"""Stage 1 of mode latent: K soft tokens in the place of a text, then the embed token, whose state is the vector.

Three objectives, each beside all other losses of stage 1, which train direct and reason mode as ever:

- `words`: the contrastive losses of the vector, and the cross-entropy of each soft token to the words of its piece of
  the written trace. A contrastive loss alone teaches soft tokens nothing where one glance tells the training's queries
  apart; a whole sentence said at once they can feed on.
- `gircse` (arXiv 2509.24291): InfoNCE of the vector after each number of soft tokens, and a penalty where one more
  makes it worse. There the vector is a mean of states, here it is read at the embed token behind them.
- `laser`: InfoNCE of the vector, which also learns from the explicit view of the same weights: the scores that the
  vector behind the written trace gives the documents of the batch. Its alignment of single steps with segments of the
  trace is left out: states at their ends are no search vectors here, where only the embed token's is one.

Decisions of `words`: a trace is cut at its sentences, and its pieces are said in their order. What every trace says is
no thought: a word weighs the square of `log(traces / traces that have it)`, among the traces of the batch, and the
weights of a piece sum to 1. The trace is that of the likeliest style that reason mode learns to write.

Shapes: `B` queries, `R` vectors of them (direct, then reasoned), `K` soft tokens, `D` vector size, `M` documents.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from ...config import SFTSettings
from .. import losses

if TYPE_CHECKING:
    from ..batches import Batch

LATENT_WEIGHTS = {"latent_words": 0.3, "latent_rise": 1.0, "latent_kl": 10.0}
"""Of single losses among those of mode latent, the last two as published; others weigh as in the other modes."""
_NEVER = -1e4
"""Score of a document that is left out; the difference of two infinite ones is no number."""
_LEAST = 1e-6
"""InfoNCE of queries that are all told apart rounds to 0, which has no logarithm."""
_RARITY = 2
"""Power of the logarithm: in a batch of tens of traces it is small, and words that many have would drown names."""


def words_of(traces: Sequence[Sequence[Sequence[int]]], steps: int) -> list[list[dict[int, float]]]:
    """What the soft tokens of some queries are to say.

    Args:
        traces: of each query the token ids of its trace's sentences; none where it has no trace.
        steps: K.

    Returns:
        Of each query and each soft token: token id -> weight; empty where there is nothing that other traces do not
        say too.

    Example:
        >>> words_of([[[5, 1], [5, 2]], [[5, 3]]], 2)
        [[{1: 1.0}, {2: 1.0}], [{3: 1.0}, {3: 1.0}]]
    """
    counts = Counter(token for trace in traces for token in {token for part in trace for token in part})
    written = sum(bool(trace) for trace in traces)
    rarity = {token: math.log(written / count) ** _RARITY for token, count in counts.items()}
    return [[_weighed(piece, rarity) for piece in pieces(trace, steps)] for trace in traces]


def pieces(sentences: Sequence[Sequence[int]], steps: int) -> list[list[int]]:
    """Sentences as so many pieces, in their order; where there are fewer sentences, the last stands for the rest.

    Example:
        >>> pieces([[1], [2], [3]], 2), pieces([[1], [2]], 3), pieces([], 1)
        ([[1], [2, 3]], [[1], [2], [2]], [[]])
    """
    count = len(sentences)
    if count <= steps:
        return [list(sentences[min(step, count - 1)]) if count else [] for step in range(steps)]
    cuts = [step * count // steps for step in range(steps + 1)]
    return [[token for part in sentences[start:end] for token in part] for start, end in pairwise(cuts)]


def _weighed(piece: Sequence[int], rarity: Mapping[int, float]) -> dict[int, float]:
    own = {token: rarity[token] for token in piece if rarity[token] > 0}
    total = sum(own.values())
    return {token: weight / total for token, weight in own.items()}


def gircse(
    latents: Tensor, queries: Tensor, documents: Tensor, batch: Batch, settings: SFTSettings
) -> dict[str, Tensor]:
    """InfoNCE after each number of soft tokens, its mean, and the mean rise of its logarithm where one more is worse.

    Args:
        latents: `B x K x D`, after each number of soft tokens.
        queries: `R x D`.
        documents: `M x D`.
        batch: which documents are positives and which are left out, and whose the reasoned vectors are.
        settings: temperature.
    """
    each = torch.stack([_info_nce(one, documents, batch, settings) for one in latents.unbind(1)])
    logs = each.clamp_min(_LEAST).log()
    rises = functional.relu(logs[1:] - logs[:-1])
    return {"info_nce": each.mean(), "rise": rises.sum() / max(1, len(rises))}


def laser(
    latents: Tensor, queries: Tensor, documents: Tensor, batch: Batch, settings: SFTSettings
) -> dict[str, Tensor]:
    """InfoNCE after all soft tokens, and the KL from the scores behind the written traces; arguments as `gircse`.

    The explicit view gets no gradient of the KL, which is a mean over the queries whose trace reason mode is to write.
    """
    last, count = latents[:, -1], len(batch.examples)
    taught = {row for row, trace in enumerate(batch.traces) if trace} - batch.unwritten
    written = [place for place, row in enumerate(batch.owners) if place >= count and row in taught]
    rows = torch.tensor([batch.owners[place] for place in written], dtype=torch.long, device=last.device)
    excluded = batch.excluded.to(last.device)[rows]
    explicit, latent = (
        torch.log_softmax((view @ documents.T / settings.contrastive_temperature).masked_fill(excluded, _NEVER), -1)
        for view in (queries[written].detach(), last[rows])
    )
    divergence = functional.kl_div(latent, explicit, reduction="sum", log_target=True) / max(1, len(written))
    return {"info_nce": _info_nce(last, documents, batch, settings), "kl": divergence}


PUBLISHED = {"gircse": gircse, "laser": laser}
"""Objective -> its losses, named without `latent_`."""


def _info_nce(vectors: Tensor, documents: Tensor, batch: Batch, settings: SFTSettings) -> Tensor:
    positives, excluded = batch.positives.to(vectors.device), batch.excluded.to(vectors.device)
    return losses.info_nce(vectors, documents, positives, excluded, settings.contrastive_temperature)
