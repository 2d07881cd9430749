"""Cutting the texts of training sources: the passage around an answer, code without the docstring that is the query."""

from __future__ import annotations

import re
from collections.abc import Iterable

CHARS_PER_WORD = 15
"""How far around an answer words are looked for; longer words than this on average make a shorter passage."""
MAX_OCCURRENCES = 20
"""So many occurrences of an answer are compared."""

_LAYOUT = frozenset(" \t\r\n\f*/#")
"""What a docstring may have more or less of where it stands in its code: white space and signs of comments."""
_OPENING = re.compile(r"(?:(?:\b[rRuUbB]{1,2})?(?:\"\"\"|'''|\"|')|/\*[*\s]*|//[/\s]*|#[#\s]*)\s*$")
_CLOSING = re.compile(r"\s*(?:\"\"\"|'''|\"|'|\*+/)")


def answer_pattern(aliases: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern of any alias as whole words, whatever their case; None where no alias has a letter or digit.

    Example:
        >>> answer_pattern(["New  York", ""]).search("in new york.").group()
        'new york'
    """
    words = {" ".join(alias.split()) for alias in aliases}
    texts = sorted((alias for alias in words if re.search(r"\w", alias)), key=lambda alias: (-len(alias), alias))
    if not texts:
        return None
    choices = "|".join(r"\s+".join(map(re.escape, alias.split())) for alias in texts)
    return re.compile(rf"(?<!\w)(?:{choices})(?!\w)", re.IGNORECASE)


def answer_passage(text: str, answer: re.Pattern[str], query: str, size: int) -> str:
    """The passage of about `size` words around an occurrence of the answer; empty where there is none.

    Of several occurrences, the one whose passage shares most words with the query is taken: a long page names its
    answer in places that have nothing to do with the question.

    Example:
        >>> answer_passage("It was cold. The capital is Tashkent. End.", answer_pattern(["tashkent"]), "capital?", 4)
        'capital is Tashkent. End.'
    """
    query_words = {word for word in re.findall(r"\w+", query.lower()) if len(word) > 3}
    best, most = "", -1
    for number, match in enumerate(answer.finditer(text)):
        if number == MAX_OCCURRENCES:
            break
        passage = _around(text, *match.span(), size)
        shared = len(query_words.intersection(re.findall(r"\w+", passage.lower())))
        if shared > most:
            best, most = passage, shared
    return best


def first_words(text: str, size: int) -> str:
    """The first `size` words of a text."""
    return " ".join(text[: size * CHARS_PER_WORD].split()[:size])


def _around(text: str, start: int, end: int, size: int) -> str:
    """`size` words around a stretch of a text, the stretch in their middle."""
    while start and not text[start - 1].isspace():
        start -= 1
    while end < len(text) and not text[end].isspace():
        end += 1
    middle, reach = text[start:end].split(), size * CHARS_PER_WORD
    room = max(0, size - len(middle))
    before, after = text[max(0, start - reach) : start].split(), text[end : end + reach].split()
    left = max(room // 2, room - len(after))
    head = before[max(0, len(before) - left) :] if left else []
    return " ".join([*head, *middle, *after[: room - len(head)]])


def first_paragraph(docstring: str) -> str:
    r"""What CodeSearchNet asks: the documentation up to its first empty line, on one line.

    Example:
        >>> first_paragraph("Sort the rows\n  by date.\n\n:param rows: them")
        'Sort the rows by date.'
    """
    return " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())


def without_docstring(code: str, docstring: str) -> str:
    r"""The code without its documentation, else the document would hold the query word for word.

    The documentation is found whatever its indentation and the signs of comments before its lines, and only where
    quotes or signs of comments enclose it.

    Example:
        >>> without_docstring("def f(x):\n    'Add\n    one.'\n    return x + 1", "Add\none.")
        'def f(x):\n    return x + 1'
    """
    places = [place for place, letter in enumerate(code) if letter not in _LAYOUT]
    squeezed = "".join(code[place] for place in places)
    letters = "".join(letter for letter in docstring if letter not in _LAYOUT)
    at = squeezed.find(letters) if letters else -1
    while at >= 0:
        before, after = code[: places[at]], code[places[at + len(letters) - 1] + 1 :]
        opening, closing = _OPENING.search(before), _CLOSING.match(after)
        if opening:
            head = before[: opening.start()].rstrip()
            tail = after[closing.end() :] if closing else after
            return head + tail if head and tail.startswith("\n") else f"{head}\n{tail.lstrip()}".strip()
        at = squeezed.find(letters, at + 1)
    return code
