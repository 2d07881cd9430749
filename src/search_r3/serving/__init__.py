"""A store of documents that is asked: each is encoded once, and again only when it changes."""

from __future__ import annotations

from ..retrieval.encoding.fingerprint import Fingerprint
from .indexing import IndexReport, index_documents
from .store import Hit, Store

__all__ = ["Fingerprint", "Hit", "IndexReport", "Store", "index_documents"]
