"""The app: all routes, no cookies, no CORS."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from ...errors import SearchR3Error
from ...extras import extra
from ..engine import EngineThread
from ..store import Store
from . import documents, embeddings, rerank, search
from .errors import response_to
from .gate import Gate
from .mcp import create_mcp
from .service import Reranker, ServerSettings, Service

with extra("serve"):
    from fastapi import FastAPI
    from fastapi.exceptions import RequestValidationError
    from mcp.server.transport_security import TransportSecuritySettings
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException


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
    )
    service = Service(engine, settings, store, reranker)
    app.state.service = service
    tools = create_mcp(service)
    for room in (embeddings, rerank, search, documents):
        app.include_router(room.router)
    # Its own checks of hosts are off: the gate's are for all routes.
    app.router.routes += tools.streamable_http_app(
        json_response=True,
        stateless_http=True,
        max_request_body_size=settings.max_body,
        transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),
    ).routes
    for kind in (SearchR3Error, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, response_to)
    app.add_middleware(Gate, service=service)
    return app
