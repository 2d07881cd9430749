"""The pathwise term of stage 2: a differentiable ranking loss of the rollouts' own vectors.

The expected reward depends on the weights through the text that is sampled, which GRPO trains, and through the vector
that is read off it. This term trains the second: InfoNCE over what the search just found, the documents held fixed.

Shapes: `B` replies, `D` vector size, `M` documents.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...environment.environment import RetrievalEnvironment
from ...environment.scoring import Score
from .. import losses


def embedding_loss(
    vectors: Tensor,
    environment: RetrievalEnvironment,
    query_ids: Sequence[str],
    scores: Sequence[Score],
    contrastive_temperature: float,
) -> Tensor:
    """InfoNCE of each vector, `B x D`, against the best documents of its own ranking; the mean.

    The positive is the query's best relevant document, which is added where the ranking does not hold it; left out of
    the sum are its other relevant ones, and documents with the text of one. What the query's rankings leave out is not
    in its ranking. No document outside of these rankings is touched, so nothing grows with the corpus.

    Args:
        vectors: of the replies, with gradients.
        environment: holds the documents' vectors, which get none; of several processes, those that it was told to
            `keep_near`.
        query_ids: the query of each, `B`.
        scores: of each, with its nearest documents.
        contrastive_temperature: tau.
    """
    queries = [environment.query_rows(query_id) for query_id in query_ids]
    rivals = [score.nearest[query.are_negatives(score.nearest)] for query, score in zip(queries, scores, strict=True)]
    rows = np.unique(np.concatenate([*rivals, *(query.positives for query in queries)]))  # M
    documents = torch.from_numpy(environment.vectors_at(rows)).to(vectors.device)  # M x D
    excluded = torch.ones((len(queries), len(rows)), dtype=torch.bool)
    best = []
    for place, (query, own) in enumerate(zip(queries, rivals, strict=True)):
        candidates = torch.from_numpy(np.searchsorted(rows, query.positives))
        cosines = documents[candidates] @ vectors[place].detach().to(documents)
        best.append(int(candidates[int(cosines.argmax())]))
        excluded[place, [best[-1], *np.searchsorted(rows, own)]] = False
    positives = torch.tensor(best, device=vectors.device)
    return losses.info_nce(vectors, documents, positives, excluded.to(vectors.device), contrastive_temperature)
