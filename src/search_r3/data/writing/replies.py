"""What is read from a language model's replies, and what must not stand in what it wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a letter, which JSON can carry and UTF-8 cannot."""
SPECIAL = re.compile(
    r"<\|[^<>|]*\|>|</?(think|s|pad|bos|eos|unk|mask|tool_call)>|\[/?(INST|CLS|SEP|PAD|MASK)\]", re.IGNORECASE
)
"""Special tokens of the usual chat models, the embed token among them."""
_NOUN = r"(documents?|passages?|texts?|articles?|contexts?|sources?|abstracts?|excerpts?)"
_VERB = (
    r"(say|state|mention|describe|explain|note|show|tell|told|said|report|indicate|discuss|provide|confirm|reveal|list)"
    r"(e?s|e?d)?"
)
MENTION = re.compile(
    rf"\b(the|this|that|these|those|both|each) (\w+ )?{_NOUN} (above |below |\d+ )?{_VERB}\b"
    rf"|\b(according to|based on|stated in|described in|mentioned in|noted in|as per) (the|this|that|these|those) "
    rf"(\w+ )?{_NOUN}\b"
    rf"|\b(given|provided|above|following|retrieved) {_NOUN}\b"
    rf"|\b(document|passage|article|text) \d+\b",
    re.IGNORECASE,
)
"""English that speaks of passages that the reader does not see."""


def read_object(reply: str) -> dict[str, Any]:
    """The JSON object in a reply, which may stand in a code fence or after reasoning.

    Example:
        >>> read_object('<think>{?}</think> Sure: {"queries": ["who wrote it?"]}')
        {'queries': ['who wrote it?']}

    Raises:
        ValueError: there is none; the message says what was found.
    """
    text = reply.rpartition("</think>")[2]
    if not text.strip():
        raise ValueError("the reply was empty")
    try:
        value = json.loads(text[text.find("{") : text.rfind("}") + 1])
    except (ValueError, RecursionError) as error:
        raise ValueError("the reply was not JSON") from error
    return value if isinstance(value, dict) else {}


def plain(text: str) -> str:
    """The words in lower case, without punctuation, joined by one space.

    Example:
        >>> plain("Who built it -- and when?")
        'who built it and when'
    """
    return " ".join(re.findall(r"\w+", text.lower()))


def copied_share(text: str, sources: Iterable[str], length: int) -> float:
    """The share of a text's runs of `length` words that stand in one of the sources too, in that order.

    A text of fewer words is one run. Case and punctuation do not count.

    Example:
        >>> copied_share("the red bridge is long", ["A red bridge is here."], 3)
        0.3333333333333333
    """
    runs = _runs(text, length)
    source_runs = {run for source in sources for run in _runs(source, min(length, len(runs[0]) if runs else length))}
    return sum(run in source_runs for run in runs) / len(runs) if runs else 0.0


def _runs(text: str, length: int) -> list[tuple[str, ...]]:
    words = plain(text).split()
    length = min(length, len(words))
    return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)] if words else []
