"""Rollouts that search while they are written, in the form in which Search-R1 and verl ask a server."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import httpx2

ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)
TURNS = 4

Policy = Callable[[str], str]
"""What comes next in a rollout."""


def roll(url: str, prompts: Sequence[str], policy: Policy, topk: int = 3) -> list[str]:
    """Write rollouts until all have answered; in each turn the queries of all of them go out in one request.

    As there, an answer that is no `{"result": ...}` of so many lists ends all of them, and a turn in which nobody
    searches asks for no queries.
    """
    rollouts = list(prompts)
    for _ in range(TURNS):
        searching: dict[int, str] = {}
        for number, text in enumerate(rollouts):
            if "</answer>" not in text:
                reply = policy(text)
                rollouts[number] += reply
                match = ACTION.search(reply)
                if match is None:
                    rollouts[number] += "\nMy previous action is invalid.\n"
                elif match[1] == "search":
                    searching[number] = match[2].strip()
        body = {"queries": list(searching.values()), "topk": topk, "return_scores": True}
        result = httpx2.post(f"{url}/retrieve", json=body, timeout=60).json()["result"]
        for number, passages in zip(searching, result, strict=True):
            rollouts[number] += f"\n\n<information>{as_text(passages)}</information>\n\n"
    return rollouts


def as_text(passages: Sequence[dict[str, dict[str, str]]]) -> str:
    """What the model reads: the first line of the contents is the title, the rest the text."""
    lines = []
    for number, passage in enumerate(passages, 1):
        title, _, text = passage["document"]["contents"].partition("\n")
        lines.append(f"Doc {number}(Title: {title}) {text}")
    return "\n".join(lines)
