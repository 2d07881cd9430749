from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from search_r3.config import RefreshSettings, RewardSettings
from search_r3.data.collection import Collection, Document, Query
from search_r3.environment.environment import RetrievalEnvironment
from search_r3.environment.refresh import Selective
from search_r3.environment.sketch import SketchIndex
from search_r3.errors import DataError, RewardError
from search_r3.evaluation.benchmark import EvaluationOptions, evaluate
from search_r3.evaluation.results import SystemInfo
from search_r3.evaluation.systems import Answers, System, rank_vectors
from search_r3.model.engine.generation import Rollout
from search_r3.parallel import Communicator
from search_r3.retrieval.index import ExactIndex
from search_r3.retrieval.metrics import ndcg, rank
from search_r3.retrieval.ranking import RankRequest
from search_r3.types import Progress
from tests.threads import together

WEIGHTS = RewardSettings(ndcg=1.0, log_rank=0.0, contrastive=0.0, format=0.25, tokens=0.1)


class MovingEncoder:
    """Document i of the collection lies at angle `i * step + shift`; `shift` moves as a learning model would."""

    def __init__(self, collection: Collection) -> None:
        self.place = {document.full_text: i for i, document in enumerate(collection.documents.values())}
        self.shift = 0.0
        self.encoded: list[str] = []

    def encode_document(self, texts: Sequence[str], progress: Progress | None = None) -> np.ndarray:
        self.encoded += texts
        if progress is not None:
            progress(len(texts), sum(self.count_document_tokens(texts)))
        angles = np.array([self.place[text] * 0.03 + self.shift for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    def count_document_tokens(self, texts: Sequence[str]) -> list[int]:
        return [10 + self.place[text] for text in texts]


def rollout(angle: float, forced: bool = False, tokens: int = 5) -> Rollout:
    vector = torch.tensor([np.cos(angle), np.sin(angle)], dtype=torch.float32)
    ids = [1] * (tokens + 1)
    mask = [1] * tokens + [0 if forced else 1]
    return Rollout([0], ids, mask, [0.0] * len(ids), vector, "text")


def environment(
    collection: Collection, encode: MovingEncoder, policy: str, frozen: bool = False, **options: Any
) -> RetrievalEnvironment:
    refresh = RefreshSettings(policy=policy, **options)  # type: ignore[arg-type]
    return RetrievalEnvironment(
        collection, collection.split("train"), encode, refresh, WEIGHTS, k=10, max_new_tokens=10, frozen=frozen
    )


def versions_of(world: RetrievalEnvironment, doc_ids: Sequence[str]) -> list[int]:
    return [int(world.index.encoded_at_version[world.index.row(doc_id)]) for doc_id in doc_ids]


def test_the_vector_that_ranks_the_right_document_first_earns_more(collection: Collection) -> None:
    world = environment(collection, MovingEncoder(collection), "never")
    feedback = world.feedback([rollout(0.0), rollout(0.07), rollout(1.1)], ["q00", "q00", "q00"], policy_version=0)
    assert feedback.best_ranks == [1, 5, 40]
    rankings = [part.ndcg for part in feedback.parts]
    assert rankings == pytest.approx([1.0, 1 / np.log2(6), 0.0])
    assert feedback.rewards == pytest.approx([part.total(WEIGHTS) for part in feedback.parts])


@pytest.mark.parametrize("index", ["exact", "approximate"])
def test_what_is_stale_is_encoded_some_documents_at_a_time(
    index: str, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors of a whole corpus never stand beside those of the index."""
    sizes, seen = [], MovingEncoder.encode_document

    def encode_document(self: MovingEncoder, texts: Sequence[str], progress: Progress | None = None) -> np.ndarray:
        sizes.append(len(texts))
        return seen(self, texts, progress)

    encoders = [MovingEncoder(collection) for _ in range(2)]
    whole, parts = (environment(collection, encode, "full", index=index) for encode in encoders)
    for encode in encoders:
        encode.shift = 0.3
    expected = whole.feedback([rollout(0.3)], ["q00"], 1)
    monkeypatch.setattr("search_r3.environment.environment.ROWS_AT_A_TIME", 7)
    monkeypatch.setattr(MovingEncoder, "encode_document", encode_document)
    answer = parts.feedback([rollout(0.3)], ["q00"], 1)
    assert (sum(sizes), max(sizes)) == (40, 7)
    assert answer.rewards == expected.rewards and answer.refresh.documents_encoded == 40
    assert versions_of(parts, parts.index.doc_ids) == [1] * 40
    encoders[1].shift = 0.6
    caught = parts.caught_up(2)
    assert caught is not None and (sum(sizes), max(sizes)) == (80, 7)
    np.testing.assert_array_equal(
        caught.vectors_at(range(40)), encoders[1].encode_document(parts._texts(np.arange(40)))
    )


def test_feedback_for_nothing_or_for_a_query_without_an_answer_is_refused(collection: Collection) -> None:
    for policy in ("never", "selective"):
        world = environment(collection, MovingEncoder(collection), policy)
        with pytest.raises(RewardError, match="no rollouts were given"):
            world.feedback([], [], 1)
        world.qrels = {"q00": {"d00": 0}}
        with pytest.raises(RewardError, match="query 'q00' has no relevant document"):
            world.feedback([rollout(0.0)], ["q00"], 1)


def test_never_encodes_the_positives_of_the_batch_and_nothing_else(collection: Collection) -> None:
    encode = MovingEncoder(collection)
    world = environment(collection, encode, "never")
    encode.encoded.clear()
    encode.shift = 0.61
    feedback = world.feedback([rollout(0.61), rollout(0.64)], ["q00", "q01"], policy_version=3)
    assert sorted(encode.encoded) == sorted(collection.documents[doc_id].full_text for doc_id in ("d00", "d01"))
    assert feedback.best_ranks[0] == 1, "a fresh query meets a fresh positive"
    assert feedback.refresh.documents_encoded == 2
    assert feedback.refresh.staleness_max == 3
    assert feedback.refresh.staleness_mean == pytest.approx(3 * 38 / 40)
    encode.encoded.clear()
    world.feedback([rollout(0.61)], ["q00"], policy_version=3)
    assert encode.encoded == [], "what is fresh is not encoded again"


def test_frozen_documents_keep_their_first_vectors_whatever_the_policy_says(collection: Collection) -> None:
    encode = MovingEncoder(collection)
    world = environment(collection, encode, "full", frozen=True)
    before = world.exact_index.vectors_at(np.arange(40)).copy()
    encode.encoded.clear()
    encode.shift = 0.6
    feedback = world.feedback([rollout(0.03)], ["q01"], policy_version=5)
    assert encode.encoded == [] and feedback.best_ranks == [1]
    report = feedback.refresh
    assert (report.documents_encoded, report.tokens_encoded, report.staleness_max, report.staleness_mean) == (
        0,
        0,
        0,
        0,
    )
    np.testing.assert_array_equal(world.exact_index.vectors_at(np.arange(40)), before)
    with pytest.raises(RewardError, match="no rollouts were given"):
        world.feedback([], [], policy_version=6)


def test_full_encodes_everything_at_every_version(collection: Collection) -> None:
    encode = MovingEncoder(collection)
    world = environment(collection, encode, "full")
    encode.shift = 0.6
    report = world.feedback([rollout(0.0)], ["q00"], policy_version=1).refresh
    assert (report.documents_encoded, report.staleness_max) == (40, 0)
    assert report.tokens_encoded == sum(10 + i for i in range(40))
    fresh = encode.encode_document([document.full_text for document in collection.documents.values()])
    np.testing.assert_array_equal(world.index.vectors_at(world.index.rows_of(list(collection.documents))), fresh)


def test_periodic_encodes_everything_at_every_nth_version_only(collection: Collection) -> None:
    world = environment(collection, MovingEncoder(collection), "periodic", every=3)
    encoded = [world.feedback([rollout(0.0)], ["q00"], version).refresh.documents_encoded for version in range(1, 7)]
    assert encoded == [1, 1, 40, 1, 1, 40]


def test_shortlist_encodes_the_best_ranked_and_ranks_again(collection: Collection) -> None:
    encode = MovingEncoder(collection)
    world = environment(collection, encode, "shortlist", depth=3)
    encode.encoded.clear()
    # The positive of q00 lies at 0.0; held vectors near 0.0 are d00, d01, d02.
    report = world.feedback([rollout(0.0)], ["q00"], policy_version=1).refresh
    assert {text.split()[1] for text in encode.encoded} == {"house", "boat", "horse"}
    assert report.documents_encoded == 3
    encode.shift = 0.5
    feedback = world.feedback([rollout(0.53)], ["q01"], policy_version=2)
    assert feedback.best_ranks == [1], "the positive is fresh and its stale rivals were encoded again"


def test_selective_reaches_neighbours_that_no_shortlist_shows(collection: Collection) -> None:
    fresh = {}
    for hops in (0, 1):
        world = environment(collection, MovingEncoder(collection), "selective", depth=1, hops=hops, neighbours=2)
        world.feedback([rollout(0.03 * 20)], ["q00"], policy_version=1)
        fresh[hops] = {d for d, v in zip(world.index.doc_ids, world.index.encoded_at_version, strict=True) if v == 1}
    assert fresh[0] == {"d00", "d20"}
    assert fresh[1] == {"d00", "d01", "d02", "d20", "d19", "d21"}


def test_selective_prefers_what_can_pass_a_positive_and_is_staler(collection: Collection) -> None:
    world = environment(
        collection, MovingEncoder(collection), "selective", depth=40, hops=0, neighbours=2, max_documents=4
    )
    # Positive d00 at 0.0, rollout at 0.06: d04 (0.12) scores as d00 does, then come d03 and d01, d02 and d05.
    world.feedback([rollout(0.06)], ["q00"], policy_version=1)
    versions = dict(zip(world.index.doc_ids, world.index.encoded_at_version.tolist(), strict=True))
    assert {doc_id for doc_id, version in versions.items() if version == 1} == {"d00", "d01", "d03", "d04"}
    world.feedback([rollout(0.06)], ["q00"], policy_version=2)
    versions = dict(zip(world.index.doc_ids, world.index.encoded_at_version.tolist(), strict=True))
    assert versions["d02"] == 2, "twice as stale, and nearly as close"


def test_selective_spends_nothing_on_what_passes_far_below_the_cut() -> None:
    # The positive lies 1,000 documents away from the rollout's vector; what is near it changes no nDCG@10.
    doc_ids = [f"d{i:04d}" for i in range(1200)]
    data = Collection(
        "long",
        {doc_id: Document(doc_id, f"text {doc_id}") for doc_id in doc_ids},
        {"q": Query("q", "where?")},
        {"train": {"q": {"d1000": 1}}},
    )
    encode = MovingEncoder(data)
    encode.place = {text: i / 15 for text, i in encode.place.items()}  # 0.002 apart: none behind the vector
    world = environment(data, encode, "selective", depth=10, hops=200, neighbours=10, max_documents=21)
    report = world.feedback([rollout(0.0)], ["q"], policy_version=1)
    assert report.best_ranks == [1001]
    fresh = {doc_id for doc_id, v in zip(world.index.doc_ids, world.index.encoded_at_version, strict=True) if v == 1}
    assert fresh == {"d1000", *doc_ids[:20]}, "the 2 k best, and the positive that is always fresh"


@pytest.mark.parametrize("policy", ["shortlist", "selective"])
def test_a_budget_is_kept_in_documents_and_in_tokens_but_positives_always_fit(
    collection: Collection, policy: str
) -> None:
    for options, documents in (({"max_documents": 6}, 6), ({"max_documents": 1}, 2), ({"max_tokens": 60}, None)):
        world = environment(collection, MovingEncoder(collection), policy, depth=20, **options)
        report = world.feedback([rollout(0.0), rollout(0.03)], ["q00", "q01"], policy_version=1).refresh
        assert documents in (report.documents_encoded, None)
        if documents is None:
            assert 21 < report.tokens_encoded <= 60, "more than the two positives, within the budget"
        assert {"d00", "d01"} <= {
            d for d, v in zip(world.index.doc_ids, world.index.encoded_at_version, strict=True) if v == 1
        }


@pytest.mark.parametrize("policy", ["shortlist", "selective"])
@pytest.mark.parametrize("budget", [{"max_documents": 6}, {"max_tokens": 90}])
def test_a_step_that_asks_again_has_one_budget(collection: Collection, policy: str, budget: dict[str, int]) -> None:
    world = environment(collection, MovingEncoder(collection), policy, depth=20, **budget)
    query_ids = list(collection.split("train"))[:4]
    asked = [world.feedback([rollout(0.03 * int(one[1:]))], [one], policy_version=1).refresh for one in query_ids]
    [most] = budget.values()
    spent = [one.documents_encoded if "max_documents" in budget else one.tokens_encoded for one in asked]
    assert sum(spent) <= most and spent[0] > sum(spent[1:])
    again = world.feedback([rollout(0.03 * int(query_ids[0][1:]))], query_ids[:1], policy_version=2).refresh
    assert again.documents_encoded == asked[0].documents_encoded, "the next step has a budget of its own"


def test_drift_corrects_what_it_does_not_encode(collection: Collection) -> None:
    held = {}
    for policy in ("never", "drift"):
        encode = MovingEncoder(collection)
        world = environment(collection, encode, policy, drift_sample=20)
        encode.shift = 0.4
        report = world.feedback([rollout(0.4)], ["q00"], policy_version=1).refresh
        fresh = encode.encode_document([document.full_text for document in collection.documents.values()])
        cosines = (world.index.vectors_at(world.index.rows_of(list(collection.documents))) * fresh).sum(axis=1)
        held[policy] = cosines[[v == 0 for v in versions_of(world, list(collection.documents))]].mean()
        assert (report.drift_gain > 0.9) == (policy == "drift")
        assert report.documents_encoded == (21 if policy == "drift" else 1)
        assert report.staleness_max == 1, "corrected vectors are still stale"
    assert held["drift"] > 0.999 > held["never"]


def test_a_correction_leaves_alone_what_is_fresh(collection: Collection) -> None:
    encode = MovingEncoder(collection)
    world = environment(collection, encode, "drift", drift_sample=16)
    encode.shift = 0.4
    for query_id in ("q00", "q01", "q04"):  # three batches of one version
        world.feedback([rollout(0.4)], [query_id], policy_version=1)
    fresh = encode.encode_document([collection.documents[d].full_text for d in world.index.doc_ids])
    current = world.index.encoded_at_version == 1
    assert 40 >= current.sum() > 30
    np.testing.assert_allclose(world.index.matrix[current], fresh[current], atol=1e-6)


def test_a_sample_too_small_for_a_map_is_not_paid_for(collection: Collection) -> None:
    world = environment(
        collection, MovingEncoder(collection), "shortlist", depth=2, max_documents=12, correct_drift=True
    )
    assert world.feedback([rollout(0.0)], ["q00"], policy_version=1).refresh.documents_encoded == 2


def test_corrected_policies_share_their_budget_with_the_sample(collection: Collection) -> None:
    world = environment(
        collection, MovingEncoder(collection), "shortlist", depth=40, max_documents=21, correct_drift=True,
        drift_sample=30,
    )  # fmt: skip
    report = world.feedback([rollout(0.0)], ["q00"], policy_version=1).refresh
    assert report.documents_encoded == 21
    versions = dict(zip(world.index.doc_ids, world.index.encoded_at_version.tolist(), strict=True))
    assert sum(versions[f"d{i:02d}"] for i in range(5)) == 5, "the best-ranked ones got their half"


def test_the_audit_finds_the_error_that_staleness_makes_and_leaves_the_index_alone(collection: Collection) -> None:
    encode = MovingEncoder(collection)
    stale = environment(collection, encode, "never", audit_documents=0)
    full = environment(collection, encode, "full")
    encode.shift = 0.2
    rollouts, owners = [rollout(0.2), rollout(0.3), rollout(0.5)], ["q00", "q01", "q04"]
    given, true = stale.feedback(rollouts, owners, 1), full.feedback(rollouts, owners, 1)
    before = stale.index.matrix.copy()
    audit = stale.audit(rollouts, owners, 1)
    assert audit.reward_error == pytest.approx(np.abs(np.subtract(given.rewards, true.rewards)).mean())
    assert audit.reward_error > 0.01
    assert audit.rank_error == pytest.approx(np.abs(np.subtract(given.best_ranks, true.best_ranks)).mean())
    overlap = [
        len(set(a) & set(b)) / 10
        for a, b in zip(
            *(w.index.search(np.stack([r.vector.numpy() for r in rollouts]), 10).doc_ids for w in (stale, full)),
            strict=True,
        )
    ]
    assert audit.top10_overlap == pytest.approx(np.mean(overlap))
    assert audit.drift_mean == pytest.approx((1 - np.cos(0.2)) * 37 / 40, rel=1e-3)
    np.testing.assert_array_equal(stale.index.matrix, before)
    assert full.audit(rollouts, owners, 1).reward_error == 0.0


def test_a_sampled_audit_encodes_little_and_sees_the_same_reward_error(collection: Collection) -> None:
    encode = MovingEncoder(collection)
    whole = environment(collection, encode, "never", audit_documents=0)
    sampled = environment(collection, encode, "never", audit_documents=3)
    encode.shift = 0.2
    rollouts, owners = [rollout(0.2), rollout(0.3)], ["q00", "q01"]
    for world in (whole, sampled):
        world.feedback(rollouts, owners, 1)
    audits = [world.audit(rollouts, owners, 1) for world in (whole, sampled)]
    assert audits[1].documents < 30 < audits[0].documents == 40
    assert audits[1].reward_error == pytest.approx(audits[0].reward_error)
    assert audits[0].reward_error > 0


@pytest.mark.parametrize("policy", ["full", "shortlist", "selective"])
def test_an_approximate_index_gives_the_same_rewards(tmp_path: Path, collection: Collection, policy: str) -> None:
    rollouts, owners = [rollout(0.3), rollout(0.36)], ["q00", "q01"]
    answers, worlds = [], []
    for index in ("exact", "approximate"):
        encode = MovingEncoder(collection)
        worlds.append(environment(collection, encode, policy, index=index))
        encode.shift = 0.3
        answers.append(worlds[-1].feedback(rollouts, owners, 1))
    assert answers[0].rewards == pytest.approx(answers[1].rewards)
    assert answers[0].best_ranks == answers[1].best_ranks
    assert isinstance(worlds[1].index, SketchIndex)
    assert answers[1].refresh.index_recall == 1.0
    worlds[1].save(tmp_path)
    again = RetrievalEnvironment(
        collection,
        collection.split("train"),
        encode,
        worlds[1].refresh,
        WEIGHTS,
        k=10,
        max_new_tokens=10,
        state=tmp_path,
    )
    assert isinstance(again.index, SketchIndex)
    assert again.feedback(rollouts, owners, 1).rewards == pytest.approx(worlds[0].feedback(rollouts, owners, 1).rewards)


def test_sketches_that_other_processes_saved_are_built_anew_and_watched(tmp_path: Path, collection: Collection) -> None:
    world = environment(collection, MovingEncoder(collection), "shortlist", index="approximate")
    world.save(tmp_path / "saved")
    (tmp_path / "index").mkdir()
    (tmp_path / "saved" / "index").rename(tmp_path / "index" / "shard-00000-of-00001")
    again = RetrievalEnvironment(
        *(collection, collection.split("train"), MovingEncoder(collection), world.refresh, WEIGHTS),
        k=10, max_new_tokens=10, state=tmp_path,
    )  # fmt: skip
    assert isinstance(again.index, SketchIndex) and again.index.audit_every > 0
    assert again.feedback([rollout(0.3)], ["q00"], 1).refresh.index_recall == 1.0, "and no NaN, which ends a run"


def test_processes_whose_searches_differ_encode_the_choice_of_the_first(collection: Collection) -> None:
    def work(communicator: Communicator) -> tuple[list[int], int]:
        refresh = RefreshSettings(policy="selective", neighbours=3, max_tokens=100)
        world = RetrievalEnvironment(
            *(collection, collection.split("train"), MovingEncoder(collection), refresh, WEIGHTS),
            k=10, max_new_tokens=10, communicator=communicator,
        )  # fmt: skip
        rows = world.index.rows_of(["d02", "d03"] if communicator.rank == 0 else [])
        world.policy.choose = lambda request: rows  # type: ignore[method-assign]
        report = world.feedback([rollout(0.0)], ["q00"], policy_version=1).refresh
        return world.index.encoded_at_version.tolist(), report.documents_encoded

    one, other = together(2, work)
    assert one == other and one[1] == sum(one[0]) == 3


@pytest.mark.parametrize("policy", ["never", "selective"])
def test_the_state_is_saved_and_another_corpus_is_refused(tmp_path: Path, collection: Collection, policy: str) -> None:
    encode = MovingEncoder(collection)
    world = environment(collection, encode, policy)
    world.feedback([rollout(0.0)], ["q00"], policy_version=2)
    world.save(tmp_path)
    arguments = (encode, world.refresh, WEIGHTS)
    again = RetrievalEnvironment(
        collection, collection.split("train"), *arguments, k=10, max_new_tokens=10, state=tmp_path
    )
    np.testing.assert_array_equal(again.index.encoded_at_version, world.index.encoded_at_version)
    np.testing.assert_array_equal(again.index.matrix, world.index.matrix)
    if isinstance(world.policy, Selective):
        assert isinstance(again.policy, Selective) and again.policy.graph is not None
        np.testing.assert_array_equal(again.policy.graph.links, world.policy.graph.links)
    smaller = Collection("less", {"d00": collection.documents["d00"]}, collection.queries, collection.qrels)
    with pytest.raises(DataError, match="hold different documents"):
        RetrievalEnvironment(smaller, {}, *arguments, k=10, max_new_tokens=4, state=tmp_path)


# The ranking rule


def toy(kind: str) -> Collection:
    """Documents on a line of angles, ever further from query `q`; what `kind` says must not be ranked stands first."""
    doc_ids = [f"d{i}" for i in range(9)]
    documents = {doc_id: Document(doc_id, f"text {doc_id}") for doc_id in doc_ids}
    documents |= {"q": Document("q", "the query itself")} if kind == "arguana" else {}
    documents = dict(sorted(documents.items(), key=lambda item: item[0] != "q"))
    return Collection(
        kind,
        documents,
        {"q": Query("q", "where?"), "r": Query("r", "who?")},
        {"train": {"q": {"d3": 2, "d6": 1, "d8": 0}, "r": {"d1": 1}}},
        excluded={"q": frozenset({"d0", "d1", "d4"})} if kind == "bright" else {},
        pools={"q": frozenset({"d2", "d3", "d5", "d6"})} if kind == "babi" else {},
    )


class FixedVectors(System):
    """A system whose queries have these vectors."""

    info = SystemInfo(name="fixed", kind="search-r3", model="fixed", revision="1", settings={})
    before = None
    truncated_documents = 0

    def __init__(self, index: ExactIndex, vectors: dict[str, np.ndarray]) -> None:
        self.vector_index, self.vectors, self.documents_per_second = index, vectors, None

    def index(self, collection: Collection, progress: Any = None) -> Any:
        return self

    def answer(self, requests: Sequence[RankRequest], depth: int, progress: Any = None) -> Answers:
        vectors = np.stack([self.vectors[request.query_id] for request in requests])
        return Answers(rank_vectors(self.vector_index, vectors, requests, depth))


def brute_force_ndcg(collection: Collection, world: RetrievalEnvironment, query_id: str, vector: np.ndarray) -> float:
    """nDCG@10 of a sort of all documents, by the rule as the README words it."""
    gains = collection.qrels["train"][query_id]
    scores = dict(zip(world.index.doc_ids, world.index.vectors_at(range(len(world.index))) @ vector, strict=True))
    for doc_id in list(scores):
        out = doc_id in collection.excluded.get(query_id, ()) or doc_id not in collection.pools.get(query_id, scores)
        if out or (doc_id == query_id and gains.get(doc_id, 0) <= 0):
            del scores[doc_id]
    return ndcg(rank(scores), gains, 10)


@pytest.mark.parametrize("index", ["exact", "approximate"])
@pytest.mark.parametrize("kind", ["bright", "arguana", "babi", "plain"])
def test_the_reward_is_the_measure_of_the_evaluation(kind: str, index: str) -> None:
    collection = toy(kind)
    world = environment(collection, MovingEncoder(collection), "shortlist", index=index)
    vectors = {"q": rollout(0.0).vector.numpy(), "r": rollout(0.1).vector.numpy()}
    feedback = world.feedback([rollout(0.0), rollout(0.1)], ["q", "r"], policy_version=0)
    rewards = [part.ndcg for part in feedback.parts]
    store = world.index if isinstance(world.index, ExactIndex) else world.index.store
    result = evaluate(
        FixedVectors(store, vectors), collection, "train", EvaluationOptions(latency_queries=0, bootstrap=10)
    )
    assert rewards == pytest.approx(result.per_query["ndcg@10"])
    assert rewards == pytest.approx([brute_force_ndcg(collection, world, name, vectors[name]) for name in "qr"])
    assert feedback.best_ranks[0] == {"bright": 2, "arguana": 4, "babi": 2, "plain": 4}[kind]


def test_an_audit_follows_the_rule_too(collection: Collection) -> None:
    for kind in ("bright", "babi"):
        data = toy(kind)
        world = environment(data, MovingEncoder(data), "never", audit_documents=0)
        world.feedback([rollout(0.0)], ["q"], policy_version=1)
        for size in (0, 2):
            world.refresh = world.refresh.model_copy(update={"audit_documents": size})
            audit = world.audit([rollout(0.0)], ["q"], policy_version=1)
            assert (audit.reward_error, audit.rank_error, audit.top10_overlap) == (0.0, 0.0, 1.0)


def test_a_shortlist_holds_what_can_be_ranked_and_nothing_else() -> None:
    for kind, expected in (("bright", {"d2", "d3", "d5", "d6"}), ("babi", {"d2", "d3", "d5", "d6"})):
        data = toy(kind)
        encode = MovingEncoder(data)
        world = environment(data, encode, "shortlist", depth=3)
        encode.encoded.clear()
        world.feedback([rollout(0.0)], ["q"], policy_version=1)
        assert {text.removeprefix("text ") for text in encode.encoded} == expected


@pytest.mark.parametrize(("policy", "passes"), [("shortlist", 1), ("full", 1), ("never", 1)])
def test_one_pass_over_the_corpus_serves_the_choice_the_ranks_and_the_best_documents(
    policy: str, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    doc_ids = [f"d{i:03d}" for i in range(300)]
    documents = {doc_id: Document(doc_id, f"text {doc_id}") for doc_id in doc_ids}
    data = Collection("long", documents, {"q": Query("q", "where?")}, {"train": {"q": {"d010": 1}}})
    world = environment(data, MovingEncoder(data), policy, depth=3)
    scans, products = [], ExactIndex._products
    monkeypatch.setattr(
        ExactIndex, "_products", lambda self, queries: (scans.append(len(self)), products(self, queries))[1]
    )
    feedback = world.feedback([rollout(0.3), rollout(0.33)], ["q", "q"], policy_version=1)
    assert feedback.best_ranks[0] == 1
    assert scans.count(300) == passes
