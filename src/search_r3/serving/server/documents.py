"""Documents of the store: written, read, removed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from ...data.documents import Chunk, chunks_of
from ...errors import DataError, NotFoundError, TooLargeError
from ...extras import extra
from ..store import Store
from .embeddings import usage_of
from .schemas import DocumentsRequest, IdsRequest, OneDocument
from .service import Given, Service

with extra("serve"):
    from fastapi import APIRouter, Query, Request
    from starlette.concurrency import run_in_threadpool


router = APIRouter(prefix="/v1/documents", tags=["documents"])
SOURCE = "api"
"""How `search-r3 store list` names where such documents are from."""


@router.put("")
async def write(body: DocumentsRequest, request: Request, service: Given) -> dict[str, Any]:
    """Write documents, all of them or none; when this is answered they are on the disk and are found."""
    store = service.store
    if not body.documents:
        raise DataError("no document was given; give at least one")
    if len(body.documents) > service.max_batch:
        raise TooLargeError(f"{len(body.documents)} documents, and the limit is {service.max_batch}; send fewer")
    if doubled := {one.id for one in body.documents if sum(other.id == one.id for other in body.documents) > 1}:
        raise DataError(f"the id {sorted(doubled)[0]!r} is there twice; give each document an id of its own")
    chunks, known = await run_in_threadpool(_chunks, service, store, body.documents)
    new = [chunk for chunk in chunks if chunk.full_text not in known]
    outcomes = await service.encode_chunks(request, new)
    encoded = [one for outcome in outcomes for one in outcome.texts]
    known |= {chunk.full_text: one.vector for chunk, one in zip(new, encoded, strict=True)}
    vectors = np.stack([known[chunk.full_text] for chunk in chunks])
    written = await run_in_threadpool(store.upsert, chunks, vectors)
    return {"documents": written, "chunks": len(chunks), "encoded": len(new), "usage": usage_of(*outcomes)}


@router.get("")
def entries(
    service: Given,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str, Query(description="Only ids behind this one.")] = "",
) -> dict[str, Any]:
    """Documents by their ids, and how many there are; `next` is what `after` takes for the next page."""
    found, total = service.store.page(after, limit + 1)
    names = "title", "path", "source", "chunks"
    page = [{"id": one.doc_id} | {name: getattr(one, name) for name in names} for one in found[:limit]]
    return {"documents": page, "total": total, "next": page[-1]["id"] if len(found) > limit else None}


@router.get("/{doc_id:path}")
def read(doc_id: str, service: Given) -> dict[str, Any]:
    """A document, or one chunk of it, by its id."""
    chunks = service.store.get(doc_id)
    if not chunks:
        raise NotFoundError(f"there is no document {doc_id!r}; take an id of a hit, or of the list of documents")
    first = chunks[0]
    return {
        "id": doc_id,
        "parent_id": first.parent_id,
        "title": first.title,
        "text": _whole(chunks),
        "path": first.path,
        "source": first.source,
        "page": first.page,
        "metadata": dict(first.metadata),
        "chunks": [{"id": chunk.doc_id, "start": chunk.start, "end": chunk.end} for chunk in chunks],
    }


@router.delete("/{doc_id:path}")
def remove(doc_id: str, service: Given) -> dict[str, Any]:
    """Remove a document."""
    if not service.store.delete([doc_id]):
        raise NotFoundError(f"there is no document {doc_id!r}; nothing was removed")
    return {"deleted": 1}


@router.delete("")
def remove_several(body: IdsRequest, service: Given) -> dict[str, Any]:
    """Remove documents; unknown ids are passed over."""
    return {"deleted": service.store.delete(body.ids)}


def _chunks(service: Service, store: Store, documents: Sequence[OneDocument]) -> tuple[list[Chunk], dict[str, Any]]:
    """The chunks, and full_text -> vector of what is stored already."""
    chunking = service.chunking
    there = store.documents({"parent_id": [one.id for one in documents]})
    if indexed := [one for one in there if Path(one.source).is_absolute()]:
        raise DataError(
            f"document {indexed[0].doc_id!r} was indexed from {indexed[0].source}; change it there and index it again, "
            "delete it first, or give this one another id"
        )
    chunks: list[Chunk] = []
    for one in documents:
        if not one.text.strip():
            raise DataError(f"document {one.id!r} has no text; give at least one visible character")
        chunks += chunks_of(one.id, one.text, one.title, metadata=one.metadata, chunking=chunking, source=SOURCE)
    return chunks, dict(store.vectors_of(chunks))


def _whole(chunks: Sequence[Chunk]) -> str:
    """The text that was cut into these; where they overlap it is there once, in a gap are at most two blank lines."""
    text, end = "", chunks[0].start
    for chunk in chunks:
        text += "\n" * min(3, chunk.start - end) + chunk.text[max(0, end - chunk.start) :]
        end = max(end, chunk.end)
    return text
