"""The page in a real browser: its script runs, under its own policy, and shows what the address asks for.

Needs Chromium or Chrome on the path; that is why it is not part of the default run.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from example_results import HOSTILE, make_results

from search_r3.evaluation.report.page import write_page

pytestmark = pytest.mark.slow

MINUS = "\N{MINUS SIGN}"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr"
).split()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(make_results(queries=30), tmp_path_factory.mktemp("report"), title="In a browser")


def browse(address: str, profile: Path, *options: str) -> str:
    """What the browser prints for a page that logs nothing."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    assert program, f"this test needs one of {', '.join(names)} on the path"
    done = subprocess.run(
        [program, *FLAGS, f"--user-data-dir={profile}", *options, address], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def part(dom: str, name: str) -> str:
    """The text of the element of that id, which ends where the next element with an id begins."""
    start = dom.index(">", dom.index(f'id="{name}"')) + 1
    html = dom[start : re.compile(r'<\w+[^>]*\bid="(?!query-)').search(dom, start).start()]  # type: ignore[union-attr]
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def test_a_query_in_the_address_is_shown(report: Path, tmp_path: Path) -> None:
    _, direct, reason = make_results(queries=30)[:3]
    dom = browse(f"{report.as_uri()}#query=q007", tmp_path, "--dump-dom")
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


def test_the_address_chooses_split_systems_filter_search_and_order(report: Path, tmp_path: Path) -> None:
    lexical, _, reason = make_results(queries=30)[3:]
    state = "place=second+%2F+test&base=bm25&other=reason&filter=hurts&search=SAID&sort=loss"
    dom = browse(f"{report.as_uri()}#{state}", tmp_path, "--dump-dom")
    pairs = zip(lexical.per_query["ndcg@10"], reason.per_query["ndcg@10"], strict=True)
    losses = sorted((b - a, i) for i, (a, b) in enumerate(pairs) if b - a < -1e-6 and i > 0)
    shown = re.findall(MINUS + r"\d\.\d{3}", part(dom, "list"))
    assert shown == [f"{MINUS}{-loss:.3f}" for loss, _ in losses]
    assert lexical.queries[losses[0][1]] in part(dom, "detail")


def test_a_hostile_text_stays_a_text(report: Path, tmp_path: Path) -> None:
    dom = browse(f"{report.as_uri()}#query=q000", tmp_path, "--dump-dom")
    assert " ".join(HOSTILE.split()) in part(dom, "detail")
    assert "<img src=x" not in dom


@pytest.mark.parametrize("size", ["390,844", "1320,900"])
def test_the_page_can_be_painted(report: Path, tmp_path: Path, size: str) -> None:
    picture = tmp_path / "page.png"
    browse(report.as_uri(), tmp_path / "profile", f"--window-size={size}", f"--screenshot={picture}")
    assert picture.read_bytes().startswith(b"\x89PNG")
