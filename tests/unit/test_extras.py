"""What is not a core dependency is imported where it is used, and one error names the extra that brings it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import transformers
from conftest import SMALL, call
from safetensors.torch import save_file

import search_r3
from search_r3.config import Recipe
from search_r3.model.encoder import SearchR3
from search_r3.training import grpo
from search_r3.training.session import TrainingResult

AUDITED = ("audit_reward_error", "audit_top10_overlap", "audit_drift_mean")
PACKAGE = Path(search_r3.__file__).parent
PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SOURCES = sorted(PACKAGE.rglob("*.py"))
NAME = re.compile(r"[A-Za-z0-9_.-]+")


def normal(requirement: str) -> str:
    """The name of a distribution as PyPI compares names."""
    return NAME.match(requirement)[0].lower().replace("_", "-")


def brought_by(extra: str) -> set[str]:
    """The distributions of an extra, and of the extras that it is made of."""
    names = set()
    for requirement in PROJECT["optional-dependencies"][extra]:
        if match := re.match(r"search-r3\[(.*)\]", requirement):
            names |= set().union(*map(brought_by, match[1].split(",")))
        else:
            names.add(normal(requirement))
    return names


CORE = {normal(requirement) for requirement in PROJECT["dependencies"]}
OF_MODULE = {module: {normal(name) for name in names} for module, names in packages_distributions().items()}


def third_party(path: Path) -> Iterator[tuple[str, str | None]]:
    """Every package outside the standard library that a module imports at run time, and the extra around the import."""

    def walk(node: ast.AST, extra: str | None) -> Iterator[tuple[str, str | None]]:
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            return
        if isinstance(node, ast.With):
            for item in node.items:
                made = item.context_expr
                if isinstance(made, ast.Call) and getattr(made.func, "id", "") == "extra":
                    extra = made.args[0].value
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in names:
            top = name.partition(".")[0]
            if top not in sys.stdlib_module_names:
                yield top, extra
        for child in ast.iter_child_nodes(node):
            yield from walk(child, extra)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), None)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_an_import_is_of_the_core_or_names_the_extra_that_brings_it(path: Path) -> None:
    for module, extra in third_party(path):
        brought = CORE if extra is None else brought_by(extra)
        # Of what is not installed the name alone is known: llama-index-core brings llama_index.
        brings = OF_MODULE.get(module) or {name for name in brought if name.startswith(normal(module))}
        assert brings & brought, f"{module} is not in {extra or 'the core'}"


def test_all_and_the_old_names_of_extras_are_whole() -> None:
    assert brought_by("all") >= brought_by("train") | brought_by("eval") | brought_by("mteb") | brought_by("documents")
    assert "peft" in brought_by("lora")


WITHOUT_EXTRAS = """
import importlib, importlib.machinery, pkgutil, sys

class Installed(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in BLOCKED else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Installed
import search_r3
from search_r3.errors import MissingExtraError

for module in pkgutil.walk_packages(search_r3.__path__, "search_r3."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except MissingExtraError as error:
        print(module.name, error)
model = search_r3.SearchR3("builtin")
print(model.encode_document(["a text"]).shape)
"""


def test_every_module_imports_and_a_model_encodes_with_the_core_alone() -> None:
    """Only modules that extend a framework's classes, and the server, need more; they end with the one error."""
    distributions = set().union(*map(brought_by, PROJECT["optional-dependencies"])) - CORE
    blocked = {module for module, names in OF_MODULE.items() if names and names <= distributions}
    assert {"accelerate", "babel", "matplotlib", "scipy"} <= blocked
    code = f"BLOCKED = {sorted(blocked)!r}\n{WITHOUT_EXTRAS}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "search_r3.evaluation.mteb the package mteb is not installed; it comes with the extra `mteb`: "
        "pip install 'search-r3[mteb]'",
        "search_r3.evaluation.mteb_tasks the package mteb is not installed; it comes with the extra `mteb`: "
        "pip install 'search-r3[mteb]'",
        "search_r3.integrations.haystack the package haystack is not installed; it comes with the extra `haystack`: "
        "pip install 'search-r3[haystack]'",
        "search_r3.integrations.langchain the package langchain_core is not installed; "
        "it comes with the extra `langchain`: "
        "pip install 'search-r3[langchain]'",
        "search_r3.integrations.llama_index the package llama_index is not installed; "
        "it comes with the extra `llama-index`: "
        "pip install 'search-r3[llama-index]'",
        "search_r3.integrations.llm the package click is not installed; it comes with the extra `llm`: "
        "pip install 'search-r3[llm]'",
        "search_r3.serving.server the package prometheus_client is not installed; it comes with the extra `serve`: "
        "pip install 'search-r3[serve]'",
        "(1, 192)",
    ]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Make a package one that is not installed."""

    def hide(package: str) -> None:
        loaded = [name for name in sys.modules if name == package or name.startswith(f"{package}.")]
        for name in {package, *loaded}:
            monkeypatch.setitem(sys.modules, name, None)
        forget_what_is_available()

    yield hide
    monkeypatch.undo()
    forget_what_is_available()


def forget_what_is_available() -> None:
    """Transformers remembers which packages there are."""
    for function in vars(transformers.utils.import_utils).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


COMMANDS = {
    "accelerate": [
        ("train", "quickstart {small} {settings}"),
        ("train", "sft {small} {settings}"),
        ("train", "grpo --model {model} {small} {settings}"),
        ("train", "base {out}/base"),
    ],
    "babel": [
        ("train", "data build atlas {out}/atlas"),
        ("train", "evaluate --collections atlas --baselines bm25 --out {out}/e"),
        ("train", "search {model} --collection atlas --mode direct question"),
    ],
    "peft": [("train", "sft {small} {settings} lora.rank=2"), ("train", "search {adapter} --collection {data} red")],
    "usearch": [("train", "encode {model} {out}/i --collection {data} --untrained --index-type hnsw")],
    "datasets": [
        ("train", "data mix {mix} {out}/mix"),
        ("eval", "evaluate --collections owner/name --baselines bm25 --out {out}/e"),
    ],
    "pypdf": [("documents", "search {model} --documents {documents} --untrained red")],
    "selectolax": [("documents", "encode {model} {out}/i --documents {documents} --untrained")],
    "pyarrow": [("documents", "search {model} --documents {documents} --untrained red")],
    "fastapi": [("serve", "serve {model} --untrained")],
    "uvicorn": [("serve", "serve {model} --untrained")],
    "mcp": [("serve", "mcp {store}"), ("serve", "serve {model} --untrained")],
    "lancedb": [("serve", "index {out}/store {data} --model {model} --untrained"), ("serve", "store list {store}")],
    "bm25s": [
        ("eval", "evaluate --collections {data} --baselines bm25 --out {out}/e"),
        ("eval", "data mine {data} {out}/mined --with bm25"),
    ],
    "scipy": [("eval", "evaluate --collections {data} --baselines bm25 --out {out}/e")],
    "matplotlib": [("eval", "report {evaluated} --out {out}/report")],
    "ray": [("ray", "encode {model} {out}/i --collection {data} --untrained --ray")],
    "mteb": [("mteb", "mteb --model {model} --tasks SciFact")],
    "gguf": [("gguf", "search {gguf} --collection {data} red"), ("gguf", "export {model} {out}/m.gguf --gguf")],
    "llama_cpp": [("llamacpp", "search {gguf} --collection {data} --backend llama.cpp red")],
    "sentence_transformers": [
        ("integrations", "evaluate --collections {data} --baselines sentence-transformers:x --out {out}/e"),
        ("integrations", "data mine {data} {out}/mined --with bm25 --cross-encoder x"),
    ],
}


@pytest.mark.parametrize(
    ("package", "extra", "command"), [(package, *one) for package, several in COMMANDS.items() for one in several]
)
def test_a_command_that_lacks_a_package_ends_with_the_one_error(
    package: str,
    extra: str,
    command: str,
    without: Callable[[str], None],
    tmp_path: Path,
    tiny_path: Path,
    collection_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter, mix, evaluated = tmp_path / "adapter", tmp_path / "mix.yaml", tmp_path / "evaluated"
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    if "{adapter}" in command:
        SearchR3(tiny_path).backbone.tokenizer.save_pretrained(adapter)
        (adapter / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{tiny_path}"}}')
        save_file({}, adapter / "adapter_model.safetensors")
    if "{documents}" in command:
        (tmp_path / "documents").mkdir()
        suffix = {"pypdf": "pdf", "selectolax": "html", "pyarrow": "parquet"}[package]
        (tmp_path / "documents" / f"a.{suffix}").write_bytes(b"PAR1 or whatever it is")
    if "{store}" in command:
        (tmp_path / "store" / "documents.lance" / "_versions").mkdir(parents=True)
        (tmp_path / "store" / "documents.lance" / "_versions" / "1.manifest").write_text("a version")
    if "{mix}" in command:
        (tmp_path / "rows.jsonl").write_text('{"anchor": "a question", "positive": "an answer of some length"}\n')
        mix.write_text(f"sources:\n  - {{name: own, reader: pairs, path: {tmp_path}/rows.jsonl}}\n")
    if "{evaluated}" in command:
        asked = ["--collections", collection_path, "--baselines", "bm25", "--permutations", 100, "--bootstrap", 100]
        assert call(monkeypatch, "evaluate", *asked, "--out", evaluated) == 0
    settings = [f"run_dir={tmp_path}/run", f"base={tiny_path}", f"collection={collection_path}"]
    words = command.format(
        small="SMALL", settings="SETTINGS", model=tiny_path, data=collection_path, out=tmp_path, adapter=adapter,
        mix=mix, evaluated=evaluated, gguf=gguf, store=tmp_path / "store", documents=tmp_path / "documents",
    ).split()  # fmt: skip
    spread = {"SMALL": SMALL, "SETTINGS": settings}
    server = dict.fromkeys(("fastapi", "mcp"), "search_r3.serving.server")
    loaded = {"mteb": "search_r3.evaluation.mteb", **server}.get(package, "nothing")
    for name in [name for name in sys.modules if name.startswith(loaded)]:
        monkeypatch.delitem(sys.modules, name)  # another test may have loaded it, with the package
    without(package)
    capsys.readouterr()
    assert call(monkeypatch, *(part for word in words for part in spread.get(word, [word]))) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert f"the package {package} is not installed; it comes with the extra `{extra}`" in shown
    assert f"pip install 'search-r3[{extra}]'" in shown
    assert "Traceback" not in shown


def test_an_audited_training_without_matplotlib_ends_well_and_says_what_its_plot_lacks(
    without: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def trained(settings: Recipe, **options: object) -> TrainingResult:
        rows = [{"stage": "grpo", "step": step, **dict.fromkeys(AUDITED, 0.1)} for step in (1, 2)]
        return TrainingResult(tmp_path, settings, rows)

    monkeypatch.setattr(grpo, "train_grpo", trained)
    without("matplotlib")
    assert call(monkeypatch, "grpo", "--model", tmp_path, f"run_dir={tmp_path}/run") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "no plot of the account: the package matplotlib is not installed" in shown
