"""The plain modes, which all others are made of: vectors at once, or from the states in which replies end.

Shapes: `N` texts, `D` vector size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from ...types import Array, Progress
from ..backbone import Backbone, in_parallel
from ..documents import check_finite, encode_stream
from ..embeddings import QueryEmbeddings, shorten
from ..engine.decoding import Decoder, DecodeRequest, Rollout
from ..loaded import LoadedModel
from ..prompts import EncodedPrompt, Kind
from .first import First, facts_of, first_of
from .latent import latent_budget


class PlainModes(LoadedModel):
    """What `SearchR3` is made of beside what it says about arguments."""

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
        latent: bool = False,
        first: First | Sequence[First] | None = None,
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
            latent: soft tokens take the place of a text; then nothing is sampled.
            first: what the first tokens may be, one for all or one per prompt; see `DecodeRequest`.

        Returns:
            One rollout per prompt, in the order of the prompts: ids, log-probabilities, masks and vectors.

        Raises:
            ModelError: a prompt and its budget do not fit into the model's context, or a logit is not finite.
        """
        if sampling_temperature > 0 and (seeds is None or len(seeds) != len(prompts)):
            raise ValueError("sampling needs one seed per prompt")
        budgets = self.backbone.settings.max_new_tokens if max_new_tokens is None else max_new_tokens
        budgets = [budgets] * len(prompts) if isinstance(budgets, int) else budgets
        firsts = [first] * len(prompts) if first is None or isinstance(first, str) else first
        requests = [
            DecodeRequest(
                *(prompt, budget, sampling_temperature, top_p),
                *(None if seeds is None else seeds[place], latent, firsts[place]),
            )
            for place, (prompt, budget) in enumerate(zip(prompts, budgets, strict=True))
        ]
        return in_parallel(
            backbones or [self.backbone], requests, lambda one, share: Decoder(one, batch_size).run(share, progress)
        )

    def _direct(
        self,
        backbones: Sequence[Backbone],
        texts: Sequence[str],
        instruction: str | Sequence[str],
        progress: Progress | None,
    ) -> QueryEmbeddings:
        """Queries encoded at once, with all dimensions."""
        vectors, truncated = self._vectors(backbones, texts, "direct", instruction, progress)
        return QueryEmbeddings(vectors, [""] * len(texts), [0] * len(texts), [False] * len(texts), truncated)

    def _reasoned(
        self,
        texts: Sequence[str],
        instruction: str | Sequence[str],
        dimensions: int | None,
        seeds: Sequence[int],
        decoding: dict[str, Any],
        mode: Literal["reason", "auto"] = "reason",
    ) -> QueryEmbeddings:
        """Queries encoded after reasoning, or (auto) as the model's first token says; see `rollouts` for `decoding`."""
        prompts = self.backbone.prompt_encoder.encode_batch(texts, mode, instruction)
        first = first_of(self.backbone, mode)
        rollouts = self.rollouts([prompt.ids for prompt in prompts], seeds=seeds, first=first, **decoding)
        return self._embeddings(rollouts, texts, [prompt.truncated for prompt in prompts], dimensions)

    def _latent(
        self,
        texts: Sequence[str],
        instruction: str | Sequence[str],
        dimensions: int | None,
        decoding: dict[str, Any],
    ) -> QueryEmbeddings:
        """Queries encoded after soft tokens; of `decoding` what is said about sampling changes nothing."""
        budget = latent_budget(self.backbone, decoding["max_new_tokens"])
        prompts = self.backbone.prompt_encoder.encode_batch(texts, "latent", instruction)
        how = {name: decoding[name] for name in ("batch_size", "backbones", "progress")}
        rollouts = self.rollouts([prompt.ids for prompt in prompts], max_new_tokens=budget, latent=True, **how)
        return self._embeddings(rollouts, texts, [prompt.truncated for prompt in prompts], dimensions)

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
            [rollout.thought for rollout in rollouts],
            [facts_of(rollout.writes) for rollout in rollouts],
        )
