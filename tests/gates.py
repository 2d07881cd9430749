"""Gates made by hand, and models that decide themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from search_r3.model.encoder import SearchR3
from search_r3.model.modes.auto import probe_of, reason_frame_of
from search_r3.model.modes.gate import Gate, Head, Weighted
from tests.conftest import favour


def gate_for(model: SearchR3, texts: Sequence[str], by_scores: Head | None = None, **changes: float) -> Gate:
    """A gate that lets half of these texts think, those whose vectors lie on one side of their mean."""
    vectors = model.encode_query(texts, "direct", truncate_dim=model.backbone.dimension).vectors.astype(float)
    weights = np.random.default_rng(0).normal(size=vectors.shape[1])
    values = vectors @ weights
    middle = float(np.sort(values)[len(values) // 2 - 1 : len(values) // 2 + 1].mean())
    scale = 4.0 / float(np.abs(values - middle).max())
    head = Head(bias=0.0, vector=tuple((weights * scale).tolist()), centre=middle * scale)
    terms = {"price": 0.001, "gain": 0.5, "loss": -0.5, "tokens": 10.0} | changes
    probe = tuple(probe_of(model.backbone).tolist())
    own = {"probe": probe, "reason_frame": reason_frame_of(model.backbone)}
    return Gate(measure="ndcg@10", by_vector=head, by_scores=by_scores or head, **own, **terms)


def of_scores(size: int, **weights: float) -> Head:
    """A head that reads scores alone: name -> weight, each with its mean at 0."""
    return Head(
        bias=0.0,
        vector=(0.0,) * size,
        centre=0.0,
        scores={name: Weighted(weight=weight, mean=0.0) for name, weight in weights.items()},
    )


def let_it_decide(model: SearchR3, texts: Sequence[str]) -> None:
    """Make a model one that decides itself in mode auto: about half of these texts would write."""
    backbone = model.backbone
    embed, margins = backbone.embed_token_id, []
    ends = sorted(backbone.prompt_encoder.end_token_ids)
    for text in texts:
        ids = backbone.prompt_encoder.encode(text, "auto").ids
        with torch.no_grad():
            logits = backbone.logits(backbone.hidden_states(torch.tensor([ids]), None))[0, -1].double()
        words = [one for one in range(len(logits)) if one not in (embed, *ends)]
        # It writes where words are likelier than the embed token and the ends together.
        margins.append(float((logits[words].exp().sum() - logits[ends].exp().sum()).log() - logits[embed]))
    middle = sorted(margins)[len(margins) // 2 - 1 : len(margins) // 2 + 1]
    favour(backbone, embed, sum(middle) / 2)
    backbone.settings = backbone.settings.model_copy(update={"gate": "policy"})
