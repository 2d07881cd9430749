"""Correcting stale document vectors without encoding them: maps fitted on documents that were encoded again.

A training step moves all documents, and much of that motion is common to them. Each candidate below is fitted on
pairs (vector held in the index, fresh vector) and judged on pairs that it was not fitted on; the best one is applied
to every stale vector. Leaving the vectors alone is one of the candidates.

Shapes: `P` pairs, `N` documents, `D` vector size; a vector is a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..extras import extra
from ..types import Array

Map = Callable[[Array], Array]
"""Stale vectors `N x D` to corrected ones `N x D`, not normalised."""

MIN_PAIRS = 16
"""Fewer pairs than this are no ground to choose a map on."""
FOLDS = 4


def identity(before: Array, after: Array) -> Map:
    """Leave every vector as it is."""
    return lambda vectors: vectors


def weighted_mean_drift(before: Array, after: Array, similarity_temperature: float = 0.1) -> Map:
    """Add the mean drift of the pairs, weighted by their closeness: `d + sum_i softmax(d . b_i / tau) (a_i - b_i)`.

    Semantic drift compensation (Yu et al., 2020, arXiv 2004.00440, eq. 6 to 8), with a softmax of cosines for the
    Gaussian of distances; on unit vectors the two are the same.
    """
    drift = after - before

    def apply(vectors: Array) -> Array:
        logits = vectors @ before.T / similarity_temperature  # N x P
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        moved: Array = vectors + (weights / weights.sum(axis=1, keepdims=True)) @ drift
        return moved

    return apply


def procrustes(before: Array, after: Array, ridge: float = 0.3) -> Map:
    """The rotation `W` that minimises `|B W - A|^2 + lambda |W - I|^2` (Schoenemann, 1966, with a pull to `I`).

    There are fewer pairs than dimensions as a rule; the pull keeps the directions that no pair shows where they are.
    `lambda` is `ridge` times the mean squared singular value of `B`, `P / D`.
    """
    with extra("train"):
        import scipy.linalg

    pairs, dimension = before.shape
    cross = before.T @ after + ridge * pairs / dimension * np.eye(dimension, dtype=np.float32)  # D x D
    left, _, right = scipy.linalg.svd(cross, full_matrices=False, check_finite=False)
    rotation = left @ right
    return lambda vectors: vectors @ rotation


def low_rank_affine(before: Array, after: Array, ridge: float = 0.3, rank: int = 64) -> Map:
    """Ridge regression of the drift on the vector, with an intercept, cut to the `rank` best directions of drift."""
    with extra("train"):
        import scipy.linalg

    centre, drift = before.mean(axis=0), after - before
    offset = drift.mean(axis=0)
    inputs, outputs = before - centre, drift - offset
    pairs, dimension = before.shape
    kernel = inputs @ inputs.T + ridge * pairs / dimension * np.eye(pairs, dtype=np.float32)  # P x P
    weights = inputs.T @ scipy.linalg.solve(kernel, outputs, assume_a="pos", check_finite=False)  # D x D
    directions = scipy.linalg.svd(inputs @ weights, full_matrices=False, check_finite=False)[2][:rank]
    narrow = weights @ directions.T  # D x rank

    def apply(vectors: Array) -> Array:
        moved: Array = vectors + offset + ((vectors - centre) @ narrow) @ directions
        return moved

    return apply


CANDIDATES: dict[str, Callable[[Array, Array], Map]] = {
    "identity": identity,
    "weighted_mean_drift": weighted_mean_drift,
    "procrustes": procrustes,
    "low_rank_affine": low_rank_affine,
}


@dataclass(frozen=True)
class DriftCorrection:
    """The map that was chosen.

    Attributes:
        name: which candidate.
        held_out: of every candidate, the mean `1 - cos` to the fresh vector over pairs it was not fitted on.
        map: the candidate fitted on all pairs.
    """

    name: str
    held_out: dict[str, float]
    map: Map

    @property
    def gain(self) -> float:
        """The share of the drift that the map removes on held-out pairs, 0 (identity) to 1."""
        still = self.held_out["identity"]
        return 1.0 - self.held_out[self.name] / still if still > 0 else 0.0

    def apply(self, vectors: Array) -> Array:
        """Corrected vectors `N x D`, L2-normalised."""
        if self.name == "identity":
            return vectors
        moved = self.map(vectors)
        result: Array = moved / np.linalg.norm(moved, axis=1, keepdims=True)
        return result


def fit_drift(before: Array, after: Array, agree: Callable[[str], str] = str) -> DriftCorrection:
    """Choose a map by cross-validation over the pairs `before[i] -> after[i]`, `P x D` each, and fit it on all pairs.

    With fewer than `MIN_PAIRS` pairs the identity is taken.

    Args:
        before: what the index holds.
        after: the fresh vectors of the same documents.
        agree: given the name of this process's choice, returns the name that all processes take.
    """
    held_out = dict.fromkeys(CANDIDATES, 0.0)
    if len(before) < MIN_PAIRS:
        return DriftCorrection("identity", held_out, identity(before, after))
    fold = np.arange(len(before)) % FOLDS
    for number in range(FOLDS):
        inside, outside = fold != number, fold == number
        for name, fit in CANDIDATES.items():
            moved = fit(before[inside], after[inside])(before[outside])
            cosines = (moved * after[outside]).sum(axis=1) / np.linalg.norm(moved, axis=1)
            held_out[name] += float((1.0 - cosines).sum()) / len(before)
    best = agree(min(held_out, key=lambda name: held_out[name]))
    return DriftCorrection(best, held_out, CANDIDATES[best](before, after))
