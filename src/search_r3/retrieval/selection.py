"""The first documents of a ranking, and the rank of one, from blocks of scores that are seen one after the other.

Blocks come in the order of rows, and among equal scores the lower row wins.

Shapes: `Q` queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from ..types import Array, Rows

Blocks = Iterable[tuple[int, torch.Tensor]]
"""First row and scores (`rows x Q`) of each block."""
PairScores = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Rows and queries (their numbers), pair by pair -> scores."""
NOISE = 1e-5
"""By so much the scores of unit vectors in a matrix product may be wrong, and order equal vectors wrongly."""


class Best:
    """The best documents of each query among the blocks seen so far, kept in rank order."""

    def __init__(self, queries: torch.Tensor) -> None:
        self.scores = queries.new_empty((len(queries), 0))  # Q x K, or fewer at first
        self.rows = torch.empty((len(queries), 0), dtype=torch.long, device=queries.device)
        self.floor = queries.new_full((len(queries),), -torch.inf)
        self.queries = torch.arange(len(queries), device=queries.device)

    def add(self, start: int, scores: torch.Tensor, k: int) -> None:
        """Take in the scores (`rows x Q`) of the block that begins at row `start`, behind all blocks so far."""
        # An equal score in a later row ranks behind, so a newcomer has to beat the last one of k.
        newcomers = scores > self.floor
        if newcomers.count_nonzero() > 4 * k * len(self.queries):
            newcomers &= scores >= scores.topk(min(k, len(scores)), dim=0).values[-1]
        row, query = newcomers.nonzero(as_tuple=True)
        if not len(row):
            return
        every_query = torch.cat([self.queries.repeat_interleave(self.rows.shape[1]), query])
        # Adding 0 turns -0 into 0: they are equal, but a sort by bits puts them apart.
        every_score = torch.cat([self.scores.flatten(), scores[row, query]]) + 0.0
        every_row = torch.cat([self.rows.flatten(), row + start])
        # Equal scores stand in the order of rows already, and stable sorts leave them so.
        order = every_score.sort(descending=True, stable=True).indices
        order = order[every_query[order].sort(stable=True).indices]
        sizes = every_query.bincount(minlength=len(self.queries))
        places = torch.arange(min(k, start + len(scores)), device=row.device)
        order = order[(sizes.cumsum(0) - sizes)[:, None] + places]  # Q x K
        self.scores, self.rows = every_score[order], every_row[order]
        if len(places) == k:
            self.floor = self.scores[:, -1].contiguous()


class Ahead:
    """How many of the documents seen so far rank ahead of each target.

    Documents whose score in a block is within `NOISE` of the target's are compared by `pair_scores`.

    Args:
        pair_scores: the score of each pair of a row and a query; equal vectors get equal scores.
        targets: rows of the documents asked for, a list for each query, the longest lists first; of a document that
            is none of these, the row that it would push back.
        target_scores: of each of them, by `pair_scores`.
        device: where the scores are.
    """

    def __init__(
        self,
        pair_scores: PairScores,
        targets: Sequence[Sequence[int]],
        target_scores: Sequence[Sequence[float]],
        device: torch.device,
    ) -> None:
        self.pair_scores, self.lengths = pair_scores, [len(line) for line in targets]
        # The slot-th target of every query that has so many: the first columns of a block.
        self.slots, self.bars = (
            [
                torch.tensor([line[slot] for line in lists if len(line) > slot], dtype=dtype, device=device)
                for slot in range(max(self.lengths, default=0))
            ]
            for lists, dtype in ((targets, torch.long), (target_scores, torch.float32))
        )
        self.counts = [torch.zeros_like(slot) for slot in self.slots]

    def add(self, start: int, scores: torch.Tensor) -> None:
        """Count in the scores (`rows x Q`) of the block that begins at row `start`."""
        for target, bar, count in zip(self.slots, self.bars, self.counts, strict=True):
            gaps = scores[:, : len(target)] - bar
            count += (gaps > NOISE).sum(0)
            row, query = (gaps.abs() <= NOISE).nonzero(as_tuple=True)
            row += start
            exact = self.pair_scores(row, query)
            ahead = (exact > bar[query]) | ((exact == bar[query]) & (row < target[query]))
            count += query[ahead].bincount(minlength=len(target))

    def lists(self) -> list[list[int]]:
        """The counts, a list for each query."""
        lists = [count.tolist() for count in self.counts]
        return [[lists[slot][place] for slot in range(length)] for place, length in enumerate(self.lengths)]


def groups_alike(counts: Mapping[int, int]) -> list[list[int]]:
    """The queries by how many documents are left out for each, so that one of many does not make all search deep."""
    groups: dict[int, list[int]] = {}
    for query, count in counts.items():
        groups.setdefault((count // 64).bit_length(), []).append(query)
    return list(groups.values())


def count_ahead(rows: Rows, scores: Array, rivals: Rows, rival_scores: Array) -> list[int]:
    """How many of the rivals rank before each of these rows."""
    higher, equal = rival_scores > scores[:, None], rival_scores == scores[:, None]
    counts: list[int] = (higher | (equal & (rivals < rows[:, None]))).sum(axis=1).tolist()
    return counts
