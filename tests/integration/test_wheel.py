"""The wheel: what is in it, and that it works in an environment that holds nothing but it and the core dependencies."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from search_r3 import __version__
from tests.conftest import call

ROOT = Path(__file__).parents[2]
USE = """
from importlib.resources import files
import search_r3
from search_r3.config import load_recipe

model = search_r3.SearchR3("builtin")
print(model.encode_document(["a text"]).shape, model.encode_query(["what?"], mode="direct").vectors.shape)
print(load_recipe(files("search_r3") / "recipes" / "quickstart.yaml").name)
"""


def run(*args: object) -> subprocess.CompletedProcess[str]:
    """A program that sees no module of this checkout."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(arg) for arg in args]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=900, env=clean)


def test_the_command_line_says_its_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.split() == ["search-r3", __version__]


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_of_its_own(tmp_path: Path) -> None:
    """Needs a package index for the core dependencies; it takes about two minutes."""
    built = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", ROOT)
    assert built.returncode == 0, built.stderr
    [wheel] = (tmp_path / "dist").iterdir()
    inside = set(zipfile.ZipFile(wheel).namelist())
    for folder, kinds in {
        "src/search_r3": ("*.py", "*.jinja", "*.json", "*.safetensors", "*.html", "*.js", "*.css", "py.typed"),
        "recipes": ("*.yaml",),
    }.items():
        for kind in kinds:
            paths = [path for path in (ROOT / folder).rglob(kind) if "__pycache__" not in path.parts]
            assert paths, kind
            target = "search_r3/recipes" if folder == "recipes" else "search_r3"
            assert {f"{target}/{path.relative_to(ROOT / folder).as_posix()}" for path in paths} <= inside
    python = tmp_path / "venv" / "bin" / "python"
    assert run(sys.executable, "-m", "venv", tmp_path / "venv").returncode == 0
    for wanted in ("torch", wheel):
        installed = run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wanted)
        assert installed.returncode == 0, installed.stderr
    command = python.with_name("search-r3")
    assert run(command, "--version").stdout.split() == ["search-r3", __version__]
    used = run(python, "-c", USE)
    assert used.stdout.splitlines() == ["(1, 192) (1, 192)", "quickstart"], used.stderr
    lacking = run(command, "data", "build", "atlas", tmp_path / "atlas")
    assert lacking.returncode == 2
    assert "pip install 'search-r3[train]'" in " ".join(lacking.stderr.split())
