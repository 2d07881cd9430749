"""From an error to a status and a body, in one place.

TEI's routes answer in the form of text-embeddings-inference, all others in OpenAI's.
"""

from __future__ import annotations

import logging
from http import HTTPStatus

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


def _described(error: Exception) -> tuple[int, str, str, str | None]:
    """Status, TEI's kind, message, and the place in the request."""
    if isinstance(error, HTTPException):
        return error.status_code, "Validation", str(error.detail), None
    for known, status, kind in STATUSES:
        if isinstance(error, known):
            if not isinstance(error, RequestValidationError):
                return status, kind, str(error), None
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"][1:])) or str(first["loc"][0])
            return status, kind, f"{place}: {first['msg']}", place
    logger.error("a fault of the server", exc_info=error)
    return 500, "Backend", "a fault of the server; its log says more", None
