"""Which documents can stand in a query's ranking; `retrieval.ranking` ranks under it, and names who does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .collection import Collection

IdenticalIds = Literal["unless-relevant", "beir", "keep"]
"""What becomes of the document that bears the id of its query (ArguAna, Quora: it is the query itself): it is left out
unless it is judged relevant; left out in any case, as BEIR does; ranked like any other."""


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
    collection: Collection,
    query_id: str,
    relevance: Mapping[str, int],
    identical_ids: IdenticalIds = "unless-relevant",
) -> Restrictions:
    """The restrictions of one query.

    Left out are the documents that the collection excludes for it, and the one that bears the query's id where
    `identical_ids` says so.

    Args:
        collection: holds the lists.
        query_id: the query.
        relevance: its judgements, doc_id -> relevance.
        identical_ids: training and rewards take the default.
    """
    left_out = collection.excluded.get(query_id, frozenset())
    own = query_id in collection.documents and identical_ids != "keep"
    if own and (identical_ids == "beir" or relevance.get(query_id, 0) <= 0):
        left_out |= {query_id}
    return Restrictions(left_out=left_out, pool=collection.pools.get(query_id))
