"""Stage 2: GRPO whose reward is how well the rollout's own vector ranks the right documents (paper, section 4).

The expected reward `E_{reasoning ~ pi}[R(h(q, reasoning))]` depends on the weights twice: through the reasoning that
is sampled (the policy-gradient term) and through the vector `h` (the optional embedding term, InfoNCE of the same
rollouts' vectors against the live index).

Every divisor once: advantages are divided as `advantage_scale` says; token losses by the number of sampled tokens in
the whole batch; the embedding term by the number of rollouts. Micro-batches therefore change memory only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import GRPOSettings, Recipe
from ..data.collection import Collection, Qrels
from ..data.load import load_collection
from ..environment.environment import Feedback, RetrievalEnvironment
from ..environment.exchange import make_exchange
from ..errors import DataError, RunError
from ..model.backbone import Backbone, vectors_at
from ..model.decoding import Rollout
from ..model.encoder import SearchR3
from ..model.generation import sequence_batch
from ..model.prompts import MODES
from ..retrieval.index import ExactIndex
from ..retrieval.metrics import ndcg
from . import losses
from .engine import Engine, load_model, make_engine, step_rng
from .run import Observer, Run, silent

PROBE_DOCUMENTS = 64
LOGGED_GROUPS = 2


@dataclass(frozen=True)
class Experience:
    """One batch of rollouts with its rewards; `rollouts[i * G + j]` is the j-th of query i."""

    query_ids: list[str]
    rollouts: list[Rollout]
    feedback: Feedback
    advantages: Tensor  # Q*G
    equal_share: float


def train_grpo(recipe: Recipe, run: Run, base: Path, observe: Observer = silent) -> Path:
    """Train stage 2 from the model at `base` into `run` and return the model directory.

    A run with a checkpoint goes on from it.

    Raises:
        RunError: no rollout of a step emitted the embed token, or a loss is not finite.
    """
    settings, stage = recipe.grpo, "grpo"
    if run.finished(stage):
        return run.model_path(stage)
    collection = load_collection(recipe.collection)
    qrels = {query_id: gains for split in settings.splits for query_id, gains in collection.split(split).items()}
    model = load_model(recipe, base)
    reference = model.backbone.frozen_copy() if settings.kl_coefficient > 0 else None
    engine = make_engine(model, settings, recipe.seed)
    done, checkpoint = run.restore(stage, engine.accelerator)
    environment = _environment(recipe, collection, qrels, model, checkpoint)
    if done == 0:
        run.log(stage, 0, evaluate_dev(model, collection, recipe))
    for step in range(done, settings.steps):
        started = time.perf_counter()
        experience = collect(model, environment, recipe, step)
        sampled = time.perf_counter()
        audited = audit(environment, experience, settings, step)
        values = audited | update(model, engine, reference, environment, experience, settings)
        values |= describe(experience) | {"learning_rate": engine.scheduler.get_last_lr()[0]}
        values |= {"rollout_seconds": sampled - started, "seconds": time.perf_counter() - started}
        if (step + 1) % settings.evaluate_every == 0 or step + 1 == settings.steps:
            values |= evaluate_dev(model, collection, recipe)
        run.log(stage, step + 1, values)
        run.log_rollouts(rollout_rows(experience, collection, step + 1, settings.group_size))
        observe(stage, step + 1, settings.steps, values)
        if (step + 1) % recipe.save_every == 0:
            run.save_checkpoint(stage, step + 1, engine.accelerator, lambda out: environment.save(out / "environment"))
    run.finish(stage, model.save_pretrained)
    return run.model_path(stage)


def collect(model: SearchR3, environment: RetrievalEnvironment, recipe: Recipe, step: int) -> Experience:
    """Sample `G` rollouts for each of the step's `Q` queries and let the environment score them."""
    settings = recipe.grpo
    query_ids = queries_of_step(sorted(environment.qrels), settings.queries_per_step, recipe.seed, step)
    texts = [environment.collection.queries[query_id].text for query_id in query_ids]
    prompts = [model.backbone.prompt_encoder.encode(text, "reason").ids for text in texts]
    rng = step_rng(recipe.seed, "rollouts", step)
    repeated = [prompt for prompt in prompts for _ in range(settings.group_size)]
    rollouts = model.rollouts(
        repeated,
        sampling_temperature=settings.sampling_temperature,
        seeds=[rng.getrandbits(62) for _ in repeated],
        batch_size=settings.rollout_batch_size,
    )
    if all(rollout.forced for rollout in rollouts):
        raise RunError(
            f"none of {len(rollouts)} rollouts at step {step + 1} emitted the embed token within "
            f"{model.backbone.settings.max_new_tokens} tokens; train stage 1 (search-r3 sft) first, "
            "or set max_new_tokens higher"
        )
    feedback = environment.feedback(rollouts, per_rollout(query_ids, settings.group_size), policy_version=step)
    rewards = torch.tensor(feedback.rewards).view(-1, settings.group_size)  # Q x G
    advantages = losses.group_advantages(rewards, settings.advantage_scale)
    return Experience(query_ids, rollouts, feedback, advantages.values.flatten(), advantages.equal_share)


def audit(
    environment: RetrievalEnvironment, experience: Experience, settings: GRPOSettings, step: int
) -> dict[str, float]:
    """The account of the live index, at the steps where it is due; it changes nothing."""
    every = settings.refresh.audit_every
    if every == 0 or (step + 1) % every:
        return {}
    owners = per_rollout(experience.query_ids, settings.group_size)
    return environment.audit(experience.rollouts, owners, policy_version=step).metrics()


def update(
    model: SearchR3,
    engine: Engine,
    reference: Backbone | None,
    environment: RetrievalEnvironment,
    experience: Experience,
    settings: GRPOSettings,
) -> dict[str, float]:
    """`num_iterations` optimizer steps on one batch of rollouts; returns what the metrics need."""
    rollouts = experience.rollouts
    tokens = sum(sum(rollout.completion_mask) for rollout in rollouts)
    sums: dict[str, float] = {}
    norm = 0.0
    for iteration in range(settings.num_iterations):
        for rows in _micro_batches(rollouts, settings.micro_batch_size):
            loss, terms = _micro_loss(model, reference, environment, experience, rows, settings, tokens)
            if not torch.isfinite(loss):
                raise RunError(f"the GRPO loss is {loss.item()}: lower grpo.learning_rate")
            engine.accelerator.backward(loss)
            if iteration == 0:
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0.0) + value
        norm = engine.step(model.backbone.model.parameters(), settings.max_grad_norm)
    return sums | {"grad_norm": norm}


def _micro_batches(rollouts: Sequence[Rollout], size: int) -> list[list[int]]:
    """Places of rollouts, of like length together so that little is padded."""
    order = sorted(range(len(rollouts)), key=lambda i: len(rollouts[i].prompt_ids) + len(rollouts[i].completion_ids))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _micro_loss(
    model: SearchR3,
    reference: Backbone | None,
    environment: RetrievalEnvironment,
    experience: Experience,
    rows: Sequence[int],
    settings: GRPOSettings,
    tokens: int,
) -> tuple[Tensor, dict[str, float]]:
    """The share of some rollouts in the batch's loss, and in its metrics."""
    backbone, rollouts = model.backbone, [experience.rollouts[row] for row in rows]
    batch = sequence_batch(backbone, rollouts)
    places = batch.sampled.nonzero(as_tuple=True)  # S rows, S positions that predict a sampled token
    tokens_chosen = batch.ids[places[0], places[1] + 1]  # S
    hidden = backbone.hidden_states(batch.ids, batch.mask)  # B x T x D
    temperature = settings.sampling_temperature
    policy = losses.chosen_logprobs(backbone.logits(hidden[places]), tokens_chosen, temperature)
    reference_logprobs = None
    if reference is not None:
        with torch.no_grad():
            logits = reference.logits(reference.hidden_states(batch.ids, batch.mask)[places])
            reference_logprobs = losses.chosen_logprobs(logits, tokens_chosen, temperature)
    sampler = batch.sampler_logprobs[places]
    advantages = experience.advantages[list(rows)].to(policy.device)[places[0]]
    grpo = losses.grpo_loss(
        policy, sampler, advantages, settings.clip_epsilon, reference_logprobs, settings.kl_coefficient
    )
    loss = grpo.total / tokens
    gap = (policy - sampler).abs().sum()
    terms = {
        "clipped_share": grpo.clipped,
        "kl": grpo.kl,
        "sampler_gap": gap,
        "entropy_estimate": -policy.sum(),
    }
    values = {name: float(term.detach()) / tokens for name, term in terms.items()}
    if settings.embedding_loss_weight > 0:
        vectors = vectors_at(hidden, batch.embed_positions)  # B x D
        owners = per_rollout(experience.query_ids, settings.group_size)
        embedding = embedding_loss(
            vectors, environment, [owners[row] for row in rows], settings.contrastive_temperature
        )
        share = len(rollouts) / len(experience.rollouts)
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

    The positive is the query's best relevant document; its other relevant documents are left out of the sum.
    """
    index = environment.index
    documents = torch.from_numpy(index.vectors_at(np.arange(len(index)))).to(vectors.device)  # N x D
    excluded = torch.zeros((len(query_ids), len(index)), dtype=torch.bool, device=vectors.device)
    positives = []
    for row, query_id in enumerate(query_ids):
        columns = [index.row(doc_id) for doc_id in environment.positives(query_id)]
        best = columns[int((documents[columns] @ vectors[row].detach()).argmax())]
        excluded[row, [column for column in columns if column != best]] = True
        positives.append(best)
    return losses.info_nce(
        vectors, documents, torch.tensor(positives, device=vectors.device), excluded, contrastive_temperature
    )


def per_rollout(query_ids: Sequence[str], group_size: int) -> list[str]:
    """The query of every rollout: each query `group_size` times."""
    return [query_id for query_id in query_ids for _ in range(group_size)]


def queries_of_step(query_ids: Sequence[str], count: int, seed: int, step: int) -> list[str]:
    """The queries of a step: whole passes over all queries, each pass in its own seeded order.

    Raises:
        DataError: fewer queries than a step needs.
    """
    if len(query_ids) < count:
        raise DataError(f"a step needs {count} queries but the split has {len(query_ids)}; lower grpo.queries_per_step")
    per_pass = len(query_ids) // count
    order = list(query_ids)
    step_rng(seed, "queries", step // per_pass).shuffle(order)
    start = (step % per_pass) * count
    return order[start : start + count]


def describe(experience: Experience) -> dict[str, float]:
    """The metrics of one batch of rollouts (docs/metrics.md)."""
    feedback, rollouts = experience.feedback, experience.rollouts
    values = {
        f"reward_{name}": fmean(getattr(part, name) for part in feedback.parts) for name in asdict(feedback.parts[0])
    }
    values["reward"] = fmean(feedback.rewards)
    values["share_ge_half"] = fmean(part.ranking >= 0.5 for part in feedback.parts)
    values["equal_reward_share"] = experience.equal_share
    values["forced_share"] = fmean(rollout.forced for rollout in rollouts)
    lengths = [rollout.reasoning_tokens for rollout in rollouts]
    values |= {"reasoning_tokens": fmean(lengths), "reasoning_tokens_max": max(lengths)}
    return values | feedback.refresh.metrics()


def evaluate_dev(model: SearchR3, collection: Collection, recipe: Recipe) -> dict[str, float]:
    """nDCG@10 on the dev split in both modes over a freshly encoded corpus, and the collapse alarm."""
    settings = recipe.evaluation
    qrels = collection.split(settings.dev_split)
    texts = collection.texts()
    vectors = model.encode_document(list(texts.values()))
    index = ExactIndex(list(texts), vectors)
    queries = [collection.queries[query_id].text for query_id in qrels]
    values = {}
    for mode in MODES:
        result = model.encode_query(queries, mode, batch_size=settings.batch_size)
        found = index.search(result.vectors, 10).doc_ids
        scores = [ndcg(ranking, gains, 10) for ranking, gains in zip(found, qrels.values(), strict=True)]
        values[f"dev_ndcg@10_{mode}"] = fmean(scores)
    values["probe_cosine"] = probe_cosine(torch.from_numpy(vectors[:: max(1, len(vectors) // PROBE_DOCUMENTS)]))
    return values


def probe_cosine(vectors: Tensor) -> float:
    """Mean cosine between different vectors of a probe set, `P x D`: near 1 means that the vectors have collapsed."""
    count = len(vectors)
    if count < 2:
        return 0.0
    return float(((vectors @ vectors.T).sum() - vectors.pow(2).sum()) / (count * (count - 1)))


def rollout_rows(experience: Experience, collection: Collection, step: int, group_size: int) -> list[dict[str, Any]]:
    """Rows for `rollouts.jsonl`: the first groups of the step, whole."""
    rows = []
    for place in range(min(LOGGED_GROUPS * group_size, len(experience.rollouts))):
        rollout, query_id = experience.rollouts[place], experience.query_ids[place // group_size]
        rows.append(
            {
                "stage": "grpo",
                "step": step,
                "query_id": query_id,
                "query": collection.queries[query_id].text,
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


def _environment(
    recipe: Recipe, collection: Collection, qrels: Qrels, model: SearchR3, checkpoint: Path | None
) -> RetrievalEnvironment:
    settings = recipe.grpo
    return RetrievalEnvironment(
        collection,
        qrels,
        model,
        settings.refresh,
        settings.reward,
        k=settings.reward_k,
        max_new_tokens=recipe.max_new_tokens,
        seed=recipe.seed,
        exchange=make_exchange(),
        state=checkpoint / "environment" if checkpoint is not None else None,
    )
