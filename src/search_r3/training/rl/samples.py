"""Replies to training queries, each with what its vector finds; sampled in blocks that are kept on the disk."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ...config import RewardSettings
from ...data.collection import Collection, Qrels
from ...environment.environment import rollout_vectors
from ...environment.scoring import Score, Scorer
from ...mining.candidates import BlockCache, key_hash, quiet
from ...model.encoder import SearchR3
from ...model.engine.decoding import Rollout
from ...model.modes.first import first_of
from ...retrieval.index import ExactIndex
from ...types import Watch
from .rollouts import answer_directly

BLOCK = 64
"""Queries sampled and scored between two writes to the cache; what a kill may cost."""
K = 10
"""Depth of the nDCG, as in all reports."""


@dataclass(frozen=True)
class Sample:
    """One reply and what its vector found.

    Attributes:
        reasoning: its text.
        tokens: of it.
        ending: whether the model `emitted` the embed token; where it was forced, whether the model had `ended` its turn
            or its budget had `cut` it off.
        ndcg: nDCG@10.
        log_rank: `environment.reward.log_rank`, which looks deeper.
        contrastive: `environment.reward.contrastive`: by how much the relevant documents stand out among the best.
    """

    reasoning: str
    tokens: int
    ending: Literal["emitted", "ended", "cut"]
    ndcg: float
    log_rank: float
    contrastive: float

    @property
    def ranked(self) -> tuple[float, float]:
        """What the ranks are worth; rounded, since sums over the same ranks may differ in their last bit."""
        return round(self.ndcg, 9), round(self.log_rank, 9)


@dataclass(frozen=True)
class Group:
    """A query's replies, and what direct mode finds for it."""

    query_id: str
    direct: Sample
    samples: list[Sample]


class Sampler:
    """Samples replies to queries and scores them, block after block; what is done stays in a cache.

    Args:
        model: writes the replies, and its vectors rank.
        collection: documents and queries.
        qrels: judgements of the queries that are asked.
        cache: a folder; what was sampled otherwise lies there apart.
        samples: replies to each query.
        sampling_temperature: of the sampling.
        seed: of it; a query's replies depend on this and its id, whatever other queries there are.
        batch_size: replies decoded at once; it changes them by rounding only.
        watch: begins a progress bar.
    """

    def __init__(
        self,
        model: SearchR3,
        collection: Collection,
        qrels: Qrels,
        cache: Path,
        *,
        samples: int,
        sampling_temperature: float,
        seed: int = 0,
        batch_size: int = 128,
        watch: Watch = quiet,
    ) -> None:
        self.model, self.collection, self.qrels, self.watch = model, collection, qrels, watch
        self.samples, self.sampling_temperature = samples, sampling_temperature
        self.seed, self.batch_size = seed, batch_size
        key = {
            "collection": collection.content_hash(),
            "queries": key_hash({"ids": list(qrels)}),
            "block": BLOCK,
            "model": model.backbone.revision,
            "settings": model.backbone.settings.model_dump(mode="json"),
            "precision": model.backbone.dtype,
            "samples": samples,
            "sampling_temperature": sampling_temperature,
            "seed": seed,
        }
        self._store = BlockCache(cache, "replies", key)
        self._scoring: tuple[ExactIndex, Scorer] | None = None

    @property
    def resumed(self) -> int:
        """Blocks that stood in the cache."""
        return self._store.hits

    def groups(self) -> Iterator[Group]:
        """Each query's."""
        query_ids = list(self.qrels)
        blocks = [query_ids[start : start + BLOCK] for start in range(0, len(query_ids), BLOCK)]
        if not self._store.holds(len(blocks)):
            self._scoring = self._prepare()
        progress = self.watch("queries", len(query_ids))
        for number, block in enumerate(blocks):
            rows = self._store.block(number, len(block), partial(self._sample, block))
            progress(len(block), sum(one["tokens"] for row in rows for one in row))
            for query_id, (direct, *samples) in zip(block, rows, strict=True):
                yield Group(query_id, Sample(**direct), [Sample(**one) for one in samples])

    def _prepare(self) -> tuple[ExactIndex, Scorer]:
        documents = self.collection.texts()
        progress = self.watch("documents", len(documents))
        index = ExactIndex(list(documents), self.model.encode_document(list(documents.values()), progress=progress))
        # Forced replies earn what their ranks earn here: they are measured, and cannot win.
        weights = RewardSettings(forced_ranks=True, contrastive=1.0)
        budget = self.model.backbone.settings.max_new_tokens
        return index, Scorer(self.collection, self.qrels, weights, k=K, max_new_tokens=budget)

    def _sample(self, query_ids: Sequence[str]) -> list[list[dict[str, Any]]]:
        """Of each query what direct mode found, and then its replies."""
        assert self._scoring is not None
        (index, scorer), count = self._scoring, self.samples
        queries = [self.collection.queries[query_id] for query_id in query_ids]
        prompts = self.model.backbone.prompt_encoder.encode_batch(
            [query.bare for query in queries], "reason", [query.instruction for query in queries]
        )
        rngs = [random.Random(f"{self.seed}/best-of-n/{query_id}") for query_id in query_ids]
        replies = self.model.rollouts(
            [prompt.ids for prompt in prompts for _ in range(count)],
            sampling_temperature=self.sampling_temperature,
            seeds=[rng.getrandbits(62) for rng in rngs for _ in range(count)],
            batch_size=self.batch_size,
            first=first_of(self.model.backbone, "reason"),
        )
        direct = answer_directly(self.model, queries, self.batch_size)
        targets = [scorer.query_rows(index, query_id) for query_id in query_ids]
        rollouts, owners = [*direct, *replies], [*targets, *(one for one in targets for _ in range(count))]
        scores = scorer.score(index, rollouts, rollout_vectors(rollouts), owners)
        budget = self.model.backbone.settings.max_new_tokens
        rows = [_row(*one, budget) for one in zip(rollouts, scores, strict=True)]
        own, others = rows[: len(direct)], rows[len(direct) :]
        return [[first, *others[place * count :][:count]] for place, first in enumerate(own)]


def _row(rollout: Rollout, score: Score, budget: int) -> dict[str, Any]:
    """A `Sample` as it stands in the cache."""
    cut = len(rollout.completion_ids) >= budget
    return {
        "reasoning": rollout.reasoning,
        "tokens": rollout.reasoning_tokens,
        "ending": "emitted" if not rollout.forced else "cut" if cut else "ended",
        "ndcg": score.parts.ndcg,
        "log_rank": score.parts.log_rank,
        "contrastive": score.parts.contrastive,
    }
