"""How sure a difference is: bootstrap intervals, paired randomisation tests, Holm's correction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from ..errors import DataError
from ..extras import extra
from ..retrieval.metrics import MAIN
from .results import Result


@dataclass(frozen=True)
class Comparison:
    """Two systems on the queries of one split: the difference of their means, and how likely chance alone gives it.

    Attributes:
        collection: where.
        split: where.
        first: a system.
        second: another.
        difference: mean of `first` minus mean of `second`.
        p: of the paired randomisation test.
        p_holm: the same, corrected for all comparisons made together.
    """

    collection: str
    split: str
    first: str
    second: str
    difference: float
    p: float
    p_holm: float

    def record(self) -> dict[str, Any]:
        """As it is written into JSON."""
        return asdict(self)


def bootstrap_intervals(
    values: Mapping[str, Sequence[float]], resamples: int, seed: int
) -> dict[str, tuple[float, float]]:
    """95 % percentile bootstrap intervals of means over the same queries.

    Args:
        values: measure -> values, one for each query.
        resamples: how many times queries are drawn with replacement.
        seed: of the drawing.
    """
    with extra("eval"):
        from scipy.stats import bootstrap

    table = np.array([values[name] for name in values], dtype=float)  # measures x queries
    if table.shape[1] == 1:
        return {name: (float(row[0]), float(row[0])) for name, row in zip(values, table, strict=True)}
    interval = bootstrap(
        (table,),
        np.mean,
        axis=1,
        n_resamples=resamples,
        batch=max(1, 20_000_000 // table.size),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return {
        name: (float(low), float(high)) for name, low, high in zip(values, interval.low, interval.high, strict=True)
    }


def paired_p_value(first: Sequence[float], second: Sequence[float], permutations: int, seed: int) -> float:
    """Two-sided paired randomisation test of equal means: signs of the differences are flipped at random.

    Raises:
        DataError: different numbers of values.
    """
    if len(first) != len(second):
        raise DataError(f"a paired test needs the same queries on both sides, found {len(first)} and {len(second)}")
    with extra("eval"):
        from scipy.stats import permutation_test

    differences = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    # A query on which both are equal adds nothing, whichever its sign.
    differences = differences[differences != 0]
    if differences.size <= 1:
        return 1.0
    result = permutation_test(
        (differences,),
        lambda sample, axis: sample.sum(axis=axis),
        permutation_type="samples",
        n_resamples=permutations,
        batch=max(1, 10_000_000 // differences.size),
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Holm 1979): the family-wise error of all tests together stays at the level.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[i]))
        corrected[i] = largest
    return corrected


def check_same_state(first: Result, second: Result) -> None:
    """Refuse two results of one split that are not over the same documents, judgements and queries.

    Raises:
        DataError: they are of two states of the collection; systems and files are named.
    """
    if first.collection.hash != second.collection.hash or first.query_ids != second.query_ids:
        raise DataError(
            f"{first.system.name!r} and {second.system.name!r} were evaluated on different states of "
            f"{first.collection.name!r}, {first.collection.split}; evaluate both again, or remove one of "
            f"{first.file_name()} and {second.file_name()}"
        )


def compare(results: Sequence[Result], permutations: int, seed: int) -> list[Comparison]:
    """Every pair of systems that stand on the same split, by nDCG@10; Holm's correction is over all of them.

    Raises:
        DataError: two results of one split are not over the same queries: of two states of a collection.
    """
    pairs = [
        (second, first)
        for place in dict.fromkeys(result.place for result in results)
        for first, second in combinations([result for result in results if result.place == place], 2)
    ]
    p_values = []
    for first, second in pairs:
        check_same_state(first, second)
        p_values.append(paired_p_value(first.per_query[MAIN], second.per_query[MAIN], permutations, seed))
    return [
        Comparison(
            *first.place, first.system.name, second.system.name, first.scores[MAIN] - second.scores[MAIN], p, corrected
        )
        for (first, second), p, corrected in zip(pairs, p_values, holm(p_values), strict=True)
    ]
