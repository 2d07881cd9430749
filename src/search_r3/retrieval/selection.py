"""The first documents of a ranking, and the rank of one, from blocks of scores that are seen one after the other.

Blocks come in the order of rows, and among equal scores the lower row wins.

Shapes: `Q` queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..types import Array, Rows

Blocks = Iterable[tuple[int, torch.Tensor]]
"""First row and scores (`rows x Q`) of each block."""
PairScores = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Rows and queries (their numbers), pair by pair -> scores."""
DENSE = 128
"""Where a block holds more documents than this near a target, float32 products of all cost less than one by one."""
NOISE = 1e-5
"""By so much the scores of unit vectors in a matrix product may be wrong, and order equal vectors wrongly."""


@dataclass(frozen=True)
class Rounding:
    """How far the scores of rounded products may be from those of pairs, of queries `Q`.

    Attributes:
        pair_scores: the score of each pair of a row and a query.
        products: given the first row of a block and some queries, their float32 scores (`rows x len(queries)`).
        error: of every score, by the rounding of each query, `Q`.
        unit: the largest relative error of a score, by its own rounding.
    """

    pair_scores: PairScores
    products: Callable[[int, torch.Tensor], torch.Tensor]
    error: torch.Tensor
    unit: float

    def around(self, level: torch.Tensor) -> torch.Tensor:
        """How far from a level (one for each of the first queries) the scores may be mistaken about it."""
        error = self.error[: len(level)]
        return error + self.unit * (level.abs().nan_to_num(posinf=1.0) + error)


class Best:
    """The best documents of each query among the blocks seen so far, kept in rank order.

    Args:
        queries: `Q x D`.
        rounding: of the scores of blocks; by default they are taken as they are.
    """

    def __init__(self, queries: torch.Tensor, rounding: Rounding | None = None) -> None:
        self.scores = queries.new_empty((len(queries), 0))  # Q x K, or fewer at first
        self.rows = torch.empty((len(queries), 0), dtype=torch.long, device=queries.device)
        self.floor = queries.new_full((len(queries),), -torch.inf)
        self.queries, self.rounding = torch.arange(len(queries), device=queries.device), rounding
        self.full, self.waiting = False, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]()

    def add(self, start: int, scores: torch.Tensor, k: int) -> None:
        """Take in the scores (`rows x Q`) of the block that begins at row `start`, behind all blocks so far."""
        # An equal score in a later row ranks behind, so a newcomer has to beat the last one of k.
        newcomers = scores > (self.floor if self.rounding is None else self.floor - self.rounding.around(self.floor))
        if not self.full and newcomers.count_nonzero() > 4 * k * len(self.queries):
            last = scores.topk(min(k, len(scores)), dim=0).values[-1]
            newcomers &= scores >= (last if self.rounding is None else last - 2 * self.rounding.around(last))
        row, query = _places(newcomers)
        if self.rounding is None:
            values = scores[row, query]
        else:
            values = self.rounding.pair_scores(row + start, query)
            enough = values > self.floor[query]
            row, query, values = row[enough], query[enough], values[enough]
        self.waiting.append((row + start, query, values))
        if not self.full or sum(len(rows) for rows, _, _ in self.waiting) > 32 * len(self.queries):
            self.merge(min(k, start + len(scores)))
            if self.scores.shape[1] == k:
                self.full, self.floor = True, self.scores[:, -1].contiguous()

    def merge(self, k: int) -> None:
        """Put what waits into its places; afterwards `rows` and `scores` hold the `k` best of what was seen."""
        if not self.waiting:
            return
        rows, queries, values = (torch.cat(parts) for parts in zip(*self.waiting, strict=True))
        self.waiting.clear()
        every_query = torch.cat([self.queries.repeat_interleave(self.rows.shape[1]), queries])
        # Adding 0 turns -0 into 0: they are equal, but a sort by bits puts them apart.
        every_score = torch.cat([self.scores.flatten(), values]) + 0.0
        every_row = torch.cat([self.rows.flatten(), rows])
        # Equal scores stand in the order of rows already, and stable sorts leave them so.
        order = every_score.sort(descending=True, stable=True).indices
        order = order[every_query[order].sort(stable=True).indices]
        sizes = every_query.bincount(minlength=len(self.queries))
        order = order[(sizes.cumsum(0) - sizes)[:, None] + torch.arange(k, device=rows.device)]  # Q x K
        self.scores, self.rows = every_score[order], every_row[order]


class Ahead:
    """How many of the documents seen so far rank ahead of each target.

    Documents whose score in a block is within `NOISE` of the target's (or within the rounding of the scores) are
    compared by `pair_scores`.

    Args:
        pair_scores: the score of each pair of a row and a query; equal vectors get equal scores.
        targets: rows of the documents asked for, a list for each query, the longest lists first; of a document that
            is none of these, the row that it would push back.
        target_scores: of each of them, by `pair_scores`.
        device: where the scores are.
        rounding: of the scores of blocks; by default they are float32 products.
    """

    def __init__(
        self,
        pair_scores: PairScores,
        targets: Sequence[Sequence[int]],
        target_scores: Sequence[Sequence[float]],
        device: torch.device,
        rounding: Rounding | None = None,
    ) -> None:
        self.pair_scores, self.lengths, self.rounding = pair_scores, [len(line) for line in targets], rounding
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
            columns = torch.arange(len(target), device=target.device)
            noise = NOISE if self.rounding is None else self.rounding.around(bar)
            above, maybe = scores[:, : len(target)] > bar + noise, scores[:, : len(target)] >= bar - noise
            sure = _count(above)
            near = _count(maybe) - sure
            if self.rounding is not None:
                dense = (near > DENSE).nonzero()[:, 0]
                if len(dense):
                    products = self.rounding.products(start, dense)
                    clear, open_ = products > bar[dense] + NOISE, products >= bar[dense] - NOISE
                    sure[dense] = _count(clear)
                    above, maybe = above.index_copy(1, dense, clear), maybe.index_copy(1, dense, open_)
                    near[dense] = _count(open_) - sure[dense]
            count += sure
            doubtful = near.nonzero()[:, 0]
            if not len(doubtful):
                continue
            if 4 * len(doubtful) < len(target):
                columns, maybe, above = columns[doubtful], maybe[:, doubtful], above[:, doubtful]
            row, place = _places(maybe ^ above)
            row, query = row + start, columns[place]
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


def _count(mask: torch.Tensor) -> torch.Tensor:
    """The number of true values in each column; faster than their sum."""
    return mask.view(torch.uint8).sum(0, dtype=torch.int32).long()


def _places(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`mask.nonzero()` of a matrix that is mostly false, which is read eight values at a time."""
    if mask.shape[1] % 8 or not mask.is_contiguous():
        row, column = mask.nonzero(as_tuple=True)
        return row, column
    row, word = mask.view(torch.int64).nonzero(as_tuple=True)
    hit, place = mask.view(len(mask), -1, 8)[row, word].nonzero(as_tuple=True)
    return row[hit], 8 * word[hit] + place
