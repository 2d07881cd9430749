"""Stage 1: `L = L_SFT + L_KL + L_InfoNCE + L_TripletMargin` (paper, section 3).

Decisions where the paper is silent (docs/method.md): each query is trained in both modes on the same documents; the
KL is measured on prompt tokens, which the cross-entropy does not supervise, so that the two do not pull against each
other; every distinct document of a batch is encoded once and serves all queries as an in-batch document.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..config import Recipe, SFTSettings
from ..data.collection import Collection
from ..data.load import load_collection
from ..data.triples import TrainingExample, draw_negatives, training_examples
from ..errors import ConfigError, RunError
from ..model.backbone import Backbone, pad, vectors_at
from ..retrieval.lexical import BM25
from . import losses
from .engine import load_model, make_engine, step_rng
from .run import Observer, Run, silent


@dataclass(frozen=True)
class Supervised:
    """One supervised sequence: prompt, then the completion whose embed token gives the vector."""

    ids: list[int]
    prompt_length: int
    embed_position: int


@dataclass(frozen=True)
class Batch:
    """`B` examples in both modes, `M` distinct documents."""

    direct: list[Supervised]
    reasoned: list[Supervised]
    documents: list[list[int]]
    positives: Tensor  # B
    negatives: Tensor  # B x K
    excluded: Tensor  # B x M, bool


def train_sft(recipe: Recipe, run: Run, observe: Observer = silent) -> Path:
    """Train stage 1 into `run` and return the model directory. A run with a checkpoint goes on from it.

    Raises:
        DataError: a split is unknown or holds nothing to learn from.
        RunError: a loss is not finite.
    """
    settings, stage = recipe.sft, "sft"
    if run.finished(stage):
        return run.model_path(stage)
    collection = load_collection(recipe.collection)
    examples = _examples(collection, settings)
    model = load_model(recipe, recipe.base)
    base = model.backbone.frozen_copy() if settings.kl_weight > 0 else None
    engine = make_engine(model, settings, recipe.seed)
    done, _ = run.restore(stage, engine.accelerator)
    for step in range(done, settings.steps):
        started = time.perf_counter()
        rng = step_rng(recipe.seed, stage, step)
        batch = make_batch(model.backbone, collection, _draw(examples, settings, rng), settings, rng)
        parts = batch_losses(model.backbone, base, batch, settings)
        loss = total_loss(parts, settings)
        if not torch.isfinite(loss):
            raise RunError(f"the loss is {loss.item()} at step {step + 1} of {stage}: lower sft.learning_rate")
        engine.accelerator.backward(loss)
        norm = engine.step(model.backbone.model.parameters(), settings.max_grad_norm)
        values = {"loss": loss.item(), **{name: part.item() for name, part in parts.items()}}
        values |= {"grad_norm": norm, "learning_rate": engine.scheduler.get_last_lr()[0]}
        values |= {"seconds": time.perf_counter() - started}
        run.log(stage, step + 1, values)
        observe(stage, step + 1, settings.steps, values)
        if (step + 1) % recipe.save_every == 0:
            run.save_checkpoint(stage, step + 1, engine.accelerator, lambda out: None)
    run.finish(stage, model.save_pretrained)
    return run.model_path(stage)


def make_batch(
    backbone: Backbone,
    collection: Collection,
    examples: Sequence[TrainingExample],
    settings: SFTSettings,
    rng: random.Random,
) -> Batch:
    """Token ids, columns and the mask of false negatives for a batch of examples."""
    encoder = backbone.prompt_encoder
    doc_ids = list(collection.documents)
    direct, reasoned = [], []
    chosen_positives, chosen_negatives = [], []
    for example in examples:
        prompt, completion = encoder.direct_prompt(example.query.text).ids, encoder.direct_completion()
        direct.append(Supervised(prompt + completion.ids, len(prompt), len(prompt) + completion.embed_position))
        prompt = encoder.encode(example.query.text, "reason").ids
        completion = encoder.reason_completion(_trace(example, settings, rng))
        reasoned.append(Supervised(prompt + completion.ids, len(prompt), len(prompt) + completion.embed_position))
        chosen_positives.append(rng.choice(example.positive_ids))
        chosen_negatives.append(
            draw_negatives(example, doc_ids, settings.random_negatives, settings.bm25_negatives, rng)
        )
    columns = {
        doc_id: column
        for column, doc_id in enumerate(
            dict.fromkeys([*chosen_positives, *(doc_id for ids in chosen_negatives for doc_id in ids)])
        )
    }
    texts = {doc_id: collection.documents[doc_id].full_text for doc_id in columns}
    return Batch(
        direct,
        reasoned,
        [encoder.encode(texts[doc_id], "document").ids for doc_id in columns],
        torch.tensor([columns[doc_id] for doc_id in chosen_positives]),
        torch.tensor([[columns[doc_id] for doc_id in ids] for ids in chosen_negatives], dtype=torch.long),
        false_negatives(examples, chosen_positives, texts, collection),
    )


def false_negatives(
    examples: Sequence[TrainingExample], chosen: Sequence[str], texts: dict[str, str], collection: Collection
) -> Tensor:
    """`B x M`: True where a document is another positive of the query, or has the text of one."""
    excluded = torch.zeros((len(examples), len(texts)), dtype=torch.bool)
    for row, (example, own) in enumerate(zip(examples, chosen, strict=True)):
        true_texts = {collection.documents[doc_id].full_text for doc_id in example.positive_ids}
        for column, (doc_id, text) in enumerate(texts.items()):
            excluded[row, column] = doc_id != own and (doc_id in example.positive_ids or text in true_texts)
    return excluded


def batch_losses(backbone: Backbone, base: Backbone | None, batch: Batch, settings: SFTSettings) -> dict[str, Tensor]:
    """The four losses of a batch, by name."""
    device = backbone.device
    replies, targets, divergences, vectors = [], [], [], []
    for sequences in (batch.direct, batch.reasoned):
        ids, mask = pad([s.ids for s in sequences], backbone.tokenizer.pad_token_id, device)
        lengths = torch.tensor([s.prompt_length for s in sequences], device=device)
        places = torch.arange(ids.shape[1], device=device)
        # The hidden state at place t predicts the token at t + 1.
        in_reply = (places >= lengths[:, None] - 1) & (places < mask.sum(-1, keepdim=True) - 1)  # B x T
        hidden = backbone.hidden_states(ids, mask)  # B x T x D
        replies.append(backbone.logits(hidden[in_reply]))
        targets.append(torch.roll(ids, -1, dims=1)[in_reply])
        vectors.append(vectors_at(hidden, torch.tensor([s.embed_position for s in sequences], device=device)))
        # Direct and reasoned prompts hold the same queries; one of them is enough for the KL.
        if base is not None and sequences is batch.reasoned:
            prompt = slice(0, int(lengths.max()))
            in_prompt = (places < lengths[:, None] - 1)[:, prompt]
            with torch.no_grad():
                base_logits = base.logits(base.hidden_states(ids[:, prompt], mask[:, prompt])[in_prompt])
            divergences.append((backbone.logits(hidden[:, prompt][in_prompt]), base_logits))
    parts = {"cross_entropy": losses.cross_entropy(torch.cat(replies), torch.cat(targets))}
    if divergences:
        tuned, frozen = (torch.cat(side) for side in zip(*divergences, strict=True))
        parts["kl"] = losses.kl_to_base(tuned, frozen)
    queries = torch.cat(vectors)  # 2B x D
    documents = backbone.embed(batch.documents)  # M x D
    positives = batch.positives.to(device).repeat(2)  # 2B
    negatives = batch.negatives.to(device).repeat(2, 1)  # 2B x K
    excluded = batch.excluded.to(device).repeat(2, 1)  # 2B x M
    parts["info_nce"] = losses.info_nce(queries, documents, positives, excluded, settings.contrastive_temperature)
    if negatives.shape[1] > 0:
        cosines = queries @ documents.T  # 2B x M
        chosen = cosines.gather(1, positives[:, None])[:, 0]
        parts["triplet"] = losses.triplet_margin(chosen, cosines.gather(1, negatives), settings.triplet_margin)
    return parts


def total_loss(parts: dict[str, Tensor], settings: SFTSettings) -> Tensor:
    """The weighted sum of the losses."""
    return torch.stack([getattr(settings, f"{name}_weight") * part for name, part in parts.items()]).sum()


def _examples(collection: Collection, settings: SFTSettings) -> dict[str, list[TrainingExample]]:
    search = None
    if settings.bm25_negatives > 0:
        documents = collection.documents
        search = BM25(list(documents), [document.full_text for document in documents.values()]).search
    mined = 4 * settings.bm25_negatives
    return {split: training_examples(collection, split, search, mined) for split in settings.splits}


def _draw(
    examples: dict[str, list[TrainingExample]], settings: SFTSettings, rng: random.Random
) -> list[TrainingExample]:
    """A batch: the split of each example by its share, the example uniformly."""
    splits = rng.choices(list(settings.splits), list(settings.splits.values()), k=settings.batch_size)
    return [rng.choice(examples[split]) for split in splits]


def _trace(example: TrainingExample, settings: SFTSettings, rng: random.Random) -> str:
    """One reasoning trace by the weight of its style; a query without traces is supervised with none."""
    traces = example.reasoning
    if len(traces) <= 1:
        return next(iter(traces.values()), "")
    known = [style for style in traces if settings.reasoning_styles.get(style, 0) > 0]
    if not known:
        raise ConfigError(
            f"query {example.query.query_id!r} has reasoning styles {', '.join(traces)}, none of which has a weight in "
            f"sft.reasoning_styles ({', '.join(settings.reasoning_styles)})"
        )
    return traces[rng.choices(known, [settings.reasoning_styles[style] for style in known])[0]]
