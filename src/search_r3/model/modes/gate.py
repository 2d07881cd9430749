"""The gate of `mode="auto"`: from a query's direct vector it says whether reasoning would pay.

A logistic regression gives the probability that reasoning is worth its tokens, `u = measure(reason) - measure(direct) -
price * tokens > 0`. A query is reasoned about where that is worth it on average:
`p * gain + (1 - p) * loss > (price now - price) * tokens`, so one gate serves every price.

There are two such heads of one fit. One reads the vector alone, for whoever encodes without documents at hand; the
other also reads the best scores that the vector reaches, and decides where there is an index.

Shapes: `Q` queries, `D` vector size, `K` best documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ...errors import ModelError
from ...files import write_json
from ...types import Array

GATE_FILE = "gate.json"
"""Beside `search_r3.json`; no part of a model's revision, since no vector depends on it."""
TOP = 10
"""Best documents whose scores are read."""
PROBE = "which of these is the one that was asked for?"
"""A text whose direct vector says whether a gate belongs to a model."""
ALIKE = 0.98
"""Least cosine of the probe's vector; what other precision does to it is less."""
_TEMPERATURE = 0.05

Numbers = NDArray[np.float64]


def sigmoid(values: Numbers) -> Numbers:
    """1 / (1 + exp(-x)), without overflow."""
    result: Numbers = 0.5 * (1.0 + np.tanh(0.5 * values))
    return result


def score_features(scores: Array) -> dict[str, Numbers]:
    """What is read of the best scores of each query, `Q x K` in descending order: a name -> `Q` values.

    `top` is the best, `margin` what it leads the second by, `depth` what it leads the last by, `entropy` that of a
    softmax over them (0 to 1).

    Example:
        >>> features = score_features(np.array([[0.9, 0.4]], dtype=np.float32))
        >>> {name: round(float(values[0]), 3) for name, values in features.items()}
        {'top': 0.9, 'margin': 0.5, 'depth': 0.5, 'entropy': 0.001}
    """
    numbers = np.asarray(scores, dtype=np.float64)
    count = numbers.shape[1]
    weights = np.exp((numbers - numbers[:, :1]) / _TEMPERATURE)
    shares = weights / weights.sum(axis=1, keepdims=True)
    entropy = -(shares * np.log(np.maximum(shares, 1e-300))).sum(axis=1)
    return {
        "top": numbers[:, 0],
        "margin": numbers[:, 0] - numbers[:, min(1, count - 1)],
        "depth": numbers[:, 0] - numbers[:, -1],
        "entropy": entropy / np.log(count) if count > 1 else np.zeros(len(numbers)),
    }


def worth(probability: Numbers, gain: float, loss: float, tokens: float, more: float = 0.0) -> NDArray[np.bool_]:
    """Whether reasoning is worth it on average, given the probability that it pays (`Q`).

    Args:
        probability: that reasoning pays at the price of the fit.
        gain: mean utility where it does.
        loss: mean utility where it does not.
        tokens: mean tokens of reasoning.
        more: what a token costs beyond the price of the fit.
    """
    result: NDArray[np.bool_] = probability * gain + (1.0 - probability) * loss > more * tokens
    return result


class Choice(NamedTuple):
    """What a gate says of queries: who thinks (`Q`), the probability that it pays (`Q`), and why.

    `evidence`: name -> what each thing adds to the log-odds (`Q`): `bias`, `vector`, and the features of scores.
    """

    thinks: NDArray[np.bool_]
    probability: Numbers
    evidence: dict[str, Numbers]

    def facts(self) -> list[dict[str, float]]:
        """Probability and evidence, query by query."""
        columns = {"probability": self.probability, **self.evidence}
        return [
            {name: round(float(values[row]), 6) for name, values in columns.items()} for row in range(len(self.thinks))
        ]


class Weighted(BaseModel):
    """A feature in a head: its weight, and its mean over the queries of the fit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float
    mean: float


class Head(BaseModel):
    """A logistic regression; evidence is counted from the mean query."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bias: float = Field(description="Log-odds of the mean query.")
    vector: tuple[float, ...] = Field(description="Weights of the direct vector, D.")
    centre: float = Field(description="What these give the mean query.")
    scores: dict[str, Weighted] = Field({}, description="Of `score_features`.")

    def evidence(self, vectors: Array, features: Mapping[str, Numbers]) -> dict[str, Numbers]:
        """What each thing adds to the log-odds of each query."""
        of_vector = np.asarray(vectors, dtype=np.float64) @ np.array(self.vector) - self.centre
        parts = {"bias": np.full(len(vectors), self.bias), "vector": of_vector}
        return parts | {name: one.weight * (features[name] - one.mean) for name, one in self.scores.items()}


class Gate(BaseModel):
    """A fitted gate, as it stands in `gate.json` (see the module)."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    format: int = Field(1, ge=1, le=1)
    price: float = Field(description="Of a token, in units of the measure.")
    measure: str = Field(description="What the price and the labels are counted in.")
    gain: float = Field(description="Mean of u where reasoning pays.")
    loss: float = Field(description="Mean of u where it does not.")
    tokens: float = Field(description="Mean tokens of reasoning.")
    by_vector: Head
    by_scores: Head
    probe: tuple[float, ...] = Field(description="Direct vector of a text, D.")
    reason_frame: tuple[int, ...] = Field(
        (), description="Token ids around a query in reason mode; none: not compared."
    )
    fitted: dict[str, Any] = Field({}, description="On what, when, and how well: collection, splits, calibration, ...")

    def decide(self, vectors: Array, scores: Array | None = None, price: float | None = None) -> Choice:
        """Who thinks.

        Args:
            vectors: direct vectors, `Q x D`, of the model's own size.
            scores: of the best documents for each, `Q x K`, best first; without them the vector alone decides.
            price: of a token, in place of the gate's own.
        """
        head = self.by_vector if scores is None else self.by_scores
        evidence = head.evidence(vectors, {} if scores is None else score_features(scores))
        probability = sigmoid(np.sum(list(evidence.values()), axis=0))
        more = 0.0 if price is None else price - self.price
        return Choice(worth(probability, self.gain, self.loss, self.tokens, more), probability, evidence)

    @property
    def digest(self) -> str:
        """What tells it from other gates: the beginning of a hash over all that decides."""
        return hashlib.sha256(self.model_dump_json(exclude={"fitted"}).encode()).hexdigest()[:16]

    def belongs_to(self, probe: Array, reason_frame: tuple[int, ...]) -> bool:
        """Whether it was fitted to the model with this direct vector of `PROBE` and this prompt of reason mode."""
        own = np.array(self.probe)
        if self.reason_frame not in ((), reason_frame):
            return False
        return len(own) == len(probe) and float(own @ probe) / max(1e-12, float(np.linalg.norm(own))) >= ALIKE

    def save(self, folder: Path) -> None:
        """Write it into a model directory, in one step."""
        write_json(folder / GATE_FILE, self.model_dump(mode="json"))


def read_gate(folder: Path) -> Gate | None:
    """The gate in a model directory; None where there is none.

    Raises:
        ModelError: the file is damaged.
    """
    file = folder / GATE_FILE
    if not file.is_file():
        return None
    try:
        return Gate.model_validate_json(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of pydantic or UTF-8
        raise ModelError(f"{file}: not usable as a gate: {str(error).splitlines()[0]}; fit it again") from error
