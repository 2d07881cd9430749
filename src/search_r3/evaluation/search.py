"""Searching a collection with one model: what `search-r3 search` shows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..data.collection import Collection, Document
from ..model.encoder import QueryEmbeddings, SearchR3
from ..model.prompts import Mode
from ..retrieval.index import ExactIndex
from .systems import index_documents


@dataclass(frozen=True)
class Answer:
    """The reasoning about one query and the documents found, best first, with cosine scores."""

    reasoning: str
    reasoning_tokens: int
    forced: bool
    truncated: bool
    documents: list[tuple[Document, float]]


class Searcher:
    """A model and an encoded collection.

    Args:
        model: the model.
        collection: what is searched.
        index: the collection as this model encoded it; without it, it is encoded here.
        instruction: of every query.
    """

    def __init__(
        self, model: SearchR3, collection: Collection, index: ExactIndex | None = None, instruction: str = ""
    ) -> None:
        self.model, self.collection, self.instruction = model, collection, instruction
        self.index = index or index_documents(model, collection)

    def search(self, query: str, mode: Mode = "reason", k: int = 10) -> Answer:
        """Rank the documents for one query.

        Raises:
            DataError: the query is empty.
        """
        return self._answer(self.model.encode_query([query], mode, instruction=self.instruction), k)

    def stream(self, query: str, mode: Mode = "reason", k: int = 10) -> Iterator[str | Answer]:
        """Pieces of the reasoning as the model writes them, then the answer that `search` gives.

        Raises:
            DataError: the query is empty.
        """
        for piece in self.model.stream_query(query, mode, instruction=self.instruction):
            yield piece if isinstance(piece, str) else self._answer(piece, k)

    def _answer(self, query: QueryEmbeddings, k: int) -> Answer:
        hits = self.index.search(query.vectors, k)
        documents = [
            (self.collection.documents[doc_id], score)
            for doc_id, score in zip(hits.doc_ids[0], hits.scores[0].tolist(), strict=True)
        ]
        return Answer(query.reasoning[0], query.reasoning_tokens[0], query.forced[0], query.truncated[0], documents)
