"""Commands that answer others: over HTTP, and as a tool of an agent."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console
from ..errors import ConfigError, SearchR3Error
from .common import ModelOptions, ModeName, Untrained, app, load_encoder, takes_model_options
from .store import AskedArgument, OtherModel, StoreArgument, is_store, open_with_model

if TYPE_CHECKING:
    from ..serving.server.service import Reranker


def _server(help_text: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel="Server", **limits)


@app.command()
@takes_model_options
def serve(
    served: AskedArgument,
    options: ModelOptions,
    host: Annotated[str, _server("Address to listen at; others can reach any but 127.0.0.1.")] = "127.0.0.1",
    port: Annotated[int, _server("Port to listen at; 0 takes a free one.", min=0, max=65535)] = 8765,
    token: Annotated[
        str | None, _server("What clients must send (Authorization: Bearer TOKEN).", envvar="SEARCH_R3_TOKEN")
    ] = None,
    name: Annotated[str | None, _server("Of the model, for clients; by default the last part of its path.")] = None,
    mode: Annotated[ModeName | None, _server("Of queries that ask for none; by default the model's own.")] = None,
    slots: Annotated[int, _server("Queries reasoned about at once.", min=1)] = 64,
    max_queue: Annotated[int, _server("Queries, and documents, that may wait or be in work.", min=1)] = 1024,
    max_batch: Annotated[int, _server("Texts in one request.", min=1)] = 512,
    max_body: Annotated[int, _server("MiB of one request.", min=1)] = 8,
    timeout: Annotated[float, _server("Seconds until a request is given up.", min=1)] = 300.0,
    grace: Annotated[int, _server("Seconds for what is in work when the server ends.", min=0)] = 30,
    dimensions: Annotated[
        list[int] | None, _server("Vectors may be cut to it, as stage 1 trained it (matryoshka_dimensions); repeat it.")
    ] = None,
    reranker: Annotated[str | None, _server("Cross-encoder (directory or hub id) for the rerank routes.")] = None,
    untrained: Untrained = False,
    other_model: OtherModel = None,
) -> None:
    """Serve a store, or a model alone, over HTTP: OpenAI's embeddings, rerank, search, documents, MCP; docs/serving.md.

    Example: search-r3 serve notes.store
    """
    from ..extras import extra
    from ..serving.engine import EngineThread
    from ..serving.server import ServerSettings, create_app

    with extra("serve"):
        import uvicorn
    with _listening(host, port, token) as listening:  # before the model is loaded, which takes long
        store = None
        if is_store(served):
            store, encoder = open_with_model(served, other_model, options)
        elif other_model:
            raise ConfigError(f"{served} is no store, and --model is for one (search-r3 index)")
        else:
            encoder = load_encoder(served, options, untrained)
        model = other_model or (served if store is None else store.info.model)
        settings = ServerSettings(
            *(name or Path(model).name, token, mode.value if mode else None, max_batch, max_body * 2**20, timeout),
            dimensions=tuple(encoder.checked_dimensions(one) or 0 for one in dimensions or ()),
            host=host,
        )
        engine = EngineThread(encoder, slots=slots, max_queue=max_queue)
        config = uvicorn.Config(
            create_app(engine, settings, store=store, reranker=_cross_encoder(reranker) if reranker else None),
            log_config=None,
            timeout_graceful_shutdown=grace,
            server_header=False,
        )
        what = settings.name if store is None else f"{len(store):,} chunks of {served}"
        console.say(f"{_address(host, listening)}: {what}; a page there, routes at /docs, limits at /info; Ctrl-C ends")
        with suppress(KeyboardInterrupt):  # Ctrl-C, after what was in work
            uvicorn.Server(config).run(sockets=[listening])


@app.command()
@takes_model_options
def mcp(
    store: StoreArgument,
    options: ModelOptions,
    mode: Annotated[ModeName | None, _server("Of searches that ask for none; by default the model's own.")] = None,
    timeout: Annotated[float, _server("Seconds until a search is given up.", min=1)] = 300.0,
    other_model: OtherModel = None,
) -> None:
    """Give a store to an agent: the tools `search` and `fetch`, by MCP over stdio. An agent starts this itself.

    Example: search-r3 mcp notes.store
    """
    from ..serving import Store
    from ..serving.engine import EngineThread
    from ..serving.server.mcp import create_mcp
    from ..serving.server.service import ServerSettings, Service

    settings = ServerSettings(mode=mode.value if mode else None, timeout=timeout)
    failed: list[SearchR3Error] = []
    with ExitStack() as loaded:

        def load() -> Service:
            try:
                opened, encoder = open_with_model(store, other_model, options)
            except SearchR3Error as error:
                failed.append(error)
                raise
            console.aside(f"{store}: {len(opened):,} chunks; the model is loaded")
            return Service(loaded.enter_context(EngineThread(encoder)), settings, opened, None)

        with _on_stderr():
            Store.open(store)  # what is no store is no tool
            console.aside(f"{store}: MCP over stdin and stdout")
        try:
            create_mcp(load).run("stdio")
        finally:
            with _on_stderr():  # what is still in a buffer
                pass
    if failed:
        raise failed[0]


@contextmanager
def _on_stderr() -> Iterator[None]:
    """Whatever prints, prints there: stdout is the wire of the protocol, and the SDK guards it only while it serves."""
    wire = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(wire, 1)
        os.close(wire)


def _listening(host: str, port: int, token: str | None) -> socket.socket:
    from ..serving.server.service import LOCAL

    if token is None and host not in LOCAL:
        console.aside(f"{host} can be reached from outside, and no --token is asked for: anybody may read and write")
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {host}:{port}: {error.strerror or error}; choose another --host or --port"
        ) from error
    # Connections inherit it. Without it the end of an answer waits for the client's acknowledgement, 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _address(host: str, listening: socket.socket) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"


def _cross_encoder(source: str) -> Reranker:
    from ..mining.candidates import CrossEncoderJudge

    judge = CrossEncoderJudge(source)
    return lambda query, texts: judge.scores([(query, text) for text in texts]).tolist()
