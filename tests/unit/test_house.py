"""The rules of the house, checked on the source tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import search_r3

PACKAGE = Path(search_r3.__file__).parent
ROOMS = [
    "errors",
    "extras",
    "files",
    "heap",
    "types",
    "modes",
    "client",
    "loader",
    "sections",
    "config",
    "parallel",
    "data",
    "model",
    "retrieval",
    "planning",
    "mining",
    "evaluation",
    "environment",
    "training",
    "pretraining",
    "publishing",
    "serving",
    "integrations",
    "console",
    "cli",
]
LOOPS = {"train_sft": 150, "train_grpo": 150, "train_base": 150, "train_distill": 150}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of this package that a module imports, wherever in the module the import stands."""
    depth = len(path.relative_to(PACKAGE).parts)
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level == depth:
                rooms |= {(node.module or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            rooms |= {name.split(".")[1] for name in names if name.startswith("search_r3.")}
    return rooms


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name != "__init__.py"], ids=lambda p: p.stem)
def test_a_module_imports_only_from_its_own_room_and_from_rooms_above(path: Path) -> None:
    own = ROOMS.index(room_of(path))
    below = {room for room in imported_rooms(path) if ROOMS.index(room) > own}
    assert not below, f"{path.name} imports from {below}"


def test_the_import_check_sees_the_imports() -> None:
    assert imported_rooms(PACKAGE / "training" / "grpo.py") >= {"config", "data", "environment", "model"}


def test_files_and_functions_keep_their_size_budgets() -> None:
    excess = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 400:
            excess.append(f"{path.name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > LOOPS.get(node.name, 60):
                    excess.append(f"{path.name} {node.name}: {length} lines")
    assert not excess


def test_no_folder_holds_more_than_one_trade() -> None:
    counts = Counter(path.parent.relative_to(PACKAGE).as_posix() for path in SOURCES if path.name != "__init__.py")
    assert {folder: count for folder, count in counts.items() if count > 14} == {}


def prints(node: ast.AST) -> bool:
    """Whether it calls `print`, or imports rich, through which the rest is shown."""
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").split(".")[0] == "rich"
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] == "rich" for alias in node.names)
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"


def test_only_the_console_prints_and_only_the_command_line_uses_it() -> None:
    trees = {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {name for name, tree in trees.items() if any(map(prints, ast.walk(tree)))} == {"console.py"}
    assert {room_of(path) for path in SOURCES if "console" in imported_rooms(path)} == {"cli"}


def test_no_module_needs_what_windows_lacks_to_be_imported() -> None:
    posix = {"fcntl", "grp", "pwd", "resource", "termios"}
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not posix.intersection(names), path


def test_importing_the_package_its_client_and_help_load_no_torch() -> None:
    code = (
        "import sys, search_r3, search_r3.cli\n"
        "from search_r3.client import AsyncClient, Client\n"
        "try: search_r3.cli.app(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_exist() -> None:
    for name in search_r3.__all__:
        assert getattr(search_r3, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = search_r3.nonsense
