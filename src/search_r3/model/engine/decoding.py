"""Continuous batching of reason-then-embed: a finished reply leaves its slot and a waiting one takes it.

The vector is read from the decoding step that takes the embed token in, so there is no second forward pass. What
prompts begin with together, and a prompt that several requests share, is computed once. Each request draws its random
numbers from its own seed, so its reply does not depend on which other requests are decoded beside it.

Shapes: `B` sequences in work, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from ...errors import ModelError
from ...types import Progress
from ..backbone import Backbone
from .forward import Prefix, SlotAttention, SlotCache, compute_prefix, last_hidden, length_batches, prefill
from .sampling import choose_tokens

# Tokens of prompts that are computed together; it bounds memory and does not change results.
PREFILL_TOKENS = 4096


@dataclass(frozen=True)
class DecodeRequest:
    """What is asked of the decoder.

    Attributes:
        prompt_ids: ids of the prompt.
        max_new_tokens: budget of the reply, the embed token included. A reply that has not emitted the embed token by
            then, or that ends its turn without it, gets the token forced. With 0 the prompt itself ends with the embed
            token (direct mode) and there is no reply.
        temperature: 0 decodes greedily (log-probabilities are then at temperature 1).
        top_p: sample among the likeliest tokens that together reach this probability.
        seed: where this reply's random numbers start; needed when the temperature is above 0.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt_ids or self.max_new_tokens < 0:
            raise ValueError("a request needs a prompt, and max_new_tokens of at least 0")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature={self.temperature}, top_p={self.top_p}: expected >= 0, and above 0 up to 1")
        if self.temperature > 0 and self.seed is None:
            raise ValueError("sampling needs a seed")


@dataclass(frozen=True)
class Rollout:
    """One reply. `completion_ids` end with the embed token, emitted or forced (empty for a direct request).

    Attributes:
        prompt_ids: ids of the prompt.
        completion_ids: ids of the reply, the embed token last.
        completion_mask: 1 for a token that the model chose, 0 for a forced embed token.
        logprobs: log-probability of each completion token at the request's temperature, over the whole vocabulary (0
            where the mask is 0).
        vector: the search embedding, `D`, float32, L2-normalised, on the CPU.
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
        return bool(self.completion_mask) and self.completion_mask[-1] == 0

    @property
    def reasoning_tokens(self) -> int:
        """Tokens before the embed token."""
        return max(0, len(self.completion_ids) - 1)


@dataclass(eq=False)
class _Row:
    """A request with what has been decoded of it."""

    ticket: int
    request: DecodeRequest
    prompt: tuple[int, ...]
    uniforms: list[float]
    completion: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens whose keys and values are stored: all but the newest."""
        return len(self.prompt) + len(self.completion) - 1


@dataclass(frozen=True)
class _Prompt:
    """A computed prompt: keys and values after its prefix, and the final norm's output at its end."""

    prefix: Prefix | None
    values: Tensor  # L x 2 x h x T x d
    hidden: Tensor  # D


class Decoder:
    """Decodes many requests at once. One thread at a time may call it.

    Args:
        backbone: the model; its weights must not change while requests are in work.
        slots: how many replies are decoded at once.

    Example:
        >>> from search_r3 import SearchR3
        >>> from search_r3.model.engine.decoding import Decoder, DecodeRequest
        >>> backbone = SearchR3("builtin", device="cpu").backbone
        >>> prompt = backbone.prompt_encoder.encode("what do people pay with in Tashkent?", "reason").ids
        >>> [rollout] = Decoder(backbone).run([DecodeRequest(prompt, max_new_tokens=8)])
        >>> rollout.reasoning_tokens <= 7, rollout.vector.shape
        (True, torch.Size([128]))
    """

    def __init__(self, backbone: Backbone, slots: int = 128) -> None:
        if slots < 1:
            raise ValueError(f"slots={slots}: expected at least 1")
        self.backbone, self.slots = backbone, slots
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []  # row i holds slot i
        self._cache: SlotCache | None = None
        self._prefixes: dict[tuple[int, ...], Prefix] = {}
        self._prompts: dict[tuple[int, ...], _Prompt] = {}
        self._tickets = 0

    def submit(self, request: DecodeRequest) -> int:
        """Queue a request and return its ticket.

        Raises:
            ModelError: the prompt and its budget do not fit into the model's context.
            ValueError: there is neither a budget nor an embed token at the prompt's end.
        """
        if request.max_new_tokens == 0 and request.prompt_ids[-1] != self.backbone.embed_token_id:
            raise ValueError("max_new_tokens=0 needs a prompt that ends with the embed token (direct mode)")
        longest = len(request.prompt_ids) + request.max_new_tokens
        if longest > self.backbone.context_length:
            raise ModelError(
                f"a prompt of {len(request.prompt_ids)} tokens and max_new_tokens={request.max_new_tokens} exceed the "
                f"model's context of {self.backbone.context_length} tokens; lower max_new_tokens or max_length"
            )
        self._tickets += 1
        draws = _uniforms(request.seed, request.max_new_tokens) if request.temperature > 0 else []
        self._waiting.append(_Row(self._tickets, request, tuple(request.prompt_ids), draws))
        return self._tickets

    def cancel(self, ticket: int) -> bool:
        """Drop a request, waiting or in work, and free its slot; False if it is not here (any more)."""
        for row in [*self._waiting, *self._rows]:
            if row.ticket == ticket:
                if row in self._rows:
                    self._free([self._rows.index(row)])
                else:
                    self._waiting.remove(row)
                self._forget_prompts()
                return True
        return False

    def reply(self, ticket: int) -> list[int]:
        """The ids that a request in work has so far (empty for one that waits or is gone)."""
        return next((list(row.completion) for row in self._rows if row.ticket == ticket), [])

    def __len__(self) -> int:
        """Requests waiting or in work."""
        return len(self._waiting) + len(self._rows)

    def run(self, requests: Sequence[DecodeRequest], progress: Progress | None = None) -> list[Rollout]:
        """Decode requests to their ends, in their order.

        Args:
            requests: what is asked.
            progress: called with the numbers of requests finished, and tokens of their replies, since the last call.

        Raises:
            ModelError: a request does not fit into the context, or a logit is not finite.
        """
        tickets = [self.submit(request) for request in requests]
        rollouts: dict[int, Rollout] = {}
        while len(rollouts) < len(tickets):
            news = self.step()
            rollouts.update(news)
            if news and progress is not None:
                progress(len(news), sum(len(rollout.completion_ids) for _, rollout in news))
        return [rollouts[ticket] for ticket in tickets]

    @torch.no_grad()
    def step(self) -> list[tuple[int, Rollout]]:
        """Take waiting requests in if slots are free, and give every request in work one more token.

        Returns:
            Tickets and rollouts of the requests that ended in this step.

        Raises:
            ModelError: a logit is not finite; its weights hold NaN or infinity.
        """
        results = self._decode() if self._rows else []
        free = self.slots - len(self._rows)
        # A prompt costs a forward pass of its own: under a long queue a few slots are collected before they are filled.
        if self._waiting and free >= min(len(self._waiting), max(1, self.slots // 8)):
            results += self._admit([self._waiting.popleft() for _ in range(min(free, len(self._waiting)))])
        return results

    def _decode(self) -> list[tuple[int, Rollout]]:
        """One forward pass over all rows in work."""
        cache, rows, device = self._cache, self._rows, self.backbone.device
        assert cache is not None
        lengths = [row.length for row in rows]
        cache.reserve(len(rows), max(lengths) + 1)
        attention = SlotAttention(cache, lengths)
        ids = torch.tensor([row.completion[-1] for row in rows], device=device)[:, None]
        places = attention.lengths[:, None]
        hidden = last_hidden(self.backbone.causal_lm, ids, places, torch.zeros_like(places[:, 0]), attention)
        embed = self.backbone.embed_token_id
        last = [i for i, row in enumerate(rows) if row.completion[-1] == embed]
        results = self._finish([rows[i] for i in last], hidden[last])
        rest = [i for i, row in enumerate(rows) if row.completion[-1] != embed]
        self._choose([rows[i] for i in rest], hidden[rest])
        self._free(last)
        return results

    def _free(self, slots: list[int]) -> None:
        """Give slots back; the last rows move into the gaps, so that rows in work are always the first slots."""
        assert self._cache is not None
        for slot in sorted(slots, reverse=True):
            last = len(self._rows) - 1
            if slot != last:
                self._cache.move(last, slot)
                self._rows[slot] = self._rows[last]
            self._rows.pop()

    def _admit(self, rows: list[_Row]) -> list[tuple[int, Rollout]]:
        """Compute prompts, put rows that reply into slots and choose their first tokens."""
        self._compute({row.prompt for row in rows} - self._prompts.keys())
        hidden = torch.stack([self._prompts[row.prompt].hidden for row in rows])
        direct = [i for i, row in enumerate(rows) if row.request.max_new_tokens == 0]
        results = self._finish([rows[i] for i in direct], hidden[direct])
        rest = [i for i, row in enumerate(rows) if row.request.max_new_tokens > 0]
        if rest:
            newcomers = [rows[i] for i in rest]
            self._store(newcomers)
            self._choose(newcomers, hidden[rest])
        self._forget_prompts()
        return results

    def _store(self, rows: list[_Row]) -> None:
        """Write the rows' prompts into free slots."""
        if self._cache is None:
            self._cache = SlotCache(self.backbone.causal_lm)
        slots: dict[tuple[int, ...], list[int]] = {}
        for row in rows:
            slots.setdefault(row.prompt, []).append(len(self._rows))
            self._rows.append(row)
        self._cache.reserve(len(self._rows), max(map(len, slots)) + 1)
        for ids, places in slots.items():
            prompt, start = self._prompts[ids], 0
            if prompt.prefix is not None:
                start = len(prompt.prefix.ids)
                self._cache.write(places, 0, prompt.prefix.values)
            self._cache.write(places, start, prompt.values)

    def _compute(self, prompts: set[tuple[int, ...]]) -> None:
        """Keys, values and last hidden states of prompts, those of like length together."""
        by_prefix: dict[Prefix | None, list[tuple[int, ...]]] = {}
        for ids in sorted(prompts):
            by_prefix.setdefault(self._prefix_of(ids, len(prompts)), []).append(ids)
        for prefix, group in by_prefix.items():
            rest = [ids[len(prefix.ids) if prefix is not None else 0 :] for ids in group]
            for batch in length_batches(rest, PREFILL_TOKENS):
                hidden, cache = prefill(self.backbone.causal_lm, [rest[i] for i in batch], prefix, keep=True)
                assert cache is not None
                for row, place in enumerate(batch):
                    values = cache[:, :, row, :, : len(rest[place])]
                    self._prompts[group[place]] = _Prompt(prefix, values, hidden[row])

    def _prefix_of(self, ids: tuple[int, ...], company: int) -> Prefix | None:
        """The template before the text, computed when a second prompt can use it."""
        template = self.backbone.prompt_encoder.prefix_of(ids)
        if template not in self._prefixes and company > 1:
            self._prefixes[template] = compute_prefix(self.backbone.causal_lm, template)
        return self._prefixes.get(template)

    def _forget_prompts(self) -> None:
        """Keep only the prompts for which another request waits."""
        waiting = {row.prompt for row in self._waiting}
        self._prompts = {ids: prompt for ids, prompt in self._prompts.items() if ids in waiting}

    def _choose(self, rows: list[_Row], hidden: Tensor) -> None:
        """Append one token to every row."""
        if not rows:
            return
        requests = [row.request for row in rows]
        draws = [row.uniforms[len(row.completion)] if row.uniforms else 0.0 for row in rows]
        tokens, logprobs = choose_tokens(
            self.backbone.logits(hidden),
            [request.temperature for request in requests],
            [request.top_p for request in requests],
            draws,
        )
        embed, end = self.backbone.embed_token_id, self.backbone.prompt_encoder.end_token_id
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            end_of_turn = bool(row.completion) and row.completion[-1] == end
            # The budget counts the embed token, so the last place is its own: sampled if the model chose it.
            out_of_budget = len(row.completion) == row.request.max_new_tokens - 1 and token != embed
            forced = end_of_turn or out_of_budget
            row.completion.append(embed if forced else token)
            row.mask.append(0 if forced else 1)
            row.logprobs.append(0.0 if forced else logprob)

    def _finish(self, rows: list[_Row], hidden: Tensor) -> list[tuple[int, Rollout]]:
        vectors = F.normalize(hidden.float(), dim=-1).cpu()  # all at once
        decode = self.backbone.prompt_encoder.decode
        return [
            (
                row.ticket,
                Rollout(list(row.prompt), row.completion, row.mask, row.logprobs, vector, decode(row.completion)),
            )
            for row, vector in zip(rows, vectors, strict=True)
        ]


def _uniforms(seed: int | None, length: int) -> list[float]:
    """Uniform numbers in [0, 1), float64."""
    assert seed is not None
    draws: list[float] = torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tolist()
    return draws
