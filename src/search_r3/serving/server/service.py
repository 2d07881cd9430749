"""What the routes share: the engine, the store, limits, and how a request waits for its texts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Annotated, Protocol

from ...data.documents import Chunk
from ...data.reading.chunks import Chunking
from ...errors import ConfigError, DataError, ModelError, NotFoundError, SearchR3Error, TooLargeError
from ...extras import extra
from ...model.documents import document_chunking
from ...model.modes.auto import gate_of
from ...model.modes.first import decides
from ...model.modes.gate import Choice
from ...model.prompts import Kind, Mode
from ..auto import who_thinks
from ..engine import EngineThread
from ..filters import Filter
from ..jobs import Outcome, joined
from ..store import Store
from .metrics import Metrics

with extra("serve"):
    from fastapi import Depends, Request
    from starlette.concurrency import run_in_threadpool


LOCAL = ("127.0.0.1", "::1", "localhost")
"""Names of this machine."""


class Reranker(Protocol):
    """Scores texts for a query, a higher one for a better text; called by one thread at a time."""

    def __call__(self, query: str, texts: Sequence[str]) -> Sequence[float]:
        """One score a text."""
        ...


@dataclass(frozen=True)
class ServerSettings:
    """Names and limits; `/info` publishes them.

    Attributes:
        name: of the model, beside `search-r3`.
        token: what clients must send (`Authorization: Bearer TOKEN`); None: nothing.
        mode: of queries that ask for none; None: the model's own.
        max_batch: texts in one request.
        max_body: bytes of one request.
        timeout: seconds until a request is given up.
        dimensions: that stage 1 trained (`sft.matryoshka_dimensions`), to which vectors may be cut.
        host: where it listens. At this machine alone and without a token, what was sent to another host, or by another
            host's page, is refused: else a page of the web could ask through the user's browser (DNS rebinding).
    """

    name: str = "search-r3"
    token: str | None = None
    mode: Mode | None = None
    max_batch: int = 512
    max_body: int = 8 * 2**20
    timeout: float = 300.0
    dimensions: tuple[int, ...] = ()
    host: str = ""

    def __post_init__(self) -> None:
        if self.token is not None and not self.token.strip():
            raise ConfigError("the token is empty, so everybody has it; give one of some characters, or none at all")

    @property
    def local(self) -> bool:
        """Whether other hosts are refused."""
        return self.token is None and self.host in LOCAL


class Service:
    """An engine, and where there are some a store and a cross-encoder."""

    def __init__(
        self, engine: EngineThread, settings: ServerSettings, store: Store | None, reranker: Reranker | None
    ) -> None:
        self.engine, self.settings, self._store, self.reranker = engine, settings, store, reranker
        self.metrics = Metrics(engine)
        self._reranking = asyncio.Lock()
        # A request that fits into the limits fits into the queue.
        self.max_batch = min(settings.max_batch, engine.max_queue)

    @property
    def mode(self) -> Mode:
        """Of queries that ask for none."""
        return self.settings.mode or self.engine.model.backbone.settings.mode

    @property
    def store(self) -> Store:
        """The store.

        Raises:
            NotFoundError: there is none.
        """
        if self._store is None:
            raise NotFoundError("this server has a model and no store; serve a store: search-r3 serve STORE")
        return self._store

    @property
    def has_store(self) -> bool:
        """Whether there is one."""
        return self._store is not None

    @property
    def document_instruction(self) -> str:
        """What follows each document."""
        return self._store.info.fingerprint.instruction if self._store is not None else ""

    @property
    def chunking(self) -> Chunking:
        """How the store's documents are cut."""
        info = self.store.info
        return document_chunking(
            self.engine.model.backbone.document_side,
            info.chunk_tokens,
            overlap=info.chunk_overlap,
            instruction=info.fingerprint.instruction,
        )

    async def submit(
        self,
        texts: Sequence[str],
        kind: Kind,
        *,
        instruction: str = "",
        max_new_tokens: int | None = None,
        truncate: bool = False,
        on_piece: Callable[[str], None] | None = None,
    ) -> Future[Outcome]:
        """Queue texts; errors as those of `EngineThread.submit`."""
        if len(texts) > self.max_batch:
            raise TooLargeError(f"{len(texts)} texts in one request, and the limit is {self.max_batch}; send fewer")
        return await run_in_threadpool(
            self.engine.submit,
            texts,
            kind,
            instruction=self.document_instruction if kind == "document" else instruction,
            max_new_tokens=max_new_tokens,
            truncate=truncate,
            timeout=self.settings.timeout,
            on_piece=on_piece,
        )

    async def encode(
        self,
        request: Request | None,
        texts: Sequence[str],
        kind: Kind | Mode,
        *,
        instruction: str = "",
        max_new_tokens: int | None = None,
        truncate: bool = False,
        where: Filter | None = None,
    ) -> Outcome:
        """Encode texts; who hangs up cancels it, and so does cancelling this, where there is no request to watch.

        `where` says which documents are searched; mode auto looks at the best of these.
        """
        if self.glances(kind):
            direct, choice = await self.glance(request, texts, instruction=instruction, truncate=truncate, where=where)
            thinkers = [text for text, thinks in zip(texts, choice.thinks, strict=True) if thinks]
            reasoned = None
            if thinkers:
                reasoned = await self.encode(
                    *(request, thinkers, "reason"),
                    instruction=instruction,
                    max_new_tokens=max_new_tokens,
                    truncate=truncate,
                )
            return joined(direct, reasoned, choice)
        future = await self.submit(
            texts, kind, instruction=instruction, max_new_tokens=max_new_tokens, truncate=truncate
        )
        outcome = asyncio.ensure_future(outcome_of(future))
        hanging_up = asyncio.ensure_future(_hung_up(request))
        try:
            await asyncio.wait({outcome, hanging_up}, return_when=asyncio.FIRST_COMPLETED)
            if not outcome.done():
                raise NotFoundError("the client has hung up")  # nobody reads it
            return outcome.result()
        finally:
            hanging_up.cancel()
            outcome.cancel()

    def glances(self, kind: Kind | Mode) -> bool:
        """Whether a gate looks at direct vectors first; a model that decides itself needs none."""
        return kind == "auto" and not decides(self.engine.model.backbone)

    async def glance(
        self, request: Request | None, texts: Sequence[str], *, instruction: str, truncate: bool, where: Filter | None
    ) -> tuple[Outcome, Choice]:
        """Mode auto's first look: queries in direct mode, and which of them think.

        Raises:
            ModelError: there is no gate.
        """
        gate_of(self.engine.model.backbone)
        direct = await self.encode(request, texts, "direct", instruction=instruction, truncate=truncate)
        return direct, await run_in_threadpool(who_thinks, self.engine.model, direct, self._store, where)

    async def encode_chunks(self, request: Request, chunks: Sequence[Chunk]) -> list[Outcome]:
        """Encode what is stored of documents, in requests that the limits allow; more than one is never waiting."""
        texts = [chunk.full_text for chunk in chunks]
        return [
            await self.encode(request, texts[start : start + self.max_batch], "document")
            for start in range(0, len(texts), self.max_batch)
        ]

    async def rerank(self, query: str, texts: Sequence[str]) -> list[float]:
        """Scores of the cross-encoder.

        Raises:
            DataError: there is none.
        """
        if self.reranker is None:
            raise DataError("this server has no cross-encoder; leave out rerank, or serve with --reranker MODEL")
        async with self._reranking:
            return list(await run_in_threadpool(self.reranker, query, texts))


async def outcome_of(future: Future[Outcome]) -> Outcome:
    """Wait for it; cancelling this cancels it.

    Raises:
        ModelError: whatever the model raised.
    """
    try:
        return await asyncio.wrap_future(future)
    except SearchR3Error:
        raise
    except Exception as error:
        raise ModelError(f"the model failed: {str(error).splitlines()[0] if str(error) else error!r}") from error


async def _hung_up(request: Request | None) -> None:
    if request is None:
        await asyncio.get_running_loop().create_future()
        return
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _service(request: Request) -> Service:  # else each request would wait for a thread to look this up
    service: Service = request.app.state.service
    return service


Given = Annotated[Service, Depends(_service)]
"""How a route gets it."""
