"""`SearchR3`: texts in, vectors out. Training, evaluation and search all encode through this class."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Unpack

import numpy as np
import torch

from ..errors import ConfigError, DataError
from ..types import Array, Progress
from .backbone import Backbone, in_parallel
from .documents import WINDOW, check_finite, encode_stream
from .embeddings import Habits, QueryEmbeddings, as_asked, check_habits, devices_of, plain, shorten, telling
from .engine.decoding import Decoder, DecodeRequest, Rollout
from .loaded import LoadedModel
from .prompts import MODES, EncodedPrompt, Kind, Mode

logger = logging.getLogger(__name__)


class SearchR3(LoadedModel):
    """A model that reasons about a query and then embeds it.

    Args:
        model: a directory, a GGUF file, a hub id, `"smol"` for the package's adapters of SmolLM2-135M-Instruct, or
            `"builtin"` for its small base model.
        device: `cpu`, `cuda`, `mps`, ...; by default a GPU where there is one.
        dtype: `float32`, `bfloat16`, `float16` (or `fp32`, `bf16`, `fp16`, or torch's own); `auto`: bfloat16 on CUDA,
            else float32. On a CPU float16 is weights of 16 bits under float32 arithmetic where there is such (`pack`).
        backend: what computes: `torch`, or `llama.cpp` with a GGUF file that `search-r3 export --gguf` wrote, for one
            query at a time on a CPU (docs/laptop.md; extra `llamacpp`).
        settings: wording and limits in place of all that are saved with the model.
        prompts: wording in place of the saved one: a name of `PROMPT_SETS`, or a `PromptSet`.
        max_length: in place of the saved limit: the longest prompt, in tokens.
        max_new_tokens: in place of the saved reasoning budget, in tokens.
        revision: branch, tag or commit on the hub.
        truncate_dim: keep so many dimensions of a vector, the first ones (and normalise again); for models that stage 1
            trained with `sft.matryoshka_dimensions`.
        model_kwargs: more for transformers' `from_pretrained`: `device_map`, `quantization_config`, ...; for llama.cpp
            `n_threads`, `n_parallel`, `n_gpu_layers`.
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

    _warned = False  # of texts that were encoded without a prompt's name

    def encode_query(
        self,
        texts: str | Sequence[str],
        mode: Mode | None = None,
        *,
        instruction: str | Sequence[str] = "",
        batch_size: int = 128,
        max_new_tokens: int | None = None,
        sampling_temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        progress: Progress | None = None,
        **habits: Unpack[Habits],
    ) -> QueryEmbeddings:
        """Encode queries, after reasoning (`reason`) or at once (`direct`).

        Args:
            texts: queries; a single string counts as one.
            mode: `reason` or `direct`; by default the model's own, which is `reason` where `search_r3.json` names none.
            instruction: what is looked for, e.g. `Find a passage that answers this question.`; it follows the text, as
                in training. One for all, or one per query; an empty one is none.
            batch_size: queries reasoned about at once; it changes vectors by rounding, which can tip a near tie between
                tokens (rarely in float32).
            max_new_tokens: reasoning budget; by default the model's own.
            sampling_temperature: 0 reasons greedily.
            top_p: sample among the likeliest tokens that together reach this probability.
            seed: query `i` samples with seed `seed + i`.
            progress: called with the numbers of queries done, and of tokens (written, or in direct mode read).
            habits: `show_progress_bar`, `convert_to_tensor` and other arguments of sentence-transformers, see `Habits`.

        Raises:
            DataError: no texts, an empty one (its place is named), another number of instructions than of texts, or an
                instruction that leaves no room for its text.
            ModelError: a vector holds NaN or infinity.
            ConfigError: an argument of sentence-transformers that asks for what cannot be had.
        """
        mode = self._mode(mode)
        texts = _as_list(texts, "query")
        dimensions, backbones = self._asked("query", habits, batch_size)
        with telling("queries", len(texts), progress, habits.get("show_progress_bar")) as progress:
            if mode == "direct":
                vectors, truncated = self._vectors(backbones, texts, "direct", instruction, progress)
                empty = [""] * len(texts), [0] * len(texts), [False] * len(texts)
                result = QueryEmbeddings(shorten(vectors, dimensions), *empty, truncated)
            else:
                prompts = self.backbone.prompt_encoder.encode_batch(texts, mode, instruction)
                rollouts = self.rollouts(
                    [prompt.ids for prompt in prompts],
                    max_new_tokens=max_new_tokens,
                    sampling_temperature=sampling_temperature,
                    top_p=top_p,
                    seeds=[seed + i for i in range(len(texts))],
                    batch_size=batch_size,
                    progress=progress,
                    backbones=backbones,
                )
                result = self._embeddings(rollouts, texts, [prompt.truncated for prompt in prompts], dimensions)
        given: QueryEmbeddings = as_asked(result, habits, self.device)
        return given

    def stream_query(
        self,
        text: str,
        mode: Mode | None = None,
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
        mode = self._mode(mode)
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
        rollouts = [rollout for _, rollout in results]
        result = self._embeddings(rollouts, [text], [prompt.truncated], self.truncate_dim)
        if result.reasoning[0] != output and result.reasoning[0].startswith(output):
            yield result.reasoning[0][len(output) :]
        yield result

    def encode_document(
        self,
        texts: str | Sequence[str],
        *,
        instruction: str | Sequence[str] = "",
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        progress: Progress | None = None,
        **habits: Unpack[Habits],
    ) -> Array:
        """Encode documents: `N x D`, float32, L2-normalised. Documents are never reasoned about.

        A document longer than the model's `max_length` loses its end; how many did is logged as a warning.

        Args:
            texts: documents; a single string counts as one.
            instruction: as in `encode_query`; the recipes train documents without one.
            batch_size: documents computed together, at most.
            batch_tokens: tokens computed together, at most; by default what suits the device. Both change vectors by
                rounding only.
            progress: called after each batch with the numbers of documents and of their tokens.
            habits: as in `encode_query`.

        Raises:
            DataError, ConfigError: as in `encode_query`.
            ModelError: a vector holds NaN or infinity.
        """
        texts = _as_list(texts, "document")
        dimensions, backbones = self._asked("document", habits, batch_size)
        with telling("documents", len(texts), progress, habits.get("show_progress_bar")) as progress:
            limits = batch_size, batch_tokens
            vectors, truncated = self._vectors(backbones, texts, "document", instruction, progress, *limits)
        self._warn_of(sum(truncated), len(truncated))
        given: Array = as_asked(shorten(vectors, dimensions), habits, self.device)
        return given

    def encode(
        self,
        texts: str | Sequence[str],
        prompt_name: str | None = None,
        *,
        mode: Mode = "direct",
        **options: Any,
    ) -> Array:
        """Encode as a model of sentence-transformers does, and as the export of this one (`search-r3 export`).

        Args:
            texts: a single string gives one vector, `D`, others a matrix.
            prompt_name: `query` or `document`; without it they are queries.
            mode: of queries. This never reasons by default, `encode_query` may.
            options: those of `encode_query` or `encode_document`.

        Raises:
            ConfigError: another name.
        """
        if prompt_name not in (None, "query", "document"):
            raise ConfigError(f"prompt_name={prompt_name!r}: expected 'query' or 'document'")
        if prompt_name is None and not self._warned:
            self._warned = True
            logger.warning("encode takes texts for queries; of documents say prompt_name='document'")
        if prompt_name == "document":
            result = self.encode_document(texts, **options)
        else:
            result = self.encode_query(texts, mode, **options)
        return result[0] if isinstance(texts, str) else result

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
        """Cosine similarity `Q x N` of what `encode_query` and `encode_document` returned.

        Raises:
            DataError: texts, or vectors of different sizes.
        """
        left, right = plain(queries), plain(documents)
        if left.shape[-1:] != right.shape[-1:]:
            sizes = f"{left.shape[-1:]} and {right.shape[-1:]}"
            raise DataError(f"vectors of sizes {sizes} cannot be compared; encode both with one model")
        result: Array = left @ right.T
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
        backbones: Sequence[Backbone] | None = None,
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
            backbones: copies of this model on other devices (`Backbone.on`), each of which takes a share.

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
        return in_parallel(
            backbones or [self.backbone], requests, lambda one, share: Decoder(one, batch_size).run(share, progress)
        )

    def _mode(self, mode: str | None) -> Mode:
        if mode is None:
            return self.backbone.settings.mode
        for known in MODES:
            if mode == known:
                return known
        raise DataError(f"unknown mode {mode!r}; expected 'direct' or 'reason'")

    def _vectors(
        self,
        backbones: Sequence[Backbone],
        texts: Sequence[str],
        kind: Kind,
        instruction: str | Sequence[str],
        progress: Progress | None,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
    ) -> tuple[Array, list[bool]]:
        self.backbone.prompt_encoder.check(texts, kind, instruction)
        instructions = [instruction] * len(texts) if isinstance(instruction, str) else instruction

        def work(one: Backbone, share: Sequence[tuple[str, str]]) -> list[tuple[list[EncodedPrompt], Array]]:
            return list(
                encode_stream(
                    *(one.document_side if kind == "document" else one, [text for text, _ in share], kind),
                    instruction=[ending for _, ending in share],
                    batch_size=batch_size,
                    batch_tokens=batch_tokens,
                    window=len(share),
                    progress=progress,
                )
            )

        blocks = in_parallel(backbones, list(zip(texts, instructions, strict=True)), work)
        truncated = [prompt.truncated for prompts, _ in blocks for prompt in prompts]
        return np.concatenate([vectors for _, vectors in blocks]), truncated

    def _asked(self, kind: str, habits: Habits, batch_size: int | None) -> tuple[int | None, list[Backbone]]:
        """The dimensions and the devices that are asked for, where everything that is asked for can be had."""
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: expected at least 1")
        check_habits(habits, kind, getattr(self, f"encode_{kind}"))
        dimensions = self.checked_dimensions(habits.get("truncate_dim")) or self.truncate_dim
        return dimensions, self.backbone.on(devices_of(habits, self.device))

    def _embeddings(
        self, rollouts: Sequence[Rollout], texts: Sequence[str], truncated: list[bool], dimensions: int | None
    ) -> QueryEmbeddings:
        vectors = torch.stack([rollout.vector for rollout in rollouts]).numpy()
        check_finite(vectors, texts, self.backbone.source)
        return QueryEmbeddings(
            shorten(vectors, dimensions),
            [rollout.reasoning for rollout in rollouts],
            [rollout.reasoning_tokens for rollout in rollouts],
            [rollout.forced for rollout in rollouts],
            truncated,
        )

    def _warn_of(self, truncated: int, count: int) -> None:
        if truncated:
            limit = self.backbone.settings.max_length
            logger.warning("%d of %d documents were cut to max_length=%d tokens", truncated, count, limit)


def _as_list(texts: str | Sequence[str], kind: str) -> list[str]:
    if isinstance(texts, Mapping | bytes) or not isinstance(texts, Iterable):
        raise DataError(f"the texts are of type {type(texts).__name__}; expected a list of strings")
    result = [texts] if isinstance(texts, str) else list(texts)
    if not result:
        raise DataError(f"no {kind} was given; give at least one text")
    return result
