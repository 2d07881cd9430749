"""Reasoning distilled into one glance: the direct vector learns from the model's own reasoned vectors.

The teacher is the model as it was, frozen (`teacher`): its replies are made once. Documents keep their weights and
vectors, so an index stays valid; what encodes queries learns, and reason mode with it, which a term of its own holds in
its place. Queries are enough, judgements are not needed.

Every divisor is that of the whole batch (queries, tokens of replies), whatever process or forward pass computes a part
of it. So processes and micro-batches change memory and speed only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...config import Recipe
from ...data.collection import Collection
from ...data.draws import step_rng
from ...data.restrictions import restrictions
from ...data.triples import judgements
from ...errors import ConfigError
from ...model.encoder import SearchR3
from ...model.engine.decoding import Rollout
from ...model.engine.generation import sequence_batch
from ...model.settings import SETTINGS_FILE, read_settings
from ...model.source import find_files
from ...retrieval.index import ExactIndex
from ...retrieval.ranking import ranked_rows, restricted_rows
from ...sections import DistillSettings
from .. import losses
from ..batches import micro_batches
from ..dev import DevSplit
from ..engine import Engine, load_model, make_engine, rates
from ..guard import Guard
from ..policy import Tokens, any_token
from ..rl.rollouts import queries_of_step
from ..run import Run
from ..session import RecipeLike, Session, TrainingResult, check_place, resolve
from .frozen import frozen_documents
from .teacher import Lesson, Teacher, choose_queries, describe


def train_distill(
    model: str | os.PathLike[str],
    recipe: RecipeLike = None,
    *,
    run_dir: str | os.PathLike[str] | None = None,
    collection: Collection | None = None,
    callbacks: Iterable[Any] = (),
    resume: bool = False,
) -> TrainingResult:
    """Teach a model's direct vectors what its reasoning finds, into `run_dir/distill/model`.

    Documents are encoded by the weights of `model` as before, and an index that it made stays valid.

    Args:
        model: a directory of whole weights that a stage has trained.
        recipe: the settings, as `train_sft` takes them; where they name no `max_length` or `max_new_tokens`, those of
            the model hold.
        run_dir: the run directory, instead of the recipe's.
        collection: documents and queries, instead of what the recipe's `collection` names.
        callbacks: as in `train_sft`; they are told of the evaluation before the first step too, as step 0.
        resume: as in `train_sft`; the teacher's replies that were made are kept.

    Raises:
        ConfigError: as by `train_sft`, or the model cannot keep its document vectors.
        DataError: a split is unknown, there are fewer queries than a step needs, no reply emitted the embed token, or
            `teacher=best` lacks judgements.
        RunError: a loss is not finite, a checkpoint cannot be written or read, or another process died.
        StoppedError: SIGTERM came.

    Example:
        >>> import tempfile
        >>> from search_r3 import Collection, Document, Query, train_distill, train_sft
        >>> documents = {"d1": Document("d1", "Green tea is not oxidised."), "d2": Document("d2", "Chess has a board.")}
        >>> queries = {"q1": Query("q1", "which tea is fresh?"), "q2": Query("q2", "a game of kings")}
        >>> collection = Collection("tiny", documents, queries, {"train": {"q1": {"d1": 1}, "q2": {"d2": 1}}})
        >>> settings = {"steps": 30, "batch_size": 2, "random_negatives": 0, "warmup_steps": 0}
        >>> folder = tempfile.mkdtemp()
        >>> first = train_sft({"sft": settings}, run_dir=f"{folder}/run", collection=collection)
        >>> recipe = {"distill": {"steps": 1, "batch_size": 2, "evaluate_every": 0}}
        >>> result = train_distill(first.model_path, recipe, run_dir=f"{folder}/more", collection=collection)
        >>> result.model_path.relative_to(folder).as_posix(), "score_kl" in result.metrics
        ('more/distill/model', True)
    """
    check_place("model", model)
    session = Session(
        "distill", _within(resolve(recipe, {}, None), model), collection, callbacks, resume, run_dir=run_dir
    )
    recipe, run, stage = session.recipe, session.run, session.stage
    settings = recipe.distill
    if run.finished(stage):
        return session.end()
    collection = session.collection()
    queries = choose_queries(collection, settings.splits, recipe.evaluation.held_out)
    dev = DevSplit(collection, recipe.evaluation) if settings.evaluate_every else None
    encoder = load_model(recipe, os.fspath(model), stage)
    session.begin_from(encoder, collection)
    engine = make_engine(encoder, recipe, settings)
    guard = Guard(run, stage, engine)
    with closing(engine), guard.watching():
        with engine.full_params():  # the weights are those of the model yet
            index = frozen_documents(encoder, collection, _kept(run), engine)
            teacher = Teacher(encoder, collection, index, settings, recipe.seed)
            lessons = teacher.lessons(queries, _kept(run) / "teacher", engine.communicator)
        course = Course(encoder, engine, collection, index, lessons, settings, recipe.seed)
        start_step, _ = run.restore(stage, engine)
        session.begin(encoder, engine, guard, start_step)
        if start_step == 0:
            values = describe(lessons, len(queries)) | (dev.evaluate(encoder, engine, index) if dev else {})
            session.evaluated(values)
        # The teacher's reason mode always writes; whether to write was learned with the direct vectors of before.
        encoder.backbone.settings = encoder.backbone.settings.model_copy(update={"gate": None})
        for step in range(start_step, settings.steps):
            if session.stopped:
                break
            started = time.perf_counter()
            batch = course.batch(step)
            ready = time.perf_counter()
            values = course.compute_gradients(batch)
            values["grad_norm"] = engine.clip(settings.max_grad_norm)
            guard.check(values, step + 1, {"query_ids": [lesson.query.query_id for lesson in batch.lessons]})
            engine.step()
            values |= {"learning_rate": engine.learning_rate, **rates(values["tokens"], started, ready)}
            if dev is not None and session.evaluations.due(step + 1, settings.steps):
                values |= dev.evaluate(encoder, engine, index)
            session.after(step + 1, values)
        session.evaluations.finish()
    return session.end()


@dataclass(frozen=True)
class Batch:
    """What a step learns from, the same in every process.

    Attributes:
        lessons: `B`.
        replies: of each lesson one reply, which holds reason mode.
        documents: `M x D`, the best documents of all their teachers; empty where vectors are the target.
    """

    lessons: list[Lesson]
    replies: list[Rollout]
    documents: Tensor


class Course:
    """The steps of a distillation.

    Args:
        model: what learns.
        engine: around it.
        collection: says what the rankings of a query may hold.
        index: the documents, which stay.
        lessons: of all queries.
        settings: of the stage.
        seed: of the draws.

    Raises:
        DataError: there are fewer lessons than a step needs.
    """

    def __init__(
        self,
        model: SearchR3,
        engine: Engine,
        collection: Collection,
        index: ExactIndex,
        lessons: Sequence[Lesson],
        settings: DistillSettings,
        seed: int,
    ) -> None:
        self.backbone, self.engine, self.index = model.backbone, engine, index
        self.settings, self.seed = settings, seed
        self.lessons = {lesson.query.query_id: lesson for lesson in lessons}
        self._limits = {
            query_id: restricted_rows(index, restrictions(collection, query_id, relevance))
            for query_id, relevance in judgements(collection, self.lessons).items()
        }
        self._drawn(0)

    def _drawn(self, step: int) -> list[Lesson]:
        names = queries_of_step(
            sorted(self.lessons), self.settings.batch_size, self.seed, step, "distill.batch_size"
        )  # fmt: skip
        return [self.lessons[name] for name in names]

    def batch(self, step: int) -> Batch:
        """What a step learns from; it follows from the seed and its number alone."""
        rng = step_rng(self.seed, "distill", step)
        lessons = self._drawn(step)
        documents = torch.empty(0)
        if self.settings.target == "scores":
            limits = [self._limits[lesson.query.query_id] for lesson in lessons]
            teachers = torch.stack([lesson.vector for lesson in lessons]).numpy()
            rankings = ranked_rows(self.index, teachers, limits, self.settings.depth)
            rows = np.unique(np.concatenate([rows for rows, _ in rankings]))
            documents = torch.from_numpy(self.index.vectors_at(rows)).to(self.backbone.device)
        return Batch(lessons, [rng.choice(lesson.replies) for lesson in lessons], documents)

    def compute_gradients(self, batch: Batch) -> dict[str, float]:
        """Leave the gradients of the whole batch in the weights; returns its losses and what the metrics need."""
        settings, engine = self.settings, self.engine
        own = engine.share(len(batch.lessons), "distill.batch_size")
        lessons, replies = batch.lessons[own.start : own.stop], batch.replies[own.start : own.stop]
        direct = self._direct(lessons)
        targets = [lesson.vector for lesson in lessons]
        totals = engine.total(
            {
                "reply": sum(len(reply.completion_ids) for reply in replies),
                "tokens": sum(len(one.prompt_ids) for one in direct)
                + (settings.hold_weight > 0) * sum(len(one.prompt_ids) + len(one.completion_ids) for one in replies),
            }
        )
        # The direct ones first: a wrapper sums the gradients in the last pass, which has to use every weight.
        work = [(one, counts, False) for one, counts in engine.padded(self._chunks(direct, targets))]
        if settings.hold_weight > 0:
            own_vectors = [reply.vector for reply in replies]
            work += [(one, counts, True) for one, counts in engine.padded(self._chunks(replies, own_vectors))]
        sums: dict[str, float] = {}
        for number, ((rollouts, vectors), counts, holds) in enumerate(work):
            with engine.accumulating(last=number + 1 == len(work)):
                terms = self._hold(rollouts, vectors) if holds else self._distil(rollouts, vectors, batch.documents)
                divided = {
                    name: term / (totals["reply"] if name == "cross_entropy" else len(batch.lessons))
                    for name, term in terms.items()
                }
                weight = settings.hold_weight if holds else 1.0
                loss = weight * torch.stack([part for name, part in divided.items() if name not in _SHOWN]).sum()
                engine.backward(loss if counts else 0.0 * loss)
            if counts:
                for name, part in {"loss": loss, **divided}.items():
                    sums[name] = sums.get(name, 0.0) + float(part.detach())
        return engine.total(sums) | {"tokens": totals["tokens"]}

    def _direct(self, lessons: Sequence[Lesson]) -> list[Rollout]:
        """The prompts of direct mode, which end with the embed token, as replies without a word."""
        prompts = self.backbone.prompt_encoder.encode_batch(
            [lesson.query.bare for lesson in lessons], "direct", [lesson.query.instruction for lesson in lessons]
        )
        return [
            Rollout(prompt.ids, [], [], [], lesson.vector, "") for prompt, lesson in zip(prompts, lessons, strict=True)
        ]

    def _chunks(self, rollouts: Sequence[Rollout], vectors: Sequence[Tensor]) -> list[tuple[list[Rollout], Tensor]]:
        """Sequences that are computed together, of like length so that little is padded, and their targets."""
        lengths = [len(one.prompt_ids) + len(one.completion_ids) for one in rollouts]
        groups = micro_batches(lengths, self.settings.micro_batch_size, self.settings.micro_batch_tokens)
        return [
            ([rollouts[i] for i in places], torch.stack([vectors[i] for i in places]).to(self.backbone.device))
            for places in groups
        ]

    def _distil(self, rollouts: Sequence[Rollout], teachers: Tensor, documents: Tensor) -> dict[str, Tensor]:
        """Sums over direct vectors: of the loss, and of the cosine to the teacher's."""
        sequences = sequence_batch(self.backbone, rollouts)
        alone = self.settings.hold_weight == 0 and self.engine.world_size > 1
        unused = any_token(sequences.ids) if alone else None
        answer = self.engine.policy(sequences.ids, sequences.mask, embed=sequences.embed_positions, tokens=unused)
        vectors = answer.vectors
        cosines = (vectors * teachers).sum(-1)
        if self.settings.target == "scores":
            loss = losses.score_distillation(vectors, teachers, documents, self.settings.score_temperature)
            name = "score_kl"
        else:
            loss, name = (1 - cosines).sum(), "vector_distance"
        if alone:
            loss = loss + 0.0 * answer.logprobs.sum()
        return {name: loss, "teacher_cosine": cosines.detach().sum()}

    def _hold(self, rollouts: Sequence[Rollout], before: Tensor) -> dict[str, Tensor]:
        """Sums over replies: cross-entropy of their tokens, and distances of their vectors to what they were."""
        sequences = sequence_batch(self.backbone, rollouts)
        places = sequences.sampled.nonzero(as_tuple=True)
        tokens = Tokens(sequences.sampled, sequences.ids[places[0], places[1] + 1])
        answer = self.engine.policy(sequences.ids, sequences.mask, embed=sequences.embed_positions, tokens=tokens)
        distances = 1 - (answer.vectors * before).sum(-1)
        return {"cross_entropy": -answer.logprobs.sum(), "reason_distance": distances.sum()}


_SHOWN = ("teacher_cosine",)
"""What is measured and not learned."""


def gain_kept(before: Mapping[str, float], after: Mapping[str, float]) -> float | None:
    """The share of what reasoning added to direct mode that direct mode has without it; None where it added nothing.

    Args:
        before: a dev evaluation before the distillation.
        after: one after it.

    Example:
        >>> gain_kept({"dev_ndcg@10_direct": 0.5, "dev_ndcg@10_reason": 0.9}, {"dev_ndcg@10_direct": 0.75})
        0.625
    """
    direct, reason = before["dev_ndcg@10_direct"], before["dev_ndcg@10_reason"]
    return (after["dev_ndcg@10_direct"] - direct) / (reason - direct) if reason > direct else None


def _within(recipe: Recipe, model: str | os.PathLike[str]) -> Recipe:
    """The recipe with the model's own limits where it sets none."""
    files = find_files(os.fspath(model))
    saved = read_settings(files.folder_of(SETTINGS_FILE))
    if saved is None:
        raise ConfigError(f"{os.fspath(model)} has no {SETTINGS_FILE}: no stage has trained it; train stage 1 first")
    limits = {name: getattr(saved, name) for name in ("max_length", "max_new_tokens")}
    return recipe.model_copy(
        update={name: value for name, value in limits.items() if name not in recipe.model_fields_set}
    )  # fmt: skip


def _kept(run: Run) -> Path:
    """What is made once, and removed when the stage is finished."""
    return run.checkpoints_path("distill")
