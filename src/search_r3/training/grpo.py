"""Stage 2: GRPO whose reward is how well the rollout's own vector ranks the right documents (paper, section 4).

The expected reward `E_{reasoning ~ pi}[R(h(q, reasoning))]` depends on the weights twice: through the reasoning that
is sampled (the policy-gradient term) and through the vector `h` (the optional embedding term, InfoNCE of the same
rollouts' vectors against the live index).

Every divisor once: advantages are divided as `advantage_scale` says; token losses by the number of sampled tokens in
the whole batch; the embedding term by the number of rollouts. Processes and micro-batches therefore change memory and
speed only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import GRPOSettings, Recipe
from ..data.collection import Query
from ..data.draws import step_rng
from ..data.load import load_collection
from ..data.triples import draw_uninstructed, hold_out, judged_queries
from ..environment.environment import Feedback, RetrievalEnvironment
from ..errors import DataError, RunError
from ..model.encoder import SearchR3
from ..model.engine.decoding import Rollout
from ..model.engine.generation import sequence_batch
from . import losses
from .dev import DevSplit, Evaluations
from .engine import Engine, load_model, make_engine, rates
from .guard import Guard
from .run import Observer, Run, silent

LOGGED_GROUPS = 2


@dataclass(frozen=True)
class Experience:
    """One batch of rollouts with its rewards; `rollouts[i * G + j]` is the j-th of query i, as it was asked."""

    queries: list[Query]  # Q*G
    rollouts: list[Rollout]
    feedback: Feedback
    advantages: Tensor  # Q*G
    equal_share: float
    rollout_seconds: float = 0.0

    @property
    def query_ids(self) -> list[str]:
        """Of the queries, in their order."""
        return [query.query_id for query in self.queries]


def train_grpo(recipe: Recipe, run: Run, base: Path, observe: Observer = silent) -> Path:
    """Train stage 2 from the model at `base` into `run` and return the model directory.

    A run with a checkpoint goes on from it.

    Raises:
        ConfigError: settings do not fit the model, the data or the number of processes.
        DataError: a split is unknown, a query has no positive document, or there are fewer queries than a step needs.
        RunError: no rollout of a step emitted the embed token, a loss is not finite, a checkpoint cannot be written or
            read, or another process died.
        StoppedError: SIGTERM came.
    """
    settings, stage = recipe.grpo, "grpo"
    if run.finished(stage):
        return run.model_path(stage)
    collection = hold_out(load_collection(recipe.collection), settings.splits, recipe.evaluation.held_out)
    qrels = judged_queries(collection, settings.splits)
    dev = DevSplit(collection, recipe.evaluation) if settings.evaluate_every else None
    queries_of_step(list(qrels), settings.queries_per_step, recipe.seed, 0)  # refuses too few before a model is loaded
    model = load_model(recipe, base)
    run.begin_from(stage, model.backbone)
    engine = make_engine(model, recipe, settings)
    guard = Guard(run, stage, engine)
    with closing(engine), guard.watching():
        start_step, checkpoint = run.restore(stage, engine)
        with engine.full_params():
            environment = RetrievalEnvironment(
                *(collection, qrels, model, settings.refresh, settings.reward),
                k=settings.reward_k,
                max_new_tokens=recipe.max_new_tokens,
                seed=recipe.seed,
                communicator=engine.communicator,
                state=None if checkpoint is None else checkpoint / "environment",
            )
        guard.save_extra = lambda folder: environment.save(folder / "environment")
        evaluations = Evaluations(run, stage, recipe, engine, model, start_step)
        if start_step == 0 and dev is not None:
            values = dev.evaluate(model, engine, environment.exact_index)
            run.log(stage, 0, values)
            evaluations.add(0, values)
        for step in range(start_step, settings.steps):
            if evaluations.stopped:
                break
            started = time.perf_counter()
            with engine.full_params():
                experience = collect(model, environment, recipe, step, engine)
                due = settings.refresh.audit_every > 0 and (step + 1) % settings.refresh.audit_every == 0
                values = environment.audit(experience.rollouts, experience.query_ids, step).metrics() if due else {}
            ready = time.perf_counter()
            check = partial(guard.check, step=step + 1, batch={"query_ids": experience.query_ids})
            values |= update(model, engine, environment, experience, settings, check)
            values |= describe(experience, engine) | {"learning_rate": engine.learning_rate}
            values["tokens"] *= settings.num_iterations
            values |= rates(values["tokens"], started, ready)
            if dev is not None and evaluations.due(step + 1, settings.steps):
                values |= dev.evaluate(model, engine)
            run.log(stage, step + 1, values)
            run.log_rollouts(rollout_rows(experience, step + 1, settings.group_size))
            engine.track(stage, step + 1, values)
            evaluations.add(step + 1, values)
            observe(stage, step + 1, settings.steps, values)
            guard.after(step + 1)
        evaluations.finish()
    return run.model_path(stage)


def collect(
    model: SearchR3, environment: RetrievalEnvironment, recipe: Recipe, step: int, engine: Engine
) -> Experience:
    """Sample `G` rollouts for each of this process's share of the step's queries; the environment scores them."""
    settings, group_size = recipe.grpo, recipe.grpo.group_size
    everyone = queries_of_step(sorted(environment.qrels), settings.queries_per_step, recipe.seed, step)
    rng = step_rng(recipe.seed, "rollouts", step)
    seeds = [[rng.getrandbits(62) for _ in range(group_size)] for _ in everyone]
    own = engine.share(len(everyone), "grpo.queries_per_step")
    queries = [environment.collection.queries[query_id] for query_id in everyone]
    queries = draw_uninstructed(queries, settings.uninstructed, step_rng(recipe.seed, "uninstructed", step))
    queries = queries[own.start : own.stop]
    encode = model.backbone.prompt_encoder.encode
    prompts = [encode(query.bare, "reason", query.instruction).ids for query in queries]
    queries = [query for query in queries for _ in range(group_size)]
    started = time.perf_counter()
    rollouts = model.rollouts(
        [prompt for prompt in prompts for _ in range(group_size)],
        sampling_temperature=settings.sampling_temperature,
        seeds=[seed for place in own for seed in seeds[place]],
        batch_size=settings.rollout_batch_size,
    )
    seconds = time.perf_counter() - started
    if all(engine.communicator.all_gather(all(rollout.forced for rollout in rollouts))):
        raise RunError(
            f"none of {len(everyone) * group_size} rollouts at step {step + 1} emitted the embed token within "
            f"{model.backbone.settings.max_new_tokens} tokens; train stage 1 (search-r3 sft) first, "
            "or set max_new_tokens higher"
        )
    query_ids = [query.query_id for query in queries]
    feedback = environment.feedback(rollouts, query_ids, policy_version=step)
    # The scale of the advantages is that of all rollouts, whichever process made them.
    rewards = [reward for rewards in engine.communicator.all_gather(feedback.rewards) for reward in rewards]
    advantages = losses.group_advantages(torch.tensor(rewards).view(-1, group_size), settings.advantage_scale)
    values = advantages.values[own.start : own.stop].flatten()
    return Experience(queries, rollouts, feedback, values, advantages.equal_share, seconds)


def update(
    model: SearchR3,
    engine: Engine,
    environment: RetrievalEnvironment,
    experience: Experience,
    settings: GRPOSettings,
    check: Callable[[Mapping[str, float]], None] = lambda values: None,
) -> dict[str, float]:
    """`num_iterations` optimizer steps on one batch of rollouts; returns what the metrics need: means over the passes.

    Only `sampler_gap` is that of the first pass, in which the weights are the sampler's. `check` sees losses and
    gradient norm before each of the steps, and may refuse.
    """
    rollouts = experience.rollouts
    own = {"tokens": sum(sum(rollout.completion_mask) for rollout in rollouts), "rollouts": len(rollouts)}
    totals = engine.total(own)
    batches = engine.padded(_micro_batches(rollouts, settings.micro_batch_size))
    passes: list[dict[str, float]] = []
    for _ in range(settings.num_iterations):
        sums: dict[str, float] = {}
        for number, (rows, counts) in enumerate(batches):
            with engine.accumulating(last=number + 1 == len(batches)):
                loss, terms = _micro_loss(model, engine, environment, experience, rows, settings, totals)
                engine.backward(loss if counts else 0.0 * loss)
            if counts:
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0.0) + value
        passes.append(engine.total(sums) | {"grad_norm": engine.clip(settings.max_grad_norm)})
        check(passes[-1])
        engine.step()
    means = {name: fmean(values[name] for values in passes) for name in passes[0]}
    return means | {"sampler_gap": passes[0]["sampler_gap"]}


def _micro_batches(rollouts: Sequence[Rollout], size: int) -> list[list[int]]:
    """Places of rollouts, of like length together so that little is padded."""
    order = sorted(range(len(rollouts)), key=lambda i: len(rollouts[i].prompt_ids) + len(rollouts[i].completion_ids))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _micro_loss(
    model: SearchR3,
    engine: Engine,
    environment: RetrievalEnvironment,
    experience: Experience,
    rows: Sequence[int],
    settings: GRPOSettings,
    totals: Mapping[str, float],
) -> tuple[Tensor, dict[str, float]]:
    """The share of some rollouts in the batch's loss, and in its metrics."""
    backbone, rollouts = model.backbone, [experience.rollouts[row] for row in rows]
    batch = sequence_batch(backbone, rollouts)
    places = batch.sampled.nonzero(as_tuple=True)  # S rows, S positions that predict a sampled token
    tokens_chosen = batch.ids[places[0], places[1] + 1]  # S
    embed = batch.embed_positions if settings.embedding_loss_weight > 0 else None
    vectors, [logits] = engine.policy(batch.ids, batch.mask, embed=embed, places=[batch.sampled])
    temperature = settings.sampling_temperature
    policy = losses.chosen_logprobs(logits, tokens_chosen, temperature)
    reference_logprobs = None
    if engine.reference is not None:
        reference_logits = engine.reference(batch.ids, batch.mask, batch.sampled)
        reference_logprobs = losses.chosen_logprobs(reference_logits, tokens_chosen, temperature)
    sampler = batch.sampler_logprobs[places]
    advantages = experience.advantages[list(rows)].to(policy.device)[places[0]]
    grpo = losses.grpo_loss(
        policy, sampler, advantages, settings.clip_epsilon, reference_logprobs, settings.kl_coefficient
    )
    loss = grpo.total / totals["tokens"]
    gap = (policy - sampler).abs().sum()
    terms = {
        "clipped_share": grpo.clipped,
        "kl_to_reference": grpo.kl,
        "sampler_gap": gap,
        "entropy_estimate": -policy.sum(),
    }
    values = {name: float(term.detach()) / totals["tokens"] for name, term in terms.items()}
    if vectors is not None:
        query_ids = [experience.query_ids[row] for row in rows]
        embedding = embedding_loss(vectors, environment, query_ids, settings.contrastive_temperature)
        share = len(rollouts) / totals["rollouts"]
        loss = loss + settings.embedding_loss_weight * embedding * share
        values["embedding_loss"] = embedding.item() * share
    values["loss"] = loss.item()
    return loss, values


def embedding_loss(
    vectors: Tensor,
    environment: RetrievalEnvironment,
    query_ids: Sequence[str],
    contrastive_temperature: float,
) -> Tensor:
    """InfoNCE of rollout vectors `B x D` against all vectors of the live index, which get no gradient.

    The positive is the query's best relevant document; left out of the sum are its other relevant ones, documents with
    the text of one, and what its rankings leave out.
    """
    index = environment.index
    documents = torch.from_numpy(index.vectors_at(np.arange(len(index)))).to(vectors.device)  # N x D
    excluded = torch.zeros((len(query_ids), len(index)), dtype=torch.bool, device=vectors.device)
    positives = []
    for row, query_id in enumerate(query_ids):
        rows = environment.query_rows(query_id)
        best = int(rows.positives[int((documents[rows.positives] @ vectors[row].detach()).argmax())])
        excluded[row, [*environment.same_text(rows.positives), *rows.limits.left_out]] = True
        excluded[row, best] = False
        positives.append(best)
    return losses.info_nce(
        vectors, documents, torch.tensor(positives, device=vectors.device), excluded, contrastive_temperature
    )


def queries_of_step(query_ids: Sequence[str], count: int, seed: int, step: int) -> list[str]:
    """The queries of a step: whole passes over all queries, each pass in its own seeded order.

    The last step of a pass is filled up with the first queries of the same pass.

    Raises:
        DataError: fewer queries than a step needs.
    """
    if len(query_ids) < count:
        raise DataError(f"a step needs {count} queries but the split has {len(query_ids)}; lower grpo.queries_per_step")
    per_pass = -(-len(query_ids) // count)
    order = list(query_ids)
    step_rng(seed, "queries", step // per_pass).shuffle(order)
    start = (step % per_pass) * count
    return (order + order[:count])[start : start + count]


def describe(experience: Experience, engine: Engine) -> dict[str, float]:
    """The metrics of the rollouts of all processes (docs/metrics.md)."""
    rollouts = [(one.forced, one.reasoning_tokens, len(one.prompt_ids)) for one in experience.rollouts]  # and no tensor
    own = experience.feedback.parts, experience.feedback.rewards, rollouts, experience.rollout_seconds
    parts_of, rewards_of, rollouts_of, seconds_of = zip(*engine.communicator.all_gather(own), strict=True)
    parts = [part for own in parts_of for part in own]
    forced, lengths, prompts = zip(*(one for own in rollouts_of for one in own), strict=True)
    values = {f"reward_{name}": fmean(getattr(part, name) for part in parts) for name in asdict(parts[0])}
    values["reward"] = fmean(reward for own in rewards_of for reward in own)
    values["share_ge_half"] = fmean(part.ranking >= 0.5 for part in parts)
    values["equal_reward_share"] = experience.equal_share
    values["forced_share"] = fmean(forced)
    values |= {"reasoning_tokens": fmean(lengths), "reasoning_tokens_max": max(lengths)}
    decoded = sum(lengths) + len(lengths)  # the embed tokens
    seconds = max(seconds_of)  # the others wait for the slowest
    values |= {"tokens": decoded + sum(prompts), "decoded_tokens_per_second": decoded / seconds if seconds else 0.0}
    return values | {"rollout_seconds": seconds} | experience.feedback.refresh.metrics()


def rollout_rows(experience: Experience, step: int, group_size: int) -> list[dict[str, Any]]:
    """Rows for `rollouts.jsonl`: the first groups of the step, whole."""
    rows = []
    for place in range(min(LOGGED_GROUPS * group_size, len(experience.rollouts))):
        rollout, query = experience.rollouts[place], experience.queries[place]
        rows.append(
            {
                "stage": "grpo",
                "step": step,
                "query_id": query.query_id,
                "query": query.text,
                "reasoning": rollout.reasoning,
                "reasoning_tokens": rollout.reasoning_tokens,
                "forced": rollout.forced,
                "reward": experience.feedback.rewards[place],
                "parts": asdict(experience.feedback.parts[place]),
                "best_rank": experience.feedback.best_ranks[place],
                "advantage": float(experience.advantages[place]),
            }
        )
    return rows
