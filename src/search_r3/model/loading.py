"""Load a causal LM with its tokenizer from a directory, a GGUF file or the hub; see to its embed token and settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from pydantic import ValidationError

from ..errors import ConfigError, MissingExtraError, ModelError
from ..extras import extra
from .backbone import SETTINGS_FILE, Backbone, EmbeddingSettings
from .checks import check_output_layer
from .precision import torch_device, torch_dtype
from .prompts import EMBED_TOKEN, PROMPT_SETS
from .source import ADAPTER_CONFIG, CONFIG, TOKENIZER, HubOptions, ModelFiles, check_whole, find_files

EmbedStart = Literal["mean", "end_of_turn"]
"""Where the row of an embed token that the model lacks starts."""
_OURS = (
    "trust_remote_code",
    "use_safetensors",
    "revision",
    "token",
    "cache_dir",
    "local_files_only",
    "gguf_file",
    "dtype",
)
"""What `model_kwargs` and `tokenizer_kwargs` cannot say."""


def load_backbone(
    source: str | Path,
    *,
    settings: EmbeddingSettings | None = None,
    prompts: str | None = None,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    embed_start: EmbedStart = "mean",
    model_kwargs: Mapping[str, Any] | None = None,
    tokenizer_kwargs: Mapping[str, Any] | None = None,
    **hub: Unpack[HubOptions],
) -> Backbone:
    """Load a causal LM from a directory, a GGUF file or the hub; add the embed token where the tokenizer lacks it.

    No code that a model brings is run, and no pickle is read.

    Args:
        source: a model directory, a directory of adapters (peft), a GGUF file, a hub id such as
            `Qwen/Qwen2.5-1.5B-Instruct` (of a GGUF file there `OWNER/NAME/FILE.gguf`), or `builtin`.
        settings: wording and limits; by default those saved with the model, else the `search-r3` set.
        prompts: the name of a prompt set, instead of theirs.
        max_length: longest prompt in tokens, instead of theirs.
        max_new_tokens: reasoning budget in tokens, instead of theirs.
        dtype: precision of the weights (`torch_dtype`); `auto` leaves quantised weights as they are.
        device: where the weights go; by default a GPU where there is one.
        embed_start: the row of an embed token that the model lacks: the mean of all rows, or the end of turn's.
        model_kwargs: more for transformers' `from_pretrained`: `device_map`, `quantization_config`, ...
        tokenizer_kwargs: more for that of the tokenizer.
        hub: see `HubOptions`.

    Raises:
        ModelError: files are missing or do not fit together; the message names the remedy.
        ConfigError: an unknown dtype or device, or an argument that `model_kwargs` cannot hold.
    """
    place = torch_device(device)
    more = _checked(model_kwargs, "model_kwargs"), _checked(tokenizer_kwargs, "tokenizer_kwargs")
    files = find_files(source, **hub)
    model, tokenizer = _load_parts(files, torch_dtype(dtype, place), dtype == "auto", *more)
    saved = _saved_settings(files.folder_of(SETTINGS_FILE), model, None)
    settings = settings or saved
    has_row = settings.embed_token in tokenizer.get_vocab()
    embed_token_id = _ensure_embed_token(model, tokenizer, settings.embed_token, embed_start)
    changes = _without_none(
        prompts=PROMPT_SETS[prompts] if prompts else None, max_length=max_length, max_new_tokens=max_new_tokens
    )
    settings = settings.model_copy(update=changes | {"trained": has_row and saved.trained})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if place.type == "cuda":
        # On Hopper and Blackwell torch prefers cuDNN's attention, which builds a plan for every new shape, some tenths
        # of a second each (torch 2.11). Here every decoding step and nearly every batch has a new one.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if not ("device_map" in more[0] or getattr(model, "quantization_method", None)):
        model.to(place)  # else the weights are where they belong
    backbone = Backbone(model.eval(), tokenizer, settings, embed_token_id, files.name, files)
    check_output_layer(backbone)
    return backbone


def _without_none(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _checked(more: Mapping[str, Any] | None, name: str) -> Mapping[str, Any]:
    """Arguments for transformers, without those that it may not get, or gets otherwise."""
    if refused := [key for key in _OURS if key in (more or {})]:
        raise ConfigError(
            f"{name} may not hold {refused[0]!r}: no code and no pickle is loaded, and where a model comes from and "
            "its dtype are arguments of their own"
        )
    return more or {}


def _load_parts(
    files: ModelFiles,
    dtype: torch.dtype,
    is_auto: bool,
    model_kwargs: Mapping[str, Any],
    tokenizer_kwargs: Mapping[str, Any],
) -> tuple[Any, Any]:
    """The causal LM and its tokenizer; adapters are put into their base, whose tables grow first where they need it."""
    whole = files.base or files
    if whole.gguf is not None:
        with extra("gguf"):  # transformers reads such files with them
            import_module("gguf")
            import_module("accelerate")
    if files.base is not None:
        with extra("train"):
            import_module("peft")  # transformers loads adapters with it
    of_tokenizer = files if files.has_tokenizer else whole
    tokenizer = _load_tokenizer(of_tokenizer, tokenizer_kwargs)
    model, missing = _load_model(whole, dtype, is_auto, model_kwargs)
    if files.base is not None:
        _check_row(files, of_tokenizer, tokenizer, tokenizer_kwargs)
        missing |= _put_in(files, model, len(tokenizer))
    if missing:
        raise ModelError(
            f"{files.name} lacks {len(missing)} weights of its architecture (first: {min(missing)}); wrong files?"
        )
    return model, tokenizer


def _load_tokenizer(files: ModelFiles, more: Mapping[str, Any]) -> Any:
    import transformers

    if not files.has_tokenizer:
        raise ModelError(f"{files.name} has no tokenizer (tokenizer.json is missing); copy it next to the weights")
    for path in filter(Path.is_file, (files.folder / name for name in TOKENIZER)):
        check_whole(path)
    with _one_line(f"cannot load a tokenizer from {files.name}"):
        # The configuration is read for the name: of some models of the hub transformers knows that theirs is wrong.
        config = {} if files.gguf or not (files.folder / CONFIG).is_file() else {"config": _config(files)}
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            files.folder, **more, **config, **_gguf(files), trust_remote_code=False
        )
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer of {files.name} is a slow one; a tokenizer.json (fast tokenizer) is needed")
    return tokenizer


def _config(files: ModelFiles) -> Any:
    import transformers

    files.json(CONFIG)
    config = transformers.AutoConfig.from_pretrained(files.folder, **_gguf(files), trust_remote_code=False)
    config.name_or_path = files.name
    return config


def _gguf(files: ModelFiles) -> dict[str, Any]:
    return {} if files.gguf is None else {"gguf_file": files.gguf}


def _unpacked(files: ModelFiles) -> dict[str, Any]:
    """Has a GGUF file's blocks become plain numbers; a model that computes in them could neither learn nor be saved."""
    import transformers

    has_choice = files.gguf is not None and hasattr(transformers, "GgufConfig")
    return {"quantization_config": transformers.GgufConfig(dequantize=True)} if has_choice else {}


def _load_model(files: ModelFiles, dtype: torch.dtype, is_auto: bool, more: Mapping[str, Any]) -> tuple[Any, set[str]]:
    """The causal LM, and the names of weights that its files lack."""
    import transformers

    with _one_line(f"cannot load a causal LM from {files.name}"):
        config = _config(files)
        is_quantised = "quantization_config" in more or getattr(config, "quantization_config", None) is not None
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            files.folder,
            config=config,
            dtype="auto" if is_auto and is_quantised else dtype,
            output_loading_info=True,
            **(_unpacked(files) | {**more}),
            **_gguf(files),
            trust_remote_code=False,
            use_safetensors=True,
        )
    # Adapters remember what they were put into, and to others a folder in a cache says nothing.
    model.name_or_path = model.config.name_or_path = files.name
    return model, set(report["missing_keys"])


def _check_row(files: ModelFiles, of_tokenizer: ModelFiles, tokenizer: Any, more: Mapping[str, Any]) -> None:
    """Refuse adapters whose tokenizer has an embed token that nobody trained: neither they nor their base."""
    assert files.base is not None
    embed_token = files.json(SETTINGS_FILE).get("embed_token", EMBED_TOKEN)
    config = files.json(ADAPTER_CONFIG)
    learned = [*(config.get("modules_to_save") or ()), *(config.get("target_modules") or ())]
    if config.get("trainable_token_indices") or {"embed_tokens", "wte", "embed_in"} & set(learned):
        return
    if embed_token in tokenizer.get_vocab() and of_tokenizer is files:
        if not files.base.has_tokenizer or embed_token not in _load_tokenizer(files.base, more).get_vocab():
            raise ModelError(
                f"the adapters in {files.name} hold no row of {embed_token}, and their base {files.base.name} has "
                "none: vectors would mean nothing; save them with trainable_token_indices, or save the merged model"
            )


def _put_in(files: ModelFiles, model: Any, rows: int) -> set[str]:
    """Put adapters into their base; the names of weights that their file lacks."""
    if model.get_input_embeddings().weight.shape[0] < rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    with _one_line(f"cannot put the adapters in {files.name} into {model.name_or_path}"):
        info = model.load_adapter(str(files.folder))
    # They write the embed token's row of tied tables once, and transformers misses it in the other.
    return {key for key in getattr(info, "missing_keys", ()) if "token_adapter" not in key}


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Make one `ModelError` of whatever transformers and the libraries beneath it raise about a model's files."""
    try:
        yield
    except (ModelError, MissingExtraError):
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{what}: it needs code of its own (auto_map in its settings), and no code of a model is run; take an "
                "architecture that transformers knows"
            ) from error
        if "ignore_mismatched_sizes" in str(error):
            raise ModelError(
                f"{what}: its weights have other shapes than its config.json says (listed above); the files are of two "
                "models, fetch or copy them again"
            ) from error
        raise ModelError(f"{what}: {_first_line(error)}") from error


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
    context = int(model.config.get_text_config().max_position_embeddings)
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
