"""The site's own rule: a page that would ask another host for something is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    pytest.importorskip("mkdocs", reason="the extra docs")
    path = Path(__file__).parents[2] / "docs" / "hooks.py"
    spec = importlib.util.spec_from_file_location("docs_hooks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "text", "fine"),
    [
        ("a.html", '<a href="https://arxiv.org/abs/2510.07048">a link is followed by people</a>', True),
        ("a.html", '<link rel="canonical" href="https://example.org/a.html">', True),
        ("a.html", '<script src="assets/a.js"></script><img src="a.png">', True),
        ("a.html", '<script src="https://unpkg.com/mermaid"></script>', False),
        ("a.html", '<link rel="stylesheet" href="//fonts.example.org/css">', False),
        ("a.html", '<img src="http://example.org/a.png">', False),
        ("a.css", "body { background: url(a.png) }", True),
        ("a.css", "@import 'https://fonts.example.org/css';", False),
        ("a.css", "body { background: url(//example.org/a.png) }", False),
    ],
)
def test_a_page_that_loads_something_from_elsewhere_is_refused(
    hooks: ModuleType, tmp_path: Path, name: str, text: str, fine: bool
) -> None:
    (tmp_path / name).write_text(text)
    config = SimpleNamespace(site_dir=str(tmp_path))
    if fine:
        hooks.on_post_build(config)
    else:
        with pytest.raises(Exception, match=r"another host|loads http|loads //"):
            hooks.on_post_build(config)


def test_commands_and_settings_have_pages(hooks: ModuleType) -> None:
    commands, settings = hooks.commands(), hooks.settings()
    assert "## `search-r3 quickstart`" in commands and "`search-r3 data mine`" in commands
    assert '| `grpo.refresh.policy` | `"full"` |' in settings
    assert "| `sft.steps` | `600` | (≥ 1) Optimizer steps. |" in settings
