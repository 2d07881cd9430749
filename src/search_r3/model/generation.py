"""Reason-then-embed decoding: the model writes its reasoning, then the embed token, whose hidden state is the vector.

One loop serves training, evaluation and search. Each rollout draws its own random numbers from its own seed, so what
it samples does not depend on which other rollouts share its batch.

Shapes: `B` rollouts, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ModelError
from .backbone import Backbone, pad, position_ids, vectors_at


@dataclass(frozen=True)
class Rollout:
    """One reply. `completion_ids` end with the embed token, emitted or forced.

    Attributes:
        prompt_ids: ids of the prompt.
        completion_ids: ids of the reply, the embed token last.
        completion_mask: 1 for a token that the model chose, 0 for a forced embed token.
        logprobs: log-probability of each completion token under the sampling distribution (0 where the mask is 0).
        vector: the search embedding, `D`, float32, L2-normalised.
        reasoning: the reply's text without special tokens.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    completion_mask: list[int]
    logprobs: list[float]
    vector: Tensor
    reasoning: str

    @property
    def forced(self) -> bool:
        """Whether the embed token had to be forced."""
        return self.completion_mask[-1] == 0

    @property
    def reasoning_tokens(self) -> int:
        """Tokens before the embed token."""
        return len(self.completion_ids) - 1


@torch.no_grad()
def generate_rollouts(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling_temperature: float = 0.0,
    seeds: Sequence[int] | None = None,
    batch_size: int = 128,
    progress: Callable[[int], None] | None = None,
) -> list[Rollout]:
    """Let the model reply to each prompt until it emits the embed token.

    Args:
        backbone: the model.
        prompts: prompt ids (from `PromptEncoder.encode(..., "reason")`).
        max_new_tokens: budget of a reply, the embed token included. A reply that has not emitted the embed token by
            then, or that ends its turn without it, gets the token forced.
        sampling_temperature: 0 decodes greedily (log-probabilities are then at temperature 1).
        seeds: one seed per prompt; needed when the temperature is above 0.
        batch_size: rollouts decoded together.
        progress: called with the number of rollouts finished, after each batch.

    Returns:
        One rollout per prompt, in the order of the prompts.

    Raises:
        ModelError: a prompt and its budget do not fit into the model's context, or a logit is not finite.
    """
    if sampling_temperature > 0 and (seeds is None or len(seeds) != len(prompts)):
        raise ValueError("sampling needs one seed per prompt")
    longest = max((len(prompt) for prompt in prompts), default=0)
    if longest + max_new_tokens > backbone.context_length:
        raise ModelError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the model's context of "
            f"{backbone.context_length} tokens; lower max_new_tokens or max_length"
        )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    rollouts: list[Rollout | None] = [None] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch_seeds = [seeds[i] for i in rows] if seeds is not None else None
        batch = _Batch(backbone, [list(prompts[i]) for i in rows], max_new_tokens, sampling_temperature, batch_seeds)
        for i, rollout in zip(rows, batch.run(), strict=True):
            rollouts[i] = rollout
        if progress is not None:
            progress(len(rows))
    return [rollout for rollout in rollouts if rollout is not None]


class _Batch:
    """The state of one batch: rows leave it as soon as their vector is known."""

    def __init__(
        self,
        backbone: Backbone,
        prompts: list[list[int]],
        max_new_tokens: int,
        temperature: float,
        seeds: Sequence[int] | None,
    ) -> None:
        self.backbone, self.prompts, self.budget, self.temperature = (
            backbone,
            prompts,
            max_new_tokens,
            temperature,
        )
        self.completions: list[list[int]] = [[] for _ in prompts]
        self.masks: list[list[int]] = [[] for _ in prompts]
        self.logprobs: list[list[float]] = [[] for _ in prompts]
        self.vectors: list[Tensor | None] = [None] * len(prompts)
        self.uniforms = _uniforms(seeds, max_new_tokens) if temperature > 0 and seeds is not None else None

    def run(self) -> list[Rollout]:
        from transformers import DynamicCache

        backbone = self.backbone
        ids, mask = pad(self.prompts, backbone.tokenizer.pad_token_id, backbone.device, left=True)
        positions = position_ids(mask)
        cache = DynamicCache(config=backbone.model.config)
        rows = list(range(len(self.prompts)))  # batch row -> rollout
        while True:
            output = backbone.model.base_model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            hidden = output.last_hidden_state[:, -1]  # B x D
            keep = self._take_vectors(rows, hidden)
            if not keep:
                return [self._rollout(i) for i in range(len(self.prompts))]
            if len(keep) < len(rows):
                kept = torch.tensor(keep, device=hidden.device)
                cache.batch_select_indices(kept)
                hidden, mask, positions = hidden[kept], mask[kept], positions[kept]
                rows = [rows[i] for i in keep]
            ids = self._choose(rows, backbone.logits(hidden))
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=-1)
            positions = positions[:, -1:] + 1

    def _take_vectors(self, rows: list[int], hidden: Tensor) -> list[int]:
        """Store the vectors of rows whose last input was the embed token; return the batch rows that go on."""
        keep = []
        for position, row in enumerate(rows):
            completion = self.completions[row]
            if completion and completion[-1] == self.backbone.embed_token_id:
                self.vectors[row] = vectors_at(hidden[position : position + 1, None], hidden.new_zeros(1).long())[0]
            else:
                keep.append(position)
        return keep

    def _choose(self, rows: list[int], logits: Tensor) -> Tensor:
        """Append one token to every row and return them as the next input, `B x 1`."""
        logprobs = torch.log_softmax(logits / (self.temperature or 1.0), dim=-1)  # B x V
        if not torch.isfinite(logprobs.amax(-1)).all():
            raise ModelError("the model's logits are not finite; its weights hold NaN or infinity")
        if self.uniforms is None:
            chosen = logprobs.argmax(-1)
        else:
            draws = torch.stack([self.uniforms[row, len(self.completions[row])] for row in rows]).to(logits.device)
            chosen = _inverse_cdf(logprobs, draws)
        picked = logprobs.gather(-1, chosen[:, None])[:, 0].tolist()
        embed, end = self.backbone.embed_token_id, self.backbone.prompt_encoder.end_token_id
        tokens = chosen.tolist()
        for i, row in enumerate(rows):
            completion = self.completions[row]
            ended = bool(completion) and completion[-1] == end
            # The budget counts the embed token, so the last place is its own: sampled if the model chose it.
            out_of_budget = len(completion) == self.budget - 1 and tokens[i] != embed
            if ended or out_of_budget:
                tokens[i] = embed
            completion.append(tokens[i])
            self.masks[row].append(0 if ended or out_of_budget else 1)
            self.logprobs[row].append(0.0 if ended or out_of_budget else picked[i])
        return torch.tensor(tokens, device=logits.device)[:, None]

    def _rollout(self, row: int) -> Rollout:
        vector = self.vectors[row]
        assert vector is not None
        text = self.backbone.prompt_encoder.decode(self.completions[row])
        completion, mask, logprobs = self.completions[row], self.masks[row], self.logprobs[row]
        return Rollout(self.prompts[row], completion, mask, logprobs, vector, text)


def _uniforms(seeds: Sequence[int], length: int) -> Tensor:
    """Uniform numbers in [0, 1), one row per seed, float64: `B x length`."""
    return torch.stack(
        [torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def _inverse_cdf(logprobs: Tensor, draws: Tensor) -> Tensor:
    """The token at which the cumulative probability first exceeds each draw, `B`."""
    cumulative = logprobs.double().exp().cumsum(-1)
    targets = (draws * cumulative[:, -1]).unsqueeze(-1)
    chosen: Tensor = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    return chosen.clamp(max=logprobs.shape[-1] - 1)


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
