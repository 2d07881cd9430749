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
"""First row and `keys` of the scores (`rows x Q`) of each block."""
PairScores = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Rows and queries (their numbers), pair by pair -> scores."""
DENSE = 128
"""Where a block holds more documents than this near a target, float32 products of all cost less than one by one."""
WAITING = 1 << 16
"""Pairs that are compared together, at least."""
FOLD = 16
"""Rows of a mask that are looked at together, since nearly all of it is 0."""
NOISE = 1e-5
"""By so much the scores of unit vectors in a matrix product may be wrong, and order equal vectors wrongly."""


@dataclass(frozen=True)
class Rounding:
    """How far the scores of rounded products may be from those of pairs, of queries `Q`.

    Attributes:
        pair_scores: the score of each pair of a row and a query.
        error: of every score, by the rounding of each query, `Q`.
        unit: the largest relative error of a score, by its own rounding.
        products: given the first row of a block and some queries, their float32 scores (`rows x len(queries)`), where
            there is a faster way than by pairs.
    """

    pair_scores: PairScores
    error: torch.Tensor
    unit: float
    products: Callable[[int, torch.Tensor], torch.Tensor] | None = None

    def around(self, level: torch.Tensor) -> torch.Tensor:
        """How far from a level (one for each of the first queries) the scores may be mistaken about it."""
        error = self.error[: len(level)]
        return error + self.unit * (level.abs().nan_to_num(posinf=1.0) + error)

    def under(self, level: torch.Tensor) -> torch.Tensor:
        """A level that the score of everything reaches whose rounded score reaches the level, and the reverse."""
        return level - self.around(level)


def keys(scores: torch.Tensor) -> torch.Tensor:
    """What compares as scores do, in their memory: of bfloat16 16-bit integers, which are compared much faster."""
    if scores.dtype != torch.bfloat16:
        return scores
    bits = scores.view(torch.int16)
    return bits.bitwise_xor_((bits >> 15).bitwise_and_(0x7FFF))


def values(keys: torch.Tensor) -> torch.Tensor:
    """The scores of some keys, in float32."""
    if keys.dtype != torch.int16:
        return keys
    return (keys ^ ((keys >> 15) & 0x7FFF)).view(torch.bfloat16).float()


def level_key(level: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The key of the highest score that is not above a level; what lies above the level has a higher key."""
    if dtype != torch.int16:
        return level
    near = keys(level.bfloat16())
    return near - (values(near) > level).short()


class Masks:
    """Memory for masks over blocks of keys; masks hold 0 and 1 in the type of the keys, which is fastest by far."""

    def __init__(self) -> None:
        self._buffers: dict[int, torch.Tensor] = {}

    def like(self, keys: torch.Tensor, number: int) -> torch.Tensor:
        """The memory of the mask of that number."""
        held = self._buffers.get(number)
        if held is None or held.dtype != keys.dtype or held.shape[0] < keys.shape[0] or held.shape[1] < keys.shape[1]:
            held = self._buffers[number] = torch.empty_like(keys, memory_format=torch.contiguous_format)
        return held[: keys.shape[0], : keys.shape[1]]


class Best:
    """The best documents of each query among the blocks seen so far, kept in rank order.

    Args:
        queries: `Q x D`.
        rounding: of the scores of blocks; by default they are taken as they are.
    """

    def __init__(self, queries: torch.Tensor, rounding: Rounding | None = None) -> None:
        self.rows = torch.empty(0, dtype=torch.long, device=queries.device)  # of all queries, one after the other
        self.owners, self.scores = self.rows, queries.new_empty(0)
        self.floor = queries.new_full((len(queries),), -torch.inf)
        self.rounding, self.masks = rounding, Masks()
        self.full, self.waiting = False, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]()

    def add(self, start: int, keys: torch.Tensor, k: int) -> None:
        """Take in the keys (`rows x Q`) of the block that begins at row `start`, behind all blocks so far."""
        if not self.full and len(keys) > 4 * k:
            last = values(keys.T.contiguous().topk(k, dim=1).values[:, -1])
            last = torch.nextafter(last, last.new_tensor(-torch.inf)) if self.rounding is None else last
            row, query = self._newcomers(keys, last)
        else:
            row, query = self._newcomers(keys, self.floor)
        self.take(row + start, query, values(keys[row, query]))
        if not self.full or sum(len(rows) for rows, _, _ in self.waiting) > max(32, k) * len(self.floor):
            self._merge(k)

    def take(self, rows: torch.Tensor, owners: torch.Tensor, scores: torch.Tensor) -> None:
        """Take in documents with their queries and scores; rows of a query ascend where scores are equal."""
        self.waiting.append((rows, owners, scores))

    def finish(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and scores of the `k` best of what was seen, both `Q x k`."""
        self._merge(k)
        if self.rounding is not None:
            self._score(k)
        shape = (len(self.floor), k)
        return self.rows.view(shape), self.scores.view(shape)

    def _newcomers(self, keys: torch.Tensor, floor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Places in a block of what may score above a floor."""
        # An equal score in a later row ranks behind, so a newcomer has to beat the last one of k.
        low = floor if self.rounding is None else self.rounding.under(self.rounding.under(floor))
        return places(torch.gt(keys, level_key(low, keys.dtype), out=self.masks.like(keys, 0)))

    def _merge(self, k: int) -> None:
        """Put what waits into its places, and drop what cannot be among the `k` best of what was seen."""
        if not self.waiting:
            return
        parts = [(self.rows, self.owners, self.scores), *self.waiting]
        rows, owners, scores = (torch.cat(column) for column in zip(*parts, strict=True))
        self.waiting.clear()
        place = self._sort(rows, owners, scores)
        sizes = self.owners.bincount(minlength=len(self.floor))
        self.full = bool((sizes >= k).all())
        if not self.full:
            return
        self.floor = self.scores[sizes.cumsum(0) - sizes + k - 1]
        stays = place < k
        if self.rounding is not None:
            stays |= self.scores >= self.rounding.under(self.rounding.under(self.floor))[self.owners]
        self._keep(stays)
        if len(self.rows) > 4 * k * len(self.floor):
            self._score(k)

    def _score(self, k: int) -> None:
        """Score what is held pair by pair, and keep the `k` best alone."""
        assert self.rounding is not None
        self._keep(self.rows.argsort())  # from here on equal scores stand in the order of rows
        place = self._sort(self.rows, self.owners, self.rounding.pair_scores(self.rows, self.owners))
        self._keep(place < k)

    def _sort(self, rows: torch.Tensor, owners: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Hold these in rank order, query after query; returns the place of each in its query."""
        # Adding 0 turns -0 into 0: they are equal, but their bits are not.
        bits = (scores + 0.0).view(torch.int32)
        ascending = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
        order = (owners * 2**32 - ascending).sort(stable=True).indices  # equal ones stay in the order of rows
        self.rows, self.owners, self.scores = rows[order], owners[order], scores[order]
        sizes = self.owners.bincount(minlength=len(self.floor))
        starts = (sizes.cumsum(0) - sizes)[self.owners]
        return torch.arange(len(rows), device=rows.device) - starts

    def _keep(self, which: torch.Tensor) -> None:
        """These alone, by a mask or by their places."""
        self.rows, self.owners, self.scores = self.rows[which], self.owners[which], self.scores[which]


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
        self.masks, self.waiting = Masks(), [list[tuple[torch.Tensor, torch.Tensor]]() for _ in self.slots]

    def add(self, start: int, keys: torch.Tensor) -> None:
        """Count in the keys (`rows x Q`) of the block that begins at row `start`."""
        for slot, bar in enumerate(self.bars):
            own = keys[:, : len(bar)]
            noise = NOISE if self.rounding is None else self.rounding.around(bar)
            above = torch.gt(own, level_key(bar + noise, own.dtype), out=self.masks.like(own, 0))
            maybe = torch.ge(own, level_key(bar - noise, own.dtype), out=self.masks.like(own, 1))
            sure = _count(above)
            near = _count(maybe) - sure
            if self.rounding is not None and self.rounding.products is not None:
                dense = (near > DENSE).nonzero()[:, 0]
                if len(dense):
                    products = self.rounding.products(start, dense)
                    clear, open_ = products > bar[dense] + NOISE, products >= bar[dense] - NOISE
                    above.index_copy_(1, dense, clear.to(above.dtype))
                    maybe.index_copy_(1, dense, open_.to(above.dtype))
                    sure = _count(above)
                    near = _count(maybe) - sure
            self.counts[slot] += sure
            if near.any():
                row, query = places(maybe.sub_(above))
                self.waiting[slot].append((row + start, query))
            if sum(len(rows) for rows, _ in self.waiting[slot]) > WAITING:
                self._compare(slot)

    def _compare(self, slot: int) -> None:
        """Count what waits, by its scores pair by pair."""
        if not self.waiting[slot]:
            return
        row, query = (torch.cat(column) for column in zip(*self.waiting[slot], strict=True))
        self.waiting[slot].clear()
        bar, exact = self.bars[slot][query], self.pair_scores(row, query)
        ahead = (exact > bar) | ((exact == bar) & (row < self.slots[slot][query]))
        self.counts[slot] += query[ahead].bincount(minlength=len(self.counts[slot]))

    def lists(self) -> list[list[int]]:
        """The counts, a list for each query."""
        for slot in range(len(self.slots)):
            self._compare(slot)
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
    """The number of ones in each column; a block has fewer rows than 16 bits hold."""
    return mask.sum(0, dtype=mask.dtype).long()


def places(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of what is not 0; rows ascend in each column."""
    if len(mask) % FOLD:
        row, column = mask.nonzero(as_tuple=True)
        return row, column
    folded = mask.view(-1, FOLD, mask.shape[1])
    group, column = folded.sum(1, dtype=mask.dtype).nonzero(as_tuple=True)
    hit, place = folded[group, :, column].nonzero(as_tuple=True)
    return FOLD * group[hit] + place, column[hit]
