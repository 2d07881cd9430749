"""The reward's parts, by hand; and a part of the user's own."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from search_r3.config import RefreshSettings, RewardSettings, load_recipe
from search_r3.data.collection import Collection, Document, Query
from search_r3.environment.environment import RetrievalEnvironment
from search_r3.environment.reward import Outcome, RewardParts, contrastive, load_function, log_rank, reward_parts
from search_r3.errors import ConfigError, RewardError
from search_r3.retrieval.metrics import ndcg_from_ranks
from tests.unit.environment.test_environment import MovingEncoder, rollout

OUTCOME = Outcome(
    query_id="q", query="where?", reasoning="there", reasoning_tokens=4, max_new_tokens=16, forced=False,
    doc_ids=["a", "b"], gains=[2, 1], ranks=[40, 2], cosines=[0.1, 0.9],
)  # fmt: skip
SETTINGS = RewardSettings()


def scored(**changes: object) -> dict[str, float]:
    outcome = replace(OUTCOME, **changes)  # type: ignore[arg-type]
    return vars(reward_parts(outcome, SETTINGS, k=10, contrast=0.5))


def test_parts_by_hand() -> None:
    parts = scored()
    assert parts["ndcg"] == pytest.approx((1 / np.log2(3)) / (2 + 1 / np.log2(3)))
    assert parts["log_rank"] == pytest.approx(((1 - math.log(39) / math.log(1000)) * 2 + 1 - math.log(2, 1000)) / 3)
    assert (parts["contrastive"], parts["format"], parts["tokens"]) == (0.5, 1.0, -0.25)
    assert (parts["length"], parts["custom"]) == (0.0, 0.0)


def test_the_reward_is_the_weighted_sum() -> None:
    weights = RewardSettings(ndcg=1, log_rank=2, contrastive=4, format=8, length=16, tokens=32, custom=64)
    parts = reward_parts(OUTCOME, SETTINGS, k=10, contrast=0.5, function=lambda outcome: 0.25)
    expected = parts.ndcg + 2 * parts.log_rank + 4 * 0.5 + 8 * 1.0 - 32 * 0.25 + 64 * 0.25
    assert parts.total(weights) == pytest.approx(expected) == sum(parts.weighted(weights).values())
    assert parts.total(RewardSettings(log_rank=0, contrastive=0, format=0, custom=0)) == parts.ndcg


@pytest.mark.parametrize(
    ("ranks", "gains", "expected"),
    [
        ([1], [1], 1.0),
        ([1000], [1], 0.0),
        ([5000], [3], 0.0),
        ([100], [1], 1 / 3),
        ([3, 1, 2], [1, 1, 1], 1.0),  # the best order of three
        ([1, 101], [1, 1], (1 + 1 / 3) / 2),
        ([1, 101], [3, 1], (3 + 1 / 3) / 4),  # graded: the one that matters more is found
    ],
)
def test_log_rank(ranks: list[int], gains: list[int], expected: float) -> None:
    assert log_rank(ranks, gains) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("ranks", [range(1, 9), (1, 3, 4, 8, 9, 20, 70, 300)])
def test_what_ranks_earn_is_the_same_to_the_last_digit_in_whatever_order(ranks: Sequence[int]) -> None:
    chance = random.Random(0)
    orders = [chance.sample(ranks, len(ranks)) for _ in range(50)]
    assert len({ndcg_from_ranks(one, [1] * len(ranks), 10) for one in orders}) == 1
    assert len({log_rank(one, [1] * len(ranks)) for one in orders}) == 1
    assert (ndcg_from_ranks(orders[0], [1] * len(ranks), 10) == 1.0) == (max(ranks) == len(ranks))


def test_what_ranks_earn_counts_log_rank_only_where_a_recipe_does() -> None:
    deep, deeper = (RewardParts(0.0, part, 0.0, 1.0, 0.0, -0.1, 0.0) for part in (0.2, 0.1))
    with_it, without = RewardSettings(log_rank=0.5), RewardSettings(log_rank=0.0)
    assert deep.by_rank(with_it) > deeper.by_rank(with_it), "the group is not tied: it is not redrawn"
    assert deep.by_rank(without) == deeper.by_rank(without) == 0.0


def test_contrastive_is_a_softmax_of_each_positive_among_the_negatives() -> None:
    negatives = np.array([0.7, 0.2], dtype=np.float32)
    one = math.exp(8) / (math.exp(8) + math.exp(7) + math.exp(2))
    two = math.exp(5) / (math.exp(5) + math.exp(7) + math.exp(2))
    assert contrastive(np.array([0.8]), [1], negatives, 0.1) == pytest.approx(one)
    assert contrastive(np.array([0.8, 0.5]), [1, 3], negatives, 0.1) == pytest.approx((one + 3 * two) / 4)
    assert contrastive(np.array([0.8, -np.inf]), [1, 1], negatives, 0.1) == pytest.approx(one / 2)
    assert contrastive(np.array([0.9]), [1], np.array([]), 1e-6) == 1.0
    assert contrastive(np.array([-0.9]), [1], np.array([0.9]), 1e-6) == 0.0


def test_a_forced_reply_earns_nothing_by_its_ranks_unless_a_recipe_says_so() -> None:
    parts = scored(forced=True, reasoning_tokens=15)
    assert [parts[name] for name in ("ndcg", "log_rank", "contrastive", "format")] == [0.0] * 4
    lenient = reward_parts(
        replace(OUTCOME, forced=True), RewardSettings(forced_ranks=True), k=10, contrast=0.5
    )  # fmt: skip
    assert (lenient.log_rank, lenient.contrastive, lenient.format) == (scored()["log_rank"], 0.5, 0.0)


def test_length_is_free_up_to_three_quarters_of_the_budget_and_tokens_are_never() -> None:
    assert [scored(reasoning_tokens=n)["length"] for n in (0, 12, 15)] == [0.0, 0.0, -1.0]
    assert scored(reasoning_tokens=13)["length"] == pytest.approx(-1 / 3)
    assert [scored(reasoning_tokens=n)["tokens"] for n in (0, 12)] == [0.0, -0.75]
    tiny = replace(OUTCOME, reasoning_tokens=1, max_new_tokens=2)
    assert reward_parts(tiny, SETTINGS, k=10).length == 0.0


def test_a_reward_that_cannot_be_computed_is_an_error_never_zero() -> None:
    with pytest.raises(RewardError, match="without a relevant document"):
        scored(ranks=[], gains=[], cosines=[])
    with pytest.raises(RewardError, match="not finite"):
        scored(cosines=[float("nan"), 0.0])


# A part of the user's own


def test_a_function_of_the_recipe_is_given_the_reply_and_adds_to_the_reward(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Outcome] = []

    def brief(outcome: Outcome) -> float:
        seen.append(outcome)
        return 0.5 if len(outcome.reasoning) < 5 else -0.5

    monkeypatch.setitem(__import__("sys").modules, "my_rewards", SimpleNamespace(brief=brief))
    weights = load_recipe(
        None, ["grpo.reward.function=my_rewards:brief", "grpo.reward.custom=2", "grpo.reward.contrastive=0"]
    ).grpo.reward
    world = RetrievalEnvironment(
        collection, collection.split("train"), MovingEncoder(collection), RefreshSettings(policy="never"), weights,
        k=10, max_new_tokens=10,
    )  # fmt: skip
    feedback = world.feedback([rollout(0.0), rollout(0.07, forced=True)], ["q00", "q00"], policy_version=0)
    assert [part.custom for part in feedback.parts] == [0.5, 0.5]
    assert feedback.rewards[0] == pytest.approx(1.0 + 0.5 + 0.1 + 2.0 * 0.5)
    assert (seen[0].query_id, seen[0].doc_ids, seen[0].ranks, seen[0].gains) == ("q00", ["d00"], [1], [1])
    assert (seen[0].query, seen[0].reasoning) == (collection.queries["q00"].text, "text")
    assert seen[0].cosines == pytest.approx([1.0]) and seen[1].cosines == pytest.approx([math.cos(0.07)], abs=1e-6)
    assert (seen[1].ranks, seen[1].forced, seen[1].reasoning_tokens, seen[1].max_new_tokens) == ([5], True, 5, 10)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "No module named 'no_such_module'; expected module:function, of a module that Python"),
        ("math:no_such_function", "no attribute 'no_such_function'"),
        ("math:pi", "is no function but float"),
    ],
)
def test_a_function_that_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_function(name)
    with pytest.raises(ConfigError, match=r"grpo\.reward\.function = 'math\.sin'"):
        load_recipe(None, ["grpo.reward.function=math.sin"])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda outcome: 1 / 0, "failed for query 'q': ZeroDivisionError: division by zero"),
        (lambda outcome: float("inf"), "gave inf for query 'q'; expected a number"),
        (lambda outcome: None, "failed for query 'q': TypeError"),
    ],
)
def test_a_function_that_gives_no_number_stops_the_training(function: object, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        reward_parts(OUTCOME, SETTINGS, k=10, function=function)  # type: ignore[arg-type]


# In the environment


def shelf(**options: object) -> Collection:
    """Documents on a line of angles; `twin` has the text of the relevant d2."""
    documents = {f"d{i}": Document(f"d{i}", f"text {i}") for i in range(6)}
    documents["twin"] = Document("twin", "text 2")
    return Collection("shelf", documents, {"q": Query("q", "where?")}, {"train": {"q": {"d2": 1, "d0": 0}}}, **options)


def contrast(data: Collection, depth: int, remembered: int = 0) -> float:
    weights = RewardSettings(contrastive=1.0, contrastive_temperature=0.01, contrastive_depth=depth)
    world = RetrievalEnvironment(
        data, data.split("train"), MovingEncoder(data), RefreshSettings(policy="never"), weights, k=10,
        max_new_tokens=10, depth=remembered,
    )  # fmt: skip
    return world.feedback([rollout(0.0)], ["q"], policy_version=0).parts[0].contrastive


def by_hand(positive: float, negatives: list[float]) -> float:
    own, others = (np.exp(np.cos(np.array(angles)) / 0.01) for angles in ([positive], negatives))
    return float(own.sum() / (own.sum() + others.sum()))


def test_contrastive_looks_at_the_best_of_the_index_and_the_positives_without_their_twins() -> None:
    # MovingEncoder places a text where its last document stands: `text 2` at 6 * 0.03.
    two = 0.18
    every = [0.0, 0.03, 0.09, 0.12, 0.15]
    assert contrast(shelf(), 100) == pytest.approx(by_hand(two, every), rel=1e-4)
    assert contrast(shelf(), 2) == pytest.approx(by_hand(two, every[:2]), rel=1e-4), "a positive beyond K is added"
    assert contrast(shelf(), 2, remembered=6) == contrast(shelf(), 2), "what others look at changes no reward"


def test_contrastive_follows_the_ranking_rule() -> None:
    limited = shelf(excluded={"q": frozenset({"d0", "d3"})})
    assert contrast(limited, 100) == pytest.approx(by_hand(0.18, [0.03, 0.12, 0.15]), rel=1e-4)
    pooled = shelf(pools={"q": frozenset({"d2", "d4"})})
    assert contrast(pooled, 100) == pytest.approx(by_hand(0.18, [0.12]), rel=1e-4)
    lost = shelf(pools={"q": frozenset({"d4"})})
    assert contrast(lost, 100) == 0.0, "a positive outside of the pool cannot be ranked"
