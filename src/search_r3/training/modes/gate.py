"""Fitting the gate of mode auto: labels from our own evaluation, a logistic regression, how far it can be trusted.

Every query is answered in both plain modes. Its label is whether reasoning pays at a price per token, `u =
measure(reason) - measure(direct) - price * tokens > 0`. All that is reported is of queries that a fit has not seen:
queries with the same relevant documents, which look alike, are in one fold.

The direct vector is read through its principal components: there are more dimensions than a few hundred queries can
tell apart. How far their weights are held down is chosen by the log loss of the folds.

Shapes: `Q` queries, `D` vector size, `K` best documents.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...data.collection import Collection
from ...data.triples import hold_out
from ...errors import DataError
from ...evaluation.benchmark import EvaluationOptions, measured
from ...evaluation.results import provenance
from ...evaluation.systems import index_documents, rank_vectors
from ...model.encoder import SearchR3
from ...model.modes.auto import probe_of, reason_frame_of
from ...model.modes.gate import Gate, Head, Numbers, Weighted, score_features, sigmoid, worth
from ...modes import PLAIN_MODES
from ...retrieval.metrics import DEPTH, MAIN, MEASURES, measure
from ...retrieval.ranking import make_requests
from ...types import Array, Rows, Watch
from .logistic import auc, brier, fit_logistic, log_loss, reliability

PENALTIES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 1e6)
"""Of the components of vectors, from free to silent; of the features of scores it is 1."""
COMPONENTS = 256
FOLDS = 5
LEAST = 20
"""Queries that a fit needs, and of these so many of each kind as there are folds."""
TOKEN_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of reason mode's tokens, for each of which the report names a price."""


@dataclass(frozen=True)
class Labelled:
    """Queries in both plain modes.

    Attributes:
        query_ids: of the queries.
        vectors: direct vectors, `Q x D`, with all dimensions of the model.
        scores: of the best documents for these, `Q x K`, best first.
        direct: the measure in direct mode, `Q`.
        reason: in reason mode, `Q`.
        tokens: of the reasoning, `Q`.
        groups: of queries with the same relevant documents, `Q`.
        facts: on what: collection, splits, measure.
    """

    query_ids: list[str]
    vectors: Array
    scores: Array
    direct: Numbers
    reason: Numbers
    tokens: Numbers
    groups: list[int]
    facts: dict[str, Any]


def label_queries(
    model: SearchR3,
    collection: Collection,
    splits: Sequence[str],
    *,
    held_out: Sequence[str] = (),
    measure_name: str = MAIN,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 128,
    watch: Watch | None = None,
) -> Labelled:
    """Answer queries in both plain modes and measure them.

    Args:
        model: the model, with all of its dimensions.
        collection: documents, queries and judgements.
        splits: whose queries are meant; best those that no stage has trained on.
        held_out: splits that are measured on; their queries are left out, by id or by text (`triples.hold_out`).
        measure_name: of `MEASURES`.
        limit: size of a random sample of the queries.
        seed: of the sample.
        batch_size: queries reasoned about at once.
        watch: told of the progress.

    Raises:
        DataError: an unknown measure or split, or too few queries.
    """
    qrels = _judgements(collection, splits, held_out, measure_name, limit, seed)
    requests = make_requests(collection, qrels)
    index = index_documents(
        model, collection.documents, progress=watch("documents", len(collection.documents)) if watch else None
    )
    texts = [request.bare for request in requests]
    more: dict[str, Any] = {"instruction": [request.instruction for request in requests], "batch_size": batch_size}
    direct, reason = (
        model.encode_query(texts, mode, progress=watch(mode, len(texts)) if watch else None, **more)
        for mode in PLAIN_MODES
    )
    depth = int(measure_name.partition("@")[2] or DEPTH)
    values = []
    for vectors in (direct.vectors, reason.vectors):
        rankings = zip(rank_vectors(index, vectors, requests, depth), qrels.values(), strict=True)
        values.append(np.array([measure(one.doc_ids, gains)[measure_name] for one, gains in rankings]))
    of_documents: dict[frozenset[str], int] = {}
    relevant = (frozenset(key for key, gain in gains.items() if gain > 0) for gains in qrels.values())
    return Labelled(
        *(list(qrels), direct.vectors, index.top_scores(direct.vectors), values[0], values[1]),
        np.array(reason.reasoning_tokens, dtype=float),
        [of_documents.setdefault(key, len(of_documents)) for key in relevant],
        {
            "collection": collection.name,
            "hash": collection.content_hash(),
            "splits": [*splits],
            "measure": measure_name,
            "model": model.backbone.source,
            "revision": model.backbone.revision,
        },
    )


def _judgements(
    collection: Collection,
    splits: Sequence[str],
    held_out: Sequence[str],
    measure_name: str,
    limit: int | None,
    seed: int,
) -> dict[str, dict[str, int]]:
    """The queries to learn from, with their judgements."""
    if measure_name not in MEASURES:
        raise DataError(f"unknown measure {measure_name!r}; expected one of {', '.join(MEASURES)}")
    kept = hold_out(collection, splits, held_out)
    lost = {query_id for split in splits for query_id in collection.split(split) if query_id not in kept.split(split)}
    options = EvaluationOptions()
    qrels = {key: gains for split in splits for key, gains in measured(collection, split, options).items()}
    qrels = {query_id: gains for query_id, gains in qrels.items() if query_id not in lost}
    if limit is not None and limit < len(qrels):
        chosen = set(random.Random(seed).sample(sorted(qrels), limit))
        qrels = {query_id: gains for query_id, gains in qrels.items() if query_id in chosen}
    if len(qrels) < LEAST:
        raise DataError(f"{len(qrels)} queries in {', '.join(splits)}; a gate needs at least {LEAST}")
    return qrels


def fit_gate(model: SearchR3, labelled: Labelled, price: float | None = None, seed: int = 0) -> Gate:
    """The gate of a model; `fitted` in it is its report.

    Args:
        model: for its probe.
        labelled: the queries.
        price: what a token must earn, in units of the measure; by default half of what it earns on average.
        seed: of the folds.

    Raises:
        DataError: reasoning pays for all of these queries, for none, or for too few to learn from.
    """
    gains, tokens = labelled.reason - labelled.direct, labelled.tokens
    average = max(0.0, float(gains.sum())) / max(1.0, float(tokens.sum()))
    price = average / 2 if price is None else price
    utility = gains - price * tokens
    labels = (utility > 0).astype(float)
    for kind, count in (("pays", int(labels.sum())), ("does not pay", int((1 - labels).sum()))):
        if count < FOLDS:
            raise DataError(
                f"at a price of {price:.3g} {labelled.facts['measure']} a token, reasoning {kind} for {count} of "
                f"{len(labels)} queries, too few to learn from; take the mode that is right for nearly all of them "
                f"(direct {labelled.direct.mean():.3f}, reason {labelled.reason.mean():.3f}), another price, or others"
            )
    folds = _folds(labelled.groups, seed), _folds(range(len(labels)), seed)
    terms = {
        "gain": float(utility[labels > 0].mean()),
        "loss": float(utility[labels < 1].mean()),
        "tokens": float(tokens.mean()),
    }
    heads, reports = {}, {}
    for name, scores in (("by_vector", None), ("by_scores", labelled.scores)):
        heads[name], chances, penalty = _fit_head(labelled.vectors, scores, labels, folds)
        reports[name] = {"penalty": penalty} | _report(labelled, labels, chances, price, terms)
    fitted = labelled.facts | {
        "queries": len(labels),
        "pays": float(labels.mean()),
        "direct": float(labelled.direct.mean()),
        "reason": float(labelled.reason.mean()),
        "folds": FOLDS,
        **reports,
        "provenance": provenance(),
    }
    probe = tuple(round(float(value), 6) for value in probe_of(model.backbone))
    own = {"probe": probe, "reason_frame": reason_frame_of(model.backbone)}
    return Gate(price=price, measure=labelled.facts["measure"], **terms, **heads, **own, fitted=fitted)


class _Basis:
    """What a fit reads of its queries: components of vectors, scaled by one number, and features of unit variance."""

    def __init__(self, vectors: Array, features: Mapping[str, Numbers]) -> None:
        numbers = np.asarray(vectors, dtype=float)
        self.mean = numbers.mean(axis=0)
        centred = numbers - self.mean
        size = min(COMPONENTS, len(numbers) - 1, numbers.shape[1])
        self.scale = max(1e-9, float(np.sqrt((centred**2).mean())))
        self.components = np.linalg.svd(centred, full_matrices=False)[2][:size] / self.scale  # size x D
        self.means = {name: float(values.mean()) for name, values in features.items()}
        self.spreads = {name: max(1e-9, float(values.std())) for name, values in features.items()}
        columns = [(values - self.means[name]) / self.spreads[name] for name, values in features.items()]
        self.table = np.column_stack([centred @ self.components.T, *columns])

    def head(self, labels: Numbers, penalty: float) -> Head:
        """The regression, in terms of the vector itself."""
        size = len(self.components)
        penalties = np.array([penalty] * size + [1.0] * len(self.means))
        bias, weights = fit_logistic(self.table, labels, penalties)
        of_vector = weights[:size] @ self.components
        of_scores = {
            name: Weighted(weight=float(weight) / self.spreads[name], mean=self.means[name])
            for name, weight in zip(self.means, weights[size:], strict=True)
        }
        return Head(bias=bias, vector=tuple(of_vector.tolist()), centre=float(of_vector @ self.mean), scores=of_scores)


def _fit_head(
    vectors: Array, scores: Array | None, labels: Numbers, folds: tuple[Rows, Rows]
) -> tuple[Head, Numbers, float]:
    """A head, the probabilities of the queries that a fold's fit has not seen, and the penalty that was chosen.

    The probabilities are of the first folds, which keep queries alike together. Queries to come ask for documents that
    were asked for before, and for others: so the penalty is the one that is best on average over both kinds of folds.
    """
    features = {} if scores is None else score_features(scores)
    unseen, apart = (_unseen(vectors, features, labels, one) for one in folds)
    losses = {one: log_loss(unseen[one], labels) + log_loss(apart[one], labels) for one in PENALTIES}
    penalty = min(losses, key=losses.__getitem__)
    return _Basis(vectors, features).head(labels, penalty), unseen[penalty], penalty


def _unseen(vectors: Array, features: Mapping[str, Numbers], labels: Numbers, folds: Rows) -> dict[float, Numbers]:
    """Penalty -> the probability of each query by the fit of the other folds."""
    chances = {penalty: np.empty(len(labels)) for penalty in PENALTIES}
    for fold in range(FOLDS):
        inside, outside = folds != fold, folds == fold
        basis = _Basis(vectors[inside], {name: values[inside] for name, values in features.items()})
        others = {name: values[outside] for name, values in features.items()}
        for penalty, column in chances.items():
            evidence = basis.head(labels[inside], penalty).evidence(vectors[outside], others)
            column[outside] = sigmoid(np.sum(list(evidence.values()), axis=0))
    return chances


def _folds(groups: Sequence[int], seed: int) -> Rows:
    """The fold of each query: whole groups, the folds of like size."""
    order = sorted(set(groups))
    random.Random(seed).shuffle(order)
    sizes = {group: groups.count(group) for group in order}
    filled = [0] * FOLDS
    fold_of = {}
    for group in sorted(order, key=lambda one: -sizes[one]):
        fold_of[group] = filled.index(min(filled))
        filled[fold_of[group]] += sizes[group]
    return np.array([fold_of[group] for group in groups])


def _report(
    labelled: Labelled, labels: Numbers, chances: Numbers, price: float, terms: dict[str, float]
) -> dict[str, Any]:
    """Calibration of probabilities, and what deciding by them keeps of reasoning's gain, at this price and others."""
    order = np.argsort(-chances)
    spent = np.cumsum(labelled.tokens[order]) / max(1.0, float(labelled.tokens.sum()))
    prices = [price]
    for share in TOKEN_SHARES:
        last = chances[order[min(len(order) - 1, int(np.searchsorted(spent, share)))]]
        earned = last * terms["gain"] + (1 - last) * terms["loss"]
        prices.append(price + earned / max(1e-12, terms["tokens"]))
    rows = [_at_price(labelled, chances, one, price, terms) for one in prices if one >= 0 or one == price]
    return {
        "auc": auc(chances, labels),
        "brier": brier(chances, labels),
        "brier_of_mean": brier(np.full(len(labels), labels.mean()), labels),
        "log_loss": log_loss(chances, labels),
        "bins": [asdict(one) for one in reliability(chances, labels)],
        **rows[0],
        "prices": rows[1:],
    }


def _at_price(
    labelled: Labelled, chances: Numbers, price: float, fitted_price: float, terms: dict[str, float]
) -> dict[str, float | None]:
    thinks = worth(chances, **terms, more=price - fitted_price)
    gains, tokens = labelled.reason - labelled.direct, labelled.tokens
    all_gain, all_tokens = float(gains.sum()), float(tokens.sum())
    return {
        "price": price,
        "share": float(thinks.mean()),
        "token_share": float(tokens[thinks].sum()) / all_tokens if all_tokens else None,
        "gain": float(gains[thinks].sum()) / len(gains),
        "gain_share": float(gains[thinks].sum()) / all_gain if all_gain > 0 else None,
        "utility": float((gains - price * tokens)[thinks].sum()) / len(gains),
    }
