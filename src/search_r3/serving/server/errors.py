"""From an error to a status and a body, in one place.

TEI's routes answer in the form of text-embeddings-inference, all others in OpenAI's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from ...errors import (
    ConfigError,
    DataError,
    DeadlineError,
    ModelError,
    NotFoundError,
    OverloadedError,
    StoreError,
    TooLargeError,
    UnavailableError,
    UntrainedError,
)
from ...extras import extra

with extra("serve"):
    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

logger = logging.getLogger(__name__)

TEI_PATHS = ("/", "/embed", "/similarity", "/rerank")
STATUSES: tuple[tuple[type[Exception], int, str], ...] = (
    (DataError, 400, "Empty"),
    (ConfigError, 400, "Validation"),
    (UntrainedError, 400, "Validation"),
    (NotFoundError, 404, "Validation"),
    (TooLargeError, 413, "Validation"),
    (RequestValidationError, 422, "Validation"),
    (ModelError, 424, "Backend"),
    (OverloadedError, 429, "Overloaded"),
    (StoreError, 503, "Unhealthy"),
    (UnavailableError, 503, "Unhealthy"),
    (DeadlineError, 504, "Backend"),
)

"""Error, status, and TEI's name of its kind. What is none of these is a fault of the server: 500."""


def response_to(request: Request, error: Exception) -> JSONResponse:
    """What a client is answered where a request failed."""
    if isinstance(error, HTTPException):
        error = _ours(request, error)
    status, kind, message, param = _described(error)
    headers = dict(getattr(error, "headers", None) or {})
    if isinstance(error, OverloadedError):
        headers["Retry-After"] = str(error.retry_after)
    if request.url.path in TEI_PATHS:
        return JSONResponse({"error": message, "error_type": kind}, status, headers)
    return JSONResponse({"error": body_of(error) | {"param": param}}, status, headers)


def body_of(error: Exception) -> dict[str, str | None]:
    """An error in OpenAI's form."""
    status, _, message, param = _described(error)
    kind = "invalid_request_error" if status < 424 else "server_error"
    code = HTTPStatus(status).phrase.lower().replace(" ", "_")
    return {"message": message, "type": "rate_limit_error" if status == 429 else kind, "param": param, "code": code}


def _ours(request: Request, error: HTTPException) -> HTTPException:
    """What the framework says of routes, methods and bodies, with place and remedy."""
    route = f"there is no route {request.method} {request.url.path}"
    told = {
        "Not Found": f"{route}; /docs shows them all",
        "Method Not Allowed": f"{route}; it takes another method, and /docs shows which",
        "There was an error parsing the body": "the body cannot be read as JSON; send a JSON object in UTF-8",
    }.get(str(error.detail), error.detail)
    return HTTPException(error.status_code, told, error.headers)


def _problem(first: Mapping[str, Any]) -> tuple[str, str]:
    """The place in a request, and what is wrong there."""
    place = ".".join(map(str, first["loc"][1:])) or str(first["loc"][0])
    if first["type"] == "json_invalid":
        return "body", f"not JSON at character {place} ({first['ctx']['error']}); send a JSON object"
    if place == "body" and isinstance(first.get("input"), str | bytes):
        return place, "expected a JSON object, with Content-Type: application/json"
    return place, str(first["msg"])


def _described(error: Exception) -> tuple[int, str, str, str | None]:
    """Status, TEI's kind, message, and the place in the request."""
    if isinstance(error, HTTPException):
        return error.status_code, "Validation", str(error.detail), None
    for known, status, kind in STATUSES:
        if isinstance(error, known):
            if not isinstance(error, RequestValidationError):
                return status, kind, str(error), None
            place, problem = _problem(error.errors()[0])
            return status, kind, f"{place}: {problem}", place
    logger.error("a fault of the server", exc_info=error)
    return 500, "Backend", "a fault of the server; its log says more", None
