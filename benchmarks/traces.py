"""Reasoning traces for stage 1 from what question answering data sets publish beside their questions.

Proofs (EntailmentBank), decompositions (StrategyQA), answers (OpenBookQA) and judged documents (any collection) become
plain sentences. A trace tells what the documents that are sought say; it may hold the answer, so it is for training
queries only.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from search_r3.data.collection import Document, Query

WORDS = 40
"""Words of a trace: whole sentences up to here, at least one."""
_CONCLUSION = re.compile(r"->\s*int\d+:\s*([^;]+)")
_REFERENCE = re.compile(r"#\d+")


def query_traces(query: Query, positives: Sequence[Document], words: int = WORDS) -> dict[str, str]:
    """Style of reasoning -> trace, from a query's metadata and its relevant documents.

    Args:
        query: the metadata read are `proof`, `hypothesis`, `decomposition` and `answer` (where it is a text); those
            that are missing give no trace.
        positives: the relevant documents. Their titles are used where they have one, else their texts.
        words: limit of each trace.

    Returns:
        `proof`: what follows from the documents, up to the hypothesis; `hypothesis`: what they prove; `decomposition`:
        the questions that stand on their own, then the facts; `answer`: the answer, then the facts; `facts`: the
        documents alone.

    Example:
        >>> query = Query("q1", "What do bees do?", {"answer": "pollinate plants"})
        >>> query_traces(query, [Document("d1", "a bee pollinates")])
        {'answer': 'The answer is pollinate plants. A bee pollinates.', 'facts': 'A bee pollinates.'}
    """
    facts = [document.title.strip() or document.text for document in positives]
    found: dict[str, Sequence[str]] = {}
    metadata: Mapping[str, Any] = query.metadata
    if hypothesis := _text(metadata, "hypothesis"):
        found["hypothesis"] = [hypothesis]
        if conclusions := proof_conclusions(_text(metadata, "proof")):
            found["proof"] = [*conclusions, f"So {hypothesis}"]
    if questions := standing_questions(metadata.get("decomposition") or []):
        found["decomposition"] = [*questions, *facts]
    # Beside a hypothesis, which holds the answer in a sentence, the bare answer says nothing new.
    if (answer := _text(metadata, "answer")) and not hypothesis:
        found["answer"] = [f"The answer is {answer}", *facts]
    found["facts"] = facts
    traces = {style: join_sentences(sentences, words) for style, sentences in found.items()}
    return {style: trace for style, trace in traces.items() if trace}


def proof_conclusions(proof: str) -> list[str]:
    """The conclusions on the way to the hypothesis, in their order.

    Args:
        proof: steps `sent1 & int1 -> int2: conclusion;`, of which the last ends in `-> hypothesis;`.

    Example:
        >>> proof_conclusions("sent1 & sent3 -> int1: a star is a source of light; int1 & sent2 -> hypothesis;")
        ['a star is a source of light']
    """
    return [conclusion.strip() for conclusion in _CONCLUSION.findall(proof)]


def standing_questions(decomposition: Sequence[str]) -> list[str]:
    """The questions of a decomposition that do not refer to the answer of another (`#1`).

    Example:
        >>> standing_questions(["How old is a star?", "Is #1 more than ten years?"])
        ['How old is a star?']
    """
    return [question for question in decomposition if not _REFERENCE.search(question)]


def join_sentences(sentences: Sequence[str], words: int = WORDS) -> str:
    """One text of whole sentences up to a number of words; the first is cut where it alone is longer.

    Example:
        >>> join_sentences(["why is ice cold ?", "ice is frozen water"])
        'Why is ice cold? Ice is frozen water.'
    """
    chosen: list[str] = []
    left = words
    for sentence in sentences:
        tidy = re.sub(r"\s+([,.;:?!])", r"\1", " ".join(sentence.split()))
        count = len(tidy.split())
        if not tidy or (chosen and count > left):
            continue
        tidy = " ".join(tidy.split()[:words])
        chosen.append(tidy[0].upper() + tidy[1:] + ("" if tidy[-1] in ".?!" else "."))
        left -= count
    return " ".join(chosen)


def pair_query(document: Document, rng: random.Random) -> str:
    """A query made of a document, for training without judgements: a part of it in its own order.

    Of a text of several sentences one that is not the first, or the title; of a single sentence about half of its
    words, longer words three times as likely: a query seldom repeats the others.

    Args:
        document: the document.
        rng: of the choice.

    Returns:
        The query, with at least one word.
    """
    sentences = [s for s in re.split(r"(?<=[.?!])\s+", document.text.strip()) if len(s.split()) > 4]
    if len(sentences) > 1:
        return rng.choice([*sentences[1:], *([document.title] if document.title.strip() else [])])
    tokens = document.full_text.split()
    weights = [3.0 if len(token) > 3 else 1.0 for token in tokens]
    count = max(1, round(len(tokens) * rng.uniform(0.3, 0.7)))
    # Weighted sampling without replacement: the largest keys u^(1/w) (Efraimidis and Spirakis, 2006).
    keys = sorted(range(len(tokens)), key=lambda place: -(rng.random() ** (1 / weights[place])))
    return " ".join(tokens[place] for place in sorted(keys[:count]))


def _text(metadata: Mapping[str, Any], name: str) -> str:
    value = metadata.get(name)
    return value.strip() if isinstance(value, str) else ""
