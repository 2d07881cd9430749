"""The first token of a reply as a decision: to embed at once, or to write (`mode="auto"` of a model that decides).

Shapes: `B` rows, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ...errors import ConfigError
from ..backbone import Backbone

First = Literal["own", "embed", "text"]
"""What decides: the model; or it is given, the embed token or any other one."""


def decides(backbone: Backbone) -> bool:
    """Whether in mode auto the model's own first token says which queries think."""
    return backbone.settings.gate == "policy"


def has_auto(backbone: Backbone) -> bool:
    """Whether something says in mode auto which queries think: the model itself, or a fitted gate."""
    return decides(backbone) or backbone.gate is not None


def first_of(backbone: Backbone, mode: str) -> First | None:
    """What a mode says of the first token; None: nothing. In mode reason a model that could decide does write."""
    if not decides(backbone):
        return None
    return {"auto": "own", "reason": "text"}.get(mode)  # type: ignore[return-value]


def check_can_decide(backbone: Backbone, setting: str) -> None:
    """Refuse prompts after which a reply cannot begin with the embed token.

    Raises:
        ConfigError: they open a thought, which has to be closed first.
    """
    if backbone.prompt_encoder.frames.thought_end:
        raise ConfigError(
            f"{setting}: the prompts of {backbone.source} open a thought, so that no reply can begin with the embed "
            "token; set prompts=search-r3"
        )


def check_price(backbone: Backbone, price: float | None) -> None:
    """Refuse another price than that which the model has learned.

    Raises:
        ConfigError: there is one.
    """
    if price is not None:
        raise ConfigError(
            f"price={price}: {backbone.source} decides itself which queries think, at the price of a token that it was "
            "trained with (grpo.reward.tokens); leave price out, or train it with another"
        )


def facts_of(writes: float | None) -> dict[str, float]:
    """What is said of a decision: the probability that the model writes."""
    return {} if writes is None else {"probability": round(writes, 6)}


def hold(
    logits: Tensor,
    firsts: Sequence[First | None],
    temperatures: Sequence[float],
    embed_token_id: int,
    ends: Tensor,
) -> tuple[Tensor, Mapping[int, tuple[float, float]]]:
    """Leave rows only the first tokens that they may have.

    A row that decides itself and is greedy may have what is likelier, to embed at once or to write: the border that
    stage 2 teaches. The embed token may be likelier than any single word, and less than all of them together.

    Args:
        logits: `B x V`.
        firsts: of each row; None for one that is no first token, or of which nothing is said.
        temperatures: of each row, 0 where it is decoded greedily.
        embed_token_id: the embed token.
        ends: `E`, the tokens that end a turn. A reply that begins with one says nothing, so it does not write.

    Returns:
        Logits with minus infinity for what a row may not have; and row -> the logarithm of the probability, at the
        row's temperature (1 where it is 0), of all that it may have, and the probability that the model writes.
    """
    rows = [row for row, first in enumerate(firsts) if first is not None]
    divisors = torch.tensor([temperatures[row] or 1.0 for row in rows], device=logits.device)
    scaled = logits[rows] / divisors[:, None]
    whole = scaled.logsumexp(-1)
    embed = scaled[:, embed_token_id] - whole
    scaled[:, embed_token_id] = scaled[:, ends] = -torch.inf
    text = scaled.logsumexp(-1) - whole
    held, facts = logits.clone(), {}
    for place, row in enumerate(rows):
        mass, writes, first = 0.0, float(text[place].exp()), firsts[row]
        if first == "own" and temperatures[row] == 0 and not math.isnan(writes):
            first = "text" if writes > 0.5 else "embed"
        if first == "text":
            held[row, embed_token_id] = held[row, ends] = -torch.inf
            mass = float(text[place])
        elif first == "embed":
            held[row].fill_(-torch.inf)[embed_token_id], mass = 0.0, float(embed[place])
        facts[row] = mass, writes
    return held, facts
