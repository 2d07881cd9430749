"""The text of a file, with its title, headings and pages.

What cannot be read raises `UnreadableError` with the reason, which is counted and never ends a reading. Offsets count
characters of the text as it is after `clean`.
"""

from __future__ import annotations

import ast
import codecs
import logging
import re
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate, pairwise
from typing import Any

import yaml
from markdown_it import MarkdownIt

from ...extras import extra
from .html import render

LONGEST_TITLE = 200
"""Characters kept of a title or a heading, which are part of every chunk."""
BOMS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16's, which it begins with
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f-\x9f]")
"""Characters that no text holds; tab, line breaks, form feed and escape (of coloured logs) are not among them."""
DECLARED = re.compile(rb"""<meta[^>]{0,200}charset\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)
FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?\n)?(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_CLEANED = str.maketrans(dict.fromkeys([*range(9), *range(14, 32), *range(127, 160)], " ") | {11: "\n", 12: "\n"})
_SURROGATE = re.compile("[\ud800-\udfff]")


class UnreadableError(Exception):
    """Why something is not read; for the report."""


@dataclass(frozen=True)
class Section:
    """Where a part of a text begins (an offset), and the headings above it, outermost first."""

    start: int
    headings: tuple[str, ...]


@dataclass(frozen=True)
class SourceText:
    """A text as it was read.

    Attributes:
        text: all of it.
        title: empty where it says none.
        sections: in order; what is before the first has no heading.
        pages: the offset at which each page begins; empty where there are none.
    """

    text: str
    title: str = ""
    sections: tuple[Section, ...] = ()
    pages: tuple[int, ...] = ()

    def headings_at(self, offset: int) -> tuple[str, ...]:
        """The headings above a character."""
        place = bisect_right(self.sections, offset, key=lambda section: section.start)
        return self.sections[place - 1].headings if place else ()

    def page_at(self, offset: int) -> int | None:
        """The page of a character, from 1; None where there are no pages."""
        return bisect_right(self.pages, offset) or None


def read_text(data: bytes, suffix: str) -> SourceText:
    """The text of a file's bytes; the suffix (lower case, with its dot) says what kind of file it is.

    Raises:
        UnreadableError: it is no text, or damaged.
        MissingExtraError: a PDF or HTML, and the extra `documents` is not installed.
    """
    if suffix == ".pdf":
        return read_pdf(data)
    if suffix in (".html", ".htm", ".xhtml"):
        declared = DECLARED.search(data[:2048])
        return read_html(decode(data, declared[1].decode("ascii") if declared else ""))
    text = decode(data)
    if suffix in (".md", ".markdown"):
        return read_markdown(text)
    return SourceText(text, sections=_definitions(text)) if suffix in (".py", ".pyi") else SourceText(text)


def decode(data: bytes, declared: str = "") -> str:
    """Bytes as a text.

    A byte order mark decides; then UTF-8, if the bytes are; then what they declare (HTML's `charset`); then UTF-8 if
    most of what is not ASCII in it is well-formed (the rest becomes U+FFFD); then Windows-1252, which contains what
    latin-1 has to write.

    Raises:
        UnreadableError: the bytes hold NUL, or control characters in Windows-1252; they are no text.
    """
    text = _decode_marked(data)
    if text is None:
        if b"\0" in data:
            raise UnreadableError("binary")
        text = _decode_unmarked(data, declared)
    return clean(text)


def encoding_of(sample: bytes) -> str:
    """The encoding of a file that is read as a stream, by its beginning and the rule of `decode`."""
    for mark, name in BOMS.items():
        if sample.startswith(mark):
            return {"utf-8": "utf-8-sig"}.get(name, name.removesuffix("-le").removesuffix("-be"))
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError:
        return "utf-8" if _mostly_utf8(sample) else "cp1252"
    return "utf-8"


def clean(text: str) -> str:
    r"""A text that can be stored, encoded and shown: `\n` ends lines, control characters are blanks, surrogates U+FFFD.

    Example:
        >>> clean("one\r\ntwo\x1b[0m \ud800")
        'one\ntwo [0m \ufffd'
    """
    if _SURROGATE.search(text):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.replace("\r\n", "\n").replace("\r", "\n").translate(_CLEANED)


def short(text: str) -> str:
    """A title or heading on one line, cut."""
    return " ".join(text.split())[:LONGEST_TITLE]


def read_html(text: str) -> SourceText:
    """The visible text of a page, with its headings."""
    body, title, headings = render(text)
    return SourceText(body, short(title), outline(headings))


def read_markdown(text: str) -> SourceText:
    """Markdown as it is, with its headings; titled by its front matter, else by its first heading of level 1."""
    front = FRONT_MATTER.match(text)
    body_at = front.end() if front else 0
    starts = _line_starts(text[body_at:])
    markdown = MarkdownIt("commonmark")
    tokens = MarkdownIt("commonmark").disable(["inline", "text_join"]).parse(text[body_at:])  # of blocks alone: fast
    headings = []
    for token, inline in pairwise(tokens):
        if token.type == "heading_open" and token.map:
            [line] = markdown.parseInline(inline.content)
            words = "".join(child.content or " " for child in line.children or ())
            headings.append((body_at + starts[token.map[0]], int(token.tag[1]), words))
    title = _front_title(front[1] or "") if front else ""
    title = title or next((words for _, level, words in headings if level == 1), "")
    return SourceText(text, short(title), outline(headings))


def read_pdf(data: bytes) -> SourceText:
    """The text of a PDF's pages.

    Raises:
        UnreadableError: it is encrypted with a password, damaged, or holds no text (a scan).
    """
    with extra("documents"):
        import pypdf
        from pypdf.errors import DependencyError

    try:
        with _quiet("pypdf"):
            reader = pypdf.PdfReader(BytesIO(data))
            if reader.is_encrypted and not reader.decrypt(""):
                raise UnreadableError("an encrypted PDF")
            pages = [clean(page.extract_text()).strip() for page in reader.pages]
            title = reader.metadata.title if reader.metadata else ""
    except UnreadableError:
        raise
    except DependencyError as error:
        raise UnreadableError("an encrypted PDF that needs the package cryptography") from error
    except Exception as error:  # damaged files raise whatever pypdf stumbles over
        raise UnreadableError("a damaged PDF") from error
    if not any(pages):
        raise UnreadableError("a PDF without text (scanned pages?)")
    starts = [0, *accumulate(len(page) + 1 for page in pages[:-1])]
    return SourceText("\n".join(pages), short(clean(str(title or ""))), pages=tuple(starts))


def outline(headings: Iterable[tuple[int, int, str]]) -> tuple[Section, ...]:
    """Sections from the place, level and words of every heading.

    Example:
        >>> [section.headings for section in outline([(0, 1, "Tea"), (9, 3, "Green"), (20, 2, "Pots")])]
        [('Tea',), ('Tea', 'Green'), ('Tea', 'Pots')]
    """
    sections = []
    above: list[tuple[int, str]] = []
    for start, level, words in headings:
        above = [*(one for one in above if one[0] < level), (level, short(words))]
        sections.append(Section(start, tuple(name for _, name in above if name)))
    return tuple(sections)


def _decode_marked(data: bytes) -> str | None:
    for mark, encoding in BOMS.items():
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding, "replace")
    return None


def _decode_unmarked(data: bytes, declared: str) -> str:
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        pass
    if declared and declared.lower().replace("-", "") != "utf8":
        try:
            return data.decode(declared)
        except (LookupError, ValueError):
            pass
    if _mostly_utf8(data):
        return data.decode("utf-8", "replace")
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError as error:
        raise UnreadableError("binary") from error
    if CONTROL.search(text):
        raise UnreadableError("binary")
    return text


def _mostly_utf8(data: bytes) -> bool:
    """Whether more of what is not ASCII is well-formed than not."""
    text = data.decode("utf-8", "replace")
    broken = text.count("\ufffd")
    return sum(not character.isascii() for character in text) > 2 * broken and not CONTROL.search(text)


def _line_starts(text: str) -> list[int]:
    """Where each line begins; only a line feed ends one, as for Python and Markdown."""
    return list(accumulate((len(line) + 1 for line in text.split("\n")), initial=0))


def _front_title(front_matter: str) -> str:
    try:
        values = yaml.safe_load(front_matter)
    except (yaml.YAMLError, ValueError):
        return ""
    title: Any = values.get("title") if isinstance(values, dict) else None
    return title if isinstance(title, str) else ""


def _definitions(code: str) -> tuple[Section, ...]:
    """The classes and functions at the top of a Python module; none where it does not parse."""
    starts = _line_starts(code)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()
    sections = []
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            word = "class" if isinstance(node, ast.ClassDef) else "def"
            sections.append(Section(starts[first - 1], (f"{word} {node.name}",)))
    return tuple(sections)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a library's notes on the faults of a file to itself; the report says what could not be read."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
