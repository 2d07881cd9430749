"""The visible text of an HTML page. The page is parsed as browsers do (lexbor, through selectolax)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...extras import extra

if TYPE_CHECKING:
    from selectolax.lexbor import LexborNode

UNSEEN = frozenset({"head", "script", "style", "template", "noscript", "svg", "iframe", "object", "nav", "select"})
"""What is no text of the page: navigation is the same on every page of a site."""
HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
NOTHING, BLANK, LINE, PARAGRAPH = "", " ", "\n", "\n\n"
GAPS = {
    **dict.fromkeys(("td", "th"), BLANK),
    **dict.fromkeys(("br", "li", "tr", "dt", "dd", "option", "caption", "div", "summary", "legend"), LINE),
    **dict.fromkeys(HEADINGS, PARAGRAPH),
    **dict.fromkeys(("p", "pre", "blockquote", "ul", "ol", "dl", "table", "hr", "figure", "figcaption"), PARAGRAPH),
    **dict.fromkeys(("article", "section", "main", "header", "footer", "aside", "address", "form"), PARAGRAPH),
}
"""What stands at least before and after the text of an element; the longest gap counts, as the longest margin does."""


def render(page: str) -> tuple[str, str, list[tuple[int, int, str]]]:
    r"""Text and title of a page, and offset, level and words of each heading.

    Example:
        >>> render("<title>Tea</title><h1>Green</h1><p>It is <b>not</b> oxidised.")
        ('Green\n\nIt is not oxidised.', 'Tea', [(0, 1, 'Green')])
    """
    with extra("documents"):
        from selectolax.lexbor import LexborHTMLParser

    tree = LexborHTMLParser(page)
    title = tree.css_first("head > title")
    writer = _Writer()
    if tree.body is not None:
        _walk(tree.body, writer)
    return "".join(writer.parts), "" if title is None else title.text(), writer.headings


class _Writer:
    """Text as it grows, with the gaps between its parts."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.headings: list[tuple[int, int, str]] = []
        self._length = 0
        self._gap = NOTHING
        self._heading: tuple[int, int] | None = None  # level, and the number of parts before its words
        self._preformatted = 0

    def enter(self, tag: str) -> None:
        self._widen(GAPS.get(tag, NOTHING))
        self._preformatted += tag == "pre"
        if tag in HEADINGS:
            self._heading = int(tag[1]), len(self.parts)

    def leave(self, tag: str) -> None:
        self._widen(GAPS.get(tag, NOTHING))
        self._preformatted -= tag == "pre"
        if tag in HEADINGS and self._heading is not None:
            level, before = self._heading
            words = "".join(self.parts[before:]).lstrip()
            if words:
                self.headings.append((self._length - len(words), level, words))
            self._heading = None

    def write(self, text: str) -> None:
        words = text if self._preformatted and text.strip() else " ".join(text.split())
        if not words:
            self._widen(BLANK if text else NOTHING)
            return
        if not self._preformatted and text[0].isspace():
            self._widen(BLANK)
        if self.parts:
            words = self._gap + words
        self.parts.append(words)
        self._length += len(words)
        self._gap = BLANK if not self._preformatted and text[-1].isspace() else NOTHING

    def _widen(self, gap: str) -> None:
        self._gap = max(self._gap, gap, key=(NOTHING, BLANK, LINE, PARAGRAPH).index)


def _walk(root: LexborNode, writer: _Writer) -> None:
    """Tell the writer of every element and text; without recursion, since pages nest thousands deep."""
    node, end = root, root.mem_id  # nodes compare by their HTML
    while True:
        if node.is_text_node:
            writer.write(node.text_content or "")
        elif node.is_element_node and node.tag not in UNSEEN:
            writer.enter(node.tag or "")
            if (child := node.first_child) is not None:
                node = child
                continue
            writer.leave(node.tag or "")
        while (following := node.next) is None or node.mem_id == end:
            parent = node.parent
            if node.mem_id == end or parent is None:
                return
            node = parent
            writer.leave(node.tag or "")
        node = following
