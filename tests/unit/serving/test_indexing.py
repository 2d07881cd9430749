"""Indexing: only what changed is encoded, what is gone goes, a kill leaves whole documents, two sources do not mix."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import call

from search_r3.data.documents import read_documents
from search_r3.data.reading.chunks import Chunking
from search_r3.errors import DataError
from search_r3.model.encoder import SearchR3
from search_r3.serving import IndexReport, Store, index_documents
from search_r3.serving.upkeep import verify
from tests.stores import HashEncoder, fingerprint

pytest.importorskip("lancedb")

PARAGRAPHS = [
    f"Paragraph {number} is about the number {number}, and it is long enough to stand alone." for number in range(6)
]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "my.store", fingerprint())


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    (folder / "sub").mkdir(parents=True)
    (folder / "long.txt").write_text("\n\n".join(PARAGRAPHS))
    (folder / "short.md").write_text("# Short\n\nA short note.")
    (folder / "sub" / "other.txt").write_text("Another note.")
    return folder


def index(store: Store, *sources: Path | str, **options: Any) -> tuple[IndexReport, list[str]]:
    """What was done, and the texts that were encoded."""
    model: Any = HashEncoder()
    stream = read_documents([str(source) for source in sources], chunking=Chunking(24))
    return index_documents(store, model, stream, **options), model.seen


def names(store: Store) -> list[str]:
    return [entry.doc_id for entry in store.documents()]


def test_only_what_changed_is_encoded_again(store: Store, notes: Path) -> None:
    report, seen = index(store, notes)
    assert (report.added, report.changed, report.unchanged, report.removed) == (3, 0, 0, 0)
    assert report.encoded == len(seen) == len(store) == 8
    version = store.version
    report, seen = index(store, notes)
    assert (report.unchanged, seen, store.version) == (3, [], version), "nothing is written, either"
    (notes / "long.txt").write_text(
        "\n\n".join(["A new beginning of the text, which moves all that follows it.", *PARAGRAPHS])
    )
    report, seen = index(store, notes)
    assert (report.added, report.changed, report.unchanged) == (0, 1, 2)
    assert len(seen) == 1 and "new beginning" in seen[0] and report.taken_over == 6
    assert [chunk.start for chunk in store.get("long.txt")][:2] == [0, 63]
    assert verify(store) == []


def test_a_document_that_was_moved_is_not_encoded_again_and_is_not_there_twice(store: Store, notes: Path) -> None:
    index(store, notes)
    (notes / "long.txt").rename(notes / "sub" / "moved.txt")
    report, seen = index(store, notes)
    assert (report.added, report.removed, report.unchanged, seen) == (1, 1, 2, [])
    assert names(store) == ["short.md", "sub/moved.txt", "sub/other.txt"]


def test_documents_go_only_under_the_sources_that_are_named(store: Store, notes: Path, tmp_path: Path) -> None:
    paper = tmp_path / "paper.txt"
    paper.write_text("A paper.")
    index(store, notes, paper)
    (notes / "short.md").unlink()
    paper.write_text("Another paper.")
    report, _ = index(store, paper)
    assert (report.changed, report.removed) == (1, 0)
    paper.unlink()
    report, _ = index(store, notes)
    assert report.removed == 1
    assert names(store) == ["long.txt", "paper.txt", "sub/other.txt"]


def test_a_source_has_one_name_however_it_is_written(
    store: Store, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(store, notes)
    monkeypatch.chdir(notes.parent)
    for name in ("notes", "./notes/", f"{notes}/sub/.."):
        report, seen = index(store, name)
        assert (report.unchanged, report.removed, seen) == (3, 0, [])
    assert {entry.source for entry in store.documents()} == {str(notes)}
    assert store.get("short.md")[0].path == str(notes / "short.md")


def test_a_source_that_is_missing_or_empty_removes_nothing(store: Store, notes: Path, tmp_path: Path) -> None:
    index(store, notes)
    notes.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="no documents at"):
        index(store, notes)
    notes.mkdir()
    with pytest.raises(DataError, match="no document with text"):
        index(store, notes)
    assert len(names(store)) == 3


def test_ids_of_two_sources_do_not_replace_each_other(store: Store, notes: Path, tmp_path: Path) -> None:
    index(store, notes)
    other = tmp_path / "other"
    other.mkdir()
    (other / "short.md").write_text("Of another folder.")
    with pytest.raises(
        DataError, match=r"document 'short.md' of .*other has the id of one from .*notes; give its source a prefix"
    ):
        index(store, other)
    report, _ = index(store, f"o={other}")
    assert report.added == 1 and "o/short.md" in names(store) and len(names(store)) == 4


def test_a_name_that_is_no_text_ends_nothing(store: Store, notes: Path) -> None:
    odd = notes / os.fsdecode(b"odd\xff")
    odd.mkdir()
    (odd / "tea.txt").write_text("A note on tea.")
    assert index(store, notes)[0].added == 4 and index(store, notes)[0].unchanged == 4
    [found] = [entry for entry in store.documents() if "odd" in entry.doc_id]
    assert found.doc_id == "odd\\udcff/tea.txt" and found.path == f"{notes}/{found.doc_id}"
    (odd / "tea.txt").unlink()
    assert index(store, notes)[0].removed == 1


def test_a_folder_within_an_indexed_one_is_refused(store: Store, notes: Path) -> None:
    index(store, notes)
    for inner in (notes / "sub", notes / "short.md", notes.parent):
        with pytest.raises(DataError, match="lie within each other: files would be there twice"):
            index(store, inner)


def test_an_error_on_the_way_keeps_what_is_done_and_removes_nothing(store: Store, notes: Path, tmp_path: Path) -> None:
    index(store, notes)
    (notes / "short.md").unlink()
    broken = tmp_path / "rows.jsonl"
    broken.write_text("".join(f'{{"id": "{name}", "text": "of {name}"}}\n' for name in ("r1", "r2", "r1")))
    with pytest.raises(DataError, match="has the id 'r1' already"):
        index(store, notes, broken, block=1)
    assert names(store) == ["long.txt", "r1", "short.md", "sub/other.txt"]
    broken.write_text("".join(f'{{"id": "{name}", "text": "of {name}"}}\n' for name in ("r1", "r2")))
    report, seen = index(store, notes, broken, block=1)
    assert (report.added, report.removed, seen) == (1, 1, ["of r2"])


KILLED = """
import os, signal, sys
from search_r3.data.documents import read_documents
from search_r3.data.reading.chunks import Chunking
from search_r3.serving import Store, index_documents
from tests.stores import HashEncoder

class Killed(HashEncoder):
    calls = 0

    def encode_document(self, texts, **options):
        self.calls += 1
        if self.calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_document(texts, **options)

store = Store.open(sys.argv[1])
index_documents(store, Killed(), read_documents(sys.argv[2], chunking=Chunking(24)), block=1)
"""


def test_an_indexing_that_was_killed_goes_on(store: Store, notes: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, store.address, str(notes)], cwd=Path(__file__).parents[3], check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert names(store) == ["long.txt", "short.md"] and verify(store) == []
    report, seen = index(store, notes)
    assert (report.unchanged, report.added, seen) == (2, 1, ["Another note."])


def test_a_store_within_the_folder_that_it_holds_is_no_document_of_it(notes: Path) -> None:
    inner = Store.create(notes / "own.store", fingerprint())
    index(inner, notes)
    report, seen = index(inner, notes)
    assert (report.unchanged, report.added, seen) == (3, 0, [])


def test_a_text_that_two_documents_share_is_encoded_once(store: Store, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("The same.")
    report, seen = index(store, *(tmp_path / f"{name}.txt" for name in "abc"))
    assert seen == ["The same."] and (report.encoded, report.taken_over) == (1, 2)


# The commands.


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    def run(*arguments: object, status: int = 0) -> str:
        capsys.readouterr()
        assert call(monkeypatch, *arguments) == status
        output = capsys.readouterr()
        return " ".join((output.out + output.err).split())

    yield run


def test_a_folder_is_indexed_and_asked_from_the_command_line(
    shown: Any,
    notes: Path,
    tiny_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = tmp_path / "my.store"
    (notes / "pot.bin").write_bytes(b"\0\1")
    assert "is new: name the model" in shown("index", store, notes, status=2)
    assert "add --untrained" in shown("index", store, "--model", tiny_path, notes, status=2)
    said = shown("index", store, "--model", tiny_path, notes, "--untrained", "--chunk-tokens", 40)
    assert (
        "documents: 3 new; chunks:" in said
        and f"not read: 1 x binary: {notes}/pot.bin" in said
        and "documents/s, chunks" in said
    )
    chunks = len(Store.open(store))
    (notes / "short.md").unlink()
    said = shown("index", store, notes)
    assert "documents: 2 unchanged, 1 removed; chunks: 0 encoded" in said
    said = shown("store", "list", store)
    assert (
        f"2 documents, {chunks - 1} chunks" in said and f"source: {notes}: 2 documents" in said and "long.txt" in said
    )
    monkeypatch.chdir(tmp_path)
    assert (
        call(
            monkeypatch,
            "search",
            "my.store",
            "the number 3",
            "--mode",
            "direct",
            "--json",
            "--where",
            "path=" + str(notes / "long.txt"),
        )
        == 0
    )
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [hit["parent_id"] for hit in answer["hits"]] == ["long.txt"]
    assert "other.txt" in shown("search", store, "Another note", "--mode", "direct", "--hybrid")
    assert "is a store and holds its documents" in shown("search", store, "x", "--documents", notes, status=2)
    for command in (["search", "new.store", "x"], ["serve", "new.store", "--port", 0]):
        assert "new.store is no store; make one with search-r3 index" in shown(*command, status=2)
    assert "are for one" in shown("search", tiny_path, "x", "--hybrid", status=2)
    for option in (["--chunk-tokens", 50], ["--chunk-overlap", 3], ["--document-instruction", "x"]):
        assert f"{option[0]} {option[1]}, but" in shown("index", store, notes, *option, status=2)
    assert "holds vectors of another model: max_length=" in shown("search", store, "x", "--max-length", 60, status=2)


def test_a_store_is_kept_from_the_command_line(
    shown: Any, tiny_path: Path, collection_path: Path, tmp_path: Path
) -> None:
    store = tmp_path / "my.store"
    assert "name one of the two" in shown("index", store, "--model", tiny_path, status=2)
    said = shown("index", store, "--model", tiny_path, "--collection", collection_path, "--untrained")
    assert "documents: 40 new; chunks: 40 encoded" in said
    assert "40 unchanged" in shown("index", store, "--collection", collection_path)
    assert "whole; 40 documents, 40 chunks" in shown("store", "verify", store)
    assert "40 documents" in shown("store", "compact", store)
    assert "no 'd99'; nothing was removed" in shown("store", "delete", store, "d01", "d99", status=2)
    assert "2 documents removed" in shown("store", "delete", store, "d01", "d02")
    assert "38 documents, 38 chunks, verified" in shown("store", "backup", store, tmp_path / "backup")
    assert "nothing is overwritten" in shown("store", "restore", store, tmp_path / "backup", status=2)
    assert "38 documents removed" in shown("store", "delete", store, "--source", f"collection {collection_path}")
    assert "38 documents, 38 chunks, verified" in shown("store", "restore", tmp_path / "again", tmp_path / "backup")
    assert len(shown("store", "list", tmp_path / "again", "--json").split("doc_id")) == 39
    opened = Store.open(tmp_path / "again")
    opened._table.update("id = 'd03'", {"text": "other"})
    assert "not what was written (first: 'd03')" in shown("store", "verify", tmp_path / "again", status=2)
    assert "is no store" in shown("store", "list", tmp_path / "nothing", status=2)
    assert SearchR3(tiny_path).dimension == opened.info.fingerprint.dimension


def test_the_full_text_of_a_collection_is_what_is_encoded_elsewhere(
    tiny_path: Path, tmp_path: Path, shown: Any, collection_path: Path, collection: Any
) -> None:
    shown("index", tmp_path / "s", "--model", tiny_path, "--collection", collection_path, "--untrained")
    store = Store.open(tmp_path / "s")
    for document in collection.documents.values():
        [chunk] = store.get(document.doc_id)
        assert (chunk.full_text, chunk.title, chunk.text) == (document.full_text, document.title, document.text)
