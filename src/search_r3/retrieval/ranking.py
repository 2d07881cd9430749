"""Requests and the rankings that they allow: documents left out, pools that alone are ranked, ties of equal vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..types import Array, Rows
from .index import ExactIndex
from .lexical import Scored

MARGIN, NOISE = 32, 1e-5
"""Documents beyond the depth that are scored once more, since a matrix product may order equal ones wrongly; and the
difference of scores by which it may. Where the margin is all noise, every document is scored once more."""


@dataclass(frozen=True)
class RankRequest:
    """One query as a system sees it: `left_out` never stand in its ranking, `pool` are the only ones that can."""

    query_id: str
    text: str
    left_out: frozenset[str] = frozenset()
    pool: frozenset[str] | None = None


def ranked(index: ExactIndex, vectors: Array, requests: Sequence[RankRequest], depth: int) -> list[Scored]:
    """The documents of each request, best first, at most `depth`, under its restrictions."""
    open_requests = [i for i, request in enumerate(requests) if request.pool is None]
    found: list[Scored] = [[] for _ in requests]
    if open_requests:
        deepest = depth + MARGIN + max(len(requests[i].left_out) for i in open_requests)
        rows, products = index.search_rows(vectors[open_requests], deepest)
        for i, line, scores in zip(open_requests, rows, products, strict=True):
            last = min(depth + len(requests[i].left_out), len(line)) - 1
            tied = len(line) < len(index) and scores[last] - scores[-1] < NOISE
            found[i] = without(_scored(index, np.arange(len(index)) if tied else line, vectors[i]), requests[i], depth)
    for i, request in enumerate(requests):
        if request.pool is not None:
            pool = np.array([index.row(doc_id) for doc_id in request.pool - request.left_out], dtype=np.int64)
            found[i] = _scored(index, pool, vectors[i])[:depth]
    return found


def _scored(index: ExactIndex, rows: Rows, vector: Array) -> Scored:
    """These documents, best first. Equal vectors get equal scores, which those of a matrix product need not be."""
    scores = (index.vectors_at(rows) * vector).sum(axis=1)
    # Rows stand in descending order of doc_id, so the lower row comes first among equals, as the ranking rule says.
    order = np.lexsort((rows, -scores))
    return [(index.doc_ids[row], score) for row, score in zip(rows[order], scores[order].tolist(), strict=True)]


def without(scored: Scored, request: RankRequest, depth: int) -> Scored:
    """The first `depth` of a ranking but for what is left out of it."""
    return [(doc_id, score) for doc_id, score in scored if doc_id not in request.left_out][:depth]
