"""Stage 2: GRPO whose reward is how well the rollout's own vector ranks the right documents (paper, section 4).

The expected reward `E_{reasoning ~ pi}[R(h(q, reasoning))]` depends on the weights twice: through the reasoning that
is sampled (the policy-gradient term) and through the vector `h` (the optional embedding terms of `pathwise`, of the
same rollouts' vectors and of the direct ones).

Every divisor once: advantages are divided as `advantage_scale` says; token losses by the number of sampled tokens in
the whole batch; the embedding terms by the number of rollouts or of queries, however few of them they are taken of.
Processes and micro-batches therefore change memory and speed only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from statistics import fmean
from typing import Any

from torch import Tensor

from ..config import GRPOSettings
from ..data.collection import Collection
from ..data.triples import hold_out, judged_queries
from ..environment.environment import RetrievalEnvironment
from ..environment.reward import load_function
from ..environment.scoring import Score
from ..errors import ConfigError
from ..model.encoder import SearchR3
from ..model.engine.decoding import Rollout
from ..model.engine.generation import sequence_batch
from ..model.modes.first import check_can_decide
from ..model.source import find_files
from . import losses
from .batches import micro_batches
from .dev import DevSplit
from .engine import Engine, load_model, make_engine, rates
from .guard import Guard
from .modes.frozen import give_back_documents, keeps_documents
from .policy import Tokens
from .rl.endpoint import find_sampler
from .rl.pathwise import embedding_loss
from .rl.rollouts import Experience, collect, queries_of_step
from .rl.sampler import LocalSampler, PolicyWeights, RolloutSampler
from .rl.signals import describe, rollout_rows, warn_if_known
from .session import RecipeLike, Session, TrainingResult, check_place


def train_grpo(
    recipe: RecipeLike = None,
    *,
    run_dir: str | os.PathLike[str] | None = None,
    model: str | os.PathLike[str] | None = None,
    collection: Collection | None = None,
    callbacks: Iterable[Any] = (),
    resume: bool = False,
    sampler: RolloutSampler | None = None,
) -> TrainingResult:
    """Train stage 2 into `run_dir/model`.

    Args:
        recipe: the settings, as `train_sft` takes them; `train_sft(...).recipe` goes on in the same run.
        run_dir: the run directory, instead of the recipe's.
        model: the stage-1 model; by default that of the same run.
        collection: as in `train_sft`.
        callbacks: as in `train_sft`; they are told of the evaluation before the first step too, as step 0.
        resume: as in `train_sft`.
        sampler: what writes the rollouts, in place of the one that the recipe's `grpo.sampler` names.

    Example:
        >>> import tempfile
        >>> from search_r3 import Collection, Document, Query, train_grpo, train_sft
        >>> documents = {"d1": Document("d1", "Green tea is not oxidised."), "d2": Document("d2", "Chess has a board.")}
        >>> queries = {"q1": Query("q1", "which tea is fresh?"), "q2": Query("q2", "a game of kings")}
        >>> collection = Collection("tiny", documents, queries, {"train": {"q1": {"d1": 1}, "q2": {"d2": 1}}})
        >>> recipe = {
        ...     "sft": {"steps": 30, "batch_size": 2, "random_negatives": 0, "warmup_steps": 0},
        ...     "grpo": {"steps": 1, "queries_per_step": 2, "group_size": 2, "evaluate_every": 0},
        ... }
        >>> folder = tempfile.mkdtemp()
        >>> first = train_sft(recipe, run_dir=f"{folder}/run", collection=collection)
        >>> result = train_grpo(first.recipe, collection=collection)
        >>> result.model_path.relative_to(folder).as_posix(), "reward" in result.metrics
        ('run/model', True)

    Raises:
        ConfigError: as by `train_sft`.
        DataError: a split is unknown, a query has no positive document, or there are fewer queries than a step needs.
        RunError: no rollout of a step emitted the embed token, the sampler gives no replies, a loss is not finite, a
            checkpoint cannot be written or read, or another process died.
        StoppedError: SIGTERM came.
    """
    check_place("model", model)
    session = Session("grpo", recipe, collection, callbacks, resume, run_dir=run_dir)
    settings, run, stage = session.recipe.grpo, session.run, session.stage
    recipe = session.recipe
    if run.finished(stage):
        return session.end()
    if model is None and not run.finished("sft"):
        raise ConfigError(
            f"no stage-1 model in {run.model_path('sft')}; train it (search-r3 sft run_dir={run.folder}), or name one "
            "as the model"
        )
    collection = hold_out(session.collection(), settings.splits, recipe.evaluation.held_out)
    qrels = judged_queries(collection, settings.splits)
    dev = DevSplit(collection, recipe.evaluation) if settings.evaluate_every else None
    queries_of_step(list(qrels), settings.queries_per_step, recipe.seed, 0)  # refuses too few before a model is loaded
    if settings.reward.function is not None:
        load_function(settings.reward.function)  # likewise
    source = os.fspath(model or run.model_path("sft"))
    if settings.sampler.reload == "vllm_adapter" and find_files(source).queries is not None:
        raise ConfigError(
            f"grpo.sampler.reload=vllm_adapter: adapters alone do not say what encodes the queries of {source}, which "
            "may be whole weights; set reload=vllm"
        )
    sampler = find_sampler(settings, run.folder / "sampler", sampler)  # likewise
    frozen = keeps_documents(recipe, stage)
    encoder = load_model(recipe, source, stage)
    sampler = sampler or LocalSampler(encoder, settings.rollout_batch_size)
    if settings.at_once:
        check_can_decide(encoder.backbone, "grpo.at_once")
    session.begin_from(encoder, collection)
    gate = {"gate": "policy" if settings.at_once else None}
    encoder.backbone.settings = encoder.backbone.settings.model_copy(update=gate)
    engine = make_engine(encoder, recipe, settings)
    guard = Guard(run, stage, engine)
    with closing(engine), guard.watching():
        start_step, checkpoint = run.restore(stage, engine)
        with engine.full_params():
            environment = RetrievalEnvironment(
                *(collection, qrels, encoder, settings.refresh, settings.reward),
                k=settings.reward_k,
                max_new_tokens=recipe.max_new_tokens,
                depth=settings.embedding_depth if settings.pathwise else 0,
                seed=recipe.seed,
                frozen=frozen,
                communicator=engine.communicator,
                device=encoder.device if encoder.device.type == "cuda" else "cpu",
                state=None if checkpoint is None else checkpoint / "environment",
            )
        if frozen:
            give_back_documents(encoder)
        guard.save_extra = lambda folder: environment.save(folder / "environment")
        session.begin(encoder, engine, guard, start_step)
        if start_step == 0 and dev is not None:
            values = dev.evaluate(encoder, engine, environment.exact_index)
            session.evaluated(values)
        for step in range(start_step, settings.steps):
            if session.stopped:
                break
            started = time.perf_counter()
            sampler.update(PolicyWeights(engine, encoder, recipe, step))
            with engine.full_params():
                experience = collect(encoder, environment, recipe, step, engine, sampler)
                every = 0 if frozen else settings.refresh.audit_every
                due = every > 0 and (step + 1) % every == 0
                values = environment.audit(experience.rollouts, experience.query_ids, step).metrics() if due else {}
            ready = time.perf_counter()
            check = partial(guard.check, step=step + 1, batch={"query_ids": experience.query_ids})
            values |= update(encoder, engine, environment, experience, settings, check)
            values |= describe(experience, engine, settings.reward, settings.group_size) | {
                "learning_rate": engine.learning_rate
            }
            if step == 0 and engine.rank == 0:
                warn_if_known(values, settings.reward)
            values["tokens"] *= settings.num_iterations
            values |= rates(values["tokens"], started, ready)
            if dev is not None and session.evaluations.due(step + 1, settings.steps):
                began = time.perf_counter()
                with engine.full_params():
                    index = environment.caught_up(step + 1)
                values |= dev.evaluate(encoder, engine, index)
                values["evaluation_seconds"] = time.perf_counter() - began
            run.log_rollouts(rollout_rows(experience, step + 1, settings.group_size))
            session.after(step + 1, values)
        session.evaluations.finish()
    return session.end()


def update(
    model: SearchR3,
    engine: Engine,
    environment: RetrievalEnvironment,
    experience: Experience,
    settings: GRPOSettings,
    check: Callable[[Mapping[str, float]], None] = lambda values: None,
) -> dict[str, float]:
    """`num_iterations` optimizer steps on one batch of rollouts; returns what the metrics need: means over the passes.

    Only the gaps to the sampler are those of the first pass, in which the weights are the sampler's. `check` sees
    losses and gradient norm before each of the steps, and may refuse.
    """
    rollouts, computed = experience.rollouts, _rollouts_that_teach(experience, settings)
    if settings.pathwise:
        environment.keep_near(experience.query_ids, [*experience.feedback.scores, *experience.direct_scores])
    own = {"tokens": sum(sum(rollout.completion_mask) for rollout in rollouts), "rollouts": len(rollouts)}
    passed = computed or [0]  # a process without any makes a pass like the others; its gradient is 0
    own |= {"computed_tokens": sum(sum(rollouts[row].completion_mask) for row in passed), "computed": len(computed)}
    totals = engine.total(own | {"queries": len(experience.direct)})
    # The direct ones first: a wrapper sums the gradients in the last pass, which has to use every weight.
    asked = range(len(experience.direct)) if settings.direct_loss_weight > 0 else []
    direct = _micro_batches(experience.direct, asked, settings)
    batches = [(rows, counts, _direct_loss) for rows, counts in (engine.padded(direct) if direct else [])]
    batches += [
        (rows, counts, _micro_loss) for rows, counts in engine.padded(_micro_batches(rollouts, passed, settings))
    ]
    passes: list[dict[str, float]] = []
    for _ in range(settings.num_iterations):
        sums: dict[str, float] = {}
        largest_gap = 0.0
        for number, (rows, counts, loss_of) in enumerate(batches):
            with engine.accumulating(last=number + 1 == len(batches)):
                loss, terms = loss_of(model, engine, environment, experience, rows, settings, totals)
                engine.backward(loss if counts else 0.0 * loss)
            if counts:
                largest_gap = max(largest_gap, terms.pop("sampler_gap_max", 0.0))
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0.0) + value
        largest_gap = max(engine.communicator.all_gather(largest_gap))
        norm = engine.clip(settings.max_grad_norm)
        passes.append(engine.total(sums) | {"sampler_gap_max": largest_gap, "grad_norm": norm})
        check(passes[-1])
        engine.step()
    means = {name: fmean(values[name] for values in passes) for name in passes[0]}
    means |= {name: passes[0][name] for name in ("sampler_gap", "sampler_gap_max")}
    return means | {"computed_share": totals["computed"] / totals["rollouts"]}


def _rollouts_that_teach(experience: Experience, settings: GRPOSettings) -> list[int]:
    """The places of the rollouts that some term of the loss has a gradient from: mostly, not those of tied groups."""
    every = range(len(experience.rollouts))
    if settings.kl_coefficient > 0 or (settings.embedding_loss_weight > 0 and settings.embedding_loss_on == "all"):
        return list(every)
    return [row for row in every if experience.advantages[row] != 0]


def _micro_batches(rollouts: Sequence[Rollout], places: Sequence[int], settings: GRPOSettings) -> list[list[int]]:
    """Places of some rollouts, those together that are computed together."""
    lengths = [len(rollouts[place].prompt_ids) + len(rollouts[place].completion_ids) for place in places]
    groups = micro_batches(lengths, settings.micro_batch_size, settings.micro_batch_tokens)
    return [[places[i] for i in group] for group in groups]


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
    states = None if engine.reference is None else engine.reference(batch.ids, batch.mask, batch.sampled)
    tokens = Tokens(batch.sampled, tokens_chosen, settings.sampling_temperature, states)
    answer = engine.policy(batch.ids, batch.mask, embed=embed, tokens=tokens)
    policy, vectors = answer.logprobs, answer.vectors
    before, sampler = batch.logprobs[places], batch.sampler_logprobs[places]
    importance = (before - sampler).exp().clamp(max=settings.sampler.importance_cap)  # 1 for the model's own replies
    advantages = importance * experience.advantages[list(rows)].to(policy.device)[places[0]]
    grpo = losses.grpo_loss(
        policy, before, advantages, settings.clip_epsilon, answer.reference_logprobs, settings.kl_coefficient
    )
    loss = grpo.total / totals["tokens"]
    gaps = (policy - sampler).detach().abs()
    terms = {"clipped_share": grpo.clipped, "kl_to_reference": grpo.kl, "sampler_gap": gaps.sum()}
    terms |= {"importance_weight": importance.sum()}
    values = {name: float(term.detach()) / max(totals["computed_tokens"], 1) for name, term in terms.items()}
    values["sampler_gap_max"] = float(gaps.max()) if len(gaps) else 0.0
    if vectors is not None:
        winners = settings.embedding_loss_on == "winners"
        chosen = [place for place, row in enumerate(rows) if not winners or experience.advantages[row] > 0]
        scores = [experience.feedback.scores[rows[place]] for place in chosen]
        owners = [experience.query_ids[rows[place]] for place in chosen]
        embedding = _embedding_loss(vectors[chosen], environment, owners, scores, settings) / totals["rollouts"]
        loss = loss + settings.embedding_loss_weight * embedding
        values["embedding_loss"] = embedding.item()
    values["loss"] = loss.item()
    return loss, values


def _direct_loss(
    model: SearchR3,
    engine: Engine,
    environment: RetrievalEnvironment,
    experience: Experience,
    rows: Sequence[int],
    settings: GRPOSettings,
    totals: Mapping[str, float],
) -> tuple[Tensor, dict[str, float]]:
    """The share of some queries' direct vectors in the batch's loss, and in its metrics."""
    batch = sequence_batch(model.backbone, [experience.direct[row] for row in rows])
    vectors = engine.policy(batch.ids, batch.mask, embed=batch.embed_positions).vectors
    query_ids = [experience.query_ids[row * settings.group_size] for row in rows]
    scores = [experience.direct_scores[row] for row in rows]
    embedding = _embedding_loss(vectors, environment, query_ids, scores, settings) / totals["queries"]
    loss = settings.direct_loss_weight * embedding
    return loss, {"direct_loss": embedding.item(), "loss": loss.item()}


def _embedding_loss(
    vectors: Tensor,
    environment: RetrievalEnvironment,
    query_ids: Sequence[str],
    scores: Sequence[Score],
    settings: GRPOSettings,
) -> Tensor:
    """The sum of the pathwise term over these vectors, which may be none."""
    if not query_ids:
        return vectors.sum()  # 0, with the graph that all processes have
    return embedding_loss(vectors, environment, query_ids, scores, settings.contrastive_temperature) * len(query_ids)
