"""The frontier: what is composed equals what is measured, areas, and tests at equal price."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_results import make_result

from search_r3.data.collection import Collection
from search_r3.errors import ModelError
from search_r3.evaluation.benchmark import EvaluationOptions, evaluate
from search_r3.evaluation.frontier.curves import area, at_cost, equal_cost_tests, family_areas, upper_edge
from search_r3.evaluation.frontier.points import Pair, Point, points_of
from search_r3.evaluation.frontier.record import frontier, markdown, read_frontier, write_frontier
from search_r3.evaluation.instructions import label
from search_r3.evaluation.report import plots
from search_r3.evaluation.report.page import default_pair, write_page
from search_r3.evaluation.results import Result
from search_r3.evaluation.systems import Effort, EncodedCollections, SearchR3System
from search_r3.evaluation.table import gain_per_100_tokens, notes
from search_r3.model.encoder import SearchR3
from tests.conftest import favour, small_collection
from tests.gates import gate_for, let_it_decide

OPTIONS = EvaluationOptions(depth=100, latency_queries=1, bootstrap=20)


@pytest.fixture(scope="module")
def results(tiny_path: Path) -> list[Result]:
    """A tiny model in all ways on one split."""
    collection, model = small_collection(), SearchR3(tiny_path, device="cpu", max_new_tokens=8)
    favour(model.backbone, model.backbone.embed_token_id, 2.2)
    model.backbone.gate = gate_for(model, [one.text for one in collection.queries.values()])
    encoded = EncodedCollections(model)
    ways = [("direct", "direct", Effort()), ("reason", "reason", Effort()), ("auto", "auto", Effort())]
    ways += [("dear", "auto", Effort(price=0.01)), ("reason 3 tokens", "reason", Effort(budget=3))]
    ways += [("reason mean of 3", "reason", Effort(samples=3))]
    systems = [SearchR3System(encoded, mode, name, effort=effort) for name, mode, effort in ways]
    return [evaluate(system, collection, "train", OPTIONS) for system in systems]


def test_an_edge_is_concave() -> None:
    points = [(0.0, 0.2), (1.0, 0.1), (2.0, 0.5), (3.0, 0.52), (4.0, 0.8), (9.0, 0.7)]
    assert upper_edge(points) == [(0.0, 0.2), (2.0, 0.5), (4.0, 0.8)] or upper_edge(points)[-1] == (4.0, 0.8)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(upper_edge(points), upper_edge(points)[1:], strict=False)]
    assert slopes == sorted(slopes, reverse=True) and upper_edge([(0.0, 0.1), (0.0, 0.3)]) == [(0.0, 0.3)]


def test_an_area_is_the_mean_share_of_the_gain() -> None:
    cheap, dear = (1.0, 0.2), (11.0, 0.8)
    assert area([], cheap, dear) == pytest.approx(0.5)
    assert area([(6.0, 0.3)], cheap, dear) == pytest.approx(0.5)  # a mixture of the two ends is better
    assert area([(1.0, 0.8)], cheap, dear) == pytest.approx(1.0)
    assert area([(6.0, 0.8)], cheap, dear) == pytest.approx(0.75)
    assert area([], (0.0, 0.8), (10.0, 0.8)) is None and area([], (0.0, 0.1), (0.0, 0.8)) is None


def test_auto_at_the_gates_price_is_composed_of_its_modes(results: list[Result]) -> None:
    direct, reason, auto, dear = results[:4]
    for result in (auto, dear):
        for i, thinks in enumerate(result.thought):
            one = reason if thinks else direct
            assert result.per_query["ndcg@10"][i] == pytest.approx(one.per_query["ndcg@10"][i])
            assert result.reasoning_tokens[i] == (reason.reasoning_tokens[i] if thinks else 0)
    assert sum(dear.thought) < sum(auto.thought) and auto.cost.thinking_share == pytest.approx(np.mean(auto.thought))
    found = points_of(results)
    assert found is not None
    composed = [point for point in found[1] if point.name.startswith("auto at ")]
    assert [point.facts["share"] for point in composed] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5], abs=0.06)
    prices = [point.facts["price"] for point in composed]
    assert prices == sorted(prices, reverse=True) and prices[-1] >= 0
    order = np.argsort([-one["probability"] for one in auto.gate])
    for point in composed:
        thinkers = order[: round(point.facts["share"] * len(order))]
        values = [[direct, reason][i in thinkers].per_query["ndcg@10"][i] for i in range(len(order))]
        assert point.values.tolist() == pytest.approx(values)
        assert sum(point.tokens) == sum(reason.reasoning_tokens[i] for i in thinkers)


def test_effort_is_measured_and_paid(results: list[Result]) -> None:
    direct, reason, auto, _, cut, mean = results
    assert max(cut.reasoning_tokens) <= 2 < max(reason.reasoning_tokens)
    assert mean.cost.tokens_per_query > 1.5 * reason.cost.tokens_per_query
    assert len({result.key for result in results}) == len(results)
    for result in (auto, cut, mean):
        assert gain_per_100_tokens(result, results) is not None
    assert any("auto: the gate let" in note for note in notes(results))
    assert default_pair(results) == (direct, reason)


def test_the_oracle_is_the_better_of_both(results: list[Result]) -> None:
    [split] = frontier(results, 100, 0)
    oracle = next(point for point in split["points"] if point["name"] == "oracle")
    best = np.maximum(results[0].per_query["ndcg@10"], results[1].per_query["ndcg@10"])
    assert oracle["ndcg@10"] == pytest.approx(best.mean())
    [made] = frontier([make_result("direct", mode="direct", quality=0.3), make_result("reason")], 100, 0)
    assert 0.5 <= made["areas"]["tokens"]["all"] <= made["areas"]["tokens"]["oracle"]
    assert {"random", "budget"} <= {test["second"] for test in split["tests"] if test["first"].startswith("auto")}


def point(name: str, values: list[float], tokens: float) -> Point:
    return Point(name, name, np.array(values), np.full(len(values), tokens), None)


def test_equal_cost_is_a_mixture_of_neighbours() -> None:
    cheap, dear = point("direct", [0.0, 1.0], 0.0), point("reason", [1.0, 1.0], 10.0)
    mixed = at_cost([dear, cheap], 2.5, "random")
    assert mixed is not None and mixed.values.tolist() == [0.25, 1.0] and mixed.cost == 2.5
    assert at_cost([dear, cheap], 11.0, "random") is None
    pair = Pair(cheap, dear)
    assert pair.composed("x", "auto", np.array([True, False])).facts["share"] == 0.5


def test_other_models_join_the_points() -> None:
    results = [make_result("direct", mode="direct", quality=0.3), make_result("reason")]
    results += [make_result("direct/distilled", mode="direct", quality=0.5)]
    found = points_of(results)
    assert found is not None
    assert [one.family for one in found[1]] == ["direct", "reason", "direct/distilled", "oracle"]
    [split] = frontier(results, 100, 0)
    assert "direct/distilled" in split["areas"]["tokens"]
    assert points_of(results[1:]) is None and frontier([results[0]], 100, 0) == []


def instructed(*orders: str) -> list[Result]:
    """A model in all ways under these choices of an instruction."""
    results = []
    for choice in orders:
        asked = {} if choice == "own" else {"instruction": choice}
        for title, mode, more in (
            *(("direct", "direct", {}), ("reason", "reason", {}), ("auto", "auto", {"gate": {"policy": True}})),
            *(("reason 8 tokens", "reason", {"budget": 8}), ("reason 60 tokens", "reason", {"budget": 60})),
        ):
            result = make_result(title + label(choice), mode=mode)
            system = result.system.model_copy(update={"settings": {"k1": 1.5, **asked, **more}})
            tokens = {"auto": [20] * 12, "direct": []}.get(title, [more.get("budget", 40)] * 12)
            results.append(result.model_copy(update={"system": system, "reasoning_tokens": tokens}))
    return results


def test_queries_with_another_instruction_have_families_and_tests_of_their_own() -> None:
    results = instructed("own", "none", "Find a/b.")
    ways = ["direct", "reason", "auto", "budget", "budget"]
    found, alone = points_of(results), points_of(results[:5])
    assert found is not None and alone is not None
    families = [one.family for one in found[1]]
    others = [f"{way}/{name}" for name in ("(none)", "(Find a/b.)") for way in ways]
    assert families == [*ways, *others, "oracle"]
    for one in alone[1]:
        assert family_areas(*found)["tokens"].get(one.family) == family_areas(*alone)["tokens"].get(one.family)
    tests = {(one["first"], one["second"]): one["difference"] for one in equal_cost_tests(*found, ("c", "s"), 100, 0)}
    assert {("auto", "budget"), ("direct (none)", "random"), ("auto (none)", "random")} <= tests.keys()
    assert ("auto (none)", "budget") not in tests, "budgets are of the first model under the first instruction"
    for one in equal_cost_tests(*alone, ("c", "s"), 100, 0):
        assert tests[one["first"], one["second"]] == one["difference"]


def test_where_the_queries_own_instruction_comes_second_it_is_the_other_one() -> None:
    found = points_of(instructed("none", "own"))
    assert found is not None and found[0].direct.name == "direct (none)"
    assert [one.family for one in found[1]][4:7] == ["budget", "direct/(own)", "reason/(own)"]


def test_a_picture_tells_models_by_markers_and_ways_to_think_by_colours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = [make_result("direct/a", mode="direct", quality=0.3), make_result("reason/a")]
    results += [make_result("direct/b", mode="direct", quality=0.5), make_result("direct/c", mode="direct")]
    legends: list[tuple[Any, ...]] = []
    monkeypatch.setattr(plots, "_legend", lambda _, *given: legends.append(given))
    for some in (results, results[:2]):
        assert plots.plot_frontier(frontier(some, 100, 0), tmp_path / "frontier.png")
    (colours, markers), (_, none) = legends
    assert {*colours} == {"direct", "reason", "oracle"} and len({*colours.values()}) == 3
    assert {*markers} == {"a", "b", "c"} and len({*markers.values()}) == 3
    assert none == {}, "of one model colours say it all"


def test_it_is_written_read_and_shown(results: list[Result], tmp_path: Path) -> None:
    splits = write_frontier(results, tmp_path, 100, 0)
    assert read_frontier(tmp_path) == json.loads(json.dumps(splits)) and read_frontier(tmp_path / "other") == []
    assert "| oracle |" in markdown(splits) and (tmp_path / "frontier.md").read_text() == markdown(splits)
    page = write_page(results, tmp_path / "page", title="modes", frontiers=splits).read_text()
    assert "What thinking is worth: small, train" in page and '"probability"' in page
    assert (tmp_path / "page" / "plots" / "frontier.png").stat().st_size > 10_000
    assert not (tmp_path / "plain" / "plots" / "frontier.png").exists()
    write_page(results[:2], tmp_path / "plain", title="modes")
    assert not (tmp_path / "plain" / "plots" / "frontier.png").exists()


def test_auto_without_a_gate_is_refused_before_anything_is_computed(model: SearchR3, collection: Collection) -> None:
    with pytest.raises(ModelError, match="search-r3 gate"):
        SearchR3System(EncodedCollections(model), "auto")


def test_a_model_that_decides_is_a_point_of_its_own(tiny_path: Path) -> None:
    collection, model = small_collection(), SearchR3(tiny_path, device="cpu", max_new_tokens=8)
    let_it_decide(model, [collection.queries[query_id].text for query_id in collection.split("train")])
    encoded = EncodedCollections(model)
    systems = [SearchR3System(encoded, mode) for mode in ("direct", "reason", "auto")]
    measured = [evaluate(system, collection, "train", OPTIONS) for system in systems]
    reason, auto = measured[1:]
    assert auto.system.settings["gate"] == {"policy": True} and 0 < sum(auto.thought) < len(auto.thought)
    for i, thinks in enumerate(auto.thought):
        assert auto.reasoning_tokens[i] == (reason.reasoning_tokens[i] if thinks else 0)
    [split] = frontier(measured, 100, 0)
    [row] = [row for row in split["points"] if row["family"] == "auto"]
    assert row["share"] == pytest.approx(np.mean(auto.thought)) and "price" not in row
    assert any(test["first"] == "auto" for test in split["tests"]) and markdown([split])
