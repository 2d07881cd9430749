"""The app: all routes, no cookies, no CORS."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from ...errors import SearchR3Error
from ...extras import extra
from ..engine import EngineThread
from ..store import Store
from . import documents, embeddings, pages, rerank, search
from .errors import response_to
from .gate import Gate
from .mcp import create_mcp
from .service import Reranker, ServerSettings, Service

with extra("serve"):
    from fastapi import FastAPI
    from fastapi.exceptions import RequestValidationError
    from mcp.server import MCPServer
    from mcp.server.transport_security import TransportSecuritySettings
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.routing import Match, Route
    from starlette.types import Scope


def create_app(
    engine: EngineThread,
    settings: ServerSettings = ServerSettings(),  # noqa: B008 - frozen
    *,
    store: Store | None = None,
    reranker: Reranker | None = None,
) -> FastAPI:
    """The server as an ASGI app; when it ends, it closes the engine.

    Args:
        engine: with the model.
        settings: names and limits.
        store: what is searched; opened with the model's fingerprint. Without one its routes answer 404.
        reranker: a cross-encoder.

    Raises:
        MissingExtraError: the extra `serve` is not installed.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with tools.session_manager.run():
            yield
        await run_in_threadpool(engine.close)

    app = FastAPI(
        title="search-r3",
        version=version("search-r3"),
        description="Queries are reasoned about, then embedded, then searched.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's page has its scripts from another host; `pages` has one
        redoc_url=None,
    )
    service = Service(engine, settings, store, reranker)
    app.state.service = service
    tools = create_mcp(service)
    for room in (embeddings, rerank, search, documents, pages):
        app.include_router(room.router)
    app.router.routes += _routes_of(tools, settings)
    for kind in (SearchR3Error, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, response_to)
    app.add_middleware(Gate, service=service)
    return app


class _NamedRoute(Route):
    """A route that says which it is, as FastAPI's own do: metrics are counted by it."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, found = super().matches(scope)
        return match, {**found, "route": self}


def _routes_of(tools: MCPServer[Any], settings: ServerSettings) -> list[Route]:
    """`/mcp`: without sessions, so that a server may end or be one of several; the gate checks hosts for all routes."""
    app = tools.streamable_http_app(
        json_response=True,
        stateless_http=True,
        max_request_body_size=settings.max_body,
        transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),
    )
    return [_NamedRoute(route.path, route.endpoint) for route in app.routes if isinstance(route, Route)]
