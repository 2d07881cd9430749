"""`SearchR3`: texts in, vectors out. Training, evaluation and search all encode through this class."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Unpack

import numpy as np

from ..errors import ConfigError, DataError
from ..types import Array, Progress
from .backbone import Backbone
from .documents import WINDOW, encode_stream
from .embeddings import Habits, QueryEmbeddings, as_asked, as_list, check_habits, devices_of, plain, shorten, telling
from .engine.decoding import Decoder, DecodeRequest
from .modes.auto import TopScores, choose, gate_of, merged
from .modes.first import check_price, decides, first_of
from .modes.latent import latent_budget
from .modes.plain import PlainModes
from .prompts import MODES, Mode

logger = logging.getLogger(__name__)


class SearchR3(PlainModes):
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
        top_scores: TopScores | None = None,
        price: float | None = None,
        progress: Progress | None = None,
        **habits: Unpack[Habits],
    ) -> QueryEmbeddings:
        """Encode queries after reasoning (`reason`, `latent`), at once (`direct`), or as gate or model says (`auto`).

        Args:
            texts: queries; a single string counts as one.
            mode: of `MODES`; by default the model's own, which is `reason` where `search_r3.json` names none.
            instruction: what is looked for, e.g. `Find a passage that answers this question.`; it follows the text, as
                in training. One for all, or one per query; an empty one is none.
            batch_size: queries reasoned about at once; it changes vectors by rounding, which can tip a near tie between
                tokens (rarely in float32).
            max_new_tokens: reasoning budget, the embed token included; by default the model's own.
            sampling_temperature: 0 reasons greedily.
            top_p: sample among the likeliest tokens that together reach this probability.
            seed: query `i` samples with seed `seed + i`.
            top_scores: in mode auto the scores of the 10 best documents for direct vectors, best first, which the gate
                then reads, too (`VectorIndex.top_scores`).
            price: in mode auto what a token must earn, in place of the price that the gate was fitted with.
            progress: called with the numbers of queries done, and of tokens (written, or in direct mode read).
            habits: `show_progress_bar`, `convert_to_tensor` and other arguments of sentence-transformers, see `Habits`.

        Raises:
            DataError: no texts, an empty one (its place is named), another number of instructions than of texts, or an
                instruction that leaves no room for its text.
            ModelError: a vector holds NaN or infinity; or mode auto, and the model has no gate, or mode latent, and it
                was not trained for that.
            ConfigError: an argument of sentence-transformers that asks for what cannot be had.
        """
        mode = self._mode(mode)
        texts = as_list(texts, "query")
        dimensions, backbones = self._asked("query", habits, batch_size)
        decoding: dict[str, Any]
        decoding = {"max_new_tokens": max_new_tokens, "sampling_temperature": sampling_temperature, "top_p": top_p}
        seeds = range(seed, seed + len(texts))
        with telling("queries", len(texts), progress, habits.get("show_progress_bar")) as progress:
            decoding |= {"batch_size": batch_size, "backbones": backbones, "progress": progress}
            if mode == "reason":
                result = self._reasoned(texts, instruction, dimensions, seeds, decoding)
            elif mode == "direct":
                result = self._direct(backbones, texts, instruction, progress).shortened(dimensions)
            elif mode == "latent":
                result = self._latent(texts, instruction, dimensions, decoding)
            else:
                result = self._auto(texts, instruction, dimensions, seeds, decoding, top_scores, price)
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
        top_scores: TopScores | None = None,
        price: float | None = None,
    ) -> Iterator[str | QueryEmbeddings]:
        """Encode one query and show the reasoning while it is written; arguments as in `encode_query`.

        Yields:
            Pieces of the reasoning as the model writes them, then the same `QueryEmbeddings` as `encode_query` returns.
            Closing the iterator stops the model.

        Raises:
            DataError: the query is empty, or the instruction leaves no room for it.
        """
        mode, choice = self._mode(mode), None
        encoder, texts = self.backbone.prompt_encoder, as_list(text, "query")
        if mode == "latent":
            yield self.encode_query(texts, mode, instruction=instruction, max_new_tokens=max_new_tokens)
            return
        if mode == "auto" and decides(self.backbone):
            check_price(self.backbone, price)
        elif mode != "reason":
            direct = self._direct([self.backbone], texts, instruction, None)
            choice = None
            if mode == "auto":
                choice = choose(self.backbone, direct.vectors, self.truncate_dim, top_scores, price)
            direct = direct.shortened(self.truncate_dim)
            if choice is None or not choice.thinks[0]:
                yield direct if choice is None else merged(direct, None, choice)
                return
        [prompt] = encoder.encode_batch(texts, "reason", instruction)
        budget = self.backbone.settings.max_new_tokens if max_new_tokens is None else max_new_tokens
        decoder, first = Decoder(self.backbone, slots=1), first_of(self.backbone, mode)
        ticket = decoder.submit(DecodeRequest(prompt.ids, budget, sampling_temperature, top_p, seed, first=first))
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
        result = result if choice is None else merged(direct, result, choice)
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
        texts = as_list(texts, "document")
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

    def _mode(self, mode: str | None) -> Mode:
        mode = self.backbone.settings.mode if mode is None else mode
        for known in MODES:
            if mode == known:
                if known == "auto" and not decides(self.backbone):
                    gate_of(self.backbone)
                if known == "latent":
                    latent_budget(self.backbone)
                return known
        raise DataError(f"unknown mode {mode!r}; expected one of {', '.join(MODES)}")

    def _auto(
        self,
        texts: Sequence[str],
        instruction: str | Sequence[str],
        dimensions: int | None,
        seeds: Sequence[int],
        decoding: dict[str, Any],
        top_scores: TopScores | None,
        price: float | None,
    ) -> QueryEmbeddings:
        """All queries at once, and after reasoning those of which the gate says that it pays; or as the model says."""
        if decides(self.backbone):
            check_price(self.backbone, price)
            return self._reasoned(texts, instruction, dimensions, seeds, decoding, "auto")
        direct = self._direct(decoding["backbones"], texts, instruction, None)
        choice = choose(self.backbone, direct.vectors, dimensions, top_scores, price)
        places, progress = np.flatnonzero(choice.thinks).tolist(), decoding["progress"]
        if progress is not None and len(places) < len(texts):
            progress(len(texts) - len(places), 0)
        reasoned = None
        if places:
            endings = instruction if isinstance(instruction, str) else [instruction[place] for place in places]
            thinkers = [texts[place] for place in places], endings, dimensions, [seeds[place] for place in places]
            reasoned = self._reasoned(*thinkers, decoding)
        return merged(direct.shortened(dimensions), reasoned, choice)

    def _asked(self, kind: str, habits: Habits, batch_size: int | None) -> tuple[int | None, list[Backbone]]:
        """The dimensions and the devices that are asked for, where everything that is asked for can be had."""
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: expected at least 1")
        check_habits(habits, kind, getattr(self, f"encode_{kind}"))
        dimensions = self.checked_dimensions(habits.get("truncate_dim")) or self.truncate_dim
        return dimensions, self.backbone.on(devices_of(habits, self.device))

    def _warn_of(self, truncated: int, count: int) -> None:
        if truncated:
            limit = self.backbone.settings.max_length
            logger.warning("%d of %d documents were cut to max_length=%d tokens", truncated, count, limit)
