"""Stage 2 of a policy that learns when to write, and stage 1 that shows it how not to."""

from __future__ import annotations

import itertools
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
from search_r3.training.losses import group_advantages
from search_r3.training.rl import rollouts, signals
from search_r3.training.rl.decision import standing
from tests.conftest import favour


def recipe(**changes: object) -> Recipe:
    section = {"queries_per_step": 4, "group_size": 3, "at_once": True, "advantage_scale": "none", **changes}
    return Recipe(max_length=120, max_new_tokens=6, grpo=GRPOSettings(**section))  # type: ignore[arg-type]


def world(model: SearchR3, collection: Collection, settings: GRPOSettings) -> RetrievalEnvironment:
    return RetrievalEnvironment(
        collection, collection.split("train"), model, RefreshSettings(policy="full"), settings.reward,
        k=10, max_new_tokens=6,
    )  # fmt: skip


@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_the_expected_gradient_is_that_of_the_policys_own_reward(baseline: float) -> None:
    """Over all groups that can be drawn: one embeds at once, two write one of three replies."""
    logits = torch.tensor([0.3, -0.4, 0.9, 0.1], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([0.5, 1.0, 0.2, -0.3], dtype=torch.float64)  # the first: at once
    (expected,) = torch.autograd.grad((logits.softmax(0) * rewards).sum(), logits)
    chances, logprobs = logits.softmax(0).detach(), logits.log_softmax(0)
    written, weights = chances[1:] / (1 - chances[0]), standing([float(chances[0])], 3)
    total = torch.zeros((), dtype=torch.float64)
    for first, second in itertools.product(range(1, 4), repeat=2):
        group = [0, first, second]
        found = group_advantages(
            rewards[group][None], "none", torch.tensor([baseline], dtype=torch.float64), weights=weights
        )
        chance = written[first - 1] * written[second - 1]
        total = total + chance * (found.values[0] * logprobs[group]).mean()
    (gradient,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


def test_a_groups_mean_is_what_the_policy_earns() -> None:
    rewards, weights = torch.tensor([[0.5, 1.0, 0.2], [0.4, 0.4, 0.4]]), standing([0.25, 0.9], 3)
    found = group_advantages(rewards, "none", "group_mean", weights=weights)
    earned = 0.25 * 0.5 + 0.75 * 0.6
    expected = [0.75 * (0.5 - earned), 1.125 * (1.0 - earned), 1.125 * (0.2 - earned)]
    assert found.values[0].tolist() == pytest.approx(expected)
    assert found.values[1].tolist() == [0.0, 0.0, 0.0]
    spread = math.sqrt(
        sum(w * (r - earned) ** 2 for w, r in zip(weights[0].tolist(), [0.5, 1.0, 0.2], strict=True)) / 6
    )
    scaled = group_advantages(rewards, "batch", "group_mean", weights=weights).values
    assert scaled[0].tolist() == pytest.approx([one / (spread + 1e-4) for one in expected], rel=1e-5)


def test_of_each_group_one_reply_embeds_at_once_and_the_others_write(model: SearchR3, collection: Collection) -> None:
    embed = model.backbone.embed_token_id
    favour(model.backbone, embed, 6.0)
    settings = recipe()
    environment, engine = world(model, collection, settings.grpo), make_engine(model, settings, settings.grpo)
    batch = rollouts.collect(model, environment, settings, 0, engine)
    for place in range(4):
        group = batch.rollouts[3 * place : 3 * place + 3]
        assert group[0].completion_ids == [embed] and group[0].completion_mask == [1]
        assert all(one.completion_ids[0] != embed for one in group[1:])
        chance = batch.at_once[place]
        assert chance == pytest.approx(math.exp(group[0].logprobs[0]), abs=1e-5) and 0.01 < chance < 0.99
        rewards = batch.feedback.rewards[3 * place : 3 * place + 3]
        assert batch.feedback.parts[3 * place].format == 1, "it was not forced: the policy may choose it"
        earned = chance * rewards[0] + (1 - chance) * (rewards[1] + rewards[2]) / 2
        weights = [3 * chance, 1.5 * (1 - chance), 1.5 * (1 - chance)]
        expected = [w * (r - earned) for w, r in zip(weights, rewards, strict=True)]
        assert batch.advantages[3 * place : 3 * place + 3].tolist() == pytest.approx(expected, abs=1e-5)
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
    assert "hardly learns when to; train stage 1 with sft.at_once=0.3" in caplog.text


def test_settings_under_which_replies_would_count_alike_are_refused() -> None:
    for other in ("grpo.baseline=leave_one_out", "grpo.advantage_scale=group"):
        with pytest.raises(ConfigError, match="the replies of a group do not count alike"):
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
