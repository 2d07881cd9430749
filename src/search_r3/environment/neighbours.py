"""The neighbour graph over the vectors of an index, repaired where documents move.

Shapes: `N` documents, `L` links per document, `R` refreshed documents. Links are rows of the index.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np

from ..errors import VectorIndexError
from ..retrieval.protocol import VectorIndex
from ..types import Rows

BLOCK = 1024
CANDIDATES_AT_A_TIME = 100_000
"""Candidates whose vectors are held together during a repair."""
REACH = 4
"""A refreshed document is searched to `REACH` times its links: it may be a neighbour of what is not its own."""


class NeighbourGraph:
    """The nearest neighbours of every document by inner product, best first.

    Args:
        links: `N x L` rows; -1 where a document has fewer neighbours.
    """

    def __init__(self, links: Rows) -> None:
        self.links = links

    @classmethod
    def build(cls, index: VectorIndex, neighbours: int) -> NeighbourGraph:
        """Search every document's neighbours in the index."""
        count = len(index)
        links = np.empty((count, neighbours), np.int64)
        for start in range(0, count, BLOCK):
            rows = np.arange(start, min(start + BLOCK, count))
            links[rows] = _neighbours(index, rows, neighbours)
        return cls(links)

    def reach(self, rows: Sequence[int], hops: int) -> list[int]:
        """The rows within `hops` links of the given ones, these first, each once, nearest hop first."""
        ball = dict.fromkeys(int(row) for row in rows)
        front = list(ball)
        for _ in range(hops):
            links = self.links[front]
            front = [row for row in dict.fromkeys(links[links >= 0].tolist()) if row not in ball]
            ball |= dict.fromkeys(front)
        return list(ball)

    def repair(self, index: VectorIndex, rows: Rows) -> int:
        """Mend the links around documents whose vectors have changed.

        Their own links are searched again. Every document that linked to one of them, or that their search met,
        chooses its links anew among its old links, the links of these, and the changed documents that met it. Where
        more than half of all documents have changed, the graph is built anew.

        Args:
            index: the index with the new vectors.
            rows: the changed documents, `R`.

        Returns:
            How many documents chose anew.
        """
        rows = np.unique(rows)
        neighbours = self.links.shape[1]
        if 2 * len(rows) > len(index):
            self.links = NeighbourGraph.build(index, neighbours).links
            return len(index)
        offers: dict[int, list[int]] = {}
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            nearest = _neighbours(index, block, neighbours * REACH)
            self.links[block] = nearest[:, :neighbours]
            for row, others in zip(block.tolist(), nearest.tolist(), strict=True):
                for other in others:
                    offers.setdefault(other, []).append(row)
        sources = np.flatnonzero(np.isin(self.links, rows).any(axis=1))
        hosts = np.union1d(sources, np.fromiter((row for row in offers if row >= 0), np.int64))
        hosts, before = np.setdiff1d(hosts, rows), self.links.copy()
        count = len(hosts)
        while len(hosts):
            # As many at a time as keep the candidates' vectors within a fixed number of values.
            widths = np.maximum.accumulate([len(offers.get(row, ())) for row in hosts.tolist()])
            values = (widths + neighbours * (neighbours + 1)) * np.arange(1, len(hosts) + 1)
            fit = max(1, int(np.searchsorted(values, CANDIDATES_AT_A_TIME, side="right")))
            self._choose_anew(index, hosts[:fit], before, offers)
            hosts = hosts[fit:]
        return count

    def recall(self, index: VectorIndex, sample: Rows) -> float:
        """The share of the true neighbours of the sampled rows, under the index's vectors of now, that are linked."""
        true = _neighbours(index, sample, self.links.shape[1])
        hits = [np.isin(near[near >= 0], links).sum() for near, links in zip(true, self.links[sample], strict=True)]
        return float(np.sum(hits) / max(1, (true >= 0).sum()))

    def save(self, folder: Path) -> None:
        """Write the links into a folder (`graph.safetensors`)."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file({"links": self.links}, folder / "graph.safetensors")

    @classmethod
    def load(cls, folder: Path, index: VectorIndex) -> NeighbourGraph:
        """Read what `save` wrote for this index.

        Raises:
            VectorIndexError: the file is missing or broken, or belongs to an index of another size.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            links = load_file(folder / "graph.safetensors")["links"]
        except (OSError, KeyError, SafetensorError) as error:
            raise VectorIndexError(f"{folder} holds no usable neighbour graph: {error}") from error
        if len(links) != len(index) or links.max(initial=-1) >= len(index):
            raise VectorIndexError(
                f"{folder} holds the graph of {len(links)} documents, the index has {len(index)}: of another run?"
            )
        return cls(links)

    def _choose_anew(self, index: VectorIndex, rows: Rows, before: Rows, offers: dict[int, list[int]]) -> None:
        neighbours = self.links.shape[1]
        first = before[rows]  # R x L
        second = np.where(first[:, :, None] >= 0, before[first], -1).reshape(len(rows), -1)  # R x L*L
        newcomers = np.array(list(zip_longest(*(offers.get(row, ()) for row in rows.tolist()), fillvalue=-1)))
        newcomers = newcomers.reshape(-1, len(rows)).T.astype(np.int64)
        candidates = np.sort(np.concatenate([first, second, newcomers], axis=1), axis=1)  # R x C
        useless = (candidates < 0) | (candidates == rows[:, None])
        useless[:, 1:] |= candidates[:, 1:] == candidates[:, :-1]
        scores = np.einsum("rcd,rd->rc", index.vectors_at(candidates), index.vectors_at(rows))
        scores[useless] = -np.inf
        best = np.argsort(-scores, axis=1, kind="stable")[:, :neighbours]
        candidates[~np.isfinite(scores)] = -1
        self.links[rows] = np.take_along_axis(candidates, best, axis=1)


def _neighbours(index: VectorIndex, rows: Rows, count: int) -> Rows:
    """The `count` best other documents of each row, padded with -1: `R x count`."""
    hits, _ = index.search_rows(index.vectors_at(rows), count + 1)
    other = hits != rows[:, None]
    # A document that is not among its own results (many equal vectors) gives up its last result instead.
    other[other.all(axis=1), -1] = False
    width = hits.shape[1] - 1
    links = np.full((len(rows), count), -1, np.int64)
    links[:, :width] = hits[other].reshape(len(rows), width)
    return links
