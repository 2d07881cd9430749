"""The swapped-reasoning test: what a vector makes of a text that is put into the model's mouth.

A vector that reads finds its documents after its own reasoning, and loses them after another query's; one that looks
past what is written finds them either way. What the true reasoning is worth says how much better writing could get.

Shapes: `Q` queries, `D` vector size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import numpy as np
import torch

from ..data.collection import Collection, Qrels
from ..model.encoder import SearchR3
from ..retrieval.metrics import ndcg
from ..retrieval.protocol import VectorIndex
from ..retrieval.ranking import make_requests, ranked
from ..types import Array

AT_A_TIME = 64

Measure = Callable[[Array], list[float]]
"""Vectors `Q x D` of some queries -> nDCG@k of each."""


def vectors_after(
    model: SearchR3, queries: Sequence[str], texts: Sequence[str], instruction: str | Sequence[str] = ""
) -> Array:
    """Vectors `Q x D` of queries in reason mode, where the model has written these texts."""
    encoder, sequences = model.backbone.prompt_encoder, []
    for prompt, text in zip(encoder.encode_batch(queries, "reason", instruction), texts, strict=True):
        reply = encoder.reason_completion(text)
        sequences.append([*prompt.ids, *reply.ids[: reply.embed_position + 1]])
    with torch.no_grad():
        parts = [
            model.backbone.embed(sequences[start : start + AT_A_TIME]).cpu().numpy()
            for start in range(0, len(sequences), AT_A_TIME)
        ]
    return np.concatenate(parts)


def measure_in(index: VectorIndex, collection: Collection, qrels: Qrels, k: int = 10) -> Measure:
    """nDCG@k of vectors of these queries, in their order, by the one ranking rule."""
    requests = make_requests(collection, qrels)

    def measure(vectors: Array) -> list[float]:
        rankings = ranked(index, vectors, requests, k)
        return [
            ndcg([doc_id for doc_id, _ in ranking], qrels[request.query_id], k)
            for request, ranking in zip(requests, rankings, strict=True)
        ]

    return measure


def swapped_reasoning(
    model: SearchR3,
    queries: Sequence[str],
    reasoning: Sequence[str],
    measure: Measure,
    true: Mapping[int, str] | None = None,
    instruction: str | Sequence[str] = "",
) -> dict[str, float]:
    """Mean nDCG after four kinds of text.

    Args:
        model: whose vectors they are.
        queries: at least two.
        reasoning: what the model wrote for each.
        measure: of their vectors.
        true: place of a query -> its true reasoning, where it is known.
        instruction: of all queries, or of each.

    Returns:
        `own`; `other`, the next query's, in a ring; `none`; and, where some are known, `true` and `own_where_true`, the
        means over those queries.
    """

    def after(texts: Sequence[str]) -> list[float]:
        return measure(vectors_after(model, queries, texts, instruction))

    own = after(reasoning)
    values = {
        "own": fmean(own),
        "other": fmean(after([*reasoning[1:], reasoning[0]])),
        "none": fmean(after([""] * len(queries))),
    }
    if true:
        known = after([true.get(place, "") for place in range(len(queries))])
        values |= {
            name: fmean(one[place] for place in true) for name, one in (("true", known), ("own_where_true", own))
        }
    return values
