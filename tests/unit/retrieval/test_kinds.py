"""The type of an index is what its manifest says; another one costs no encoding, and a kill none of what was there."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_encode import FakeEncoder, contents

from search_r3.errors import VectorIndexError
from search_r3.retrieval import kinds
from search_r3.retrieval.approximate import ApproximateIndex
from search_r3.retrieval.encode import encode_corpus, load_corpus
from search_r3.retrieval.encoding.shards import Shard
from search_r3.retrieval.index import ExactIndex
from search_r3.retrieval.kinds import open_index, set_index_type
from search_r3.retrieval.parts import Parts

DOCUMENTS = [(f"d{i:03}", f"text {i}") for i in range(300)]


def vectors_file(folder: Path) -> Path:
    return folder / json.loads((folder / "manifest.json").read_text())["files"]["vectors.npy"]


def test_a_graph_is_added_and_taken_away_and_the_vectors_stay(tmp_path: Path) -> None:
    model = FakeEncoder(dimension=16)
    encode_corpus(model, DOCUMENTS, tmp_path)
    exact, file = contents(tmp_path), vectors_file(tmp_path)
    assert isinstance(open_index(tmp_path), ExactIndex)
    index = set_index_type(tmp_path, "hnsw")
    assert isinstance(index, ApproximateIndex) and index.last_recall > 0.95
    assert vectors_file(tmp_path) == file, "they are not written again"
    again = set_index_type(tmp_path, "hnsw")
    assert isinstance(again, ApproximateIndex) and again.last_recall == index.last_recall
    queries = np.stack([model.vector(f"query {i}") for i in range(20)])
    np.testing.assert_array_equal(again.search_rows(queries, 10)[0], index.search_rows(queries, 10)[0])
    model.seen.clear()
    assert isinstance(load_corpus(model, DOCUMENTS, tmp_path), ApproximateIndex)
    encode_corpus(model, DOCUMENTS, tmp_path)
    assert isinstance(open_index(tmp_path), ApproximateIndex), "the same command leaves the graph"
    assert model.seen == []
    assert isinstance(set_index_type(tmp_path, "exact"), ExactIndex)
    assert contents(tmp_path) == exact and vectors_file(tmp_path) == file


def test_of_two_that_want_a_graph_at_once_one_builds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_corpus(FakeEncoder(dimension=16), DOCUMENTS, tmp_path)
    both, built = threading.Barrier(2), []
    open_first, maintain = kinds.open_index, ApproximateIndex.maintain

    def open_together(*values: Any) -> Any:
        index = open_first(*values)
        if not built and threading.current_thread().name not in seen:
            seen.add(threading.current_thread().name)
            both.wait(30)  # both have seen that there is none
        return index

    def build(index: ApproximateIndex) -> None:
        built.append(index)
        maintain(index)

    seen: set[str] = set()
    monkeypatch.setattr(kinds, "open_index", open_together)
    monkeypatch.setattr(ApproximateIndex, "maintain", build)
    with ThreadPoolExecutor(2) as pool:
        indexes = list(pool.map(lambda _: set_index_type(tmp_path, "hnsw"), range(2)))
    assert len(built) == 1 and all(isinstance(index, ApproximateIndex) for index in indexes)


def test_auto_is_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_corpus(FakeEncoder(), DOCUMENTS, tmp_path)
    for least, kind in ((301, ExactIndex), (300, ApproximateIndex), (301, ExactIndex)):
        monkeypatch.setattr(kinds, "HNSW_FROM", least)
        assert isinstance(set_index_type(tmp_path, "auto"), kind)


def test_shards_get_a_graph_over_all(tmp_path: Path) -> None:
    model = FakeEncoder(dimension=16)
    for number in (1, 2):
        encode_corpus(model, DOCUMENTS, tmp_path, shard=Shard(number, 2), block_size=50)
    index = set_index_type(tmp_path, "hnsw")
    assert isinstance(index, ApproximateIndex) and isinstance(index.store._tensor, Parts)
    assert index.search(model.vector("text 7")[None], 1).doc_ids == [["d007"]]


def test_a_mapped_graph_is_read_when_it_is_updated(tmp_path: Path) -> None:
    model = FakeEncoder(dimension=16)
    encode_corpus(model, DOCUMENTS, tmp_path, dtype="float32")
    set_index_type(tmp_path, "hnsw")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    index = open_index(tmp_path)
    moved = model.vector("elsewhere")[None]
    index.update(index.rows_of(["d100"]), moved, 1)
    assert index.search(moved, 1).doc_ids == [["d100"]]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_disk_that_refuses_the_graph_leaves_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_corpus(FakeEncoder(), DOCUMENTS, tmp_path)
    before = contents(tmp_path)

    def full(index: ApproximateIndex, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ApproximateIndex, "_write_graph", full)
    with pytest.raises(VectorIndexError, match="No space left on device"):
        set_index_type(tmp_path, "hnsw")
    assert contents(tmp_path) == before


def test_a_damaged_graph_is_one_error(tmp_path: Path) -> None:
    encode_corpus(FakeEncoder(), DOCUMENTS, tmp_path)
    set_index_type(tmp_path, "hnsw")
    [graph] = tmp_path.glob("*.graph")
    for content in (graph.read_bytes()[:-5], b"", None):
        graph.unlink() if content is None else graph.write_bytes(content)
        with pytest.raises(VectorIndexError, match=f"{tmp_path} holds no usable index"):
            open_index(tmp_path)
    assert len(ExactIndex.load(tmp_path)) == 300, "the vectors can still be searched"
