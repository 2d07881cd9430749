"""LangChain: a retriever, and embeddings for its vector stores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, PrivateAttr

from ..extras import extra
from ..modes import Mode, SearchMode
from .source import Source, connect, facts_of, given

with extra("langchain"):
    from langchain_core.callbacks import CallbackManagerForRetrieverRun
    from langchain_core.documents import Document
    from langchain_core.embeddings import Embeddings
    from langchain_core.retrievers import BaseRetriever


class SearchR3Retriever(BaseRetriever):
    """Passages of a store, with the reasoning in their metadata.

    Attributes:
        source: a server's address, a store, or an `InProcess` or `Client`.
        k: passages, each of another document.
        mode: `reason`, `direct` or `bm25`; by default the server's or the model's own.
        instruction: follows each query.
        filter: which documents are searched, such as `{"year": {"$gte": 2020}}`.
        hybrid: ranks by words and by vectors are fused.
        rerank: a server's cross-encoder ranks the passages anew.

    Example:
        >>> retriever = SearchR3Retriever(source="http://127.0.0.1:8765", k=3)
        >>> documents = retriever.invoke("which tea is not oxidised?")  # doctest: +SKIP
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    source: Source
    k: int = 10
    mode: SearchMode | None = None
    instruction: str = ""
    filter: Mapping[str, Any] | None = None
    hybrid: bool = False
    rerank: bool = False
    _client: Any = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Connect."""
        super().model_post_init(context)
        self._client = connect(self.source)

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        names = "k", "mode", "instruction", "filter", "hybrid", "rerank"
        answer = self._client.search(query, **given(**{name: getattr(self, name) for name in names}))
        return [Document(id=hit.id, page_content=hit.text, metadata=facts_of(hit, answer)) for hit in answer.hits]


class SearchR3Embeddings(Embeddings):
    """Vectors of queries and documents.

    Args:
        source: a server's address, a model, a store (for its model), or an `InProcess` or `Client`.
        mode: of queries, `reason` or `direct`; by default the server's or the model's own.
        instruction: follows each query.
    """

    def __init__(self, source: Source, *, mode: Mode | None = None, instruction: str = "") -> None:
        self._client, self._mode, self._instruction = connect(source), mode, instruction

    def embed_query(self, text: str) -> list[float]:
        """The vector of a query."""
        vectors = self._client.encode_query(text, self._mode, instruction=self._instruction).vectors
        values: list[float] = vectors[0].tolist()
        return values

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """The vectors of documents."""
        values: list[list[float]] = self._client.encode_document(texts).vectors.tolist() if texts else []
        return values
