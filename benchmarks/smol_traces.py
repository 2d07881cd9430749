"""Reasoning that a model of 135M parameters can write: it begins by naming what the query names, step by step.

Each trace is at most about 45 words; facts that only a large model knows are left out where the question can be taken
apart instead.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from traces import join_sentences, proof_conclusions

WORDS = 40
STOP = frozenset(
    "a an the of to in on at by for from with and or but is are was were be been being do does did has "
    "have had can could will would should may might must it its they them their this that these those "
    "which what who whom whose where when why how if then than as into about over under most likely best "
    "following not no one you your he she his her there some any all each other more many much very so "
    "such up out off because during between through after before while get gets make makes made used use "
    "using called known example statement describe describes explain explains happens result results "
    "cause causes need needs way reason type kind thing things something someone person people student "
    "students question answer i my we our us me".split()
)
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9'\-]*")


def phrases(text: str) -> list[str]:
    """Runs of at most three content words, in their order."""
    found: list[str] = []
    run: list[str] = []
    for token in re.findall(r"[A-Za-z0-9][A-Za-z0-9'\-]*|[^\sA-Za-z0-9]", text):
        content = bool(_WORD.fullmatch(token)) and token.lower() not in STOP and (len(token) > 2 or token.isdigit())
        if content:
            run.append(token)
        if run and (not content or len(run) == 3):
            found.append(" ".join(run))
            run = []
    if run:
        found.append(" ".join(run))
    return list(dict.fromkeys(found))


class Topics:
    """Which phrases of a query are worth naming: those of its documents first, then rare ones.

    Args:
        texts: all queries of the source, for how rare a word is.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.counts: Counter[str] = Counter()
        for text in texts:
            self.counts.update({word.lower() for word in _WORD.findall(text)})

    def of(self, query: str, documents: Sequence[str], most: int = 3) -> str:
        """Up to `most` phrases in the query's order."""
        found = phrases(query)
        wanted = {stem(word) for document in documents for word in _WORD.findall(document)}

        def worth(phrase: str) -> tuple[float, float]:
            words = _WORD.findall(phrase)
            return (
                -max(stem(word) in wanted for word in words),
                min(self.counts[word.lower()] for word in words),
            )

        best = set(sorted(found, key=worth)[:most])
        return ", ".join(phrase for phrase in found if phrase in best)


def stem(word: str) -> str:
    """A word without its common endings."""
    return re.sub(r"(ing|ed|es|s)$", "", word.lower())


def fact_trace(topic: str, facts: Sequence[str], conclusion: str = "") -> str:
    """`Topic: ... Fact: ... So ...`."""
    head = f"Topic: {topic}." if topic else ""
    tidy = [re.sub(r"\s+('s|n't|'re)\b", r"\1", fact) for fact in facts]
    body = [f"Fact: {fact}" for fact in tidy[:1]] + tidy[1:]
    return join_sentences([head, *body, *([f"So {lower_first(conclusion)}"] if conclusion else [])], WORDS)


def question_trace(topic: str, decomposition: Sequence[str]) -> str:
    """`Topic: ... Look up: first question? second question?`; references to other answers become words."""
    steps: list[str] = []
    known: set[str] = set()
    for step in decomposition:
        plain = re.sub(r"#\d+((,| and|, and| or) #\d+)*", "that", step)
        words = {stem(word) for word in _WORD.findall(plain) if word.lower() not in STOP}
        if words - known and len(words) > 1:  # "Is that the same as that?" names nothing to look up
            steps.append(plain)
            known |= words
    if not steps:
        return ""
    head = [f"Topic: {topic}."] if topic else []
    return join_sentences([*head, f"Look up: {lower_first(steps[0])}", *steps[1:]], WORDS)


def proof_trace(topic: str, proof: str, hypothesis: str, facts: Sequence[str]) -> str:
    """The topic, the first conclusion of a proof (else a fact), and what is proven."""
    first = proof_conclusions(proof)[:1] or list(facts[:1])
    return fact_trace(topic, first, hypothesis)


def support_trace(support: Sequence[str], answer: str) -> str:
    """The sentences of a story that answer, copied, and the answer."""
    return join_sentences([*support, f"So the answer is {answer}"], WORDS)


def lower_first(text: str) -> str:
    """The text with a small first letter, unless its first word is a name or stands in capitals."""
    first = text.split(" ", 1)[0]
    common = first.lower() in STOP or first.lower() in {"did", "which", "what", "who", "where", "when", "how"}
    return text[0].lower() + text[1:] if common and not first.isupper() else text
