"""Asking the store: our own form, and those in which reinforcement learning asks (Search-R1, R1-Searcher)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from typing import Any

from ...data.documents import Chunk
from ...data.rows import check_text
from ...errors import DataError
from ...extras import extra
from ..filters import to_sql
from ..jobs import Outcome, joined
from ..search import NOT_ENCODED, answer_of, hits_of
from ..store import Hit
from .embeddings import usage_of
from .errors import body_of
from .schemas import QueriesRequest, RetrieveRequest, SearchRequest
from .service import Given, Service, outcome_of

with extra("serve"):
    from fastapi import APIRouter, Request, Response
    from fastapi.responses import StreamingResponse
    from starlette.concurrency import run_in_threadpool


router = APIRouter()
DEPTH = 3
"""Passages for a query in the reference of Search-R1."""


@router.post("/v1/search", tags=["search"], response_model=None)
async def search(body: SearchRequest, request: Request, service: Given) -> Response | dict[str, Any]:
    """The best documents for a query, with reasoning and price; or as events while it is reasoned about."""
    return await (_streamed(body, service) if body.stream else answered(body, service, request))


async def answered(body: SearchRequest, service: Service, request: Request | None) -> dict[str, Any]:
    """What `/v1/search` answers; `request` is watched for a client that hangs up."""
    started = time.perf_counter()
    await _check(body, service)
    outcome = NOT_ENCODED
    if (kind := body.mode or service.mode) != "bm25":
        outcome = await service.encode(
            request,
            [body.query],
            kind,
            instruction=body.instruction,
            max_new_tokens=body.max_new_tokens,
            truncate=body.truncate,
            where=body.filter,
        )
    return await _answer(body, service, outcome) | _price(started, outcome)


@router.get("/v1/fields", tags=["search"])
def fields(service: Given) -> dict[str, Any]:
    """The number of chunks, and what a `filter` can name: fields and their most frequent values (of 10,000 chunks)."""
    store = service.store
    return {"chunks": len(store), "fields": store.fields()}


@router.post("/retrieve", tags=["search"])
async def retrieve(body: RetrieveRequest, request: Request, service: Given) -> dict[str, Any]:
    """In Search-R1's form."""
    lists = await _hits(body.queries, body.topk or DEPTH, body.truncate, request, service)
    documents = [[{"id": hit.chunk.doc_id, "contents": _contents(hit.chunk)} for hit in hits] for hits in lists]
    if not body.return_scores:
        return {"result": documents}
    return {
        "result": [
            [{"document": one, "score": hit.score} for one, hit in zip(found, hits, strict=True)]
            for found, hits in zip(documents, lists, strict=True)
        ]
    }


@router.post("/queries", tags=["search"])
async def queries(body: QueriesRequest, request: Request, service: Given) -> dict[str, Any]:
    """In R1-Searcher's form."""
    lists = await _hits(body.queries, body.k, body.truncate, request, service)
    answers = [[f"{hit.chunk.doc_id}\t{hit.chunk.full_text}" for hit in hits] for hits in lists]
    return {"queries": body.queries, "answers": answers}


async def _hits(texts: Sequence[str], k: int, truncate: bool, request: Request, service: Service) -> list[list[Hit]]:
    """The hits of each text. An empty one has none: a policy that learns writes such, and its client ends at errors."""
    store = service.store
    full = [text for text in texts if text.strip()]
    if not full:
        return [[] for _ in texts]
    outcome = await service.encode(request, full, service.mode, truncate=truncate)
    lists = iter(await run_in_threadpool(store.search, outcome.vectors, k=k))
    return [next(lists) if text.strip() else [] for text in texts]


def _contents(chunk: Chunk) -> str:
    """First the title, in quotes, then the text."""
    return f'"{chunk.title or chunk.parent_id}"\n{chunk.text}'


async def _check(body: SearchRequest, service: Service) -> None:
    """Refuse what cannot be answered before it is reasoned about."""
    if not body.query.strip():
        raise DataError("the query is empty; give a text with at least one visible character")
    check_text(body.query, "the query")
    _ = service.store
    to_sql(body.filter or {})
    if body.rerank and service.reranker is None:
        await service.rerank(body.query, [])


async def _answer(body: SearchRequest, service: Service, outcome: Outcome) -> dict[str, Any]:
    hits = await run_in_threadpool(
        hits_of, service.store, body.query, outcome, body.k, hybrid=body.hybrid, where=body.filter
    )
    if body.rerank and hits:
        scores = await service.rerank(body.query, [hit.chunk.full_text for hit in hits])
        hits = sorted(map(Hit, (hit.chunk for hit in hits), scores), key=lambda hit: -hit.score)
    return answer_of(body.query, outcome, hits)


def _price(started: float, outcome: Outcome) -> dict[str, Any]:
    seconds = {"total": time.perf_counter() - started, "queue": outcome.queue_seconds}
    return {"usage": usage_of(outcome), "seconds": seconds | {"inference": outcome.inference_seconds}}


async def _streamed(body: SearchRequest, service: Service) -> Response:
    """Events. What is wrong with the request is said by the status, before the first of them."""
    started = time.perf_counter()
    await _check(body, service)
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[str | None] = asyncio.Queue()
    future: Future[Outcome] = Future()

    def on_piece(piece: str) -> None:
        loop.call_soon_threadsafe(pieces.put_nowait, piece)

    kind, glance = body.mode or service.mode, None
    if kind != "bm25" and service.glances(kind):
        glance = await service.glance(
            None, [body.query], instruction=body.instruction, truncate=body.truncate, where=body.filter
        )
        kind = "reason" if glance[1].thinks[0] else "direct"
    if kind == "bm25":
        future.set_result(NOT_ENCODED)
    elif glance is not None and kind == "direct":
        future.set_result(glance[0])
    else:
        future = await service.submit(
            [body.query],
            kind,
            instruction=body.instruction,
            max_new_tokens=body.max_new_tokens,
            truncate=body.truncate,
            on_piece=on_piece,
        )

    async def events() -> AsyncIterator[str]:
        waiting = asyncio.ensure_future(outcome_of(future))
        waiting.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield _event("reasoning", {"text": piece})
            outcome = await waiting
            if glance is not None:
                outcome = joined(glance[0], outcome if glance[1].thinks[0] else None, glance[1])
            answer = await _answer(body, service, outcome)
            yield _event("hits", answer)
            yield _event("done", _price(started, outcome))
        except Exception as error:
            yield _event("error", {"error": body_of(error)})
        finally:
            waiting.cancel()

    return StreamingResponse(
        events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    )


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
