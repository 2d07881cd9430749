"""Hard negatives: chosen by scores worked out by hand, the same after a kill, from the cache where that is enough."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from search_r3.cli.common import ModelOptions, ModeName
from search_r3.cli.mining import _retriever
from search_r3.data.collection import Collection, Document, Query
from search_r3.data.triples import judged_queries, listed_negatives, training_examples
from search_r3.errors import DataError, ModelError, VectorIndexError
from search_r3.mining import candidates, mining
from search_r3.mining.candidates import BlockCache, CrossEncoderJudge, DenseRetriever, LexicalRetriever
from search_r3.mining.mining import MiningReport, MiningSettings, mine_negatives
from search_r3.retrieval import encode
from search_r3.retrieval.encoding.identity import PROBE, Peer
from search_r3.retrieval.index import ExactIndex
from search_r3.retrieval.lexical import BM25
from tests.conftest import small_collection

SCORES = {"p": 0.8, "near": 0.79, "edge": 0.77, "a": 0.75, "b": 0.7, "c": 0.5, "d": -0.2, "above": 0.95}


class Scripted:
    """An encoder in which a document has the cosine `scores[text]` with every query. `seen` counts what it encodes."""

    def __init__(self, scores: Mapping[str, float], revision: str = "1", stop: int | None = None) -> None:
        self.scores, self.revision, self.stop = scores, revision, stop
        self.seen: list[str] = []

    def encode(self, texts: Sequence[str], kind: str) -> np.ndarray:
        if self.stop is not None and len(self.seen) >= self.stop:
            raise KeyboardInterrupt
        self.seen += [text for text in texts if text != PROBE and text != "size"]
        scores = [1.0 if kind == "query" else self.scores.get(text, 0.0) for text in texts]
        return np.array([[score, (1 - score**2) ** 0.5] for score in scores], dtype=np.float32)

    def retriever(self) -> DenseRetriever:
        peer = Peer("scripted", {"size": 2}, self.encode)
        return DenseRetriever(peer, peer.encode_query, {"model": "scripted", "revision": self.revision}, "float32")


def scripted_collection(**relevance: int) -> Collection:
    documents = {doc_id: Document(doc_id, doc_id) for doc_id in SCORES}
    return Collection("t", documents, {"q": Query("q", "what?")}, {"train": {"q": relevance or {"p": 1}}})


def mine(collection: Collection, folder: Path, *retrievers: Any, **options: Any) -> tuple[list[str], MiningReport]:
    """The negatives of the first query, and the report."""
    names = ("cache", "splits", "judge", "watch")
    given = {name: options.pop(name) for name in names if name in options}
    given.setdefault("cache", folder / "cache")
    report = mine_negatives(
        collection, folder / "out", retrievers, settings=MiningSettings(**{"per_query": 9, **options}), **given
    )
    loaded = Collection.load(folder / "out")
    assert loaded.documents == collection.documents and loaded.qrels == collection.qrels
    return next(iter(loaded.queries.values())).metadata["negatives"], report


# The filter


@pytest.mark.parametrize(
    ("limits", "kept", "false"),
    [
        ({}, ["a", "b", "c", "d"], 3),  # 0.95 x 0.8 = 0.76
        ({"max_share": 0.9}, ["b", "c", "d"], 4),  # 0.72
        ({"max_share": 1.0}, ["near", "edge", "a", "b", "c", "d"], 1),  # 0.8
        ({"max_share": None, "margin": 0.2}, ["c", "d"], 5),  # 0.6
        ({"max_share": 0.9, "margin": 0.02}, ["b", "c", "d"], 4),  # the lower of 0.72 and 0.78
        ({"max_share": None}, ["above", "near", "edge", "a", "b", "c", "d"], 0),
        ({"per_query": 2}, ["a", "b"], 3),
    ],
)
def test_candidates_too_near_the_positive_are_dropped(
    tmp_path: Path, limits: dict[str, Any], kept: list[str], false: int
) -> None:
    found, report = mine(scripted_collection(), tmp_path, Scripted(SCORES).retriever(), **limits)
    assert found == kept
    assert report.dropped.get("false_negative", 0) == false
    assert report.dropped["judged"] == 1
    assert report.candidates == len(SCORES) == report.usable + sum(report.dropped.values())
    assert json.loads((tmp_path / "out" / "mining.json").read_text())["dropped"] == report.dropped
    assert (report.queries, report.mined, report.fewer, report.none) == (
        1,
        len(kept),
        int("per_query" not in limits),
        0,
    )


def test_of_several_positives_the_best_scored_one_counts(tmp_path: Path) -> None:
    found, _ = mine(scripted_collection(d=1, p=2), tmp_path, Scripted(SCORES).retriever())
    assert found == ["a", "b", "c"], "0.95 x 0.8, not 0.95 x -0.2"


def test_the_bound_lies_below_a_negative_score() -> None:
    assert MiningSettings(max_share=0.9).bound(-2.0) == pytest.approx(-2.2)
    assert MiningSettings(max_share=0.9).bound(2.0) == pytest.approx(1.8)
    assert MiningSettings(max_share=None).bound(2.0) == float("inf")


def test_a_query_without_any_negative_is_counted(tmp_path: Path) -> None:
    found, report = mine(scripted_collection(), tmp_path, Scripted(SCORES).retriever(), max_share=0.01, depth=4)
    assert (found, report.none, report.fewer, report.mined) == ([], 1, 1, 0)


def test_what_is_judged_excluded_or_the_same_text_is_no_negative(tmp_path: Path) -> None:
    texts = {
        "p": "the answer",
        "twin": "the answer",
        "echo": "what?",
        "x": "one",
        "y": "one",
        "no": "two",
        "dev": "six",
    }
    documents = {doc_id: Document(doc_id, text) for doc_id, text in texts.items()} | {"ex": Document("ex", "seven")}
    qrels = {"train": {"q": {"p": 1, "no": 0}}, "dev": {"q": {"dev": 1}}}
    whole = Collection("t", documents, {"q": Query("q", "what?")}, qrels, excluded={"q": frozenset({"ex"})})
    found, report = mine(whole, tmp_path, Scripted({"the answer": 0.9, "one": 0.5}).retriever(), max_share=None)
    assert found == ["y"], "of two with one text and one score the larger id, as the ranking rule has it"
    assert report.dropped == {"judged": 3, "excluded": 1, "same_text": 2, "repeated_text": 1}


def test_ranks_are_counted_without_judged_documents(tmp_path: Path) -> None:
    encoder = Scripted(SCORES)
    found, report = mine(
        scripted_collection(above=0, p=1), tmp_path, encoder.retriever(), skip=2, depth=4, max_share=1.0
    )
    assert found == ["a", "b"], "near and edge are the first two that are not judged"
    assert report.dropped == {"judged": 2, "out_of_range": 2}
    whole = scripted_collection(d=1)
    found, report = mine(whole, tmp_path / "deep", encoder.retriever(), depth=2, max_share=None)
    assert found == ["above", "p"], "not near, though one more was found, in case d had been among the first"
    assert report.dropped == {"out_of_range": 1}


def test_random_negatives_are_drawn_from_the_range_by_the_seed(tmp_path: Path) -> None:
    usable = ["a", "b", "c", "d"]
    drawn = {
        seed: mine(
            scripted_collection(), tmp_path, Scripted(SCORES).retriever(), per_query=2, sampling="random", seed=seed
        )[0]
        for seed in range(8)
    }
    assert all(len(found) == 2 and found == [one for one in usable if one in found] for found in drawn.values())
    assert len({tuple(found) for found in drawn.values()}) > 2
    again = mine(scripted_collection(), tmp_path, Scripted(SCORES).retriever(), per_query=2, sampling="random", seed=3)
    assert again[0] == drawn[3]


def with_listed(*doc_ids: str, **relevance: int) -> Collection:
    query = Query("q", "what?", {"negatives": list(doc_ids), "kept": 1})
    return replace(scripted_collection(**relevance), queries={"q": query})


def test_negatives_that_are_there_stay_first_unless_replaced(tmp_path: Path) -> None:
    found, report = mine(with_listed("c"), tmp_path, Scripted(SCORES).retriever(), per_query=2)
    assert found == ["c", "a", "b"] and report.dropped["listed"] == 1 and report.fewer == 0
    assert (report.listed, report.listed_dropped, report.mined) == (1, 0, 2)
    assert Collection.load(tmp_path / "out").queries["q"].metadata["kept"] == 1
    found, report = mine(with_listed("c"), tmp_path, Scripted(SCORES).retriever(), per_query=2, keep=False)
    assert found == ["a", "b"] and (report.listed, report.listed_dropped) == (0, 0)


def test_false_ones_among_the_negatives_that_are_there_are_dropped(tmp_path: Path) -> None:
    whole = with_listed("d", "near", "c", "twin", "above", p=1, above=0)
    whole.documents["twin"] = Document("twin", "p")
    encoder = Scripted({**SCORES})
    found, report = mine(whole, tmp_path, encoder.retriever(), depth=1, per_query=1)
    assert found == ["d", "c"], "scored though no search finds them"
    assert (report.listed, report.listed_dropped, report.mined) == (5, 3, 0)
    found, report = mine(whole, tmp_path, encoder.retriever(), depth=1, max_share=None)
    assert found == ["d", "near", "c", "above"] and report.listed_dropped == 1 and report.resumed == 1
    other = replace(whole, queries={"q": Query("q", "what?", {"negatives": ["b"]})})
    found, report = mine(other, tmp_path, encoder.retriever(), depth=1)
    assert found == ["b"] and report.resumed == 0, "scored anew"


# Retrievers and judges


def test_bm25_finds_its_candidates_and_judges_by_its_scores(tmp_path: Path, collection: Collection) -> None:
    found, report = mine(collection, tmp_path, LexicalRetriever(stemmed=False), per_query=5, depth=10)
    texts = collection.texts()
    scored = dict(BM25(list(texts), list(texts.values())).search_scored(["where is the red house?"], 40)[0])
    assert len(found) == 5 and "d00" not in found
    assert [scored[doc_id] for doc_id in found] == sorted(
        (scored[one] for one in scored if one != "d00"), reverse=True
    )[:5]
    assert max(scored[doc_id] for doc_id in found) <= 0.95 * scored["d00"]
    read_as = {"stop_words": "en", "stemming": "none", "language": "auto"}
    assert report.retrievers == [{"kind": "bm25", "release": BM25.release(), **read_as}] == [report.judge]
    assert report.queries == 20


def test_candidates_of_several_retrievers_are_scored_by_the_judge_alone(tmp_path: Path) -> None:
    documents = {
        "p": Document("p", "red house"), "w": Document("w", "a red cow"), "v": Document("v", "blue sky"),
        "u": Document("u", "a cold house"),
    }  # fmt: skip
    whole = Collection("t", documents, {"q": Query("q", "red house")}, {"train": {"q": {"p": 1}}})
    encoder = Scripted({"red house": 0.9, "a red cow": 0.2, "blue sky": 0.3, "a cold house": 0.89})
    dense = encoder.retriever()
    found, report = mine(whole, tmp_path, LexicalRetriever(stemmed=False), dense, judge=dense, depth=2)
    assert found == ["v", "w"], "v by the vectors, w by its word; u is too near by the judge"
    assert report.dropped == {"judged": 1, "false_negative": 1}
    assert report.judge["kind"] == "dense" and [one["kind"] for one in report.retrievers] == ["bm25", "dense"]
    assert encoder.seen.count("red house") == 2, "once as document, once as query, though it searches and judges"
    alone, _ = mine(whole, tmp_path, LexicalRetriever(stemmed=False), depth=2)
    assert alone == ["w", "u"], "BM25 never finds v"


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A tiny cross-encoder with random weights."""
    folder = tmp_path_factory.mktemp("models") / "cross"
    transformers.set_seed(2)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=1, initializer_range=0.5, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_scores_of_a_cross_encoder_can_be_the_filter(
    tmp_path: Path, collection: Collection, cross_encoder: Path
) -> None:
    peer = pytest.importorskip("sentence_transformers").CrossEncoder(str(cross_encoder))
    judge = CrossEncoderJudge(str(cross_encoder), batch_size=7)
    _, report = mine(
        collection, tmp_path, LexicalRetriever(stemmed=False), judge=judge, depth=11, max_share=None, margin=0.0
    )
    loaded, texts, oracle = Collection.load(tmp_path / "out"), collection.texts(), peer
    bm25, dropped = BM25(list(texts), list(texts.values())), 0
    for query_id, relevance in collection.split("train").items():
        query, [positive] = loaded.queries[query_id], relevance
        found = bm25.search([query.text], 12)[0]
        scores = oracle.predict([(query.text, texts[doc_id]) for doc_id in found]).tolist()
        by_id = dict(zip(found, scores, strict=True))
        bound = by_id.pop(positive)
        expected = sorted((doc_id for doc_id in by_id if by_id[doc_id] < bound), key=lambda one: -by_id[one])
        dropped += len(by_id) - len(expected)
        assert query.metadata["negatives"] == expected[:9]
    assert report.dropped["false_negative"] == dropped
    assert 0 < dropped < report.candidates - 20 and report.mined > 20, "else the test shows nothing"
    assert report.judge["kind"] == "cross-encoder" and len(report.judge["revision"]) == 64


def test_vectors_go_to_a_gpu_that_has_room_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    index = ExactIndex(["a", "b"], np.eye(2, dtype=np.float32))  # 16 bytes
    moved: list[str] = []
    monkeypatch.setattr(index, "to", lambda device: moved.append(device) or index)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for free, expected in ((32, []), (33, ["cuda"])):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 100))
        assert candidates._to_gpu(index) is index and moved == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert candidates._to_gpu(index) is index and moved == ["cuda"]


def test_a_cross_encoder_that_cannot_be_used_is_named(
    tmp_path: Path, cross_encoder: Path, collection: Collection
) -> None:
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ModelError, match="cannot load the cross-encoder '/nowhere/at/all'"):
        CrossEncoderJudge("/nowhere/at/all")
    judge = CrossEncoderJudge(str(cross_encoder))
    judge._model.predict = lambda pairs, **options: np.full(len(pairs), np.nan)
    with pytest.raises(ModelError, match="gave NaN or infinity as a score"):
        mine(collection, tmp_path, LexicalRetriever(stemmed=False), judge=judge)
    assert not (tmp_path / "out").exists()


def test_bm25_as_judge_looks_up_only_what_its_search_did_not_find(
    tmp_path: Path, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[list[str]]] = []
    scores = BM25.scores

    def look(self: BM25, texts: Sequence[str], doc_ids: Sequence[Sequence[str]]) -> list[list[float]]:
        asked.append([list(line) for line in doc_ids])
        return scores(self, texts, doc_ids)

    monkeypatch.setattr(BM25, "scores", look)
    held = LexicalRetriever(stemmed=False).prepare(collection, tmp_path, candidates.quiet)
    texts = [query.text for query in collection.queries.values()]
    found = held.search(texts, 3, [None] * len(texts))
    wanted = [[*line, "d39"] for line in found]
    again = LexicalRetriever(stemmed=False).prepare(collection, tmp_path, candidates.quiet).score(texts, wanted)
    assert held.score(texts, wanted) == again and any(again[0])
    assert asked[0] == wanted, "without a search all are looked up"
    assert asked[1] == [[one for one in ["d39"] if one not in line] for line in found]


# The cache


@pytest.fixture
def blocks_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mining, "BLOCK", 3)
    monkeypatch.setattr(encode, "BLOCK_SIZES", {"cpu": 7, "cuda": 7})


def varied() -> dict[str, float]:
    """A score for each document of the small collection."""
    random = np.random.default_rng(0)
    return {text: float(random.uniform(-1, 1)) for text in small_collection().texts().values()}


def negatives(folder: Path) -> dict[str, Any]:
    return {query_id: query.metadata for query_id, query in Collection.load(folder).queries.items()}


@pytest.mark.parametrize("stop", [0, 3, 14, 40, 43, 50, 58])
def test_a_killed_call_goes_on_and_gives_the_same(
    tmp_path: Path, collection: Collection, blocks_of_three: None, stop: int
) -> None:
    mine(collection, tmp_path / "whole", LexicalRetriever(stemmed=False), Scripted(varied()).retriever(), per_query=3)
    broken, fresh = Scripted(varied(), stop=stop), Scripted(varied())
    with pytest.raises(KeyboardInterrupt):
        mine(collection, tmp_path / "killed", LexicalRetriever(stemmed=False), broken.retriever(), per_query=3)
    assert not (tmp_path / "killed" / "out").exists()
    _, report = mine(collection, tmp_path / "killed", LexicalRetriever(stemmed=False), fresh.retriever(), per_query=3)
    assert negatives(tmp_path / "killed" / "out") == negatives(tmp_path / "whole" / "out")
    assert len(broken.seen) + len(fresh.seen) == 40 + 20, "nothing is encoded twice that was written"
    assert (report.blocks, report.resumed) == (7, max(0, (stop - 40 + 2) // 3))


def test_a_call_ended_by_sigkill_goes_on(tmp_path: Path, blocks_of_three: None) -> None:
    code = (
        "import time\n"
        "from pathlib import Path\n"
        "from search_r3.mining import mining\n"
        "from search_r3.mining.candidates import LexicalRetriever\n"
        "from tests.conftest import small_collection\n"
        "class Slow(LexicalRetriever):\n"
        "    def prepare(self, *given):\n"
        "        held = super().prepare(*given)\n"
        "        class Held:\n"
        "            score = staticmethod(held.score)\n"
        "            def search(self, texts, k, pools):\n"
        "                time.sleep(0.2)\n"
        "                return held.search(texts, k, pools)\n"
        "        return Held()\n"
        "mining.BLOCK = 3\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "mining.mine_negatives(small_collection(), folder / 'out', [Slow(stemmed=False)], cache=folder / 'cache')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while time.monotonic() < until and not list(tmp_path.glob("cache/scores-*/000001.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (tmp_path / "out").exists()
    collection = small_collection()
    report = mine_negatives(collection, tmp_path / "out", [LexicalRetriever(stemmed=False)], cache=tmp_path / "cache")
    assert 2 <= report.resumed < report.blocks == 7
    mine_negatives(collection, tmp_path / "whole", [LexicalRetriever(stemmed=False)], cache=tmp_path / "other")
    assert negatives(tmp_path / "out") == negatives(tmp_path / "whole")


def test_other_limits_need_no_new_search(tmp_path: Path) -> None:
    first, second = Scripted(SCORES), Scripted(SCORES)
    mine(scripted_collection(), tmp_path, first.retriever())
    found, report = mine(
        scripted_collection(), tmp_path, second.retriever(), max_share=0.9, skip=1, per_query=2, sampling="random"
    )
    assert len(first.seen) == 9 and second.seen == []
    assert len(found) == 2 and set(found) <= {"b", "c", "d"} and report.resumed == report.blocks == 1


def test_another_precision_is_another_key(tiny_path: Path) -> None:
    keys = [
        _retriever(str(tiny_path), ModeName.direct, ModelOptions(device="cpu", dtype=dtype), scripted_collection()).key
        for dtype in ("float32", "bfloat16", "float32")
    ]
    assert keys[0] == keys[2] != keys[1]


def test_another_key_begins_anew(tmp_path: Path) -> None:
    mine(scripted_collection(), tmp_path, Scripted(SCORES).retriever())
    other = {**SCORES, "a": 0.1}
    updated = Scripted(other, revision="2")
    assert mine(scripted_collection(), tmp_path, updated.retriever())[0] == ["b", "c", "a", "d"]
    assert len(updated.seen) == 9
    for change in ({"depth": 3}, {"splits": ["dev"]}):
        fresh, whole = Scripted(SCORES), scripted_collection()
        whole = replace(whole, qrels={**whole.qrels, "dev": {"q": {"p": 1}}} if "splits" in change else whole.qrels)
        _, report = mine(whole, tmp_path, fresh.retriever(), **change)
        assert report.resumed == 0 and fresh.seen == ["what?"], "the documents are the same"
    grown = replace(whole, documents={**whole.documents, "new": Document("new", "new")})
    fresh = Scripted(SCORES)
    assert mine(grown, tmp_path, fresh.retriever())[1].resumed == 0 and len(fresh.seen) == 10
    fresh = Scripted(SCORES)
    assert mine(scripted_collection(), tmp_path, fresh.retriever())[1].resumed == 1 and not fresh.seen


@pytest.mark.parametrize("damage", ["", "[1", "[]", '{"a": 1}'])
def test_a_damaged_cache_is_named(tmp_path: Path, damage: str) -> None:
    mine(scripted_collection(), tmp_path, Scripted(SCORES).retriever())
    [path] = tmp_path.glob("cache/scores-*/000000.json")
    path.write_text(damage)
    with pytest.raises(DataError, match=r"000000\.json is damaged .*remove it and make the same call again"):
        mine(scripted_collection(), tmp_path, Scripted(SCORES).retriever())
    path.unlink()
    assert mine(scripted_collection(), tmp_path, Scripted(SCORES).retriever())[0] == ["a", "b", "c", "d"]


def test_a_cache_says_what_it_is_of(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, "things", {"b": 1, "a": [2]})
    assert json.loads((cache.folder / "key.json").read_text()) == {"b": 1, "a": [2]}
    assert BlockCache(tmp_path, "things", {"a": [2], "b": 1}).folder == cache.folder
    assert BlockCache(tmp_path, "things", {"a": [2], "b": 2}).folder != cache.folder


def test_progress_counts_documents_and_queries(tmp_path: Path, collection: Collection, blocks_of_three: None) -> None:
    seen: dict[tuple[str, int], int] = {}

    def watch(what: str, total: int) -> Any:
        seen[what, total] = 0

        def progress(texts: int, tokens: int) -> None:
            seen[what, total] += texts

        return progress

    mine(collection, tmp_path, Scripted(varied()).retriever(), watch=watch)
    assert seen == {("queries", 20): 20, ("documents", 40): 40}


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_query": 0}, "per_query 0, skip 0, depth 50: expected 1 or more negatives"),
        ({"skip": 5, "depth": 5}, "skip 5, depth 5: expected .* 0 or more skipped of a larger depth"),
        ({"skip": -1}, "skip -1"),
        ({"max_share": 0.0}, r"max_share 0\.0: expected a share above 0 and up to 1"),
        ({"max_share": 1.1}, r"max_share 1\.1"),
        ({"max_share": float("nan")}, "max_share nan"),
        ({"margin": -0.1}, r"margin -0\.1: expected 0 or more"),
        ({"splits": []}, "no split was named; give one or more of: train"),
        ({"splits": ["test"]}, "collection 't' has no split 'test'; it has: train"),
    ],
)
def test_settings_that_cannot_be_used_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        mine(scripted_collection(), tmp_path, Scripted(SCORES).retriever(), **change)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_mined_is_named_first(tmp_path: Path) -> None:
    encoder = Scripted(SCORES)
    with pytest.raises(DataError, match="nothing to mine with"):
        mine(scripted_collection(), tmp_path)
    with pytest.raises(DataError, match="no query of train has a document of the corpus with a score above 0"):
        mine(scripted_collection(p=0), tmp_path, encoder.retriever())
    whole = replace(scripted_collection(), queries={"q": Query("q", "what?", {"negatives": ["p"]})})
    with pytest.raises(DataError, match="names 'p', a positive of the query"):
        mine(whole, tmp_path, encoder.retriever())
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="exists and is no collection, so it is not replaced"):
        mine(scripted_collection(), tmp_path, encoder.retriever())
    assert encoder.seen == []


def test_a_broken_encoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(VectorIndexError, match=r"the vector of document '[a-z]+' holds NaN"):
        mine(scripted_collection(), tmp_path, Scripted({**SCORES, "b": float("nan")}).retriever())
    assert not (tmp_path / "out").exists()


# Training reads them


def test_listed_negatives_take_the_place_of_mined_ones_in_training(collection: Collection) -> None:
    queries = dict(collection.queries)
    queries["q00"] = Query("q00", queries["q00"].text, {"negatives": ["d39", "d08", "d39"]})
    listed = replace(collection, queries=queries)
    assert training_examples(listed, "train")[0].negative_ids == ("d39", "d08")
    bm25 = BM25(list(collection.documents), list(collection.texts().values()))
    mined = training_examples(collection, "train", bm25.search, mined=4)[0].negative_ids
    both = training_examples(listed, "train", bm25.search, mined=4)[0].negative_ids
    assert both == ("d39", "d08") and len(mined) == 4


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("d01", "query 'q00': metadata.negatives must be a list of doc_ids"),
        ([1], "must be a list of doc_ids"),
        (["d99"], "metadata.negatives names 'd99', no document here"),
        (["d01", "d00"], "metadata.negatives names 'd00', a positive of the query"),
    ],
)
def test_negatives_that_cannot_be_used_are_named(collection: Collection, value: Any, message: str) -> None:
    queries = {**collection.queries, "q00": Query("q00", "where?", {"negatives": value})}
    with pytest.raises(DataError, match=message):
        training_examples(replace(collection, queries=queries), "train")


def test_a_query_is_judged_by_all_splits(collection: Collection) -> None:
    whole = replace(collection, qrels={"train": {"q00": {"d00": 1}}, "dev": {"q00": {"d01": 1}, "q01": {"d01": 1}}})
    assert judged_queries(whole, ["train"]) == {"q00": {"d00": 1, "d01": 1}}
    assert list(judged_queries(whole, ["dev", "train"])) == ["q00", "q01"]
    assert listed_negatives(whole, Query("q", "t"), ()) == []
