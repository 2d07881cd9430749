"""`SearchR3`: texts in, vectors out. Training, evaluation and search all encode through this class."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import DataError
from .backbone import Backbone, EmbeddingSettings, load_backbone
from .generation import Rollout, generate_rollouts
from .prompts import MODES, Kind, Mode

Array = NDArray[np.float32]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QueryEmbeddings:
    """What `encode_query` returns; `numpy.asarray` of it gives the vectors.

    Attributes:
        vectors: `Q x D`, float32, L2-normalised.
        reasoning: the text each query's reply held before the embed token (empty in direct mode).
        reasoning_tokens: its length in tokens.
        forced: whether the embed token had to be forced.
        truncated: whether the query was longer than the model's `max_length` and lost its end.
    """

    vectors: Array
    reasoning: list[str]
    reasoning_tokens: list[int]
    forced: list[bool]
    truncated: list[bool]

    def __len__(self) -> int:
        return len(self.vectors)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.vectors, dtype=dtype, copy=copy)


class SearchR3:
    """A model that reasons about a query and then embeds it.

    Args:
        model: a directory, a hub id, or `"builtin"` for the small base model of the package.
        device: `cpu`, `cuda`, ...; by default `cuda` where there is one.
        dtype: `float32`, `bfloat16` or `float16`.
        settings: wording and limits; by default those saved with the model.
        revision: branch, tag or commit on the hub.

    Raises:
        ModelError: the model cannot be loaded; the message names the remedy.

    Example:
        >>> from search_r3 import SearchR3
        >>> model = SearchR3("builtin")
        >>> queries = model.encode_query(["what do people pay with in Tashkent?"], mode="direct")
        >>> documents = model.encode_document(["The Uzbekistani Som is a currency.", "Uzbek is a language."])
        >>> model.similarity(queries, documents).shape
        (1, 2)
    """

    def __init__(
        self,
        model: str | Path | Backbone,
        *,
        device: str | None = None,
        dtype: str = "float32",
        settings: EmbeddingSettings | None = None,
        revision: str | None = None,
    ) -> None:
        if isinstance(model, Backbone):
            self.backbone = model
            return
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        source = builtin_base_path() if model == "builtin" else model
        self.backbone = load_backbone(source, settings=settings, dtype=dtype, device=device, revision=revision)

    @property
    def dimension(self) -> int:
        """`D`, the size of a vector."""
        return self.backbone.dimension

    def encode_query(
        self,
        texts: str | Sequence[str],
        mode: Mode = "reason",
        *,
        batch_size: int = 128,
        max_new_tokens: int | None = None,
        sampling_temperature: float = 0.0,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> QueryEmbeddings:
        """Encode queries, after reasoning (`reason`) or at once (`direct`).

        Args:
            texts: queries; a single string counts as one.
            mode: `reason` or `direct`.
            batch_size: queries encoded together; it does not change the vectors.
            max_new_tokens: reasoning budget; by default the model's own.
            sampling_temperature: 0 reasons greedily.
            seed: query `i` samples with seed `seed + i`.
            progress: called with the number of queries done, after each batch.

        Raises:
            DataError: no texts, or an empty one (its place is named).
        """
        if mode not in MODES:
            raise DataError(f"unknown mode {mode!r}; expected 'direct' or 'reason'")
        texts = _listed(texts, "query")
        encoded = [self._encode(text, mode, i) for i, text in enumerate(texts)]
        prompts, truncated = [ids for ids, _ in encoded], [cut for _, cut in encoded]
        if mode == "direct":
            vectors = self._vectors(prompts, batch_size, progress)
            empty = [""] * len(texts), [0] * len(texts), [False] * len(texts)
            return QueryEmbeddings(vectors, *empty, truncated)
        rollouts = self.rollouts(
            prompts,
            max_new_tokens=max_new_tokens,
            sampling_temperature=sampling_temperature,
            seeds=[seed + i for i in range(len(texts))],
            batch_size=batch_size,
            progress=progress,
        )
        return QueryEmbeddings(
            torch.stack([rollout.vector for rollout in rollouts]).cpu().numpy(),
            [rollout.reasoning for rollout in rollouts],
            [rollout.reasoning_tokens for rollout in rollouts],
            [rollout.forced for rollout in rollouts],
            truncated,
        )

    def encode_document(
        self,
        texts: str | Sequence[str],
        *,
        batch_size: int = 128,
        progress: Callable[[int], None] | None = None,
    ) -> Array:
        """Encode documents: `N x D`, float32, L2-normalised. Documents are never reasoned about.

        A document longer than the model's `max_length` loses its end; how many did is logged as a warning.

        Raises:
            DataError: no texts, or an empty one (its place is named).
        """
        texts = _listed(texts, "document")
        encoded = [self._encode(text, "document", i) for i, text in enumerate(texts)]
        truncated = sum(cut for _, cut in encoded)
        if truncated:
            limit = self.backbone.settings.max_length
            logger.warning("%d of %d documents were cut to max_length=%d tokens", truncated, len(texts), limit)
        return self._vectors([ids for ids, _ in encoded], batch_size, progress)

    def count_document_tokens(self, texts: Sequence[str]) -> list[int]:
        """The tokens that each document takes when it is encoded: text (cut at `max_length`) and prompt."""
        return [len(self._encode(text, "document", i)[0]) for i, text in enumerate(texts)]

    def similarity(self, queries: Any, documents: Any) -> Array:
        """Cosine similarity `Q x N` of what `encode_query` and `encode_document` returned."""
        result: Array = np.asarray(queries, dtype=np.float32) @ np.asarray(documents, dtype=np.float32).T
        return result

    def rollouts(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | None = None,
        sampling_temperature: float = 0.0,
        seeds: Sequence[int] | None = None,
        batch_size: int = 128,
        progress: Callable[[int], None] | None = None,
    ) -> list[Rollout]:
        """Reason-then-embed replies with ids, log-probabilities, masks and vectors (see `generate_rollouts`)."""
        return generate_rollouts(
            self.backbone,
            prompts,
            max_new_tokens=max_new_tokens or self.backbone.settings.max_new_tokens,
            sampling_temperature=sampling_temperature,
            seeds=seeds,
            batch_size=batch_size,
            progress=progress,
        )

    def save_pretrained(
        self, folder: str | Path, *, dtype: Literal["float32", "float16", "bfloat16"] | None = None
    ) -> None:
        """Write weights, tokenizer, prompt set and embedding settings to a directory that `SearchR3` loads."""
        self.backbone.save(folder, dtype)

    def _encode(self, text: str, kind: Kind, place: int) -> tuple[list[int], bool]:
        if not isinstance(text, str) or not text.strip():
            name = "document" if kind == "document" else "query"
            raise DataError(f"{name} number {place} is {text!r}; expected a text with at least one visible character")
        encoded = self.backbone.prompt_encoder.encode(text, kind)
        return encoded.ids, encoded.truncated

    @torch.no_grad()
    def _vectors(
        self, sequences: Sequence[list[int]], batch_size: int, progress: Callable[[int], None] | None
    ) -> Array:
        vectors = np.empty((len(sequences), self.dimension), dtype=np.float32)
        for rows in _by_length(sequences, batch_size):
            vectors[rows] = self.backbone.embed([sequences[i] for i in rows]).cpu().numpy()
            if progress is not None:
                progress(len(rows))
        return vectors


def builtin_base_path() -> Path:
    """Directory of the small base model that ships with the package."""
    return Path(str(files("search_r3"))) / "builtin"


def _by_length(sequences: Sequence[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Batches of row numbers, sorted by length so that little is padded."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _listed(texts: str | Sequence[str], what: str) -> list[str]:
    listed = [texts] if isinstance(texts, str) else list(texts)
    if not listed:
        raise DataError(f"no {what} was given; give at least one text")
    return listed
