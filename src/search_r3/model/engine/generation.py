"""Rollouts: reason-then-embed replies, and their layout for a teacher-forced pass with gradients.

Shapes: `B` rollouts, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backbone import Backbone, pad
from .decoding import Decoder, DecodeRequest, Rollout


def generate_rollouts(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    sampling_temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    batch_size: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> list[Rollout]:
    """Let the model reply to each prompt until it emits the embed token (see `DecodeRequest` for the settings).

    Args:
        backbone: the model.
        prompts: prompt ids (from `PromptEncoder.encode(..., "reason")`).
        max_new_tokens: budget of a reply, the embed token included; one for all or one per prompt.
        sampling_temperature: 0 decodes greedily (log-probabilities are then at temperature 1).
        top_p: sample among the likeliest tokens that together reach this probability.
        seeds: one seed per prompt; needed when the temperature is above 0.
        batch_size: rollouts decoded at once; it does not change them.
        progress: called with the numbers of rollouts finished, and of their tokens, since the last call.

    Returns:
        One rollout per prompt, in the order of the prompts.

    Raises:
        ModelError: a prompt and its budget do not fit into the model's context, or a logit is not finite.
    """
    if sampling_temperature > 0 and (seeds is None or len(seeds) != len(prompts)):
        raise ValueError("sampling needs one seed per prompt")
    budgets = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    requests = [
        DecodeRequest(prompt, budget, sampling_temperature, top_p, None if seeds is None else seeds[place])
        for place, (prompt, budget) in enumerate(zip(prompts, budgets, strict=True))
    ]
    return Decoder(backbone, batch_size).run(requests, progress)


@dataclass(frozen=True)
class SequenceBatch:
    """Rollouts as right-padded tensors for a teacher-forced pass.

    Attributes:
        ids: `B x T`.
        mask: `B x T`, 1 where there is a token.
        sampled: `B x T`, True at the position that *predicts* a token which the model chose.
        sampler_logprobs: `B x T`, the log-probability of that token while sampling, at the same position.
        embed_positions: `B`, where the embed token stands.
    """

    ids: Tensor
    mask: Tensor
    sampled: Tensor
    sampler_logprobs: Tensor
    embed_positions: Tensor


def sequence_batch(backbone: Backbone, rollouts: Sequence[Rollout]) -> SequenceBatch:
    """Lay rollouts out for a forward pass with gradients."""
    sequences = [[*rollout.prompt_ids, *rollout.completion_ids] for rollout in rollouts]
    ids, mask = pad(sequences, backbone.tokenizer.pad_token_id, backbone.device)
    sampled = torch.zeros(ids.shape, dtype=torch.bool)
    logprobs = torch.zeros(ids.shape)
    for row, rollout in enumerate(rollouts):
        start = len(rollout.prompt_ids) - 1
        stop = start + len(rollout.completion_ids)
        sampled[row, start:stop] = torch.tensor(rollout.completion_mask, dtype=torch.bool)
        logprobs[row, start:stop] = torch.tensor(rollout.logprobs)
    return SequenceBatch(ids, mask, sampled.to(ids.device), logprobs.to(ids.device), mask.sum(-1) - 1)
