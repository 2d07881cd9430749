"""Load a causal LM with its tokenizer from a directory or the hub, and see to its embed token and settings."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError

from ..errors import ModelError
from ..extras import extra
from .backbone import DTYPES, SETTINGS_FILE, Backbone, EmbeddingSettings, context_of
from .checks import check_backbone

EmbedStart = Literal["mean", "end_of_turn"]
"""Where the row of an embed token that the model lacks starts."""


def load_backbone(
    source: str | Path,
    *,
    settings: EmbeddingSettings | None = None,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    embed_start: EmbedStart = "mean",
) -> Backbone:
    """Load a causal LM from a directory or the hub; add the embed token where the tokenizer lacks it.

    Args:
        source: a model directory, a directory of adapters (peft), or a hub id such as `Qwen/Qwen2.5-1.5B-Instruct`.
        settings: wording and limits; by default those saved with the model, else the `search-r3` set.
        dtype: `float32`, `bfloat16` or `float16`.
        device: where the weights go.
        revision: branch, tag or commit on the hub.
        embed_start: the row of an embed token that the model lacks: the mean of all rows, or the end of turn's.

    Raises:
        ModelError: files are missing or do not fit together; the message names the remedy.
    """
    path = Path(source)
    if not path.is_dir() and (isinstance(source, Path) or source.startswith((".", "/")) or source.count("/") > 1):
        raise ModelError(f"no model directory at {source}; give a directory with config.json, or a hub id")
    if path.is_dir() and not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ModelError(f"{source} is no model directory: config.json is missing")
    tokenizer = _load_tokenizer(source, revision)
    model, report = _load_model(source, tokenizer, dtype, revision)
    # Adapters write the embed token's row of tied tables once, and transformers misses it in the other.
    absent = sorted(key for key in report["missing_keys"] if "token_adapter" not in key)
    if absent:
        raise ModelError(f"{source} lacks {len(absent)} weights of its architecture (first: {absent[0]}); wrong files?")
    embed_token = (settings or EmbeddingSettings()).embed_token
    if settings is None:
        settings = _saved_settings(source, model, revision)
        embed_token = settings.embed_token
    embed_token_id = _ensure_embed_token(model, tokenizer, embed_token, embed_start)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if torch.device(device).type == "cuda":
        # On Hopper and Blackwell torch prefers cuDNN's attention, which builds a plan for every new shape, some tenths
        # of a second each (torch 2.11). Here every decoding step and nearly every batch has a new one.
        torch.backends.cuda.enable_cudnn_sdp(False)
    model.to(device).eval()
    backbone = Backbone(model, tokenizer, settings, embed_token_id, str(source))
    check_backbone(backbone)
    return backbone


def _load_tokenizer(source: str | Path, revision: str | None) -> Any:
    import transformers

    path = Path(source)
    if path.is_dir() and not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ModelError(f"{source} has no tokenizer (tokenizer.json is missing); copy it next to the weights")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"cannot load a tokenizer from {source}: {_first_line(error)}") from error
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer of {source} is a slow one; a tokenizer.json (fast tokenizer) is needed")
    return tokenizer


def _load_model(source: str | Path, tokenizer: Any, dtype: str, revision: str | None) -> tuple[Any, dict[str, Any]]:
    """The causal LM and transformers' report; the tables of a base grow first where adapters need it."""
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    try:
        if (base := _base_without_the_row(Path(source), tokenizer)) is not None:
            model, report = load(base, dtype=DTYPES[dtype], output_loading_info=True)
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            model.load_adapter(str(source))
        else:
            model, report = load(source, dtype=DTYPES[dtype], revision=revision, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load a causal LM from {source}: {_first_line(error)}") from error
    return model, report


def _base_without_the_row(path: Path, tokenizer: Any) -> str | None:
    """The base of a directory of adapters where its tables lack the rows of their tokenizer's new tokens, else None."""
    import transformers

    if not (path / "adapter_config.json").is_file():
        return None
    with extra("train"):
        import_module("peft")  # transformers loads adapters with it
    base = str(json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"])
    vocabulary = transformers.AutoConfig.from_pretrained(base).get_text_config().vocab_size
    return base if vocabulary < len(tokenizer) else None


def _saved_settings(source: str | Path, model: Any, revision: str | None) -> EmbeddingSettings:
    """The settings next to the weights; without them the defaults, cut to the model's context."""
    from transformers.utils import cached_file

    try:
        file = cached_file(str(source), SETTINGS_FILE, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError:
        file = None
    if file is not None:
        try:
            return EmbeddingSettings.model_validate(json.loads(Path(file).read_text(encoding="utf-8")))
        except (ValidationError, json.JSONDecodeError) as error:
            raise ModelError(f"{file}: not usable as model settings: {_first_line(error)}") from error
    context = context_of(model.config)
    return EmbeddingSettings(max_length=min(1024, context), max_new_tokens=max(1, min(512, context // 2)))


def _ensure_embed_token(model: Any, tokenizer: Any, embed_token: str, start: EmbedStart) -> int:
    """The id of the embed token, added where it is missing; the embedding table grows only if no spare row is left."""
    token_id = tokenizer.get_vocab().get(embed_token)
    if token_id is None:
        if start == "end_of_turn" and tokenizer.eos_token_id is None:
            raise ModelError(
                "embed_start=end_of_turn, but the tokenizer names no end (eos_token); set embed_start=mean"
            )
        tokenizer.add_special_tokens({"additional_special_tokens": [embed_token]}, replace_extra_special_tokens=False)
        token_id = tokenizer.convert_tokens_to_ids(embed_token)
        tables = [model.get_input_embeddings(), model.get_output_embeddings()]
        rows = tables[0].weight.shape[0]
        count = len(tokenizer) - 1
        if len(tokenizer) > rows:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            tables = [model.get_input_embeddings(), model.get_output_embeddings()]
        with torch.no_grad():
            # A spare row was never trained (or does not exist yet): the mean of the rows in use is a neutral start,
            # the same at every load. Tied tables are one tensor, so the second write repeats the first.
            ends = [tokenizer.eos_token_id] if start == "end_of_turn" else slice(count)
            rows_of_start = [table.weight[ends].float().mean(0) for table in tables]
            for table, row in zip(tables, rows_of_start, strict=True):
                table.weight[token_id] = row.to(table.weight.dtype)
    if len(tokenizer.encode(embed_token, add_special_tokens=False)) != 1:
        raise ModelError(f"{embed_token} is in the vocabulary but not as one special token; mend tokenizer.json")
    if token_id >= model.get_input_embeddings().weight.shape[0]:
        raise ModelError(
            f"{embed_token} has id {token_id}, outside the model's embedding table; tokenizer and weights differ"
        )
    return int(token_id)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
