"""Continuous batching of reason-then-embed: a finished reply leaves its slot and a waiting one takes it.

The vector is read from the decoding step that takes the embed token in, so there is no second forward pass. What
prompts begin with together, and a prompt that several requests share, is computed once. Each request draws its random
numbers from its own seed, so its reply does not depend on which other requests are decoded beside it.

Shapes: `B` sequences in work, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from ...errors import ConfigError, ModelError
from ...types import Progress
from ..backbone import Backbone
from ..modes.first import First
from .engines import make_engine
from .sampling import Ask, Choice, Chooser

# Tokens that are chosen between two looks. A GPU idles while the host looks; a CPU would waste what rows compute that
# have ended and nobody has noticed.
_LOOK_EVERY = {"cuda": 8}


@dataclass(frozen=True)
class DecodeRequest:
    """What is asked of the decoder.

    Attributes:
        prompt_ids: ids of the prompt.
        max_new_tokens: budget of the reply, the embed token included. A reply that has not emitted the embed token by
            then gets it forced, and so does one that would end its turn without it, in the place of the end. With 0 the
            prompt itself ends with the embed token (direct mode) and there is no reply.
        temperature: 0 decodes greedily (log-probabilities are then at temperature 1).
        top_p: sample among the likeliest tokens that together reach this probability.
        seed: where this reply's random numbers start; needed when the temperature is above 0.
        latent: whether soft tokens take the place of a text: as many as the budget holds beside the embed token, which
            follows them.
        first: what the first token may be, where that is a decision to be told of (`modes.first`).
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    latent: bool = False
    first: First | None = None

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
        soft_tokens: soft tokens before the embed token.
        sampler_logprobs: as `logprobs`, where another sampler wrote the reply: what that one said. `logprobs` are then
            this model's.
        writes: the probability that the first token is another than the embed token, where that was the model's
            decision or the embed token was given.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    completion_mask: list[int]
    logprobs: list[float]
    vector: Tensor
    reasoning: str
    soft_tokens: int = 0
    sampler_logprobs: list[float] | None = None
    writes: float | None = None

    @property
    def forced(self) -> bool:
        """Whether the embed token had to be forced."""
        return bool(self.completion_mask) and self.completion_mask[-1] == 0

    @property
    def thought(self) -> bool:
        """Whether it was written, or was to be: only who may decide does not."""
        return self.writes is None or self.reasoning_tokens > 0

    @property
    def reasoning_tokens(self) -> int:
        """Tokens before the embed token, soft ones too."""
        return max(0, len(self.completion_ids) - 1) + self.soft_tokens


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
    soft: Tensor | None = None  # D, the last soft token
    soft_tokens: int = 0
    writes: float | None = None

    @property
    def longest(self) -> int:
        """Tokens of the prompt and of the whole budget."""
        return len(self.prompt) + self.request.max_new_tokens

    @property
    def left(self) -> int:
        """Tokens that the budget has room for."""
        return self.request.max_new_tokens - len(self.completion) - self.soft_tokens

    def ask(self) -> Ask:
        """What its next tokens are chosen by."""
        request, place = self.request, len(self.completion)
        first = None if self.completion else request.first
        return Ask(self.left, request.temperature, request.top_p, self.uniforms[place:], request.latent, first)

    def append(self, choice: Choice) -> None:
        """Take a token into the reply."""
        if choice.token is None:
            self.soft_tokens += 1
            return
        chosen = choice.logprob is not None and not math.isnan(choice.logprob)
        self.completion.append(choice.token)
        self.mask.append(int(chosen))
        self.logprobs.append(choice.logprob if chosen and choice.logprob else 0.0)


class Decoder:
    """Decodes many requests at once. One thread at a time may call it.

    Args:
        backbone: the model; its weights must not change while requests are in work.
        slots: how many replies are decoded at once, or fewer where the model has room for no more.
        look_every: tokens of each reply that are computed before the host looks at them, hands out what has ended and
            takes in what waits; by default 8 on CUDA, where every look is waited for, and 1 elsewhere. It does not
            change replies. Above 1 the room for whole budgets is reserved when requests are taken in.

    Example:
        >>> from search_r3 import SearchR3
        >>> from search_r3.model.engine.decoding import Decoder, DecodeRequest
        >>> backbone = SearchR3("builtin", device="cpu").backbone
        >>> prompt = backbone.prompt_encoder.encode("what do people pay with in Tashkent?", "reason").ids
        >>> [rollout] = Decoder(backbone).run([DecodeRequest(prompt, max_new_tokens=8)])
        >>> rollout.reasoning_tokens <= 7, rollout.vector.shape
        (True, torch.Size([192]))
    """

    def __init__(self, backbone: Backbone, slots: int = 128, look_every: int | None = None) -> None:
        look_every = _LOOK_EVERY.get(backbone.device.type, 1) if look_every is None else look_every
        if slots < 1 or look_every < 1:
            raise ValueError(f"slots={slots}, look_every={look_every}: expected at least 1 of each")
        self.backbone, self.slots, self.look_every = backbone, min(slots, backbone.most_rows), look_every
        self._engine = make_engine(backbone)
        self._waiting: deque[_Row] = deque()
        self._wanted: Counter[tuple[int, ...]] = Counter()  # prompts of those that wait
        self._lengths: Counter[int] = Counter()  # and their lengths: few, however many wait
        self._rows: list[_Row] = []  # as the engine numbers them
        self._tickets = 0

    def submit(self, request: DecodeRequest) -> int:
        """Queue a request and return its ticket.

        Raises:
            ModelError: the prompt and its budget do not fit into the model's context.
            ConfigError: there is neither a budget nor an embed token at the prompt's end.
        """
        if request.max_new_tokens < 1 and request.prompt_ids[-1] != self.backbone.embed_token_id:
            raise ConfigError(f"max_new_tokens={request.max_new_tokens}: expected at least 1, for the embed token")
        longest = len(request.prompt_ids) + request.max_new_tokens
        if longest > self.backbone.context_length:
            raise ModelError(
                f"a prompt of {len(request.prompt_ids)} tokens and max_new_tokens={request.max_new_tokens} exceed the "
                f"model's context of {self.backbone.context_length} tokens; lower max_new_tokens or max_length"
            )
        self._tickets += 1
        draws = _uniforms(request.seed, request.max_new_tokens) if request.temperature > 0 else []
        row = _Row(self._tickets, request, tuple(request.prompt_ids), draws)
        self._waiting.append(row)
        self._wanted[row.prompt] += 1
        self._lengths[row.longest] += 1
        return self._tickets

    def cancel(self, ticket: int) -> bool:
        """Drop a request, waiting or in work, and free its slot; False if it is not here (any more)."""
        for row in [*self._waiting, *self._rows]:
            if row.ticket == ticket:
                if row in self._rows:
                    self._remove([row])
                else:
                    self._waiting.remove(row)
                    self._no_longer_wait([row])
                return True
        return False

    def reply(self, ticket: int) -> list[int]:
        """The ids that a request in work has so far (empty for one that waits or is gone)."""
        return next((list(row.completion) for row in self._rows if row.ticket == ticket), [])

    def __len__(self) -> int:
        """Requests waiting or in work."""
        return len(self._waiting) + len(self._rows)

    def run(self, requests: Sequence[DecodeRequest], progress: Progress | None = None) -> list[Rollout]:
        """Decode requests to their ends, in their order; there may be no others here.

        Args:
            requests: what is asked.
            progress: called with the numbers of requests finished, and tokens of their replies, since the last call.

        Raises:
            ModelError: a request does not fit into the context, or its reply's vector is not finite.
            ValueError: other requests are waiting or in work; `step` returns theirs.
        """
        if len(self):
            raise ValueError(f"{len(self)} requests are waiting or in work; call step until they have ended")
        tickets: list[int] = []
        rollouts: dict[int, Rollout] = {}
        try:
            for request in requests:
                tickets.append(self.submit(request))
            while len(rollouts) < len(tickets):
                news = self.step()
                for ticket, rollout in news:
                    _check_finite(rollout, ticket - tickets[0])
                rollouts.update(news)
                if news and progress is not None:
                    progress(len(news), sum(len(one.completion_ids) + one.soft_tokens for _, one in news))
        except BaseException:
            self._remove(self._rows)
            self._no_longer_wait(self._waiting)
            self._waiting.clear()
            raise
        return [rollouts[ticket] for ticket in tickets]

    @torch.no_grad()
    def step(self) -> list[tuple[int, Rollout]]:
        """Take waiting requests in if slots are free, and give every request in work its next token.

        With `look_every` above 1 up to that many tokens.

        Returns:
            Tickets and rollouts of the requests that ended in this step. A request whose logits are not finite ends at
            once, with a forced token and a vector of NaN; the others go on.
        """
        results = self._decode() if self._rows else []
        free = self.slots - len(self._rows)
        # A prompt costs a forward pass of its own: under a long queue a few slots are collected before they are filled.
        if self._waiting and free >= min(len(self._waiting), max(1, self.slots // 8)):
            results += self._admit(min(free, len(self._waiting)))
        return results

    def _decode(self) -> list[tuple[int, Rollout]]:
        """One forward pass over all rows in work, which those leave that end with it, and up to `look_every` tokens."""
        rows, embed = self._rows, self.backbone.embed_token_id
        soft = {i: row.soft for i, row in enumerate(rows) if row.soft is not None}
        tokens = [row.completion[-1] if row.completion else embed for row in rows]
        hidden = self._engine.advance(torch.tensor(tokens, device=self.backbone.device), soft)
        ended = [i for i, row in enumerate(rows) if tokens[i] == embed and i not in soft]
        if not ended:
            return self._write(rows, hidden, self._steps())
        leaving = [rows[i] for i in ended]
        results = self._finish(leaving, hidden[ended])
        pairs = zip(leaving, results, strict=True)
        broken = [row for row, (_, rollout) in pairs if not rollout.vector.isfinite().all()]
        hidden = hidden[self._remove(leaving, broken)]
        return results + self._write(self._rows, hidden, self._steps())

    def _steps(self) -> int:
        """Tokens until the next look: none that all budgets lack, nor any computed beyond the context."""
        rooms = [self.backbone.context_length - row.longest + row.left + 1 for row in self._rows]
        return min(self.look_every, *rooms, max(row.left for row in self._rows)) if rooms else 0

    def _remove(self, rows: Sequence[_Row], broken: Sequence[_Row] = ()) -> list[int]:
        """Take rows out of work; the old places of those that stay."""
        if not rows:
            return list(range(len(self._rows)))
        places = {id(row): place for place, row in enumerate(self._rows)}
        order = self._engine.remove([places[id(row)] for row in rows], [places[id(row)] for row in broken])
        self._rows = [self._rows[place] for place in order]
        return order

    def _admit(self, count: int) -> list[tuple[int, Rollout]]:
        """Compute the prompts of the first that wait, take those that reply into work and choose their first tokens."""
        rows = list(islice(self._waiting, count))
        hidden = self._engine.prompt_states([row.prompt for row in rows])
        direct = [i for i, row in enumerate(rows) if row.request.max_new_tokens == 0]
        rest = [i for i, row in enumerate(rows) if row.request.max_new_tokens > 0]
        newcomers = [rows[i] for i in rest]
        if newcomers:
            self._engine.admit([row.prompt for row in newcomers], *self._room())
        for _ in rows:  # only now: where the device has no room for them, they wait on
            self._waiting.popleft()
        self._no_longer_wait(rows)
        self._rows += newcomers
        results = self._finish([rows[i] for i in direct], hidden[direct])
        return results + self._write(newcomers, hidden[rest], 1)

    def _room(self) -> tuple[int, int | None]:
        """The most rows there may be, and their tokens where room is reserved at once: for all requests that are here.

        Rows that have ended go on until the next look.
        """
        if self.look_every == 1:
            return self.slots, None
        return min(self.slots, len(self)), max([*(row.longest for row in self._rows), *self._lengths]) + self.look_every

    def _no_longer_wait(self, rows: Collection[_Row]) -> None:
        """Count these off, and keep the prompts only for which another request waits."""
        for row in rows:
            self._wanted[row.prompt] -= 1
            if not self._wanted[row.prompt]:
                del self._wanted[row.prompt]
        self._lengths -= Counter(row.longest for row in rows)  # which drops those that nobody has
        self._engine.forget(self._wanted.keys())

    def _write(self, rows: Sequence[_Row], hidden: Tensor, steps: int) -> list[tuple[int, Rollout]]:
        """Append so many tokens to rows, which stand at these states; more than one to all rows in work only.

        Returns:
            Tickets and rollouts of rows that have ended, or whose logits are not finite; they leave.
        """
        if not rows:
            return []
        chooser, states = Chooser(self.backbone, [row.ask() for row in rows], steps), [hidden]
        chooser.choose(hidden)
        for _ in range(steps - 1):
            states.append(self._engine.advance(chooser.tokens, chooser.soft))
            chooser.choose(states[-1])
        ended, broken = [], []
        for place, choices in enumerate(chooser.look()):
            row, last = rows[place], choices[-1]
            for choice in choices:
                row.append(choice)
            row.soft, row.writes = chooser.soft.get(place), chooser.writes.get(place, row.writes)
            if last.logprob is not None and math.isnan(last.logprob):
                broken.append(row)
            elif len(choices) < steps:
                ended.append((row, states[len(choices)][place]))
        leaving = [row for row, _ in ended]
        self._remove([*leaving, *broken], [rows[place] for place in chooser.broken])
        ends = [state for _, state in ended] + [torch.full_like(hidden[0], math.nan)] * len(broken)
        return self._finish([*leaving, *broken], torch.stack(ends)) if ends else []

    def _finish(self, rows: list[_Row], hidden: Tensor) -> list[tuple[int, Rollout]]:
        if not rows:
            return []
        vectors = self.backbone.vectors(hidden).cpu()  # all at once
        decode = self.backbone.prompt_encoder.decode
        return [
            (
                row.ticket,
                Rollout(
                    *(list(row.prompt), row.completion, row.mask, row.logprobs),
                    *(vector, decode(row.completion), row.soft_tokens),
                    writes=row.writes,
                ),
            )
            for row, vector in zip(rows, vectors, strict=True)
        ]


def _check_finite(rollout: Rollout, number: int) -> None:
    if not rollout.vector.isfinite().all():
        raise ModelError(
            f"the model's states are not finite in request {number} of those given: its weights hold NaN or infinity, "
            "or its dtype is too narrow; try float32 or bfloat16"
        )


def _uniforms(seed: int | None, length: int) -> list[float]:
    """Uniform numbers in [0, 1), float64."""
    assert seed is not None
    draws: list[float] = torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tolist()
    return draws
