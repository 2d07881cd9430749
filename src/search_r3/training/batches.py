"""Batches of stage 1: what is drawn for all processes together, and this process's share of it as token ids.

Shapes: `B` queries; `R` vectors of them: all direct ones, then the reasoned ones (`2B` where every query is reasoned
about); `M` distinct documents; `K` negatives per query; `b` sequences of a chunk, `T` their tokens.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from ..config import SFTSettings
from ..data.collection import Collection
from ..data.triples import (
    TrainingExample,
    draw_negatives,
    draw_trace,
    draw_uninstructed,
    likeliest_trace,
    swap_traces,
    training_examples,
)
from ..errors import ConfigError
from ..model.backbone import pad
from ..model.encoder import SearchR3
from ..model.prompts import PromptEncoder
from ..parallel import divide
from ..retrieval.lexical import BM25
from .engine import Engine
from .modes.latent import words_of
from .modes.think import Words


@dataclass(frozen=True)
class Batch:
    """What a step learns from, the same in every process; columns are documents."""

    examples: list[TrainingExample]  # `B`
    traces: list[str]  # one reasoning trace for each
    doc_ids: list[str]  # `M`
    positives: Tensor  # `B`, columns
    negatives: Tensor  # `B x K`, columns
    # `B x M`, True where a document is no negative of the query: another positive, one with the text of a positive, or
    # one that its rankings leave out
    excluded: Tensor
    owners: list[int]  # `R`, the query of each vector
    unwritten: frozenset[int] = frozenset()  # queries whose trace is not supervised: another's, or one only to be read
    latent_steps: int = 0  # soft tokens that each query is trained with, too
    latent_traces: list[str] = field(default_factory=list)  # `B`, what they are to say; "" where that is nothing

    def names(self) -> dict[str, list[str]]:
        """The ids of its queries and documents."""
        return {"query_ids": [example.query.query_id for example in self.examples], "doc_ids": self.doc_ids}


@dataclass(frozen=True)
class TrainingSequence:
    """One sequence: a query's prompt and completion, or a document's prompt."""

    ids: list[int]  # tokens
    embed_position: int  # where the embed token stands, whose hidden state is the vector
    place: int  # the row of its vector, among the `R` of the queries or among the `M` of the documents
    prompt_length: int  # tokens before the supervised completion; all tokens where nothing is supervised
    in_kl: bool = False  # whether the KL to the base is measured on its prompt
    # of each soft token that follows a prompt without a reply: what it is to say, token -> weight
    words: list[dict[int, float]] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens, soft ones too."""
        return len(self.ids) + len(self.words)


@dataclass(frozen=True)
class LocalBatch:
    """The sequences of a batch that one process computes; of `reason`, `cut` have lost the end of their trace.

    `latent` holds the prompts that soft tokens follow, where these are trained.
    """

    direct: list[TrainingSequence]
    reason: list[TrainingSequence]
    documents: list[TrainingSequence]
    cut: int = 0
    latent: list[TrainingSequence] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Supervised tokens (`cross_entropy`, soft ones: `latent_words`), of the KL (`kl_to_base`), all; cut traces."""
        queries = [*self.direct, *self.reason]
        return {
            "cross_entropy": sum(len(sequence.ids) - sequence.prompt_length for sequence in queries),
            "kl_to_base": sum(sequence.prompt_length - 1 for sequence in queries if sequence.in_kl),
            "latent_words": sum(bool(words) for one in self.latent for words in one.words),
            "tokens": sum(one.length for one in (*queries, *self.documents, *self.latent)),
            "traces_cut": self.cut,
        }

    def chunks(self, size: int | None, tokens: int | None) -> list[list[list[TrainingSequence]]]:
        """Queries, documents and, where soft tokens are trained, latent prompts, in groups that are computed together.

        Args:
            size: sequences per group at most.
            tokens: of a group at most; see `micro_batches`. With neither limit all direct queries, all reasoned ones,
                all documents and all latent prompts are one group each.
        """
        latent = [self.latent] if self.latent else []
        if size is None and tokens is None:
            queries = [sequences for sequences in (self.direct, self.reason) if sequences]
            return [queries, [self.documents], *([latent] if latent else [])]
        kinds = []
        for kind in ([*self.direct, *self.reason], self.documents, *latent):
            groups = micro_batches([one.length for one in kind], size, tokens)
            kinds.append([[kind[place] for place in group] for group in groups])
        return kinds


def micro_batches(lengths: Sequence[int], size: int | None, tokens: int | None) -> list[list[int]]:
    """Places of sequences that are computed together, of like length so that little is padded.

    Args:
        lengths: in tokens, of each sequence.
        size: sequences per group at most.
        tokens: of a group at most, once it is padded; a sequence that is longer is computed by itself.

    Example:
        >>> micro_batches([3, 9, 2, 4], None, 9)
        [[2, 0], [3], [1]]
    """
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        count = len(groups[-1]) + 1 if groups else 0
        fits = (size is None or count <= size) and (tokens is None or count * lengths[place] <= tokens)
        if groups and fits:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


@dataclass(frozen=True)
class MicroBatch:
    """Padded tensors of some sequences."""

    ids: Tensor  # `b x T`
    mask: Tensor  # `b x T`
    embed: Tensor  # `b`, position of the embed token
    places: Tensor  # `b`, see `TrainingSequence.place`
    replies: Tensor  # `b x T`, True where the next token is supervised
    targets: Tensor  # the supervised tokens, in the order of `replies`
    prompts: Tensor  # `b x T`, True where the KL is measured
    words: Words | None = None  # of soft tokens, where these follow


def make_batch(
    collection: Collection,
    doc_ids: Sequence[str],
    examples: list[TrainingExample],
    settings: SFTSettings,
    rng: random.Random,
) -> Batch:
    """Draw a trace, a positive and negatives for each example.

    Args:
        collection: holds the texts.
        doc_ids: its documents, from which random negatives are drawn.
        examples: `B`.
        settings: how many negatives, the weights of the styles of traces, and how many traces are left out and queries
            lose their instruction.
        rng: of the step, so that every process draws the same.

    Raises:
        ConfigError: an example has traces, none of which has a weight.
        DataError: the corpus is too small.
    """
    styles, traces, positives, negatives = [], [], [], []
    for example in examples:
        style, trace = draw_trace(example, settings.reasoning_styles, rng)
        styles.append(style)
        traces.append(trace)
        positives.append(rng.choice(example.positive_ids))
        negatives.append(draw_negatives(example, doc_ids, settings.random_negatives, settings.hard_negatives, rng))
    if settings.at_once:  # a share of 0 leaves all other draws as they are
        traces = ["" if trace and rng.random() < settings.at_once else trace for trace in traces]
    distinct = list(dict.fromkeys([*positives, *(doc_id for ids in negatives for doc_id in ids)]))
    columns = {doc_id: column for column, doc_id in enumerate(distinct)}
    reasoned = [row for row, style in enumerate(styles) if style or settings.untraced == "embed"]
    read_only = {row for row in reasoned if traces[row] and styles[row] in settings.read_styles}
    unwritten = read_only | swap_traces(traces, reasoned, settings.swapped_traces, rng)
    says = settings.latent_objective == "words"
    # Drawn last, so that a share of 0 leaves all other draws as they are.
    queries = draw_uninstructed([example.query for example in examples], settings.uninstructed, rng)
    return Batch(
        [replace(example, query=query) for example, query in zip(examples, queries, strict=True)],
        traces,
        distinct,
        torch.tensor([columns[doc_id] for doc_id in positives]),
        torch.tensor([[columns[doc_id] for doc_id in ids] for ids in negatives], dtype=torch.long),
        find_false_negatives(examples, positives, columns, collection),
        [*range(len(examples)), *reasoned],
        frozenset(unwritten),
        settings.latent_steps,
        [likeliest_trace(one, settings.reasoning_styles, settings.read_styles) if says else "" for one in examples],
    )


def find_false_negatives(
    examples: Sequence[TrainingExample], chosen: Sequence[str], columns: Mapping[str, int], collection: Collection
) -> Tensor:
    """`B x M`: True where a document is another positive, has the text of one, or is never ranked for the query."""
    same_text: dict[str, list[int]] = {}
    for doc_id, column in columns.items():
        same_text.setdefault(collection.documents[doc_id].full_text, []).append(column)
    excluded = torch.zeros((len(examples), len(columns)), dtype=torch.bool)
    for row, (example, own) in enumerate(zip(examples, chosen, strict=True)):
        for doc_id in example.positive_ids:
            excluded[row, same_text.get(collection.documents[doc_id].full_text, [])] = True
        excluded[row, [columns[doc_id] for doc_id in example.limits.left_out & columns.keys()]] = True
        excluded[row, columns[own]] = False
    return excluded


def take_share(
    engine: Engine, batch: Batch, collection: Collection, model: SearchR3, frozen: bool = False
) -> LocalBatch:
    """This process's sequences: a run of the queries, and documents of about as many characters as any other's.

    Frozen documents are no sequences.

    Raises:
        ConfigError: there are fewer queries or documents than processes.
    """
    rows = engine.share(len(batch.examples), "sft.batch_size")
    columns: list[int] = []
    if not frozen:
        lengths = [len(collection.documents[doc_id].full_text) for doc_id in batch.doc_ids]
        engine.share(len(lengths), "the number of distinct documents in a batch")
        columns = sorted(divide(lengths, engine.world_size)[engine.rank])
    budget = model.backbone.settings.max_new_tokens
    return tokenise(batch, collection, model.backbone.prompt_encoder, rows, columns, budget)


def tokenise(
    batch: Batch,
    collection: Collection,
    encoder: PromptEncoder,
    rows: Sequence[int],
    columns: Sequence[int],
    max_new_tokens: int,
) -> LocalBatch:
    """The sequences of some of a batch's queries (`rows`) and documents (`columns`).

    A trace that does not fit into `max_new_tokens`, the embed token included, loses its end: no reply will be longer.
    """
    queries = [example.query for example in batch.examples]
    texts, instructions = [queries[row].bare for row in rows], [queries[row].instruction for row in rows]
    place_of = {row: place for place, row in enumerate(batch.owners) if place >= len(batch.examples)}
    direct, reasoned, cut = [], [], 0
    completion = encoder.direct_completion()
    for row, encoded in zip(rows, encoder.encode_batch(texts, "direct", instructions), strict=True):
        prompt = encoded.ids[: -completion.embed_position - 1]
        # Direct and reasoned prompts hold the same queries; one of them is enough for the KL.
        alone = row not in place_of
        direct.append(TrainingSequence(prompt + completion.ids, len(encoded.ids) - 1, row, len(prompt), in_kl=alone))
    reason_rows = [row for row in rows if row in place_of]
    texts, instructions = [queries[row].bare for row in reason_rows], [queries[row].instruction for row in reason_rows]
    for row, encoded in zip(reason_rows, encoder.encode_batch(texts, "reason", instructions), strict=True):
        prompt, completion = encoded.ids, encoder.reason_completion(batch.traces[row], max_new_tokens)
        cut += completion.truncated
        ids, position = prompt + completion.ids, len(prompt) + completion.embed_position
        supervised_from = len(ids) if row in batch.unwritten else len(prompt)
        in_kl = row not in batch.unwritten
        reasoned.append(TrainingSequence(ids, position, place_of[row], supervised_from, in_kl=in_kl))
    latent = []
    if batch.latent_steps:
        words = words_of([encoder.sentences(trace) for trace in batch.latent_traces], batch.latent_steps)
        texts, instructions = [queries[row].bare for row in rows], [queries[row].instruction for row in rows]
        latent = [
            TrainingSequence(one.ids, len(one.ids) - 1, row, len(one.ids), words=words[row])
            for row, one in zip(rows, encoder.encode_batch(texts, "latent", instructions), strict=True)
        ]
    texts = [collection.documents[batch.doc_ids[column]].full_text for column in columns]
    documents = [
        TrainingSequence(encoded.ids, len(encoded.ids) - 1, column, len(encoded.ids))
        for column, encoded in zip(columns, encoder.encode_batch(texts, "document"), strict=True)
    ]
    return LocalBatch(direct, reasoned, documents, cut, latent)


def collate(sequences: Sequence[TrainingSequence], pad_id: int, device: torch.device) -> MicroBatch:
    """Pad sequences on the right."""
    ids, mask = pad([sequence.ids for sequence in sequences], pad_id, device)
    lengths = torch.tensor([sequence.prompt_length for sequence in sequences], device=device)
    in_kl = torch.tensor([sequence.in_kl for sequence in sequences], device=device)
    positions = torch.arange(ids.shape[1], device=device)
    # The hidden state at position t predicts the token at t + 1.
    replies = (positions >= lengths[:, None] - 1) & (positions < mask.sum(-1, keepdim=True) - 1)
    return MicroBatch(
        ids,
        mask,
        torch.tensor([sequence.embed_position for sequence in sequences], device=device),
        torch.tensor([sequence.place for sequence in sequences], device=device),
        replies,
        torch.roll(ids, -1, dims=1)[replies],
        (positions < lengths[:, None] - 1) & in_kl[:, None],
        _pad_words([sequence.words for sequence in sequences], device),
    )


def _pad_words(words: Sequence[Sequence[Mapping[int, float]]], device: torch.device) -> Words | None:
    """The words of each sequence's soft tokens as tensors; None where there are no soft tokens."""
    if not words[0]:
        return None
    width = max(len(one) for row in words for one in row)
    ids = [[[*one, *[0] * (width - len(one))] for one in row] for row in words]
    weights = [[[*one.values(), *[0.0] * (width - len(one))] for one in row] for row in words]
    return Words(
        torch.tensor(ids, dtype=torch.long, device=device), torch.tensor(weights, dtype=torch.float32, device=device)
    )


def check_dimensions(dimension: int, settings: SFTSettings) -> None:
    """Refuse prefixes that a vector of `dimension` dimensions does not have.

    Raises:
        ConfigError: there is one.
    """
    wrong = [size for size in settings.matryoshka_dimensions if not 0 < size < dimension]
    if wrong:
        raise ConfigError(
            f"sft.matryoshka_dimensions holds {wrong[0]}; expected prefixes of a vector of {dimension} dimensions"
        )


def find_examples(collection: Collection, settings: SFTSettings) -> dict[str, list[TrainingExample]]:
    """The examples of each split, with negatives that BM25 finds where their queries list none.

    Raises:
        DataError: as `training_examples`.
    """
    documents = collection.documents

    @cache
    def bm25() -> BM25:
        return BM25(list(documents), [document.full_text for document in documents.values()])

    mined = 4 * settings.hard_negatives
    return {
        split: training_examples(collection, split, lambda *query: bm25().search(*query), mined)
        for split in settings.splits
    }
