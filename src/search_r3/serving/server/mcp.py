"""The tools of agents (Model Context Protocol): `search` and `fetch`, as clients that do deep research expect them.

They are the routes `/v1/search` and `/v1/documents/ID` in another form; what is wrong is an error of the tool.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from pydantic import BaseModel, Field

from ...errors import OverloadedError, SearchR3Error
from ...extras import extra
from ...modes import SearchMode
from .documents import read
from .schemas import Count, SearchRequest
from .search import answered
from .service import Service

with extra("serve"):
    from mcp.server import MCPServer
    from mcp.server.mcpserver import Context
    from mcp.server.mcpserver.exceptions import ToolError
    from mcp.types import ToolAnnotations
    from starlette.concurrency import run_in_threadpool

INSTRUCTIONS = (
    "Searches documents by meaning. `search` gives the best passages, `fetch` the text of one of them, or of a whole "
    "document. A question in plain words, of several steps too, finds more than keywords do."
)
Mode = Annotated[
    SearchMode | None,
    Field(description="`reason` thinks first; `direct` is quicker; `auto`: where it pays; `bm25`: its words."),
]
Where = Annotated[
    dict[str, Any] | None,
    Field(
        description="Only documents that fit, by path, title, source, page or fields of their metadata, e.g. "
        '{"year": {"$gte": 2020}, "lang": ["en", "de"]}.'
    ),
]
READING = ToolAnnotations(read_only_hint=True, open_world_hint=False)


class Result(BaseModel):
    """A passage that was found; its text where that was asked for."""

    id: str
    title: str
    url: str
    text: str | None = Field(None, exclude_if=lambda text: text is None)


class Results(BaseModel):
    """Best first, one of each document."""

    results: list[Result]


class FetchedText(BaseModel):
    """A passage, or a whole document; `metadata.document` is the id of the document."""

    id: str
    title: str
    text: str
    url: str
    metadata: dict[str, Any]


def create_mcp(service: Service | Callable[[], Service]) -> MCPServer[Any]:
    """The tools; `run("stdio")` serves them to one client, `streamable_http_app` to many.

    Args:
        service: with a store, else every call is an error that says so. Or what makes it, which is called in a thread
            when a client is there (over stdio): it is told of the tools at once, and its calls wait.
    """
    loading = _Loading(service)
    # At INFO it would log each call that failed; the caller is told.
    server: MCPServer[Any] = MCPServer(
        "search-r3",
        instructions=INSTRUCTIONS,
        version=version("search-r3"),
        log_level="WARNING",
        lifespan=loading.session,
    )

    @server.tool(annotations=READING)
    async def search(
        query: Annotated[str, Field(description="What to look for: a question or a description in plain words.")],
        ctx: Context[Any, Any],
        k: Annotated[Count, Field(description="How many passages.")] = 10,
        mode: Mode = None,
        filter: Where = None,
        hybrid: Annotated[bool, Field(description="Look for the words, too.")] = False,
        texts: Annotated[bool, Field(description="Give the texts of the passages, too.")] = False,
    ) -> Results:
        """Search the documents; the best passages come first. `fetch` gives the text of one by its id."""
        with _as_tool_errors():
            made = await loading.ready()
            if filter:
                await run_in_threadpool(made.store.check_filter, filter)
            body = SearchRequest(query=query, k=k, mode=mode, filter=filter, hybrid=hybrid)
            answer = await answered(body, made, ctx.request_context.request)
        return Results(
            results=[
                Result(id=hit["id"], title=_title(hit), url=_url(hit), text=hit["text"] if texts else None)
                for hit in answer["hits"]
            ]
        )

    @server.tool(annotations=READING)
    async def fetch(
        id: Annotated[str, Field(description="Of a passage, or of a document.")],
    ) -> FetchedText:
        """Get the text of a passage by its id; by the id of its document (`metadata.document`), all of that."""
        with _as_tool_errors():
            document = await run_in_threadpool(read, id, await loading.ready())
        facts = {name: document[name] for name in ("path", "source", "page") if document[name]}
        return FetchedText(
            id=id,
            title=_title(document),
            text=document["text"],
            url=_url(document),
            metadata={**document["metadata"], **facts, "document": document["parent_id"]},
        )

    return server


class _Loading:
    """A service, or what makes it in a thread once a session has begun."""

    def __init__(self, service: Service | Callable[[], Service]) -> None:
        self._made: Future[Service] = Future()
        self._make = service
        if isinstance(service, Service):
            self._made.set_result(service)

    async def ready(self) -> Service:
        """The service, or the error that there was."""
        return await asyncio.shield(asyncio.wrap_future(self._made))

    @asynccontextmanager
    async def session(self, _: MCPServer[Any]) -> AsyncIterator[None]:
        """Around all that is asked."""
        loading = None if self._made.done() else asyncio.ensure_future(run_in_threadpool(self._load))
        try:
            yield
        finally:
            if loading is not None:
                await loading

    def _load(self) -> None:
        assert not isinstance(self._make, Service)
        try:
            self._made.set_result(self._make())
        except BaseException as error:
            self._made.set_exception(error)


@contextmanager
def _as_tool_errors() -> Iterator[None]:
    """The SDK shows the words of a `ToolError` alone; what else is raised is a fault, and goes to the log."""
    try:
        yield
    except OverloadedError as error:
        raise ToolError(f"{error} in {error.retry_after} seconds") from error
    except SearchR3Error as error:
        raise ToolError(str(error)) from error


def _title(document: Mapping[str, Any]) -> str:
    title: str = document["title"] or document["parent_id"]
    return title


def _url(document: Mapping[str, Any]) -> str:
    """What an answer can cite: the document's own URL, its file, or else its id."""
    own = document["metadata"].get("url")
    if isinstance(own, str) and own:
        return own
    path, page = Path(document["path"]), document["page"]
    if path.is_absolute():
        return path.as_uri() + (f"#page={page}" if page else "")
    return f"search-r3:{quote(document['parent_id'])}"
