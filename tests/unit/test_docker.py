"""The Dockerfile, as far as it can be read without Docker."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

from typer.testing import CliRunner

from search_r3.cli import app

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
LINES = [line.split(None, 1) for line in TEXT.splitlines() if line and not line.startswith(("#", " "))]


def test_all_that_the_wheel_is_made_of_gets_into_the_image() -> None:
    copied = [
        part.strip("./") for word, rest in LINES if word == "COPY" and "--from" not in rest for part in rest.split()
    ]
    let_through = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(set(let_through)) == sorted({one for one in copied if one and "/" not in one})
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    build = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {project["project"]["readme"], *project["project"]["license-files"], *build["force-include"], "src"}
    assert needed <= set(copied) and all((ROOT / one).exists() for one in let_through)


def test_it_serves_as_another_user_than_root_and_is_asked_for_its_health() -> None:
    last = {word: rest for word, rest in LINES}
    assert last["USER"] != "root" and f"useradd --uid 1000 --create-home {last['USER']}" in TEXT
    assert json.loads(last["ENTRYPOINT"]) == ["search-r3"]
    command = json.loads(last["CMD"])
    assert command[1].startswith(f"{last['VOLUME']}/")
    port = re.search(r"127\.0\.0\.1:(\d+)/health", last["HEALTHCHECK"])
    assert port and last["EXPOSE"] == port[1]
    answer = CliRunner().invoke(app, [*command[:1], "--help"], env={"COLUMNS": "200"})
    assert answer.exit_code == 0 and port[1] in answer.output and command[2] in answer.output
