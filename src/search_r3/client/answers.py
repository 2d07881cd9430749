"""What a server answers, typed. Fields that a newer server adds are passed over.

Shapes: `N` texts, `D` vector size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from ..types import Array


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())


class Usage(_Answer):
    """The price of a request in tokens.

    Attributes:
        prompt_tokens: tokens read.
        completion_tokens: tokens of reasoning written.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Both."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
        )


@dataclass(frozen=True)
class Embeddings:
    """Vectors and their price.

    Attributes:
        vectors: `N x D`, float32, L2-normalised.
        usage: tokens of all requests together.
    """

    vectors: Array
    usage: Usage


class SearchHit(_Answer):
    """A chunk of a document that was found.

    Attributes:
        id: of the chunk.
        parent_id: of its document.
        score: cosine; BM25, the sum of reciprocal ranks or the cross-encoder's where these rank.
        snippet: the part of the text that holds most of the query's words.
        start, end: where in the document the chunk stands, in characters.
    """

    id: str
    parent_id: str
    rank: int
    score: float
    title: str = ""
    text: str
    snippet: str = ""
    path: str = ""
    page: int | None = None
    start: int = 0
    end: int = 0
    headings: list[str] = Field(default_factory=list)
    metadata: dict[str, Any] = Field(default_factory=dict)


class SearchAnswer(_Answer):
    """The reasoning about one query, the best hits first, and the price.

    Attributes:
        forced: whether the embed token had to be forced, since the reasoning was at the end of its budget.
        truncated: whether the query was too long and lost its end.
        thought: whether it was reasoned about; in mode auto the gate says so.
        gate: in mode auto the `probability` that reasoning pays, and what each thing adds to its log-odds.
        seconds: at the server: `total`, `queue`, `inference`.
    """

    query: str
    reasoning: str
    reasoning_tokens: int
    forced: bool
    truncated: bool
    thought: bool = False
    gate: Mapping[str, float] = Field(default_factory=dict)
    hits: list[SearchHit]
    usage: Usage = Usage()
    seconds: Mapping[str, float] = Field(default_factory=dict)


class RankedText(_Answer):
    """A text that was ranked: its place among those given, and its score, the cross-encoder's or a cosine."""

    index: int
    score: float = Field(validation_alias=AliasChoices("score", "relevance_score"))


class Reranking(_Answer):
    """The ranked texts, best first, and the price."""

    results: list[RankedText]
    usage: Usage = Usage()


class WriteReport(_Answer):
    """What was written: documents, their chunks, how many of these had to be encoded, and the price."""

    documents: int = 0
    chunks: int = 0
    encoded: int = 0
    usage: Usage = Usage()

    def __add__(self, other: WriteReport) -> WriteReport:
        names = "documents", "chunks", "encoded", "usage"
        return WriteReport(**{name: getattr(self, name) + getattr(other, name) for name in names})


class DocumentEntry(_Answer):
    """A document in a list: its id, title, path, source, and number of chunks."""

    id: str
    title: str = ""
    path: str = ""
    source: str = ""
    chunks: int


class StoredDocument(_Answer):
    """A document as it is stored; or one chunk of it, whose `parent_id` is the document's."""

    id: str
    parent_id: str
    title: str = ""
    text: str
    path: str = ""
    source: str = ""
    page: int | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)


class FilterField(_Answer):
    """What a `filter` can name.

    Attributes:
        name: of the field.
        list: whether documents have lists of it (`$contains`).
        values: the most frequent ones, with the number of chunks that have them.
    """

    name: str
    list: bool
    values: tuple[tuple[str | bool | int | float, int], ...]


class ServerInfo(_Answer):
    """The model and all limits.

    Attributes:
        dimension: the size of a vector.
        dimensions: smaller ones that may be asked for.
        max_input_length: tokens of one text, by kind (`reason`, `direct`, `document`).
        max_client_batch_size: texts or documents in one request.
        max_body_bytes: of one request.
        auto: whether something says in mode auto which queries think.
        store: whether there is one.
        cross_encoder: whether one ranks hits and texts.
    """

    model_id: str
    version: str
    dimension: int
    dimensions: list[int]
    max_input_length: dict[str, int]
    max_new_tokens: int
    max_client_batch_size: int
    max_concurrent_requests: int
    max_body_bytes: int
    timeout_seconds: float
    default_mode: str
    auto: bool = False
    store: bool
    cross_encoder: bool
