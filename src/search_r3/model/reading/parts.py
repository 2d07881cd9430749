"""A tokenizer and a causal LM as transformers reads them, and one line about whatever it raises."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...errors import MissingExtraError, ModelError
from ..llamacpp.metadata import mend_config, tokenizer_in
from ..source import CONFIG, TOKENIZER, ModelFiles, check_whole
from .unpacked import Unpacked

_OF_SAVING = ("_name_or_path", "architectures", "dtype", "transformers_version")


def load_tokenizer(files: ModelFiles, more: Mapping[str, Any]) -> Any:
    """The tokenizer among the files.

    Args:
        files: of the model.
        more: for transformers' `from_pretrained`.

    Raises:
        ModelError: there is none, or it is a slow one or damaged.
    """
    import transformers

    if not files.has_tokenizer:
        raise ModelError(f"{files.name} has no tokenizer (tokenizer.json is missing); copy it next to the weights")
    for path in filter(Path.is_file, (files.folder / name for name in TOKENIZER)):
        check_whole(path)
    unpacked = Unpacked(files.digest, "tokenizer") if files.gguf is not None and not more else None
    with one_line(f"cannot load a tokenizer from {files.name}"):
        if (whole := tokenizer_in(files.metadata, **more)) is not None:
            return whole
        kept = transformers.PreTrainedTokenizerFast.from_pretrained
        if unpacked is not None and (whole := unpacked.read(kept)) is not None:
            return whole
        # The configuration is read for the name: of some models of the hub transformers knows that theirs is wrong.
        config = {} if files.gguf or not (files.folder / CONFIG).is_file() else {"config": _config(files)}
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            files.folder, **more, **config, **_gguf(files), trust_remote_code=False
        )
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer of {files.name} is a slow one; a tokenizer.json (fast tokenizer) is needed")
    if unpacked is not None:
        unpacked.keep(files.folder / str(files.gguf), lambda out: _write_tokenizer(tokenizer, out))
    return tokenizer


def load_causal_lm(
    files: ModelFiles, dtype: torch.dtype, is_auto: bool, more: Mapping[str, Any]
) -> tuple[Any, set[str]]:
    """The causal LM, and the names of weights that its files lack.

    Args:
        files: of the model.
        dtype: precision of the weights.
        is_auto: leave quantised weights as they are.
        more: for transformers' `from_pretrained`.

    Raises:
        ModelError: it cannot be loaded.
    """
    if files.gguf is None or more:
        model, missing = _read_causal_lm(files, dtype, is_auto, more)
    else:
        unpacked = Unpacked(files.digest, str(dtype).removeprefix("torch."))
        kept = unpacked.read(
            lambda folder: _read_causal_lm(replace(files, folder=folder, gguf=None), dtype, is_auto, more)
        )
        model, missing = kept or _read_causal_lm(files, dtype, is_auto, more)
        if kept is not None:
            _align(model)
        elif not missing:
            size = sum(one.nbytes for one in model.parameters())
            unpacked.keep(files.folder / files.gguf, lambda out: _write_model(model, out), size)
    # Adapters remember what they were put into, and to others a folder in a cache says nothing.
    model.name_or_path = model.config.name_or_path = files.name
    return model, missing


def _read_causal_lm(
    files: ModelFiles, dtype: torch.dtype, is_auto: bool, more: Mapping[str, Any]
) -> tuple[Any, set[str]]:
    import transformers

    with one_line(f"cannot load a causal LM from {files.name}"):
        config = _config(files)
        is_quantised = "quantization_config" in more or getattr(config, "quantization_config", None) is not None
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            files.folder,
            config=config,
            dtype="auto" if is_auto and is_quantised else dtype,
            output_loading_info=True,
            **(_plain(files) | {**more}),
            **_gguf(files),
            trust_remote_code=False,
            use_safetensors=True,
        )
    return model, set(report["missing_keys"])


def _config(files: ModelFiles) -> Any:
    import transformers

    files.json(CONFIG)
    config = transformers.AutoConfig.from_pretrained(files.folder, **_gguf(files), trust_remote_code=False)
    config.name_or_path = files.name
    mend_config(config, files.metadata)
    return config


def _gguf(files: ModelFiles) -> dict[str, Any]:
    return {} if files.gguf is None else {"gguf_file": files.gguf}


def _plain(files: ModelFiles) -> dict[str, Any]:
    """Has a GGUF file's blocks become plain numbers; a model that computes in them could neither learn nor be saved."""
    import transformers

    has_choice = files.gguf is not None and hasattr(transformers, "GgufConfig")
    return {"quantization_config": transformers.GgufConfig(dequantize=True)} if has_choice else {}


def _align(model: Any) -> None:
    """Move weights that lie in a mapped file at odd addresses: there products of matrices differ in their last bits."""
    for parameter in model.parameters():
        if parameter.data_ptr() % 16:
            parameter.data = parameter.data.clone()


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer, and see that it is read as it is: some classes of transformers add parts of their own."""
    import transformers

    tokenizer.save_pretrained(folder)
    again = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    facts = [
        (
            one.backend_tokenizer.to_str(),
            one.chat_template,
            {role: str(token) for role, token in one.special_tokens_map.items()},
            (one.padding_side, one.truncation_side, one.model_input_names, one.clean_up_tokenization_spaces),
        )
        for one in (tokenizer, again)
    ]
    if facts[0] != facts[1]:
        raise ModelError("transformers would read another tokenizer than it wrote")


def _write_model(model: Any, folder: Path) -> None:
    """Write a causal LM, and see that its configurations are read as they are."""
    import transformers

    model.save_pretrained(folder)
    kinds = (transformers.AutoConfig, model.config), (transformers.GenerationConfig, model.generation_config)
    for kind, own in kinds:
        if config_facts(own) != config_facts(kind.from_pretrained(folder)):
            raise ModelError("transformers would read another configuration than it wrote")


def config_facts(config: Any) -> dict[str, Any]:
    """A configuration without what depends on where it was saved, and by what."""
    return {name: value for name, value in config.to_dict().items() if name not in _OF_SAVING}


@contextmanager
def one_line(what: str) -> Iterator[None]:
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


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
