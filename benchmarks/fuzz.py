"""Generated input, half of it wrong: no traceback, no status 500, and every error says where and what to do.

    pip install search-r3[serve,dev]
    python benchmarks/fuzz.py --out runs/bench/fuzz.json          # 10,000 cases, 10 minutes
    python benchmarks/fuzz.py --cases 400                         # a minute

Cases are drawn by hypothesis from --seed: requests, made from the app's own OpenAPI page and sent to it in this process
(60 %); JSON lines, read as a collection and as documents (20 %); recipes (10 %); files of all kinds (10 %). Half of
each are as they should be, the others have parts exchanged, removed, added, cut or drawn at random.

A fault is an exception that is none of the package's own, a log record with a traceback, a status of 500, 424 or 503,
an error without a place or a remedy, and a valid case that is refused. The JSON object counts statuses and messages,
digits and quotations aside. The exit status is 1 where there is a fault.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from common import Shape, finish, machine, make_model, need, prepare, say, versions
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

SHARES = {"requests": 0.6, "lines": 0.2, "recipes": 0.1, "files": 0.1}
WORDS = [
    "a red house",
    "Tee",
    "茶 是 什么",
    "naïve café",
    "{} [] \"'",
    "drop table; --",
    "‮abc",
    "😀",
    "0",
    "<|im_end|>",
]
TEXTS = st.one_of(st.sampled_from(WORDS), st.text(min_size=1, max_size=40).map(lambda text: f"x{text}"))
NAMES = [f"d{number}" for number in range(8)] + ["a/b c", "ö#1", "100%"]
JUNK: list[Any] = [
    None, True, -1, 0, 3.5, 10**30, 1e308, "", " \n", "\ud800", "\0", "x" * 3000, [], {}, [[]], [None], {"": ""},
    {"$gte": 1}, float("nan"), ["a", 1], "../../etc/passwd", "1; DROP", [[[[1]]]],
]  # fmt: skip
REMEDY = re.compile(
    r"; |: .|should|required|expected|must|give|send|takes?|choose|not permitted|not valid", re.IGNORECASE
)
FIELDS = {
    "model": st.sampled_from(["search-r3", "search-r3:direct", "search-r3:reason", "search-r3:document"]),
    "dimensions": st.none(),
    "max_new_tokens": st.integers(1, 6),
    "k": st.integers(1, 12),
    "top_n": st.integers(1, 12),
    "topk": st.integers(1, 12),
    "id": st.sampled_from(NAMES),
    "ids": st.lists(st.sampled_from(NAMES), max_size=4),
    "rerank": st.just(False),
    "normalize": st.just(True),
    "input": st.one_of(TEXTS, st.lists(TEXTS, min_size=1, max_size=4)),
    "metadata": st.dictionaries(st.sampled_from(["year", "lang"]), st.one_of(st.integers(0, 9), TEXTS), max_size=2),
    "filter": st.fixed_dictionaries(
        {},
        optional={
            "year": st.one_of(st.integers(0, 9), st.sampled_from([{"$gte": 3}, {"$in": [1, "a"]}])),
            "lang": st.one_of(TEXTS, st.lists(TEXTS, max_size=2)),
            "title": st.one_of(TEXTS, st.just({"$prefix": "d"})),
            "parent_id": TEXTS,
        },
    ),
}
"""What the page cannot say of a field."""


class Faults:
    """What was found; tracebacks that are logged count."""

    def __init__(self) -> None:
        self.cases: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()
        self.found: list[dict[str, Any]] = []
        self._logged: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = self._emit  # type: ignore[method-assign]
        logging.getLogger().addHandler(handler)

    def _emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self._logged.append(f"{record.getMessage()}: {record.exc_info[1]!r}")

    def add(self, what: str, case: Any) -> None:
        """One fault."""
        self.found.append({"fault": what[:600], "case": repr(case)[:600]})
        say(f"{self.found[-1]}")

    def message(self, text: str, place: Iterable[str], case: Any) -> None:
        """An error's text: it names one of these places and a remedy."""
        plain = re.sub(r"'(?:[^']|(?<=\w)'(?=\w))*'|\"[^\"]*\"|/\S+|\d[\d,.]*|\{.*\}", "_", text, flags=re.DOTALL)
        self.messages[plain[:160]] += 1
        if not text or "Traceback" in text or not REMEDY.search(text):
            self.add(f"no remedy: {text!r}", case)
        if not any(one and one in text for one in place):
            self.add(f"no place: {text!r}", case)

    def ended(self, case: Any) -> None:
        """The case is over; what it logged is known."""
        for line in self._logged:
            self.add(f"a traceback in the log: {line}", case)
        self._logged.clear()


def run(count: int, number: int, strategy: Callable[[bool], Any], check: Callable[[Any], None]) -> None:
    """So many cases, half of them valid, none of them shrunk or kept."""
    for valid in (True, False):
        checked = given(strategy(valid))(check)
        checked = settings(
            max_examples=max(1, count // 2), deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )(checked)  # fmt: skip
        seed(number)(checked)()


def spoiled(draw: Any, value: Any) -> Any:
    """JSON of which one or two parts are exchanged, removed or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 2))):
        parents = [(None, None)]
        parents += _places(value)
        holder, key = draw(st.sampled_from(parents))
        junk = copy.deepcopy(draw(st.one_of(st.sampled_from(JUNK), TEXTS)))
        if holder is None:
            if isinstance(value, dict) and draw(st.booleans()):
                value[draw(st.sampled_from(["unknown", "", "query", "text"]))] = junk
            elif draw(st.integers(0, 5)) == 0:
                value = junk
        elif draw(st.integers(0, 2)) == 0:
            del holder[key]
        else:
            holder[key] = junk
        if not isinstance(value, dict | list):
            break
    return value


def _places(value: Any) -> list[Any]:
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    return [place for key in keys for place in [(value, key), *_places(value[key])]]


def of_schema(schema: dict[str, Any], page: dict[str, Any], name: str = "") -> Any:
    """What fits a schema of the OpenAPI page."""
    if name in FIELDS:
        return FIELDS[name]
    if "$ref" in schema:
        return of_schema(page["components"]["schemas"][schema["$ref"].rpartition("/")[2]], page)
    if "anyOf" in schema:
        return st.one_of([of_schema(one, page) for one in schema["anyOf"]])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    kind = schema.get("type")
    if kind == "object":
        fields = schema.get("properties", {})
        needed = set(schema.get("required", ()))
        parts = {key: of_schema(one, page, key) for key, one in fields.items()}
        return st.fixed_dictionaries(
            {key: parts[key] for key in parts if key in needed},
            optional={key: parts[key] for key in parts if key not in needed},
        )
    if kind == "array":
        return st.lists(of_schema(schema["items"], page), min_size=1, max_size=4, unique_by=_identity)
    return {"boolean": st.booleans(), "null": st.none(), "integer": st.integers(1, 9)}.get(kind, TEXTS)


def _identity(value: Any) -> Any:
    return value["id"] if isinstance(value, dict) and "id" in value else json.dumps(value)


@st.composite
def requests(draw: Any, page: dict[str, Any], valid: bool) -> dict[str, Any]:
    """Method, path, headers, body; `valid` says what is meant."""
    routes = [(path, method) for path, methods in page["paths"].items() for method in methods]
    path, method = draw(st.sampled_from([one for one in routes for _ in range(5 if one[1] != "get" else 1)]))
    operation = page["paths"][path][method]
    headers, content = dict[str, str](), b""
    path = path.replace("{doc_id}", quote(draw(st.sampled_from([*NAMES, "d0#0", "nobody"])), safe="/"))
    if "requestBody" in operation:
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        body = draw(of_schema(schema, page))
        headers["content-type"] = "application/json"
        how = "valid" if valid else draw(st.sampled_from(["spoiled"] * 6 + ["bytes", "cut", "type", "deep"]))
        content = json.dumps(spoiled(draw, body) if how == "spoiled" else body).encode()
        if how == "bytes":
            content = draw(st.binary(max_size=60))
        elif how == "cut":
            content = content[: draw(st.integers(0, len(content)))]
        elif how == "deep":
            content = b'{"query":' + b"[" * 5000
        elif how == "type":
            headers["content-type"] = draw(st.sampled_from(["text/plain", "application/xml", "", "application/json;x"]))
    elif not valid:
        change = draw(st.sampled_from(["query", "path", "method"]))
        junk = quote(draw(st.one_of(st.sampled_from(["-1", "x", "1e9", "\0", ""]), TEXTS)))
        path += f"?limit={junk}&after={junk}" if change == "query" else f"/{junk}" if change == "path" else ""
        method = draw(st.sampled_from(["post", "patch", "trace"])) if change == "method" else method
    return {"method": method, "path": path, "headers": headers, "content": content, "valid": valid}


def ask(client: Any, page: dict[str, Any], faults: Faults, count: int, number: int) -> None:
    """Requests."""

    def check(case: dict[str, Any]) -> None:
        faults.cases["requests valid" if case["valid"] else "requests spoiled"] += 1
        try:
            answer = client.request(case["method"], case["path"], content=case["content"], headers=case["headers"])
        except Exception as error:
            faults.add(f"{type(error).__name__}: {error}", case)
            return
        faults.outcomes[f"requests {answer.status_code}"] += 1
        if answer.status_code in (424, 500, 503):
            faults.add(f"status {answer.status_code}: {answer.text}", case)
        # There may be no such document.
        elif answer.status_code != 200 and case["valid"] and answer.status_code != 404:
            faults.add(f"a valid request is refused with {answer.status_code}: {answer.text}", case)
        elif answer.status_code >= 400:
            error = answer.json()["error"]
            text, param = (error, "") if isinstance(error, str) else (error["message"], error["param"] or "")
            words = re.findall(r"\w+", case["path"] + case["content"].decode(errors="replace"))
            param = param or next(iter(re.findall(r"^([\w.]+): ", text)), "")
            nouns = ["text", "query", "document", "body", "route", "request", "method", "path"]
            faults.message(text, [param, *nouns, *(word for word in words if len(word) > 3)], case)
        elif b"event: error" in answer.content:
            faults.add(f"events with an error: {answer.text}", case)
        faults.ended(case)

    run(count, number, lambda valid: requests(page, valid), check)


@st.composite
def lines(draw: Any, valid: bool) -> tuple[bool, bytes]:
    """A `corpus.jsonl`."""
    rows: list[Any] = [
        {"_id": f"d{place}", "title": draw(TEXTS), "text": draw(TEXTS), "metadata": {"year": place}}
        for place in range(draw(st.integers(1, 4)))
    ]
    if valid:
        return valid, b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    rows[-1] = spoiled(draw, rows[-1])
    content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    how = draw(st.sampled_from(["as it is"] * 4 + ["cut", "bytes", "again"]))
    if how == "cut":
        content = content[: draw(st.integers(0, len(content)))]
    elif how == "bytes":
        content += draw(st.binary(max_size=30))
    return valid, content * 2 if how == "again" else content


def attempt(faults: Faults, kind: str, case: tuple[bool, Any], place: Path, action: Callable[[], Any]) -> None:
    """Do something with a file; an error of the package must name the file and a remedy."""
    from search_r3.errors import SearchR3Error

    valid, content = case
    faults.cases[f"{kind} {'valid' if valid else 'spoiled'}"] += 1
    try:
        action()
        faults.outcomes[f"{kind} taken"] += 1
    except SearchR3Error as error:
        faults.outcomes[f"{kind} refused"] += 1
        if valid:
            faults.add(f"valid {kind} are refused: {error}", content)
        faults.message(str(error), [str(place), place.name], content)
    except Exception as error:
        faults.add(f"{kind}: {type(error).__name__}: {error}", content)
    faults.ended(content)


def read_lines(folder: Path, faults: Faults, count: int, number: int) -> None:
    """JSON lines: as a collection, and as documents of one's own."""
    from search_r3 import read_documents
    from search_r3.data.collection import Collection

    collection, own = folder / "collection", folder / "own.jsonl"
    (collection / "qrels").mkdir(parents=True)
    (collection / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\n")

    def check(case: tuple[bool, bytes]) -> None:
        (collection / "corpus.jsonl").write_bytes(case[1])
        (collection / "queries.jsonl").write_text('{"_id": "q0", "text": "where?"}\n')
        attempt(faults, "lines", case, collection, lambda: Collection.load(collection))
        own.write_bytes(case[1])
        attempt(faults, "tables", case, own, lambda: list(read_documents(own)))

    run(count // 2, number, lines, check)


@st.composite
def recipes(draw: Any, shipped: list[dict[str, Any]], valid: bool) -> tuple[bool, bytes]:
    """A recipe, as it is shipped or spoiled."""
    values = draw(st.sampled_from(shipped))
    if valid:
        return valid, yaml.safe_dump(
            values | {"seed": draw(st.integers(0, 99)), "name": draw(st.sampled_from(NAMES))}
        ).encode()
    how = draw(st.sampled_from(["spoiled"] * 5 + ["cut", "bytes"]))
    text = yaml.safe_dump(_plain(spoiled(draw, values))).encode(errors="surrogatepass")
    if how == "cut":
        text = text[: draw(st.integers(0, len(text)))]
    return valid, text + draw(st.binary(min_size=1, max_size=20)) if how == "bytes" else text


def _plain(value: Any) -> Any:
    """Without half surrogate pairs, which YAML cannot write."""
    return json.loads(json.dumps(value).replace("\\ud800", "")) if isinstance(value, dict | list) else value


def read_recipes(folder: Path, faults: Faults, count: int, number: int) -> None:
    """Recipes."""
    from search_r3.config import load_recipe

    root = Path(__file__).parents[1] / "recipes"
    shipped = [load_recipe(path).model_dump(mode="json") for path in sorted(root.glob("*.yaml"))]
    path = folder / "recipe.yaml"

    def check(case: tuple[bool, bytes]) -> None:
        path.write_bytes(case[1])
        attempt(faults, "recipes", case, path, lambda: load_recipe(path))

    run(count, number, lambda valid: recipes(shipped, valid), check)


PDF = (
    b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj 2 0 obj<</Type/Pages/Kids[]/Count 0>>endobj\n"
    b"trailer<</Root 1 0 R>>"
)
TABLES = (".csv", ".tsv", ".jsonl")
FILES = {
    ".txt": b"A red house.\n\nA boat.",
    ".md": b"# Tea\n\nGreen tea.\n\n## Pots\n\n```\ncode\n```\n",
    ".html": b"<html><title>Tea</title><body><h1>Tea</h1><p>Green &amp; black.</p><script>x()</script></body></html>",
    ".csv": b'id,title,text\n1,Tea,Green tea\n2,Pot,"A, pot"\n',
    ".tsv": b"id\ttext\n1\tGreen tea\n",
    ".jsonl": b'{"id": "1", "text": "Green tea"}\n',
    ".py": b"def tea():\n    return 'green'\n",
    ".pdf": PDF,
    ".parquet": b"PAR1\x15\x00PAR1",
}


@st.composite
def files(draw: Any, valid: bool) -> tuple[bool, tuple[str, bytes]]:
    """A file of any kind; what is valid is text, or a table."""
    suffix = draw(st.sampled_from(sorted(FILES.keys() - {".pdf", ".parquet"} if valid else FILES)))
    content = FILES[suffix]
    if valid:
        # A row of such a text may be several.
        return valid, (suffix, content if suffix in TABLES else content + draw(TEXTS).encode())
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(content)))
        junk = draw(
            st.one_of(st.binary(max_size=20), st.sampled_from([b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"<", b'"']))
        )
        content = content[:place] + junk + content[place + draw(st.integers(0, 9)) :]
    return valid, (suffix, content)


def read_files(folder: Path, faults: Faults, count: int, number: int) -> None:
    """Files in a folder beside a good one: whatever they are, that one is read, and they are read or counted."""
    from search_r3 import read_documents

    root = folder / "files"
    root.mkdir()

    def check(case: tuple[bool, tuple[str, bytes]]) -> None:
        suffix, content = case[1]
        path = root / f"one{suffix}"
        path.write_bytes(content)
        (root / "good.txt").write_text("A good one.")

        def read() -> None:
            stream = read_documents(root)
            names = {chunk.parent_id for chunk in stream}
            if "good.txt" not in names:
                faults.add("a broken file keeps a good one from being read", case)
            no_rows = suffix in TABLES and not content.partition(b"\n")[2].strip()
            if not names - {"good.txt"} and not stream.report.skipped and content.strip() and not no_rows:
                faults.add("a file is neither read nor counted", case)

        attempt(faults, "files", case, root, read)
        path.unlink()

    run(count, number, files, check)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the JSON object here too")
    options = parser.parse_args()
    need("torch", "transformers", "fastapi", "lancedb", "hypothesis")
    prepare(options)
    from fastapi.testclient import TestClient

    from search_r3 import SearchR3
    from search_r3.serving import Fingerprint, Store
    from search_r3.serving.engine import EngineThread
    from search_r3.serving.server import ServerSettings, create_app

    logging.getLogger("search_r3").setLevel(logging.ERROR)
    faults, started = Faults(), time.monotonic()
    counts = {kind: round(share * options.cases) for kind, share in SHARES.items()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = SearchR3(
            make_model(folder / "model", WORDS * 20, Shape(1, 64), 500, 512), device="cpu", max_new_tokens=4
        )
        store = Store.create(folder / "store", Fingerprint.of(model))
        with EngineThread(model) as engine:
            app = create_app(engine, ServerSettings(max_batch=64, max_body=100_000), store=store)
            client = TestClient(app, raise_server_exceptions=False)
            page = client.get("/openapi.json").json()
            documents = [
                {"id": name, "text": f"{word} {name}", "metadata": {"year": 3}}
                for name, word in zip(NAMES, WORDS, strict=False)
            ]
            assert client.put("/v1/documents", json={"documents": documents}).status_code == 200
            parts: dict[str, Callable[[int], None]] = {
                "requests": lambda count: ask(client, page, faults, count, options.seed),
                "lines": lambda count: read_lines(folder, faults, count, options.seed),
                "recipes": lambda count: read_recipes(folder, faults, count, options.seed),
                "files": lambda count: read_files(folder, faults, count, options.seed),
            }
            for kind, part in parts.items():
                part(counts[kind])
                say(f"{kind}: {sum(faults.cases.values())} cases so far, {len(faults.found)} faults")
    record = {"benchmark": "fuzz", "cases": faults.cases, "faults": len(faults.found), "found": faults.found}
    record |= {"outcomes": faults.outcomes, "messages": dict(faults.messages.most_common())}
    record |= {"seconds": round(time.monotonic() - started, 1), "seed": options.seed}
    finish({**record, "versions": versions("hypothesis", "fastapi", "pydantic"), "machine": machine()}, options.out)
    sys.exit(1 if faults.found else 0)


if __name__ == "__main__":
    main()
