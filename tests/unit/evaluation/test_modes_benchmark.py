"""`benchmarks/modes.py`: its tables, where not every model has every point."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))  # as where a benchmark runs


def seed(shift: float, *more: tuple[str, str, float, float]) -> dict[str, Any]:
    """What one model gives: the same points in every part of the mixture."""
    points = [
        {"name": name, "family": family, "ndcg@10": quality + shift, "tokens_per_query": tokens, "ms_per_query": None}
        | {"gain_share": quality, "token_share": tokens / 20}
        for name, family, quality, tokens in [
            *(("reason", "reason", 1.0, 20.0), ("direct", "direct", 0.0, 0.0), ("latent/a", "latent/a", 0.3, 3.0)),
            *more,
        ]
    ]
    return {"frontier": [{"points": points, "areas": {}} for _ in range(3)]}


def test_a_point_that_not_all_models_have_is_left_out_and_the_cheapest_come_first() -> None:
    from benchmarks import modes

    seeds = [seed(0.0, ("auto/a", "auto/a", 0.8, 12.0), ("auto/a at 0.5", "auto/a", 0.6, 8.0)), seed(0.1)]
    rows = modes.table(seeds)
    assert rows["several"]["points"].keys() == {"direct", "reason", "latent/a"}
    assert rows["several"]["points"]["latent/a"]["ndcg@10"] == pytest.approx(0.35)
    # Between 0.6 of the gain at 8 tokens and 0.8 at 12.
    assert rows["several"]["kept_at_half"] == {"auto/a": [pytest.approx(0.7), None]}
    text = modes.lines("several", rows["several"])
    assert [line.split()[0] for line in text[:4]] == ["several", "direct", "latent/a", "reason"]
    assert text[2].split()[1:] == ["0.350", "3.0", "0.300"]


def test_systems_are_asked_in_turns_and_the_least_of_each_query_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import modes
    from tests.conftest import small_collection

    collection, calls = small_collection(), []
    collection.qrels["mixed"] = collection.qrels["train"]

    class Slow:
        def __init__(self, name: str, cost: float) -> None:
            self.name, self.cost = name, cost

        def index(self, _: Any) -> Slow:
            return self

        def answer(self, requests: Any, depth: int) -> float:
            calls.append((self.name, requests[0].query_id))
            return self.cost + 100.0 * (len(calls) % 4 == 0)  # something else runs now and then

    monkeypatch.setattr(modes, "seconds", lambda work, *given: work(*given) / 1000)
    assert modes.asked_alone([Slow("a", 1.0), Slow("b", 2.0)], collection, 10) == [1.0, 2.0]
    assert [name for name, _ in calls[:6]] == ["b", "a", "a", "b", "b", "a"]
    assert len({query_id for _, query_id in calls[:6]}) == 1 and len(calls) == 20 * 6
