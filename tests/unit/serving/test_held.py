"""What is held in memory follows each write, and is what a store that was just opened reads."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search_r3.errors import StoreError
from search_r3.serving import Store, held
from tests.stores import SIZE, document, fingerprint, vector, vectors

pytest.importorskip("lancedb")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "my.store", fingerprint())


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows each time that a whole table is read."""
    times: list[int] = []
    plain = held.Memory._read
    monkeypatch.setattr(held.Memory, "_read", lambda memory: times.append(1) or plain(memory))
    return times


def put(store: Store, *documents: list[Any]) -> None:
    chunks = [chunk for one in documents for chunk in one]
    store.upsert(chunks, vectors(chunks))


def seen(store: Store) -> tuple[Any, ...]:
    """All that is held, as it is asked for."""
    array = np.stack([vector("a"), vector("text 3")])
    return store.search(array, k=100, by_document=False), store.documents(), store.page("", 100)


def pages(store: Store, limit: int) -> list[list[tuple[str, int]]]:
    found, after = [], ""
    while page := store.page(after, limit)[0]:
        found.append([(one.doc_id, one.chunks) for one in page])
        after = page[-1].doc_id
    return found


@pytest.mark.parametrize("size", [held.CHUNK_BYTES, 0])
def test_what_is_held_is_what_the_store_has_after_writes_of_any_kind(
    size: int, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "CHUNK_BYTES", size)
    draw, other = random.Random(0), Store.open(store.address)
    for step in range(40):
        writer = draw.choice([store, store, store, other])
        names = draw.sample([f"d{place}" for place in range(8)], draw.randint(1, 3))
        texts = [f"text {draw.randrange(9)}" for _ in range(draw.randint(1, 3))]
        what = draw.choices(["put", "delete", "compact"], [5, 3, 1])[0]
        if what == "put":
            put(writer, *[document(name, *texts, title=str(step), metadata={"n": step}) for name in names])
        elif what == "delete":
            writer.delete(names)
        else:
            writer.compact()
        if draw.random() < 0.7:  # else several writes are taken in at once
            assert seen(store) == seen(Store.open(store.address)), (step, what)


def test_after_a_write_of_its_own_nothing_is_read_again(store: Store, reads: list[int]) -> None:
    put(store, document("a", "1", "2"), document("b"))
    seen(store)
    put(store, document("a", "new"), document("c"))
    seen(store)
    store.delete(["b"])
    store.compact()
    assert [one.doc_id for one in store.documents()] == ["a", "c"] and len(reads) == 1
    put(Store.open(store.address), document("d"))
    assert [one.doc_id for one in store.documents()] == ["a", "c", "d"] and len(reads) == 2


def test_while_a_write_goes_on_searches_have_what_was_before_it(store: Store, reads: list[int]) -> None:
    put(store, document("a"))
    before = seen(store)
    with store._writing("write"):
        store._table.delete("parent_id = 'a'")
        assert seen(store) == before and len(reads) == 1
    assert store.documents() == [] and len(reads) == 2, "it was not told what changed"


def test_a_write_that_fails_leaves_what_is_held(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, document("a"))
    before = seen(store)
    for committed in (False, True):
        with monkeypatch.context() as patch, pytest.raises(StoreError, match="cannot write: full"):
            if committed:  # what comes after the commit fails
                patch.setattr(type(store._table), "stats", lambda _: (_ for _ in ()).throw(OSError("full")))
            else:
                patch.setattr(type(store._table), "merge_insert", lambda *_: (_ for _ in ()).throw(OSError("full")))
            put(store, document("b"))
        assert [one.doc_id for one in store.documents()] == ["a", "b"][: 1 + committed]
        assert (seen(store) == before) == (not committed)
    store.rollback(store.versions()[-1][0] - 1)
    assert seen(store) == before


def test_a_chunk_may_go_from_one_document_to_another(store: Store) -> None:
    put(store, document("a", "1", "2"), document("b"))
    seen(store)
    moved = replace(document("c")[0], doc_id="a#1")
    store.upsert([moved], vectors([moved]))
    assert seen(store) == seen(Store.open(store.address))
    assert [(one.doc_id, one.chunks) for one in store.documents()] == [("a", 1), ("b", 1), ("c", 1)]


def test_writes_that_nobody_asks_about_are_not_kept(
    store: Store, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "CHUNK_BYTES", 2000)
    put(store, document("a"))
    seen(store)
    for number in range(20):
        put(store, document(f"b{number}"))
        assert len(store._memory._changes) < 10
    assert len(store.documents()) == 21 and len(reads) > 1


def test_many_documents_are_listed_page_by_page_and_counted(
    store: Store, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "IN_MEMORY", 5)
    names = ["b", "a", "it's", "c", "ä", "日本", "A", "d"]
    put(store, *[document(name, *map(str, range(place + 1))) for place, name in enumerate(names)])
    expected = [(name, names.index(name) + 1) for name in sorted(names)]
    for limit in (1, 3, 8, 50):
        assert [one for page in pages(store, limit) for one in page] == expected
        assert all(len(page) == limit for page in pages(store, limit)[:-1])
    [entry] = store.page("ä", 1)[0]
    assert entry == ("日本", "", "/notes/日本", "/notes", 6)
    assert store.page("", 2)[1] == 8 and len(reads) == 1
    plain, scans = held.Memory._refresh, []
    monkeypatch.setattr(held.Memory, "_refresh", lambda memory: scans.append(memory._total) or plain(memory))
    put(store, document("new"), document("a", "changed"))
    store.delete(["b", "c", "unknown"])
    assert store.page("", 1)[1] == 7 == len(store.documents())
    assert scans and None not in scans, "it is counted on"
    put(Store.open(store.address), document("theirs"))
    assert store.page("", 1)[1] == 8


def test_a_store_that_outgrows_memory_is_searched_on_the_disk(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "IN_MEMORY", 4)
    put(store, *[document(name) for name in "abc"])
    assert not store._memory.now().many
    put(store, document("d"))
    assert store._memory.now().many
    array = vector("the text of d")[None]
    assert [hit.chunk.parent_id for hit in store.search(array, k=1)[0]] == ["d"]
    assert array.shape == (1, SIZE)


def test_a_store_that_becomes_small_again_is_held(
    store: Store, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "IN_MEMORY", 4)
    put(store, *[document(name) for name in "abcd"])
    assert store.page()[1] == 4 and store._memory.now().many and len(reads) == 1
    store.delete(["a", "b"])
    assert not store._memory.now().many and len(reads) == 2
    assert seen(store) == seen(Store.open(store.address))


def test_documents_that_are_counted_while_one_is_written_are_counted_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "IN_MEMORY", 2)
    put(store, document("a"), document("b"))
    assert store._memory.now().many
    kind, plain, totals = type(store._table), type(store._table).stats, list[int]()
    with monkeypatch.context() as patch:  # what comes after the commit
        patch.setattr(kind, "stats", lambda table: totals.append(store.page()[1]) or plain(table))
        put(store, document("c"))
    assert totals == [3]
    assert store.page()[1] == 3
