"""Load a causal LM with its tokenizer from a directory, a GGUF file or the hub; see to its embed token and settings."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Unpack

import torch

from ..errors import ConfigError, ModelError
from ..extras import extra
from .backbone import Backbone, without_bars
from .checks import BaseFacts, check_backbone
from .engine.packed import pack, suits_packing
from .llamacpp.backbone import BACKEND, load_llamacpp
from .modes.auto import fitting_gate
from .precision import torch_device, torch_dtype
from .prompts import EMBED_TOKEN, PromptSet
from .reading.parts import load_causal_lm, load_tokenizer, one_line
from .settings import SETTINGS_FILE, EmbeddingSettings, choose_settings, with_frames
from .source import ADAPTER_CONFIG, HubOptions, ModelFiles, find_files
from .templates import ChatTemplate

Backend = Literal["torch", "llama.cpp"]
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
    prompts: str | PromptSet | None = None,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    backend: Backend = "torch",
    embed_start: EmbedStart = "mean",
    model_kwargs: Mapping[str, Any] | None = None,
    tokenizer_kwargs: Mapping[str, Any] | None = None,
    **hub: Unpack[HubOptions],
) -> Backbone:
    """Load a causal LM from a directory, a GGUF file or the hub; add the embed token where the tokenizer lacks it.

    Of a model whose documents a stage kept frozen this is what encodes queries, with `documents` beside it.

    No code that a model brings is run, and no pickle is read.

    Args:
        source: a model directory, a directory of adapters (peft), a GGUF file, a hub id such as
            `Qwen/Qwen2.5-1.5B-Instruct` (of a GGUF file there `OWNER/NAME/FILE.gguf`), or `builtin`.
        settings: wording and limits in place of all that are saved with the model; where none are saved, `search-r3`
            and limits that fit into the context.
        prompts: wording in place of the saved one: a name of `PROMPT_SETS`, or a `PromptSet`.
        max_length: in place of the saved limit.
        max_new_tokens: in place of the saved budget.
        dtype: precision of the weights (`torch_dtype`); `auto` leaves quantised weights as they are.
        device: where the weights go; by default a GPU where there is one.
        backend: what computes: torch, or llama.cpp, see `load_llamacpp`.
        embed_start: the row of an embed token that the model lacks: the mean of all rows, or the end of turn's.
        model_kwargs: more for transformers' `from_pretrained`: `device_map`, `quantization_config`, ...
        tokenizer_kwargs: more for that of the tokenizer.
        hub: see `HubOptions`.

    Raises:
        ModelError: files are missing or do not fit together; the message names the remedy.
        ConfigError: an unknown dtype or device, unknown prompts, limits that do not fit into the model's context, or an
            argument that `model_kwargs` cannot hold.
    """
    changes = {"prompts": prompts, "max_length": max_length, "max_new_tokens": max_new_tokens}
    if backend == BACKEND:
        return load_llamacpp(source, settings, changes, dtype, device, model_kwargs, tokenizer_kwargs, **hub)
    if backend != "torch":
        raise ConfigError(f"backend={backend!r}: expected 'torch' or {BACKEND!r}")
    place = torch_device(device)
    more = _checked(model_kwargs, "model_kwargs"), _checked(tokenizer_kwargs, "tokenizer_kwargs")
    files, precision = find_files(source, **hub), torch_dtype(dtype, place)
    saved = files.settings()
    with without_bars():
        model, tokenizer = _load_parts(files, precision, dtype == "auto", (settings or saved) is not None, *more)
        settings, embed_token_id = _settle(files, model, tokenizer, saved, settings, changes, embed_start)
        models = [model]
        if files.queries is not None:
            models.append(_query_model(files.queries, model, place, precision, dtype == "auto", more[0]))
    for one in models:
        _put_on(place, one, precision, more[0])
    return _as_one([Backbone(one.eval(), tokenizer, settings, embed_token_id, files.name, files) for one in models])


def _as_one(sides: Sequence[Backbone]) -> Backbone:
    """A loaded model of one side, or of documents and queries, after its checks."""
    files = sides[0].files
    assert files is not None
    for side in sides:
        check_backbone(side)
    if facts := BaseFacts.read(files):
        facts.check_vector(sides[0])
    asked = sides[0] if files.queries is None else replace(sides[1], documents=sides[0])
    return replace(asked, gate=fitting_gate(asked, files.folder))


def _put_on(place: torch.device, model: Any, dtype: torch.dtype, model_kwargs: Mapping[str, Any]) -> None:
    """Move the weights there; quantised ones, and those with a map, are where they belong."""
    if place.type == "cuda":
        # On Hopper and Blackwell torch prefers cuDNN's attention, which builds a plan for every new shape, some tenths
        # of a second each (torch 2.11). Here every decoding step and nearly every batch has a new one.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if _stays(model, model_kwargs):
        return
    model.to(place)
    if _packs(place, model, dtype, model_kwargs):
        pack(model)


def _stays(model: Any, model_kwargs: Mapping[str, Any]) -> bool:
    return "device_map" in model_kwargs or bool(getattr(model, "quantization_method", None))


def _packs(place: torch.device, model: Any, dtype: torch.dtype, model_kwargs: Mapping[str, Any]) -> bool:
    """Whether `pack` will have the model."""
    suits = place.type == "cpu" and dtype == torch.float16 and not _stays(model, model_kwargs)
    return suits and suits_packing(model)


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
    has_settings: bool,
    model_kwargs: Mapping[str, Any],
    tokenizer_kwargs: Mapping[str, Any],
) -> tuple[Any, Any]:
    """The causal LM and its tokenizer; adapters are put into their base, whose tables grow first where they need it."""
    whole = files.base or files
    if whole.gguf is not None:
        with extra("gguf"):  # transformers reads such files with them
            import_module("gguf")
            import_module("accelerate")
    if files.base is not None or (files.queries is not None and files.queries.base is not None):
        with extra("train"):
            import_module("peft")
    of_tokenizer = files if files.has_tokenizer else whole
    tokenizer = load_tokenizer(of_tokenizer, tokenizer_kwargs)
    if not has_settings:  # which may hold what the template wrote
        _ = ChatTemplate(tokenizer, None).source  # what has none is refused before its weights are read for minutes
    model, missing = load_causal_lm(whole, dtype, is_auto, model_kwargs)
    if files.base is not None:
        _check_row(files, of_tokenizer, tokenizer, tokenizer_kwargs)
        if facts := BaseFacts.read(files):
            facts.check(files, model, tokenizer, _embed_token(files))
        _name_row(files, tokenizer)
        model, lacking = _put_in(files, model, len(tokenizer))
        missing |= lacking
    _check_complete(files, missing)
    return model, tokenizer


def _query_model(
    files: ModelFiles,
    documents: Any,
    place: torch.device,
    dtype: torch.dtype,
    is_auto: bool,
    model_kwargs: Mapping[str, Any],
) -> Any:
    """What encodes queries: a model of its own, or adapters in one that shares the weights of the documents' model.

    Weights that will be packed cannot be shared; of those the adapters have a copy, and are merged into it.
    """
    if files.base is None:
        model, missing = load_causal_lm(files, dtype, is_auto, model_kwargs)
    elif hasattr(documents, "get_base_model"):
        raise ModelError(
            f"the adapters in {files.name} go into weights that hold those for documents, and into quantised weights "
            "none are merged; take the base as it is before it is quantised"
        )
    else:
        # Modules of its own, so that no adapter is ever on or off for the other side.
        merge = _packs(place, documents, dtype, model_kwargs)
        shared = {} if merge else {id(parameter): parameter for parameter in documents.parameters()}
        model, missing = _put_in(files, copy.deepcopy(documents, shared), 0, merge=merge)
    _check_complete(files, missing)
    return model


def _check_complete(files: ModelFiles, missing: set[str]) -> None:
    if missing:
        raise ModelError(
            f"{files.name} lacks {len(missing)} weights of its architecture (first: {min(missing)}); wrong files?"
        )


def _check_row(files: ModelFiles, of_tokenizer: ModelFiles, tokenizer: Any, more: Mapping[str, Any]) -> None:
    """Refuse adapters whose tokenizer has an embed token that nobody trained: neither they nor their base."""
    assert files.base is not None
    embed_token = _embed_token(files)
    config = files.json(ADAPTER_CONFIG)
    learned = [*(config.get("modules_to_save") or ()), *(config.get("target_modules") or ())]
    if config.get("trainable_token_indices") or {"embed_tokens", "wte", "embed_in"} & set(learned):
        return
    if embed_token in tokenizer.get_vocab() and of_tokenizer is files:
        if not files.base.has_tokenizer or embed_token not in load_tokenizer(files.base, more).get_vocab():
            raise ModelError(
                f"the adapters in {files.name} hold no row of {embed_token}, and their base {files.base.name} has "
                "none: vectors would mean nothing; save them with trainable_token_indices, or save the merged model"
            )


def _embed_token(files: ModelFiles) -> str:
    return str(files.json(SETTINGS_FILE).get("embed_token", EMBED_TOKEN))


def _name_row(files: ModelFiles, tokenizer: Any) -> None:
    """Give the embed token, whose row adapters bring, its id in a base's tokenizer that lacks it."""
    rows = files.json(ADAPTER_CONFIG).get("trainable_token_indices") or ()
    rows = [row for each in rows.values() for row in each] if isinstance(rows, dict) else [*rows]
    embed_token = _embed_token(files)
    if not rows or embed_token in tokenizer.get_vocab():
        return
    _add_token(tokenizer, embed_token)
    row = tokenizer.convert_tokens_to_ids(embed_token)
    if row not in rows:
        raise ModelError(
            f"the adapters in {files.name} hold the row {rows[0]} of a table, but {embed_token} gets the id {row} from "
            "the tokenizer of their base; put the tokenizer with which they were trained beside them"
        )


def _add_token(tokenizer: Any, token: str) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)


def _put_in(files: ModelFiles, model: Any, rows: int, merge: bool = True) -> tuple[Any, set[str]]:
    """The base with the adapters in its weights, and the names of weights that their file lacks.

    So it can be trained, saved and exported as any other. Into quantised weights they are not merged, which would lose
    them in the rounding, nor where other modules share the weights (`merge`).
    """
    with extra("train"):
        import peft

    if model.get_input_embeddings().weight.shape[0] < rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    with one_line(f"cannot put the adapters in {files.name} into {model.name_or_path}"):
        folder = str(files.folder)
        config = peft.PeftConfig.from_pretrained(folder)
        config.base_model_name_or_path = model.name_or_path  # which may be elsewhere, and is known to be the one
        tuned: Any = peft.get_peft_model(model, config)
        info = tuned.load_adapter(folder, "default")
        if merge and not getattr(model, "quantization_method", None):
            tuned = tuned.merge_and_unload().requires_grad_(True)  # peft froze what it was put into
            tuned.name_or_path = tuned.config.name_or_path = files.name  # what further adapters are put into
    return tuned, set(info.missing_keys)


def _settle(
    files: ModelFiles,
    model: Any,
    tokenizer: Any,
    saved: EmbeddingSettings | None,
    settings: EmbeddingSettings | None,
    overrides: Mapping[str, Any],
    start: EmbedStart,
) -> tuple[EmbeddingSettings, int]:
    """The settings with their frames, and the id of the embed token; that and the padding token are seen to."""
    settings = choose_settings(files.name, model.config, tokenizer, saved=saved, settings=settings, **overrides)
    trained = settings.embed_token in tokenizer.get_vocab() and (saved is None or saved.trained)
    eos = getattr(model.generation_config, "eos_token_id", None)  # one id, several or none
    eos_token_ids = {eos} if isinstance(eos, int) else set(eos or ())
    if settings.frames is not None:
        end_token_id = settings.frames.end_token_id
    else:
        end_token_id, _ = ChatTemplate(tokenizer, settings.template_arguments).end_tokens(eos_token_ids)
    embed_token_id = _ensure_embed_token(model, tokenizer, settings.embed_token, start, end_token_id)
    settings = with_frames(settings, tokenizer, embed_token_id, eos_token_ids, files.name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end_token_id)
    return settings.model_copy(update={"trained": trained}), embed_token_id


def _ensure_embed_token(model: Any, tokenizer: Any, embed_token: str, start: EmbedStart, end_token_id: int) -> int:
    """The id of the embed token, added where it is missing; the embedding table grows only if no spare row is left."""
    token_id = tokenizer.get_vocab().get(embed_token)
    if token_id is None:
        _add_token(tokenizer, embed_token)
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
            ends = [end_token_id] if start == "end_of_turn" else slice(count)
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
