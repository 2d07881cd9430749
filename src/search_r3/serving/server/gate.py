"""What every request passes: the token or the host, the limit on its size, the count of its answer."""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from urllib.parse import urlsplit

from ...extras import extra
from . import pages
from .errors import response_to
from .service import LOCAL, Service

with extra("serve"):
    from fastapi import Request
    from starlette.exceptions import HTTPException
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


OPEN = ("/health", *pages.ADDRESSES)
"""What may be read without a token. The pages hold no data; they ask the routes, with the token that they are given."""


class Gate:
    """ASGI middleware, outside of all routes."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        request = Request(scope)
        try:
            self._check(request)
        except HTTPException as refusal:
            await response_to(request, refusal)(scope, receive, sending)
        else:
            await self.app(scope, self._counted(receive), sending)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self.service.metrics.count(route, status, time.perf_counter() - started)

    def _check(self, request: Request) -> None:
        token = self.service.settings.token
        # The path by which routes are found; that of `request.url` is made of the header Host, too.
        is_open = request.method in ("GET", "HEAD") and request.scope["path"] in OPEN
        if token is not None and not is_open:
            given = request.headers.get("authorization", "").partition("Bearer ")[2]
            if not secrets.compare_digest(given.encode(), token.encode()):
                raise HTTPException(
                    401, "a token is needed: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"}
                )
        if self.service.settings.local:
            _check_local(request)
        length = request.headers.get("content-length", "0")
        self._weigh(int(length) if length.isdigit() else 0)

    def _counted(self, receive: Receive) -> Receive:
        size = 0

        async def counting() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            self._weigh(size)
            return message

        return counting

    def _weigh(self, size: int) -> None:
        limit = self.service.settings.max_body
        if size > limit:
            raise HTTPException(413, f"a request of more than {limit} bytes; send less at once")


def _check_local(request: Request) -> None:
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    if _name(f"//{host}") not in LOCAL:
        raise HTTPException(421, f"this server is for {LOCAL[0]} alone, not for {host!r}; serve with --token")
    if origin is not None and _name(origin) not in LOCAL:
        raise HTTPException(403, f"this server is for {LOCAL[0]} alone, not for pages of {origin}; serve with --token")


def _name(address: str) -> str | None:
    with suppress(ValueError):
        return urlsplit(address).hostname
    return None
