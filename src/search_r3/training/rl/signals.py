"""What the rollouts of a step say about stage 2, for `metrics.jsonl` and `rollouts.jsonl`. Pure functions on numbers.

Shapes: `Q` queries, `G` rollouts per query, `D` vector size.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...config import RewardSettings
from ...environment.environment import rollout_vectors
from ...environment.reward import RewardParts
from ...model.engine.decoding import Rollout
from ...retrieval.metrics import probe_cosine
from ...types import Array
from ..engine import Engine
from .decision import describe_decision, warn_if_seldom
from .rollouts import Experience

logger = logging.getLogger(__name__)

LOGGED_GROUPS = 2
KNOWN = 0.75
"""The share of groups without a miss in the first step from which on there is next to nothing to learn."""


def group_signals(parts: Sequence[RewardParts], weights: RewardSettings, group_size: int) -> dict[str, float]:
    """Shares of groups by what their rollouts' nDCG says, and of the rewards' variance within groups by part.

    Args:
        parts: `Q * G`, group by group.
        weights: of the reward.
        group_size: `G`.

    Returns:
        `groups_all_0`, `groups_all_1`, `groups_tied` (all equal, between 0 and 1) and `groups_mixed` sum to 1. Each
        part with a weight has `advantage_share_*`: the covariance of its weighted value with the reward over the
        variance of the reward, both within groups; they sum to 1, or are 0 where no group's rewards differ.
    """
    ndcg = np.array([part.ndcg for part in parts]).reshape(-1, group_size)  # Q x G
    low, high = ndcg.min(axis=1), ndcg.max(axis=1)
    tied = low == high
    values = {
        "groups_all_0": float((high == 0).mean()),
        "groups_all_1": float((low == 1).mean()),
        "groups_tied": float((tied & (high > 0) & (low < 1)).mean()),
        "groups_mixed": float((~tied).mean()),
    }
    weighted = [part.weighted(weights) for part in parts]
    columns = {name: _centred([one[name] for one in weighted], group_size) for name in weighted[0]}
    total = np.sum(list(columns.values()), axis=0)
    variance = float((total**2).sum())
    for name, column in columns.items():
        if getattr(weights, name) > 0 and (name != "custom" or weights.function):
            values[f"advantage_share_{name}"] = float((column * total).sum()) / variance if variance > 1e-12 else 0.0
    return values


def _centred(values: Sequence[float], group_size: int) -> NDArray[np.float64]:
    groups = np.array(values, dtype=np.float64).reshape(-1, group_size)
    centred: NDArray[np.float64] = groups - groups.mean(axis=1, keepdims=True)
    return centred


def group_cosines(vectors: Array, group_size: int) -> list[float]:
    """The mean cosine between different rollouts of each group, of vectors `Q*G x D`."""
    return [probe_cosine(vectors[start : start + group_size]) for start in range(0, len(vectors), group_size)]


def describe(experience: Experience, engine: Engine, weights: RewardSettings, group_size: int) -> dict[str, float]:
    """The metrics of the rollouts of all processes (docs/metrics.md)."""
    own = (
        [  # and no tensor
            (one.forced, one.reasoning_tokens, len(one.prompt_ids), *_sampled(one)) for one in experience.rollouts
        ],
        [(one.parts, one.cosine) for one in experience.feedback.scores],
        experience.feedback.rewards,
        group_cosines(rollout_vectors(experience.rollouts), group_size),
        [score.parts.total(weights) for score in experience.direct_scores],
        experience.at_once,
        [experience.rollout_seconds],
    )
    everyone = zip(*engine.communicator.all_gather(own), strict=True)
    rollouts, scores, rewards, cosines, direct, at_once, seconds = (
        [one for part in column for one in part] for column in everyone
    )
    forced, lengths, prompts, sampled, logprobs = zip(*rollouts, strict=True)
    parts = [part for part, _ in scores]
    values = {f"reward_{name}": fmean(getattr(part, name) for part in parts) for name in asdict(parts[0])}
    values |= {"reward": fmean(rewards), "share_ge_half": fmean(part.ndcg >= 0.5 for part in parts)}
    values |= {"positive_cosine": fmean(cosine for _, cosine in scores), "group_cosine": fmean(cosines)}
    values |= group_signals(parts, weights, group_size)
    values |= {"equal_reward_share": experience.equal_share, "redrawn_groups": experience.redrawn}
    if direct:
        values["direct_reward"] = fmean(direct)
    if at_once:
        values |= describe_decision(at_once, rewards, group_size)
    values |= {"forced_share": fmean(forced), "entropy_estimate": -sum(logprobs) / max(sum(sampled), 1)}
    values |= {"reasoning_tokens": fmean(lengths), "reasoning_tokens_max": max(lengths)}
    decoded, slowest = sum(lengths) + len(lengths), max(seconds)  # with the embed tokens; the others wait for it
    values |= {"tokens": decoded + sum(prompts), "decoded_tokens_per_second": decoded / slowest if slowest else 0.0}
    return values | {"rollout_seconds": slowest} | experience.feedback.refresh.metrics()


def _sampled(rollout: Rollout) -> tuple[int, float]:
    """Tokens that were sampled, and the sum of their log-probabilities; an embed token that was given is none."""
    return (sum(rollout.completion_mask), sum(rollout.logprobs)) if rollout.writes is None else (0, 0.0)


def warn_if_known(values: Mapping[str, float], weights: RewardSettings) -> None:
    """Say so where the first step shows that there is next to nothing to learn."""
    warn_if_seldom(values)
    if values["groups_all_1"] >= KNOWN and weights.contrastive == 0:
        logger.warning(
            "%.0f %% of the first step's queries are found by every rollout: the model knows them, and what is left to "
            "learn is to say less; set grpo.reward.contrastive=0.5, or give stage 2 queries that stage 1 has not seen "
            "(grpo.splits)",
            100 * values["groups_all_1"],
        )


def rollout_rows(experience: Experience, step: int, group_size: int) -> list[dict[str, Any]]:
    """Rows for `rollouts.jsonl`: the first groups of the step, whole."""
    rows = []
    for place in range(min(LOGGED_GROUPS * group_size, len(experience.rollouts))):
        rollout, query = experience.rollouts[place], experience.queries[place]
        rows.append(
            {
                "stage": "grpo",
                "step": step,
                "query_id": query.query_id,
                "query": query.text,
                "reasoning": rollout.reasoning,
                "reasoning_tokens": rollout.reasoning_tokens,
                "forced": rollout.forced,
                "reward": experience.feedback.rewards[place],
                "parts": asdict(experience.feedback.parts[place]),
                "best_rank": experience.feedback.best_ranks[place],
                "advantage": float(experience.advantages[place]),
            }
        )
    return rows
