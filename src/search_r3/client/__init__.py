"""A client of `search-r3 serve`, for programs that hold no model: importing it loads no torch."""

from __future__ import annotations

from .answers import (
    DocumentEntry,
    Embeddings,
    FilterField,
    RankedText,
    Reranking,
    SearchAnswer,
    SearchHit,
    ServerInfo,
    StoredDocument,
    Usage,
    WriteReport,
)
from .calls import SearchOptions
from .client import AsyncClient, Client

__all__ = [
    "AsyncClient",
    "Client",
    "DocumentEntry",
    "Embeddings",
    "FilterField",
    "RankedText",
    "Reranking",
    "SearchAnswer",
    "SearchHit",
    "SearchOptions",
    "ServerInfo",
    "StoredDocument",
    "Usage",
    "WriteReport",
]
