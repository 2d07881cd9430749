"""`SearchR3`: texts in, vectors out. Training, evaluation and search all encode through this class."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import ConfigError, DataError, ModelError
from ..types import Array, Progress
from .backbone import Backbone
from .documents import WINDOW, check_finite, encode_stream, shorten
from .engine.decoding import Decoder, DecodeRequest, Rollout
from .loading import load_backbone
from .prompts import MODES, Kind, Mode, PromptSet
from .settings import EmbeddingSettings

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
        model: a directory, a GGUF file, a hub id, or `"builtin"` for the small base model of the package.
        device: `cpu`, `cuda`, `mps`, ...; by default a GPU where there is one.
        dtype: `float32`, `bfloat16`, `float16` (or `fp32`, `bf16`, `fp16`, or torch's own); `auto`: bfloat16 on CUDA,
            else float32.
        settings: wording and limits in place of all that are saved with the model.
        prompts: wording in place of the saved one: a name of `PROMPT_SETS`, or a `PromptSet`.
        max_length: in place of the saved limit: the longest prompt, in tokens.
        max_new_tokens: in place of the saved reasoning budget, in tokens.
        revision: branch, tag or commit on the hub.
        truncate_dim: keep so many dimensions of a vector, the first ones (and normalise again); for models that stage 1
            trained with `sft.matryoshka_dimensions`.
        model_kwargs: more for transformers' `from_pretrained`: `device_map`, `quantization_config`, ...
        tokenizer_kwargs: more for that of the tokenizer.
        cache_folder: of the hub's files; by default the hub library's own.
        token: for the hub; by default the one that is logged in.
        local_files_only: take what is in the cache, and ask nobody.

    Raises:
        ModelError: the model cannot be loaded, or has fewer dimensions; the message names the remedy.
        ConfigError: an unknown dtype or device, unknown prompts, or limits that do not fit into the model's context.

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
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        settings: EmbeddingSettings | None = None,
        prompts: str | PromptSet | None = None,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        revision: str | None = None,
        truncate_dim: int | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        cache_folder: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> None:
        if isinstance(model, Backbone):
            if any(one is not None for one in (settings, prompts, max_length, max_new_tokens)):
                raise ConfigError("a Backbone has its settings already; give them to load_backbone")
            self.backbone = model
        else:
            self.backbone = load_backbone(
                model,
                settings=settings,
                prompts=prompts,
                max_length=max_length,
                max_new_tokens=max_new_tokens,
                dtype=dtype,
                device=device,
                revision=revision,
                model_kwargs=model_kwargs,
                tokenizer_kwargs=tokenizer_kwargs,
                cache_folder=cache_folder,
                token=token,
                local_files_only=local_files_only,
            )
            if not self.backbone.trained:
                logger.warning(
                    "%s is a base that no stage has trained: its vectors mean nothing before stage 1 (search-r3 sft)",
                    model,
                )
        if truncate_dim is not None and not 0 < truncate_dim <= self.backbone.dimension:
            raise ModelError(
                f"truncate_dim={truncate_dim}, but the vectors of {self.backbone.source} have "
                f"{self.backbone.dimension} dimensions; give as many or fewer"
            )
        self.truncate_dim = truncate_dim

    @property
    def dimension(self) -> int:
        """`D`, the size of a vector."""
        return self.truncate_dim or self.backbone.dimension

    def encode_query(
        self,
        texts: str | Sequence[str],
        mode: Mode = "reason",
        *,
        instruction: str | Sequence[str] = "",
        batch_size: int = 128,
        max_new_tokens: int | None = None,
        sampling_temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> QueryEmbeddings:
        """Encode queries, after reasoning (`reason`) or at once (`direct`).

        Args:
            texts: queries; a single string counts as one.
            mode: `reason` or `direct`.
            instruction: what is looked for, e.g. `Find a passage that answers this question.`; it follows the text, as
                in training. One for all, or one per query; an empty one is none.
            batch_size: queries reasoned about at once; it changes vectors by rounding, which can tip a near tie between
                tokens (rarely in float32).
            max_new_tokens: reasoning budget; by default the model's own.
            sampling_temperature: 0 reasons greedily.
            top_p: sample among the likeliest tokens that together reach this probability.
            seed: query `i` samples with seed `seed + i`.
            progress: called with the numbers of queries done, and of tokens (written, or in direct mode read).

        Raises:
            DataError: no texts, an empty one (its place is named), another number of instructions than of texts, or an
                instruction that leaves no room for its text.
            ModelError: a vector holds NaN or infinity.
        """
        _check_mode(mode)
        texts = _as_list(texts, "query")
        if mode == "direct":
            vectors, truncated = self._vectors(texts, "direct", instruction, None, progress)
            empty = [""] * len(texts), [0] * len(texts), [False] * len(texts)
            return QueryEmbeddings(vectors, *empty, truncated)
        prompts = self.backbone.prompt_encoder.encode_batch(texts, mode, instruction)
        rollouts = self.rollouts(
            [prompt.ids for prompt in prompts],
            max_new_tokens=max_new_tokens,
            sampling_temperature=sampling_temperature,
            top_p=top_p,
            seeds=[seed + i for i in range(len(texts))],
            batch_size=batch_size,
            progress=progress,
        )
        return self._embeddings(rollouts, texts, [prompt.truncated for prompt in prompts])

    def stream_query(
        self,
        text: str,
        mode: Mode = "reason",
        *,
        instruction: str = "",
        max_new_tokens: int | None = None,
        sampling_temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str | QueryEmbeddings]:
        """Encode one query and show the reasoning while it is written; arguments as in `encode_query`.

        Yields:
            Pieces of the reasoning as the model writes them, then the same `QueryEmbeddings` as `encode_query` returns.
            Closing the iterator stops the model.

        Raises:
            DataError: the query is empty, or the instruction leaves no room for it.
        """
        _check_mode(mode)
        encoder = self.backbone.prompt_encoder
        [prompt] = encoder.encode_batch(_as_list(text, "query"), mode, instruction)
        budget = self.backbone.settings.max_new_tokens if max_new_tokens is None else max_new_tokens
        budget = budget if mode == "reason" else 0
        decoder = Decoder(self.backbone, slots=1)
        ticket = decoder.submit(DecodeRequest(prompt.ids, budget, sampling_temperature, top_p, seed))
        output = ""  # what has been yielded
        while not (results := decoder.step()):
            reasoning = encoder.decode(decoder.reply(ticket))
            # A character may take several tokens; until the last of them it decodes to the replacement character.
            if reasoning.startswith(output) and not reasoning.endswith("\ufffd"):
                piece, output = reasoning[len(output) :], reasoning
                if piece:
                    yield piece
        result = self._embeddings([rollout for _, rollout in results], [text], [prompt.truncated])
        if result.reasoning[0] != output and result.reasoning[0].startswith(output):
            yield result.reasoning[0][len(output) :]
        yield result

    def encode_document(
        self,
        texts: str | Sequence[str],
        *,
        instruction: str | Sequence[str] = "",
        batch_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """Encode documents: `N x D`, float32, L2-normalised. Documents are never reasoned about.

        A document longer than the model's `max_length` loses its end; how many did is logged as a warning.

        Args:
            texts: documents; a single string counts as one.
            instruction: as in `encode_query`; the recipes train documents without one.
            batch_tokens: tokens computed together; by default what suits the device. It changes vectors by
                rounding only.
            progress: called after each batch with the numbers of documents and of their tokens.

        Raises:
            DataError: as in `encode_query`.
            ModelError: a vector holds NaN or infinity.
        """
        texts = _as_list(texts, "document")
        vectors, truncated = self._vectors(texts, "document", instruction, batch_tokens, progress)
        self._warn_of(sum(truncated), len(truncated))
        return vectors

    def stream_document(
        self,
        texts: Iterable[str],
        *,
        instruction: str = "",
        batch_tokens: int | None = None,
        window: int = WINDOW,
        progress: Progress | None = None,
    ) -> Iterator[Array]:
        """Encode documents of which there may be more than fit into memory.

        Args:
            texts: read as far as the next block needs.
            instruction: one for all, as in `encode_document`.
            batch_tokens: as in `encode_document`.
            window: documents per block; within it documents of like length are computed together.
            progress: as in `encode_document`.

        Yields:
            Blocks of vectors `n x D` in the order of the texts.

        Raises:
            DataError: a text is empty (its place in its block is named).
        """
        for prompts, vectors in encode_stream(
            *(self.backbone.document_side, texts, "document"),
            instruction=instruction,
            batch_tokens=batch_tokens,
            window=window,
            progress=progress,
        ):
            self._warn_of(sum(prompt.truncated for prompt in prompts), len(prompts))
            yield shorten(vectors, self.truncate_dim)

    def count_document_tokens(self, texts: Sequence[str]) -> list[int]:
        """The tokens that each document takes when it is encoded: text (cut at `max_length`) and prompt."""
        return [len(prompt.ids) for prompt in self.backbone.prompt_encoder.encode_batch(texts, "document")]

    def similarity(self, queries: Any, documents: Any) -> Array:
        """Cosine similarity `Q x N` of what `encode_query` and `encode_document` returned."""
        result: Array = np.asarray(queries, dtype=np.float32) @ np.asarray(documents, dtype=np.float32).T
        return result

    def rollouts(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int] | None = None,
        sampling_temperature: float = 0.0,
        top_p: float = 1.0,
        seeds: Sequence[int] | None = None,
        batch_size: int = 128,
        progress: Progress | None = None,
    ) -> list[Rollout]:
        """Let the model reply to each prompt until it emits the embed token (see `DecodeRequest` for the settings).

        Args:
            prompts: prompt ids (from `PromptEncoder.encode(..., "reason")`).
            max_new_tokens: budget of a reply, the embed token included; one for all (by default the model's own) or one
                per prompt.
            sampling_temperature: 0 decodes greedily (log-probabilities are then at temperature 1).
            top_p: sample among the likeliest tokens that together reach this probability.
            seeds: one seed per prompt; needed when the temperature is above 0.
            batch_size: rollouts decoded at once; it changes them by rounding only, as in `encode_query`.
            progress: called with the numbers of rollouts finished, and of their tokens, since the last call.

        Returns:
            One rollout per prompt, in the order of the prompts: ids, log-probabilities, masks and vectors.

        Raises:
            ModelError: a prompt and its budget do not fit into the model's context, or a logit is not finite.
        """
        if sampling_temperature > 0 and (seeds is None or len(seeds) != len(prompts)):
            raise ValueError("sampling needs one seed per prompt")
        budgets = self.backbone.settings.max_new_tokens if max_new_tokens is None else max_new_tokens
        budgets = [budgets] * len(prompts) if isinstance(budgets, int) else budgets
        requests = [
            DecodeRequest(prompt, budget, sampling_temperature, top_p, None if seeds is None else seeds[place])
            for place, (prompt, budget) in enumerate(zip(prompts, budgets, strict=True))
        ]
        return Decoder(self.backbone, batch_size).run(requests, progress)

    def save_pretrained(
        self, folder: str | Path, *, dtype: Literal["float32", "float16", "bfloat16"] | None = None
    ) -> None:
        """Write weights, tokenizer, prompt set and embedding settings to a directory that `SearchR3` loads."""
        self.backbone.save(folder, dtype)

    def _vectors(
        self,
        texts: Sequence[str],
        kind: Kind,
        instruction: str | Sequence[str],
        batch_tokens: int | None,
        progress: Progress | None,
    ) -> tuple[Array, list[bool]]:
        side = self.backbone.document_side if kind == "document" else self.backbone
        [(prompts, vectors)] = encode_stream(
            *(side, texts, kind),
            instruction=instruction,
            batch_tokens=batch_tokens,
            window=len(texts),
            progress=progress,
        )
        return shorten(vectors, self.truncate_dim), [prompt.truncated for prompt in prompts]

    def _embeddings(self, rollouts: Sequence[Rollout], texts: Sequence[str], truncated: list[bool]) -> QueryEmbeddings:
        vectors = torch.stack([rollout.vector for rollout in rollouts]).numpy()
        check_finite(vectors, texts, self.backbone.source)
        return QueryEmbeddings(
            shorten(vectors, self.truncate_dim),
            [rollout.reasoning for rollout in rollouts],
            [rollout.reasoning_tokens for rollout in rollouts],
            [rollout.forced for rollout in rollouts],
            truncated,
        )

    def _warn_of(self, truncated: int, count: int) -> None:
        if truncated:
            limit = self.backbone.settings.max_length
            logger.warning("%d of %d documents were cut to max_length=%d tokens", truncated, count, limit)


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise DataError(f"unknown mode {mode!r}; expected 'direct' or 'reason'")


def _as_list(texts: str | Sequence[str], kind: str) -> list[str]:
    result = [texts] if isinstance(texts, str) else list(texts)
    if not result:
        raise DataError(f"no {kind} was given; give at least one text")
    return result
