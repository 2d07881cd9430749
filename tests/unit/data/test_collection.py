from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from search_r3.data.collection import Collection, CorpusFile, Document, Query, iter_documents
from search_r3.data.triples import reasoning_traces
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
        ("corpus.jsonl", '{"_id": "d00", "text": "again"}', "corpus.jsonl:41: the _id 'd00' stands in an earlier row"),
        ("corpus.jsonl", '{"text": "no id"}', "corpus.jsonl:41: the field '_id' is missing"),
        (
            "corpus.jsonl",
            '{"_id": 7.5, "text": "number"}',
            "corpus.jsonl:41: the field '_id' is 7.5; expected a string",
        ),
        ("corpus.jsonl", '{"_id": "x", "text": "\\ud83d"}', "corpus.jsonl:41: the field 'text' holds half a surrogate"),
        ("queries.jsonl", '{"_id": "x", "text": "\\ud83d"}', "queries.jsonl:41: the field 'text' holds half a"),
        ("corpus.jsonl", '{"_id": "x", "text": "  "}', "corpus.jsonl:41: document 'x' has no text"),
        ("corpus.jsonl", '{"_id": "x", "title": "only"}', "corpus.jsonl:41: the field 'text' is missing"),
        ("corpus.jsonl", '{"_id": "x", ', "corpus.jsonl:41: not valid JSON"),
        ("corpus.jsonl", "[1]", "corpus.jsonl:41: expected a JSON object, found list"),
        ("queries.jsonl", '{"_id": "q00", "text": "again"}', "queries.jsonl:41: the _id 'q00' stands in an earlier"),
        ("queries.jsonl", '{"_id": "x", "text": ""}', "queries.jsonl:41: query 'x' has no text"),
        ("qrels/dev.tsv", "q02\td00\tgood", "dev.tsv:12: the score 'good' is not an integer"),
        ("qrels/dev.tsv", "q99\td00\t1", "dev.tsv:12: query 'q99' is not in queries.jsonl"),
        ("qrels/dev.tsv", "q02\td02\t1", "dev.tsv:12: the pair 'q02', 'd02' is judged in an earlier row"),
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


def test_files_may_write_ids_scores_titles_and_metadata_as_they_like(tmp_path: Path) -> None:
    (tmp_path / "qrels").mkdir()
    mark = b"\xef\xbb\xbf"
    corpus = b'{"_id": 1, "title": null, "text": "a house"}\n{"_id": 2, "text": "a boat"}\n'
    (tmp_path / "corpus.jsonl").write_bytes(mark + corpus)
    (tmp_path / "queries.jsonl").write_bytes(mark + b'{"_id": 7, "text": "house?", "metadata": "topic 12"}\n')
    (tmp_path / "qrels" / "test.tsv").write_bytes(mark + b"7\t1\t1.0\n")
    (tmp_path / "pools.jsonl").write_text('{"query-id": 7, "doc-ids": [1, 2]}\n')
    loaded = Collection.load(tmp_path)
    assert loaded.documents["1"] == Document("1", "a house") and loaded.qrels == {"test": {"7": {"1": 1}}}
    assert loaded.pools == {"7": frozenset({"1", "2"})} and reasoning_traces(loaded.queries["7"]) == {}
    (tmp_path / "qrels" / "test.tsv").write_text("7\t1\t0.5\n")
    with pytest.raises(DataError, match=r"the score '0\.5' is not an integer"):
        Collection.load(tmp_path)


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
    with pytest.raises(DataError, match=r"corpus.jsonl:42: the _id 'x' stands in an earlier row too"):
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


def with_lists() -> Collection:
    """Two documents, a query, a pair of queries as FollowIR has them, and lists of all three kinds."""
    documents = {doc_id: Document(doc_id, f"text {doc_id}") for doc_id in ("s-1", "s-2")}
    queries = {query_id: Query(query_id, "which?") for query_id in ("q", "7-og", "7-changed")}
    return Collection(
        "lists",
        documents,
        queries,
        {"test": {"q": {"s-1": 1}, "7-og": {"s-2": 1}}},
        excluded={"q": frozenset({"s-2"})},
        pools={"q": frozenset({"s-1", "s-2"}), "7-og": frozenset({"s-2"})},
        changed={"7": frozenset({"s-2"})},
    )


def test_half_a_letter_in_a_trace_is_told_and_nothing_is_written(tmp_path: Path, collection: Collection) -> None:
    queries = collection.queries | {"q00": Query("q00", "where?", {"reasoning": "half a \ud800"})}
    with pytest.raises(DataError, match=r"queries.jsonl: the row 'q00' holds half a surrogate pair"):
        replace(collection, queries=queries).save(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_lists_of_documents_are_saved_and_loaded(tmp_path: Path) -> None:
    saved = with_lists()
    saved.save(tmp_path / "lists")
    assert (tmp_path / "lists" / "pools.jsonl").read_text().splitlines() == [
        '{"query-id": "q", "doc-ids": ["s-1", "s-2"]}',
        '{"query-id": "7-og", "doc-ids": ["s-2"]}',
    ]
    assert Collection.load(tmp_path / "lists") == saved
    assert Collection.load(tmp_path / "lists").content_hash() == saved.content_hash()


def test_the_hash_sees_the_lists_and_is_the_old_one_without_them() -> None:
    full = with_lists()
    plain = replace(full, excluded={}, pools={}, changed={})
    one_list = [replace(plain, **{name: {"q": frozenset({"s-2"})}}) for name in ("excluded", "pools", "changed")]
    assert len({one.content_hash() for one in [full, plain, *one_list]}) == 5
    # SHA-256 as recorded by runs from before there were lists; they could not be resumed if it changed.
    assert plain.content_hash() == "b1f51d92d6760cc3e8c9a2e5932bad1eed8993fd051111ea470363eef81da1c1"


@pytest.mark.parametrize(
    ("row", "pools"),
    [
        ('{"query-id": "q", "prefix": "s-", "lines": [2]}', {"q": {"s-2"}}),
        ('{"query-id": "q", "prefix": "s-", "lines": [1, 2]}', {"q": {"s-1", "s-2"}}),
        ("", {}),
    ],
)
def test_a_pool_may_be_a_prefix_and_numbers(tmp_path: Path, row: str, pools: dict[str, set[str]]) -> None:
    with_lists().save(tmp_path / "lists")
    (tmp_path / "lists" / "pools.jsonl").write_text(row + "\n")
    assert Collection.load(tmp_path / "lists").pools == pools


def test_excluded_documents_may_be_unknown(tmp_path: Path) -> None:
    with_lists().save(tmp_path / "lists")
    rows = [{"query-id": "q", "excluded": ["elsewhere", "s-1"]}, {"query-id": "7-og", "excluded": ["N/A"]}]
    (tmp_path / "lists" / "excluded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert Collection.load(tmp_path / "lists").excluded == {"q": {"s-1"}}


@pytest.mark.parametrize(
    ("file", "row", "message"),
    [
        ("excluded", {"query-id": "x", "excluded": []}, "query 'x' is not in queries.jsonl"),
        ("excluded", {"query-id": "7-og", "doc-ids": []}, "the field 'excluded' is missing; expected a list of docu"),
        ("excluded", {"excluded": []}, "the field 'query-id' is missing; expected a string"),
        ("excluded", {"query-id": "q", "excluded": []}, "query 'q' has a list in an earlier row too"),
        ("pools", {"query-id": "x", "doc-ids": ["s-1"]}, "query 'x' is not in queries.jsonl"),
        ("pools", {"query-id": "7-changed", "doc-ids": ["x"]}, "document 'x' is not in corpus.jsonl"),
        (
            "pools",
            {"query-id": "7-changed", "doc-ids": [None]},
            "the field 'doc-ids' is [None]; expected a list",
        ),
        ("pools", {"query-id": "7-changed", "doc-ids": []}, "the pool of query '7-changed' has no document to rank"),
        ("pools", {"query-id": "7-changed", "lines": [1]}, "the field 'prefix' is missing; expected a string"),
        ("pools", {"query-id": "7-changed", "prefix": "s-", "lines": ["1"]}, "['1']; expected a list of integers"),
        ("pools", {"query-id": "7-changed", "prefix": "s-", "lines": [3]}, "document 's-3' is not in corpus.jsonl"),
        ("changed", {"query-id": "q", "doc-ids": ["s-1"]}, "query 'q-og' is not in queries.jsonl"),
        ("changed", {"query-id": "7", "doc-ids": ["s-1"]}, "query '7' has a list in an earlier row too"),
        ("changed", {"query-id": "8", "doc-ids": ["s-1"]}, "query '8-changed' is not in queries.jsonl"),
    ],
)
def test_a_broken_list_is_named(tmp_path: Path, file: str, row: dict[str, object], message: str) -> None:
    lists = with_lists()
    lists.queries["8-og"] = Query("8-og", "which?")
    lists.save(tmp_path / "lists")
    path = tmp_path / "lists" / f"{file}.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, json.dumps(row)]))
    with pytest.raises(DataError) as error:
        Collection.load(tmp_path / "lists")
    assert str(error.value).startswith(f"{path}:{len(lines) + 1}: ")
    assert message in str(error.value)


def test_what_names_a_skipped_document_is_skipped_too_and_it_is_counted(tmp_path: Path) -> None:
    lists = with_lists()
    lists.save(tmp_path / "lists")
    with (tmp_path / "lists" / "corpus.jsonl").open("a") as out:
        out.write('{"_id": "void", "text": " "}\n')
    with (tmp_path / "lists" / "qrels" / "test.tsv").open("a") as out:
        out.write("q\tvoid\t1\n")
    pools, changed = tmp_path / "lists" / "pools.jsonl", tmp_path / "lists" / "changed.jsonl"
    pools.write_text('{"query-id": "q", "doc-ids": ["void", "s-1"]}\n')
    changed.write_text('{"query-id": "7", "doc-ids": ["void", "s-2"]}\n')
    loaded = Collection.load(tmp_path / "lists", skip_empty_documents=True)
    assert loaded == replace(lists, pools={"q": frozenset({"s-1"})}, without_text=1)
    pools.write_text('{"query-id": "q", "doc-ids": ["void"]}\n')
    with pytest.raises(DataError, match="the pool of query 'q' has no document to rank"):
        Collection.load(tmp_path / "lists", skip_empty_documents=True)


def test_the_instruction_of_a_query_follows_its_text(tmp_path: Path) -> None:
    with_lists().save(tmp_path / "lists")
    rows = [
        {"_id": "q", "text": "which?", "instruction": "Newest first."},
        {"_id": "7-og", "text": "which?", "instruction": None},
        {"_id": "7-changed", "text": "which?"},
    ]
    path = tmp_path / "lists" / "queries.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [query.text for query in Collection.load(tmp_path / "lists").queries.values()]
    assert texts == ["which? Newest first.", "which?", "which?"]
    path.write_text('{"_id": "q", "text": "which?", "instruction": 1}\n')
    with pytest.raises(DataError, match=r"queries.jsonl:1: the field 'instruction' is 1; expected a string"):
        Collection.load(tmp_path / "lists")


def test_an_instruction_is_saved_apart_and_tells_two_collections_from_each_other(tmp_path: Path) -> None:
    joined = replace(
        with_lists(), changed={}, queries={"q": Query("q", "which? Newest first.")}, qrels={"t": {"q": {}}}
    )
    apart = replace(joined, queries={"q": Query("q", "which? Newest first.", {"by": 1}, "Newest first.")})
    assert (apart.queries["q"].bare, joined.queries["q"].bare) == ("which?", "which? Newest first.")
    assert apart.queries["q"].without_instruction() == Query("q", "which?", {"by": 1})
    assert apart.content_hash() != joined.content_hash(), "long queries are cut otherwise, and training may ask without"
    apart.save(tmp_path / "apart")
    row = json.loads((tmp_path / "apart" / "queries.jsonl").read_text())
    assert row == {"_id": "q", "text": "which?", "instruction": "Newest first.", "metadata": {"by": 1}}


def test_judgements_that_are_not_utf_8_are_named(tmp_path: Path, collection_path: Path) -> None:
    shutil.copytree(collection_path, tmp_path / "c")
    (tmp_path / "c" / "qrels" / "test.tsv").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"test\.tsv: not UTF-8 text \(byte 0\); save the file as UTF-8"):
        Collection.load(tmp_path / "c")
