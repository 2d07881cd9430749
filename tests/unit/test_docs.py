"""What README and docs say can be done can be done: links, commands, options, names, Python."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import search_r3
from search_r3.cli import app

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MADE = {"commands.md", "settings.md", "changelog.md"}
"""Pages that `docs/hooks.py` makes when the site is built."""


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(path: Path) -> list[list[str]]:
    """The command lines of this package that a page shows, as lists of words."""
    text = "\n".join(blocks(path, "console")).replace("\\\n", " ")
    found = []
    for line in re.findall(r"^\$ (.*)$", text, re.MULTILINE):
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            for start, word in enumerate(words):
                if word.endswith("search-r3") or word == "search_r3.cli":
                    found.append(words[start + 1 :])
                    break
    return found


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 100


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text) + re.findall(r'src="([^":]+)"', text):
        assert target in MADE or (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_that_are_shown_exist_with_their_options(path: Path) -> None:
    for words in commands(path):
        command: Any = get_command(app)
        rest = list(words)
        while rest and rest[0] in getattr(command, "commands", {}):
            command = command.commands[rest.pop(0)]
        shown = " ".join(words)
        assert not getattr(command, "commands", {}) or all(word.startswith("-") for word in rest), shown
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        options = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
        assert options <= known | {"--help"}, shown


def test_recipes_that_are_shown_exist() -> None:
    for path in PAGES:
        for words in commands(path):
            for word in words:
                if word.startswith("recipes/"):
                    assert (ROOT / word).is_file(), f"{path.name}: {word}"


def test_public_names_have_a_place_in_the_api_pages() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    for name in set(search_r3.__all__) - {"__version__"}:
        assert re.search(rf"\b{name}\b", text), name


@pytest.mark.parametrize("path", [README, ROOT / "docs" / "getting-started.md"], ids=lambda path: path.name)
def test_the_python_that_is_shown_runs(
    path: Path, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [code] = blocks(path, "python")
    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_text("a red house\na green boat\n")
    names: dict[str, Any] = {}
    exec(code.replace("runs/quickstart/model", str(run_dir / "model")), names)
    assert len(names["queries"].vectors) == len(names["queries"].reasoning) == 1
