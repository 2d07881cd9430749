from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from search_r3.config import RewardWeights
from search_r3.data.collection import Collection
from search_r3.environment.environment import RetrievalEnvironment
from search_r3.environment.refresh import make_policy
from search_r3.environment.reward import RewardParts, reward_parts
from search_r3.errors import ConfigError, DataError, RewardError
from search_r3.model.generation import Rollout
from search_r3.retrieval.index import ExactIndex

WEIGHTS = RewardWeights(ranking=1.0, similarity=0.5, format=0.25, length=0.1)


class MovingEncoder:
    """Document i of the collection lies at angle `i * step + shift`; `shift` moves as a learning model would."""

    def __init__(self, collection: Collection) -> None:
        self.place = {document.full_text: i for i, document in enumerate(collection.documents.values())}
        self.shift = 0.0
        self.encoded: list[str] = []

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        self.encoded += texts
        angles = np.array([self.place[text] * 0.03 + self.shift for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def rollout(angle: float, forced: bool = False, tokens: int = 5) -> Rollout:
    vector = torch.tensor([np.cos(angle), np.sin(angle)], dtype=torch.float32)
    ids = [1] * (tokens + 1)
    mask = [1] * tokens + [0 if forced else 1]
    return Rollout([0], ids, mask, [0.0] * len(ids), vector, "text")


def environment(collection: Collection, encode: MovingEncoder, policy: str) -> RetrievalEnvironment:
    return RetrievalEnvironment(
        collection, collection.split("train"), encode, make_policy(policy), WEIGHTS, k=10, max_new_tokens=10
    )


def test_reward_parts_by_hand() -> None:
    parts = reward_parts(
        {"a": 2, "b": 40}, [0.5, -0.5], {"a": 1, "b": 1}, k=10, forced=False, reasoning_tokens=4, max_new_tokens=16
    )
    ideal = 1 + 1 / np.log2(3)
    assert parts.ranking == pytest.approx((1 / np.log2(3)) / ideal)
    assert (parts.similarity, parts.format, parts.length) == (0.5, 1.0, -0.25)
    assert parts.total(WEIGHTS) == pytest.approx(parts.ranking + 0.25 + 0.25 - 0.025)
    assert RewardParts(1.0, 1.0, 1.0, 0.0).total(RewardWeights(similarity=0.0, format=0.0)) == 1.0


def test_a_reward_that_cannot_be_computed_is_an_error_never_zero() -> None:
    with pytest.raises(RewardError, match="without a relevant document"):
        reward_parts({}, [], {"a": 0}, k=10, forced=False, reasoning_tokens=1, max_new_tokens=4)
    with pytest.raises(RewardError, match="not finite"):
        reward_parts({"a": 1}, [float("nan")], {"a": 1}, k=10, forced=False, reasoning_tokens=1, max_new_tokens=4)


def test_the_vector_that_ranks_the_right_document_first_earns_more(collection: Collection) -> None:
    world = environment(collection, MovingEncoder(collection), "never")
    feedback = world.feedback([rollout(0.0), rollout(0.07), rollout(1.1)], ["q00", "q00", "q00"], policy_version=0)
    assert feedback.best_ranks == [1, 5, 40]
    rankings = [part.ranking for part in feedback.parts]
    assert rankings == pytest.approx([1.0, 1 / np.log2(6), 0.0])
    assert feedback.rewards == pytest.approx([part.total(WEIGHTS) for part in feedback.parts])


def test_a_forced_token_loses_the_format_part(collection: Collection) -> None:
    world = environment(collection, MovingEncoder(collection), "never")
    feedback = world.feedback([rollout(0.0), rollout(0.0, forced=True)], ["q00", "q00"], policy_version=0)
    assert feedback.rewards[0] - feedback.rewards[1] == pytest.approx(WEIGHTS.format)


def test_never_encodes_the_positives_of_the_batch_and_nothing_else(collection: Collection) -> None:
    encode = MovingEncoder(collection)
    world = environment(collection, encode, "never")
    encode.encoded.clear()
    encode.shift = 0.61
    feedback = world.feedback([rollout(0.61), rollout(0.64)], ["q00", "q01"], policy_version=3)
    assert encode.encoded == [collection.documents[doc_id].full_text for doc_id in ("d00", "d01")]
    assert feedback.best_ranks[0] == 1, "a fresh query meets a fresh positive"
    assert feedback.refresh.documents_encoded == 2
    assert feedback.refresh.staleness_max == 3
    assert feedback.refresh.staleness_mean == pytest.approx(3 * 38 / 40)
    encode.encoded.clear()
    world.feedback([rollout(0.61)], ["q00"], policy_version=3)
    assert encode.encoded == [], "what is fresh is not encoded again"


def test_full_encodes_everything_at_every_version(collection: Collection) -> None:
    encode = MovingEncoder(collection)
    world = environment(collection, encode, "full")
    encode.shift = 0.6
    report = world.feedback([rollout(0.0)], ["q00"], policy_version=1).refresh
    assert (report.documents_encoded, report.staleness_max) == (40, 0)
    fresh = encode([document.full_text for document in collection.documents.values()])
    np.testing.assert_array_equal(world.index.vectors(list(collection.documents)), fresh)


def test_the_state_is_saved_and_another_corpus_is_refused(tmp_path, collection: Collection) -> None:
    encode = MovingEncoder(collection)
    world = environment(collection, encode, "never")
    world.feedback([rollout(0.0)], ["q00"], policy_version=2)
    world.save(tmp_path / "index")
    index = ExactIndex.load(tmp_path / "index")
    np.testing.assert_array_equal(index.encoded_at_version, world.index.encoded_at_version)
    smaller = Collection("less", {"d00": collection.documents["d00"]}, collection.queries, collection.qrels)
    with pytest.raises(DataError, match="hold different documents"):
        RetrievalEnvironment(smaller, {}, encode, make_policy("never"), WEIGHTS, k=10, max_new_tokens=4, index=index)


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown refresh policy 'sometimes'; known: never, full"):
        make_policy("sometimes")
