"""Stage 2 of a policy that learns when to write, and stage 1 that shows it how not to."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch

from search_r3 import SearchR3
from search_r3.config import GRPOSettings, Recipe, RefreshSettings, SFTSettings, load_recipe
from search_r3.data.collection import Collection
from search_r3.data.triples import training_examples
from search_r3.environment.environment import RetrievalEnvironment
from search_r3.errors import ConfigError
from search_r3.training import grpo
from search_r3.training.batches import make_batch
from search_r3.training.engine import make_engine
from search_r3.training.grpo import train_grpo
from search_r3.training.rl import rollouts, signals
from search_r3.training.rl.decision import decision_advantages
from tests.conftest import favour


def recipe(**changes: object) -> Recipe:
    section = {"queries_per_step": 4, "group_size": 3, "at_once": True, "advantage_scale": "none", **changes}
    return Recipe(max_length=120, max_new_tokens=6, grpo=GRPOSettings(**section))  # type: ignore[arg-type]


def world(model: SearchR3, collection: Collection, settings: GRPOSettings) -> RetrievalEnvironment:
    return RetrievalEnvironment(
        collection, collection.split("train"), model, RefreshSettings(policy="full"), settings.reward,
        k=10, max_new_tokens=6,
    )  # fmt: skip


@pytest.mark.parametrize("earned", [[0.9, 0.2, 0.4], [0.1, 0.2, 0.9]])
def test_the_decision_is_a_logistic_regression_weighted_by_what_the_choice_is_worth(earned: list[float]) -> None:
    rewards, log_odds = torch.tensor([earned]), torch.tensor([0.7], requires_grad=True)
    chance = torch.sigmoid(log_odds)
    [advantage] = decision_advantages(rewards, chance.tolist(), 5.0, "none")
    (found,) = torch.autograd.grad(advantage * chance.log().sum(), log_odds)
    more = earned[0] - (earned[1] + earned[2]) / 2
    label = torch.tensor([float(more > 0)])
    loss = abs(more) * torch.nn.functional.binary_cross_entropy_with_logits(log_odds, label)
    (expected,) = torch.autograd.grad(loss, log_odds)
    assert found.item() == pytest.approx(-5 * expected.item(), rel=1e-5)


def test_a_policy_that_is_sure_and_wrong_is_told_so() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    wrong, right = ([1e-6, 1 - 1e-9], [1 - 1e-9, 1e-6])

    def pushes(chances: list[float]) -> list[float]:  # of the log-odds
        return [
            one * (1 - p)
            for one, p in zip(decision_advantages(rewards, chances, 2.0, "none").tolist(), chances, strict=True)
        ]

    assert pushes(wrong)[0] == pytest.approx(2.0, rel=1e-3) and pushes(right) == pytest.approx([0.0, 0.0], abs=1e-5)
    assert decision_advantages(rewards, wrong, 2.0, "none").isfinite().all()
    scaled = decision_advantages(3 * rewards, [0.2, 0.2], 2.0, "batch")
    assert scaled.tolist() == pytest.approx(decision_advantages(rewards, [0.2, 0.2], 2.0, "none").tolist(), rel=1e-3)


def test_of_each_group_one_reply_embeds_at_once_and_the_others_write(model: SearchR3, collection: Collection) -> None:
    embed = model.backbone.embed_token_id
    favour(model.backbone, embed, 6.0)
    settings = recipe()
    environment, engine = world(model, collection, settings.grpo), make_engine(model, settings, settings.grpo)
    batch = rollouts.collect(model, environment, settings, 0, engine)
    tokens = sum(len(one.completion_ids) for one in batch.rollouts if one.completion_ids[0] != embed)
    for place in range(4):
        group = batch.rollouts[3 * place : 3 * place + 3]
        assert group[0].completion_ids == [embed] and group[0].completion_mask == [1]
        assert all(one.completion_ids[0] != embed for one in group[1:])
        chance = batch.at_once[place]
        # Beyond the embed token's, that of ending at once.
        assert 0.01 < math.exp(group[0].logprobs[0]) <= chance + 1e-5 < math.exp(group[0].logprobs[0]) + 0.01
        rewards = batch.feedback.rewards[3 * place : 3 * place + 3]
        assert batch.feedback.parts[3 * place].format == 1, "it was not forced: the policy may choose it"
        more = rewards[0] - (rewards[1] + rewards[2]) / 2
        decided = tokens / 4 * (more if more > 0 else more * chance / (1 - chance))
        expected = [decided, (rewards[1] - rewards[2]) / 2, (rewards[2] - rewards[1]) / 2]
        assert batch.advantages[3 * place : 3 * place + 3].tolist() == pytest.approx(expected, abs=1e-4)
    values = signals.describe(batch, engine, settings.grpo.reward, 3)
    assert values["at_once_probability"] == pytest.approx(sum(batch.at_once) / 4)
    assert values["at_once_reward"] == pytest.approx(sum(batch.feedback.rewards[::3]) / 4)
    sampled = [one for one in batch.rollouts if one.writes is None]
    logprobs, tokens = (sum(sum(getattr(one, name)) for one in sampled) for name in ("logprobs", "completion_mask"))
    assert len(sampled) == 8 and values["entropy_estimate"] == pytest.approx(-logprobs / tokens)
    assert grpo.update(model, engine, environment, batch, settings.grpo)["sampler_gap"] < 1e-5


@pytest.mark.parametrize(("pays", "rises"), [(1.0, False), (-1.0, True)])
def test_the_policy_learns_whether_writing_pays(
    model: SearchR3, collection: Collection, pays: float, rises: bool
) -> None:
    favour(model.backbone, model.backbone.embed_token_id, 6.0)
    settings = recipe(learning_rate=1e-2, warmup_steps=0, steps=100)
    environment, engine = world(model, collection, settings.grpo), make_engine(model, settings, settings.grpo)
    environment.scorer.function = lambda outcome: pays * (outcome.reasoning_tokens > 0)
    chances = []
    for step in range(5):
        batch = rollouts.collect(model, environment, settings, step, engine)
        chances.append(sum(batch.at_once) / 4)
        grpo.update(model, engine, environment, batch, settings.grpo)
    assert (chances[-1] > chances[0]) is rises and abs(chances[-1] - chances[0]) > 0.05


def test_a_policy_that_never_embeds_at_once_is_told_of(
    model: SearchR3, collection: Collection, caplog: pytest.LogCaptureFixture
) -> None:
    values = {"groups_all_1": 0.0}
    signals.warn_if_known(values | {"at_once_probability": 0.3}, recipe().grpo.reward)
    assert not caplog.records
    signals.warn_if_known(values | {"at_once_probability": 1e-6}, recipe().grpo.reward)
    assert "stage 1 has not shown it how; train that with sft.at_once=0.3" in caplog.text


def test_settings_that_leave_nothing_to_compare_are_refused() -> None:
    for other in ("grpo.baseline=direct", "grpo.group_size=2"):
        with pytest.raises(ConfigError, match="the others are compared with each other"):
            load_recipe(None, ["grpo.at_once=true", other])


def test_stage_1_leaves_a_share_of_the_traces_out(collection: Collection) -> None:
    examples = [one for one in training_examples(collection, "train") if one.reasoning]
    doc_ids, styles = list(collection.documents), {"restate": 1.0, "chain": 1.0}

    def batch(share: float, seed: int = 0, **more: object) -> tuple[list[str], int, frozenset[int]]:
        settings = SFTSettings(at_once=share, reasoning_styles=styles, **more)  # type: ignore[arg-type]
        made = make_batch(collection, doc_ids, examples, settings, random.Random(seed))
        return made.traces, len(made.owners), made.unwritten

    whole, vectors, _ = batch(0.0)
    assert all(whole) and vectors == 2 * len(examples)
    for untraced in ("embed", "direct"):
        some, others, unwritten = batch(0.5, untraced=untraced, read_styles=("restate", "chain"))
        assert 0 < some.count("") < len(some) and others == vectors, "reason mode learns from all of them"
        assert [one or two for one, two in zip(some, whole, strict=True)] == whole
        assert unwritten == {row for row, trace in enumerate(some) if trace}, "to embed at once is supervised"
    assert batch(0.5)[0] != batch(0.5, seed=1)[0]


def test_a_stage_2_that_taught_it_leaves_a_model_that_decides(
    run_dir: Path, collection_path: Path, tmp_path: Path
) -> None:
    settings = [
        "max_length=120", "max_new_tokens=16", "grpo.steps=1", "grpo.queries_per_step=2", "grpo.group_size=3",
        "grpo.splits=[train]", f"collection={collection_path}",
    ]  # fmt: skip
    found = {}
    for at_once in ("true", "false"):
        told = load_recipe(None, [*settings, f"grpo.at_once={at_once}", f"run_dir={tmp_path}/{at_once}"])
        source = run_dir / "sft" / "model" if at_once == "true" else found["true"].model_path
        found[at_once] = train_grpo(told, model=source)
    first, second = (SearchR3(one.model_path, device="cpu").backbone.settings.gate for one in found.values())
    assert (first, second) == ("policy", None), "who was trained on without it decides no more"
    assert {"dev_ndcg@10_auto", "dev_tokens_auto", "at_once_probability"} <= found["true"].metrics.keys()
    assert not {"dev_ndcg@10_auto", "at_once_probability"} & found["false"].metrics.keys()
