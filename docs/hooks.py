"""What mkdocs asks while it builds the site: pages made from the commands, the settings and the change log; one check.

The check: no page may make a browser ask another host for anything, so that the site is read offline as it was built.
"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click
from typer.main import get_command

from search_r3.cli import app
from search_r3.config import Recipe, Section

ROOT = Path(__file__).parents[1]
LOADING = {"audio", "embed", "iframe", "img", "input", "link", "object", "script", "source", "track", "video"}
ELSEWHERE = re.compile(r"""(?:@import|url\()\s*["']?\s*(?:https?:)?//""")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    for name, text in {
        "commands.md": commands(),
        "settings.md": settings(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "]("),
    }.items():
        files.append(File.generated(config, name, content=text))
    return files


def commands() -> str:
    """Every command's own help."""
    command: Any = get_command(app)
    context: Any = typer.Context(command, info_name="search-r3")
    text: str = get_docs_for_click(obj=command, ctx=context, name="search-r3")
    return text.replace("# `search-r3`", "# Commands", 1)


def settings() -> str:
    """A table for every section of a recipe."""
    head = [
        "# Settings",
        "",
        "A recipe is a YAML file of these settings; `key=value` on the command line overrides them (`grpo.steps=20`).",
        "An unknown key is an error.",
    ]
    return "\n".join([*head, *_section(Recipe, "")]) + "\n"


def _section(kind: type[Section], prefix: str) -> list[str]:
    title = f"`{prefix.rstrip('.')}`" if prefix else "The recipe itself"
    about = (kind.__doc__ or "").strip().splitlines()[0]
    lines = ["", f"## {title}", "", about, "", "| setting | default | meaning |", "|---|---|---|"]
    inner: list[str] = []
    for name, field in kind.model_fields.items():
        if isinstance(field.default, Section):
            inner += _section(type(field.default), f"{prefix}{name}.")
            continue
        default = json.dumps(field.default).replace("|", "\\|")
        lines.append(
            f"| `{prefix}{name}` | `{default}` | {_limits(field)}{(field.description or '').replace('|', '¦')} |"
        )
    return lines + inner


def _limits(field: Any) -> str:
    """The range or the choices of a setting, in front of its meaning."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [
        f"{sign} {getattr(limit, name)}"
        for limit in field.metadata
        for name, sign in signs.items()
        if hasattr(limit, name)
    ]
    return f"({', '.join(bounds)}) " if bounds else ""


class _Loaded(HTMLParser):
    """The addresses that a browser asks for by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what an element loads."""
        values = dict(attrs)
        if tag in LOADING and values.get("rel") not in ("canonical", "next", "prev"):
            self.addresses += [value for name in ("src", "href", "data") if (value := values.get(name))]


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site that needs another host.

    Raises:
        PluginError: a page loads something from elsewhere.
    """
    site = Path(config.site_dir)
    for path in sorted(site.rglob("*.html")):
        page = _Loaded()
        page.feed(path.read_text(encoding="utf-8"))
        outside = [address for address in page.addresses if address.startswith(("http:", "https:", "//"))]
        if outside:
            raise PluginError(f"{path.relative_to(site)} loads {outside[0]}; put a copy of it under docs/")
    for path in sorted(site.rglob("*.css")):
        if ELSEWHERE.search(path.read_text(encoding="utf-8")):
            raise PluginError(f"{path.relative_to(site)} loads something from another host")
