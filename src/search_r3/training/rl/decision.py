"""Whether to write at all, as stage 2 learns it: the first token of a reply (mode auto of a model that decides).

Of each group one reply embeds at once and the others write, whatever the policy would have drawn. So the expectation
over this decision is taken exactly: with `p` the probability of the embed token as first token,

    J = p R(at once) + (1 - p) E[R | written],

whose gradient is the policy gradient of a group in which the first reply stands for `p G` replies and each of the
others for `(1 - p) G / (G - 1)`. Their log-probabilities are those of the whole policy, the decision included; so
forcing adds no bias, less variance is left, and neither choice dies out of the groups. What the policy never does (p
near 0) it does not learn either: stage 1 teaches it first (`sft.at_once`).

Shapes: `Q` queries, `G` rollouts per query.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from ...model.engine.decoding import Rollout
from ...model.modes.first import First

logger = logging.getLogger(__name__)

SELDOM = 0.01
"""A mean probability of embedding at once below which there is hardly anything to learn from."""


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


def standing(at_once: Sequence[float], group_size: int) -> Tensor:
    """How many replies each one stands for, `Q x G`; their mean in each group is 1.

    Example:
        >>> standing([0.5, 0.0], 3).tolist()
        [[1.5, 0.75, 0.75], [0.0, 1.5, 1.5]]
    """
    first = torch.tensor(at_once)[:, None] * group_size
    return torch.cat([first, ((group_size - first) / (group_size - 1)).expand(-1, group_size - 1)], dim=1)


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
    """Say so where the policy hardly ever embeds at once, and so cannot learn when to."""
    if values.get("at_once_probability", 1.0) < SELDOM:
        logger.warning(
            "the policy embeds at once with a probability of %.2g, so it hardly learns when to; train stage 1 with "
            "sft.at_once=0.3",
            values["at_once_probability"],
        )
