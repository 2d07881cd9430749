"""LoRA adapters (peft) around a backbone: put in, written by themselves, merged."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import LoRASettings
from ..errors import ConfigError
from ..extras import extra
from ..files import atomic_directory, atomic_file, write_json
from .backbone import Backbone
from .loading import load_backbone
from .source import ADAPTER_CONFIG


def add_adapters(backbone: Backbone, settings: LoRASettings) -> None:
    """Put LoRA adapters into the model (peft); from then on only they learn.

    Raises:
        MissingExtraError: peft is not installed.
        ConfigError: the model has no layers of these names.
    """
    with extra("train"):
        import peft

    # The embed token's row is new in most models: it learns, and is saved with the adapters, in the output table too.
    lm = backbone.causal_lm
    tables = ["embed_tokens"] if lm.config.get_text_config().tie_word_embeddings else ["embed_tokens", "lm_head"]
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=list(settings.target_modules),
        trainable_token_indices={table: [backbone.embed_token_id] for table in tables},
        task_type="CAUSAL_LM",
        revision=None if backbone.files is None else backbone.files.commit,
    )
    try:
        backbone.model = peft.get_peft_model(backbone.model, config)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules={list(settings.target_modules)}: {error}") from error


def choose_what_learns(backbone: Backbone, settings: LoRASettings) -> None:
    """Put adapters in where the settings ask for them; a query side of its own learns on as it is.

    Raises:
        MissingExtraError: peft is not installed.
        ConfigError: the settings do not fit the model.
    """
    if backbone.documents is not None:
        _continue(backbone, settings)
    elif settings.rank:
        add_adapters(backbone, settings)


def _continue(backbone: Backbone, settings: LoRASettings) -> None:
    configs = getattr(backbone.model, "peft_config", None)
    rank = alpha = 0
    layers: set[str] = set()
    if configs is not None:
        rank, alpha = configs["default"].r, configs["default"].lora_alpha
        layers = set(configs["default"].target_modules)
    if settings.rank != rank or (rank and settings.alpha != alpha):
        has = f"adapters; set lora={{rank: {rank}, alpha: {alpha}}}" if rank else "whole weights; set lora.rank=0"
        raise ConfigError(
            f"lora.rank={settings.rank}, lora.alpha={settings.alpha}, but queries of {backbone.source} have {has}"
        )
    if rank and set(settings.target_modules) != layers:
        raise ConfigError(
            f"lora.target_modules={list(settings.target_modules)}, but the adapters for queries of {backbone.source} "
            f"are in others; set lora.target_modules={sorted(layers)}"
        )
    for name, parameter in backbone.model.named_parameters():
        parameter.requires_grad_(rank == 0 or "lora_" in name or "trainable_tokens" in name)


def save_adapters(backbone: Backbone, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write adapters and tokenizer as peft and transformers load them; an existing folder is replaced."""
    with atomic_directory(folder) as out:
        backbone.model.save_pretrained(out, state_dict=state, save_embedding_layers=False)
        backbone.save_companions(out)


def drop_token_rows(folder: Path) -> None:
    """Take the embed token's rows out of adapters that `save_adapters` wrote; servers refuse such rows."""
    from safetensors.torch import load_file, save_file

    path, config = folder / "adapter_model.safetensors", folder / ADAPTER_CONFIG
    state = load_file(path)
    with atomic_file(path) as out:
        save_file({name: one for name, one in state.items() if "token_adapter" not in name}, out, {"format": "pt"})
    write_json(config, json.loads(config.read_text(encoding="utf-8")) | {"trainable_token_indices": None})


def merged_queries(backbone: Backbone) -> Backbone:
    """What encodes queries with its adapters, where it has any, merged into a copy of the weights."""
    if backbone.documents is None or not hasattr(backbone.model, "peft_config"):
        return backbone
    return replace(backbone, model=copy.deepcopy(backbone.model).merge_and_unload())


def merge_adapters(backbone: Backbone, folder: Path, dtype: str) -> Backbone:
    """The model that the adapters in `folder` were put into, what encodes documents, loaded anew, with them in it."""
    with extra("train"):
        import peft

    commit = None if backbone.files is None else backbone.files.commit
    base = load_backbone(backbone.source, settings=backbone.settings, dtype=dtype, device="cpu", revision=commit)
    base = base.document_side
    tuned: Any = peft.PeftModel.from_pretrained(base.model, str(folder))
    return replace(base, model=tuned.merge_and_unload(), settings=backbone.settings, gate=backbone.gate)
