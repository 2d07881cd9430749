"""What the fuzzer draws: requests, JSON lines, recipes and files, as they should be or spoiled (hypothesis)."""

from __future__ import annotations

import copy
import json
from typing import Any
from urllib.parse import quote

import yaml
from hypothesis import strategies as st

WORDS = [
    "a red house", "Tee", "茶 是 什么", "naïve café", "{} [] \"'", "drop table; --", "\u202eabc", "😀", "0",
    "<|im_end|>",
]  # fmt: skip
TEXTS = st.one_of(st.sampled_from(WORDS), st.text(min_size=1, max_size=40).map(lambda text: f"x{text}"))
NAMES = [f"d{number}" for number in range(8)] + ["a/b c", "ö#1", "100%"]
JUNK: list[Any] = [
    None, True, -1, 0, 3.5, 10**30, 1e308, "", " \n", "\ud800", "\0", "x" * 3000, [], {}, [[]], [None], {"": ""},
    {"$gte": 1}, float("nan"), ["a", 1], "../../etc/passwd", "1; DROP", [[[[1]]]],
]  # fmt: skip
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
