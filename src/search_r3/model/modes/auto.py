"""`mode="auto"`: which queries think, and one answer of those that do and those that do not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import UntrainedError
from ...types import Array
from ..backbone import Backbone
from ..embeddings import QueryEmbeddings, shorten
from .gate import PROBE, Choice, Gate, read_gate

logger = logging.getLogger(__name__)

TopScores = Callable[[Array], Array]
"""Gives the scores of the best documents, `Q x 10`, best first, for direct vectors `Q x D`."""


@torch.no_grad()
def fitting_gate(backbone: Backbone, folder: Path) -> Gate | None:
    """The gate in a model's folder, where it was fitted to this model: to others' weights or prompts it says nothing.

    Raises:
        ModelError: its file is damaged.
    """
    gate = read_gate(folder)
    if gate is None or gate.belongs_to(probe_of(backbone), reason_frame_of(backbone)):
        return gate
    logger.warning(
        "the gate of %s was fitted to other weights or prompts, and is left out; %s",
        *(backbone.source, _remedy(backbone)),
    )
    return None


@torch.no_grad()
def probe_of(backbone: Backbone) -> Array:
    """The direct vector of `PROBE`, `D`."""
    vector: Array = backbone.embed([backbone.prompt_encoder.encode(PROBE, "direct").ids])[0].cpu().numpy()
    return vector


def reason_frame_of(backbone: Backbone) -> tuple[int, ...]:
    """The token ids before and after a query in reason mode."""
    before, after = backbone.prompt_encoder.frame("reason")
    return (*before, *after)


def gate_of(backbone: Backbone) -> Gate:
    """The gate of a model.

    Raises:
        UntrainedError: it has none.
    """
    if backbone.gate is None:
        raise UntrainedError(
            f"{backbone.source} has no gate, which mode='auto' needs to tell which queries think; {_remedy(backbone)}"
        )
    return backbone.gate


def _remedy(backbone: Backbone) -> str:
    """How a model gets a gate: a directory where it lies, any other as a copy."""
    if backbone.engine == "llama.cpp":
        return "a model that llama.cpp computes has none; load it without backend"
    copy = "" if Path(backbone.source).is_dir() else " --out FOLDER"
    return f"fit one: search-r3 gate {backbone.source} --collection COLLECTION --splits SPLIT{copy}"


def choose(
    backbone: Backbone, vectors: Array, dimensions: int | None, top_scores: TopScores | None, price: float | None
) -> Choice:
    """Who thinks, from whole direct vectors, `Q x D`; documents are asked for with the dimensions that they have.

    Raises:
        ModelError: there is no gate.
    """
    gate = gate_of(backbone)
    scores = None if top_scores is None else top_scores(shorten(vectors, dimensions))
    has_documents = scores is not None and scores.shape[1] > 0
    return gate.decide(vectors, scores if has_documents else None, price)


def merged(direct: QueryEmbeddings, reasoned: QueryEmbeddings | None, choice: Choice) -> QueryEmbeddings:
    """One answer for all queries: `reasoned` holds those that think, in their order."""
    thinks = choice.thinks.tolist()
    vectors = direct.vectors.copy()
    facts: list[list[Any]]
    facts = [list(direct.reasoning), list(direct.reasoning_tokens), list(direct.forced), list(direct.truncated)]
    if reasoned is not None:
        places = np.flatnonzero(choice.thinks)
        vectors[places] = reasoned.vectors
        of_reason = reasoned.reasoning, reasoned.reasoning_tokens, reasoned.forced, reasoned.truncated
        for name, fact in enumerate(facts):
            for row, place in enumerate(places.tolist()):
                fact[place] = of_reason[name][row]
    reasoning, tokens, forced, truncated = facts
    return QueryEmbeddings(vectors, reasoning, tokens, forced, truncated, thinks, choice.facts())
