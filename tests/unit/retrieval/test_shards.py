"""Shards of a corpus: the vectors of one unbroken encoding, in whatever order they are encoded; one index of all."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_encode import DOCUMENTS, FakeEncoder

from search_r3.errors import ConfigError, VectorIndexError
from search_r3.model.encoder import SearchR3
from search_r3.retrieval import storage
from search_r3.retrieval.encode import encode_corpus, load_corpus
from search_r3.retrieval.encoding import shards
from search_r3.retrieval.encoding.shards import Shard
from search_r3.retrieval.index import ExactIndex
from search_r3.retrieval.parts import Parts

ALL = [Shard(number, 3) for number in (1, 2, 3)]


def encode(folder: Path, *parts: Shard, model: FakeEncoder | None = None, **options: Any) -> ExactIndex:
    """Encode these shards of DOCUMENTS, in blocks of 4."""
    for shard in parts:
        index = encode_corpus(model or FakeEncoder(), DOCUMENTS, folder, shard=shard, **{"block_size": 4, **options})
    return index


def assert_same(one: ExactIndex, two: ExactIndex) -> None:
    """Both have the same ids and bytes, and find the same."""
    queries = np.random.default_rng(0).normal(size=(5, one.dimension)).astype(np.float32)
    wanted = [list(range(len(two)))] * 5
    assert list(one.doc_ids) == list(two.doc_ids) and one.dtype == two.dtype
    np.testing.assert_array_equal(one.matrix, two.matrix)
    for block in (1, 4, 8192):
        one.block = two.block = block
        for found, expected in zip(one.search_rows(queries, 7), two.search_rows(queries, 7), strict=True):
            np.testing.assert_array_equal(found, expected)
        assert one.ranks(queries, wanted) == two.ranks(queries, wanted)
    rows = np.array([3, 0, len(two) - 1, 3])
    np.testing.assert_array_equal(one.vectors_at(rows), two.vectors_at(rows))
    np.testing.assert_array_equal(one.scores_at(queries[:1], [rows])[0], two.scores_at(queries[:1], [rows])[0])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_shards_in_any_order_are_the_index_of_one_encoding_and_stay_where_they_are(dtype: str, tmp_path: Path) -> None:
    whole = encode_corpus(FakeEncoder(), DOCUMENTS, tmp_path / "whole", dtype=dtype, block_size=4)
    model, parts = FakeEncoder(), tmp_path / "parts"
    first = encode(parts, ALL[2], model=model, dtype=dtype)
    assert sorted(first.doc_ids) == sorted(doc_id for doc_id, _ in DOCUMENTS[16:])
    assert not (parts / "manifest.json").exists()
    index = encode(parts, ALL[0], ALL[1], model=model, dtype=dtype)
    assert sorted(model.seen) == sorted(text for _, text in DOCUMENTS), "nothing is encoded twice"
    assert_same(index, whole)
    assert isinstance(index._tensor, Parts)
    if sys.platform == "linux":
        maps = Path("/proc/self/maps").read_text()
        assert all(f"{parts / shard.folder}/vectors-" in maps for shard in ALL), "they are memory-mapped"
    assert not list(parts.glob("vectors*")), "and not copied"
    assert_same(ExactIndex.load(parts), whole)
    assert_same(load_corpus(model, DOCUMENTS, parts), whole)


def test_a_shard_has_whole_blocks_of_the_unbroken_encoding(tmp_path: Path) -> None:
    calls = []
    model = FakeEncoder()
    once = model.encode_document
    model.encode_document = lambda texts, **options: calls.append(list(texts)) or once(texts, **options)
    encode_corpus(model, DOCUMENTS, tmp_path / "whole", block_size=4)
    blocks = [texts for texts in calls if len(texts) > 1]
    calls.clear()
    encode(tmp_path / "parts", *ALL, model=model)
    assert [texts for texts in calls if len(texts) > 1] == blocks


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 40), size=st.integers(1, 9), data=st.data())
def test_every_document_is_in_one_shard(count: int, size: int, data: Any) -> None:
    from search_r3.retrieval.encoding.survey import survey_documents

    survey = survey_documents([(f"d{i * 7 % 41}", f"text {i}") for i in range(count)], size)
    of = data.draw(st.integers(1, len(survey.digests)))
    spans = [Shard(number, of).span(survey) for number in range(1, of + 1)]
    assert [span.first for span in spans[1:]] == [span.end for span in spans[:-1]]
    assert (spans[0].first, spans[-1].end) == (0, count)
    assert all(len(span) and span.first % size == 0 for span in spans)
    assert max(map(len, spans)) - min(len(span) for span in spans[:-1] or spans) <= size
    assert sorted(doc_id for span in spans for doc_id in span.doc_ids) == sorted(survey.doc_ids)


def test_a_shard_goes_on_after_a_kill_and_is_not_encoded_twice(tmp_path: Path) -> None:
    documents = [(f"d{i:02}", f"text {i}") for i in range(30)]
    model, starts = FakeEncoder(), []
    options = {"shard": Shard(2, 2), "block_size": 5, "on_start": lambda *numbers: starts.append(numbers)}
    model.special["text 25"] = np.full(6, np.nan)
    with pytest.raises(VectorIndexError, match="document 'd25' holds NaN"):
        encode_corpus(model, documents, tmp_path, **options)
    model.special.clear()
    model.seen.clear()
    for _ in range(2):
        encode_corpus(model, documents, tmp_path, **options)
    assert model.seen == [f"text {i}" for i in range(25, 30)]
    assert starts == [(15, 0), (15, 10), (15, 15)]


def test_shards_from_elsewhere_become_one_by_the_command_without_a_shard(tmp_path: Path) -> None:
    for shard in ALL:
        encode(tmp_path / str(shard.number), shard)
        shutil.copytree(tmp_path / str(shard.number) / shard.folder, tmp_path / "all" / shard.folder)
    with pytest.raises(VectorIndexError, match="holds an encoding that is not finished"):
        load_corpus(FakeEncoder(), DOCUMENTS, tmp_path / "all")
    model = FakeEncoder()
    index = encode_corpus(model, DOCUMENTS, tmp_path / "all")
    assert model.seen == []
    assert_same(index, encode_corpus(model, DOCUMENTS, tmp_path / "whole"))


def test_a_merge_that_was_killed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shards, "_merge", kill)
        encode(tmp_path, *ALL)
    model = FakeEncoder()
    assert len(encode(tmp_path, ALL[1], model=model)) == 23
    assert model.seen == []


def test_what_does_not_belong_together_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    encode(tmp_path, ALL[0], ALL[1])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    model = FakeEncoder()
    for options, message in (
        ({}, r"holds 2 of 3 shards; encode the others with --shard: 3/3"),
        ({"shard": Shard(1, 2)}, "holds shards of 3, not of 2; nothing in it was changed"),
        ({"shard": ALL[0], "block_size": 5}, "as shard 1/3 in blocks of 4, not as shard 1/3 in blocks of 5; nothing"),
        ({"shard": ALL[0], "dtype": "float32"}, "as float16, not as float32"),
    ):
        with pytest.raises(VectorIndexError, match=message):
            encode_corpus(model, DOCUMENTS, tmp_path, **{"block_size": 4, **options})
    with pytest.raises(VectorIndexError, match=r"as shard 1/3 in blocks of 4, not as a whole"):
        load_corpus(model, DOCUMENTS, tmp_path / ALL[0].folder)
    with pytest.raises(ConfigError, match="7 shards, but the corpus has 6 blocks of 4 documents"):
        encode_corpus(model, DOCUMENTS, tmp_path / "new", shard=Shard(1, 7), block_size=4)
    assert model.seen == []
    assert {path: path.read_bytes() for path in before} == before
    broken = FakeEncoder()
    broken.special["text number 9"] = np.full(6, np.inf)
    with pytest.raises(VectorIndexError, match="document 'd17' holds NaN"):
        encode_corpus(broken, DOCUMENTS, tmp_path / "uncut", block_size=4)
    with pytest.raises(VectorIndexError, match="an encoding that is not cut into shards"):
        encode(tmp_path / "uncut", ALL[0])


@pytest.mark.parametrize("other", ["model", "blocks"])
def test_shards_of_several_indexes_are_not_put_together(other: str, tmp_path: Path) -> None:
    encode(tmp_path / "one", ALL[0], ALL[1])
    if other == "model":
        encode(tmp_path / "two", ALL[2], model=FakeEncoder("other"))
    else:
        encode(tmp_path / "two", ALL[2], block_size=5)
    shutil.copytree(tmp_path / "two" / ALL[2].folder, tmp_path / "one" / ALL[2].folder)
    fault = {"model": "by another model, other: cosine", "blocks": "in blocks of 5, not of 4"}[other]
    with pytest.raises(VectorIndexError, match=rf"shard-00003-of-00003 and shard-00001-of-00003 are no .*{fault}"):
        encode_corpus(FakeEncoder(), DOCUMENTS, tmp_path / "one", block_size=4)
    assert not (tmp_path / "one" / "manifest.json").exists()


def test_a_damaged_shard_is_one_error(tmp_path: Path) -> None:
    encode(tmp_path, *ALL)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for name in ("vectors_2.npy", "shards.npy"):
        path = tmp_path / manifest["files"][name]
        whole = path.read_bytes()
        for content in (None, whole[:-1], whole.replace(whole[-4:], b"\1\0\0\0") if name == "shards.npy" else b""):
            path.unlink() if content is None else path.write_bytes(content)
            for mmap in (False, True):
                with pytest.raises(VectorIndexError, match=f"{tmp_path} holds no usable index"):
                    ExactIndex.load(tmp_path, mmap=mmap)
            path.write_bytes(whole)
    assert len(ExactIndex.load(tmp_path)) == 23


def test_an_update_of_mapped_shards_reaches_no_file_and_a_save_has_one(tmp_path: Path) -> None:
    index = encode(tmp_path / "parts", *ALL, dtype="float32")
    before = {path: path.read_bytes() for path in (tmp_path / "parts").rglob("vectors-*")}
    vectors = np.eye(6, dtype=np.float32)[:4]
    rows = index.rows_of([DOCUMENTS[place][0] for place in (0, 9, 22, 5)])
    index.update(rows, vectors, 3)
    np.testing.assert_array_equal(index.vectors_at(rows), vectors)
    assert {path: path.read_bytes() for path in before} == before
    index.save(tmp_path / "saved")
    saved = ExactIndex.load(tmp_path / "saved", mmap=True)
    np.testing.assert_array_equal(saved.matrix, index.matrix)
    assert isinstance(saved._tensor, torch.Tensor)


def test_a_shard_is_named_as_i_of_n() -> None:
    assert Shard.parse("2/3") == ALL[1]
    for text in ("0/3", "4/3", "1", "1/0", "-1/3", "1/3/5", "a/b", "1/100000"):
        with pytest.raises(ConfigError, match=f"no shard '{text}': expected I/N"):
            Shard.parse(text)


def test_real_vectors_of_shards_have_the_bytes_of_one_encoding(model: SearchR3, tmp_path: Path) -> None:
    documents = [(f"d{i * 7 % 40}", f"a red house and {'very ' * (i % 7)} old boat number {i}") for i in range(40)]
    whole = encode_corpus(model, documents, tmp_path / "whole", dtype="float32", block_size=6)
    for number in (2, 3, 1):
        index = encode_corpus(
            model, documents, tmp_path / "parts", dtype="float32", block_size=6, shard=Shard(number, 3)
        )
    assert_same(index, whole)


def test_the_manifest_of_an_index_of_shards_says_what_one_of_a_whole_does(tmp_path: Path) -> None:
    encode_corpus(FakeEncoder(), DOCUMENTS, tmp_path / "whole", block_size=4)
    encode(tmp_path / "parts", *ALL)
    whole, parts = (json.loads((tmp_path / name / storage.MANIFEST).read_text()) for name in ("whole", "parts"))
    assert parts.pop("shards") == [8, 8, 7]
    assert {**parts, "files": 0} == {**whole, "files": 0}
