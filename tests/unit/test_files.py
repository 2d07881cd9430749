"""What is written is as readable as the umask says, and machines without POSIX can import everything."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from search_r3 import SearchR3
from search_r3.files import atomic_directory, leftovers, must_be_path, write_text
from search_r3.model.export import export_sentence_transformers


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> set[tuple[bool, int]]:
    """Whether it is a folder, and its mode, of all that is there."""
    return {(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in [folder, *folder.rglob("*")]}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_others_may_read_a_model_and_an_export_as_the_umask_says(umask: int, model: SearchR3, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()
    export_sentence_transformers(model.backbone, tmp_path / "export")
    write_text(tmp_path / "export" / "more.txt", "x")
    for name in ("model", "export"):
        assert modes(tmp_path / name) == {(False, 0o666 & ~umask), (True, 0o777 & ~umask)}


def test_what_a_killed_writer_leaves_is_known_by_its_name(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_directory(target) as scratch:
        assert leftovers(target) == [scratch]
    assert leftovers(target) == []


@pytest.mark.parametrize("name", ["./model", "../model", "~/model", "/model", "model/", "C:\\models\\m", "here/model"])
def test_a_name_that_must_be_a_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert must_be_path(name)
    assert not must_be_path("owner/model") and not must_be_path("model")


ELSEWHERE = """
import builtins, pkgutil, importlib, os, signal, sys
MISSING = {"resource", "fcntl", "termios", "pwd", "grp", "tty", "pty", "curses", "readline", "syslog", "posix"}
plain = builtins.__import__
def hidden(name, globals=None, locals=None, fromlist=(), level=0):
    if (globals or {}).get("__name__", "").startswith("search_r3") and name.partition(".")[0] in MISSING and not level:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return plain(name, globals, locals, fromlist, level)
builtins.__import__ = hidden
import search_r3
modules = [one.name for one in pkgutil.walk_packages(search_r3.__path__, "search_r3.") if "__main__" not in one.name]
from search_r3.errors import MissingExtraError
for name in modules:
    try:
        importlib.import_module(name)
    except MissingExtraError:
        pass  # its own package is not here
assert len(modules) > 100
from search_r3.evaluation.report.report import peak_memory_bytes
assert peak_memory_bytes() is None
for name in ("posix_fallocate", "fork", "killpg", "sync", "getuid", "mkfifo", "sched_getaffinity", "statvfs"):
    if hasattr(os, name):
        delattr(os, name)
from pathlib import Path
from search_r3.retrieval.index import ExactIndex
import numpy as np
ExactIndex(["a", "b"], np.eye(2, dtype=np.float32)).save(Path(sys.argv[1]))
"""


def test_every_module_loads_where_there_is_no_posix(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, tmp_path / "index"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_loading_and_saving_show_no_bar_of_transformers(tiny_path: Path, tmp_path: Path) -> None:
    code = (
        "import sys, transformers\n"
        "from search_r3 import SearchR3\n"
        "from huggingface_hub.utils import are_progress_bars_disabled\n"
        "model = SearchR3(sys.argv[1], device='cpu')\n"
        "model.save_pretrained(sys.argv[2])\n"
        "assert transformers.utils.logging.is_progress_bar_enabled() and not are_progress_bars_disabled()"
    )
    done = subprocess.run([sys.executable, "-c", code, tiny_path, tmp_path / "m"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "%|" not in done.stderr and "Loading" not in done.stderr and "Writing" not in done.stderr, done.stderr
