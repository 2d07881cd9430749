"""The rollouts of a step of stage 2: which queries, their groups, rewards and advantages.

Everything is drawn from the seed and the number of the step, so a resumed run draws it again without a saved state, and
every process draws the same.

Shapes: `Q` queries, `G` rollouts per query.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...config import GRPOSettings, Recipe
from ...data.collection import Query
from ...data.draws import step_rng
from ...data.triples import draw_uninstructed
from ...environment.environment import RetrievalEnvironment
from ...environment.feedback import Feedback
from ...environment.reward import DEEPEST
from ...environment.scoring import Score
from ...errors import DataError, RunError
from ...model.encoder import SearchR3
from ...model.engine.decoding import DecodeRequest, Rollout
from ...model.prompts import PlainMode
from .. import losses
from ..engine import Engine
from .decision import chances, decision_advantages, first_tokens, written_tokens
from .sampler import LocalSampler, RolloutSampler, complete


@dataclass(frozen=True)
class Experience:
    """One process's batch of rollouts with its rewards; `rollouts[i * G + j]` is the j-th of query i.

    Attributes:
        queries: of each rollout, as it was asked, `Q * G`.
        rollouts: `Q * G`.
        feedback: to each of them.
        advantages: `Q * G`.
        equal_share: share of groups, of all processes, whose rewards are all equal.
        rollout_seconds: of sampling.
        direct: the direct reply to each of the `Q` queries, where a setting needs them.
        direct_scores: of these.
        redrawn: groups of all processes that were replaced, since their rollouts ranked alike.
        at_once: the probability of embedding at once of each of the `Q` queries, where that is learned.
    """

    queries: list[Query]
    rollouts: list[Rollout]
    feedback: Feedback
    advantages: Tensor
    equal_share: float
    rollout_seconds: float = 0.0
    direct: list[Rollout] = field(default_factory=list)
    direct_scores: list[Score] = field(default_factory=list)
    redrawn: int = 0
    at_once: list[float] = field(default_factory=list)

    @property
    def query_ids(self) -> list[str]:
        """Of the queries, in their order."""
        return [query.query_id for query in self.queries]


@dataclass
class Groups:
    """The rollouts of some queries with their feedback, while groups are being replaced."""

    queries: list[Query]
    rollouts: list[Rollout]
    feedback: Feedback
    seconds: float

    def tied(self, environment: RetrievalEnvironment, group_size: int) -> list[int]:
        """The places of the queries whose rollouts all earn the same by their ranks."""
        earned = [part.by_rank(environment.weights) for part in self.feedback.parts]
        groups = [earned[start : start + group_size] for start in range(0, len(earned), group_size)]
        return [place for place, group in enumerate(groups) if max(group) == min(group)]

    def put(self, places: Sequence[int], others: Groups, group_size: int) -> None:
        """Put the groups of others at these places."""
        rewards, scores = list(self.feedback.rewards), list(self.feedback.scores)
        for source, place in enumerate(places):
            here, there = (slice(at * group_size, (at + 1) * group_size) for at in (place, source))
            self.queries[here] = others.queries[there]
            self.rollouts[here] = others.rollouts[there]
            rewards[here], scores[here] = others.feedback.rewards[there], others.feedback.scores[there]
        self.feedback = Feedback(rewards, scores, self.feedback.refresh.with_more(others.feedback.refresh))
        self.seconds += others.seconds


def collect(
    model: SearchR3,
    environment: RetrievalEnvironment,
    recipe: Recipe,
    step: int,
    engine: Engine,
    sampler: RolloutSampler | None = None,
) -> Experience:
    """Sample `G` rollouts for each of this process's share of the step's queries; the environment scores them.

    What writes them is by default the model itself.

    Raises:
        RunError: no rollout of any process emitted the embed token, or the sampler gives no replies.
    """
    settings, group_size, communicator = recipe.grpo, recipe.grpo.group_size, engine.communicator
    stored = environment.collection.queries
    everyone = choose_queries(model, environment, recipe, step, engine)
    own = engine.share(len(everyone), "grpo.queries_per_step")
    rng, instruction_rng = (step_rng(recipe.seed, purpose, step) for purpose in ("rollouts", "uninstructed"))

    def sample(query_ids: Sequence[str], mine: Sequence[int]) -> Groups:
        """Groups of those of some queries that are this process's; seeds are drawn for all of them."""
        seeds = [[rng.getrandbits(62) for _ in range(group_size)] for _ in query_ids]
        queries = draw_uninstructed([stored[one] for one in query_ids], settings.uninstructed, instruction_rng)
        started = time.perf_counter()
        chosen = [queries[place] for place in mine]
        rollouts = roll_out(model, settings, chosen, [seed for place in mine for seed in seeds[place]], sampler)
        seconds = time.perf_counter() - started
        owners = [query for query in chosen for _ in range(group_size)]
        feedback = environment.feedback(rollouts, [one.query_id for one in owners], step)
        return Groups(owners, rollouts, feedback, seconds)

    groups = sample(everyone, own)
    written = [one for one in groups.rollouts if one.reasoning_tokens or not settings.at_once]
    if all(communicator.all_gather(all(rollout.forced for rollout in written))):
        raise _none_emitted(model, len(everyone) * group_size, step)
    spare = sorted(set(environment.qrels) - set(everyone))
    step_rng(recipe.seed, "redraws", step).shuffle(spare)
    redrawn = 0
    for _ in range(settings.redraws):
        tied = [own.start + place for place in groups.tied(environment, group_size)]
        tied = [place for places in communicator.all_gather(tied) for place in places][: len(spare)]
        if not tied:
            break
        others, spare = spare[: len(tied)], spare[len(tied) :]
        mine = [i for i, place in enumerate(tied) if place in own]
        groups.put([tied[i] - own.start for i in mine], sample(others, mine), group_size)
        redrawn += len(tied)
    needs_direct = settings.baseline == "direct" or settings.direct_loss_weight > 0
    queries = groups.queries[::group_size] if needs_direct else []
    direct = answer_directly(model, queries, settings.rollout_batch_size)
    experience = Experience(
        *(groups.queries, groups.rollouts, groups.feedback, torch.empty(0), 0.0, groups.seconds),
        direct=direct,
        direct_scores=environment.score(direct, [query.query_id for query in queries]),
        redrawn=redrawn,
        at_once=chances(groups.rollouts, group_size) if settings.at_once else [],
    )
    return with_advantages(experience, environment, settings, engine, own)


def _none_emitted(model: SearchR3, count: int, step: int) -> RunError:
    return RunError(
        f"none of {count} rollouts at step {step + 1} emitted the embed token within "
        f"{model.backbone.settings.max_new_tokens} tokens; train stage 1 (search-r3 sft) first, "
        "or set max_new_tokens higher"
    )


def with_advantages(
    experience: Experience, environment: RetrievalEnvironment, settings: GRPOSettings, engine: Engine, own: range
) -> Experience:
    """The same with advantages; their scale is that of all rollouts, whichever process made them."""
    direct = [score.parts.total(environment.weights) for score in experience.direct_scores]
    written = written_tokens(experience.rollouts, settings.group_size)
    shares = engine.communicator.all_gather((experience.feedback.rewards, direct, experience.at_once, [written]))
    earned, asked, at_once, tokens = ([one for part in column for one in part] for column in zip(*shares, strict=True))
    rewards = torch.tensor(earned).view(-1, settings.group_size)
    baseline: Tensor | str = torch.tensor(asked) if settings.baseline == "direct" else settings.baseline
    compared = rewards[:, 1:] if settings.at_once else rewards
    advantages = losses.group_advantages(compared, settings.advantage_scale, baseline)
    values = advantages.values
    if settings.at_once:
        decided = decision_advantages(rewards, at_once, sum(tokens) / len(rewards), settings.advantage_scale)
        values = torch.cat([decided[:, None], values], dim=1)
    return replace(experience, advantages=values[own.start : own.stop].flatten(), equal_share=advantages.equal_share)


def choose_queries(
    model: SearchR3, environment: RetrievalEnvironment, recipe: Recipe, step: int, engine: Engine
) -> list[str]:
    """The queries of a step; with `curriculum` chosen from more, those first that direct mode nearly finds.

    Nearly: at a rank from 2 to 1,000. What it finds at once leaves reasoning nothing to add, and what it ranks deeper
    is hardly found by one more sentence.
    """
    settings = recipe.grpo
    query_ids, count = sorted(environment.qrels), settings.queries_per_step
    looked_at = max(count, min(count * settings.curriculum, len(query_ids)))
    queries = queries_of_step(query_ids, looked_at, recipe.seed, step)
    if looked_at == count:
        return queries
    own = [queries[place] for place in engine.share(looked_at, "grpo.queries_per_step * grpo.curriculum")]
    direct = answer_directly(model, [environment.collection.queries[one] for one in own], settings.rollout_batch_size)
    scores = environment.score(direct, own)
    ranks = [rank for ranks in engine.communicator.all_gather([one.best_rank for one in scores]) for rank in ranks]
    nearly = [1 < rank <= DEEPEST for rank in ranks]
    return [query_id for _, query_id in sorted(zip(nearly, queries, strict=True), key=lambda one: not one[0])][:count]


def roll_out(
    model: SearchR3,
    settings: GRPOSettings,
    queries: Sequence[Query],
    seeds: Sequence[int],
    sampler: RolloutSampler | None = None,
) -> list[Rollout]:
    """`G` sampled replies to each query, of which there may be none; a seed for each reply."""
    if not queries:
        return []
    prompts = [prompt for prompt in _prompts(model, queries, "reason") for _ in range(settings.group_size)]
    budget, temperature = model.backbone.settings.max_new_tokens, settings.sampling_temperature
    firsts = (first_tokens(settings.group_size) if settings.at_once else [None] * settings.group_size) * len(queries)
    requests = [
        DecodeRequest(prompt, budget, temperature, seed=seed, first=first)
        for prompt, seed, first in zip(prompts, seeds, firsts, strict=True)
    ]
    sampler = sampler or LocalSampler(model, settings.rollout_batch_size)
    return complete(model, requests, sampler.sample(requests))


def answer_directly(model: SearchR3, queries: Sequence[Query], batch_size: int) -> list[Rollout]:
    """The direct replies to some queries: the prompts end with the embed token, and nothing is written."""
    return model.rollouts(_prompts(model, queries, "direct"), max_new_tokens=0, batch_size=batch_size)


def _prompts(model: SearchR3, queries: Sequence[Query], mode: PlainMode) -> list[list[int]]:
    encode, instructions = model.backbone.prompt_encoder.encode_batch, [query.instruction for query in queries]
    return [prompt.ids for prompt in encode([query.bare for query in queries], mode, instructions)]


def queries_of_step(
    query_ids: Sequence[str], count: int, seed: int, step: int, setting: str = "grpo.queries_per_step"
) -> list[str]:
    """The queries of a step: whole passes over all queries, each pass in its own seeded order.

    The last step of a pass is filled up with the first queries of the same pass.

    Raises:
        DataError: fewer queries than a step needs.
    """
    if len(query_ids) < count:
        raise DataError(f"a step needs {count} queries but there are {len(query_ids)}; lower {setting}")
    per_pass = -(-len(query_ids) // count)
    order = list(query_ids)
    step_rng(seed, "queries", step // per_pass).shuffle(order)
    start = (step % per_pass) * count
    return (order + order[:count])[start : start + count]
