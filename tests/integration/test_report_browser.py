"""The page in a real browser: its script runs, under its own policy, and shows what the address asks for.

Needs the extra `browser`, and Chromium or Chrome on the path; that is why it is not part of the default run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from example_results import HOSTILE, make_result, make_results

from search_r3.evaluation.report.page import write_page
from tests.browser import chromium, overflow, window

pytestmark = pytest.mark.slow

MINUS = "\N{MINUS SIGN}"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(make_results(queries=30), tmp_path_factory.mktemp("report"), title="In a browser")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


def browse(browser: Any, address: str) -> str:
    """What the browser has made of a page."""
    with window(browser) as page:
        page.goto(address)
        dom: str = page.content()
        return dom


def part(dom: str, name: str) -> str:
    """The text of the element of that id, which ends where the next element with an id begins."""
    start = dom.index(">", dom.index(f'id="{name}"')) + 1
    html = dom[start : re.compile(r'<\w+[^>]*\bid="(?!query-)').search(dom, start).start()]  # type: ignore[union-attr]
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def test_a_query_in_the_address_is_shown(report: Path, browser: Any) -> None:
    _, direct, reason = make_results(queries=30)[:3]
    dom = browse(browser, f"{report.as_uri()}#query=q007")
    detail = part(dom, "detail")
    assert direct.queries[7] in detail
    assert " ".join(reason.reasoning[7].split()) in detail
    assert f"{reason.reasoning_tokens[7]} tokens" in detail
    for result in (direct, reason):
        for doc_id, score in result.top[7]:
            assert re.search(rf"\b{doc_id}\b[^.]*? {score:.3f} {re.escape(result.snippets[doc_id])}", detail)
    before, after = ([doc_id for doc_id, _ in result.top[7]] for result in (direct, reason))
    entered = [doc_id for doc_id in after if doc_id not in before]
    assert f"Entered {len(entered)}: {', '.join(entered)}." in detail
    gains = [b - a for a, b in zip(direct.per_query["ndcg@10"], reason.per_query["ndcg@10"], strict=True)]
    counts = [sum(gain > 1e-6 for gain in gains), sum(gain < -1e-6 for gain in gains)]
    assert "helps {}, hurts {}, same {} of 30 queries".format(*counts, 30 - sum(counts)) in part(dom, "summary")


def test_the_address_chooses_split_systems_filter_search_and_order(report: Path, browser: Any) -> None:
    lexical, _, reason = make_results(queries=30)[3:]
    state = "place=second+%2F+test&base=bm25&other=reason&filter=hurts&search=SAID&sort=loss"
    dom = browse(browser, f"{report.as_uri()}#{state}")
    pairs = zip(lexical.per_query["ndcg@10"], reason.per_query["ndcg@10"], strict=True)
    losses = sorted((b - a, i) for i, (a, b) in enumerate(pairs) if b - a < -1e-6 and i > 0)
    shown = re.findall(MINUS + r"\d\.\d{3}", part(dom, "list"))
    assert shown == [f"{MINUS}{-loss:.3f}" for loss, _ in losses]
    assert lexical.queries[losses[0][1]] in part(dom, "detail")


def test_a_hostile_text_stays_a_text(report: Path, browser: Any) -> None:
    dom = browse(browser, f"{report.as_uri()}#query=q000")
    assert " ".join(HOSTILE.split()) in part(dom, "detail")
    assert "<img src=x" not in dom


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1320])
def test_the_page_can_be_painted(report: Path, browser: Any, width: int, scheme: str) -> None:
    with window(browser, width=width, color_scheme=scheme) as page:
        page.goto(report.as_uri())
        assert page.screenshot().startswith(b"\x89PNG") and overflow(page, "html") <= 0


def test_the_tables_need_no_scrolling_at_1200_pixels(tmp_path: Path, browser: Any) -> None:
    systems = [
        ("bm25+reasoning", "bm25", "", 0.3),
        ("direct/rl", "search-r3", "direct", 0.4),
        ("reason/rl", "search-r3", "reason", 0.6),
        ("sentence-transformers/all-MiniLM-L6-v2", "sentence-transformers", "", 0.5),
    ]
    results = [make_result(*system, collection="mteb/a-collection-with-a-long-name", queries=30) for system in systems]
    comparison = {"collection": "first", "split": "test", "first": "reason/rl", "second": "direct/rl"}
    comparison |= {"difference": 0.1, "p": 0.01, "p_holm": 0.02}
    path = write_page(results, tmp_path, title="In a browser", comparisons=[comparison])
    with window(browser, width=1200) as page:
        page.goto(path.as_uri())
        for table in ("#results", "#tests", "#provenance"):
            assert overflow(page, f"{table} .scroll") <= 0
