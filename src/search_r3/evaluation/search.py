"""Searching a collection with one model: what `search-r3 search` shows."""

from __future__ import annotations

from dataclasses import dataclass

from ..data.collection import Collection, Document
from ..model.encoder import SearchR3
from ..model.prompts import Mode
from .benchmark import Progress, index_documents


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
        collection: what is searched; it is encoded here.
        progress: called with the number of documents encoded, after each batch.
    """

    def __init__(self, model: SearchR3, collection: Collection, progress: Progress | None = None) -> None:
        self.model, self.collection = model, collection
        self.index = index_documents(model, collection, progress=progress)

    def search(self, query: str, mode: Mode = "reason", k: int = 10) -> Answer:
        """Rank the documents for one query.

        Raises:
            DataError: the query is empty.
        """
        encoded = self.model.encode_query([query], mode)
        found = self.index.search(encoded.vectors, k)
        documents = [
            (self.collection.documents[doc_id], float(score))
            for doc_id, score in zip(found.doc_ids[0], found.scores[0], strict=True)
        ]
        return Answer(
            encoded.reasoning[0],
            encoded.reasoning_tokens[0],
            encoded.forced[0],
            encoded.truncated[0],
            documents,
        )
