"""Who writes rollouts: the decoder of this package, or anything that gives token ids with their log-probabilities.

A sampler that holds a copy of the model, on other hardware or in other arithmetic, gives no vectors. They are read from
one forward pass over whole replies, which also gives the model's own log-probabilities: the ratio of PPO is taken to
these, and what the sampler said serves to weigh tokens that it drew from a slightly different distribution.

Shapes: `B` replies, `T` tokens, `D` hidden size, `S` positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ...config import Recipe
from ...errors import ConfigError, RunError
from ...model.backbone import Backbone
from ...model.encoder import SearchR3
from ...model.engine.decoding import Decoder, DecodeRequest, Rollout
from ...model.engine.forward import length_batches, sequence_states
from ...parallel import agree
from .. import losses
from ..engine import Engine
from ..saving import policy_state, save_policy, save_policy_adapters

PASS_TOKENS = 4096
"""Tokens of replies that are read together, padding included."""
LOGIT_ROWS = 256
"""Positions whose logits are held at once: all of them would take gigabytes at a vocabulary of 150,000."""


@dataclass(frozen=True)
class SampledReply:
    """What a sampler wrote after a prompt.

    Attributes:
        token_ids: ids; what stands behind an embed token, or a token that ends the turn, does not count.
        logprobs: of each, over the whole vocabulary, at the request's temperature.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[float]


@dataclass(frozen=True)
class PolicyWeights:
    """The weights that are being trained, for a sampler that holds a copy of them.

    Every process has to call each method; the weights of all shards come together in the first one.

    Attributes:
        version: steps that these weights have learned from.
    """

    engine: Engine
    model: SearchR3
    recipe: Recipe
    version: int

    def state_dict(self) -> dict[str, Tensor]:
        """The weights by the names that transformers (or, of adapters, peft) gives them; whole in the first process."""
        return policy_state(self.engine, self.model.backbone)

    def save(self, folder: Path) -> None:
        """Write a model directory, whole, adapters merged.

        Raises:
            RunError: it cannot be written.
        """
        dtype = "bfloat16" if self.recipe.mixed_precision == "bf16" else None
        save_policy(self.engine, self.model.backbone, self.recipe, folder, dtype)

    def save_adapters(self, folder: Path) -> None:
        """Write LoRA matrices alone, as peft does, without the embed token's row.

        Raises:
            ConfigError: there are no adapters.
            RunError: they cannot be written.
        """
        if not self.recipe.lora.rank:
            raise ConfigError("adapters are to be sampled with, and lora.rank is 0; have whole models loaded")
        save_policy_adapters(self.engine, self.model.backbone, folder)

    def in_first(self, work: Callable[[], None], what: Path, verb: str = "write") -> None:
        """Do something in the first process, while the others wait; where it fails, all raise.

        Raises:
            RunError: it failed.
        """
        agree(self.engine.communicator, what, work if self.engine.rank == 0 else lambda: None, verb)


class RolloutSampler(Protocol):
    """Writes replies to prompts. With several processes each has one, and asks it for its own share."""

    def sample(self, requests: Sequence[DecodeRequest]) -> Sequence[SampledReply | Rollout]:
        """A reply to each request, in their order; a `Rollout` where the sampler reads the vector itself.

        Raises:
            RunError: there is none; the message names the remedy.
        """
        ...

    def update(self, weights: PolicyWeights) -> None:
        """Called before each step, and first of all after a resumption: a copy of the model may take these over."""
        ...


class LocalSampler:
    """The model itself, decoded here.

    Args:
        model: writes, and reads its vectors from its last steps.
        batch_size: replies decoded at once.
    """

    def __init__(self, model: SearchR3, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size

    def sample(self, requests: Sequence[DecodeRequest]) -> list[Rollout]:
        """See `RolloutSampler`."""
        return Decoder(self.model.backbone, self.batch_size).run(requests)

    def update(self, weights: PolicyWeights) -> None:
        """See `RolloutSampler`; nothing to do."""


def complete(
    model: SearchR3, requests: Sequence[DecodeRequest], replies: Sequence[SampledReply | Rollout]
) -> list[Rollout]:
    """Rollouts of what a sampler wrote, those that have no vector read by the model as it is now.

    Replies end by the decoder's rule: with the embed token, which is forced, with the mask 0, where the turn would end
    without it or the budget is used up.

    Raises:
        RunError: a reply is neither ended nor as long as its budget, has no log-probability for a token, or the model's
            states are not finite.
    """
    if len(replies) != len(requests):
        raise RunError(f"the sampler gave {len(replies)} replies to {len(requests)} prompts; mend the sampler")
    backbone = model.backbone
    written = [
        _Written(place, request, *_ended(backbone, request, reply, place))
        for place, (request, reply) in enumerate(zip(requests, replies, strict=True))
        if isinstance(reply, SampledReply)
    ]
    rollouts: dict[int, Rollout] = {}
    for batch in length_batches([one.sequence for one in written], PASS_TOKENS):
        some = [written[i] for i in batch]
        for one, vector, logprobs in zip(some, *_read(backbone, some), strict=True):
            if not vector.isfinite().all():
                raise RunError(
                    "the model's states are not finite in a reply of the sampler; the last checkpoint is intact: lower "
                    "grpo.learning_rate and go on with --resume"
                )
            own = [value if chosen else 0.0 for value, chosen in zip(logprobs, one.mask, strict=True)]
            rollouts[one.place] = Rollout(
                *(list(one.request.prompt_ids), one.token_ids, one.mask, own, vector),
                reasoning=backbone.prompt_encoder.decode(one.token_ids),
                sampler_logprobs=one.logprobs,
            )
    return [
        rollouts[place] if isinstance(reply, SampledReply) else reply
        for place, reply in enumerate(replies)
    ]  # fmt: skip


@dataclass(frozen=True)
class _Written:
    """A reply with the embed token last; the log-probabilities are the sampler's, 0 where the token was forced."""

    place: int
    request: DecodeRequest
    token_ids: list[int]
    mask: list[int]
    logprobs: list[float]

    @property
    def sequence(self) -> list[int]:
        """The prompt and the reply."""
        return [*self.request.prompt_ids, *self.token_ids]


def _ended(
    backbone: Backbone, request: DecodeRequest, reply: SampledReply, place: int
) -> tuple[list[int], list[int], list[float]]:
    """Ids with the embed token last, their mask, and the sampler's log-probabilities, 0 where it was forced."""
    ids, logprobs, budget = list(reply.token_ids), list(reply.logprobs), request.max_new_tokens
    if len(ids) != len(logprobs):
        raise RunError(
            f"reply {place} of the sampler has {len(ids)} tokens and {len(logprobs)} log-probabilities; it has to give "
            "one for each token"
        )
    embed, ends = backbone.embed_token_id, backbone.prompt_encoder.end_token_ids
    last = next((i for i, token in enumerate(ids[:budget]) if token == embed or token in ends), budget - 1)
    if last >= len(ids):
        raise RunError(
            f"reply {place} of the sampler stops after {len(ids)} tokens, without the embed token ({embed}), an end of "
            f"the turn ({', '.join(map(str, sorted(ends)))}) or the {budget} tokens of its budget; it has to know "
            "these ids as ends and to have room for the budget"
        )
    chosen = ids[last] == embed
    return [*ids[:last], embed], [1] * last + [int(chosen)], [*logprobs[:last], logprobs[last] if chosen else 0.0]


@torch.no_grad()
def _read(backbone: Backbone, written: Sequence[_Written]) -> tuple[list[Tensor], list[list[float]]]:
    """The vectors, each `D`, on the CPU, and the log-probabilities of the replies' tokens."""
    sequences = [one.sequence for one in written]
    hidden = sequence_states(backbone, sequences)  # B x T x D
    rows = torch.arange(len(sequences), device=hidden.device)
    last = torch.tensor([len(ids) - 1 for ids in sequences], device=hidden.device)
    vectors = backbone.vectors(hidden[rows, last]).cpu()
    logprobs = []
    for row, one in enumerate(written):
        start, end = len(one.request.prompt_ids) - 1, len(sequences[row]) - 1
        tokens = torch.tensor(one.token_ids, device=hidden.device)  # S
        parts = [
            losses.chosen_logprobs(backbone.logits(states), chosen, one.request.temperature or 1.0)
            for states, chosen in zip(
                torch.split(hidden[row, start:end], LOGIT_ROWS), torch.split(tokens, LOGIT_ROWS), strict=True
            )
        ]
        logprobs.append(torch.cat(parts).tolist())
    return list(vectors), logprobs
