"""The layout of rollouts for a teacher-forced pass with gradients.

Shapes: `B` rollouts, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backbone import Backbone, pad
from .decoding import Rollout


@dataclass(frozen=True)
class SequenceBatch:
    """Rollouts as right-padded tensors for a teacher-forced pass.

    Attributes:
        ids: `B x T`.
        mask: `B x T`, 1 where there is a token.
        sampled: `B x T`, True at the position that *predicts* a token which the model chose.
        logprobs: `B x T`, the log-probability of that token before the update, at the same position.
        sampler_logprobs: the same as the sampler said, which differs only where that is not this model's decoder.
        embed_positions: `B`, where the embed token stands.
    """

    ids: Tensor
    mask: Tensor
    sampled: Tensor
    logprobs: Tensor
    sampler_logprobs: Tensor
    embed_positions: Tensor


def sequence_batch(backbone: Backbone, rollouts: Sequence[Rollout]) -> SequenceBatch:
    """Lay rollouts out for a forward pass with gradients."""
    sequences = [[*rollout.prompt_ids, *rollout.completion_ids] for rollout in rollouts]
    ids, mask = pad(sequences, backbone.tokenizer.pad_token_id, backbone.device)
    sampled = torch.zeros(ids.shape, dtype=torch.bool)
    logprobs, theirs = torch.zeros(ids.shape), torch.zeros(ids.shape)
    for row, rollout in enumerate(rollouts):
        start = len(rollout.prompt_ids) - 1
        stop = start + len(rollout.completion_ids)
        sampled[row, start:stop] = torch.tensor(rollout.completion_mask, dtype=torch.bool)
        logprobs[row, start:stop] = torch.tensor(rollout.logprobs)
        said = rollout.logprobs if rollout.sampler_logprobs is None else rollout.sampler_logprobs
        theirs[row, start:stop] = torch.tensor(said)
    device = ids.device
    return SequenceBatch(
        ids, mask, sampled.to(device), logprobs.to(device), theirs.to(device), embed_positions=mask.sum(-1) - 1
    )
