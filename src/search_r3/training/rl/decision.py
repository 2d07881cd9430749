"""Whether to write at all, as stage 2 learns it: the first token of a reply (mode auto of a model that decides).

Of each group one reply embeds at once and the others write, whatever the policy would have drawn. What is written
learns from the written replies alone, as in any group: their advantages sum to 0, so they say nothing of the decision.
This is learned as a logistic regression whose label is the choice that earned more, weighted by how much more:

    (1 - p) max(0, D) - p max(0, -D),    D = R(at once) - mean R(written),

by the log-odds of `p`, the probability of the embed token as first token. The reply at once carries it: the gradient of
`log p` by the log-odds is `1 - p`, so its advantage is `D` where that is above 0, and `D p / (1 - p)` where it is not;
times the tokens that the others wrote, since token losses are divided by their number: it is one token and counts for a
whole group. (With the weight of one token for each of them the decision hardly got beyond chance; docs/log.md.)

The policy gradient of the same choice, its expectation taken exactly, is `p (1 - p) D`: it vanishes where the policy is
sure and wrong as where it is sure and right, and in training what queries have in common drove `p` to 0 for all of them
before it had learned to tell them apart (docs/log.md). This one vanishes where the policy is right, and ends where `p`
is above a half exactly if embedding at once earns more on average.

Shapes: `Q` queries, `G` rollouts per query.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor

from ...model.engine.decoding import Rollout
from ...model.modes.first import First

logger = logging.getLogger(__name__)

SELDOM = 1e-4
"""A mean probability of embedding at once below which stage 1 has not taught it."""
_LEAST = 1e-4
"""Least probability of writing that is divided by."""


def first_tokens(group_size: int) -> list[First]:
    """What the first token of each reply of a group is."""
    return ["embed", *(["text"] * (group_size - 1))]  # type: ignore[list-item]


def chances(rollouts: Sequence[Rollout], group_size: int) -> list[float]:
    """The probability that the policy embeds at once, `Q`, of rollouts whose first tokens were given, `Q * G`."""
    found = []
    for rollout in rollouts[::group_size]:
        assert rollout.writes is not None, "the first of a group embeds at once"
        found.append(1.0 - rollout.writes)
    return found


def written_tokens(rollouts: Sequence[Rollout], group_size: int) -> int:
    """The tokens of all replies but those that embed at once, embed tokens included."""
    return sum(len(one.completion_ids) for place, one in enumerate(rollouts) if place % group_size)


def decision_advantages(
    rewards: Tensor, at_once: Sequence[float], tokens: float, scale: Literal["group", "batch", "none"]
) -> Tensor:
    """Advantages of the replies that embed at once, `Q`; see the module.

    Args:
        rewards: `Q x G`, the first of each group that of the reply at once.
        at_once: the policy's probability of it, `Q`.
        tokens: that the others of a group wrote, the mean over groups.
        scale: `batch` divides by the root mean square of what it earns more than the written ones; else by 1.

    Example:
        >>> rewards = torch.tensor([[1.0, 0.5, 0.5], [0.0, 0.5, 0.5]])
        >>> decision_advantages(rewards, [0.2, 0.2], 10.0, "none").tolist()
        [5.0, -1.25]
    """
    more = rewards[:, 0] - rewards[:, 1:].mean(-1)
    divisor = more.pow(2).mean().sqrt() + 1e-4 if scale == "batch" else torch.ones(())
    chances = torch.tensor(at_once).clamp(max=1 - _LEAST)
    return tokens * more.where(more > 0, more * chances / (1 - chances)) / divisor


def describe_decision(at_once: Sequence[float], rewards: Sequence[float], group_size: int) -> dict[str, float]:
    """The metrics of a step: how probable it is to embed at once, in how many queries likelier, and what that earns.

    Args:
        at_once: `Q`.
        rewards: `Q * G`.
        group_size: `G`.
    """
    return {
        "at_once_probability": fmean(at_once),
        "at_once_share": fmean(one > 0.5 for one in at_once),
        "at_once_reward": fmean(rewards[::group_size]),
    }


def warn_if_seldom(values: Mapping[str, float]) -> None:
    """Say so where the policy has not been shown that it may embed at once."""
    if values.get("at_once_probability", 1.0) < SELDOM:
        logger.warning(
            "the policy embeds at once with a probability of %.2g: stage 1 has not shown it how; train that with "
            "sft.at_once=0.3",
            values["at_once_probability"],
        )
