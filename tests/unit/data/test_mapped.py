"""Documents that stay in their file are those that a reading into memory gives, and so are the errors."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_r3.data.collection import Collection, Document, iter_documents
from search_r3.data.mapped import MappedDocuments
from search_r3.errors import DataError

LINES = [
    '\ufeff{"_id": "a", "title": "Tea", "text": "green \\u00e9 tea"}\n',
    "\n",
    '{"_id": 7, "text": "ein Öltank"}\r\n',
    '{"_id": "empty", "title": "", "text": " "}\n',
    '{"_id": "b", "title": null, "text": "no more", "url": "x"}',
]


def test_they_are_those_of_a_reading_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes("".join(LINES).encode())
    skipped: tuple[set[str], set[str]] = set(), set()
    documents = MappedDocuments(path, skipped[0])
    expected = {document.doc_id: document for document in iter_documents(path, skipped[1])}
    assert documents == expected and list(documents) == ["a", "7", "b"] and skipped[0] == skipped[1] == {"empty"}
    assert list(documents.values()) == list(expected.values())
    assert documents["7"] == Document("7", "ein Öltank")
    assert "7" in documents and "empty" not in documents and len(documents) == 3
    with pytest.raises(KeyError):
        documents["empty"]


@given(
    st.lists(st.sampled_from(LINES), min_size=1, max_size=4).map("".join),
    st.sampled_from([b"", b"{", b"[]", b"\n\n", b"{}", b'{"_id": "c",\r "text": "x"}', b'{"_id": "c"}\r{"_id": "d"}']),
)
def test_errors_are_those_of_a_reading_into_memory(
    tmp_path_factory: pytest.TempPathFactory, text: str, end: bytes
) -> None:
    path = tmp_path_factory.mktemp("data") / "corpus.jsonl"
    path.write_bytes(text.encode() + end)
    outcomes = []
    for read in (MappedDocuments, lambda *arguments: {one.doc_id: one for one in iter_documents(*arguments)}):
        try:
            outcomes.append(dict(read(path, set())))
        except DataError as error:
            outcomes.append(str(error).split("(")[0])
    assert outcomes[0] == outcomes[1]


def test_a_carriage_return_alone_ends_no_line(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"_id": "a",\r "text": "one"}\r\n{"_id": "b", "text": "two"}\n')
    expected = {"a": Document("a", "one"), "b": Document("b", "two")}
    assert MappedDocuments(path) == expected == {one.doc_id: one for one in iter_documents(path)}
    path.write_bytes(b'{"_id": "a", "text": "one"}\r{"_id": "b", "text": "two"}\r')
    for read in (MappedDocuments, lambda path: list(iter_documents(path))):
        with pytest.raises(
            DataError, match=r"corpus.jsonl:1: .*a carriage return alone, .*: save the file with line f"
        ):
            read(path)


def test_a_missing_file_and_one_without_rows_are_one_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*corpus\.jsonl: No such file"):
        MappedDocuments(tmp_path / "corpus.jsonl")
    (tmp_path / "corpus.jsonl").write_bytes(b'{"_id": "a", "text": "one"}\n{"_id": "\xff')
    with pytest.raises(DataError, match=r"not UTF-8 text .*; save the file as UTF-8"):
        MappedDocuments(tmp_path / "corpus.jsonl")
    (tmp_path / "corpus.jsonl").write_text("")
    with pytest.raises(DataError, match="the file has no rows"):
        MappedDocuments(tmp_path / "corpus.jsonl")


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"_id": "a", "text": "one"}\n{"_id": "b", "text": "two"}\n')
    documents = MappedDocuments(path)
    with path.open("r+") as file:
        file.write('{"_id": "c", "text": "one"}\n{"_id"  "b')
    for doc_id in "ab":
        with pytest.raises(DataError, match=f"corpus.jsonl has changed since it was read, at document '{doc_id}'"):
            documents[doc_id]


def test_a_collection_is_the_same_either_way(collection: Collection, tmp_path: Path) -> None:
    collection.save(tmp_path / "small")
    mapped, held = (Collection.load(tmp_path / "small", mapped=mapped) for mapped in (True, False))
    assert isinstance(mapped.documents, MappedDocuments) and isinstance(held.documents, dict)
    assert mapped == held
    assert mapped.content_hash() == held.content_hash() == collection.content_hash()
    assert list(mapped.pairs()) == list(held.texts().items()) == list(mapped.pairs())
    assert list(mapped.pairs(by_id=True)) == sorted(held.texts().items())


def test_memory_holds_no_texts(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    with path.open("w") as file:
        file.writelines(f'{{"_id": "{i:07}", "text": "{"word " * 400}"}}\n' for i in range(5000))
    tracemalloc.start()
    documents = MappedDocuments(path)
    assert sum(len(document.text) for document in documents.values()) == 5000 * 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / 5000 < 400, "bytes per document: its id twice, and where it stands; a text has 2000"
