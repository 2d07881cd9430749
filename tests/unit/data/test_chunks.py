"""Texts are cut where they may be, within a size, and nothing of them is lost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r3.data.documents import _chunks, _Whole
from search_r3.data.reading.chunks import Chunking, cut, estimate_tokens
from search_r3.data.reading.html import render
from search_r3.data.reading.texts import Section, SourceText, read_text
from search_r3.errors import ConfigError


def words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def pieces(text: str | SourceText, size: int, overlap: int = 0) -> list[str]:
    source = text if isinstance(text, SourceText) else SourceText(text)
    return [source.text[start:end] for start, end in cut(source, Chunking(size, overlap, words))[1]]


def test_a_text_that_fits_stays_whole() -> None:
    assert pieces("  one\n\ntwo three  ", 16) == ["one\n\ntwo three"]


PARAGRAPHS = "\n\n".join(" ".join([name] * 9) + "." for name in "abcd")


def test_paragraphs_stay_whole_and_share_a_chunk_while_they_fit() -> None:
    assert pieces(PARAGRAPHS, 20) == [PARAGRAPHS[:38], PARAGRAPHS[40:]]
    assert [piece[0] for piece in pieces(PARAGRAPHS, 16)] == ["a", "b", "c", "d"]


def test_a_long_paragraph_is_cut_between_sentences_and_a_long_sentence_between_words() -> None:
    text = " ".join(f"Sentence {number} has exactly six words." for number in range(5))
    assert all(piece.endswith("words.") for piece in pieces(text, 16))
    assert [len(piece.split()) for piece in pieces("word " * 50, 16)] == [13, 13, 13, 11]
    assert pieces("".join(f"第{number}句有十个字左右吧。" for number in range(9)), 16) != []


SECTIONS = (Section(0, ("Title",)), Section(6, ("Title", "A")), Section(28, ("Title", "B")))


@pytest.mark.parametrize(("size", "first_words"), [(20, ["Title", "B"]), (16, ["Title", "B"]), (100, ["Title"])])
def test_sections_begin_chunks_of_their_own_and_a_heading_stays_with_the_section_after_it(
    size: int, first_words: list[str]
) -> None:
    text = "Title\nA " + "a " * 10 + "B " + "b " * 10
    assert [piece.split()[0] for piece in pieces(SourceText(text, sections=SECTIONS), size)] == first_words
    long = SourceText("Title\nA " + "a " * 40, sections=SECTIONS[:2])
    assert pieces(long, 20)[0].startswith("Title\nA a")


def test_chunks_overlap_by_whole_sentences() -> None:
    text = " ".join(f"s{number} one two three." for number in range(8))
    first, second, *_ = pieces(text, 16, overlap=5)
    assert first.split()[-4:] == second.split()[:4]
    assert len(second.split()) <= 16


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(["word", ". ", "\n\n", "\n", " ", "x" * 150, "漢字。", "! "]), min_size=1, max_size=200),
    st.sampled_from([16, 50]),
    st.sampled_from([0, 8]),
    st.lists(st.integers(0, 400), max_size=4),
    st.sampled_from([1, 12, 90]),
)
def test_no_chunk_is_too_large_and_only_blanks_are_lost(
    parts: list[str], size: int, overlap: int, at: list[int], longest: int
) -> None:
    text = "".join(parts)
    headings = ("outer " * longest, "inner " * (longest // 3))
    sections = tuple(Section(start, headings) for start in sorted(set(at)) if start < len(text))
    source = SourceText(text, "Title " * longest, sections)
    chunks = list(_chunks(_Whole("d", source, "d"), Chunking(size, overlap), ""))
    spans = [(chunk.start, chunk.end) for chunk in chunks]
    if text.strip():
        assert max(estimate_tokens([chunk.full_text for chunk in chunks])) <= size
        assert all(chunk.title and source.title.startswith(chunk.title) for chunk in chunks)
    covered = {place for start, end in spans for place in range(start, end)}
    assert not "".join(letter for place, letter in enumerate(text) if place not in covered).strip()


def test_lines_keep_their_indentation_and_only_blank_lines_are_lost() -> None:
    lines = [f"    def method_{number}(self):\n        return {number} * 1000\n\n" for number in range(9)]
    text = "\n  \n" + "".join(lines)
    source = SourceText(text, "", tuple(Section(text.index(line), ()) for line in lines))
    chunks = list(_chunks(_Whole("d", source, "d"), Chunking(24), ""))
    assert len(chunks) > 2 and chunks[0].start == 4
    assert all(chunk.text.startswith("    def method_") for chunk in chunks)
    assert [text[chunk.start : chunk.end] for chunk in chunks] == [chunk.text for chunk in chunks]


def test_a_tokenizer_that_makes_more_of_a_text_than_of_its_parts_is_met_by_smaller_chunks() -> None:
    def greedy(texts: Sequence[str]) -> list[int]:
        return [len(text.split()) ** 2 for text in texts]

    _, spans = cut(SourceText("word " * 40), Chunking(36, 0, greedy))
    assert max(greedy(["word " * 40][0][start:end] for start, end in spans)) <= 36


@pytest.mark.parametrize(("size", "overlap"), [(8, 0), (64, 40), (64, -1)])
def test_sizes_that_leave_no_room_are_refused(size: int, overlap: int) -> None:
    with pytest.raises(ConfigError, match=r"expected 0 to 32|too small"):
        Chunking(size, overlap)


def headings(data: str, suffix: str) -> list[tuple[str, tuple[str, ...]]]:
    """The first word and the headings of every section."""
    source = read_text(data.encode(), suffix)
    return [(source.text[section.start :].split()[0], section.headings) for section in source.sections]


def test_headings_of_markdown_are_those_of_commonmark() -> None:
    text = (
        "---\ntitle: The title\n---\n\nUnder\n=====\n\n```\n# no heading\n```\n\n## A *b* `c`\n\n#no\n\n### D\n\n## E\n"
    )
    assert headings(text, ".md") == [
        ("Under", ("Under",)), ("##", ("Under", "A b c")), ("###", ("Under", "A b c", "D")), ("##", ("Under", "E")),
    ]  # fmt: skip
    assert read_text(text.encode(), ".md").title == "The title"
    assert read_text(b"---\n: [broken\n---\n# First\n", ".md").title == "First"
    assert read_text(b"---\r\ntitle: 7\r\n---\r\nno heading", ".md").title == ""


def test_headings_of_html_have_their_place_in_its_text() -> None:
    page = "<h1>Tea</h1><p>a</p><div><h2> Green <i>tea</i></h2>b</div><h2></h2>"
    assert headings(page, ".html") == [("Tea", ("Tea",)), ("Green", ("Tea", "Green tea"))]


def test_html_is_read_as_it_is_seen() -> None:
    page = (
        "<head><title>x</title></head><nav>menu</nav><script>var a</script><p>one <b>b</b>old\n line<br>two"
        "<ul><li>i<li>j</ul><table><tr><td>1<td>2<tr><td>3</table><pre>  x\n    y</pre><!-- no -->&lt;tag&gt;"
    )
    assert render(page)[0] == "one bold line\ntwo\n\ni\nj\n\n1 2\n3\n\n  x\n    y\n\n<tag>"
    assert render("<div>" * 4000 + "deep")[0] == "deep"
    assert render("")[0] == ""


def test_definitions_are_the_sections_of_python() -> None:
    code = "import re\n\n@cache\ndef f():\n    pass\n\nclass C:\n    def g(self): ...\n"
    assert headings(code, ".py") == [("@cache", ("def f",)), ("class", ("class C",))]
    assert headings("def broken(:\n", ".py") == headings('x = "\\d"\n', ".py") == []
