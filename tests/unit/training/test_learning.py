"""Stage 2 learns: on a toy the reward rises."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from search_r3.config import GRPOSettings, Recipe, RefreshSettings, RewardSettings
from search_r3.data.collection import Collection
from search_r3.environment.environment import RetrievalEnvironment
from search_r3.model.encoder import SearchR3
from search_r3.training import grpo
from search_r3.training.engine import make_engine
from search_r3.training.rl import rollouts
from tests.conftest import favour

STEPS, BUDGET = 10, 8


def test_the_reward_rises(tiny_path: Path, collection: Collection) -> None:
    """A random model is paid for long replies: credit that goes to other rollouts teaches it nothing."""
    model = SearchR3(tiny_path, device="cpu", max_length=120, max_new_tokens=BUDGET)
    favour(model.backbone, model.backbone.embed_token_id, 5.0)
    weights = RewardSettings(ndcg=0, log_rank=0, format=0, custom=1)
    settings = GRPOSettings(
        queries_per_step=4, group_size=8, steps=STEPS, warmup_steps=1, learning_rate=2e-2, reward=weights
    )
    recipe = Recipe(max_new_tokens=BUDGET, grpo=settings)
    environment = RetrievalEnvironment(
        *(collection, collection.split("train"), model, RefreshSettings(policy="never"), weights),
        k=10, max_new_tokens=BUDGET,
    )  # fmt: skip
    environment.scorer.function = lambda outcome: outcome.reasoning_tokens / (BUDGET - 1)
    engine = make_engine(model, recipe, settings)
    rewards = []
    for step in range(STEPS):
        experience = rollouts.collect(model, environment, recipe, step, engine)
        rewards.append(fmean(experience.feedback.rewards))
        grpo.update(model, engine, environment, experience, settings)
    assert fmean(rewards[-3:]) - fmean(rewards[:3]) > 0.35, [round(reward, 2) for reward in rewards]
