"""The built-in collection `stdlib`: code search over the Python that runs, made on the machine as CodeSearchNet was.

Construction of Husain et al. 2019 (arXiv 1909.09436), section 2. A document is a documented public function or method
of the standard library: its signature and body as written, without the docstring. Its query is the first paragraph of
that docstring, freed from the function's own name and signature. Each query has one relevant document.

Filters:

- a query has 3 words or more, a body 3 lines or more (blank lines and the docstring do not count);
- no dunder methods, no names that contain `test`, nothing inside another function;
- private functions, and methods of private classes, are left out; a private module (`_pydatetime`) is not, since public
  classes live there;
- of functions with one qualified name, with the same body (comments, layout, and name left aside), or with the same
  query (letter case and punctuation left aside), only the first in the order of modules and lines is kept.

All functions of one top-level module stand in one split; `_pyio` counts as `io`.
"""

from __future__ import annotations

import ast
import re
import sys
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import DataError
from ..collection import Collection, Document, Qrels, Query
from .splits import divide_groups

SPLIT_SHARES = {"train": 0.8, "dev": 0.1, "test": 0.1}
MIN_QUERY_WORDS = 3
MIN_BODY_LINES = 3
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "antigravity", "this"}
"""Modules and packages, on any level, that are no library code."""


@dataclass(frozen=True)
class Function:
    """A documented function or method."""

    doc_id: str  # `module:Class.method`
    code: str  # signature and body without the docstring
    summary: str  # the first paragraph of the docstring, as `summarize` gives it
    body_key: str  # equal for functions whose arguments and bodies differ only in comments and layout


def build_stdlib(seed: int = 0) -> Collection:
    """Build the collection. The same seed and the same Python give the same collection.

    Args:
        seed: decides which modules make which split.

    Raises:
        DataError: this Python has no readable sources of its standard library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    functions = _drop_doubles(function for module, path in _sources(root) for function in _read(module, path))
    if not functions:
        raise DataError(
            f"no documented Python source under {root}; the collection needs a Python that carries its standard library"
            " as .py files (an embeddable or zipped one does not)"
        )
    groups = {function.doc_id: _group(function.doc_id) for function in functions}
    # Modules of like size in seeded order, so that another seed gives other splits.
    split_of = divide_groups(Counter(groups.values()), SPLIT_SHARES, seed, size=int.bit_length)
    queries: dict[str, Query] = {}
    qrels: dict[str, Qrels] = {name: {} for name in SPLIT_SHARES}
    for function in functions:
        # The prefix keeps the ids apart: a document that bears its query's id would be left out of the ranking.
        query_id = f"q:{function.doc_id}"
        queries[query_id] = Query(query_id, function.summary)
        qrels[split_of[groups[function.doc_id]]][query_id] = {function.doc_id: 1}
    documents = {function.doc_id: Document(function.doc_id, function.code) for function in functions}
    return Collection(
        "stdlib" if seed == 0 else f"stdlib:{seed}",
        documents,
        queries,
        {name: part for name, part in qrels.items() if part},
    )


def _sources(root: Path) -> list[tuple[str, Path]]:
    """Module name and file of every module of the standard library, sorted by name."""
    path_of = {}
    for name in sys.stdlib_module_names - LEFT_OUT:
        for path in [root / f"{name}.py", *(root / name).rglob("*.py")]:
            parts = path.relative_to(root).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if path.is_file() and LEFT_OUT.isdisjoint(parts):
                path_of[".".join(parts)] = path
    return sorted(path_of.items())


def _read(module: str, path: Path) -> list[Function]:
    """The functions of one file; none where it cannot be read or parsed."""
    try:
        with tokenize.open(path) as file:
            return list(find_functions(module, file.read()))
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []


def find_functions(module: str, source: str) -> Iterator[Function]:
    """The functions and methods of one module that pass the filters, doubles included, in the order of their lines.

    Raises:
        SyntaxError: the source is not Python of this version.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own: invalid escapes, deprecated syntax
        tree = ast.parse(source)
    lines = source.split("\n")  # splitlines would also break at form feeds, which ast does not count

    def visit(body: list[ast.stmt], scope: str) -> Iterator[Function]:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from visit(node.body, f"{scope}{node.name}.")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                function = _function(f"{module}:{scope}{node.name}", node, lines)
                if function:
                    yield function
            elif isinstance(node, ast.If | ast.Try):
                handlers = [part for handler in getattr(node, "handlers", []) for part in handler.body]
                yield from visit([*node.body, *handlers, *node.orelse], scope)

    yield from visit(tree.body, "")


def _function(doc_id: str, node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> Function | None:
    docstring = ast.get_docstring(node)
    if node.name.startswith("_") or "test" in node.name.lower() or not docstring or len(node.body) < 2:
        return None
    first = node.body[0]
    start, end = first.lineno - 1, first.end_lineno or 0
    body = lines[end : node.end_lineno]
    shares_a_line = lines[start][: first.col_offset].strip() or node.body[1].lineno <= end
    if shares_a_line or sum(1 for line in body if line.strip()) < MIN_BODY_LINES:
        return None
    summary = summarize(node.name, docstring)
    if len(_words(summary)) < MIN_QUERY_WORDS:
        return None
    indent = lines[node.lineno - 1][: node.col_offset]
    code = "\n".join(line.removeprefix(indent).rstrip() for line in [*lines[node.lineno - 1 : start], *body])
    return Function(doc_id, code, summary, "".join(ast.dump(part) for part in (node.args, *node.body[1:])))


def summarize(name: str, docstring: str) -> str:
    r"""The first paragraph of a docstring in one line, without the function's signature and name.

    A signature at the beginning (`S.find(sub) -> int -- Return ...`) goes, with what it returns; examples (`>>>`) go
    too. The name goes wherever it is written as a name: called, in quotes, after a dot, or not spelled like an
    ordinary word (`read_text`, `readLine`). "Close the file." stays as it is for `close`: without the verb it would
    be no sentence.

    Args:
        name: the function's name.
        docstring: without the indent of its lines, as `inspect.cleandoc` gives it.

    Example:
        >>> summarize("find", "S.find(sub[, start]) -> int\n\nReturn the lowest index\nof sub; see `find`.")
        'Return the lowest index of sub; see.'
    """
    text = docstring
    while name in text and (rest := _without_signature(name, text)) != text:
        text = rest
    paragraph = re.split(r"\n\s*\n|>>>", text, maxsplit=1)[0]
    if name in paragraph:
        paragraph = _written_as_a_name(name).sub(" ", paragraph)
    return re.sub(r"\s+([.,;:])", r"\1", " ".join(paragraph.split())).lstrip(".,;: ")


def _written_as_a_name(name: str) -> re.Pattern[str]:
    word, mark = re.escape(name), r"[`'\"*]+"
    named = [rf"(?:\w+\.)*\b{word}\([^()]*\)", rf"(?:\w+\.)+{word}\b", rf"{mark}{word}{mark}"]
    if not re.fullmatch(r"[A-Z]?[a-z]+", name):
        named.append(rf"\b{word}\b")
    return re.compile(rf"{mark}(?:{'|'.join(named)}){mark}|{'|'.join(named)}")


def _without_signature(name: str, text: str) -> str:
    """`text` without one call of `name` at its beginning (`(a, b) = obj.name(x) -> int --`)."""
    head = re.match(rf"\s*(?:[^\n=]{{1,40}}= ?)?(?:[\w<>]+\.)*{re.escape(name)} ?\(", text)
    if not head:
        return text
    depth, end = 1, head.end()
    while depth and end < len(text):
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        end += 1
    if depth:
        return text  # a bracket that never closes: no signature
    result = r"(?:\([^)]*\)|\[[^\]]*\]|'[^']*'|[^\n])*?"
    return re.sub(rf"^\s*(?:[-=]>{result}(?:--+|[.,](?=\s|$)|\n|$))?[\s:-]*", "", text[end:])


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _drop_doubles(functions: Iterable[Function]) -> list[Function]:
    seen: set[tuple[str, str]] = set()
    unique = []
    for function in functions:
        query = " ".join(_words(function.summary))
        keys = {("id", function.doc_id), ("body", function.body_key), ("query", query)}
        if seen.isdisjoint(keys):
            unique.append(function)
            seen |= keys
    return unique


def _group(doc_id: str) -> str:
    """The top-level module, an accelerated one and its Python twin alike: `io` for `_pyio:IOBase.close`."""
    top = re.split(r"[.:]", doc_id, maxsplit=1)[0]
    return top.removeprefix("_py").lstrip("_").split("_")[0] if top.startswith("_") else top
