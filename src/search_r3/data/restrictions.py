"""Which documents can stand in a query's ranking; `retrieval.ranking` ranks under it, and names who does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .collection import Collection


@dataclass(frozen=True, kw_only=True)
class Restrictions:
    """What one ranking may hold: never `left_out`, and nothing but `pool` where there is one."""

    left_out: frozenset[str] = frozenset()
    pool: frozenset[str] | None = None

    def allow(self, doc_id: str) -> bool:
        """Whether this document can be ranked.

        Example:
            >>> limits = Restrictions(left_out=frozenset({"a"}), pool=frozenset({"a", "b"}))
            >>> [limits.allow(doc_id) for doc_id in "abc"]
            [False, True, False]
        """
        return doc_id not in self.left_out and (self.pool is None or doc_id in self.pool)


def restrictions(
    collection: Collection, query_id: str, relevance: Mapping[str, int], *, keep_identical_ids: bool = False
) -> Restrictions:
    """The restrictions of one query.

    Left out are the documents that the collection excludes for it and, as BEIR does, the one that bears the query's id
    (ArguAna, Quora: it is the query itself) unless it is judged relevant.

    Args:
        collection: holds the lists.
        query_id: the query.
        relevance: its judgements, doc_id -> relevance.
        keep_identical_ids: rank the document that bears the query's id like any other.
    """
    left_out = collection.excluded.get(query_id, frozenset())
    if not keep_identical_ids and query_id in collection.documents and relevance.get(query_id, 0) <= 0:
        left_out |= {query_id}
    return Restrictions(left_out=left_out, pool=collection.pools.get(query_id))
