"""mteb, the benchmark of the field: Search-R3 as an encoder of mteb, and its runs.

mteb joins title and text by one space, as `Document.full_text` does. Equal scores rank by doc_id, the larger first, as
in `retrieval.metrics`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..errors import ConfigError, DataError
from ..extras import extra
from ..model.encoder import SearchR3
from ..model.modes.auto import gate_of
from ..model.modes.first import decides
from ..model.modes.latent import latent_budget
from ..model.prompts import MODES, PROMPT_SETS, Mode, PromptSet
from ..types import Array
from .instructions import NONE, OWN, choose, file_label, task_instruction
from .mteb_tasks import sample_queries, suite_tasks
from .systems import count_truncated, short_name

with extra("mteb"):
    import mteb
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from mteb import AbsTask, ResultCache, TaskMetadata
    from mteb.models import ModelMeta
    from mteb.models.model_meta import ScoringFunction
    from mteb.types import BatchedInput, PromptType

logger = logging.getLogger(__name__)

Vectors = dict[str, tuple[Array, int]]
"""Hash of documents -> their vectors, and how many lost their end."""


@dataclass(frozen=True)
class TaskScore:
    """One mode's result on one task.

    Attributes:
        task: mteb's name of the task.
        mode: of `MODES`.
        model: the name in mteb's results, the mode in it.
        instruction: of the queries: `own`, `none` or a text.
        measure: the task's main score, e.g. `ndcg_at_10`.
        score: its mean over splits and subsets.
        scores: `split/subset` -> main score.
        tokens_per_query: `task/split/subset` -> mean reasoning tokens; empty where the result was there before.
        path: mteb's own result file.
        part: what of the task was measured, where that is not all of it.
        truncated_queries: queries that lost their end, over splits and subsets; 0 where the result was there before.
        truncated_documents: likewise.
    """

    task: str
    mode: Mode
    model: str
    instruction: str
    measure: str
    score: float
    scores: dict[str, float]
    tokens_per_query: dict[str, float]
    path: Path
    part: str = ""
    truncated_queries: int = 0
    truncated_documents: int = 0


class SearchR3MTEB:
    """A model in one mode, as an encoder of mteb (`EncoderProtocol`).

    Texts without a side (classification, clustering, sentence similarity) are encoded as documents: that wording asks
    for no search, and both texts of a pair get the same one.

    Args:
        model: a directory, a hub id, `"smol"`, or a loaded `SearchR3` (then device, dtype and revision are its own).
        revision: branch, tag or commit on the hub.
        mode: what queries do, of `MODES`; by default the model's own. Each has a model name of its own in mteb's
            results. In mode auto the gate reads vectors alone: mteb wants those of queries before those of documents.
        device: as of `SearchR3`.
        dtype: as of `SearchR3`; results of a precision other than float32 are kept apart.
        batch_size: queries reasoned about at once; by default mteb's `batch_size`. Documents are batched by tokens.
        max_new_tokens: reasoning budget; by default the model's own. Another budget keeps its results apart.
        instruction: `own` gives each query its own instruction, else the prompt of the task, else that of mteb for such
            tasks, and documents the task's prompt for them, where it has one; `none` gives none; a text goes to the
            queries without their own. Each keeps its results apart.

    Attributes:
        mteb_model_meta: name (`owner/name-reason`, `local/folder-reason`), revision and sizes.
        tokens_per_query: `task/split/subset` -> mean reasoning tokens of the queries encoded so far.
        truncated_queries: likewise -> queries that lost their end.
        truncated_documents: likewise.

    Raises:
        SearchR3Error: mteb is not installed (on import), an unknown mode, or a model that cannot be loaded.

    Example:
        >>> import mteb  # doctest: +SKIP
        >>> mteb.evaluate(SearchR3MTEB("runs/rl/model", mode="reason"), mteb.get_task("SciFact"))  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | Path | SearchR3,
        revision: str | None = None,
        *,
        mode: Mode | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | None = None,
        max_new_tokens: int | None = None,
        instruction: str = OWN,
    ) -> None:
        if mode not in (None, *MODES):
            raise DataError(f"unknown mode {mode!r}; expected one of {', '.join(MODES)}")
        if not isinstance(model, SearchR3):
            model = SearchR3(model, device=device, dtype=dtype, revision=revision)
        mode = mode or model.backbone.settings.mode
        self.model = model
        self.mode = mode
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.instruction = instruction
        self.mteb_model_meta = _model_meta(model, mode, max_new_tokens, instruction)
        self.tokens_per_query: dict[str, float] = {}
        self.truncated_queries: dict[str, int] = {}
        self.truncated_documents: dict[str, int] = {}
        self._cache: Vectors | None = None  # shared between modes by run_mteb

    def encode(
        self,
        inputs: DataLoader[BatchedInput],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> Array:
        """Encode what mteb gives, with the arguments of its `EncoderProtocol`: `N x D`, float32, L2-normalised.

        A text without a visible character gets the zero vector, whose similarity to everything is 0; how many did is
        logged as a warning. Of mteb's encode kwargs `batch_size` counts, for queries.

        Raises:
            ConfigError: vectors of another precision than `float32` are asked for.
        """
        if kwargs.get("precision") not in (None, "float32"):
            raise ConfigError(f"precision={kwargs['precision']!r}: the vectors are float32; leave the precision out")
        of_query = prompt_type == PromptType.query
        texts: list[str] = []
        instructions: list[str] = []
        of_task = task_instruction(task_metadata, "query") if of_query and self.instruction == OWN else ""
        for batch in cast("Iterable[Mapping[str, list[str]]]", inputs):
            # `text` of a query ends with its instruction; `query` does not.
            texts += batch["query"] if of_query and "query" in batch else batch["text"]
            own = batch["instruction"] if of_query and "instruction" in batch else [""] * len(batch["text"])
            instructions += [choose(self.instruction, one, of_task) for one in own]
        place = f"{task_metadata.name}/{hf_split}/{hf_subset}"
        visible = [row for row, text in enumerate(texts) if text.strip()]
        if empty := len(texts) - len(visible):
            logger.warning("%s: %d of %d texts are empty and get the zero vector", place, empty, len(texts))
        vectors = np.zeros((len(texts), self.model.dimension), dtype=np.float32)
        if visible and of_query:
            batch_size = self.batch_size or kwargs.get("batch_size") or 128
            rows = [texts[row] for row in visible], [instructions[row] for row in visible]
            vectors[visible] = self._queries(*rows, place, batch_size)
        elif visible:
            own_side = prompt_type == PromptType.document and self.instruction == OWN
            of_task = task_instruction(task_metadata, "document") if own_side else ""
            vectors[visible], cut = self._documents([texts[row] for row in visible], of_task)
            # mteb gives a large corpus in parts.
            self.truncated_documents[place] = self.truncated_documents.get(place, 0) + cut
        return vectors

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosine similarity of all pairs, `N x M`: the dot product, since vectors have length 1 (or 0)."""
        first, second = torch.as_tensor(embeddings1).float(), torch.as_tensor(embeddings2).float()
        return first.reshape(-1, first.shape[-1]) @ second.reshape(-1, second.shape[-1]).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosine similarity of corresponding rows, `N`."""
        return (torch.as_tensor(embeddings1).float() * torch.as_tensor(embeddings2).float()).sum(-1)

    def _queries(self, texts: list[str], instructions: list[str], place: str, batch_size: int) -> Array:
        queries = self.model.encode_query(
            *(texts, self.mode),
            instruction=instructions,
            batch_size=batch_size,
            max_new_tokens=self.max_new_tokens,
        )
        self.tokens_per_query[place] = fmean(queries.reasoning_tokens)
        self.truncated_queries[place] = self.truncated_queries.get(place, 0) + sum(queries.truncated)
        if all(queries.forced):
            logger.warning("%s: the model emitted its embed token for none of %d queries", place, len(texts))
        return queries.vectors

    def _documents(self, texts: list[str], instruction: str) -> tuple[Array, int]:
        cache = {} if self._cache is None else self._cache
        key = hashlib.sha256(json.dumps([texts, instruction]).encode()).hexdigest()
        if key not in cache:
            vectors = np.concatenate(list(self.model.stream_document(texts, instruction=instruction)))
            cache[key] = vectors, count_truncated(self.model, texts, instruction)
        return cache[key]


def run_mteb(
    model: str | Path | SearchR3,
    modes: Sequence[Mode],
    tasks: str | AbsTask | Sequence[str | AbsTask],
    out_folder: str | Path,
    *,
    batch_size: int = 128,
    max_new_tokens: int | None = None,
    instructions: Sequence[str] = (OWN,),
    save_predictions: bool = False,
    queries: int | None = None,
    seed: int = 0,
) -> list[TaskScore]:
    """Run tasks of mteb in each mode and with each instruction.

    What `out_folder` already holds is read, not computed again. Documents are encoded once for all of these; their
    vectors stay in memory for the duration of a task.

    Args:
        model: a directory, a hub id, `"smol"`, or a `SearchR3` loaded with a device or dtype of choice.
        modes: of `MODES`.
        tasks: names of suites or tasks (`suite_tasks`), tasks of mteb, or a mixture.
        out_folder: takes mteb's files, `results/MODEL/REVISION/TASK.json`, each written when its task is done.
        batch_size: queries reasoned about at once.
        max_new_tokens: reasoning budget; by default the model's own.
        instructions: as in `SearchR3MTEB`.
        save_predictions: also write the rankings, `predictions/MODEL/REVISION/TASK_predictions.json`.
        queries: size of a random sample of the queries of each split; its results are kept apart.
        seed: of the sample.

    Returns:
        The scores task by task, within a task mode by mode, and within a mode by instruction.

    Raises:
        DataError: an unknown task, suite or mode, or a task whose data cannot be had; what was measured before is kept.
        ModelError: the model cannot be loaded or gives no usable vectors.
    """
    items = [tasks] if isinstance(tasks, str | AbsTask) else list(tasks)
    queue = suite_tasks([item for item in items if isinstance(item, str)])
    queue += [item for item in items if isinstance(item, AbsTask)]
    model = model if isinstance(model, SearchR3) else SearchR3(model)
    encoders = [
        SearchR3MTEB(model, mode=mode, max_new_tokens=max_new_tokens, instruction=instruction)
        for mode in modes
        for instruction in dict.fromkeys(instructions)
    ]
    if queries is not None:
        _sample(queue, encoders, queries, seed)
    cache = ResultCache(out_folder)
    scores = []
    for task in queue:
        vectors: Vectors | None = {} if len(encoders) > 1 else None
        for encoder in encoders:
            encoder._cache = vectors
            score = _run(encoder, task, cache, batch_size, save_predictions)
            scores.append(replace(score, part=_part(task, queries)))
    return scores


def _sample(tasks: Sequence[AbsTask], encoders: Sequence[SearchR3MTEB], queries: int, seed: int) -> None:
    """Let the tasks measure samples of their queries, and keep the results apart."""
    for task in tasks:
        sample_queries(task, queries, seed)
    for encoder in encoders:
        meta = encoder.mteb_model_meta
        sampled = {**(meta.experiment_kwargs or {}), "queries": queries, "seed": seed}
        encoder.mteb_model_meta = meta.model_copy(update={"experiment_kwargs": sampled})


def _part(task: AbsTask, queries: int | None) -> str:
    """What of a task is measured, where that is not all of it."""
    subsets = getattr(task, "hf_subsets", None) or []
    whole = len(subsets) == len(task.metadata.hf_subsets_to_langscripts)
    parts = [f"a sample of {queries:,} queries"] if queries is not None else []
    return ", ".join(parts if whole or not subsets else [*parts, f"subsets {' '.join(subsets)}"])


def _run(encoder: SearchR3MTEB, task: AbsTask, cache: ResultCache, batch_size: int, save: bool) -> TaskScore:
    name, meta = task.metadata.name, encoder.mteb_model_meta
    path = cache.get_task_result_path(name, meta)
    predictions = cache.cache_path / "predictions" / path.parent.relative_to(cache.cache_path / "results")
    encoder.tokens_per_query, encoder.truncated_queries, encoder.truncated_documents = {}, {}, {}
    bars_shown = not are_progress_bars_disabled()
    disable_progress_bars()  # those of `datasets`, drawn while mteb prepares texts
    try:
        [result] = mteb.evaluate(
            *(encoder, task),
            co2_tracker=False,
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
            cache=cache,
            prediction_folder=predictions if save else None,
            show_progress_bar=False,
        ).task_results
    except OSError as error:
        raise DataError(f"{name} could not be run: {error}; finished results are in {cache.cache_path}") from error
    finally:
        if bars_shown:
            enable_progress_bars()
    kept = getattr(task, "hf_subsets", None)  # a file may hold others, of an earlier call
    subsets = (
        (split, subset)
        for split, subsets in result.scores.items()
        for subset in subsets
        if kept is None or subset["hf_subset"] in kept
    )
    scores = {f"{split}/{subset['hf_subset']}": round(float(subset["main_score"]), 6) for split, subset in subsets}
    mean, measure, tokens = fmean(scores.values()), task.metadata.main_score, encoder.tokens_per_query
    system = encoder.mode, str(meta.name), encoder.instruction
    cut = (sum(each.values()) for each in (encoder.truncated_queries, encoder.truncated_documents))
    return TaskScore(name, *system, measure, mean, scores, tokens, path, "", *cut)


def _model_meta(model: SearchR3, mode: Mode, max_new_tokens: int | None, instruction: str) -> ModelMeta:
    source, sides = model.backbone.source, (model.backbone, model.backbone.document_side)
    is_gguf = model.backbone.engine == "llama.cpp"  # which shows no weights
    weights = [] if is_gguf else list({weight: None for side in sides for weight in side.model.parameters()})
    on_hub = "/" in source and not Path(source).exists()
    name = source if on_hub else f"local/{short_name(str(Path(source).resolve()))}"
    settings, dtype = model.backbone.settings, model.backbone.dtype
    # All that scores depend on and that the model's files do not fix: mteb takes results of this name for the same.
    experiment: dict[str, Any] = {
        "instruction": file_label(instruction),
        "max_length": settings.max_length,
        "prompts": _prompts_label(settings.prompts),
    }
    if mode == "auto":
        experiment["gate"] = "policy" if decides(model.backbone) else gate_of(model.backbone).digest
    if mode == "latent":
        experiment["soft_tokens"] = latent_budget(model.backbone, max_new_tokens) - 1
    elif mode != "direct":
        experiment["max_new_tokens"] = settings.max_new_tokens if max_new_tokens is None else max_new_tokens
    if dtype != "float32":
        experiment["dtype"] = dtype
    if model.truncate_dim is not None:
        experiment["truncate_dim"] = model.truncate_dim
    unknown = ("loader", "reference", "release_date", "languages", "license", "training_datasets")
    return ModelMeta(
        **dict.fromkeys((*unknown, "public_training_code", "public_training_data")),
        name=f"{name}-{mode}",
        revision=model.backbone.revision,
        n_parameters=sum(weight.numel() for weight in weights) or None,
        memory_usage_mb=sum(weight.numel() * weight.element_size() for weight in weights) / 2**20 or None,
        max_tokens=settings.max_length,
        embed_dim=model.dimension,
        open_weights=True,
        framework=["GGUF"] if is_gguf else ["PyTorch", "Transformers"],
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=instruction != NONE,
        experiment_kwargs=experiment,
    )


def _prompts_label(prompts: PromptSet) -> str:
    """The name of a prompt set; with a hash of its wording where that is not ours."""
    if prompts == PROMPT_SETS.get(prompts.name):
        return prompts.name
    return f"{prompts.name}-{hashlib.sha256(prompts.model_dump_json().encode()).hexdigest()[:8]}"
