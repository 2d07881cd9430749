"""A model that llama.cpp computes, in the place of one that torch does: how it is loaded, and what it cannot do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from ...errors import ConfigError, ModelError
from ..backbone import Backbone
from ..precision import torch_device
from ..settings import EmbeddingSettings, choose_settings, with_frames
from ..source import HubOptions, ModelFiles, find_files
from .metadata import check_one_file, settings_in, tokenizer_in
from .runtime import Cache, LlamaModel

BACKEND: Literal["llama.cpp"] = "llama.cpp"
PARALLEL = 4
"""Queries reasoned about at once where nothing is said: one thread gains little by more, and each takes memory."""
_OPTIONS = ("n_threads", "n_parallel", "n_gpu_layers")
"""What `model_kwargs` can say."""


@dataclass
class LlamaCppBackbone(Backbone):
    """See `Backbone`. `model` is llama.cpp's, and `cache` its context; there are no weights to learn, copy or save.

    Attributes:
        cache: keys and values of all sequences in work.
        parallel: how many queries are reasoned about at once.
    """

    cache: Cache = None  # type: ignore[assignment]  # it is always given; fields without defaults cannot follow others
    parallel: int = PARALLEL

    @property
    def causal_lm(self) -> Any:
        """Nothing that learns.

        Raises:
            ModelError: always.
        """
        raise self._refusal()

    @property
    def device(self) -> torch.device:
        """Where its states come to; llama.cpp itself may compute elsewhere."""
        return torch.device("cpu")

    @property
    def dtype(self) -> str:
        """How the file stores weights, and who computes, e.g. `q8_0-llama.cpp`."""
        return f"{self.model.type}-{BACKEND}"

    @property
    def dimension(self) -> int:
        """See `Backbone`."""
        return int(self.model.dimension)

    @property
    def context_length(self) -> int:
        """See `Backbone`."""
        return int(self.model.context_length)

    @property
    def most_rows(self) -> int:
        """See `Backbone`."""
        return self.parallel

    def logits(self, hidden: Tensor, *, adapters: bool = True) -> Tensor:
        """See `Backbone`; they stand in the states already."""
        return hidden[..., self.dimension :]

    def vectors(self, states: Tensor) -> Tensor:
        """See `Backbone`."""
        return super().vectors(states[..., : self.dimension])

    def embed(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """See `Backbone`; without gradients."""
        from .engine import LlamaCppEngine

        return self.vectors(LlamaCppEngine(self).encode(sequences))

    def on(self, devices: Sequence[torch.device]) -> list[Backbone]:
        """See `Backbone`; there are no copies.

        Raises:
            ConfigError: another device than the own is asked for.
        """
        if any(device.type != "cpu" for device in devices) or len(devices) > 1:
            raise ConfigError("llama.cpp computes where it was loaded (device=...); leave device out of this call")
        return [self]

    def hidden_states(self, ids: Tensor | None, mask: Tensor | None, inputs: Tensor | None = None) -> Tensor:
        """See `causal_lm`."""
        raise self._refusal()

    def frozen_copy(self, dtype: str | None = None) -> Backbone:
        """See `causal_lm`."""
        raise self._refusal()

    def save(self, folder: str | Path, dtype: str | None = None, *, state: Mapping[str, Tensor] | None = None) -> None:
        """See `causal_lm`."""
        raise self._refusal()

    def _refusal(self) -> ModelError:
        return ModelError(
            f"{self.source} is computed by llama.cpp, which only encodes: to train, save, export or inspect a model, "
            "load it without backend='llama.cpp'"
        )


def load_llamacpp(
    source: str | Path,
    settings: EmbeddingSettings | None,
    changes: Mapping[str, Any],
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    model_kwargs: Mapping[str, Any] | None,
    tokenizer_kwargs: Mapping[str, Any] | None,
    **hub: Unpack[HubOptions],
) -> LlamaCppBackbone:
    """Load a GGUF file that `export_gguf` wrote into llama.cpp; the rest is as of `load_backbone`.

    Args:
        source: a GGUF file, or `OWNER/NAME/FILE.gguf` on the hub.
        settings: in place of all that are saved.
        changes: `prompts`, `max_length` and `max_new_tokens` in place of saved ones, where they are not None.
        dtype: `auto`; the file has its own.
        device: `cpu` (also without one), or another for all layers on the GPU that llama.cpp was built for.
        model_kwargs: `n_threads` (by default torch's number), `n_parallel` (queries reasoned about at once, 4),
            `n_gpu_layers`.
        tokenizer_kwargs: more for the tokenizer.
        hub: see `HubOptions`.

    Raises:
        ModelError: there is no such file, or it is not one that `search-r3 export --gguf` wrote.
        ConfigError: an argument that llama.cpp has no use for, or limits that do not fit into the model's context.
        MissingExtraError: llama.cpp is not installed.
    """
    files = find_files(source, **hub)
    if files.gguf is None:
        raise ModelError(
            f"llama.cpp reads GGUF files, and {source} is none; write one: search-r3 export {source} model.gguf --gguf"
        )
    if dtype != "auto":
        raise ConfigError(f"dtype={dtype}: a GGUF file has its own; leave it out, or export with another --type")
    options = dict(model_kwargs or {})
    if unknown := [name for name in options if name not in _OPTIONS]:
        raise ConfigError(f"model_kwargs for llama.cpp may hold {', '.join(_OPTIONS)}, not {unknown[0]!r}")
    if device is not None and torch_device(device).type != "cpu":
        options.setdefault("n_gpu_layers", -1)
    loaded = _load_side(files, settings, changes, options, tokenizer_kwargs or {})
    if files.queries is None:
        check_one_file(loaded.settings, files.gguf, files.name)
        return loaded
    queries = _load_side(files.queries, settings, changes, options, tokenizer_kwargs or {})
    queries.documents = loaded
    queries.files = files
    return queries


def _load_side(
    files: ModelFiles,
    settings: EmbeddingSettings | None,
    changes: Mapping[str, Any],
    options: Mapping[str, Any],
    tokenizer_kwargs: Mapping[str, Any],
) -> LlamaCppBackbone:
    from transformers import PretrainedConfig

    assert files.gguf is not None
    model = LlamaModel(files.folder / files.gguf, files.name, options.get("n_gpu_layers", 0))
    saved, tokenizer = settings_in(model.value, files.name), tokenizer_in(model.value, **tokenizer_kwargs)
    if saved is None or saved.frames is None or tokenizer is None:
        raise ModelError(
            f"{files.name} does not say how it embeds: it is no file that `search-r3 export MODEL OUT --gguf` wrote; "
            "write one of a model that stage 1 has trained"
        )
    config = PretrainedConfig(max_position_embeddings=model.context_length)
    settings = choose_settings(files.name, config, tokenizer, saved=saved, settings=settings, **changes)
    embed_token_id = tokenizer.convert_tokens_to_ids(settings.embed_token)
    if embed_token_id is None or embed_token_id >= model.rows:
        raise ModelError(f"{files.name} has no token {settings.embed_token}; leave it out of the settings given")
    settings = with_frames(settings, tokenizer, embed_token_id, set(saved.frames.end_token_ids), files.name)
    mode = "reason" if settings.mode == "latent" else settings.mode  # soft tokens are for torch
    settings = settings.model_copy(update={"trained": saved.trained, "mode": mode})
    parallel = options.get("n_parallel", PARALLEL)
    cache = Cache(
        model,
        parallel=parallel,
        longest=min(settings.max_length + settings.max_new_tokens, model.context_length),
        prompt=settings.max_length,
        threads=options.get("n_threads", torch.get_num_threads()),
    )
    return LlamaCppBackbone(
        model, tokenizer, settings, embed_token_id, files.name, files, BACKEND, cache=cache, parallel=parallel
    )
