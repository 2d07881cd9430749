"""The points of a frontier: every result of a model, and what can be composed of its direct and its reason mode.

In mode auto a query has the vector of its direct or of its reason mode. So auto at any price, thinking at random and
the oracle need no further pass: they take each query's value from one result or the other.

Shapes: `Q` queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...model.modes.gate import worth
from ...retrieval.metrics import MAIN
from .. import instructions
from ..results import Result
from ..table import direct_of

Numbers = NDArray[np.float64]
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of the queries that think, for each of which auto gets a price."""


@dataclass(frozen=True)
class Point:
    """One way to answer the queries of a split.

    Attributes:
        name: as in the tables.
        family: what it is a member of: `direct`, `reason`, `auto`, `budget`, `samples`, `oracle`, or another mode; of a
            second model, or of queries with another instruction, with its label.
        values: nDCG@10, `Q`.
        tokens: that it writes, `Q`.
        milliseconds: of a query that is asked alone; of what is composed, in proportion to the tokens of the reason
            mode that it writes. None where it was not measured.
        facts: `price`, `share` of queries that think, `budget`, `samples`.
        measured: whether it is a result of its own, and not composed of others.
    """

    name: str
    family: str
    values: Numbers
    tokens: Numbers
    milliseconds: float | None
    facts: Mapping[str, float] = field(default_factory=dict)
    measured: bool = True

    @property
    def quality(self) -> float:
        """Mean of the values."""
        return float(self.values.mean())

    @property
    def cost(self) -> float:
        """Mean tokens."""
        return float(self.tokens.mean())

    def record(self) -> dict[str, Any]:
        """As it is written into JSON."""
        numbers = {MAIN: self.quality, "tokens_per_query": self.cost, "ms_per_query": self.milliseconds}
        return {"name": self.name, "family": self.family, **numbers, **self.facts}


@dataclass(frozen=True)
class Pair:
    """The direct and the reason mode of one model on one split."""

    direct: Point
    reason: Point

    def composed(self, name: str, family: str, thinks: NDArray[np.bool_], **facts: float) -> Point:
        """What it is to think about these queries."""
        direct, reason = self.direct, self.reason
        tokens, spent = np.where(thinks, reason.tokens, 0.0), max(1e-12, float(reason.tokens.sum()))
        milliseconds = None
        if direct.milliseconds is not None and reason.milliseconds is not None:
            milliseconds = direct.milliseconds + float(tokens.sum()) / spent * reason.milliseconds
        facts = {"share": float(thinks.mean()), **facts}
        return Point(name, family, np.where(thinks, reason.values, direct.values), tokens, milliseconds, facts, False)


def mixture(first: Point, second: Point, share: float, name: str) -> Point:
    """What each query gets on average where `second` answers a random share of the queries, and `first` the rest."""
    values, tokens = ((1 - share) * getattr(first, key) + share * getattr(second, key) for key in ("values", "tokens"))
    return Point(name, name, values, tokens, None, {"share": share}, False)


def points_of(results: Sequence[Result]) -> tuple[Pair, list[Point]] | None:
    """The points of one split; None where no model has both plain modes.

    Args:
        results: all of one split. The first model with both modes is the one that the others are held against.
    """
    measured = [result for result in results if result.system.kind == "search-r3"]
    bases = [
        (direct, result)
        for result in measured
        if result.system.mode == "reason"
        and not result.system.varied
        and (direct := direct_of(result, measured)) is not None
    ]
    if not bases:
        return None
    first = bases[0]
    points = [_point(result, direct_of(result, first) is None and result is not first[0]) for result in measured]
    pair = Pair(points[measured.index(first[0])], points[measured.index(first[1])])
    points.append(pair.composed("oracle", "oracle", pair.reason.values > pair.direct.values))
    for auto in measured:
        fitted = auto.system.mode == "auto" and "price" in auto.system.settings["gate"]
        if fitted and not auto.system.varied and direct_of(auto, first) is not None:
            points += _at_prices(pair, auto)
    return pair, points


def _point(result: Result, of_another: bool) -> Point:
    """A measured result as a point."""
    settings = result.system.settings
    facts: dict[str, float] = {
        name: float(settings[name]) for name in ("price", "budget", "samples") if name in settings
    }
    if result.cost.thinking_share is not None:
        price = settings.get("price", settings["gate"].get("price"))  # a policy that decides itself has none of its own
        facts |= {"share": result.cost.thinking_share} | ({} if price is None else {"price": price})
    tokens = result.reasoning_tokens or [0] * len(result.query_ids)
    return Point(
        result.system.name,
        _family(result, of_another),
        np.array(result.per_query[MAIN], dtype=float),
        np.array(tokens, dtype=float),
        result.cost.ms_per_query,
        facts,
    )


def _family(result: Result, of_another: bool) -> str:
    """The way to think; of another model with its label, of another instruction with that of the instruction."""
    settings = result.system.settings
    way = next((name for name in ("budget", "samples") if name in settings), result.system.mode)
    if not of_another:
        return way
    choice = settings.get("instruction", instructions.OWN)
    suffix = instructions.label(choice)
    model = result.system.name.removesuffix(suffix).partition("/")[2]
    return f"{way}/{(model + suffix).strip() or f'({choice})'}"


def _at_prices(pair: Pair, auto: Result) -> list[Point]:
    """Mode auto at the prices at which a tenth, two tenths, ... of the queries think; none is below 0."""
    gate = auto.system.settings["gate"]
    probability = np.array([one["probability"] for one in auto.gate])
    points, seen = [], set()
    for share in SHARES:
        threshold = float(np.quantile(probability, 1 - share, method="higher"))
        earned = threshold * gate["gain"] + (1 - threshold) * gate["loss"]
        price = gate["price"] + earned / max(gate["tokens"], 1e-12) - 1e-9
        terms = {name: gate[name] for name in ("gain", "loss", "tokens")}
        thinks = worth(probability, **terms, more=price - gate["price"])
        if (count := int(thinks.sum())) not in seen and price >= 0:
            seen.add(count)
            points.append(pair.composed(f"{auto.system.name} at {price:.3g}", "auto", thinks, price=price))
    return points
