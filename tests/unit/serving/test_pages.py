"""What a browser gets: files of the package alone, under a strict policy, open where the routes are not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from search_r3.model.encoder import SearchR3
from search_r3.serving.engine import EngineThread
from search_r3.serving.server import ServerSettings, create_app, pages


@pytest.fixture(scope="module")
def client(tiny_path: Path) -> Iterator[TestClient]:
    with EngineThread(SearchR3(tiny_path, device="cpu")) as engine:
        yield TestClient(create_app(engine, ServerSettings(token="secret")), raise_server_exceptions=False)


@pytest.mark.parametrize("address", pages.ADDRESSES)
def test_a_page_may_run_its_own_scripts_and_load_nothing_else(client: TestClient, address: str) -> None:
    answer = client.get(address)  # without a token
    assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'" and policy["trusted-types"] == "'none'"
    assert "unsafe" not in str(policy) and "access-control-allow-origin" not in answer.headers
    kind = {"js": "text/javascript", "css": "text/css"}.get(address.rpartition(".")[2], "text/html")
    assert answer.headers["content-type"] == f"{kind}; charset=utf-8"


@pytest.mark.parametrize("address", ["/", "/web/page.js", "/docs"])
def test_a_browser_asks_again_and_gets_only_what_is_new(client: TestClient, address: str) -> None:
    answer = client.get(address)
    assert answer.headers["cache-control"] == "no-cache"
    same = client.get(address, headers={"If-None-Match": answer.headers["etag"]})
    assert same.status_code == 304 and same.content == b"" and same.headers["etag"] == answer.headers["etag"]
    assert client.get(address, headers={"If-None-Match": '"other"'}).content == answer.content
    head = client.head(address)
    assert head.status_code == 200 and head.headers["content-length"] == str(len(answer.content))


@pytest.mark.parametrize(
    "address",
    [
        "/openapi.json",
        "/info",
        "/v1/fields",
        "/web/",
        "/web/index.html",
        "/web/%2e%2e/pages.py",
        "/web//page.js",
        "/%09docs",
    ],
)
def test_all_else_needs_the_token(client: TestClient, address: str) -> None:
    assert client.get(address).status_code == 401
    answer = client.get(address, headers={"Authorization": "Bearer secret"})
    assert answer.status_code == (200 if address in ("/openapi.json", "/info") else 404)


def test_pages_name_only_what_is_served(client: TestClient) -> None:
    for address in ("/", "/docs"):
        names = re.findall(r'(?:href|src)="([^"#]+)"', client.get(address).text)
        assert len(names) >= 4
        for name in set(names) - {"data:,", "openapi.json", "./"}:
            assert f"/{name}" in pages.ADDRESSES
    scripts = {address: client.get(address).text for address in pages.ADDRESSES if address.endswith(".js")}
    for text in scripts.values():
        assert {f"/web/{name}" for name in re.findall(r'from "\./([^"]+)"', text)} <= scripts.keys()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|https?://", text)


def test_every_route_is_listed_with_its_fields(client: TestClient) -> None:
    text = client.get("/docs").text
    listed = set(re.findall(r"<b>(\w+)</b> <code>([^<]+)</code>", text))
    paths = client.get("/openapi.json", headers={"Authorization": "Bearer secret"}).json()["paths"]
    assert listed == {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert not {path for method, path in listed if method == "GET"} & set(pages.ADDRESSES)
    rows = dict(re.findall(r'<th scope="row"><code>([^<]+)</code></th>\s*((?:<td>.*</td>)+)', text))
    assert {"documents[].metadata", "inputs.sentences", "parameters.truncate", "filter", "after"} <= rows.keys()
    assert rows["documents[].id"] == "<td>string</td><td>required</td><td></td>"
    assert rows["encoding_format"] == "<td>float, base64</td><td>&#34;float&#34;</td><td></td>"
    assert "<code>NAME:reason</code>" in text and "`" not in text


def test_fields_of_objects_in_lists_have_their_place() -> None:
    item = {"anyOf": [{"type": "string"}, {"$ref": "#/components/schemas/B"}]}
    schemas = {
        "A": {"properties": {"b": {"type": "array", "items": item}}},
        "B": {"properties": {"c": {"const": True, "description": "m"}}, "required": ["c"]},
    }
    body = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/A"}}}}
    paths = {"/a": {"post": {"tags": ["t"], "description": "about", "requestBody": body}}}
    groups = pages.groups_of({"paths": paths, "components": {"schemas": schemas}})
    assert groups["t"][0]["fields"] == [("b", "list of string or object", "", ""), ("b[].c", "true", "required", "m")]
