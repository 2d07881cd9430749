"""The upper edge of points in the plane of price and quality, the area under it, and tests at equal price.

Between two ways to think lies every mixture of them: a random share of the queries goes to one, the rest to the other.
So the upper edge is concave, and two families can be compared at exactly the same price.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ..significance import Comparison, holm, paired_p_value
from .points import Pair, Point, mixture

Line = list[tuple[float, float]]
"""Price and quality, the price ascending."""


def upper_edge(points: Line) -> Line:
    """The points that no mixture of others beats at their price, from the cheapest to the best.

    Example:
        >>> upper_edge([(0.0, 0.2), (4.0, 0.3), (5.0, 0.8), (10.0, 0.8)])
        [(0.0, 0.2), (5.0, 0.8)]
    """
    edge: Line = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if edge and y <= edge[-1][1]:
            continue
        while len(edge) > 1 and _slope(edge[-2], edge[-1]) <= _slope(edge[-2], (x, y)):
            edge.pop()
        if len(edge) == 1 and edge[0][0] == x:
            edge.pop()
        edge.append((x, y))
    return edge


def _slope(first: tuple[float, float], second: tuple[float, float]) -> float:
    return (second[1] - first[1]) / max(1e-12, second[0] - first[0])


def area(points: Line, cheap: tuple[float, float], dear: tuple[float, float]) -> float | None:
    """The mean share of the gain that the upper edge keeps over all prices between two points.

    0.5 is what thinking about random queries keeps; 1 would be all of the gain at no price. None where there is
    neither a price nor a gain between the two.

    Args:
        points: of a family; the two points count as members.
        cheap: price and quality without thinking.
        dear: with thinking about every query.

    Example:
        >>> area([], (0.0, 0.2), (10.0, 0.8)), round(area([(5.0, 0.8)], (0.0, 0.2), (10.0, 0.8)), 2)
        (0.5, 0.75)
    """
    (start, low), (end, high) = cheap, dear
    if end <= start or high <= low:
        return None
    edge = upper_edge([*points, cheap, dear])
    at = sorted({start, end, *(x for x, _ in edge if start < x < end)})
    quality = np.interp(at, [x for x, _ in edge], [y for _, y in edge])
    kept = (quality - low) / (high - low)
    areas = [(right - left) * (a + b) / 2 for (left, right), (a, b) in zip(pairwise(at), pairwise(kept), strict=True)]
    return float(sum(areas) / (end - start))


def family_areas(pair: Pair, points: Sequence[Point]) -> dict[str, dict[str, float]]:
    """`tokens` and `milliseconds` -> family -> area; `all` is every family but the oracle."""
    families = dict.fromkeys(point.family for point in points if point.family not in ("direct", "reason"))
    areas: dict[str, dict[str, float]] = {}
    for axis in ("tokens", "milliseconds"):
        ends = [_place(point, axis) for point in (pair.direct, pair.reason)]
        if ends[0] is None or ends[1] is None:
            continue
        areas[axis] = {}
        for family in [*families, "all"]:
            chosen = [one for one in points if (one.family != "oracle" if family == "all" else one.family == family)]
            line = [place for one in chosen if (place := _place(one, axis)) is not None]
            value = area(line, ends[0], ends[1])
            if value is not None and line:
                areas[axis][family] = value
    return areas


def _place(point: Point, axis: str) -> tuple[float, float] | None:
    """Price and quality; None where the price is not known."""
    price = point.cost if axis == "tokens" else point.milliseconds
    return None if price is None else (price, point.quality)


def at_cost(points: Sequence[Point], tokens: float, name: str) -> Point | None:
    """The mixture of two neighbours of a family that costs so many tokens; None where it reaches no such cost."""
    edge = sorted(points, key=lambda point: point.cost)
    for first, second in pairwise(edge):
        if first.cost <= tokens <= second.cost:
            share = (tokens - first.cost) / max(1e-12, second.cost - first.cost)
            return mixture(first, second, share, name)
    return None


def equal_cost_tests(
    pair: Pair, points: Sequence[Point], place: tuple[str, str], permutations: int, seed: int
) -> list[dict[str, Any]]:
    """Each point against thinking at random at exactly its tokens; auto as it was measured also against cut reasoning.

    Returns:
        Records of `significance.Comparison` with `tokens`; Holm's correction is over all of them.
    """
    rivals = {"random": [pair.direct, pair.reason]}
    if budgets := [point for point in points if point.family == "budget"]:
        rivals["budget"] = [pair.direct, *budgets, pair.reason]
    rows: list[tuple[Point, Point, float]] = []
    for point in points:
        if point.family in ("direct", "reason", "oracle"):
            continue
        for family in rivals if point.family == "auto" and point.measured else ("random",):
            other = at_cost(rivals[family], point.cost, family)
            if other is not None:
                rows.append((point, other, point.cost))
    p_values = [
        paired_p_value(one.values.tolist(), other.values.tolist(), permutations, seed) for one, other, _ in rows
    ]
    return [
        Comparison(*place, one.name, other.name, one.quality - other.quality, p, corrected).record() | {"tokens": cost}
        for (one, other, cost), p, corrected in zip(rows, p_values, holm(p_values), strict=True)
    ]
