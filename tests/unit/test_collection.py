from __future__ import annotations

import json
from pathlib import Path

import pytest

from search_r3.data.collection import Collection, CorpusFile, iter_documents
from search_r3.errors import DataError
from search_r3.files import atomic_directory, write_text


def test_a_saved_collection_loads_as_it_was(tmp_path: Path, collection: Collection) -> None:
    collection.save(tmp_path / "small")
    loaded = Collection.load(tmp_path / "small")
    assert loaded == collection
    assert loaded.content_hash() == collection.content_hash()


def test_the_hash_sees_every_part(collection: Collection) -> None:
    other = Collection(collection.name, collection.documents, collection.queries, {"dev": {"q00": {"d00": 2}}})
    assert other.content_hash() != collection.content_hash()


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("corpus.jsonl", '{"_id": "d00", "text": "again"}', "corpus.jsonl:41: the _id 'd00' stands on an earlier line"),
        ("corpus.jsonl", '{"text": "no id"}', "corpus.jsonl:41: the field '_id' is missing"),
        ("corpus.jsonl", '{"_id": 7, "text": "number"}', "corpus.jsonl:41: the field '_id' is 7; expected a string"),
        ("corpus.jsonl", '{"_id": "x", "text": "  "}', "corpus.jsonl:41: document 'x' has no text"),
        ("corpus.jsonl", '{"_id": "x", "title": "only"}', "corpus.jsonl:41: the field 'text' is missing"),
        ("corpus.jsonl", '{"_id": "x", ', "corpus.jsonl:41: not valid JSON"),
        ("corpus.jsonl", "[1]", "corpus.jsonl:41: expected a JSON object, found list"),
        ("queries.jsonl", '{"_id": "q00", "text": "again"}', "queries.jsonl:41: the _id 'q00' stands on an earlier"),
        ("queries.jsonl", '{"_id": "x", "text": ""}', "queries.jsonl:41: query 'x' has no text"),
        ("qrels/dev.tsv", "q02\td00\tgood", "dev.tsv:12: the score 'good' is not an integer"),
        ("qrels/dev.tsv", "q99\td00\t1", "dev.tsv:12: query 'q99' is not in queries.jsonl"),
        ("qrels/dev.tsv", "q02\td99\t1", "dev.tsv:12: document 'd99' is not in corpus.jsonl"),
        ("qrels/dev.tsv", "q02\td02\t1", "dev.tsv:12: the pair 'q02', 'd02' is judged on an earlier line"),
        ("qrels/dev.tsv", "q02 d02 1", "dev.tsv:12: expected 3 tab-separated columns"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, collection: Collection, file: str, line: str, message: str) -> None:
    collection.save(tmp_path / "c")
    with (tmp_path / "c" / file).open("a") as out:
        out.write(line + "\n")
    with pytest.raises(DataError) as error:
        Collection.load(tmp_path / "c")
    assert message in str(error.value)


def test_a_real_collection_with_an_empty_document_loads_when_told_so(tmp_path: Path, collection: Collection) -> None:
    collection.save(tmp_path / "c")
    with (tmp_path / "c" / "corpus.jsonl").open("a") as out:
        out.write('{"_id": "x", "text": ""}\n')
    loaded = Collection.load(tmp_path / "c", skip_empty_documents=True)
    assert set(loaded.documents) == set(collection.documents)


def test_a_corpus_is_read_one_line_at_a_time_and_as_often_as_wanted(tmp_path: Path, collection: Collection) -> None:
    collection.save(tmp_path / "c")
    path = tmp_path / "c" / "corpus.jsonl"
    texts = CorpusFile(path)
    assert [*texts] == [*texts] == [*collection.texts().items()]
    assert collection.texts()["d00"] == "red house This one is about a red house."
    with path.open("a") as out:
        out.write('{"_id": "x", "text": ""}\n{"_id": "x", "text": ""}\n')
    documents = iter_documents(path)
    assert [next(documents) for _ in range(40)] == [*collection.documents.values()], "the lines after are not read yet"
    with pytest.raises(DataError, match=r"corpus.jsonl:41: document 'x' has no text"):
        next(documents)
    with pytest.raises(DataError, match=r"corpus.jsonl:42: the _id 'x' stands on an earlier line too"):
        list(iter_documents(path, skipped=set()))


def test_missing_files_and_splits_are_named(tmp_path: Path, collection: Collection) -> None:
    with pytest.raises(DataError, match="no collection at"):
        Collection.load(tmp_path / "nowhere")
    collection.save(tmp_path / "c")
    (tmp_path / "c" / "queries.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"queries.jsonl: the file has no rows"):
        Collection.load(tmp_path / "c")
    with pytest.raises(DataError, match="has no split 'nope'; it has: dev, test, train"):
        collection.split("nope")


def test_a_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    write_text(tmp_path / "d" / "file", "old")
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "d") as out:
        (out / "file").write_text("new")
        raise RuntimeError
    assert (tmp_path / "d" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_graded_and_non_positive_judgements_survive(tmp_path: Path, collection: Collection) -> None:
    graded = Collection(
        "g", collection.documents, collection.queries, {"test": {"q00": {"d00": 2, "d01": 0, "d02": -1}}}
    )
    graded.save(tmp_path / "g")
    assert Collection.load(tmp_path / "g").qrels == graded.qrels
    assert json.loads((tmp_path / "g" / "queries.jsonl").read_text().splitlines()[0])["metadata"]
