"""Rankings after some documents have moved, from those before: what moved is scored anew, nothing else is searched.

A step refreshes documents that its own search found. Between that search and the ranks that the reward is made of only
these documents change, so that one search of the whole corpus serves both.

Shapes: `Q` queries, `R` moved documents, `D` vector size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..parallel import Communicator
from ..retrieval.index import ExactIndex
from ..retrieval.protocol import VectorIndex
from ..retrieval.ranking import Hits, holds, search_allowed
from ..types import Array, Rows
from .scoring import QueryRows, Scorer

SLACK = 64
"""Documents beyond those wanted that a first search finds, to take the places of those that fall back."""


@dataclass(frozen=True)
class Moved:
    """Documents that moved since a search.

    Attributes:
        rows: theirs, ascending, `R`.
        before: their vectors when the search was made, `R x D`, as the index held them.
        after: their vectors now.
    """

    rows: Rows
    before: Array
    after: Array


def amend(
    index: VectorIndex,
    scorer: Scorer,
    communicator: Communicator,
    hits: Sequence[Hits],
    moved: Moved,
    vectors: Array,
    targets: Sequence[QueryRows],
    depth: int,
) -> list[Hits]:
    """The hits as a search would find them now; what cannot be told from those before is searched again.

    Args:
        index: what was searched.
        scorer: searched it.
        communicator: the processes that search together.
        hits: what was found, to a depth of `depth + SLACK`; the relevant documents have not moved since.
        moved: what has.
        vectors: of the queries, `Q x D`.
        targets: what each of them is about.
        depth: of the rankings that are wanted.
    """
    amended = _amend(index, hits, moved, vectors, targets, depth)
    # Of machines whose products differ in the last bit one might know what another does not.
    unknown = communicator.all_gather([place for place, own in enumerate(amended) if own is None])[0]
    again: dict[int, Hits] = {}
    if unknown:
        found = scorer.search(index, vectors[unknown], [targets[place] for place in unknown], depth)
        again = dict(zip(unknown, found, strict=True))
    return [again.get(place, own or hits[place]) for place, own in enumerate(amended)]


def _amend(
    index: VectorIndex, hits: Sequence[Hits], moved: Moved, vectors: Array, targets: Sequence[QueryRows], depth: int
) -> list[Hits | None]:
    """None where too much of a ranking moved to say what comes next, or where it is that of a pool."""
    rows, limits = moved.rows, [query.limits.within(moved.rows) for query in targets]
    allowed = [query.limits.allow(query.positives) for query in targets]
    places = [np.searchsorted(rows, query.positives[ok]) for query, ok in zip(targets, allowed, strict=True)]
    bars = [own.scores[ok] for own, ok in zip(hits, allowed, strict=True)]
    names = [index.doc_ids[row] for row in rows]
    _, lost = search_allowed(
        ExactIndex(names, moved.before, device=index.device), vectors, places, bars, limits, 0
    )  # fmt: skip
    now = ExactIndex(names, moved.after, device=index.device)
    near, gained = search_allowed(now, vectors, places, bars, limits, depth)
    result: list[Hits | None] = []
    for place, (own, scores) in enumerate(zip(hits, now.scores_at(vectors, near), strict=True)):
        stays = ~holds(rows, own.rows)
        all_rows = np.concatenate([own.rows[stays], rows[near[place]]])
        all_scores = np.concatenate([own.row_scores[stays], scores])
        order = np.lexsort((all_rows, -all_scores))[:depth]
        # Nothing that the search did not show scores higher than the last that it showed.
        complete = len(own.rows) < depth + SLACK
        known = complete or (len(order) == depth and all_scores[order[-1]] > own.row_scores[-1])
        if not known or targets[place].limits.pool is not None:
            result.append(None)
            continue
        ranks = np.array(own.ranks)
        change = np.array(gained[place], np.int64) - np.array(lost[place], np.int64)
        counted = ranks[allowed[place]] <= index.counts_to  # one that was not counted to its end stays so
        ranks[allowed[place]] += np.where(counted, change, 0)
        result.append(Hits(ranks.tolist(), own.scores, all_rows[order], all_scores[order]))
    return result
