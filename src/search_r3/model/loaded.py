"""A model in memory: how it is loaded, where it is, and that it can be let go."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import torch

from ..errors import ConfigError, ModelError
from .backbone import Backbone
from .loading import Backend, load_backbone
from .prompts import PromptSet
from .settings import EmbeddingSettings

logger = logging.getLogger(__name__)

_ELSEWHERE = {
    **dict.fromkeys(("get_sentence_embedding_dimension", "get_embedding_dimension"), "it is .dimension"),
    "max_seq_length": "it is .backbone.settings.max_length, and the argument max_length",
    **dict.fromkeys(("tokenizer", "tokenize"), "it is .backbone.tokenizer; .backbone.prompt_encoder makes the prompts"),
    **dict.fromkeys(("encode_queries", "embed_query"), "call encode_query"),
    **dict.fromkeys(("encode_documents", "encode_corpus", "embed_documents"), "call encode_document"),
    **dict.fromkeys(
        ("start_multi_process_pool", "encode_multi_process"),
        "call encode_query or encode_document with a list of devices",
    ),
    **dict.fromkeys(("to", "cuda", "cpu", "half", "float"), "give device=... and dtype=... when it is loaded"),
    "search": "see search_r3.evaluation.search.Searcher",
    "save": "call save_pretrained, or export_sentence_transformers",
    "push_to_hub": "there is the command search-r3 push",
    **dict.fromkeys(("fit", "train"), "call search_r3.train_sft, or search-r3 fit"),
}
"""What other libraries call things, and what they are here."""


class LoadedModel:
    """What `SearchR3` is beside an encoder; its arguments are described there.

    Example:
        >>> with LoadedModel("builtin", device="cpu") as model:
        ...     model.dimension
        192
    """

    def __init__(
        self,
        model: str | Path | Backbone,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        backend: Backend = "torch",
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
        trust_remote_code: bool = False,
    ) -> None:
        if trust_remote_code:
            raise ConfigError("no code that a model brings is run; leave trust_remote_code out")
        if isinstance(model, Backbone):
            if any(one is not None for one in (settings, prompts, max_length, max_new_tokens)):
                raise ConfigError("a Backbone has its settings already; give them to load_backbone")
            self._backbone: Backbone | None = model
        else:
            self._backbone = load_backbone(
                model,
                settings=settings,
                prompts=prompts,
                max_length=max_length,
                max_new_tokens=max_new_tokens,
                dtype=dtype,
                device=device,
                backend=backend,
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
        self.truncate_dim = self.checked_dimensions(truncate_dim)

    @property
    def backbone(self) -> Backbone:
        """The model itself.

        Raises:
            ModelError: it was closed.
        """
        if self._backbone is None:
            raise ModelError("this model was closed; load it again")
        return self._backbone

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.backbone.device

    def close(self) -> None:
        """Let the weights go, and the memory of their device; what else holds the backbone keeps it."""
        device = None if self._backbone is None else self.device
        self._backbone = None
        gc.collect()
        if device is not None and device.type in ("cuda", "mps"):
            getattr(torch, device.type).empty_cache()

    if not TYPE_CHECKING:  # else every name would be one of this class

        def __getattr__(self, name: str) -> Any:
            hint = f"; {_ELSEWHERE[name]}" if name in _ELSEWHERE else ""
            raise AttributeError(f"{type(self).__name__} has no {name!r}{hint}", name=name, obj=self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def dimension(self) -> int:
        """`D`, the size of a vector."""
        return self.truncate_dim or self.backbone.dimension

    def checked_dimensions(self, dimensions: int | None) -> int | None:
        """So many dimensions of a vector, where it has them.

        Raises:
            ModelError: it has fewer.
        """
        if dimensions is not None and not 0 < dimensions <= self.backbone.dimension:
            raise ModelError(
                f"truncate_dim={dimensions}, but the vectors of {self.backbone.source} have "
                f"{self.backbone.dimension} dimensions; give as many or fewer"
            )
        return dimensions

    def save_pretrained(
        self, folder: str | Path, *, dtype: Literal["float32", "float16", "bfloat16"] | None = None
    ) -> None:
        """Write weights, tokenizer, prompt set and embedding settings to a directory that `SearchR3` loads.

        Raises:
            ConfigError: the directory holds something else than a model.
        """
        self.backbone.save(folder, dtype)
