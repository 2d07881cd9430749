"""The dev evaluation of both stages, and what follows from it: the model that is kept, and an early stop.

It is the measure of the final report: the same ranking rule, and queries without a relevant document are left out.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np

from ..config import EvaluationSettings, Recipe
from ..data.collection import Collection
from ..errors import DataError
from ..model.encoder import SearchR3
from ..model.modes.first import decides
from ..model.modes.latent import trained_modes
from ..model.prompts import Mode
from ..parallel import Communicator, agree, divide
from ..retrieval.index import ExactIndex
from ..retrieval.metrics import ndcg, probe_cosine, relevant_ids
from ..retrieval.ranking import make_requests, ranked
from ..retrieval.sharded import ShardedIndex, divide_rows, encode_rows
from ..sections import DevSettings
from .engine import Engine
from .modes.frozen import keeps_documents
from .run import Run
from .saving import save_trained

logger = logging.getLogger(__name__)

DEPTH = 10
DECIDING = {"sft": "dev_ndcg@10_reason", "grpo": "dev_ndcg@10_reason", "distill": "dev_ndcg@10_direct"}
"""Stage -> the metric that says which evaluation is the best."""
PROBE_DOCUMENTS = 64


class DevSplit:
    """The queries that training is evaluated on.

    Args:
        collection: documents and judgements.
        settings: which split.

    Raises:
        DataError: there is no such split, or no query in it has a relevant document.
    """

    def __init__(self, collection: Collection, settings: EvaluationSettings) -> None:
        split = collection.judgements(settings.dev_split)
        self.collection, self.batch_size = collection, settings.batch_size
        self.qrels = {query_id: gains for query_id, gains in split.items() if relevant_ids(gains)}
        if not self.qrels:
            raise DataError(
                f"no query of split {settings.dev_split!r} in {collection.name!r} has a relevant document; set "
                "evaluation.dev_split, or evaluate_every=0 in the section of the stage"
            )
        self.requests = make_requests(collection, self.qrels)

    def evaluate(
        self, model: SearchR3, engine: Engine, index: ExactIndex | ShardedIndex | None = None
    ) -> dict[str, float]:
        """nDCG@10 in all trained modes over a freshly encoded corpus, and the collapse alarm.

        Documents, queries and their rankings are shared among the processes.

        Args:
            model: what is evaluated.
            engine: around it.
            index: the corpus as these weights encode it, if that was done already, or as frozen ones did.
        """
        started, communicator = time.perf_counter(), engine.communicator
        values: dict[str, float] = {}
        with engine.full_params():
            index = index or self._index(model, communicator)
            shares = divide([len(request.text) for request in self.requests], communicator.world_size)
            modes = [*trained_modes(model.backbone), *(("auto",) if decides(model.backbone) else ())]
            for mode in modes:
                scores = self._scores(model, index, sorted(shares[communicator.rank]), mode)
                everyone = [one for part in communicator.all_gather(scores) for one in part]
                values[f"dev_ndcg@{DEPTH}_{mode}"] = fmean(score for score, _ in everyone)
                if mode == "auto":
                    values["dev_tokens_auto"] = fmean(tokens for _, tokens in everyone)
        rows = np.arange(0, len(index), max(1, len(index) // PROBE_DOCUMENTS))
        values["probe_cosine"] = probe_cosine(index.vectors_at(rows))
        return values | {"evaluation_seconds": time.perf_counter() - started}

    def _index(self, model: SearchR3, communicator: Communicator) -> ExactIndex | ShardedIndex:
        texts = self.collection.texts()
        doc_ids = sorted(texts, reverse=True)
        shares = divide_rows([len(texts[doc_id]) for doc_id in doc_ids], communicator.world_size)
        sharded = communicator.world_size > 1 and all(map(len, shares))
        rows = shares[communicator.rank] if sharded else np.arange(len(doc_ids))
        index = encode_rows(
            doc_ids, lambda some: model.encode_document([texts[doc_ids[row]] for row in some]), rows=rows
        )
        return ShardedIndex(doc_ids, rows, index, communicator) if sharded else index

    def _scores(
        self, model: SearchR3, index: ExactIndex | ShardedIndex, places: Sequence[int], mode: Mode
    ) -> list[tuple[float, int]]:
        """NDCG and tokens of each of the requests at some places, of which this process may have none."""
        vectors, tokens = np.empty((0, 0), np.float32), list[int]()
        if len(places):
            queries = model.encode_query(
                [self.requests[place].bare for place in places],
                mode,
                instruction=[self.requests[place].instruction for place in places],
                batch_size=self.batch_size,
            )
            vectors, tokens = queries.vectors, queries.reasoning_tokens
        vectors, everyone, own = index.together(vectors, places)
        requests = [self.requests[place] for place in everyone]
        rankings = ranked(index, vectors, requests, DEPTH) if requests else []
        return [
            (ndcg([doc_id for doc_id, _ in ranking], self.qrels[request.query_id], DEPTH), written)
            for request, ranking, written in zip(requests[own], rankings[own], tokens, strict=True)
        ]


class Evaluations:
    """The evaluations of a stage so far: which one was the best, its model, and whether to go on.

    All of it follows from `metrics.jsonl`, so a resumed run decides as an unbroken one. The models stand beside the
    checkpoints: the best one, and for each checkpoint the one that was the best when it was written.

    Args:
        run: holds metrics and checkpoints, those of the step that training goes on from.
        stage: `sft`, `grpo` or `distill`.
        recipe: the settings.
        engine: around the model.
        model: what is trained.
        start: the step that training goes on from.
    """

    def __init__(self, run: Run, stage: str, recipe: Recipe, engine: Engine, model: SearchR3, start: int) -> None:
        self.run, self.stage, self.engine = run, stage, engine
        self.settings: DevSettings = recipe.stage(stage)
        self.deciding = DECIDING[stage]
        frozen = keeps_documents(recipe, stage)
        self._save: Callable[[Path, Path], None] = partial(save_trained, engine, model, recipe, frozen=frozen)
        rows = engine.communicator.all_gather(run.metrics(stage) if run.first else [])[0]
        self.scores: dict[int, float] = {row["step"]: row[self.deciding] for row in rows if self.deciding in row}
        self._remove(lambda step: step > start)

    def due(self, step: int, steps: int) -> bool:
        """Whether the weights after this step are evaluated: every `evaluate_every` steps and at the end."""
        every = self.settings.evaluate_every
        return every > 0 and (step % every == 0 or step == steps)

    @property
    def best_step(self) -> int:
        """The step of the best evaluation, the first of equal ones."""
        return self._best_until(max(self.scores))

    @property
    def stopped(self) -> bool:
        """Whether the last `patience` evaluations were no better than one before."""
        patience = self.settings.patience
        return patience is not None and len([step for step in self.scores if step > self.best_step]) >= patience

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """After the metrics of a step were logged; keeps its model if it is asked for and the best so far.

        Raises:
            RunError: the model cannot be written.
        """
        if self.deciding not in values:
            return
        self.scores[step] = values[self.deciding]
        if self.settings.keep == "best" and self.best_step == step:
            folder = self._folder(step)
            agree(self.engine.communicator, folder, lambda: self._save(folder / "model", folder / "adapter"))
            needed = {self._best_until(limit) for limit in (*self.run.checkpoint_steps(self.stage), step)}
            self._remove(lambda other: other not in needed)
        if self.stopped and self.run.first:
            logger.warning(
                "%s stops after step %d: %s was %.4f at step %d, and no better in %d evaluations since",
                self.stage, step, self.deciding, self.scores[self.best_step], self.best_step, self.settings.patience,
            )  # fmt: skip

    def finish(self) -> None:
        """Write the stage's model: of the best evaluation or of the last step, as `keep` says.

        Raises:
            RunError: it cannot be written.
        """
        adapter = self.run.adapter_path(self.stage)
        if self.settings.keep == "last" or not self.scores:  # stopped before the first evaluation
            self.run.finish(self.stage, self.engine, lambda folder: self._save(folder, adapter))
            return
        logger.info("%s keeps the model after step %d", self.stage, self.best_step)
        self.run.finish(self.stage, self.engine, lambda folder: self._move(folder, adapter))

    def _move(self, folder: Path, adapter: Path) -> None:
        best = self._folder(self.best_step)
        # The model last: with it the stage is finished. An adapter that is gone was moved by a process that was killed.
        for source, target in ((best / "adapter", adapter), (best / "model", folder)):
            if self.run.first and (source.exists() or target == folder):
                shutil.rmtree(target, ignore_errors=True)
                source.replace(target)

    def _best_until(self, limit: int) -> int:
        """The best of the evaluations up to a step; -1 of none."""
        return max(
            (step for step in self.scores if step <= limit), key=lambda step: (self.scores[step], -step), default=-1
        )

    def _folder(self, step: int) -> Path:
        return self.run.checkpoints_path(self.stage) / f"best-{step:06d}"

    def _remove(self, unneeded: Callable[[int], bool]) -> None:
        """Remove models that were the best once."""
        if self.run.first:
            for folder in self.run.checkpoints_path(self.stage).glob("best-*"):
                if unneeded(int(folder.name.removeprefix("best-"))):
                    shutil.rmtree(folder)
