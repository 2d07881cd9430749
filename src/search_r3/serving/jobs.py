"""What is asked of the engine thread, and what it answers.

Shapes: `N` texts, `D` vector size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from ..errors import TooLargeError
from ..model.modes.gate import Choice
from ..model.prompts import EncodedPrompt, Kind, PromptEncoder
from ..types import Array

DECODED: tuple[Kind, ...] = ("reason", "latent")
"""What the decoder serves."""


class Embedded(NamedTuple):
    """One text.

    Attributes:
        vector: `D`, float32, L2-normalised.
        prompt_tokens: tokens read, the template included.
        truncated: whether the text lost its end.
        reasoning: empty but for reasoned queries.
        reasoning_tokens: its length.
        forced: whether the embed token had to be forced.
        whole: of a query in direct mode the vector with all dimensions of the model, which a gate reads.
        thought: whether it was reasoned about.
        gate: in mode auto what the gate saw, as in `QueryEmbeddings`.
    """

    vector: Array
    prompt_tokens: int
    truncated: bool
    reasoning: str = ""
    reasoning_tokens: int = 0
    forced: bool = False
    whole: Array | None = None
    thought: bool = False
    gate: Mapping[str, float] = MappingProxyType({})


class Outcome(NamedTuple):
    """The texts of one request in their order, the seconds it waited and those it was in work."""

    texts: list[Embedded]
    queue_seconds: float
    inference_seconds: float

    @property
    def vectors(self) -> Array:
        """`N x D`."""
        return np.stack([one.vector for one in self.texts])

    @property
    def prompt_tokens(self) -> int:
        """Tokens read."""
        return sum(one.prompt_tokens for one in self.texts)

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of the reasoning."""
        return sum(one.reasoning_tokens for one in self.texts)


def joined(direct: Outcome, reasoned: Outcome | None, choice: Choice) -> Outcome:
    """Mode auto: all queries in direct mode, and in their places those that thought, which pay for both."""
    texts = [one._replace(gate=facts) for one, facts in zip(direct.texts, choice.facts(), strict=True)]
    if reasoned is None:
        return direct._replace(texts=texts)
    for place, one in zip(np.flatnonzero(choice.thinks).tolist(), reasoned.texts, strict=True):
        before = texts[place]
        texts[place] = one._replace(prompt_tokens=before.prompt_tokens + one.prompt_tokens, gate=before.gate)
    waited = direct.queue_seconds + reasoned.queue_seconds
    return Outcome(texts, waited, direct.inference_seconds + reasoned.inference_seconds)


@dataclass(eq=False)
class Job:
    """A request: all its texts are answered, or none; rows that nobody works on are `waiting`."""

    kind: Kind
    texts: Sequence[str]
    budget: int
    future: Future[Outcome]
    submitted: float
    deadline: float
    on_piece: Callable[[str], None] | None
    waiting: deque[Row] = field(default_factory=deque)
    done: dict[int, Embedded] = field(default_factory=dict)
    started: float | None = None


@dataclass(eq=False)
class Row:
    """A text of a job; `shown` is what has been said of its reasoning."""

    job: Job
    place: int
    prompt: EncodedPrompt
    shown: str = ""


def read_texts(
    encoder: PromptEncoder, texts: Sequence[str], kind: Kind, instruction: str, truncate: bool
) -> list[EncodedPrompt]:
    """The prompts of texts.

    Raises:
        DataError: an empty text.
        TooLargeError: one is too long, and may not lose its end.
    """
    prompts = encoder.encode_batch(texts, kind, instruction)
    cut = [place for place, prompt in enumerate(prompts) if prompt.truncated]
    if cut and not truncate:
        raise TooLargeError(
            f"text number {cut[0]} is longer than the {encoder.room(kind)} tokens that the model has room for "
            f"(max_length={encoder.max_length}); shorten it, or say truncate=true"
        )
    return prompts


def line_of(kind: Kind) -> Kind:
    """Where a request stands: all that the decoder serves is in one line."""
    return "reason" if kind in DECODED else kind


def share_of(kind: Kind) -> str:
    """Queries and documents have a queue of their own each, so that no indexing keeps queries out."""
    return "documents" if kind == "document" else "queries"
