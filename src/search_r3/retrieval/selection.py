"""The first documents of a ranking, and the rank of one, from blocks of scores that are seen one after the other.

Blocks come in the order of rows, and among equal scores the lower row wins.

Shapes: `Q` queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

Blocks = Iterable[tuple[int, torch.Tensor]]
"""First row and scores (`rows x Q`) of each block."""


class Best:
    """The best documents of each query among the blocks seen so far, kept in rank order."""

    def __init__(self, queries: torch.Tensor) -> None:
        self.scores = queries.new_empty((len(queries), 0))  # Q x held
        self.rows = torch.empty((len(queries), 0), dtype=torch.long, device=queries.device)
        self.floor = queries.new_full((len(queries),), -torch.inf)
        self.queries = torch.arange(len(queries), device=queries.device)

    def add(self, start: int, scores: torch.Tensor, k: int) -> None:
        """Take in the scores (`rows x Q`) of the block that begins at row `start`, behind all blocks so far."""
        # An equal score in a later row ranks behind, so a newcomer has to beat the last one of k.
        passed = scores > self.floor
        if passed.count_nonzero() > 4 * k * len(self.queries):
            passed &= scores >= scores.topk(min(k, len(scores)), dim=0).values[-1]
        row, query = passed.nonzero(as_tuple=True)
        if not len(row):
            return
        held = self.rows.shape[1]
        every_query = torch.cat([self.queries.repeat_interleave(held), query])
        # Adding 0 turns -0 into 0: they are equal, but a sort by bits puts them apart.
        every_score = torch.cat([self.scores.flatten(), scores[row, query]]) + 0.0
        every_row = torch.cat([self.rows.flatten(), row + start])
        # Equal scores stand in the order of rows already, and stable sorts leave them so.
        order = every_score.sort(descending=True, stable=True).indices
        order = order[every_query[order].sort(stable=True).indices]
        sizes = every_query.bincount(minlength=len(self.queries))
        places = torch.arange(min(k, start + len(scores)), device=row.device)
        order = order[(sizes.cumsum(0) - sizes)[:, None] + places]  # Q x held
        self.scores, self.rows = every_score[order], every_row[order]
        if len(places) == k:
            self.floor = self.scores[:, -1].contiguous()


def count_better(products: Callable[[Sequence[int] | None], Blocks], target: torch.Tensor, size: int) -> torch.Tensor:
    """How many documents rank before each wanted one.

    Args:
        products: gives the blocks that begin at the rows named, or all of them; the same bits each time.
        target: rows of the wanted documents, `Q x W`.
        size: rows of a block.

    Returns:
        Counts, `Q x W`.
    """
    own = torch.zeros(target.shape, device=target.device)
    for start, scores in products(sorted(set((target // size * size).flatten().tolist()))):
        query, column = ((target >= start) & (target < start + size)).nonzero(as_tuple=True)
        own[query, column] = scores[target[query, column] - start, query]
    better = torch.zeros_like(target)
    for start, scores in products(None):
        for slot in range(target.shape[1]):
            mine, place = own[:, slot], target[:, slot]
            better[:, slot] += (scores > mine).sum(0)
            row, query = (scores == mine).nonzero(as_tuple=True)
            better[:, slot] += query[row + start < place[query]].bincount(minlength=len(target))
    return better
