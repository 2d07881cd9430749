"""Searching documents with one model: what `search-r3 search` shows."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..data.collection import Document
from ..data.documents import Chunk
from ..model.embeddings import QueryEmbeddings
from ..model.encoder import SearchR3
from ..model.prompts import Mode
from ..retrieval.protocol import VectorIndex
from ..types import Array
from .systems import index_documents

SNIPPET = 300
"""Characters shown of a document."""


@dataclass(frozen=True)
class Answer:
    """The reasoning about one query and the documents found, best first, with cosine scores.

    Of a document that was cut into chunks only the best one is there. `thought` and `gate` are those of
    `QueryEmbeddings`.
    """

    reasoning: str
    reasoning_tokens: int
    forced: bool
    truncated: bool
    documents: list[tuple[Document, float]]
    query: str = ""
    thought: bool = False
    gate: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, query: str, encoded: QueryEmbeddings, documents: list[tuple[Document, float]]) -> Answer:
        """The answer to one encoded query."""
        row = encoded.reasoning[0], encoded.reasoning_tokens[0], encoded.forced[0], encoded.truncated[0]
        return cls(*row, documents, query, encoded.thought[0], encoded.gate[0])

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        hits = [
            {"rank": rank, "score": score, **_facts(document), "snippet": snippet(document.text, self.query)}
            for rank, (document, score) in enumerate(self.documents, 1)
        ]
        names = "query", "reasoning", "reasoning_tokens", "forced", "truncated", "thought"
        of_gate = {"gate": dict(self.gate)} if self.gate else {}
        return {**{name: getattr(self, name) for name in names}, **of_gate, "hits": hits}


class Searcher:
    """A model and encoded documents.

    Args:
        model: the model.
        documents: what is searched, by their ids: those of a collection, or chunks (`read_documents`).
        index: the documents as this model encoded them; without it, they are encoded here.
        instruction: of every query.
    """

    def __init__(
        self,
        model: SearchR3,
        documents: Mapping[str, Document],
        index: VectorIndex | None = None,
        instruction: str = "",
    ) -> None:
        self.model, self.documents, self.instruction = model, documents, instruction
        self.index = index or index_documents(model, documents)

    def search(self, query: str, mode: Mode | None = None, k: int = 10) -> Answer:
        """Rank the documents for one query, in the model's own mode where none is named.

        Raises:
            DataError: the query is empty.
        """
        options: dict[str, Any] = {"instruction": self.instruction, "top_scores": self._top_scores}
        return self._answer(query, self.model.encode_query([query], mode, **options), k)

    def stream(self, query: str, mode: Mode | None = None, k: int = 10) -> Iterator[str | Answer]:
        """Pieces of the reasoning as the model writes them, then the answer that `search` gives.

        Raises:
            DataError: the query is empty.
        """
        options: dict[str, Any] = {"instruction": self.instruction, "top_scores": self._top_scores}
        for piece in self.model.stream_query(query, mode, **options):
            yield piece if isinstance(piece, str) else self._answer(query, piece, k)

    def _answer(self, query: str, encoded: QueryEmbeddings, k: int) -> Answer:
        return Answer.of(query, encoded, self._best(encoded, k))

    def _top_scores(self, vectors: Array) -> Array:
        """What a gate reads of the documents."""
        return self.index.top_scores(vectors)

    def _best(self, encoded: QueryEmbeddings, k: int) -> list[tuple[Document, float]]:
        """The `k` best documents, each with its best chunk."""
        depth = k
        while True:
            hits = self.index.search(encoded.vectors, min(depth, len(self.index)))
            best: dict[str, tuple[Document, float]] = {}
            for doc_id, score in zip(hits.doc_ids[0], hits.scores[0].tolist(), strict=True):
                document = self.documents[doc_id]
                best.setdefault(document.parent_id if isinstance(document, Chunk) else doc_id, (document, score))
            if len(best) >= k or depth >= len(self.index):
                return list(best.values())[:k]
            depth *= 4


def snippet(text: str, query: str, length: int = SNIPPET) -> str:
    """The part of a text, on one line, that holds most of a query's words; its beginning where none does.

    Example:
        >>> snippet("Pots are heavy. Tea is green. Cups are not.", "green tea", 24)
        '… Tea is green. Cups …'
    """
    line = " ".join(text.split())
    if len(line) <= length:
        return line
    length -= 4  # of the dots and their blanks
    wanted = set(re.findall(r"\w+", query.lower()))
    hits = [match.start() for match in re.finditer(r"\w+", line) if match[0].lower() in wanted]
    start = max(hits, key=lambda hit: bisect_left(hits, hit + length) - bisect_left(hits, hit), default=0)
    before = max(0, start - length // 4)
    sentences = [match.end() for match in re.finditer(r"[.!?] ", line[before:start])]
    start = min(before + sentences[-1] if sentences else start, len(line) - length) if start else 0
    piece = line[start : start + length]
    if start + length < len(line):
        piece = f"{piece.rpartition(' ')[0] or piece} …"
    return f"… {piece.strip()}" if start else piece


def _facts(document: Document) -> dict[str, Any]:
    """What a document says of itself, for JSON."""
    facts: dict[str, Any] = {
        "id": document.doc_id,
        "parent_id": document.doc_id,
        "title": document.title,
        "text": document.text,
    }
    if isinstance(document, Chunk):
        names = "parent_id", "path", "page", "start", "end", "content_hash"
        facts |= {name: getattr(document, name) for name in names}
        facts |= {"headings": list(document.headings), "metadata": dict(document.metadata)}
    return facts
