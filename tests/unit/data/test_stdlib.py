from __future__ import annotations

import ast
import sysconfig
import textwrap
import warnings
from pathlib import Path

import pytest

from search_r3.data.collection import Collection
from search_r3.data.generators import stdlib
from search_r3.data.generators.stdlib import build_stdlib, find_functions, summarize
from search_r3.errors import DataError

LIBRARY = {
    "json/decoder.py": '''
        class JSONDecoder:
            def decode(self, s):
                """Return the Python representation of ``s`` (a string)."""
                # the end of the value
                obj, end = self.raw_decode(s)
                end = skip(s, end).end()
                return obj
    ''',
    "json/__init__.py": '''
        def load(fp):
            """Read a value from an open file.

            More about it."""
            text = fp.read()
            value = parse(text)
            return value
    ''',
    "abc.py": '''
        def update(cls):
            """Recalculate the set of abstract methods."""
            abstracts = set()
            collect(cls, abstracts)
            return cls
    ''',
    "heapq.py": '''
        def merge(heap):
            """Combine several sorted inputs into one."""
            first = heap[0]
            rest = heap[1:]
            return first, rest
    ''',
    "json/tests/helper.py": '''
        def assist(it):
            """Support the checks of this package."""
            a = it
            b = it
            return a + b + 1
    ''',
    "bisect.py": "def broken(:\n",
    "site-packages/other.py": '''
        def foreign(it):
            """Belong to some installed package."""
            a = it
            b = it
            return a - b
    ''',
}
PASSING = '''
def {name}(a):
    """{doc}"""
    b = a + {value}
    c = b
    return c
'''


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, source in LIBRARY.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(source))
    (tmp_path / "queue.py").write_bytes(b"\xff\xfe not Python")
    (tmp_path / "other.py").write_text(PASSING.format(name="alien", doc="Stand beside the library.", value=9))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


@pytest.fixture(scope="module")
def built() -> Collection:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return build_stdlib()


def kept(source: str) -> list[str]:
    return [function.doc_id.partition(":")[2] for function in find_functions("m", source)]


def test_every_readable_module_of_the_library_gives_its_functions_and_nothing_else_does(library: Path) -> None:
    collection = build_stdlib()
    assert list(collection.documents) == ["abc:update", "heapq:merge", "json:load", "json.decoder:JSONDecoder.decode"]
    assert {query.query_id: query.text for query in collection.queries.values()} == {
        "q:abc:update": "Recalculate the set of abstract methods.",
        "q:heapq:merge": "Combine several sorted inputs into one.",
        "q:json:load": "Read a value from an open file.",
        "q:json.decoder:JSONDecoder.decode": "Return the Python representation of ``s`` (a string).",
    }
    assert collection.documents["json.decoder:JSONDecoder.decode"].text == (
        "def decode(self, s):\n"
        "    # the end of the value\n"
        "    obj, end = self.raw_decode(s)\n"
        "    end = skip(s, end).end()\n"
        "    return obj"
    )
    judged = {query: gains for part in collection.qrels.values() for query, gains in part.items()}
    assert judged == {f"q:{doc_id}": {doc_id: 1} for doc_id in collection.documents}


def test_a_python_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "python311.zip")})
    with pytest.raises(DataError, match=r"no documented Python source under .*python311\.zip; the collection needs"):
        build_stdlib()


@pytest.mark.parametrize(
    ("name", "docstring", "expected"),
    [
        ("find", "S.find(sub[, start]) -> int\n\nReturn the lowest index.", "Return the lowest index."),
        ("index", "S.index(value, [start, [stop]]) -> integer -- return first index\nof value.\n\nMore.",
         "return first index of value."),
        ("popitem", "D.popitem() -> (k, v), remove and return some pair", "remove and return some pair"),
        ("clear", "od.clear() -> None.  Remove all items from od.", "Remove all items from od."),
        ("fork", "fork() -> (pid, master_fd)\nFork and make the child a leader", "Fork and make the child a leader"),
        ("login", "(typ, [data]) = <instance>.login(user, password)\n\nIdentify client.", "Identify client."),
        ("buffer", "buffer(aBytes) -> array\nbuffer(anInteger) -> array\n\nMake one.", "Make one."),
        ("resolve", "resolve(a, 'b.c') => a.b.c\n\nResolves a dotted name.", "Resolves a dotted name."),
        ("clear", "clear(): Explicitly release parsing objects", "Explicitly release parsing objects"),
        ("clone", "t.clone() returns a new pipeline template.", "returns a new pipeline template."),
        ("get", "get(an unclosed bracket", "get(an unclosed bracket"),
        ("read_text", "Open the file; path.read_text closes it, and so does read_text.",
         "Open the file; closes it, and so does."),
        ("readLine", "Like readLines but readLine() reads one.", "Like readLines but reads one."),
        ("close", "Close the file, or call `close` or self.close() later.", "Close the file, or call or later."),
        ("copy", "Return a shallow copy\nof this list.", "Return a shallow copy of this list."),
        ("quote", "Quote a string.\n>>> quote('a b')\n'a%20b'", "Quote a string."),
        ("read", "   \n\n", ""),
    ],
)  # fmt: skip
def test_the_query_is_the_first_paragraph_without_signature_and_name(name: str, docstring: str, expected: str) -> None:
    assert summarize(name, docstring) == expected


def test_the_filters_of_codesearchnet_hold() -> None:
    doc = "Do a good thing."
    assert kept(PASSING.format(name="good", doc=doc, value=1)) == ["good"]
    assert kept(PASSING.format(name="good", doc="Do it.", value=1)) == [], "two words"
    assert kept(PASSING.format(name="good", doc="`good` Do it.", value=1)) == [], "two words but for the name"
    assert kept(PASSING.format(name="good", doc=doc, value=1).replace("    c = b\n", "\n\n")) == [], "two lines"
    assert kept(PASSING.format(name="good", doc=doc, value=1).replace(f'    """{doc}"""\n', "")) == [], "no docstring"
    for name in ("_private", "__init__", "test_it", "addTest"):
        assert kept(PASSING.format(name=name, doc=doc, value=1)) == [], name
    inner = textwrap.indent(PASSING.format(name="inner", doc=doc, value=1), "    ")
    assert kept(f"def outer():{inner}") == []
    assert kept(f"class _Hidden:{inner}") == []
    assert kept(f"class Shown:{inner}") == ["Shown.inner"]
    assert kept(f"if posix:{inner}else:{inner.replace('inner', 'windows')}") == ["inner", "windows"]
    assert kept(f"try:{inner}except E:{inner.replace('inner', 'instead')}") == ["inner", "instead"]
    assert kept(PASSING.format(name="good", doc=doc, value=1).replace("def", "async def")) == ["good"]


def test_code_that_shares_a_line_with_the_docstring_is_left_out() -> None:
    rest = "    b = a\n    c = b\n    return c\n"
    assert kept(f'def good(a,\n         b):\n    """Do a good thing."""\n{rest}') == ["good"]
    assert kept('def good(a,\n         b): """Do a good thing."""; c = 1; d = 2; return a') == []
    assert kept(f'def good(a):\n    """Do a good thing."""; x = 1\n{rest}') == []


def test_code_is_kept_as_written() -> None:
    source = textwrap.dedent(
        '''
        class A:
            @property
            def good(self, a: int = 0x10,
                     b='x') -> None:
                # before the docstring
                """Do a good thing."""
                \x0c
                text = """
        flush left
            """  # a comment
                return  text
        '''
    )
    (function,) = find_functions("m", source)
    assert function.code == (
        "def good(self, a: int = 0x10,\n"
        "         b='x') -> None:\n"
        "    # before the docstring\n"
        "\n"
        '    text = """\n'
        "flush left\n"
        '"""  # a comment\n'
        "    return  text"
    )


def test_only_the_first_of_several_doubles_is_kept(library: Path) -> None:
    def put(module: str, *functions: str) -> None:
        (library / f"{module}.py").write_text("".join(functions))

    first = PASSING.format(name="first", doc="Take the very first one.", value=1)
    same_body = PASSING.format(name="second", doc="Take another one instead.", value=1).replace(
        "c = b", "c  =  b  # so"
    )
    same_query = PASSING.format(name="third", doc="Take: the VERY first one", value=3)
    same_name = PASSING.format(name="first", doc="Take something quite different.", value=4)
    other = PASSING.format(name="fifth", doc="Take the very last one.", value=5)
    put("copy", first, same_name)
    put("csv", same_body, same_query, other)
    found = [doc_id for doc_id in build_stdlib().documents if doc_id.startswith(("copy", "csv"))]
    assert found == ["copy:first", "csv:fifth"]


def test_the_collection_of_this_python_is_whole(built: Collection) -> None:
    assert len(built.documents) > 1500
    assert "json.decoder:JSONDecoder.decode" in built.documents
    assert not {doc_id.partition(":")[0].split(".")[0] for doc_id in built.documents} & stdlib.LEFT_OUT
    assert not set(built.queries) & set(built.documents), "an id of both would leave the answer out of the ranking"
    assert not any(document.title for document in built.documents.values())
    bodies = [ast.dump(ast.parse(text).body[0]) for text in built.texts().values()]
    assert len(set(bodies)) == len(bodies)
    for doc_id, document in built.documents.items():
        node = ast.parse(document.text).body[0]
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef), doc_id
        assert ast.get_docstring(node) is None, doc_id
    texts = {query.text.lower() for query in built.queries.values()}
    assert len(texts) == len(built.queries)


def test_no_module_stands_in_two_splits_and_the_shares_are_kept(built: Collection) -> None:
    def modules(split: str) -> set[str]:
        names = {query_id.split(":")[1].split(".")[0] for query_id in built.qrels[split]}
        return {name.removeprefix("_py").lstrip("_") for name in names}

    splits = {split: modules(split) for split in stdlib.SPLIT_SHARES}
    assert not splits["train"] & splits["dev"]
    assert not splits["train"] & splits["test"]
    assert not splits["dev"] & splits["test"]
    assert sum(map(len, built.qrels.values())) == len(built.queries)
    for split, share in stdlib.SPLIT_SHARES.items():
        assert len(built.qrels[split]) / len(built.queries) == pytest.approx(share, abs=0.02)
        assert len(splits[split]) > 10, "no split is made of a few large modules"


def test_the_same_seed_gives_the_same_splits_and_another_others(library: Path, tmp_path: Path) -> None:
    names = ("ast", "bdb", "cmd", "code", "copy", "csv", "dis", "enum", "glob", "gzip", "hmac", "io", "nntplib", "os")
    for number, name in enumerate(names):
        text = PASSING.format(name="run", doc=f"Run the {name} of all.", value=number)
        (library / f"{name}.py").write_text(text)
    first = build_stdlib(0)
    assert build_stdlib(0).content_hash() == first.content_hash()
    other = build_stdlib(1)
    assert other.documents == first.documents
    assert other.qrels != first.qrels
    first.save(tmp_path / "saved")
    assert Collection.load(tmp_path / "saved").content_hash() == first.content_hash()


def test_a_module_and_its_python_twin_stand_together(library: Path) -> None:
    for number, name in enumerate(("io", "_pyio", "datetime", "_pydatetime", "collections", "_collections_abc")):
        text = PASSING.format(name="run", doc=f"Run the {name} of all.", value=number)
        (library / f"{name}.py").write_text(text)
    collection = build_stdlib()
    for one, other in (("io", "_pyio"), ("collections", "_collections_abc")):
        split = {s for s, part in collection.qrels.items() for m in (one, other) if f"q:{m}:run" in part}
        assert len(split) == 1, one
