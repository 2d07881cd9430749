"""Stage 1: `L = L_SFT + L_KL + L_InfoNCE + L_TripletMargin` (paper, section 3).

Decisions where the paper is silent (docs/method.md): each query is trained in both modes on the same documents; the
KL is measured on prompt tokens, which the cross-entropy does not supervise, so that the two do not pull against each
other; every distinct document of a batch is encoded once and serves all queries as an in-batch document.

Every divisor is that of the whole batch (supervised tokens, queries), whatever process or forward pass computes a part
of it. So processes and micro-batches change memory and speed only.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import SFTSettings
from ..data.collection import Collection
from ..data.draws import Draws, step_rng, text_keys
from ..data.triples import hold_out
from ..model.backbone import Backbone
from ..model.modes.first import check_can_decide
from . import losses
from .batches import (
    Batch,
    LocalBatch,
    TrainingSequence,
    check_dimensions,
    collate,
    find_examples,
    make_batch,
    take_share,
)
from .dev import DevSplit
from .engine import Engine, load_model, make_engine, rates
from .guard import Guard
from .modes.frozen import frozen_documents, keeps_documents
from .modes.latent import LATENT_WEIGHTS, PUBLISHED
from .policy import Tokens, any_token
from .session import RecipeLike, Session, TrainingResult

logger = logging.getLogger(__name__)

ROWS_AT_A_TIME = 256
"""Queries whose similarities to all documents are held at once where gradients are cached."""


def train_sft(
    recipe: RecipeLike = None,
    *,
    run_dir: str | os.PathLike[str] | None = None,
    model: str | os.PathLike[str] | None = None,
    collection: Collection | None = None,
    callbacks: Iterable[Any] = (),
    resume: bool = False,
) -> TrainingResult:
    """Train stage 1 into `run_dir/sft/model`.

    Args:
        recipe: the settings: a `Recipe`, a mapping, the path of a YAML file, or None for the defaults.
        run_dir: the run directory, instead of the recipe's.
        model: the base, instead of the recipe's `base`: a directory, a GGUF file, a hub id, `smol` or `builtin`.
        collection: what is trained on, instead of what the recipe's `collection` names; the run records a digest of
            it. Where the recipe sets no `splits`, its split `train` is used, if it has one.
        callbacks: of the kind `transformers.TrainerCallback`; `args` is the recipe, `stage` and `model` are keywords.
            They are told `on_train_begin`, `on_step_end`, `on_log`, `on_evaluate`, `on_save`, `on_train_end`;
            `control.should_training_stop` ends the stage after the step, with its model, and `control.should_save`
            writes a checkpoint. What they raise ends the training; the checkpoints stay.
        resume: go on from the newest checkpoint; a stage that is complete is not trained again.

    Raises:
        ConfigError: settings do not fit the model, the data or the number of processes, or the run directory holds
            another run, or this stage of it has begun and `resume` is off.
        DataError: a split is unknown or holds nothing to learn from.
        RunError: a loss is not finite, a checkpoint cannot be written or read, or another process died.
        StoppedError: SIGTERM came.

    Example:
        >>> import tempfile
        >>> from search_r3 import Collection, Document, Query, train_sft
        >>> documents = {"d1": Document("d1", "Green tea is not oxidised."), "d2": Document("d2", "Chess has a board.")}
        >>> queries = {"q1": Query("q1", "which tea is fresh?"), "q2": Query("q2", "a game of kings")}
        >>> collection = Collection("tiny", documents, queries, {"train": {"q1": {"d1": 1}, "q2": {"d2": 1}}})
        >>> settings = {"steps": 2, "batch_size": 2, "random_negatives": 0}
        >>> folder = tempfile.mkdtemp()
        >>> result = train_sft({"sft": settings}, run_dir=f"{folder}/run", collection=collection)
        >>> result.model_path.relative_to(folder).as_posix(), [row["step"] for row in result.log_history]
        ('run/sft/model', [1, 2])
    """
    session = Session("sft", recipe, collection, callbacks, resume, run_dir=run_dir, base=model)
    settings, run, stage = session.recipe.sft, session.run, session.stage
    recipe = session.recipe
    if run.finished(stage):
        return session.end()
    collection = hold_out(session.collection(), list(settings.splits), recipe.evaluation.held_out)
    doc_ids = list(collection.documents)
    examples = find_examples(collection, settings)
    if not any(example.reasoning for of_split in examples.values() for example in of_split):
        logger.warning(
            "no query of %s has a reasoning trace: reason mode learns %s, and stage 2 will find little to choose from; "
            "`search-r3 data traces` has traces written, `search-r3 best-of-n` keeps the model's own",
            *(recipe.collection, "to embed at once" if settings.untraced == "embed" else "nothing"),
        )
    dev = DevSplit(collection, recipe.evaluation) if settings.evaluate_every else None
    frozen = keeps_documents(recipe, stage)
    encoder = load_model(recipe, recipe.base, stage)
    check_dimensions(encoder.dimension, settings)
    session.begin_from(encoder, collection)
    if settings.at_once:
        check_can_decide(encoder.backbone, "sft.at_once")
    trained = {"latent_steps": settings.latent_steps, "gate": None}
    encoder.backbone.settings = encoder.backbone.settings.model_copy(update=trained)
    engine = make_engine(encoder, recipe, settings)
    guard = Guard(run, stage, engine)
    draws = Draws(examples, settings, recipe.seed, text_keys(collection, settings), engine.world_size)

    def prepare(step: int) -> tuple[Batch, LocalBatch]:
        rng = step_rng(recipe.seed, stage, step)
        batch = make_batch(collection, doc_ids, draws.batch(step, rng), settings, rng)
        return batch, take_share(engine, batch, collection, encoder, frozen)

    # The next batch is tokenised while this one is computed.
    with closing(engine), guard.watching(), ThreadPoolExecutor(1) as worker:
        index = None
        if frozen:
            with engine.full_params():  # the weights are those of the base yet
                index = frozen_documents(encoder, collection, run.checkpoints_path(stage), engine)
        start_step, _ = run.restore(stage, engine)
        session.begin(encoder, engine, guard, start_step)
        warned = False
        ahead: Future[tuple[Batch, LocalBatch]] | None = None
        for step in range(start_step, settings.steps):
            if session.stopped:
                break
            started = time.perf_counter()
            batch, share = ahead.result() if ahead is not None else prepare(step)
            ready = time.perf_counter()
            ahead = worker.submit(prepare, step + 1) if step + 1 < settings.steps else None
            documents = None
            if index is not None:
                documents = torch.from_numpy(index.vectors_at(index.rows_of(batch.doc_ids))).to(encoder.device)
            values = compute_gradients(engine, encoder.backbone, batch, share, settings, documents)
            if values["traces_cut"] and not warned:
                warned = True
                logger.warning(
                    "traces of step %d (%d of them) exceed max_new_tokens=%d and lose their ends; traces_cut in "
                    "metrics.jsonl counts them",
                    *(step + 1, values["traces_cut"], recipe.max_new_tokens),
                )
            values["grad_norm"] = engine.clip(settings.max_grad_norm)
            guard.check(values, step + 1, batch.names())
            engine.step()
            values |= {"learning_rate": engine.learning_rate, "wait_seconds": ready - started}
            values |= rates(values["tokens"], started, ready)
            if dev is not None and session.evaluations.due(step + 1, settings.steps):
                if ahead is not None:
                    wait([ahead])  # two threads would share the tokenizer
                values |= dev.evaluate(encoder, engine, index)
            session.after(step + 1, values)
        session.evaluations.finish()
    return session.end()


def compute_gradients(
    engine: Engine,
    backbone: Backbone,
    batch: Batch,
    share: LocalBatch,
    settings: SFTSettings,
    documents: Tensor | None = None,
) -> dict[str, float]:
    """Leave the gradients of the whole batch in the weights.

    `documents`, `M x D`, are the vectors of documents that stay as they are; without it they are computed too.

    With `micro_batch_size` or `micro_batch_tokens` they are cached (Gao et al., arXiv 2101.06983): all vectors are
    computed without gradients, the gradients of the contrastive losses by the vectors are taken, and each chunk is
    computed once more to carry its part of them into the weights, so that only one chunk's activations are held.

    Returns:
        The losses of the whole batch, `loss` and its parts; the numbers of its tokens and of traces that were cut.
    """
    totals = engine.total(share.counts())
    queries, *others = share.chunks(settings.micro_batch_size, settings.micro_batch_tokens)
    sizes = [len(batch.owners), len(batch.doc_ids), len(batch.examples) * batch.latent_steps]
    if documents is not None:
        del others[0], sizes[1]
    if not settings.cached:
        with engine.accumulating(last=True):
            # A process without a reasoned query computes its direct ones twice.
            outputs = [forward(engine, backbone, chunk, settings, queries=True) for chunk, _ in engine.padded(queries)]
            idle = [outputs.pop() for _ in outputs[len(queries) :]]
            own = [outputs, *([forward(engine, backbone, chunk, settings) for chunk in kind] for kind in others)]
            parts = token_losses([output for kind in own for output in kind], totals)
            vectors = [assemble(engine, kind, size) for kind, size in zip(own, sizes, strict=False)]
            if documents is not None:
                vectors.insert(1, documents)
            contrastive = contrastive_losses(vectors[0], vectors[1], batch, range(sizes[0]), settings)
            contrastive |= latent_losses(vectors, batch, settings)
            whole = total_loss({**parts, **contrastive}, settings)
            for output in idle:
                whole = whole + 0.0 * (total_loss(token_losses([output], totals), settings) + output.vectors.sum())
            engine.backward(whole)
        sums = engine.total(_no_token_losses(engine, settings) | _numbers(parts)) | _numbers(contrastive)
    else:
        sums = _cached(engine, backbone, batch, [queries, *others], sizes, totals, settings, documents)
    loss = sum(weight_of(name, settings) * value for name, value in sums.items())
    return {"loss": loss, **sums, "tokens": totals["tokens"], "traces_cut": totals["traces_cut"]}


def _cached(
    engine: Engine,
    backbone: Backbone,
    batch: Batch,
    chunks: list[list[list[TrainingSequence]]],
    sizes: Sequence[int],
    totals: Mapping[str, float],
    settings: SFTSettings,
    documents: Tensor | None,
) -> dict[str, float]:
    """`compute_gradients` chunk by chunk."""
    padded = [engine.padded(kind) for kind in chunks]
    leaves = []
    for kind, own_chunks, size in zip(padded, chunks, sizes, strict=False):
        with torch.no_grad():
            outputs = [forward(engine, backbone, chunk, settings, only_vectors=True) for chunk, _ in kind]
        leaves.append(assemble(engine, outputs[: len(own_chunks)], size).requires_grad_())
    vectors = leaves if documents is None else [leaves[0], documents, *leaves[1:]]
    sums: dict[str, float] = {}
    for start in range(0, sizes[0], ROWS_AT_A_TIME):
        rows = range(start, min(start + ROWS_AT_A_TIME, sizes[0]))
        parts = contrastive_losses(vectors[0], vectors[1], batch, rows, settings)
        parts = {name: part * len(rows) / sizes[0] for name, part in parts.items()}
        torch.autograd.backward(total_loss(parts, settings))
        _add(sums, _numbers(parts))
    if parts := latent_losses(vectors, batch, settings):
        torch.autograd.backward(total_loss(parts, settings))
        _add(sums, _numbers(parts))
    work = [(*one, kind is padded[0], leaf.grad) for kind, leaf in zip(padded, leaves, strict=True) for one in kind]
    own = _no_token_losses(engine, settings)
    for number, (chunk, counts, queries, gradients) in enumerate(work):
        with engine.accumulating(last=number + 1 == len(work)):
            output = forward(engine, backbone, chunk, settings, queries=queries)
            parts = token_losses([output], totals)
            assert gradients is not None, "every vector is in a contrastive loss"
            loss = total_loss(parts, settings) + (output.vectors * gradients[output.places]).sum() + output.nothing
            engine.backward(loss if counts else 0.0 * loss)
        if counts:
            _add(own, _numbers(parts))
        del output, parts, loss  # else they live on through the next chunk's forward pass
    return engine.total(own) | sums


@dataclass(frozen=True)
class Output:
    """What the forward pass of a chunk of `b` sequences gives."""

    vectors: Tensor  # `b x D`, search embeddings
    places: Tensor  # `b`, see `TrainingSequence.place`
    logprobs: Tensor | None = None  # of the supervised tokens; None where there are none
    kl: Tensor | None = None  # at each place of the prompts; None where it is not measured
    said: Tensor | None = None  # `b x K`, log-probabilities of soft tokens' words
    nothing: Tensor | float = 0.0  # 0, with a gradient path through the output layer; see `any_token`


def forward(
    engine: Engine,
    backbone: Backbone,
    sequences: Sequence[TrainingSequence],
    settings: SFTSettings,
    *,
    queries: bool = False,
    only_vectors: bool = False,
) -> Output:
    """Compute one chunk, of queries, of documents or of latent prompts, which have K vectors each."""
    chunk = collate(sequences, backbone.tokenizer.pad_token_id, backbone.device)
    if chunk.words is not None:
        answer = engine.policy(chunk.ids, chunk.mask, words=chunk.words)
        steps = answer.vectors.shape[1]
        rows = chunk.places[:, None] * steps + torch.arange(steps, device=chunk.places.device)
        return Output(answer.vectors.flatten(0, 1), rows.flatten(), said=answer.logprobs)
    if only_vectors:
        return Output(engine.policy(chunk.ids, chunk.mask, embed=chunk.embed).vectors, chunk.places)
    # The policy without its adapters is a collective too: then all processes ask it about every chunk of queries.
    with_kl = bool(chunk.prompts.any()) or (queries and engine.adapters and engine.world_size > 1)
    kl = None
    if engine.reference is not None and with_kl:
        last = chunk.prompts.any(0).nonzero()
        width = int(last.max()) + 2 if len(last) else chunk.ids.shape[1]
        states = engine.reference(*(part[:, :width] for part in (chunk.ids, chunk.mask, chunk.prompts)))
        kl = (chunk.prompts, states) if len(states) else None
    tokens = Tokens(chunk.replies, chunk.targets) if len(chunk.targets) else None
    idle = tokens is None and kl is None and engine.world_size > 1
    answer = engine.policy(
        chunk.ids, chunk.mask, embed=chunk.embed, tokens=any_token(chunk.ids) if idle else tokens, kl=kl
    )
    if idle:
        return Output(answer.vectors, chunk.places, nothing=0.0 * answer.logprobs.sum())
    return Output(answer.vectors, chunk.places, answer.logprobs, answer.kl)


def token_losses(outputs: Sequence[Output], totals: Mapping[str, float]) -> dict[str, Tensor]:
    """The part of these sequences in `L_SFT`, `L_KL` and what soft tokens are to say, by name.

    Args:
        outputs: what was computed together.
        totals: tokens of the whole batch that each of them is a mean over.
    """
    parts = {}
    if replies := [output.logprobs for output in outputs if output.logprobs is not None]:
        parts["cross_entropy"] = -torch.cat(replies).sum() / totals["cross_entropy"]
    if prompts := [output.kl for output in outputs if output.kl is not None]:
        parts["kl_to_base"] = torch.cat(prompts).sum() / totals["kl_to_base"]
    if (soft := [output.said for output in outputs if output.said is not None]) and totals["latent_words"]:
        parts["latent_words"] = -torch.cat(soft).sum() / totals["latent_words"]
    return parts


def assemble(engine: Engine, outputs: Sequence[Output], count: int) -> Tensor:
    """All vectors of a kind, `count x D`: this process's with their gradients, the others' without."""
    vectors = torch.cat([output.vectors for output in outputs])
    places = torch.cat([output.places for output in outputs])
    everyone = vectors.new_zeros((count, vectors.shape[1])).index_copy(0, places, vectors.detach())
    return engine.sum_over_processes(everyone).index_copy(0, places, vectors)


def contrastive_losses(
    queries: Tensor, documents: Tensor, batch: Batch, rows: range, settings: SFTSettings
) -> dict[str, Tensor]:
    """`L_InfoNCE` and `L_TripletMargin`, means over the queries in `rows`.

    Args:
        queries: `R x D`.
        documents: `M x D`.
        batch: which documents are positives and negatives.
        rows: a range of the `R` vectors.
        settings: temperature, margin, and the prefixes of the vectors that are trained too (their losses are averaged).
    """
    examples = torch.tensor(batch.owners[rows.start : rows.stop])
    drawn = (batch.positives, batch.excluded, batch.negatives)
    positives, excluded, negatives = (part[examples].to(queries.device) for part in drawn)
    own, prefixes = queries[rows.start : rows.stop], settings.matryoshka_dimensions
    tau, margin = settings.contrastive_temperature, settings.triplet_margin
    return losses.contrastive(own, documents, positives, excluded, negatives, tau, margin, prefixes)


def latent_losses(vectors: Sequence[Tensor], batch: Batch, settings: SFTSettings) -> dict[str, Tensor]:
    """The losses of the latent vectors, `B * K x D`, which follow those of queries and of documents, if any."""
    if not batch.latent_steps:
        return {}
    queries, documents, latents = vectors
    steps = latents.view(-1, batch.latent_steps, latents.shape[1])  # B x K x D
    if settings.latent_objective == "words":
        parts = contrastive_losses(steps[:, -1], documents, batch, range(len(steps)), settings)
    else:
        parts = PUBLISHED[settings.latent_objective](steps, queries, documents, batch, settings)
    return {f"latent_{name}": part for name, part in parts.items()}


def weight_of(name: str, settings: SFTSettings) -> float:
    """The weight of a loss by its name in the metrics."""
    if name in LATENT_WEIGHTS:
        return settings.latent_weight * LATENT_WEIGHTS[name]
    if name.startswith("latent_"):
        return settings.latent_weight * weight_of(name.removeprefix("latent_"), settings)
    return float(getattr(settings, {"kl_to_base": "kl_weight"}.get(name, f"{name}_weight")))


def total_loss(parts: Mapping[str, Tensor], settings: SFTSettings) -> Tensor:
    """The weighted sum of the losses; 0 of none."""
    weighted = [weight_of(name, settings) * part for name, part in parts.items()]
    return torch.stack(weighted).sum() if weighted else torch.zeros(())


def _no_token_losses(engine: Engine, settings: SFTSettings) -> dict[str, float]:
    """The names that `token_losses` can give; a process may have tokens for some of them only."""
    says = settings.latent_steps > 0 and settings.latent_objective == "words"
    asked = {"cross_entropy": True, "kl_to_base": engine.reference is not None, "latent_words": says}
    return {name: 0.0 for name, wanted in asked.items() if wanted}


def _numbers(parts: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(part.detach()) for name, part in parts.items()}


def _add(sums: dict[str, float], values: Mapping[str, float]) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value
