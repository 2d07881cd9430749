"""What a GGUF file of ours says beside its weights: settings with their frames, and the tokenizer as it stands.

The keys are GGUF's own where it has some, so that llama.cpp and what is built on it read the same.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import MissingExtraError, ModelError
from ...extras import extra
from ...files import write_json
from ..reading.unpacked import Unpacked
from ..settings import QUERIES, EmbeddingSettings, parse_settings

Lookup = Callable[[str], str | None]
"""Key -> its value as text; None where the file has none."""

SETTINGS_KEY = "search_r3.settings"
"""What stands in `search_r3.json` of a model directory."""
_TOKENIZER_KEY, _TEMPLATE_KEY = "tokenizer.huggingface.json", "tokenizer.chat_template"
_KEPT = "values.json"
_HEAD = 2**26  # bytes in which the metadata of a file stands
_ROLES = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
_QWEN3_HEADS = "qwen3.attention.key_length"
_KEYS = (_QWEN3_HEADS, SETTINGS_KEY, _TOKENIZER_KEY, _TEMPLATE_KEY, *_ROLES.values())


def read_metadata(path: Path, name: str, digest: Callable[[], str]) -> Lookup:
    """What the metadata of a GGUF file of ours says of these things; of another one nothing.

    Args:
        path: of the file.
        name: what the model is called, for messages.
        digest: SHA-256 of the file, by which what was read is kept.

    Raises:
        ModelError: it is not whole.
        MissingExtraError: the package gguf is not installed.
    """
    values: dict[str, str] = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(SETTINGS_KEY.encode(), 0, _HEAD) < 0:  # to read all metadata takes seconds
            return values.get
    unpacked = Unpacked(digest(), "metadata")
    before = unpacked.read(lambda folder: dict(json.loads((folder / _KEPT).read_text(encoding="utf-8"))))
    if before is not None:
        return before.get
    try:
        with extra("gguf"):
            import gguf
        reader = gguf.GGUFReader(path)
        fields = {key: reader.get_field(key) for key in _KEYS}
        values = {key: str(field.contents()) for key, field in fields.items() if field is not None}
    except MissingExtraError:
        raise
    except Exception as error:  # of numpy, about offsets that are beyond the file's end
        fault = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelError(f"cannot load a model from {name}: {fault}; fetch or copy it again") from error
    unpacked.keep(path, lambda out: write_json(out / _KEPT, values))
    return values.get


def settings_in(value: Lookup, place: str) -> EmbeddingSettings | None:
    """The settings that stand in a file; None in a file that is not of ours.

    Raises:
        ModelError: they are not usable.
    """
    text = value(SETTINGS_KEY)
    return None if text is None else parse_settings(text, place)


def mend_config(config: Any, value: Lookup) -> None:
    """Set the size of heads in a configuration of transformers, which does not read it from files of Qwen3."""
    if (size := value(_QWEN3_HEADS)) is not None:
        config.head_dim = int(size)


def queries_file(name: str) -> str:
    """What the file beside a GGUF file is called that holds what encodes queries.

    Example:
        >>> queries_file("model.gguf")
        'model.queries.gguf'
    """
    return f"{name.removesuffix('.gguf')}.{QUERIES}.gguf"


def check_one_file(settings: EmbeddingSettings, file: str, name: str) -> None:
    """Refuse a file that encodes documents only, where there is none for queries beside it.

    Raises:
        ModelError: it is so.
    """
    if settings.queries is not None:
        raise ModelError(f"{name} encodes documents only, and {queries_file(file)} beside it is missing; copy it, too")


def tokenizer_in(value: Lookup, **more: Any) -> Any:
    """The tokenizer that stands in a file, a `transformers.PreTrainedTokenizerFast`; None where it has none whole.

    Args:
        value: looks keys up.
        more: in place of what the file says.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    text = value(_TOKENIZER_KEY)
    if text is None:
        return None
    tokenizer = Tokenizer.from_str(text)
    ids = {role: value(key) for role, key in _ROLES.items()}
    roles = {role: tokenizer.id_to_token(int(number)) for role, number in ids.items() if number is not None}
    template = {"chat_template": value(_TEMPLATE_KEY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **(roles | template | more)
    )


def tokenizer_values(tokenizer: Any) -> dict[str, str | int]:
    """Key -> value of all that `tokenizer_in` reads."""
    values: dict[str, str | int] = {_TOKENIZER_KEY: tokenizer.backend_tokenizer.to_str()}
    for role, key in _ROLES.items():
        if (token := getattr(tokenizer, role)) is not None:
            values[key] = int(tokenizer.convert_tokens_to_ids(token))
    return values
