"""The next tokens of rows, drawn so that a row's choice depends on nothing but its own logits and its own draws.

Shapes: `B` rows, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from ..backbone import Backbone
from ..modes.first import First, hold
from .latent import soft_tokens

SUM_BLOCK = 256
# Sums of probabilities are taken in float64, which these devices lack.
_WITHOUT_FLOAT64 = {"mps"}


@dataclass(frozen=True)
class Ask:
    """What the next tokens of one row are chosen by.

    Attributes:
        left: tokens that its budget has room for, the embed token included.
        temperature: 0 decodes greedily.
        top_p: sample among the likeliest tokens that together reach this probability.
        draws: for these tokens, uniform in [0, 1); may be empty where it is greedy.
        latent: whether soft tokens are wanted.
        first: what the first of these tokens may be.
    """

    left: int
    temperature: float = 0.0
    top_p: float = 1.0
    draws: Sequence[float] = ()
    latent: bool = False
    first: First | None = None


class Choice(NamedTuple):
    """One token of a row: a soft one where there is no id, a forced one where there is no log-probability.

    Where the row's logits, or its soft token, are not finite, it is the embed token with NaN.
    """

    token: int | None
    logprob: float | None


class Chooser:
    """Chooses the next tokens of rows, step after step, on the device; nothing waits for it before `look`.

    A row that has ended, or has states that are not finite, goes on choosing what nobody reads.

    Args:
        backbone: the model.
        asks: one for each row.
        steps: tokens that each of them will choose.

    Attributes:
        tokens: `B`, what was chosen last, on the device.
        soft: row -> `D`, what is to be computed in the place of its token.
        writes: row -> the probability that its first token is another than the embed token, where `first` is given.
        broken: after `look`, rows with states that are not finite, behind their ends too.
    """

    def __init__(self, backbone: Backbone, asks: Sequence[Ask], steps: int = 1) -> None:
        self.backbone, self.asks, self.steps = backbone, asks, steps
        self.device = torch.device("cpu") if backbone.device.type in _WITHOUT_FLOAT64 else backbone.device
        self.tokens = torch.empty(0, dtype=torch.long, device=self.device)
        self.soft: dict[int, Tensor] = {}
        self.writes: dict[int, float] = {}
        self.broken: set[int] = set()
        self._columns: list[tuple[Tensor, Tensor, Tensor]] = []  # tokens, log-probabilities, which are forced
        self._latent = [row for row, ask in enumerate(asks) if ask.latent]
        text = [row for row, ask in enumerate(asks) if not ask.latent]
        self._text, self._rows = text, self._on_device(text)
        chosen = [asks[row] for row in text]
        self._sampling = Sampling.of([ask.temperature for ask in chosen], [ask.top_p for ask in chosen], self.device)
        draws = [[ask.draws[step] if step < len(ask.draws) else 0.0 for ask in chosen] for step in range(steps)]
        self._draws = torch.tensor(draws, dtype=torch.float64, device=self.device)
        # The budget counts the embed token, so the last place is its own: sampled if the model chose it. Where the turn
        # would end, the embed token takes the end's place: behind an end the model has never seen it.
        last = [[ask.left == step + 1 for ask in chosen] for step in range(steps)]
        self._last = torch.tensor(last, dtype=torch.bool, device=self.device)
        self._ends = self._on_device(sorted(backbone.prompt_encoder.end_token_ids))

    def _on_device(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.device)

    def choose(self, hidden: Tensor) -> None:
        """Choose one token for every row, by its state of `B x D`."""
        step = len(self._columns)
        column = self._choose(hidden, step) if not self._latent else self._choose_soft(hidden, step)
        self.tokens = column[0]
        self._columns.append(column)

    def _choose_soft(self, hidden: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """As `_choose`, where there are latent rows."""
        count = len(self.asks)
        tokens = torch.full((count,), self.backbone.embed_token_id, device=self.device)
        logprobs, forced = torch.zeros(count, device=self.device), torch.zeros_like(tokens, dtype=torch.bool)
        if self._text:
            tokens[self._rows], logprobs[self._rows], forced[self._rows] = self._choose(hidden[self._rows], step)
        soft = soft_tokens(self.backbone, self.backbone.logits(hidden[self._latent]))
        logprobs[self._latent] = torch.where(soft.isfinite().all(-1), 0.0, math.nan).to(logprobs)
        pairs = zip(self._latent, soft, strict=True)
        self.soft = {row: one for row, one in pairs if self.asks[row].left > step + 1}
        return tokens, logprobs, forced

    def _choose(self, hidden: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, log-probabilities, and which are forced, of the rows that write."""
        embed, logits = self.backbone.embed_token_id, self.backbone.logits(hidden)
        firsts = [None if step else self.asks[row].first for row in self._text]
        masses = None
        if any(firsts):
            temperatures = [self.asks[row].temperature for row in self._text]
            logits, facts = hold(logits, firsts, temperatures, embed, self._ends)
            self.writes = {self._text[place]: writes for place, (_, writes) in facts.items() if firsts[place] != "text"}
            masses = torch.tensor([facts[place][0] if place in facts else 0.0 for place in range(len(firsts))])
        tokens, logprobs = choose_tokens(logits, self._sampling, self._draws[step])
        if masses is not None:
            logprobs = logprobs + masses.to(logprobs.device)
        ends = (tokens[:, None] == self._ends).any(-1)
        forced = (tokens != embed) & (self._last[step] | ends)
        return torch.where(forced | logprobs.isnan(), embed, tokens), logprobs, forced

    def look(self) -> Iterator[list[Choice]]:
        """What every row has chosen, up to the embed token; here the device is waited for."""
        parts = zip(*self._columns, strict=True)
        tokens, logprobs, forced = (torch.stack(part, dim=1).tolist() for part in parts)  # B x steps
        embed = self.backbone.embed_token_id
        for row, ask in enumerate(self.asks):
            choices: list[Choice] = []
            if any(map(math.isnan, logprobs[row])):
                self.broken.add(row)
            for step, (token, logprob) in enumerate(zip(tokens[row], logprobs[row], strict=True)):
                is_broken = math.isnan(logprob)
                is_soft = ask.latent and ask.left > step + 1 and not is_broken
                is_given = forced[row][step] and not is_broken
                choices.append(Choice(None if is_soft else token, None if is_given else logprob))
                if token == embed and not is_soft:
                    break
            yield choices


@dataclass(frozen=True)
class Sampling:
    """How rows are sampled from, on the device of their logits; made once for several steps.

    Attributes:
        divisors: `B`, the temperatures, 1 where a row is greedy; None where all are 1.
        rows: those that sample; None where none does.
        top_p: of these; None where all are 1.
    """

    divisors: Tensor | None
    rows: Tensor | None
    top_p: Tensor | None

    @classmethod
    def of(cls, temperatures: Sequence[float], top_p: Sequence[float], device: torch.device) -> Sampling:
        """Rows with these temperatures and nuclei."""
        rows = [row for row, temperature in enumerate(temperatures) if temperature > 0]
        divisors, nuclei = [temperature or 1.0 for temperature in temperatures], [top_p[row] for row in rows]
        return cls(
            torch.tensor(divisors, device=device) if any(one != 1.0 for one in divisors) else None,
            torch.tensor(rows, device=device) if rows else None,
            torch.tensor(nuclei, device=device) if any(one < 1 for one in nuclei) else None,
        )


def choose_tokens(logits: Tensor, sampling: Sampling, draws: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row: the likeliest where the temperature is 0, else sampled by inverting the distribution.

    Args:
        logits: `B x V`, float32.
        sampling: temperatures, and from which likeliest tokens.
        draws: `B`, uniform in [0, 1), float64.

    Returns:
        Ids and their log-probabilities at the row's temperature (1 where it is 0), before `top_p`, each `B`. A row with
        a logit that is NaN or plus infinity has the log-probability NaN, and its id means nothing.
    """
    if logits.device.type in _WITHOUT_FLOAT64:
        logits = logits.cpu()
    scaled = logits if sampling.divisors is None else logits / sampling.divisors[:, None]
    largest = scaled.amax(-1, keepdim=True)
    weights = (scaled - largest).exp_()
    totals = weights.sum(-1)
    tokens = logits.argmax(-1)
    rows = sampling.rows
    if rows is not None:
        everyone = len(rows) == len(weights)
        pool = weights if everyone else weights[rows]
        if sampling.top_p is not None:
            pool = _nucleus(pool, sampling.top_p)
        tokens[rows] = _inverse_cdf(pool, draws if everyone else draws[rows])
    return tokens, (scaled.gather(-1, tokens[:, None]) - largest)[:, 0] - totals.log()


def _nucleus(weights: Tensor, top_p: Tensor) -> Tensor:
    """Weights `B x V` with those outside each row's nucleus set to 0."""
    descending, places = weights.sort(dim=-1, descending=True)
    before = descending.cumsum(-1, dtype=torch.float64) - descending
    outside = before >= top_p[:, None] * descending.sum(-1, keepdim=True, dtype=torch.float64)
    return torch.zeros_like(weights).scatter(-1, places, descending.masked_fill(outside, 0.0))


def _inverse_cdf(weights: Tensor, draws: Tensor) -> Tensor:
    """The token at which the cumulative weight first exceeds each draw's share of the whole, `B`.

    First the block of tokens is found and then the token in it, so that only the blocks are summed up in float64.
    """
    padded = F.pad(weights, (0, -weights.shape[-1] % SUM_BLOCK))
    blocks = padded.view(len(weights), -1, SUM_BLOCK)  # B x n x SUM_BLOCK
    upto = blocks.sum(-1, dtype=torch.float64).cumsum(-1)  # B x n
    targets = (draws * upto[:, -1])[:, None]
    block = torch.searchsorted(upto, targets, right=True).clamp(max=upto.shape[-1] - 1)
    before = torch.where(block > 0, upto.gather(-1, (block - 1).clamp(min=0)), 0.0)
    rows = torch.arange(len(weights), device=weights.device)
    within = blocks[rows, block[:, 0]].cumsum(-1, dtype=torch.float64)  # B x SUM_BLOCK
    place = torch.searchsorted(within, targets - before, right=True)
    # Rounding may leave a target a hair above the block's last sum: its last token of any weight is meant.
    last = (within < within[:, -1:]).sum(-1, keepdim=True)
    tokens: Tensor = (block * SUM_BLOCK + torch.minimum(place, last))[:, 0]
    return tokens
