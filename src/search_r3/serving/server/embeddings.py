"""OpenAI's embeddings, and the routes of text-embeddings-inference."""

from __future__ import annotations

import base64
import time
from importlib.metadata import version
from typing import Any

from ...errors import DataError, NotFoundError, UnavailableError
from ...extras import extra
from ...model.embeddings import shorten
from ...model.modes.first import has_auto
from ...model.modes.latent import trained_modes
from ...model.prompts import MODES, Kind, Mode
from ...types import Array
from ..jobs import Outcome
from .schemas import EmbeddingsRequest, EmbedRequest, SimilarityRequest
from .service import Given, Service

with extra("serve"):
    from fastapi import APIRouter, Request, Response


router = APIRouter()
KINDS: tuple[Kind, ...] = ("reason", "direct", "document")


@router.post("/v1/embeddings", tags=["OpenAI"])
async def embeddings(body: EmbeddingsRequest, request: Request, service: Given) -> dict[str, Any]:
    """Vectors of queries or documents. Model ids are `NAME` (queries), `NAME:reason`, `:direct`, `:document`."""
    kind = kind_of(body.model, service)
    if body.input_type == "document":
        kind = "document"
    elif body.input_type == "query" and kind == "document":
        kind = service.mode
    if body.mode is not None and kind != "document":
        kind = body.mode
    texts = [body.input] if isinstance(body.input, str) else body.input
    if not all(isinstance(text, str) for text in texts):
        raise DataError("input: token ids are not taken, since this model has a tokenizer of its own; send texts")
    dimensions = checked_dimensions(body.dimensions, service)
    outcome = await service.encode(
        request,
        [str(text) for text in texts],
        kind,
        instruction=body.instruction,
        max_new_tokens=body.max_new_tokens,
        truncate=body.truncate,
    )
    vectors = shorten(outcome.vectors, dimensions)
    data = [
        {"object": "embedding", "index": place, "embedding": _written(vector, body.encoding_format)}
        for place, vector in enumerate(vectors)
    ]
    return {"object": "list", "data": data, "model": body.model, "usage": usage_of(outcome)}


@router.get("/v1/models", tags=["OpenAI"])
def models(service: Given) -> dict[str, Any]:
    """The model ids."""
    name = service.settings.name
    ids = [name, *(f"{name}:{kind}" for kind in named_kinds(service))]
    return {
        "object": "list",
        "data": [{"id": one, "object": "model", "created": 0, "owned_by": "search-r3"} for one in ids],
    }


@router.post("/", tags=["text-embeddings-inference"])
@router.post("/embed", tags=["text-embeddings-inference"])
async def embed(body: EmbedRequest, request: Request, response: Response, service: Given) -> list[list[float]]:
    """Vectors; `huggingface_hub`'s client asks at the address itself."""
    started = time.perf_counter()
    dimensions = checked_dimensions(body.dimensions, service)
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    outcome = await service.encode(request, texts, _kind_named(body.prompt_name, service), truncate=body.truncate)
    response.headers.update(prices(started, outcome))
    vectors: list[list[float]] = shorten(outcome.vectors, dimensions).tolist()
    return vectors


@router.post("/similarity", tags=["text-embeddings-inference"])
async def similarity(body: SimilarityRequest, request: Request, response: Response, service: Given) -> list[float]:
    """Cosine of a query with each document."""
    started = time.perf_counter()
    kind, truncate = _kind_named(body.parameters.prompt_name, service), body.parameters.truncate
    query = await service.encode(request, [body.inputs.source_sentence], kind, truncate=truncate)
    documents = await service.encode(request, body.inputs.sentences, "document", truncate=truncate)
    response.headers.update(prices(started, query, documents))
    scores: list[float] = (documents.vectors @ query.vectors[0]).tolist()
    return scores


@router.get("/info", tags=["server"])
def info(service: Given) -> dict[str, Any]:
    """The model and all limits."""
    engine, settings = service.engine, service.settings
    backbone = engine.model.backbone
    return {
        "model_id": settings.name,
        "model_dtype": backbone.dtype,
        "model_type": {"embedding": {"pooling": "last_token"}},
        "version": version("search-r3"),
        "dimension": engine.model.dimension,
        "dimensions": list(settings.dimensions),
        "max_input_length": {kind: engine.room(kind) for kind in KINDS},
        "max_new_tokens": backbone.settings.max_new_tokens,
        "max_concurrent_requests": engine.max_queue,
        "max_client_batch_size": service.max_batch,
        "max_body_bytes": settings.max_body,
        "timeout_seconds": settings.timeout,
        "slots": engine.slots,
        "auto_truncate": False,
        "default_mode": service.mode,
        "auto": has_auto(backbone),
        "store": service.has_store,
        "cross_encoder": service.reranker is not None,
    }


@router.get("/health", tags=["server"])
async def health(service: Given) -> dict[str, str]:
    """Whether it takes requests: 200, or 503."""
    # A coroutine: all threads for the others may be at work.
    if not service.engine.alive:
        raise UnavailableError("the engine has ended; start the server again")
    return {"status": "ok"}


@router.get("/metrics", tags=["server"], response_class=Response)
def metrics(service: Given) -> Response:
    """For Prometheus."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def kind_of(model: str, service: Service) -> Kind | Mode:
    """What a model id asks for.

    Raises:
        NotFoundError: there is no such model.
    """
    kinds = named_kinds(service)
    name, _, suffix = model.partition(":") if model.partition(":")[2] in kinds else (model, "", "")
    if name not in (service.settings.name, "search-r3"):
        known = ", ".join([service.settings.name, *(f"{service.settings.name}:{kind}" for kind in kinds)])
        raise NotFoundError(f"there is no model {model!r} here; take one of {known}")
    return next((kind for kind in kinds if kind == suffix), service.mode)


def named_kinds(service: Service) -> list[Kind | Mode]:
    """What model ids can ask for: `latent` where it was trained, `auto` where a gate or the model decides."""
    backbone = service.engine.model.backbone
    more = [mode for mode in trained_modes(backbone) if mode not in KINDS]
    return [*KINDS, *more, *(("auto",) if has_auto(backbone) else ())]


def checked_dimensions(dimensions: int | None, service: Service) -> int | None:
    """Dimensions to which vectors may be cut; None where they are whole.

    Raises:
        DataError: the model was not trained for them.
    """
    if dimensions in (None, service.engine.model.dimension):
        return None
    if dimensions not in service.settings.dimensions:
        sizes = sorted({*service.settings.dimensions, service.engine.model.dimension})
        raise DataError(
            f"dimensions={dimensions}: this server has vectors of size {', '.join(map(str, sizes))}; a model that was "
            "trained for smaller ones (sft.matryoshka_dimensions) is served with --dimensions"
        )
    return dimensions


def usage_of(*outcomes: Outcome) -> dict[str, Any]:
    """Tokens, in OpenAI's words; those of the reasoning are no part of the prompt."""
    prompt, reasoning = sum(one.prompt_tokens for one in outcomes), sum(one.reasoning_tokens for one in outcomes)
    usage: dict[str, Any] = {"prompt_tokens": prompt, "total_tokens": prompt + reasoning}
    return usage | {"completion_tokens": reasoning, "completion_tokens_details": {"reasoning_tokens": reasoning}}


def prices(started: float, *outcomes: Outcome) -> dict[str, str]:
    """TEI's headers, in milliseconds and tokens."""
    milliseconds = {
        "x-total-time": time.perf_counter() - started,
        "x-queue-time": sum(one.queue_seconds for one in outcomes),
        "x-inference-time": sum(one.inference_seconds for one in outcomes),
    }
    tokens = sum(one.prompt_tokens + one.reasoning_tokens for one in outcomes)
    return {name: str(round(1000 * value)) for name, value in milliseconds.items()} | {"x-compute-tokens": str(tokens)}


def _kind_named(name: str | None, service: Service) -> Kind | Mode:
    return next((kind for kind in (*KINDS, *MODES) if kind == name), service.mode)


def _written(vector: Array, form: str) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    floats: list[float] = vector.tolist()
    return floats
