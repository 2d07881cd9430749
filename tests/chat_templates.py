"""Tokenizers with the chat templates of model families (tests/templates) and the names of their special tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"
CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
LLAMA = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
COHERE = (
    "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
)  # fmt: skip
HARMONY = ("<|startoftext|>", "<|return|>", "<|endoftext|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>")
GRANITE = (None, "<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>")
GLM = (None, "<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
DEEPSEEK_NAMES = ("begin\u2581of\u2581sentence", "end\u2581of\u2581sentence", "User", "Assistant")
DEEPSEEK = tuple(f"<\uff5c{name}\uff5c>" for name in DEEPSEEK_NAMES)
PHI = ("<|endoftext|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
# Beginning of a sequence (None: there is none), the tokenizer's eos, and the other special tokens.
FAMILIES: dict[str, tuple[str | None, ...]] = {
    "command-r": COHERE,
    "gemma-2": GEMMA,
    "gemma-3": GEMMA,
    "glm-4.6": GLM,
    "gpt-oss": HARMONY,
    "granite-3.3": GRANITE,
    "lfm2": ("<|startoftext|>", "<|im_end|>", "<|im_start|>"),
    "llama-3.2": LLAMA,
    "mistral-nemo": ("<s>", "</s>", "[INST]", "[/INST]"),
    "mistral-v1": ("<s>", "</s>"),
    "phi-3.5": PHI,
    "phi-4-mini": PHI,
    "qwen2.5": (None, "<|im_end|>", *CHATML),
    "qwen3": (None, "<|im_end|>", *CHATML),
    "qwq": (None, "<|im_end|>", *CHATML),
    "r1-distill": DEEPSEEK,
    "smollm3": (None, "<|im_end|>", *CHATML),
}


def family_tokenizer(tokenizer: Any, name: str) -> Any:
    """A copy of a byte-level tokenizer with the chat template and the special tokens of a family."""
    own = copy.deepcopy(tokenizer)
    bos, eos, *others = FAMILIES[name]
    special = dict.fromkeys(one for one in (bos, eos, *others, "<|embed_token|>") if one is not None)
    own.add_special_tokens({"additional_special_tokens": list(special)}, replace_extra_special_tokens=False)
    own.add_tokens(["<think>", "</think>"])  # no special tokens in the families that have them
    own.bos_token, own.eos_token = bos, eos
    own.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return own
