"""The teacher of a distillation: the model's own reasoned vectors, before anything was learned.

They are computed once and kept on the disk, beside the checkpoints: the teacher does not move, a killed call goes on,
and a step is one short forward pass instead of a reply.

Shapes: `D` vector size.
"""

from __future__ import annotations

import base64
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from ...config import RewardSettings
from ...data.collection import Collection, Qrels, Query
from ...data.triples import hold_out, judgements
from ...environment.environment import rollout_vectors
from ...environment.scoring import Scorer
from ...errors import DataError
from ...mining.candidates import BlockCache, key_hash
from ...model.encoder import SearchR3
from ...model.engine.decoding import Rollout
from ...model.modes.first import first_of
from ...parallel import Communicator
from ...retrieval.index import ExactIndex
from ...sections import DistillSettings

logger = logging.getLogger(__name__)

BLOCK = 64
"""Queries between two writes; what a kill may cost."""
_ALL = "the collection"


@dataclass(frozen=True)
class Lesson:
    """What one query teaches.

    Attributes:
        query: it.
        vector: the teacher's, `D`.
        replies: those that it is made of, each with its own vector.
    """

    query: Query
    vector: Tensor
    replies: list[Rollout]


def choose_queries(collection: Collection, splits: Sequence[str], held_out: Sequence[str]) -> list[Query]:
    """The queries that are learned from, in the order of their ids; judgements are not looked at.

    Args:
        collection: the queries.
        splits: whose; none means all queries of the collection.
        held_out: splits whose queries are left out, by id or by text.

    Raises:
        DataError: a split is unknown, or nothing is left.
    """
    qrels = dict(collection.qrels)
    if not splits:
        measured = {query_id for split in held_out for query_id in qrels.get(split, {})}
        splits, qrels[_ALL] = (_ALL,), {query_id: {} for query_id in collection.queries if query_id not in measured}
    kept = hold_out(replace(collection, qrels=qrels), splits, held_out)
    query_ids = sorted({query_id for split in splits for query_id in kept.qrels[split]})
    if not query_ids:
        raise DataError(
            f"no query of {collection.name!r} is left to learn from, since those of {', '.join(held_out)} are measured "
            "on; add queries to it (they need no judgements), or name distill.splits"
        )
    return [collection.queries[query_id] for query_id in query_ids]


def judged(collection: Collection, queries: Sequence[Query]) -> Qrels:
    """What any split says of these queries.

    Raises:
        DataError: one has no relevant document.
    """
    found = judgements(collection, (query.query_id for query in queries))
    lacking = [query_id for query_id, gains in found.items() if not any(gain > 0 for gain in gains.values())]
    if lacking:
        raise DataError(
            f"distill.teacher=best chooses by judgements, and {len(lacking):,} of {len(found):,} queries have no "
            f"relevant document (first: {lacking[0]!r}); set teacher=mean, or name distill.splits that have them"
        )
    return found


class Teacher:
    """Lets a model reply to queries, and keeps its replies.

    Args:
        model: with the weights that the distillation begins from.
        collection: documents and judgements; looked at for `teacher=best` alone.
        index: its documents.
        settings: how many replies, and what becomes of several.
        seed: of the sampling; a query's replies depend on this and its id, whatever other queries there are.
    """

    def __init__(
        self, model: SearchR3, collection: Collection, index: ExactIndex, settings: DistillSettings, seed: int
    ) -> None:
        self.model, self.collection, self.index, self.settings, self.seed = model, collection, index, settings, seed

    def lessons(self, queries: Sequence[Query], cache: Path, communicator: Communicator) -> list[Lesson]:
        """Of each query that was replied to with an embed token of the model's own.

        Blocks of queries are dealt to the processes; all read the results.

        Args:
            queries: who asks.
            cache: a folder that all processes see.
            communicator: the other processes.

        Raises:
            DataError: no reply emitted the embed token, a query lacks judgements that are needed, or a damaged cache.
        """
        store = BlockCache(cache, "replies", self._key(queries))
        blocks = [queries[start : start + BLOCK] for start in range(0, len(queries), BLOCK)]
        scorer = self._scorer(queries) if self.settings.teacher == "best" else None
        for number in range(communicator.rank, len(blocks), communicator.world_size):
            store.block(number, len(blocks[number]), partial(self._replies, blocks[number], scorer))
        communicator.barrier()
        lessons = []
        for number, block in enumerate(blocks):
            rows = store.block(number, len(block), partial(self._replies, block, scorer))
            lessons += [lesson for query, row in zip(block, rows, strict=True) if (lesson := self._lesson(query, row))]
        if not lessons:
            raise DataError(
                f"no reply to {len(queries):,} queries emitted the embed token within max_new_tokens="
                f"{self.model.backbone.settings.max_new_tokens}: there is no reasoning to learn from; train stage 1 "
                "first, or raise max_new_tokens"
            )
        if len(lessons) < len(queries):
            logger.warning(
                "%d of %d queries are left out: no reply to them emitted the embed token",
                *(len(queries) - len(lessons), len(queries)),
            )
        return lessons

    def _key(self, queries: Sequence[Query]) -> dict[str, Any]:
        backbone, settings = self.model.backbone, self.settings
        return {
            "queries": key_hash({"texts": [[one.query_id, one.bare, one.instruction] for one in queries]}),
            "documents": self.collection.content_hash() if settings.teacher == "best" else "",
            "block": BLOCK,
            "model": backbone.revision,
            "settings": backbone.settings.model_dump(mode="json"),
            "teacher": [settings.teacher, settings.samples, settings.sampling_temperature, self.seed],
        }

    def _replies(self, queries: Sequence[Query], scorer: Scorer | None) -> list[list[dict[str, Any]]]:
        """The replies to each query that count, as they stand in the cache; none where all were forced."""
        count = self.settings.samples
        prompts = self.model.backbone.prompt_encoder.encode_batch(
            [query.bare for query in queries], "reason", [query.instruction for query in queries]
        )
        rngs = [random.Random(f"{self.seed}/distill/{query.query_id}") for query in queries]
        rollouts = self.model.rollouts(
            [prompt.ids for prompt in prompts for _ in range(count)],
            sampling_temperature=self.settings.sampling_temperature if count > 1 else 0.0,
            seeds=[rng.getrandbits(62) for rng in rngs for _ in range(count)],
            batch_size=self.settings.rollout_batch_size,
            first=first_of(self.model.backbone, "reason"),
        )
        groups = [
            [one for one in rollouts[place * count :][:count] if not one.forced] for place in range(len(queries))
        ]  # fmt: skip
        if scorer is not None:
            groups = [self._best(*one, scorer) for one in zip(queries, groups, strict=True)]
        return [[_row(one) for one in group] for group in groups]

    def _scorer(self, queries: Sequence[Query]) -> Scorer:
        budget = self.model.backbone.settings.max_new_tokens
        weights = RewardSettings(contrastive=1.0)
        return Scorer(self.collection, judged(self.collection, queries), weights, k=10, max_new_tokens=budget)

    def _best(self, query: Query, replies: list[Rollout], scorer: Scorer) -> list[Rollout]:
        """The reply that best-of-n would choose, without its thresholds."""
        target = scorer.query_rows(self.index, query.query_id)
        scores = scorer.score(self.index, replies, rollout_vectors(replies), [target] * len(replies))
        worth = [(round(one.parts.ndcg, 9), round(one.parts.log_rank, 9), one.parts.contrastive) for one in scores]
        order = sorted(range(len(replies)), key=lambda i: (worth[i], -replies[i].reasoning_tokens), reverse=True)
        return [replies[i] for i in order[:1]]

    def _lesson(self, query: Query, rows: Sequence[Mapping[str, Any]]) -> Lesson | None:
        if not rows:
            return None
        replies = [_reply(row) for row in rows]
        mean = torch.stack([reply.vector for reply in replies]).mean(0)
        return Lesson(query, F.normalize(mean, dim=-1), replies)


def describe(lessons: Sequence[Lesson], queries: int) -> dict[str, float]:
    """What the teacher is, for the metrics."""
    return {
        "teacher_queries": len(lessons),
        "teacher_left_out": queries - len(lessons),
        "teacher_tokens": fmean(reply.reasoning_tokens for lesson in lessons for reply in lesson.replies),
    }


def _row(reply: Rollout) -> dict[str, Any]:
    vector = base64.b64encode(reply.vector.numpy().astype("<f4").tobytes()).decode()
    return {"prompt": reply.prompt_ids, "completion": reply.completion_ids, "vector": vector}


def _reply(row: Mapping[str, Any]) -> Rollout:
    vector = torch.from_numpy(np.frombuffer(base64.b64decode(row["vector"]), "<f4").copy())
    ids = row["completion"]
    return Rollout(row["prompt"], ids, [1] * len(ids), [0.0] * len(ids), vector, "")
