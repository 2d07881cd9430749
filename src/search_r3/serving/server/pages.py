"""What a browser is shown: the page at `/`, and the list of routes at `/docs`.

Files of this package, under a policy by which nothing comes from elsewhere, no script stands in a page, and no text of
a document can become HTML.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ...extras import extra

with extra("serve"):
    from fastapi import APIRouter, Request, Response

WEB = Path(__file__).parent / "web"
LOOK = Path(__file__).parents[2] / "evaluation" / "report" / "look.css"
"""Of the page of an evaluation, too."""
FILES = {
    "/": (WEB / "index.html", "text/html"),
    "/web/look.css": (LOOK, "text/css"),
    **{f"/web/{name}.css": (WEB / f"{name}.css", "text/css") for name in ("page", "docs")},
    **{
        f"/web/{name}.js": (WEB / f"{name}.js", "text/javascript")
        for name in ("page", "api", "common", "filters", "documents")
    },
}
"""Address -> file and type. Nothing else is read, whatever is asked for."""
ADDRESSES = (*FILES, "/docs")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, and asked for again: another version of the package has other files
}

router = APIRouter(include_in_schema=False)


class Field(NamedTuple):
    """Of a request: `name` is its place, such as `documents[].id`."""

    name: str
    kind: str
    default: str
    meaning: str


def file(request: Request) -> Response:
    """One of `FILES`."""
    path, kind = FILES[request.scope["route"].path]
    return _answer(request, path.read_bytes(), kind)


for _address in FILES:
    router.add_api_route(_address, file, methods=["GET", "HEAD"])


@router.api_route("/docs", methods=["GET", "HEAD"])
def docs(request: Request) -> Response:
    """All routes with their fields, from `/openapi.json`."""
    environment = Environment(
        loader=FileSystemLoader(WEB), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.get_template("docs.html").render(groups=groups_of(request.app.openapi()))
    return _answer(request, html.encode(), "text/html")


def groups_of(api: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Tag -> routes, each with its method, path, description and fields, from an OpenAPI description."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for path, methods in api["paths"].items():
        for method, route in methods.items():
            fields = [
                Field(one["name"], *_described(one["schema"], one["required"])) for one in route.get("parameters", ())
            ]
            if body := route.get("requestBody"):
                fields += _fields(body["content"]["application/json"]["schema"], api)
            entry = {"method": method.upper(), "path": path, "about": route.get("description", ""), "fields": fields}
            groups.setdefault(route["tags"][0], []).append(entry)
    return groups


def _fields(schema: Mapping[str, Any], api: Mapping[str, Any], place: str = "") -> Iterator[Field]:
    """The fields of an object, and those of objects in it."""
    members = _resolved(schema, api)
    for name, member in members.get("properties", {}).items():
        yield Field(place + name, *_described(member, name in members.get("required", ())))
        for part in (member, *member.get("anyOf", ())):
            yield from _fields(part, api, f"{place}{name}.")
            for item in (part.get("items", {}), *part.get("items", {}).get("anyOf", ())):
                yield from _fields(item, api, f"{place}{name}[].")


def _resolved(schema: Mapping[str, Any], api: Mapping[str, Any]) -> Mapping[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    members: Mapping[str, Any] = api["components"]["schemas"][name] if name else {}
    return members


def _described(schema: Mapping[str, Any], required: bool) -> tuple[str, str, str]:
    """Kind, default and meaning of a field."""
    default = "" if schema.get("default") in (None, "") else json.dumps(schema["default"])
    return _kind(schema), "required" if required else default, schema.get("description", "")


def _kind(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(kind for one in schema["anyOf"] if (kind := _kind(one)) != "null"))
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return json.dumps(schema["const"])
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}"
    return str(schema.get("type", "object"))


def _answer(request: Request, content: bytes, kind: str) -> Response:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = HEADERS | {"ETag": tag}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=f"{kind}; charset=utf-8")
