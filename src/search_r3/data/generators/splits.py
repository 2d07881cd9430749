"""Dividing groups among splits."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping


def divide_groups(
    weights: Mapping[str, int], shares: Mapping[str, float], seed: int, size: Callable[[int], int] = int
) -> dict[str, str]:
    """Give every group whole to one split, so that the splits have their shares of the weight.

    Larger groups first, those of like size in seeded order, each to the split that lacks most of its share.

    Args:
        weights: group -> weight.
        shares: split -> share of the whole.
        seed: of the order.
        size: what of a weight makes two groups of like size; by default the weight itself.

    Returns:
        group -> split.
    """
    order = sorted(weights)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda group: -size(weights[group]))
    total, filled, chosen = sum(weights.values()), dict.fromkeys(shares, 0), {}
    for group in order:
        split = max(shares, key=lambda name: shares[name] - filled[name] / total)
        chosen[group] = split
        filled[split] += weights[group]
    return chosen
