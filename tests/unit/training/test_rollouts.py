"""Which rollouts stage 2 learns from, what they say about it, and the pathwise term, on a tiny model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from search_r3.config import GRPOSettings, Recipe, RefreshSettings, RewardSettings, load_recipe
from search_r3.data.collection import Collection
from search_r3.environment.environment import RetrievalEnvironment
from search_r3.environment.reward import RewardParts
from search_r3.environment.scoring import Score
from search_r3.errors import ConfigError
from search_r3.model.encoder import SearchR3
from search_r3.training import grpo
from search_r3.training.engine import make_engine
from search_r3.training.losses import group_advantages
from search_r3.training.rl import pathwise, rollouts, signals
from tests.conftest import favour


def recipe(**grpo_settings: object) -> Recipe:
    section = {"queries_per_step": 4, "group_size": 3, **grpo_settings}
    return Recipe(max_length=120, max_new_tokens=6, grpo=GRPOSettings(**section))  # type: ignore[arg-type]


def world(model: SearchR3, collection: Collection, settings: GRPOSettings) -> RetrievalEnvironment:
    return RetrievalEnvironment(
        collection, collection.split("train"), model, RefreshSettings(policy="full"), settings.reward,
        k=10, max_new_tokens=6, depth=settings.embedding_depth,
    )  # fmt: skip


@pytest.fixture
def talker(model: SearchR3) -> SearchR3:
    favour(model.backbone, model.backbone.embed_token_id, 3.5)  # emitted by some rollouts, not by all
    return model


def collect(model: SearchR3, collection: Collection, settings: Recipe, step: int = 0) -> rollouts.Experience:
    environment = world(model, collection, settings.grpo)
    return rollouts.collect(model, environment, settings, step, make_engine(model, settings, settings.grpo))


# Baselines


def test_baselines_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.5], [0.4, 0.4, 0.4]])
    one_out = group_advantages(rewards, "none", "leave_one_out").values
    assert one_out[0].tolist() == pytest.approx([1 - 0.25, 0 - 0.75, 0.5 - 0.5])
    assert one_out[1].tolist() == [0.0, 0.0, 0.0]
    rounded = group_advantages(torch.tensor([[0.4, 0.4 + 5e-7, 0.4]]), "group").values
    assert rounded[0].tolist() == [0.0, 0.0, 0.0], "rounding teaches nothing"
    direct = group_advantages(rewards, "none", torch.tensor([0.75, 0.1]))
    assert direct.values[0].tolist() == pytest.approx([0.25, -0.75, -0.25])
    assert direct.values[1].tolist() == pytest.approx([0.3, 0.3, 0.3]), "reasoning that helps each time is paid for it"
    assert direct.equal_share == 0.5
    scaled = [group_advantages(rewards, "batch", one).values for one in ("group_mean", "leave_one_out")]
    assert torch.allclose(*scaled, atol=1e-3), "a factor that the divisor takes away"


def test_a_direct_baseline_is_what_direct_mode_earns(talker: SearchR3, collection: Collection) -> None:
    settings = recipe(baseline="direct", advantage_scale="none")
    batch = collect(talker, collection, settings)
    vectors = talker.encode_query([collection.queries[one].text for one in batch.query_ids[::3]], "direct").vectors
    np.testing.assert_allclose([one.vector.numpy() for one in batch.direct], vectors, atol=1e-5)
    environment = world(talker, collection, settings.grpo)
    for place, (query_id, vector) in enumerate(zip(batch.query_ids[::3], vectors, strict=True)):
        [positive] = environment.query_rows(query_id).positives
        products = environment.index.matrix @ vector
        rank = 1 + int((products > products[positive]).sum())
        assert batch.direct_scores[place].best_rank == rank
        direct = batch.direct_scores[place].parts
        assert (direct.format, direct.length, direct.tokens) == (1.0, 0.0, 0.0)
        earned = torch.tensor(batch.feedback.rewards[place * 3 : place * 3 + 3]) - direct.total(settings.grpo.reward)
        assert torch.allclose(batch.advantages[place * 3 : place * 3 + 3], earned, atol=1e-6)
    values = signals.describe(batch, make_engine(talker, settings, settings.grpo), settings.grpo.reward, 3)
    expected = [score.parts.total(settings.grpo.reward) for score in batch.direct_scores]
    assert values["direct_reward"] == pytest.approx(np.mean(expected))


def test_a_direct_baseline_over_groups_own_deviations_is_refused() -> None:
    with pytest.raises(ConfigError, match="baseline=direct with advantage_scale=group divides by 0"):
        load_recipe(None, ["grpo.baseline=direct", "grpo.advantage_scale=group"])


# Which queries


def test_groups_that_rank_alike_are_replaced_so_often_and_no_oftener(
    talker: SearchR3, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    alike = {"q00", "q01"}  # whatever is replied

    def by_rank(self: RewardParts, weights: RewardSettings) -> float:
        return 0.0 if self.custom else next(counter)

    counter = iter(np.arange(1e4).tolist())
    monkeypatch.setattr(RewardParts, "by_rank", by_rank)
    settings = recipe(queries_per_step=6, redraws=0)
    environment = world(talker, collection, settings.grpo)
    environment.scorer.function = lambda outcome: float(outcome.query_id in alike)
    engine = make_engine(talker, settings, settings.grpo)
    step = next(i for i in range(9) if alike & set(rollouts.choose_queries(talker, environment, settings, i, engine)))
    plain = rollouts.collect(talker, environment, settings, step, engine)
    assert alike & set(plain.query_ids) and plain.redrawn == 0
    often = settings.model_copy(update={"grpo": settings.grpo.model_copy(update={"redraws": 3})})
    batch = rollouts.collect(talker, environment, often, step, engine)
    assert not alike & set(batch.query_ids)
    assert batch.redrawn == len(alike & set(plain.query_ids))
    assert batch.queries == [one for one in batch.queries[::3] for _ in range(3)]
    assert len(set(batch.query_ids)) == 6, "no query stands twice in a step"
    for place, (before, after) in enumerate(zip(plain.query_ids[::3], batch.query_ids[::3], strict=True)):
        groups = [[one.completion_ids for one in b.rollouts[place * 3 : place * 3 + 3]] for b in (plain, batch)]
        assert (before in alike) == (before != after)
        assert (groups[0] == groups[1]) == (before == after), "the other groups stay as they were"
    # Rewards, scores and rollouts belong together.
    rescored = environment.score(batch.rollouts, batch.query_ids)
    assert [one.parts for one in rescored] == batch.feedback.parts
    assert batch.feedback.rewards == pytest.approx([one.parts.total(environment.weights) for one in rescored])
    alike |= set(collection.queries)
    assert rollouts.collect(talker, environment, often, step, engine).redrawn == 6 + 6 + 2, "until none is left"


def test_a_curriculum_prefers_what_direct_mode_nearly_finds(
    model: SearchR3, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(curriculum=3)
    environment = world(model, collection, settings.grpo)
    engine = make_engine(model, settings, settings.grpo)
    looked_at = rollouts.queries_of_step(sorted(environment.qrels), 12, 0, 2)
    ranks = dict(zip(looked_at, [1, 1, 7, 1001, 2, 1, 1000, 1, 1, 1, 1, 1], strict=True))

    def score(replies: object, query_ids: list[str]) -> list[Score]:
        return [Score(None, ranks[query_id], 0.0, np.arange(0)) for query_id in query_ids]  # type: ignore[arg-type]

    monkeypatch.setattr(environment, "score", score)
    chosen = rollouts.choose_queries(model, environment, settings, 2, engine)
    assert chosen == [looked_at[2], looked_at[4], looked_at[6], looked_at[0]]
    assert rollouts.choose_queries(model, environment, recipe(), 2, engine) == rollouts.queries_of_step(
        sorted(environment.qrels), 4, 0, 2
    ), "without one, the passes of always"


# Signals


def parts(ndcg: float, log_rank: float = 0.0, form: float = 1.0) -> RewardParts:
    return RewardParts(ndcg, log_rank, 0.0, form, 0.0, 0.0, 0.0)


def test_dead_groups_and_shares_of_the_variance_by_hand() -> None:
    batch = [
        *[parts(0.0, 0.2), parts(0.0, 0.4)],
        *[parts(1.0), parts(1.0)],
        *[parts(0.5), parts(0.5)],
        *[parts(0.0), parts(1.0, form=0.0)],
    ]
    weights = RewardSettings(ndcg=1.0, log_rank=1.0, contrastive=0.0, format=0.5)
    values = signals.group_signals(batch, weights, 2)
    shares = {name: values[f"groups_{name}"] for name in ("all_0", "all_1", "tied", "mixed")}
    assert shares == {"all_0": 0.25, "all_1": 0.25, "tied": 0.25, "mixed": 0.25}
    # Centred totals: -0.1, 0.1 (log_rank) and -0.25, 0.25 (ndcg -0.5, 0.5; format 0.25, -0.25).
    variance = 2 * 0.1**2 + 2 * 0.25**2
    assert values["advantage_share_log_rank"] == pytest.approx(2 * 0.1**2 / variance)
    assert values["advantage_share_ndcg"] == pytest.approx(2 * 0.5 * 0.25 / variance)
    assert values["advantage_share_format"] == pytest.approx(-2 * 0.25 * 0.25 / variance), "it pulls the other way"
    assert sum(value for name, value in values.items() if name.startswith("advantage_share")) == pytest.approx(1.0)
    assert "advantage_share_contrastive" not in values and "advantage_share_custom" not in values
    equal = signals.group_signals([parts(1.0)] * 4, weights, 2)
    assert [equal[f"advantage_share_{name}"] for name in ("ndcg", "log_rank", "format")] == [0.0] * 3


def test_cosines_are_taken_within_groups() -> None:
    vectors = np.array([[1, 0], [1, 0], [0, 1], [1, 0]], dtype=np.float32)
    assert signals.group_cosines(vectors, 2) == [1.0, 0.0]


# The pathwise term


def loss_of(environment: RetrievalEnvironment, vectors: torch.Tensor, query_ids: list[str]) -> torch.Tensor:
    replies = [rollouts.Rollout([0], [], [], [], vector.detach(), "") for vector in vectors]
    scores = environment.score(replies, query_ids)
    return pathwise.embedding_loss(vectors, environment, query_ids, scores, 0.05)


def unit(count: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, 32, generator=generator), dim=-1)


@pytest.mark.parametrize("depth", [3, 100])
def test_the_embedding_term_is_info_nce_over_the_best_and_the_positive(
    model: SearchR3, collection: Collection, depth: int
) -> None:
    environment = world(model, collection, GRPOSettings(embedding_depth=depth))
    vectors = unit(2).requires_grad_()
    expected = []
    for vector, query_id in zip(vectors.detach().numpy(), ["q00", "q01"], strict=True):
        scores = environment.index.matrix @ vector
        [positive] = environment.query_rows(query_id).positives
        kept = {*np.argsort(-scores)[:depth].tolist(), int(positive)}
        logits = scores[sorted(kept)] / 0.05
        expected.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - scores[positive] / 0.05)
    loss = loss_of(environment, vectors, ["q00", "q01"])
    assert loss.item() == pytest.approx(np.mean(expected), abs=1e-4)
    loss.backward()
    moved = torch.nn.functional.normalize(vectors.detach() - 0.01 * vectors.grad, dim=-1)
    assert loss_of(environment, moved, ["q00", "q01"]).item() < loss.item()


def test_the_embedding_term_copies_no_corpus(
    model: SearchR3, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = world(model, collection, GRPOSettings(embedding_depth=3))
    vectors = unit(2)
    replies = [rollouts.Rollout([0], [], [], [], vector, "") for vector in vectors]
    scores = environment.score(replies, ["q00", "q01"])
    read: list[int] = []
    held = type(environment.index).vectors_at
    monkeypatch.setattr(
        type(environment.index), "vectors_at", lambda self, rows: (read.append(len(rows)), held(self, rows))[1]
    )
    pathwise.embedding_loss(vectors, environment, ["q00", "q01"], scores, 0.05)
    assert 0 < sum(read) <= 2 * 4 < len(environment.index)


def test_the_embedding_term_does_not_push_from_what_is_never_ranked(model: SearchR3, collection: Collection) -> None:
    left_out = [doc_id for doc_id in collection.documents if doc_id not in collection.split("train")["q00"]]
    limited = replace(collection, excluded={"q00": frozenset(left_out)})
    whole, none = (loss_of(world(model, one, GRPOSettings()), unit(1), ["q00"]).item() for one in (collection, limited))
    assert none == 0 < whole


def test_the_embedding_term_does_not_push_from_a_positives_text(model: SearchR3, collection: Collection) -> None:
    twin = replace(collection.documents["d00"], doc_id="twin")
    doubled = replace(collection, documents={"twin": twin, **collection.documents})
    alone, both = (loss_of(world(model, one, GRPOSettings()), unit(1), ["q00"]) for one in (collection, doubled))
    assert both.item() == pytest.approx(alone.item(), abs=1e-5)


def test_several_positives_are_no_rivals_and_the_best_one_is_pulled(model: SearchR3, collection: Collection) -> None:
    qrels = {**collection.qrels, "train": collection.qrels["train"] | {"q00": {"d00": 1, "d07": 2}}}
    environment = world(model, replace(collection, qrels=qrels), GRPOSettings())
    best = environment.index.vectors_at(environment.index.rows_of(["d07"]))
    towards = torch.from_numpy(best).requires_grad_()
    loss = loss_of(environment, towards, ["q00"])
    rest = [row for row, doc_id in enumerate(environment.index.doc_ids) if doc_id != "d00"]
    scores = torch.from_numpy(environment.index.vectors_at(rest) @ best[0]) / 0.05
    assert loss.item() == pytest.approx((scores.logsumexp(0) - 1 / 0.05).item(), abs=1e-4)


def test_the_term_on_the_winners_leaves_the_others_out(talker: SearchR3, collection: Collection) -> None:
    losses = {}
    for kind in ("all", "winners"):
        settings = recipe(embedding_loss_weight=1.0, embedding_loss_on=kind)
        environment = world(talker, collection, settings.grpo)
        engine = make_engine(talker, settings, settings.grpo)
        batch = rollouts.collect(talker, environment, settings, 0, engine)
        for name, advantages in (("one", [1.0] + [0.0] * 11), ("none", [-1.0] * 12), ("every", [1.0] * 12)):
            batch = replace(batch, advantages=torch.tensor(advantages))
            totals = {"tokens": 1, "computed_tokens": 1, "rollouts": 12, "queries": 4}
            arguments = (talker, engine, environment, batch, range(12), settings.grpo, totals)
            losses[kind, name] = grpo._micro_loss(*arguments)[1]["embedding_loss"]
            if (kind, name) == ("winners", "one"):
                first = (batch.rollouts[0].vector[None], environment, batch.query_ids[:1], batch.feedback.scores[:1])
                own = pathwise.embedding_loss(*first, settings.grpo.contrastive_temperature)
    assert losses["all", "one"] == losses["all", "none"] == losses["winners", "every"] > 0
    assert losses["winners", "none"] == 0.0
    assert losses["winners", "one"] == pytest.approx(own.item() / 12, abs=1e-4), "divided by all rollouts"


def test_queries_that_stage_1_knows_are_said(caplog: pytest.LogCaptureFixture) -> None:
    ranks = RewardSettings(contrastive=0)
    signals.warn_if_known({"groups_all_1": 0.62}, ranks)
    signals.warn_if_known({"groups_all_1": 0.81}, RewardSettings())
    assert not caplog.messages, "the reward still tells replies apart"
    signals.warn_if_known({"groups_all_1": 0.81}, ranks)
    assert "81 % of the first step's queries are found by every rollout" in caplog.text
