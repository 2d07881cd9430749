"""A tokenizer as GGUF files hold it: tokens and their types by id, merges, and the name of how texts are split."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ...errors import ModelError

# How byte-level tokenizers split texts before they merge. Qwen2: contractions, words, single digits, punctuation, line
# breaks, spaces; Llama 3: up to three digits together.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}| ?", r"|\p{N}{1,3}| ?")
_SPLITS = {
    ("ByteLevel, with its regex",): "gpt-2",
    ("single digits", "ByteLevel, with its regex"): "smollm",
    (QWEN2_SPLIT, "ByteLevel"): "qwen2",
    (_LLAMA3_SPLIT, "ByteLevel"): "llama-bpe",
}
"""The steps of a pre-tokenizer -> what llama.cpp calls it."""
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs of a byte-level BPE tokenizer.

    Attributes:
        tokens: by id.
        types: GGUF's numbers for normal, control, user-defined and unused tokens, by id.
        merges: two tokens with a blank between, the first merge first.
        split: llama.cpp's name for the pre-tokenizer.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    split: str


def vocabulary_of(tokenizer: Any, rows: int, source: str) -> Vocabulary:
    """The vocabulary of a tokenizer, with as many tokens as the model's table has rows.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        rows: of the token table; those without a token are unused ones.
        source: what the model is called, for messages.

    Raises:
        ModelError: llama.cpp has no such tokenizer.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    if spec["model"]["type"] != "BPE" or spec["model"].get("byte_fallback"):
        raise _other_tokenizer(source, f"its model is {spec['model']['type']}, not byte-level BPE")
    split = _SPLITS.get(_steps(spec["pre_tokenizer"]))
    if split is None:
        raise _other_tokenizer(source, "it splits texts in another way")
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(names) >= rows:
        raise ModelError(f"{source}: the token {names[max(names)]} has the id {max(names)}, and the table {rows} rows")
    types = {number: _CONTROL if token.special else _USER_DEFINED for number, token in added.items()}
    merges = spec["model"]["merges"]
    return Vocabulary(
        [names.get(number, f"[PAD{number}]") for number in range(rows)],
        [types.get(number, _NORMAL if number in names else _UNUSED) for number in range(rows)],
        [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        split,
    )


def _steps(spec: dict[str, Any] | None) -> tuple[str, ...]:
    """What a pre-tokenizer does, one name for each step."""
    steps = (spec or {}).get("pretokenizers", [spec or {}])
    return tuple(map(_step, steps))


def _step(spec: dict[str, Any]) -> str:
    kind = spec.get("type")
    if kind == "ByteLevel" and not spec["add_prefix_space"]:
        return "ByteLevel, with its regex" if spec.get("use_regex", True) else "ByteLevel"
    if kind == "Digits" and spec["individual_digits"]:
        return "single digits"
    if kind == "Split" and spec["behavior"] == "Isolated" and not spec["invert"]:
        return str(spec["pattern"].get("Regex"))
    return f"unknown: {kind}"


def _other_tokenizer(source: str, why: str) -> ModelError:
    return ModelError(
        f"the tokenizer of {source} cannot be written to a GGUF file ({why}); known are byte-level BPE tokenizers that "
        f"split as {', '.join(_SPLITS.values())} do"
    )
