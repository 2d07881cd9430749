"""The exact index against a dictionary of vectors; saved indexes against kills, full disks and damage."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r3.errors import VectorIndexError
from search_r3.retrieval import storage
from search_r3.retrieval.index import ExactIndex
from search_r3.retrieval.lexical import BM25
from search_r3.retrieval.metrics import rank

IDS = [f"d{i}" for i in (3, 1, 10, 2, 7, 5, 0)]
# Few distinct values, exact in float16: ties are common and sums do not round.
values = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=3, max_size=3)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.lists(st.tuples(st.sampled_from(IDS), values), max_size=4)),
        st.tuples(st.just("set"), st.lists(values, min_size=7, max_size=7)),
        st.tuples(st.just("reload"), st.booleans()),
    ),
    max_size=6,
)


def matrix(rows: list[list[float]]) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


def random_index(documents: int, size: int = 8, **options) -> ExactIndex:
    vectors = np.random.default_rng(0).integers(-2, 3, size=(documents, size)).astype(np.float32)
    return ExactIndex([f"d{i}" for i in range(documents)], vectors, **options)


def agrees(index: ExactIndex, truth: dict[str, list[float]], query: list[float], k: int) -> None:
    scores = {doc_id: float(np.dot(vector, query)) for doc_id, vector in truth.items()}
    order = rank(scores)
    result = index.search(matrix([query]), k)
    assert result.doc_ids[0] == order[:k]
    assert result.scores[0].tolist() == [scores[doc_id] for doc_id in order[:k]]
    rows, _ = index.search_rows(matrix([query]), k)
    assert [index.doc_ids[row] for row in rows[0]] == order[:k]
    assert index.ranks(matrix([query]), [range(7)])[0] == [order.index(doc_id) + 1 for doc_id in index.doc_ids]
    np.testing.assert_array_equal(index.vectors_at(index.rows_of(IDS)), matrix([truth[doc_id] for doc_id in IDS]))
    np.testing.assert_array_equal(index.matrix, matrix([truth[doc_id] for doc_id in index.doc_ids]))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(values, min_size=7, max_size=7),
    steps,
    values,
    st.integers(1, 9),
    st.integers(1, 8),
    st.sampled_from(["float32", "float16"]),
)
def test_any_sequence_of_steps_agrees_with_a_dictionary(start, changes, query, k, block, dtype) -> None:
    truth, versions = dict(zip(IDS, start, strict=True)), dict.fromkeys(IDS, 0)
    index = ExactIndex(IDS, matrix(start), dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        for version, (step, argument) in enumerate(changes, 1):
            if step == "update":
                moved = dict(argument)
                index.update(index.rows_of(list(moved)), np.array(list(moved.values())).reshape(-1, 3), version)
                truth |= moved
                versions |= dict.fromkeys(moved, version)
            elif step == "set":
                index.update(np.arange(7), matrix(argument))
                truth = dict(zip(index.doc_ids, argument, strict=True))
            else:
                index.save(Path(folder))
                index = ExactIndex.load(Path(folder), mmap=argument)
            index.block = block
            agrees(index, truth, query, k)
        assert index.dtype == dtype
        assert dict(zip(index.doc_ids, index.encoded_at_version.tolist(), strict=True)) == versions


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_blocks_do_not_change_the_result(dtype) -> None:
    index = random_index(50, dtype=dtype)
    queries = np.random.default_rng(1).integers(-2, 3, size=(11, 8)).astype(np.float32)
    wanted = [[index.row(doc_id) for doc_id in (f"d{i}", "d9", "d41")[: i % 4]] for i in range(11)]
    rows, scores = index.search_rows(queries, 5)
    ranks = index.ranks(queries, wanted)
    order = np.lexsort((np.broadcast_to(np.arange(50), (11, 50)), -queries @ index.matrix.T), axis=1)
    np.testing.assert_array_equal(rows, order[:, :5])
    assert ranks == [[order[place].tolist().index(row) + 1 for row in line] for place, line in enumerate(wanted)]
    for index.block, index.query_block in ((1, 1), (3, 4), (7, 11), (50, 2), (64, 1000)):
        found = index.search_rows(queries, 5)
        np.testing.assert_array_equal(found[0], rows)
        np.testing.assert_array_equal(found[1], scores)
        assert index.ranks(queries, wanted) == ranks


def test_a_corpus_of_equal_scores_ranks_by_id_alone() -> None:
    index = ExactIndex([f"{i:03}" for i in range(300)], np.ones((300, 4), dtype=np.float32))
    index.block = 64
    rows, _ = index.search_rows(np.ones((2, 4), dtype=np.float32), 70)
    np.testing.assert_array_equal(rows, [list(range(70))] * 2)
    assert index.ranks(np.ones((1, 4), dtype=np.float32), [[0, 299, 199]]) == [[1, 300, 200]]


def test_scores_and_ranks_agree_where_sums_round() -> None:
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(500, 64)).astype(np.float32)
    index = ExactIndex([f"d{i}" for i in range(500)], vectors)
    index.block = 33
    queries = rng.normal(size=(5, 64)).astype(np.float32)
    rows, _ = index.search_rows(queries, 500)
    assert index.ranks(queries, rows.tolist()) == [list(range(1, 501))] * 5


def test_float16_halves_the_bytes_and_scores_in_float32() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 16)).astype(np.float32)
    index = ExactIndex([f"{i:02}" for i in range(40)], vectors, dtype="float16")
    np.testing.assert_array_equal(
        index.vectors_at(index.rows_of(["07"])), vectors[7:8].astype(np.float16).astype(np.float32)
    )
    query = rng.normal(size=(1, 16)).astype(np.float32)
    expected = vectors.astype(np.float16).astype(np.float32)[::-1] @ query[0]
    np.testing.assert_allclose(index.scores_at(query[:1], [np.arange(40)])[0], expected, rtol=1e-6, atol=1e-6)
    assert index.search_rows(query, 3)[1].dtype == index.matrix.dtype == np.float32
    with pytest.raises(VectorIndexError, match="more than float16 can"):
        index.update(index.rows_of(["07"]), np.full((1, 16), 1e5, dtype=np.float32), 1)


@pytest.mark.parametrize("spread", [1.0, 0.02])
def test_products_in_bfloat16_change_no_result(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search_r3.retrieval.index._multiplies_bfloat16", lambda: True)
    monkeypatch.setattr("search_r3.retrieval.selection.DENSE", 20)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(1, 32)) + spread * rng.normal(size=(3000, 32))  # from far apart to hardly to be told
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    vectors[1000:1100] = vectors[:100]
    ids = [f"{3000 - row:04}" for row in range(3000)]
    index = ExactIndex(ids, vectors, dtype="bfloat16")
    plain = ExactIndex(ids, index.matrix)
    index.block = plain.block = 700
    queries = vectors[rng.choice(3000, 20)] + np.float32(spread / 2) * rng.normal(size=(20, 32)).astype(np.float32)
    queries = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
    rows = [rng.choice(3000, 1 + place, replace=False) for place in range(20)]
    assert index.ranks(queries, rows) == plain.ranks(queries, rows)
    exact = plain.scores_at(queries, [np.arange(3000)] * 20)
    found, scores = index.search_rows(queries, 50)
    for line, own, true in zip(found, scores, exact, strict=True):
        order = np.lexsort((np.arange(3000), -true))[:50]
        np.testing.assert_array_equal(line, order)
        np.testing.assert_array_equal(own, true[order])


def test_the_index_neither_changes_nor_follows_the_arrays_given_to_it() -> None:
    vectors = matrix([[float(i), 1.0, 0.0] for i in range(7)])
    vectors.setflags(write=False)
    index = ExactIndex(sorted(IDS, reverse=True), vectors)
    index.update(index.rows_of(["d1"]), matrix([[9.0, 9.0, 9.0]]), 1)
    assert vectors.max() == 6
    np.testing.assert_array_equal(index.search_rows(vectors[:1], 1)[0], [[index.row("d1")]])


def test_a_saved_index_loads_as_it_was_and_mapped_files_are_never_written(tmp_path: Path) -> None:
    index = ExactIndex(IDS, matrix([[float(i), 1.0, 0.0] for i in range(7)]))
    index.update(index.rows_of(["d7"]), matrix([[9.0, 9.0, 9.0]]), version=4)
    index.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for mmap in (False, True):
        loaded = ExactIndex.load(tmp_path, mmap=mmap)
        assert list(loaded.doc_ids) == list(index.doc_ids)
        np.testing.assert_array_equal(loaded.matrix, index.matrix)
        np.testing.assert_array_equal(loaded.encoded_at_version, index.encoded_at_version)
        if sys.platform == "linux":
            assert (f"{tmp_path}/vectors-" in Path("/proc/self/maps").read_text()) == mmap
        loaded.update(loaded.rows_of(["d1"]), matrix([[0.0, 0.0, 5.0]]), version=5)
        assert loaded.search(matrix([[0.0, 0.0, 1.0]]), 2).doc_ids == [["d7", "d1"]]
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    loaded.save(tmp_path)  # onto the files that it is mapped from
    np.testing.assert_array_equal(ExactIndex.load(tmp_path).matrix, loaded.matrix)


def test_a_save_deletes_what_earlier_and_killed_saves_left_and_nothing_else(tmp_path: Path) -> None:
    index = random_index(5)
    index.save(tmp_path)
    old = {path.name for path in tmp_path.iterdir()} - {"manifest.json"}
    strangers = {"notes-2024.json", "doc_ids.npy", "model.safetensors"}
    half = ("vectors-0123456789abcdef.npy", ".manifest.json.x81_k2", ".doc_ids-0123456789abcdef.json.x81_k2")
    for name in (*strangers, *half):
        (tmp_path / name).write_text("{}")
    index.save(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert not left & old and strangers < left
    assert len(left - strangers) == 5, "four data files and the manifest"


class Killed(BaseException):
    """Stops a save where no handler of errors can clean up."""


def test_a_save_stopped_before_any_of_its_steps_leaves_the_old_or_the_new_state(tmp_path, monkeypatch) -> None:
    index = random_index(5)
    index.save(tmp_path)
    stopped = 0
    for last in range(100):
        calls = 0

        def counted(step, last=last):
            def run(*arguments, **options):
                nonlocal calls
                calls += 1
                if calls > last:
                    raise Killed
                return step(*arguments, **options)

            return run

        old = ExactIndex.load(tmp_path).encoded_at_version[0]
        index.update(index.rows_of(["d0"]), np.full((1, 8), last), version=last)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "write_json", counted(storage.write_json))
            patch.setattr(storage, "flush", counted(storage.flush))
            patch.setattr(Path, "open", counted(Path.open))
            patch.setattr(Path, "unlink", counted(Path.unlink))
            try:
                index.save(tmp_path)
            except Killed:
                stopped += 1
            else:
                break
        loaded = ExactIndex.load(tmp_path)
        version = loaded.encoded_at_version[loaded.row("d0")]
        assert version in (old, last)
        assert version == 0 or loaded.vectors_at(loaded.rows_of(["d0"])).tolist() == [[float(version)] * 8]
    assert 8 < stopped == last
    assert len(list(tmp_path.iterdir())) == 5, "the first save that was not stopped cleans up"


KILLING = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np
from search_r3.retrieval.index import ExactIndex

folder, dice, ids = Path(sys.argv[1]), random.Random(0), [f"d{i}" for i in range(300)]

def at(version):
    return ExactIndex(ids, np.full((300, 64), version, dtype=np.float32), version)

at(0).save(folder)
done, kills, deadline = 0, 0, time.monotonic() + 90
while kills < 12 or done < 4:
    kills += 1
    version = int(ExactIndex.load(folder).encoded_at_version[0])
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        while True:
            version += 1
            at(version).save(folder)
            os.write(writer, f"{version}\\n".encode())
    os.close(writer)
    time.sleep(dice.uniform(0.005, 0.05))
    assert time.monotonic() < deadline, f"only {done} saves were complete"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reader) as lines:
        done = ([version] + [int(line) for line in lines])[-1]
    index = ExactIndex.load(folder, mmap=True)
    found = set(index.encoded_at_version.tolist()) | set(index.matrix.ravel().tolist())
    assert found in ({done}, {done + 1}), (found, done)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork, no SIGKILL")
def test_an_index_killed_at_random_moments_of_a_save_loads_the_last_state_or_the_next(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLING, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("full", ["vectors", "manifest"])
def test_a_full_disk_keeps_the_old_state_and_leaves_no_files(full, tmp_path: Path, monkeypatch) -> None:
    index = random_index(5)
    index.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    index.update(index.rows_of(["d0"]), np.ones((1, 8)), version=3)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if full == "vectors":
        monkeypatch.setattr(storage.np.lib.format, "write_array_header_1_0", refuse)
    else:
        write = storage.write_json
        monkeypatch.setattr(
            storage, "write_json", lambda path, *rest: (refuse if path.name.startswith(full) else write)(path, *rest)
        )
    with pytest.raises(VectorIndexError, match="No space left on device; the state saved there before is unchanged"):
        index.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert (ExactIndex.load(tmp_path).encoded_at_version == 0).all()


def npy(array: np.ndarray) -> bytes:
    """The file of an array."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def damages(folder: Path) -> dict[str, tuple[Path, bytes | None]]:
    """What may happen to a saved index: name -> file and its new content (None: it is gone)."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {name.split(".")[0]: folder / file for name, file in manifest["files"].items()}
    other = {**manifest, "documents": 6}
    return {
        "no manifest": (folder / "manifest.json", None),
        "half a manifest": (folder / "manifest.json", (folder / "manifest.json").read_bytes()[:40]),
        "a list": (folder / "manifest.json", b"[]"),
        "future format": (folder / "manifest.json", json.dumps({**manifest, "format": 3}).encode()),
        "other count": (folder / "manifest.json", json.dumps(other).encode()),
        "other size": (folder / "manifest.json", json.dumps({**manifest, "dimension": 9}).encode()),
        "other dtype": (folder / "manifest.json", json.dumps({**manifest, "dtype": "float16"}).encode()),
        "unknown dtype": (folder / "manifest.json", json.dumps({**manifest, "dtype": "int8"}).encode()),
        "no vectors": (files["vectors"], None),
        "truncated vectors": (files["vectors"], files["vectors"].read_bytes()[:-4]),
        "scrambled vectors": (files["vectors"], files["vectors"].read_bytes()[::-1]),
        "doubled ids": (files["doc_ids"], files["doc_ids"].read_bytes().replace(b"d4", b"d3")),
        "ids in another order": (files["doc_ids"], files["doc_ids"].read_bytes().replace(b"d4d3", b"d3d4")),
        "fewer bytes of ids": (files["doc_ids"], npy(np.frombuffer(b"d4d3d2d1", dtype=np.uint8))),
        "ids of another type": (files["doc_ids"], npy(np.arange(10, dtype=np.int64))),
        "scrambled ids": (files["doc_ids"], files["doc_ids"].read_bytes()[::-1]),
        "no ends of ids": (files["doc_id_ends"], None),
        "fewer ends of ids": (files["doc_id_ends"], npy(np.arange(2, 9, 2))),
        "ends of ids that turn back": (files["doc_id_ends"], npy(np.array([4, 2, 6, 8, 10]))),
        "ends of ids beyond all": (files["doc_id_ends"], npy(np.array([2, 40, 6, 8, 10]))),
        "no versions": (files["encoded_at_version"], None),
    }


@pytest.mark.parametrize("mmap", [False, True])
def test_every_damage_is_one_error_that_names_folder_and_remedy(mmap: bool, tmp_path: Path) -> None:
    random_index(5).save(tmp_path)
    for name, (path, content) in damages(tmp_path).items():
        whole = path.read_bytes()
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(VectorIndexError, match=r"holds no usable index \(.+\); encode the corpus again") as caught:
            ExactIndex.load(tmp_path, mmap=mmap)
        assert str(tmp_path) in str(caught.value), name
        path.write_bytes(whole)
    assert len(ExactIndex.load(tmp_path, mmap=mmap)) == 5


def test_refused_writes_change_nothing() -> None:
    index = ExactIndex(IDS, matrix([[1.0, 0.0, 0.0]] * 7))
    before = index.matrix.copy()
    for ids, vectors, message in (
        (["d1", "nope"], matrix([[1, 1, 1], [1, 1, 1]]), "'nope' is not in the index"),
        (["d1", "d2"], matrix([[1, 1, 1], [1, float("nan"), 1]]), "NaN or infinity"),
        (["d1"], matrix([[1, 1]]), "vectors have size 2, the index has size 3"),
        (["d1", "d2"], matrix([[1, 1, 1]]), "expected 2 vectors"),
    ):
        with pytest.raises(VectorIndexError, match=message):
            index.update(index.rows_of(ids), vectors, 1)
    for vectors, message in (
        (matrix([[1, 1, 1]] * 6), "expected 7 vectors"),
        (matrix([[1, 1]] * 7), "size 2"),
        (matrix([[1, 1, 1]] * 6 + [[1, 1, float("inf")]]), "NaN or infinity"),
    ):
        with pytest.raises(VectorIndexError, match=message):
            index.update(np.arange(7), vectors)
    np.testing.assert_array_equal(index.matrix, before)
    assert (index.encoded_at_version == 0).all()


def test_unusable_arguments_are_refused() -> None:
    index = ExactIndex(IDS, matrix([[1.0, 0.0, 0.0]] * 7))
    query = matrix([[1.0, 0.0, 0.0]])
    for call, message in (
        (lambda: ExactIndex([], matrix([])), "the corpus is empty"),
        (lambda: ExactIndex(["a", "a"], matrix([[1, 1], [1, 1]])), "must be unique"),
        (
            lambda: ExactIndex(["a"], matrix([[1, 1]]), dtype="int8"),
            "cannot hold 'int8'; choose one of float32, float16",
        ),
        (lambda: index.search(query, 0), "at least 1 document; k was 0"),
        (lambda: index.search(query[:, :2], 1), "vectors have size 2, the index has size 3"),
        (lambda: index.search(query[0], 1), r"expected Q vectors in rows, found shape \(3,\)"),
        (lambda: index.ranks(query, []), "1 queries need 1 lists of rows, found 0"),
    ):
        with pytest.raises(VectorIndexError, match=message):
            call()


def test_no_queries_give_no_results() -> None:
    index = random_index(5)
    rows, scores = index.search_rows(np.empty((0, 8)), 3)
    assert rows.shape == scores.shape == (0, 3)
    assert index.ranks(np.empty((0, 8)), []) == []
    assert index.ranks(np.ones((2, 8)), [[], []]) == [[], []]


def test_bm25_finds_shared_words_and_nothing_else() -> None:
    bm25 = BM25(["a", "b", "c"], ["red house", "red boat", "green lamp"])
    assert bm25.search(["house", "a red thing", "the", "zebra"], 10) == [["a"], ["b", "a"], [], []]
    assert bm25.search(["red"], 1) == [["b"]], "equal scores rank by id, as everywhere"
    assert bm25.search(["A", "", "?", "lamp"], 2) == [[], [], [], ["c"]], "texts without any word find nothing"


@pytest.mark.parametrize("k", [1, 3, 20, 1000])
def test_bm25_finds_what_scoring_every_document_finds(k: int) -> None:
    """The library's scores of all documents, ranked, are the oracle; many documents tie, words repeat in queries."""
    import bm25s

    draw = np.random.default_rng(0)
    words = np.array([f"w{number}" for number in range(60)])
    chance = 1 / np.arange(1, 61)
    chance /= chance.sum()
    texts = [" ".join(draw.choice(words, size, p=chance)) for size in draw.integers(1, 6, 400)]
    queries = [" ".join(draw.choice(words, size, p=chance if size % 2 else None)) for size in range(1, 25)] * 2
    doc_ids = [f"d{number}" for number in draw.permutation(400)]
    bm25, library = BM25(doc_ids, texts), bm25s.BM25()
    library.index([text.split() for text in texts], show_progress=False)
    found = bm25.search_scored(queries, k)
    for query, line in zip(queries, found, strict=True):
        scores = library.get_scores(query.split())
        every = {doc_id: float(score) for doc_id, score in zip(doc_ids, scores, strict=True) if score}
        assert line == [(doc_id, every[doc_id]) for doc_id in rank(every, k)]
        assert bm25.scores([query], [doc_ids]) == [scores.tolist()]
    assert bm25.search(queries, k) == [[doc_id for doc_id, _ in line] for line in found]


def test_bm25_sorts_only_what_can_be_among_the_best() -> None:
    bm25 = BM25([f"d{n}" for n in range(1000)], [f"common {'rare' if n % 100 == 0 else n}" for n in range(1000)])
    columns = bm25._columns(["common", "rare"])
    assert [len(holds) for holds, _ in columns] == [1000, 10]
    assert [len(bm25._candidates(columns, k)[0]) for k in (1, 10, 11)] == [10, 10, 19], (
        "nine are shorter than the others"
    )
    assert bm25.search(["common rare"], 3) == [["d900", "d800", "d700"]]


def test_bm25_of_documents_without_any_word_finds_nothing() -> None:
    assert BM25(["a", "b"], ["x", "the"]).search(["x", "lamp"], 5) == [[], []]


def test_bm25_gives_scores_and_keeps_to_pools() -> None:
    bm25 = BM25(["a", "b", "c", "d"], ["red house", "red boat", "green lamp", "red red lamp"])
    [whole] = bm25.search_scored(["red lamp"], 10)
    assert [doc_id for doc_id, _ in whole] == ["d", "c", "b", "a"]
    assert all(upper >= lower > 0 for (_, upper), (_, lower) in pairwise(whole))
    assert bm25.search_scored(["red lamp"] * 2, 2) == [whole[:2]] * 2
    pools = [None, {"a", "c"}, set(), {"b", "not indexed"}]
    assert bm25.search_scored(["red lamp"] * 4, 10, pools) == [whole, [whole[1], whole[3]], [], [whole[2]]]
