"""LlamaIndex: a retriever, and an embedding for its indexes."""

from __future__ import annotations

import asyncio
from typing import Any, Unpack

from ..client import SearchOptions
from ..extras import extra
from ..modes import Mode
from .source import Source, connect, facts_of

with extra("llama-index"):
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.bridge.pydantic import PrivateAttr
    from llama_index.core.retrievers import BaseRetriever
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode


class SearchR3Retriever(BaseRetriever):
    """Passages of a store; of their metadata a language model is shown the document's own and the title.

    Args:
        source: a server's address, a store, or an `InProcess` or `Client`.
        options: of `SearchOptions`: `k`, `mode`, `instruction`, `filter`, `hybrid`, `rerank`, ...

    Example:
        >>> retriever = SearchR3Retriever("http://127.0.0.1:8765", k=3)
        >>> nodes = retriever.retrieve("which tea is not oxidised?")  # doctest: +SKIP
    """

    def __init__(self, source: Source, **options: Unpack[SearchOptions]) -> None:
        self._client, self._options = connect(source), options
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        answer = self._client.search(query_bundle.query_str, **self._options)
        nodes = []
        for hit in answer.hits:
            facts = facts_of(hit, answer)
            hidden = [name for name in facts if name not in hit.metadata and name != "title"]
            node = TextNode(
                id_=hit.id,
                text=hit.text,
                metadata=facts,
                excluded_llm_metadata_keys=hidden,
                excluded_embed_metadata_keys=hidden,
            )
            nodes.append(NodeWithScore(node=node, score=hit.score))
        return nodes

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


class SearchR3Embedding(BaseEmbedding):
    """Vectors of queries and documents.

    Args:
        source: a server's address, a model, a store (for its model), or an `InProcess` or `Client`.
        mode: of queries, `reason` or `direct`; by default the server's or the model's own.
        instruction: follows each query.
        options: of `BaseEmbedding`.
    """

    _client: Any = PrivateAttr()
    _mode: Any = PrivateAttr()
    _instruction: str = PrivateAttr()

    def __init__(
        self,
        source: Source,
        *,
        mode: Mode | None = None,
        instruction: str = "",
        **options: Any,
    ) -> None:
        named = str(source) if isinstance(source, str) else "search-r3"
        super().__init__(**{"model_name": named, "embed_batch_size": 256} | options)
        self._client, self._mode, self._instruction = connect(source), mode, instruction

    @classmethod
    def class_name(cls) -> str:
        """How LlamaIndex calls it."""
        return "SearchR3Embedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        vectors = self._client.encode_query(query, self._mode, instruction=self._instruction).vectors
        values: list[float] = vectors[0].tolist()
        return values

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        values: list[list[float]] = self._client.encode_document(texts).vectors.tolist()
        return values

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)
