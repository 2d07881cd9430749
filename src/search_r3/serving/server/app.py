"""The app: all routes, no cookies, no CORS."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from ...errors import SearchR3Error
from ...extras import extra
from ..engine import EngineThread
from ..store import Store
from . import documents, embeddings, pages, rerank, search
from .errors import response_to
from .gate import Gate
from .service import Reranker, ServerSettings, Service

with extra("serve"):
    from fastapi import FastAPI
    from fastapi.exceptions import RequestValidationError
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
    for room in (embeddings, rerank, search, documents, pages):
        app.include_router(room.router)
    for kind in (SearchR3Error, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, response_to)
    app.add_middleware(Gate, service=service)
    return app
