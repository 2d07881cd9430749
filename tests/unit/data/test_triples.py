"""Negatives follow the ranking rule: what the measure never ranks for a query is no negative of it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from search_r3.data.collection import Collection, Document, Query
from search_r3.data.restrictions import restrictions
from search_r3.data.triples import draw_negatives, hold_out, training_examples
from search_r3.errors import DataError
from search_r3.mining.candidates import DenseRetriever, LexicalRetriever
from search_r3.mining.mining import MiningSettings, mine_negatives
from search_r3.retrieval.encoding.identity import Peer
from search_r3.retrieval.lexical import BM25
from search_r3.training.batches import find_false_negatives

NAMES = [f"d{number:02}" for number in range(20)]


def restricted() -> Collection:
    """Documents with the queries' words; `plain` ranks all, the others not, and `d07` is a query and a document."""
    documents = {name: Document(name, f"lamp {'red ' * (place % 7 + 1)}{name}") for place, name in enumerate(NAMES)}
    queries = {name: Query(name, "a red lamp") for name in ("plain", "bright", "babi", "d07")}
    return Collection(
        "restricted",
        documents,
        queries,
        {"train": {"plain": {"d00": 1}, "bright": {"d01": 1, "d02": 0}, "babi": {"d03": 1}, "d07": {"d04": 1}}},
        excluded={"bright": frozenset(NAMES[5:12]), "babi": frozenset({"d13"})},
        pools={"babi": frozenset({"d03", "d13", "d14", "d15"})},
    )


def usable(collection: Collection, query_id: str) -> set[str]:
    """What can be a negative, worked out by hand."""
    gains = collection.qrels["train"][query_id]
    pool = collection.pools.get(query_id, set(NAMES))
    return {name for name in pool if name not in gains | {query_id: 0}} - collection.excluded.get(query_id, set())


def test_bm25_negatives_are_those_of_a_search_of_what_can_be_ranked() -> None:
    collection = restricted()
    texts = collection.texts()
    bm25 = BM25(list(texts), list(texts.values()))
    [order] = bm25.search(["a red lamp"], 20)
    for mined in (3, 12):
        for example in training_examples(collection, "train", bm25.search, mined):
            allowed = usable(collection, example.query.query_id)
            assert list(example.negative_ids) == [name for name in order if name in allowed][:mined]


def test_listed_negatives_that_are_never_ranked_are_left_out() -> None:
    collection = restricted()
    listed = {name: replace(query, metadata={"negatives": NAMES[5:16]}) for name, query in collection.queries.items()}
    for example in training_examples(replace(collection, queries=listed), "train"):
        allowed = usable(collection, example.query.query_id)
        assert list(example.negative_ids) == [name for name in NAMES[5:16] if name in allowed]


def test_random_negatives_are_never_left_out_documents_and_come_from_the_pool_first() -> None:
    collection = restricted()
    for example in training_examples(collection, "train"):
        query_id = example.query.query_id
        limits = restrictions(collection, query_id, collection.qrels["train"][query_id])
        for seed in range(40):
            drawn = draw_negatives(example, NAMES, 4, 0, random.Random(seed))
            assert len(set(drawn)) == 4
            assert not {*limits.left_out, *example.positive_ids}.intersection(drawn)
            if query_id == "babi":
                assert {"d14", "d15"} == set(drawn[:2]), "the pool is used up before others are drawn"
    bright = next(one for one in training_examples(collection, "train") if one.query.query_id == "bright")
    columns = {name: column for column, name in enumerate(NAMES)}
    [mask] = find_false_negatives([bright], ["d01"], columns, collection).tolist()
    assert {name for name, masked in zip(NAMES, mask, strict=True) if masked} == set(NAMES[5:12])


@pytest.mark.parametrize("kind", ["lexical", "dense"])
def test_mined_negatives_are_those_of_a_search_of_what_can_be_ranked(kind: str, tmp_path: Path) -> None:
    collection = restricted()
    texts = collection.texts()
    scores = {text: 0.9 - 0.01 * place for place, text in enumerate(texts.values())}

    def encode(own: list[str], what: str) -> np.ndarray:
        cosines = [1.0 if what == "query" else scores.get(text, 0.0) for text in own]
        return np.array([[cosine, (1 - cosine**2) ** 0.5] for cosine in cosines], dtype=np.float32)

    peer = Peer("scripted", {}, encode)
    if kind == "lexical":
        retriever, [order] = (
            LexicalRetriever(stemmed=False),
            BM25(list(texts), list(texts.values())).search(["a red lamp"], 20),
        )
    else:
        retriever, order = DenseRetriever(peer, peer.encode_query, {"revision": "1"}, "float32"), NAMES
    for depth in (2, 30):
        settings = MiningSettings(per_query=9, depth=depth, max_share=None)
        out = tmp_path / f"out{depth}"
        mine_negatives(collection, out, [retriever], cache=tmp_path / "cache", settings=settings)
        for query_id, query in Collection.load(out).queries.items():
            allowed = usable(collection, query_id)
            assert query.metadata["negatives"] == [name for name in order if name in allowed][: min(9, depth)]


def test_queries_that_a_held_out_split_holds_too_are_not_trained_on(caplog: pytest.LogCaptureFixture) -> None:
    documents = {name: Document(name, f"document {name}") for name in NAMES}
    texts = {"both": "a", "twin": "Is it B?", "story": "who?", "free": "c", "b": " is  it b? ", "s": "who?"}
    collection = Collection(
        "leaky",
        documents,
        {query_id: Query(query_id, text) for query_id, text in texts.items()},
        {
            "train": {query_id: {"d00": 1} for query_id in ("both", "twin", "story", "free")},
            "more": {"both": {"d02": 1}},
            "dev": {"both": {"d01": 1}, "b": {"d01": 1}},
            "test": {"s": {"d03": 1}},
        },
        pools={"story": frozenset({"d00"}), "s": frozenset({"d03"})},
    )
    held = hold_out(collection, ["train", "more"], ["dev", "test", "none"])
    assert list(held.qrels["train"]) == ["story", "free"] and held.qrels["more"] == {}
    assert {split: held.qrels[split] for split in ("dev", "test")} == {
        split: collection.qrels[split] for split in ("dev", "test")
    }
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("3 queries of train, more are not trained on, since dev or test or none holds them too")
    assert line.endswith("the first is 'both'")


def test_a_query_stands_in_both_splits_whatever_instruction_it_has(caplog: pytest.LogCaptureFixture) -> None:
    texts = {
        "a": ("red lamp Find a page.", "Find a page."),
        "b": ("Red lamp", ""),
        "c": ("a lamp Find it.", "Find it."),
    }
    queries = {name: Query(name, text, instruction=instruction) for name, (text, instruction) in texts.items()}
    qrels = {"train": {"a": {"d00": 1}, "c": {"d01": 1}}, "dev": {"b": {"d00": 1}}}
    collection = Collection("told", restricted().documents, queries, qrels)
    assert list(hold_out(collection, ["train"], ["dev"]).qrels["train"]) == ["c"]
    assert "1 queries of train are not trained on" in caplog.text


def test_a_collection_whose_splits_are_apart_is_trained_on_whole(caplog: pytest.LogCaptureFixture) -> None:
    collection = restricted()
    assert hold_out(collection, ["train"], ["dev", "test"]) == collection and not caplog.records


def test_a_split_that_is_trained_on_and_measured_on_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    collection = restricted()
    assert hold_out(collection, ["train"], ["train", "test"]) == collection
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("the split 'train' is trained on and is evaluation.dev_split or test_split")


def test_what_is_not_in_the_corpus_is_not_trained_on_and_counted(
    collection: Collection, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = list(collection.qrels["train"])[:2]
    qrels = {**collection.qrels["train"], second: {"d39": 0}}
    absent = {"train": {first: {"nowhere": 1}, second: {"nowhere": 2}}}
    partly = replace(collection, qrels={"train": qrels}, absent=absent)
    examples = training_examples(partly, "train")
    assert [one.query.query_id for one in examples] == [one for one in qrels if one != second]
    assert all("nowhere" not in one.positive_ids for one in examples)
    assert "2 judgements of train name documents that are not in the corpus and are left out" in caplog.text
    assert f"1 queries of train have no document with a score above 0 and are left out; the first is '{second}'" in (
        caplog.text
    )
    with pytest.raises(DataError, match="no query of train has a document of the corpus with a score above 0"):
        training_examples(replace(partly, qrels={"train": {second: {"d39": 0}}}), "train")
