"""A real browser: Chromium or Chrome of this machine, driven by playwright (the extra `browser`)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WAIT = 60_000
"""Milliseconds."""


@contextmanager
def chromium() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    assert program, f"this test needs one of {', '.join(names)} on the path"
    flags = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()


@contextmanager
def window(browser: Browser, *allowed: str, width: int = 1200, height: int = 900, **options: Any) -> Iterator[Page]:
    """A window of its own, in which no page may log, fail, or open a dialog; but for logged words that are allowed."""
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    context.set_default_timeout(WAIT)
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    yield page
    context.close()
    assert [words for words in said if not any(one in words for one in allowed)] == []


def overflow(page: Page, selector: str) -> int:
    """Pixels by which the content is wider than what is shown of it."""
    pixels: int = page.locator(selector).first.evaluate("element => element.scrollWidth - element.clientWidth")
    return pixels


def expect(locator: Any) -> Any:
    """Playwright's assertions, which wait."""
    from playwright.sync_api import expect

    expect.set_options(timeout=WAIT)
    return expect(locator)
