"""The approximate index of a step: a short product proposes documents, the exact index scores and ranks them.

A step asks hundreds of queries at once, which a graph answers one after the other. Here all are multiplied with a
*sketch* of every vector, its coordinates along the directions in which the corpus varies most. How far the scores of
sketches are wrong is measured anew in every search, on a sample of the corpus: on documents at about the rank that is
asked for, since near documents are wrong in another way than far ones. Whatever may reach that rank is scored exactly.

A sketch is made within seconds and follows every update. For one query at a time it reads too much: `approximate`'s
graph is for those.

Shapes: `Q` queries, `N` documents, `D` vector size, `S` sketch size, `C` pairs of a query and a candidate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..retrieval import storage
from ..retrieval.approximate import Audited
from ..retrieval.index import ExactIndex, fast_dtype
from ..retrieval.ranking import holds
from ..retrieval.selection import Best, Masks, Rounding, count_ahead, keys, level_key, places, values
from ..types import Array, Rows

Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Rows, queries (their numbers) and scores of pairs, `C` each."""
SHARE = 32
"""Of so many rows one is in the sample."""
KEPT = 0.9
"""Of the vectors' squared length, the share that sketches keep at least, where half of the coordinates hold so much."""
UNIT = 64
"""Sketches have a multiple of so many coordinates."""
SURE = 4.0
"""Standard deviations of its error by which a sketch may miss a document."""
FIRST = 64
"""The best documents of a query are scored exactly, so many at least."""
CROWD = 4
"""Candidates of a query at most, as a multiple of the deepest rank asked for."""
QUERIES = 512
"""Queries searched at once."""
BASIS_ROWS = 16_384
"""Rows from which the directions are taken."""


class SketchIndex(Audited):
    """A sketch of every vector of an exact index, behind the same protocol.

    Args:
        store: holds the vectors; from here on it is updated through this index only.
        rank_depth: ranks beyond are not told apart.
        recall_floor: `maintain` takes new directions when the recall is below.
        audit_every: `maintain` runs by itself after so many updates; 0: only when asked.
    """

    def __init__(
        self, store: ExactIndex, *, rank_depth: int = 1000, recall_floor: float = 0.95, audit_every: int = 0
    ) -> None:
        self._watch(store, recall_floor, audit_every)
        self.rank_depth = rank_depth
        self._build()

    @property
    def counts_to(self) -> int:
        """`rank_depth`."""
        return self.rank_depth

    def search_rows(self, queries: Array, k: int) -> tuple[Rows, Array]:
        """Rows and exact scores, both `Q x K`, of the best documents among those that the sketches propose.

        Raises:
            VectorIndexError: wrong shape, values that are not finite, or `k` below 1.
        """
        none: list[Rows] = [np.empty(0, np.int64)] * len(queries)
        if k < 1 or self._exact(k, none, none):
            return self.store.search_rows(queries, k)
        return self.search_and_count(queries, k, none, [np.empty(0, np.float32)] * len(queries), none)[:2]

    def search_and_count(
        self, queries: Array, k: int, rows: Sequence[Rows], scores: Sequence[Array], left_out: Sequence[Rows]
    ) -> tuple[Rows, Array, list[list[int]]]:
        """Both, from one pass over the sketches; none of those that are left out is among the `k` best.

        Of `rank_depth` documents ahead and more, `rank_depth` are counted.
        """
        if self._exact(k, rows, left_out):
            best, best_scores, counts = self.store.search_and_count(queries, k, rows, scores, left_out)
            return best, best_scores, [[min(count, self.rank_depth) for count in own] for own in counts]
        queries = self.store.check_queries(queries)
        best, best_scores = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
        result: list[list[int]] = []
        for start in range(0, len(queries), QUERIES):
            part = slice(start, start + QUERIES)
            best[part], best_scores[part], counts = self._search(
                queries[part], k, rows[part], scores[part], left_out[part]
            )
            result += counts
        return best, best_scores, result

    def update(self, rows: Rows, vectors: Array, version: int | None = None) -> None:
        """As `Audited.update`; sketches follow at once, along the directions that were taken."""
        self.store.update(rows, vectors, version)
        places = torch.from_numpy(np.asarray(rows, np.int64)).to(self.device)
        self._sketches[places] = self._sketch(torch.from_numpy(self.store.vectors_at(rows)).to(self.device))
        self._updated()

    def save(self, folder: Path) -> None:
        """As `Audited.save`: store and directions."""
        self._draw(self._basis)  # as `load` will: products of few rows may differ from those of a block in the last bit
        writers = {**self.store.writers(), "basis.npy": storage.write_array(self._basis, len(self._basis))}
        facts = {"index_type": "sketch", "rank_depth": self.rank_depth, "sketch": self._basis.shape[1]}
        storage.save_state(folder, writers, {**self.store.facts(), **facts, **self.audit_facts()})

    @classmethod
    def load(cls, folder: Path, *, device: str | torch.device = "cpu") -> SketchIndex:
        """Read what `save` wrote.

        Raises:
            VectorIndexError: files are missing, damaged or do not fit together, or it is another kind of index.
        """
        with storage.readable(Path(folder)):
            manifest, paths = storage.read_manifest(Path(folder))
            index = cls.__new__(cls)
            index._watch_again(ExactIndex.from_state(manifest, paths, mmap=False).to(device), manifest)
            index.rank_depth = manifest["rank_depth"]
            shape = (index.store.dimension, manifest["sketch"])
            basis = torch.from_numpy(storage.read_array(paths["basis.npy"], shape, "float32"))
        index._draw(basis.to(device))
        return index

    def _exact(self, k: int, rows: Sequence[Rows], left_out: Sequence[Rows]) -> bool:
        """Whether the corpus is too small for a sample to tell what may reach the ranks asked for."""
        return 4 * CROWD * self._deepest(k, rows, left_out) >= len(self)

    def _deepest(self, k: int, rows: Sequence[Rows], left_out: Sequence[Rows]) -> int:
        """The deepest rank that is asked for."""
        deepest = max(k, FIRST, self.rank_depth if any(map(len, rows)) else 0) + max(map(len, left_out), default=0)
        return SHARE * _place(deepest)

    def _build(self) -> None:
        """Take the directions in which the corpus varies most now, and draw all documents along them."""
        sample = torch.from_numpy(self.store.vectors_at(self._some(BASIS_ROWS)))
        energy, directions = torch.linalg.eigh(sample.T @ sample)  # D, D x D, ascending
        kept = energy.flip(0).cumsum(0) / energy.sum()
        size = UNIT * math.ceil((1 + int((kept < KEPT).sum())) / UNIT)
        size = min(size, max(1, self.store.dimension // 2))
        self._draw(directions.flip(1)[:, :size].contiguous().to(self.device))

    def _some(self, count: int) -> Rows:
        """So many rows at most, ascending, the same in every call; at random, since ids often tell kinds apart."""
        rows = np.random.default_rng(0).choice(len(self), min(count, len(self)), replace=False)
        return np.sort(rows).astype(np.int64)

    def _draw(self, basis: torch.Tensor) -> None:
        self._basis = basis
        self._sample = torch.from_numpy(self._some(math.ceil(len(self) / SHARE))).to(basis.device)
        self._sketches = torch.empty((len(self), basis.shape[1]), dtype=fast_dtype(self.device), device=self.device)
        for start in range(0, len(self), self.store.block):
            part = slice(start, start + self.store.block)
            self._sketches[part] = self._sketch(self.store.block_at(part))

    @property
    def _unit(self) -> float:
        """The largest relative error of a score, by its rounding."""
        return torch.finfo(self._sketches.dtype).eps

    def _sketch(self, vectors: torch.Tensor) -> torch.Tensor:
        """`n x S` of `n x D`."""
        return vectors.to(self._sketches.dtype) @ self._basis.to(self._sketches.dtype)

    def _search(
        self, queries: Array, k: int, rows: Sequence[Rows], scores: Sequence[Array], left_out: Sequence[Rows]
    ) -> tuple[Rows, Array, list[list[int]]]:
        """`search_and_count` of a block of queries."""
        vectors = torch.from_numpy(queries).to(self.device)
        sketches, first = self._sketch(vectors), max(k, FIRST)
        levels = self._levels(vectors, sketches, first, rows, left_out)
        rounding = Rounding(partial(self.store.pair_scores, vectors), levels.error, self._unit)
        deep = levels.depth.tolist()  # a target below is counted no further: nothing is searched for it
        told = [line >= level for line, level in zip(scores, deep, strict=True)]
        lowest = [line[ok].min(initial=np.inf) for line, ok in zip(scores, told, strict=True)]
        wanted = torch.minimum(torch.tensor(np.array(lowest, np.float32), device=self.device), levels.best)
        found = self._pass(sketches, torch.maximum(rounding.under(wanted) - levels.mean, levels.least))
        near, owners, products = self._allowed(found, left_out)
        products = products + levels.mean[owners]
        # The last of so many is hardly mistaken: what is one error below it is out, not two.
        half = replace(rounding, error=levels.error / 2, unit=self._unit / 2)
        best, best_scores = self._first(queries, first, (near, owners, products), half, left_out)
        counts = [np.array(count_ahead(*line), np.int64) for line in zip(rows, scores, best, best_scores, strict=True)]
        for slot in range(max(map(len, rows), default=0)):
            # What ranks among the first is counted by now; the others' rivals are all whose sketches score higher.
            have = np.array([len(line) > slot for line in rows])
            bars, own = (np.array([line[slot] if len(line) > slot else 0 for line in part]) for part in (scores, rows))
            behind = have & (bars <= best_scores[:, -1]) & (bars >= levels.depth.cpu().numpy())
            bars = np.where(behind, bars, np.inf).astype(np.float32)
            ahead = self._count((near, owners, products), bars, own, rounding)
            for i in np.flatnonzero(behind).tolist():
                counts[i][slot] = ahead[i]
        depth = self.rank_depth
        limited = [np.where(ok, np.minimum(own, depth), depth).tolist() for ok, own in zip(told, counts, strict=True)]
        return best[:, :k], best_scores[:, :k], limited

    def _count(self, found: Found, bars: Array, own: Rows, rounding: Rounding) -> Rows:
        """How many rank ahead of one document of each query, by its score and its row; 0 for infinite scores."""
        near, owners, products = found
        bar, place = (torch.from_numpy(line).to(self.device) for line in (bars, own))
        gap, noise = products - bar[owners], rounding.around(bar)[owners]
        row, query = near[gap.abs() <= noise], owners[gap.abs() <= noise]
        exact = rounding.pair_scores(row, query)
        higher = (exact > bar[query]) | ((exact == bar[query]) & (row < place[query]))
        ahead = torch.cat([owners[gap > noise], query[higher]]).bincount(minlength=len(bars))
        counts: Rows = ahead.cpu().numpy()
        return counts

    def _levels(
        self, vectors: torch.Tensor, sketches: torch.Tensor, k: int, rows: Sequence[Rows], left_out: Sequence[Rows]
    ) -> Levels:
        """Where the ranks that are asked for may be, from a sample of the corpus."""
        deepest = self._deepest(k, rows, left_out) // SHARE
        scores, place = keys(sketches @ self._sketches[self._sample].T).topk(CROWD * deepest, dim=1)
        scores, place = values(scores), place[:, :deepest]
        query = torch.arange(len(vectors), device=self.device).repeat_interleave(deepest)
        exact = self.store.pair_scores(vectors, self._sample[place.flatten()], query).view(-1, deepest)
        wrong = exact - scores[:, :deepest]  # of near documents: of far ones it is smaller
        ranked = exact.sort(dim=1, descending=True).values
        extra = torch.tensor([len(line) for line in left_out])

        def level(rank: int) -> torch.Tensor:
            at = torch.tensor([_place(rank + more) - 1 for more in extra.tolist()], device=self.device)
            return ranked.gather(1, at.clamp(max=deepest - 1)[:, None])[:, 0]

        none = vectors.new_full((len(vectors),), math.inf)
        return Levels(
            depth=level(self.rank_depth) if any(map(len, rows)) else none,
            best=level(k),
            mean=wrong.mean(1),
            error=SURE * wrong.std(1),
            least=scores[:, -1],
        )

    def _pass(self, queries: torch.Tensor, levels: torch.Tensor) -> Found:
        """The pairs whose sketches score above the level of the query."""
        block, positive = self.store.block, bool((levels > 0).all())
        memory, masks = queries.new_empty((min(block, len(self)), len(queries))), Masks()
        found = []
        for start in range(0, len(self), block):
            part = self._sketches[start : start + block]
            products = torch.mm(part, queries.T, out=memory[: len(part)])
            # Bits of negative scores are not in their order, but all below those of a positive level.
            bits = products.view(torch.int16) if positive and products.dtype == torch.bfloat16 else keys(products)
            row, query = places(torch.gt(bits, level_key(levels, bits.dtype), out=masks.like(bits, 0)))
            found.append((row + start, query, values(bits[row, query])))
        rows, owners, scores = (torch.cat(column) for column in zip(*found, strict=True))
        return rows, owners, scores

    def _allowed(self, found: Found, left_out: Sequence[Rows]) -> Found:
        """Without what is left out."""
        if not any(map(len, left_out)):
            return found
        rows, owners, scores = found
        codes = np.concatenate([i * len(self) + line for i, line in enumerate(left_out)])
        stays = torch.isin(owners * len(self) + rows, torch.from_numpy(codes).to(rows.device), invert=True)
        return rows[stays], owners[stays], scores[stays]

    def _first(
        self, queries: Array, k: int, found: Found, rounding: Rounding, left_out: Sequence[Rows]
    ) -> tuple[Rows, Array]:
        """The `k` best of what was found for each query; where that is less, of an exact search."""
        best = Best(torch.from_numpy(queries).to(self.device), rounding)
        lacking = (found[1].bincount(minlength=len(queries)) < k).nonzero()[:, 0]
        if len(lacking):
            stays = torch.isin(found[1], lacking, invert=True)
            found = found[0][stays], found[1][stays], found[2][stays]
            places = lacking.tolist()
            rows, scores = self.store.search_rows(queries[places], k + max(len(left_out[i]) for i in places))
            for i, line, own in zip(places, rows, scores, strict=True):
                which = np.flatnonzero(~holds(np.sort(left_out[i]), line))[:k]
                some = torch.from_numpy(line[which]).to(self.device)
                best.take(some, torch.full_like(some, i), torch.from_numpy(own[which]).to(self.device))
        best.take(*found)
        rows, scores = (column.cpu().numpy() for column in best.finish(k))
        return rows, scores


@dataclass(frozen=True)
class Levels:
    """What a sample tells of each query, `Q` each; infinite where nothing is asked.

    Attributes:
        depth: an exact score that surely more than `rank_depth` documents reach.
        best: one that surely more than `k` documents reach.
        mean: by so much the scores of near documents are above those of their sketches.
        error: by so much more or less they may be.
        least: what the sketches of no more documents reach than are ever scored.
    """

    depth: torch.Tensor
    best: torch.Tensor
    mean: torch.Tensor
    error: torch.Tensor
    least: torch.Tensor


def _place(rank: int) -> int:
    """The place in the sample, from 1, that is surely behind a rank in the corpus: three standard deviations."""
    share = rank / SHARE
    return math.ceil(share + 3 * math.sqrt(share) + 3)
