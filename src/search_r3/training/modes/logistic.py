"""Logistic regression with a penalty for each weight, and how well probabilities fit what came true.

Shapes: `n` examples, `d` features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...model.modes.gate import Numbers, sigmoid

BINS = 10


def fit_logistic(features: Numbers, labels: Numbers, penalties: Numbers, steps: int = 50) -> tuple[float, Numbers]:
    """The bias and the weights that minimise `sum log(1 + exp(-y z)) + sum penalty_j w_j^2 / 2` (Newton's method).

    Args:
        features: `n x d`.
        labels: `n`, 0 or 1.
        penalties: `d`, above 0; the bias has none.
        steps: at most.
    """
    count, size = features.shape
    table = np.hstack([np.ones((count, 1)), features])
    ridge = np.concatenate([[0.0], penalties])
    weights = np.zeros(size + 1)
    weights[0] = _logit(float(np.clip(labels.mean(), 1e-3, 1 - 1e-3)))
    loss = _loss(table, labels, ridge, weights)
    for _ in range(steps):
        chances = sigmoid(table @ weights)
        gradient = table.T @ (chances - labels) + ridge * weights
        curvature = (table * (chances * (1 - chances))[:, None]).T @ table + np.diag(ridge + 1e-9)
        step, scale = np.linalg.solve(curvature, gradient), 1.0
        while (new := _loss(table, labels, ridge, weights - scale * step)) > loss and scale > 1e-4:
            scale /= 2
        weights = weights - scale * step
        if loss - new < 1e-9 * max(1.0, loss):
            break
        loss = new
    return float(weights[0]), weights[1:]


def log_loss(probabilities: Numbers, labels: Numbers) -> float:
    """Mean negative log-likelihood."""
    chances = np.clip(probabilities, 1e-12, 1 - 1e-12)
    return float(-(labels * np.log(chances) + (1 - labels) * np.log(1 - chances)).mean())


def auc(probabilities: Numbers, labels: Numbers) -> float:
    """The chance that a positive example has a higher probability than a negative one; ties count half.

    Example:
        >>> auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0.0, 0.0, 1.0, 1.0]))
        0.75
    """
    positive, negative = probabilities[labels > 0.5], np.sort(probabilities[labels <= 0.5])
    below, not_above = np.searchsorted(negative, positive, "left"), np.searchsorted(negative, positive, "right")
    return float((below + not_above).sum() / 2 / (len(positive) * len(negative)))


@dataclass(frozen=True)
class Bin:
    """Examples of like probability: from, to, how many, their mean probability, and the share that came true."""

    low: float
    high: float
    count: int
    predicted: float
    observed: float


def reliability(probabilities: Numbers, labels: Numbers, bins: int = BINS) -> list[Bin]:
    """Bins of equal width; empty ones are left out."""
    places = np.minimum((probabilities * bins).astype(int), bins - 1)
    return [
        Bin(
            *(place / bins, (place + 1) / bins, int(inside.sum())),
            *(float(probabilities[inside].mean()), float(labels[inside].mean())),
        )
        for place in range(bins)
        if (inside := places == place).any()
    ]


def brier(probabilities: Numbers, labels: Numbers) -> float:
    """Mean squared error of probabilities."""
    return float(((probabilities - labels) ** 2).mean())


def _logit(chance: float) -> float:
    return float(np.log(chance / (1 - chance)))


def _loss(table: Numbers, labels: Numbers, ridge: Numbers, weights: Numbers) -> float:
    scores = table @ weights
    return float((np.logaddexp(0.0, scores) - labels * scores).sum() + 0.5 * (ridge * weights**2).sum())
