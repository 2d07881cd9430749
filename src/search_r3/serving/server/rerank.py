"""Ranking the texts of a request: by the cross-encoder where there is one, else by cosine with the query."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from ...errors import DataError
from ...extras import extra
from ..jobs import Outcome
from .embeddings import kind_of, prices, usage_of
from .schemas import RerankRequest, TextsRerankRequest
from .service import Given, Service

with extra("serve"):
    from fastapi import APIRouter, Request, Response


router = APIRouter()


@router.post("/rerank", tags=["text-embeddings-inference"])
async def rerank_texts(
    body: TextsRerankRequest, request: Request, response: Response, service: Given
) -> list[dict[str, Any]]:
    """In TEI's form, best first."""
    started = time.perf_counter()
    scores, outcomes = await _scores(request, service, body.query, body.texts, "", body.truncate)
    response.headers.update(prices(started, *outcomes))
    texts = [{"text": text} if body.return_text else {} for text in body.texts]
    return [{"index": place, "score": scores[place]} | texts[place] for place in _best_first(scores)]


@router.post("/v1/rerank", tags=["rerank"])
async def rerank_v1(body: RerankRequest, request: Request, service: Given) -> dict[str, Any]:
    """In Jina's form: documents are returned unless they are not wanted."""
    return await _reranked(body, request, service, body.return_documents is not False)


@router.post("/v2/rerank", tags=["rerank"])
async def rerank_v2(body: RerankRequest, request: Request, service: Given) -> dict[str, Any]:
    """In Cohere's form."""
    return await _reranked(body, request, service, bool(body.return_documents))


async def _reranked(body: RerankRequest, request: Request, service: Service, with_documents: bool) -> dict[str, Any]:
    kind_of(body.model, service)
    texts = [one if isinstance(one, str) else one.text for one in body.documents]
    scores, outcomes = await _scores(request, service, body.query, texts, body.instruction, body.truncate)
    results = [
        {"index": place, "relevance_score": scores[place]}
        | ({"document": {"text": texts[place]}} if with_documents else {})
        for place in _best_first(scores)[: body.top_n]
    ]
    name = f"rerank-{uuid.uuid4().hex}"
    return {"id": name, "model": body.model, "results": results, "usage": usage_of(*outcomes), "meta": {}}


async def _scores(
    request: Request, service: Service, query: str, texts: Sequence[str], instruction: str, truncate: bool
) -> tuple[list[float], list[Outcome]]:
    if not texts:
        raise DataError("there is no text to rank; give at least one")
    if service.reranker is not None:
        return await service.rerank(query, texts), []
    documents = await service.encode(request, texts, "document", truncate=truncate)
    asked = await service.encode(request, [query], service.mode, instruction=instruction, truncate=truncate)
    scores: list[float] = (documents.vectors @ asked.vectors[0]).tolist()
    return scores, [documents, asked]


def _best_first(scores: Sequence[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda place: -scores[place])
