"""A text cut into chunks of a size in tokens: at headings, paragraphs, sentences, lines and words, in this order."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ...errors import ConfigError
from .texts import SourceText

Count = Callable[[Sequence[str]], Sequence[int]]
"""The size of each text, in tokens."""
Span = tuple[int, int]
"""Offsets of the first character and of the one after the last."""

CUTS = (
    re.compile(r"\n[ \t]*\n\s*"),  # paragraphs
    re.compile(r"(?<=[.!?])[\"')\]]*\s+|(?<=[。!?])"),  # sentences, Chinese and Japanese ones too
    re.compile(r"\n\s*"),
    re.compile(r"\s+"),
)
SMALL = 4
"""What fills less than one part in so many of a chunk (a heading alone, mostly) stays with the section after it."""

WIDEST = 16
"""A text of more characters per token of a chunk is cut unmeasured: that takes as long as its parts."""


def estimate_tokens(texts: Sequence[str]) -> list[int]:
    """A fourth of the bytes in UTF-8, for who has no tokenizer at hand.

    Example:
        >>> estimate_tokens(["a text of 24 characters."])
        [6]
    """
    return [-(-len(text.encode("utf-8")) // 4) for text in texts]


@dataclass(frozen=True)
class Chunking:
    """How texts are cut.

    Attributes:
        max_tokens: the largest chunk, its title and headings included; a text that fits stays whole.
        overlap: so many tokens of the sentences before it, at most, begin a chunk that does not begin a section. None
            by default: cuts are between paragraphs and sentences, and title and headings stand in every chunk.
        count: measures texts; a model's own counter makes `max_tokens` exact.

    Raises:
        ConfigError: a size that leaves no room.
    """

    max_tokens: int = 512
    overlap: int = 0
    count: Count = estimate_tokens

    def __post_init__(self) -> None:
        if self.max_tokens < 16:
            raise ConfigError(f"a chunk of {self.max_tokens} tokens is too small; give at least 16")
        if not 0 <= self.overlap <= self.max_tokens // 2:
            raise ConfigError(
                f"an overlap of {self.overlap} tokens: expected 0 to {self.max_tokens // 2}, half of a chunk"
            )


def cut(source: SourceText, chunking: Chunking) -> tuple[SourceText, list[Span]]:
    """The chunks of a text, in order; what lies between them is blank.

    Where it does not stay whole, the source that comes back has a shorter title and fewer headings if these would leave
    the text less than half of a chunk.

    Example:
        >>> text = "One sentence stands here. " * 40
        >>> len(cut(SourceText(text), Chunking(max_tokens=100))[1])
        3
    """
    text, count = source.text, chunking.count
    whole = _trim(text, (0, len(text)))
    may_fit = len(text) <= WIDEST * chunking.max_tokens
    if not text.strip() or (may_fit and _sizes(source, [whole], count)[0] <= chunking.max_tokens):
        return source, [whole]
    source = _fitted(source, chunking)
    starts = sorted({0, *(section.start for section in source.sections)})
    sections = [span for span in zip(starts, [*starts[1:], len(text)], strict=True) if text[slice(*span)].strip()]
    sizes = _sizes(source, sections, count)
    joined: list[tuple[Span, int]] = []
    for span, size in zip(sections, sizes, strict=True):
        if joined and joined[-1][1] * SMALL < chunking.max_tokens:
            (start, _), before = joined.pop()
            joined.append(((start, span[1]), before + size))
        else:
            joined.append((span, size))
    chunks: list[Span] = []
    for span, size in joined:
        chunks += [span] if size <= chunking.max_tokens else _cut_section(source, span, chunking)
    return source, [(start, end) for start, end in (_trim(text, span) for span in chunks) if start < end]


def _fitted(source: SourceText, chunking: Chunking) -> SourceText:
    """The same with context that leaves the text half of a chunk: outer headings go before inner ones."""
    most, count = (chunking.max_tokens - chunking.overlap) // 2 - 1, chunking.count
    title = source.title
    while count([title])[0] > most:
        title = title.rpartition(" ")[0] or title[: len(title) // 2]
    fits: dict[tuple[str, ...], tuple[str, ...]] = {}
    for headings in {section.headings for section in source.sections}:
        inner = range(len(headings) + 1)
        sizes = count([" ".join([title, *headings[first:]]) for first in inner])
        fits[headings] = next(headings[first:] for first in inner if sizes[first] <= most)
    sections = tuple(replace(section, headings=fits[section.headings]) for section in source.sections)
    return replace(source, title=title, sections=sections)


def with_context(title: str, headings: Sequence[str], text: str) -> str:
    """What is encoded of a chunk: the title, the headings that it does not show itself, its text.

    Example:
        >>> with_context("Tea", ("Green", "Japan"), "Green, from Uji.")
        'Tea Japan Green, from Uji.'
    """
    return " ".join([title, *(one for one in headings if one != title and one not in text), text]).strip()


def _sizes(source: SourceText, spans: Sequence[Span], count: Count) -> Sequence[int]:
    return count([with_context(source.title, source.headings_at(a), source.text[a:b]) for a, b in spans])


def _cut_section(source: SourceText, span: Span, chunking: Chunking) -> list[Span]:
    """The chunks of a section that is too large for one."""
    # Small sections have been joined; their headings differ.
    inside = [section.start for section in source.sections if span[0] < section.start < span[1]]
    contexts = [" ".join([source.title, *source.headings_at(place)]) for place in (span[0], *inside)]
    room = chunking.max_tokens - max(chunking.count(contexts)) - 2  # for the seams, where tokens may differ
    units = _units(source.text, span, room - chunking.overlap, chunking.count)
    chunks: list[Span] = []
    for first, last in _pack(source.text, units, room - chunking.overlap, chunking.count):
        start = units[first][0][0]
        if chunks and chunking.overlap:
            start = _overlapped(source.text, chunks[-1], start, chunking)
        chunks.append((start, units[last][0][1]))
    return chunks


def _units(text: str, span: Span, room: int, count: Count, level: int = 0) -> list[tuple[Span, int]]:
    """The largest parts of a span that fit, each with its size: paragraphs, or their sentences, and so on."""
    spans = _split(span, CUTS[level], text) if level < len(CUTS) else _slices(span, max(1, room // 4))
    sizes = count([text[slice(*one)] for one in spans])
    units: list[tuple[Span, int]] = []
    for one, size in zip(spans, sizes, strict=True):
        if size <= room or level == len(CUTS):
            units.append((one, size))
        else:
            units += _units(text, one, room, count, level + 1)
    return units


def _split(span: Span, pattern: re.Pattern[str], text: str) -> list[Span]:
    """A span cut after every match."""
    ends = [match.end() for match in pattern.finditer(text, *span) if span[0] < match.end() < span[1]]
    return list(zip([span[0], *ends], [*ends, span[1]], strict=True))


def _slices(span: Span, size: int) -> list[Span]:
    """A word that is too long (base64, ...), cut anywhere; a tokenizer takes at most four tokens for a character."""
    return [(start, min(start + size, span[1])) for start in range(*span, size)]


def _pack(text: str, units: list[tuple[Span, int]], room: int, count: Count) -> list[tuple[int, int]]:
    """Numbers of the first and the last unit of every chunk; chunks are alike in size, no last one is tiny."""
    packed: list[tuple[int, int]] = []
    total = sum(tokens for _, tokens in units)
    target = total / max(1, -(-total // room))
    size = room + 1
    for number, (_, tokens) in enumerate(units):
        if size + tokens > room or size >= target:
            packed.append((number, number))
            size = tokens
        else:
            packed[-1] = (packed[-1][0], number)
            size += tokens
    # Tokenizers may make more tokens of a text than of its parts; such a chunk is halved.
    halved: list[tuple[int, int]] = []
    while packed:
        sizes = count([text[units[first][0][0] : units[last][0][1]] for first, last in packed])
        halved += [one for one, tokens in zip(packed, sizes, strict=True) if tokens <= room or one[0] == one[1]]
        packed = [
            half
            for (first, last), tokens in zip(packed, sizes, strict=True)
            if tokens > room and first != last
            for half in ((first, (first + last) // 2), ((first + last) // 2 + 1, last))
        ]
    return sorted(halved)


def _overlapped(text: str, before: Span, start: int, chunking: Chunking) -> int:
    """Where a chunk begins that takes over the last sentences of the one before it."""
    sentences = _split((before[0], start), CUTS[1], text)[1:]
    sizes = chunking.count([text[slice(*one)] for one in sentences]) if sentences else ()
    room = chunking.overlap
    for (first, _), size in zip(reversed(sentences), reversed(sizes), strict=True):
        room -= size
        if room < 0:
            break
        start = first
    return start


def _trim(text: str, span: Span) -> Span:
    """A span without the blanks at its ends; a line that begins there, but the first, keeps its indentation."""
    piece = text[slice(*span)]
    first = span[0] + len(piece) - len(piece.lstrip())
    line = text.rfind("\n", 0, first) + 1
    return line if line and line >= span[0] else first, span[0] + len(piece.rstrip())
