"""Stage 1 of mode latent: K soft tokens in the place of a text, then the embed token, whose state is the vector.

Two losses, beside all others of stage 1, which train direct and reason mode as ever: InfoNCE of the vector, and the
cross-entropy of each soft token to the words of its piece of the written trace. A contrastive loss alone teaches soft
tokens nothing where one glance tells the training's queries apart; a whole sentence said at once they can feed on.

Decisions: a trace is cut at its sentences, and its pieces are said in their order. What every trace says is no thought:
a word weighs the square of `log(traces / traces that have it)`, among the traces of the batch, and the weights of a
piece sum to 1. The trace is that of the likeliest style that reason mode learns to write.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

WORDS_WEIGHT = 0.3
"""Of the words' cross-entropy among the losses of mode latent; the others weigh as those of the other modes do."""
_RARITY = 2
"""Power of the logarithm: in a batch of tens of traces it is small, and words that many have would drown names."""


def words_of(traces: Sequence[Sequence[Sequence[int]]], steps: int) -> list[list[dict[int, float]]]:
    """What the soft tokens of some queries are to say.

    Args:
        traces: of each query the token ids of its trace's sentences; none where it has no trace.
        steps: K.

    Returns:
        Of each query and each soft token: token id -> weight; empty where there is nothing that other traces do not
        say too.

    Example:
        >>> words_of([[[5, 1], [5, 2]], [[5, 3]]], 2)
        [[{1: 1.0}, {2: 1.0}], [{3: 1.0}, {3: 1.0}]]
    """
    counts = Counter(token for trace in traces for token in {token for part in trace for token in part})
    written = sum(bool(trace) for trace in traces)
    rarity = {token: math.log(written / count) ** _RARITY for token, count in counts.items()}
    return [[_weighed(piece, rarity) for piece in pieces(trace, steps)] for trace in traces]


def pieces(sentences: Sequence[Sequence[int]], steps: int) -> list[list[int]]:
    """Sentences as so many pieces, in their order; where there are fewer sentences, the last stands for the rest.

    Example:
        >>> pieces([[1], [2], [3]], 2), pieces([[1], [2]], 3), pieces([], 1)
        ([[1], [2, 3]], [[1], [2], [2]], [[]])
    """
    count = len(sentences)
    if count <= steps:
        return [list(sentences[min(step, count - 1)]) if count else [] for step in range(steps)]
    cuts = [step * count // steps for step in range(steps + 1)]
    return [[token for part in sentences[start:end] for token in part] for start, end in pairwise(cuts)]


def _weighed(piece: Sequence[int], rarity: Mapping[int, float]) -> dict[int, float]:
    own = {token: rarity[token] for token in piece if rarity[token] > 0}
    total = sum(own.values())
    return {token: weight / total for token, weight in own.items()}
