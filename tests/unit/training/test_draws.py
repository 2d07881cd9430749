from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from search_r3.config import SFTSettings
from search_r3.data.collection import Collection, Document, Query
from search_r3.data.draws import Draws, split_without_conflicts, text_keys
from search_r3.data.triples import TrainingExample, training_examples
from search_r3.errors import ConfigError, DataError
from search_r3.training.batches import make_batch


def example(name: str, text: str, positives: tuple[str, ...] = ("d",), trace: str = "") -> TrainingExample:
    return TrainingExample(Query(name, text), positives, (), {"trace": trace} if trace else {})


def keys(one: TrainingExample) -> frozenset[str]:
    return frozenset({one.query.text})


EXAMPLES = {split: [example(f"{split}{i}", f"{split} text {i}") for i in range(20)] for split in ("a", "b")}
SETTINGS = SFTSettings(batching="homogeneous", batch_size=8, splits={"a": 0.7, "b": 0.3})


def test_a_homogeneous_batch_comes_from_one_split_and_a_pass_repeats_nothing() -> None:
    draws = Draws(EXAMPLES, SETTINGS, 0, keys)
    rng = random.Random(0)
    batches = [draws.batch(step, rng) for step in range(40)]
    assert all(len({one.query.query_id[0] for one in batch}) == 1 for batch in batches)
    for split in "ab":
        own = [batch for batch in batches if batch[0].query.query_id[0] == split]
        assert len(own) >= 6
        for start in range(0, len(own) - 2, 3):  # 20 examples in batches of 8, 8 and 4
            counts = Counter(one.query.query_id for batch in own[start : start + 3] for one in batch)
            assert len(counts) == 20 and set(counts.values()) == {1}
    shares = Counter(batch[0].query.query_id[0] for batch in batches)
    assert shares["a"] > shares["b"]


def test_a_batch_follows_from_seed_and_step_alone() -> None:
    first = Draws(EXAMPLES, SETTINGS, 0, keys)
    ids = [[one.query.query_id for one in first.batch(step, random.Random(0))] for step in range(12)]
    again = Draws(EXAMPLES, SETTINGS, 0, keys)
    assert [one.query.query_id for one in again.batch(11, random.Random(1))] == ids[11]
    assert [one.query.query_id for one in again.batch(2, random.Random(1))] == ids[2]
    other = Draws(EXAMPLES, SETTINGS, 1, keys)
    assert [[one.query.query_id for one in other.batch(step, random.Random(0))] for step in range(12)] != ids


def test_no_two_examples_of_a_batch_share_a_key() -> None:
    order = [example(f"q{i}", f"text {i % 4}") for i in range(12)]
    batches = split_without_conflicts(order, 4, keys)
    assert [len({one.query.text for one in batch}) for batch in batches] == [4, 4, 4]
    assert len({one.query.query_id for batch in batches for one in batch}) == 12


def test_a_short_rest_is_left_out_unless_it_is_all() -> None:
    order = [example(f"q{i}", f"text {i}") for i in range(9)]
    assert [len(batch) for batch in split_without_conflicts(order, 8, keys)] == [8]
    assert [len(batch) for batch in split_without_conflicts(order[:3], 8, keys)] == [3]


def test_one_example_that_shares_with_all_others_makes_no_batch_of_one() -> None:
    others = [example(f"q{i}", f"text {i}", (f"d{i}",)) for i in range(8)]
    hub = example("hub", "hub", tuple(f"d{i}" for i in range(8)))
    settings = SFTSettings(batching="homogeneous", batch_size=8, splits={"a": 1.0})
    for seed in range(4):
        draws = Draws({"a": [*others, hub]}, settings, seed, lambda one: frozenset(one.positive_ids), least=2)
        assert {len(draws.batch(step, random.Random(0))) for step in range(12)} == {8}


def test_examples_that_wait_for_one_document_do_not_end_the_pass() -> None:
    """Half of the queries have the same positive; in one list they would be looked at again and again."""
    calls = 0

    def counted(one: TrainingExample) -> frozenset[str]:
        nonlocal calls
        calls += 1
        return frozenset({one.query.text, *one.positive_ids})

    order = [example(f"q{i}", f"text {i}", ("same",) if i % 2 else (f"d{i}",)) for i in range(4000)]
    batches = split_without_conflicts(order, 8, counted)
    assert all(sum("same" in one.positive_ids for one in batch) <= 1 for batch in batches)
    assert len({one.query.query_id for batch in batches for one in batch}) == sum(map(len, batches)) >= 2000 + 200
    assert calls < 4 * len(order)


def test_keys_are_short_and_see_equal_texts(collection: Collection) -> None:
    documents = collection.documents | {"twin": replace(collection.documents["d1"], doc_id="twin")}
    keys = text_keys(replace(collection, documents=documents), SETTINGS)
    one, other = example("a", "Who?", ("d1",)), example("b", "who?", ("d2",))
    assert len(keys(one) & keys(other)) == 1 and len(keys(example("c", "how?", ("twin",))) & keys(one)) == 1
    assert not keys(example("c", "how?", ("d3",))) & keys(one)
    assert all(len(key) == 16 for key in keys(one))


def test_queries_that_lose_their_instruction_share_a_text_with_those_that_have_another(collection: Collection) -> None:
    examples = [
        replace(example(name, "", (doc_id,)), query=Query(name, f"Who? {told}", instruction=told))
        for name, told, doc_id in (("a", "Find it.", "d1"), ("b", "Find code.", "d2"))
    ]
    for share, shared in ((0.0, 0), (0.2, 1)):
        own, other = map(text_keys(collection, SFTSettings(uninstructed=share)), examples)
        assert len(own & other) == shared


def test_batches_too_small_for_the_processes_are_refused_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    few = {"a": EXAMPLES["a"], "b": EXAMPLES["b"][:3]}
    with pytest.raises(ConfigError, match=r"a batch of 3 of sft.batch_size=8 queries, of split 'b', too few for 4"):
        Draws(few, SETTINGS, 0, keys, 4)
    with pytest.raises(ConfigError, match=r"a batch of 4 of sft.batch_size=8 queries, of split 'a', too few for 5"):
        Draws(EXAMPLES, SETTINGS, 0, keys, 5)
    assert Draws(few, SETTINGS, 0, keys, 3).batch(0, random.Random(0))
    assert "split 'b': no more than 3 of sft.batch_size=8 queries share no text" in caplog.text


def test_a_later_pass_too_small_for_the_processes_is_refused_at_the_start() -> None:
    """Of two times three queries each goes with its own kind and with its twin: three of a kind, or two twins."""
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    order = [example(f"u{i}", f"u{i}", tuple(str(pair) for pair in pairs if pair[0] == i)) for i in range(3)]
    order += [example(f"v{j}", f"v{j}", tuple(str(pair) for pair in pairs if pair[1] == j)) for j in range(3)]
    settings = SFTSettings(batching="homogeneous", batch_size=8, splits={"a": 1.0}, steps=40)

    def draws(least: int, seed: int) -> Draws:
        return Draws({"a": order}, settings, seed, lambda one: frozenset(one.positive_ids), least)

    seed = next(seed for seed in range(20) if len(draws(1, seed).batch(0, random.Random(0))) == 3)
    assert {len(draws(2, seed).batch(step, random.Random(0))) for step in range(40)} == {2, 3}
    with pytest.raises(ConfigError, match=r"gives step \d+ a batch of 2 of sft.batch_size=8 queries.*3 processes"):
        draws(3, seed)


@pytest.mark.parametrize("batching", ["mixed", "homogeneous"])
def test_an_empty_split_is_refused_at_the_start(batching: Any) -> None:
    with pytest.raises(DataError, match=r"split 'b' holds no query; leave it out of sft.splits"):
        Draws({**EXAMPLES, "b": []}, SETTINGS.model_copy(update={"batching": batching}), 0, keys)


@pytest.fixture
def collection() -> Collection:
    documents = {f"d{i}": Document(f"d{i}", f"document {i}") for i in range(8)}
    queries = {f"q{i}": Query(f"q{i}", f"query {i}") for i in range(8)}
    for i in range(0, 8, 2):
        queries[f"q{i}"] = replace(queries[f"q{i}"], metadata={"reasoning": f"trace {i}"})
    return Collection("tiny", documents, queries, {"sft": {f"q{i}": {f"d{i}": 1} for i in range(8)}})


def test_queries_without_a_trace_are_not_reasoned_about_if_so_set(collection: Collection) -> None:
    examples = training_examples(collection, "sft")
    for untraced, expected in (("embed", [*range(8), *range(8)]), ("direct", [*range(8), 0, 2, 4, 6])):
        settings = SFTSettings(untraced=untraced, hard_negatives=0)
        batch = make_batch(collection, list(collection.documents), examples, settings, random.Random(0))
        assert batch.owners == expected


def test_swapped_traces_are_another_querys_and_known(collection: Collection) -> None:
    examples = training_examples(collection, "sft")
    settings = SFTSettings(untraced="direct", swapped_traces=0.999, hard_negatives=0)
    batch = make_batch(collection, list(collection.documents), examples, settings, random.Random(0))
    assert batch.unwritten == {0, 2, 4, 6}
    assert sorted(trace for trace in batch.traces if trace) == [f"trace {i}" for i in range(0, 8, 2)]
    assert all(batch.traces[row] != f"trace {row}" for row in batch.unwritten)


def test_styles_that_are_only_read_teach_the_vector_and_not_the_text(collection: Collection) -> None:
    for i in range(0, 8, 2):
        both = {"true": f"trace {i}", "own": f"reply {i}"}
        collection.queries[f"q{i}"] = replace(collection.queries[f"q{i}"], metadata={"reasoning": both})
    weights = {"true": 1.0, "own": 1.0}
    settings = SFTSettings(untraced="direct", reasoning_styles=weights, read_styles=("own",), hard_negatives=0)
    examples = training_examples(collection, "sft")
    batch = make_batch(collection, list(collection.documents), examples, settings, random.Random(0))
    own = {row for row, trace in enumerate(batch.traces) if trace.startswith("reply")}
    assert own and own < {0, 2, 4, 6}, "the draw has both styles"
    assert batch.unwritten == own and batch.owners == [*range(8), 0, 2, 4, 6]
