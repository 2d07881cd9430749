"""The store: documents are written whole, found by vectors, words and filters, and guarded where LanceDB is not."""

from __future__ import annotations

import logging
import multiprocessing
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search_r3.errors import DataError, StoreError
from search_r3.serving import Store, database, guards, held, ranking
from search_r3.serving import store as stores
from search_r3.serving.upkeep import copy_store, verify
from tests.stores import SIZE, document, fingerprint, vector, vectors

pytest.importorskip("lancedb")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "my.store", fingerprint())


def put(store: Store, *documents: list[Any]) -> int:
    chunks = [chunk for one in documents for chunk in one]
    return store.upsert(chunks, vectors(chunks))


def ids(store: Store) -> list[str]:
    return sorted(chunk.doc_id for entry in store.documents() for chunk in store.get(entry.doc_id))


def found(store: Store, query: str | None = None, **options: Any) -> list[str]:
    array = None if query is None else vector(query)[None]
    return [hit.chunk.doc_id for hit in store.search(array, **options)[0]]


def test_a_document_comes_back_as_it_was_written(store: Store) -> None:
    metadata = {
        "year": 2001,
        "share": 0.25,
        "whole": 1.0,
        "tags": ["a", "b"],
        "quote": 'it\'s "so"\n',
        "none": None,
        "big": 2**60,
    }
    chunks = document("it's.md", "one é", "two  ", title="T", metadata=metadata)
    chunks[1] = replace(chunks[1], headings=("H", "I"), page=3)
    assert put(store, chunks) == 1
    assert store.get("it's.md") == chunks
    assert store.get("it's.md#1") == chunks[1:]
    assert store.get("nothing") == []
    assert len(store) == 2
    assert store.documents() == [("it's.md", "T", "/notes/it's.md", "/notes", 2)]


def test_a_document_with_the_id_of_anothers_chunk_is_refused(store: Store) -> None:
    put(store, document("a", "one", "two"), document("c#1", "x"))
    for clash in (document("a#1", "x"), document("c", "x", "y")):
        with pytest.raises(DataError, match=r"document '(a|c)#1' has the id of a chunk of document '(a|c)'; give one"):
            put(store, document("b", "z"), clash)
    with pytest.raises(DataError, match="document 'd#0' has the id of a chunk of document 'd'"):
        put(store, document("d", "x"), document("d#0", "x"))
    assert [entry.doc_id for entry in store.documents()] == ["a", "c#1"], "nothing of these batches was written"
    put(store, document("a", "one"), document("a#1", "x"))
    put(store, document("a#1", "y"), document("a#2", "x"), document("c", "x"))
    assert ids(store) == ["a#0", "a#1#0", "a#2#0", "c#0", "c#1#0"], "no chunk has them"


def test_a_store_that_holds_such_documents_goes_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stores.rows, "check_names", lambda *_: None)
        put(store, document("a", "one", "two"), document("a#1", "x"))
    for again in (document("a", "three", "four"), document("a#1", "y"), document("b", "z")):
        put(store, again)
        assert store.get(again[0].parent_id) == again
    assert ids(store) == ["a#0", "a#1", "a#1#0", "b#0"]
    whole = [replace(document("a#1", "y")[0], doc_id="a#1")]  # not cut into chunks: its row would be that of a's second
    with pytest.raises(DataError, match="document 'a#1' has the id of a chunk of document 'a'"):
        put(store, whole)
    assert store.delete(["a#1"]) == 1
    assert ids(store) == ["a#0", "a#1", "b#0"]


def test_an_upsert_replaces_whole_documents_and_leaves_the_others(store: Store) -> None:
    put(store, document("a", "1", "2", "3"), document("b", "1", "2"))
    put(store, document("a", "new"))
    assert ids(store) == ["a#0", "b#0", "b#1"]
    assert [chunk.text for chunk in store.get("a")] == ["new"]


def test_of_doubled_ids_in_a_batch_the_last_counts_and_none_is_doubled(store: Store) -> None:
    put(store, document("a", "old"), document("a", "new"))
    assert [chunk.text for chunk in store.get("a")] == ["new"]
    put(store, document("a", "newer"), document("a", "newest"))
    assert [chunk.text for chunk in store.get("a")] == ["newest"] and len(store) == 1


def test_deleted_documents_are_gone_and_unknown_ids_are_passed_over(store: Store) -> None:
    put(store, document("a", "1", "2"), document("b'"), document("c"))
    assert store.delete(["a", "b'", "nothing"]) == 2
    assert ids(store) == ["c#0"]
    assert found(store, "1", k=5) == ["c#0"]


def test_the_nearest_come_first_and_of_a_document_the_best_chunk(store: Store) -> None:
    put(store, document("a", "x", "y"), document("b", "z"), document("c", "w"))
    names = {"a#0": "x", "a#1": "y", "b#0": "z", "c#0": "w"}
    cosines = {name: float(vector(text) @ vector("y")) for name, text in names.items()}
    order = sorted(cosines, key=lambda name: -cosines[name])
    assert found(store, "y", by_document=False) == order
    hits = store.search(vector("y")[None], k=3)[0]
    assert [hit.chunk.doc_id for hit in hits] == [name for name in order if name != "a#0"]
    assert [hit.score for hit in hits] == pytest.approx([cosines[hit.chunk.doc_id] for hit in hits], abs=1e-6)


def test_a_search_goes_deeper_until_there_are_enough_documents(store: Store) -> None:
    put(store, document("a", *["same"] * 20), *[document(f"b{i}") for i in range(3)])
    assert len(found(store, "same", k=3)) == 3
    assert len(found(store, "same", k=3, where={"source": "/notes"})) == 3
    assert found(store, "same", k=1, where={"path": "/notes/b0"}) == ["b0#0"]
    assert found(store, "same", k=3, where={"path": "/notes/a"})[0].startswith("a#")


def test_words_are_found_stemmed_folded_and_in_other_scripts(store: Store) -> None:
    put(
        store,
        document("a", "The boats were running."),
        document("b", "Ein größeres Café"),
        document("c", "日本の首都です"),
    )
    assert found(store, texts=["run boat"]) == ["a#0"]
    assert found(store, texts=["cafe"]) == ["b#0"]
    assert found(store, texts=["首都"]) == ["c#0"]
    assert found(store, texts=['"(boats'], where={"path": "/notes/b"}) == []
    assert found(store, texts=[" "]) == []


def test_hybrid_search_adds_reciprocal_ranks(store: Store) -> None:
    put(store, document("a", "alpha"), document("b", "beta word"), document("c", "gamma"))
    by_vector = found(store, "gamma", k=3)
    assert by_vector[0] == "c#0"
    hits = store.search(vector("gamma")[None], texts=["word"], k=3)[0]
    expected = {name: 1 / (61 + place) for place, name in enumerate(by_vector)}
    expected["b#0"] += 1 / 61
    assert {hit.chunk.doc_id: hit.score for hit in hits} == pytest.approx(expected)
    assert hits[0].chunk.doc_id == "b#0"


def test_queries_are_answered_in_their_order(store: Store) -> None:
    put(store, *[document(name, name) for name in "abc"])
    array = np.stack([vector(name) for name in "cab"])
    assert [line[0].chunk.parent_id for line in store.search(array, k=1)] == list("cab")
    assert [line[0].chunk.parent_id for line in store.search(array, k=1, where={"source": "/notes"})] == list("cab")


def test_an_empty_store_answers_with_nothing(store: Store) -> None:
    assert store.search(vector("a")[None], texts=["a"]) == [[]]
    assert (len(store), store.documents(), verify(store)) == (0, [], [])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((1, SIZE + 1)), "expected vectors of shape 1 x 8, found 1 x 9"),
        (np.ones((2, SIZE)), "expected vectors of shape 1 x 8, found 2 x 8"),
        (np.full((1, SIZE), np.nan), "NaN, infinite or zero"),
        (np.zeros((1, SIZE)), "NaN, infinite or zero"),
    ],
)
def test_vectors_that_cannot_be_compared_are_refused(store: Store, array: np.ndarray, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        store.upsert(document("a"), array)
    assert len(store) == 0


def test_what_cannot_be_stored_or_asked_is_refused_by_name(store: Store) -> None:
    with pytest.raises(DataError, match="document 'a': its metadata is nothing for JSON"):
        put(store, document("a", metadata={"x": {1, 2}}))
    with pytest.raises(DataError, match="document 'a': its text holds half a surrogate pair"):
        chunks = document("a", "\ud800")
        store.upsert(chunks, np.ones((1, SIZE)))
    with pytest.raises(DataError, match="k was 0"):
        store.search(texts=["a"], k=0)
    with pytest.raises(DataError, match="vectors, texts, or both"):
        store.search()
    with pytest.raises(DataError, match="2 texts for 1 vectors"):
        store.search(vector("a")[None], texts=["a", "b"])


def test_other_handles_and_threads_see_a_write_at_once(store: Store) -> None:
    put(store, document("a", "1"))
    other = Store.open(store.address)
    assert found(other, "1") == ["a#0"]
    put(store, document("b", "2"))
    assert found(other, "2", k=1) == ["b#0"] and found(other, texts=["text"]) == []
    threads = [
        threading.Thread(target=put, args=(one, document(f"{place}", "3")))
        for place, one in enumerate([store, other] * 3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(other) == 8 and verify(store) == []


def test_an_older_version_can_come_back(store: Store) -> None:
    put(store, document("a"))
    before = store.version
    put(store, document("b"))
    assert before in [number for number, _ in store.versions()]
    store.rollback(before)
    assert ids(store) == ["a#0"] and store.version > before
    store.rollback(1)  # before there was an index of words
    put(store, document("c"))
    assert found(store, texts=["text"]) == ["c#0"]
    with pytest.raises(StoreError, match="cannot go back"):
        store.rollback(10_000)


def test_stores_that_are_not_there_or_not_ours_are_errors(tmp_path: Path, store: Store) -> None:
    import lancedb

    with pytest.raises(StoreError, match="is no store; make one with search-r3 index"):
        Store.open(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(StoreError, match="is a store already"):
        Store.create(store.address, fingerprint())
    lancedb.connect(str(tmp_path / "theirs")).create_table("documents", [{"a": 1}])
    with pytest.raises(StoreError, match="that search-r3 did not make"):
        Store.open(tmp_path / "theirs")


def test_a_store_of_another_format_names_the_version_that_reads_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search_r3.serving.database.FORMAT", 2)
    with pytest.raises(StoreError, match=r"has the format 1, this version reads 2: use search-r3 "):
        Store.open(store.address)


def test_memory_is_a_place_and_relative_names_are_no_cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Store.create("memory://", fingerprint())
    put(memory, document("a"))
    assert found(memory, "x") == ["a#0"] and memory.folder is None
    monkeypatch.chdir(tmp_path)
    assert Store.create("db-of-notes", fingerprint()).folder == tmp_path / "db-of-notes"


# The five guards.


def test_a_write_waits_for_the_lock_of_another_process_and_then_gives_up(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import filelock

    monkeypatch.setattr(guards, "LOCK_SECONDS", 0.05)
    with (
        filelock.FileLock(store.folder / guards.LOCK),
        pytest.raises(StoreError, match="another process has been writing"),
    ):
        put(store, document("a"))
    assert put(store, document("a")) == 1


def write_many(address: str, turn: int) -> None:
    opened = Store.open(address)
    for number in range(turn, turn + 12):
        put(opened, document(f"d{number // 2}", f"of {turn}"))


def test_two_processes_that_write_the_same_new_ids_make_no_duplicates(store: Store) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_many, args=(store.address, turn)) for turn in (0, 1)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert ids(store) == [f"d{number}#0" for number in range(7)] and verify(store) == []


def test_all_that_a_commit_wrote_is_flushed_before_it_is_acknowledged(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[Path] = set()
    plain = guards.flush
    monkeypatch.setattr(guards, "flush", lambda path: flushed.add(path) or plain(path))
    before = set(store.folder.rglob("*"))
    put(store, document("a"))
    new = {path for path in store.folder.rglob("*") if path not in before and path.name != guards.LOCK}
    assert {path.suffix for path in new} >= {".lance", ".manifest"}
    assert new <= flushed and {path.parent for path in new} <= flushed


@pytest.mark.parametrize("left", [0, 100])
def test_an_empty_newest_manifest_is_set_aside_and_said(
    store: Store, caplog: pytest.LogCaptureFixture, left: int
) -> None:
    put(store, document("a"))
    put(store, document("b"))
    newest = min((store.folder / "documents.lance" / "_versions").glob("*.manifest"))
    newest.write_bytes(bytes(left))
    with caplog.at_level(logging.WARNING):
        opened = Store.open(store.address)
    assert "not written whole" in caplog.text and str(opened.folder / guards.SET_ASIDE) in caplog.text
    assert (opened.folder / guards.SET_ASIDE / newest.name).exists()
    assert ids(opened) == ["a#0"] and verify(opened) == []
    put(opened, document("c"))
    assert ids(opened) == ["a#0", "c#0"]
    caplog.clear()
    Store.open(store.address)
    assert not caplog.records


def test_files_are_put_together_after_so_many_commits(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "OPTIMIZE_AFTER", 5)
    counts, trims = [], []
    plain = stores.give_back
    monkeypatch.setattr(stores, "give_back", lambda: trims.append(1) or plain())
    for number in range(12):
        put(Store.open(store.address), document(f"d{number}"))
        counts.append(store._table.stats()["fragment_stats"]["num_small_fragments"])
    assert max(counts) <= 5 and len(store) == 12 and len(trims) >= 2
    assert found(store, texts=["d11"]) == ["d11#0"]


def test_what_is_cached_of_versions_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lancedb

    monkeypatch.setattr(database, "METADATA_BYTES", 2**15)
    monkeypatch.setattr(database, "INDEX_BYTES", 2**12)
    caches, plain = [], lancedb.Session
    monkeypatch.setattr(lancedb, "Session", lambda **sizes: caches.append(plain(**sizes)) or caches[-1])
    store = Store.create(tmp_path / "s", fingerprint())
    for number in range(25):
        put(store, document(f"d{number % 2}", f"text {number}"))
        assert found(store, texts=["text"])
    assert 0 < caches[-1].size_bytes < 2**15 + 2**13


def test_versions_stay_for_an_hour_and_of_many_writes_the_last_rounds_do() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    retention = guards.Retention(lambda: now)
    ages = []
    for wait in (0, 600, 600, 600, 600, 1, 1, 1, 1, 7200):
        now += timedelta(seconds=wait)
        ages.append(retention.age().total_seconds())
    assert ages == [3600, 3600, 3600, 3600, 2400, 1801, 1202, 603, 60, 3600]


def test_the_list_of_documents_is_never_old(store: Store) -> None:
    put(store, document("a"))
    assert [one.doc_id for one in store.documents()] == ["a"]
    put(Store.open(store.address), document("b"))
    listed = store.documents()
    assert [one.doc_id for one in listed] == ["a", "b"] == [one.doc_id for one in store.documents()]
    listed.clear()  # the caller's own
    assert [one.doc_id for one in store.documents({"title": store.documents()[0].title})]
    store.delete(["a"])
    assert [one.doc_id for one in store.documents()] == ["b"]


@pytest.mark.parametrize(("size", "asked_for"), [(held.CHUNK_BYTES, 0), (0, 3)])
def test_hits_are_read_from_memory_where_chunks_are_few_and_are_never_old(
    size: int, asked_for: int, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "CHUNK_BYTES", size)
    put(store, *[document(f"d{number}", str(number), metadata={"n": number}) for number in range(9)])
    asked: list[str] = []
    plain = store._rows
    monkeypatch.setattr(
        store, "_rows", lambda column, names, columns: asked.extend(names) or plain(column, names, columns)
    )
    [hits] = store.search(vector("5")[None], k=3)
    assert (hits[0].chunk, len(hits), len(asked)) == (document("d5", "5", metadata={"n": 5})[0], 3, asked_for)
    put(Store.open(store.address), document("d5", "5", metadata={"n": -5}))
    assert store.search(vector("5")[None], k=1)[0][0].chunk.metadata == {"n": -5}


# Keeping it.


def test_compacting_brings_all_into_the_indexes_and_removes_old_versions(store: Store) -> None:
    for number in range(4):
        put(store, document(f"d{number}", f"text {number}"))
    before = len(store.versions())
    store.compact(keep=timedelta(milliseconds=1))
    assert len(store.versions()) < before
    assert store._table.index_stats("full_text_idx").num_unindexed_rows == 0
    assert ids(store) == [f"d{number}#0" for number in range(4)] and verify(store) == []


def test_many_vectors_get_an_index_with_measured_recall(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "IN_MEMORY", 300)
    put(store, *[document(f"d{number}", str(number)) for number in range(299)])
    store.compact()
    assert store.index == {}
    put(store, document("last", "last"))
    store.compact()
    assert (store.index["kind"], store.index["rows"]) == ("IvfFlat", "300")
    assert float(store.index["recall"]) >= 0.99
    truth = sorted(range(299), key=lambda number: -float(vector(str(number)) @ vector("57")))[:5]
    assert found(store, "57", k=5) == [f"d{number}#0" for number in truth]
    put(store, document("after", "after"))
    assert found(store, "after", k=1) == ["after#0"], "what came after the index was built is found"
    store.compact()
    assert store.index["rows"] == "300", "it is built anew when there are twice as many"


def test_what_a_narrow_filter_lets_through_is_found_wherever_the_index_has_it(store: Store) -> None:
    from lancedb.index import IvfFlat

    put(store, *[document(f"d{number}", str(number)) for number in range(200)])
    config = IvfFlat(distance_type="dot", num_partitions=16)
    store._table.create_index("vector", config=config, name="vector_idx", replace=True)
    facts = {"kind": "IvfFlat", "rows": "200", "nprobes": "1", "recall": "1.0"}
    store._table.update_field_metadata({"path": "vector", "metadata": facts})
    missed = [n for n in range(9) if found(store, "far", k=1, where={"path": f"/notes/d{n}"}) != [f"d{n}#0"]]
    assert missed == []


def test_vectors_that_take_much_memory_are_indexed_as_bytes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "IN_MEMORY", 300)
    monkeypatch.setattr(ranking, "FLAT_BYTES", 100)
    put(store, *[document(f"d{number}", str(number)) for number in range(320)])
    store.compact()
    assert store.index["kind"] == "IvfSq" and float(store.index["recall"]) >= 0.95
    [[hit]] = store.search(vector("57")[None], k=1)
    assert hit.chunk.parent_id == "d57" and hit.score == pytest.approx(1.0, abs=1e-5)


def test_recall_is_that_of_the_index_and_not_a_matter_of_course(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "IN_MEMORY", 300)
    plain = ranking.Ranker._query
    monkeypatch.setattr(ranking.Ranker, "_query", lambda *arguments: plain(*arguments)[:6])
    put(store, *[document(f"d{number}", str(number)) for number in range(300)])
    store.compact()
    assert float(store.index["recall"]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("text", "'other'", "2 documents are not what was written"),
        ("full_text", "'other'", "3 encoded texts and 0 vectors are damaged"),
        ("id", "'same'", "2 chunks have the id of another"),
    ],
)
def test_verify_finds_what_was_changed_behind_its_back(store: Store, column: str, value: str, problem: str) -> None:
    put(store, document("a", "1", "2"), document("b"))
    store._table.update(values_sql={column: value})
    assert problem in "; ".join(verify(store))


def test_verify_finds_half_documents_damaged_vectors_and_lost_files(store: Store) -> None:
    put(store, document("a", "1", "2"), document("b"))
    store._table.delete("id = 'a#1'")
    assert verify(store) == ["1 documents are not what was written (first: 'a'); delete and index them"]
    store._table.update("id = 'b#0'", {"vector": [2.0] * SIZE})
    assert "0 encoded texts and 1 vectors are damaged" in verify(store)[1]
    for path in (store.folder / "documents.lance" / "data").iterdir():
        path.unlink()
    [problem] = verify(store)
    assert "cannot read" in problem and "restore a backup" in problem


def test_a_backup_is_a_store_and_overwrites_nothing(store: Store, tmp_path: Path) -> None:
    put(store, document("a", "1", "2", metadata={"year": 3}), document("b"))
    copy = copy_store(store, tmp_path / "backup")
    assert copy.info.fingerprint == store.info.fingerprint and verify(copy) == []
    assert copy.get("a") == store.get("a") and found(copy, "1", texts=["text"]) == found(store, "1", texts=["text"])
    assert found(copy, "1", where={"year": 3}) == found(store, "1", where={"year": 3})
    put(store, document("c"))
    assert len(copy) == 3
    with pytest.raises(StoreError, match="exists; nothing is overwritten"):
        copy_store(store, tmp_path / "backup")
    assert len(copy_store(copy, tmp_path / "restored")) == 3


def test_a_writer_waits_for_a_backup(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, document("a"))
    batches, written = Store.batches, threading.Event()

    def write() -> None:
        put(Store.open(store.address), document("b"))
        written.set()

    def slow(own: Store) -> Any:
        writers.append(threading.Thread(target=write))
        writers[-1].start()
        assert not written.wait(0.3)
        yield from batches(own)

    writers: list[threading.Thread] = []
    with monkeypatch.context() as patch:
        patch.setattr(Store, "batches", slow)
        patch.setattr("search_r3.serving.upkeep.verify", lambda copy: [])
        copy = copy_store(store, tmp_path / "backup")
    writers[0].join()
    assert (len(copy), len(store)) == (1, 2)


def test_a_backup_that_is_not_whole_is_not_there(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, document("a"), document("b"))
    monkeypatch.setattr(Store, "batches", lambda self: iter(()))
    with pytest.raises(StoreError, match="is not whole: chunks are missing"):
        copy_store(store, tmp_path / "backup")
    assert [path.name for path in tmp_path.iterdir()] == ["my.store"]


def test_numbers_that_json_lacks_are_null(store: Store) -> None:
    put(store, document("a", metadata={"x": float("nan"), "y": [float("inf"), 1]}))
    assert store.get("a")[0].metadata == {"x": None, "y": [None, 1]} and verify(store) == []


def test_a_store_whose_maker_was_killed_is_made_again(tmp_path: Path) -> None:
    Store.create(tmp_path / "s", fingerprint())
    for path in (tmp_path / "s" / "documents.lance" / "_versions").glob("*.manifest"):
        path.write_bytes(b"")
    with pytest.raises(StoreError, match="is no store"):
        Store.open(tmp_path / "s")
    again = Store.create(tmp_path / "s", fingerprint())
    assert put(again, document("a")) == 1 and verify(again) == []


def test_vectors_are_normalised_when_they_come(store: Store) -> None:
    chunks = document("a")
    store.upsert(chunks, 5 * vectors(chunks))
    [[hit]] = store.search(3 * vectors(chunks))
    assert hit.score == pytest.approx(1.0) and verify(store) == []


def test_a_store_needs_no_torch() -> None:
    code = "import sys, search_r3.serving.upkeep; assert 'torch' not in sys.modules and 'lancedb' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
