"""A file of pairs becomes a collection: columns by usual names, one query or document for a text, two splits."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from search_r3.data.load import load_collection
from search_r3.data.pairs import read_pairs
from search_r3.data.triples import hold_out, training_examples
from search_r3.errors import ConfigError, DataError

ROWS = [{"query": f"question {i}?", "positive": f"Answer number {i}."} for i in range(20)]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts_of(pairs: Any, query: str) -> tuple[list[str], list[str]]:
    """The positives and the negatives of a query."""
    collection = pairs.collection
    [found] = [one for one in collection.queries.values() if one.text == query]
    qrels = {query_id: gains for split in collection.qrels.values() for query_id, gains in split.items()}
    text_of = {doc_id: document.full_text for doc_id, document in collection.documents.items()}
    negatives = found.metadata.get("negatives", [])
    return [text_of[one] for one in qrels[found.query_id]], [text_of[one] for one in negatives]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_every_format_gives_the_same_collection_which_is_read_again_as_it_was(tmp_path: Path, suffix: str) -> None:
    pairs = read_pairs(write(tmp_path / f"mine{suffix}", ROWS))
    collection = pairs.collection
    assert collection.name == "mine"
    assert {name: len(qrels) for name, qrels in collection.qrels.items()} == {"train": 18, "dev": 2}
    assert texts_of(pairs, "question 7?") == (["Answer number 7."], [])
    assert pairs.columns == {"query": ("query",), "document": ("positive",)}
    assert pairs.collection.content_hash() == read_pairs(write(tmp_path / "a.jsonl", ROWS)).collection.content_hash()
    collection.save(tmp_path / "saved")
    assert load_collection(str(tmp_path / "saved")).content_hash() == collection.content_hash()


@pytest.mark.parametrize(
    "row",
    [
        {"anchor": "q", "positive": "p", "negative": "n"},
        {"Query": "q", "Positive": "p", "negative_1": "n", "negative_2": "p"},
        {"query": "q", "pos": ["p"], "neg": ["n", "p"]},
        {"question": "q", "answer": "p", "hard_negatives": ["n"]},
        {
            "query_id": "1", "query": "q", "positive_passages": [{"docid": "7", "title": "", "text": "p"}],
            "negative_passages": [{"docid": "8", "title": "", "text": "n"}],
        },
    ],
    ids=["sentence-transformers", "mined", "flagembedding", "hard_negatives", "tevatron"],
)  # fmt: skip
def test_the_names_that_other_libraries_give_are_known(tmp_path: Path, row: dict[str, Any]) -> None:
    other = {name: value if isinstance(value, list) else f"{value} again" for name, value in row.items()}
    pairs = read_pairs(write(tmp_path / "pairs.jsonl", [row, other]))
    assert texts_of(pairs, "q") == (["p"], ["n"]), "a positive is no negative"
    assert pairs.collection.documents["d1"].title == ""


def test_named_columns_come_before_guessed_ones(tmp_path: Path) -> None:
    rows = [{"query": "no", "ask": f"q{i}", "text": f"t{i}", "more": f"m{i}", "title": f"T{i}"} for i in range(3)]
    path = write(tmp_path / "pairs.jsonl", rows)
    pairs = read_pairs(path, columns={"query": "ask", "document": ["text", "more"]})
    assert texts_of(pairs, "q1") == (["T1 t1", "T1 m1"], [])
    assert pairs.columns["document"] == ("text", "more")


def test_a_named_column_is_not_guessed_for_another_field(tmp_path: Path) -> None:
    rows = [{"text": f"what is {one}?", "title": f"A {one} is a thing."} for one in ("fork", "lamp", "door")]
    path = write(tmp_path / "pairs.jsonl", rows)
    pairs = read_pairs(path, columns={"query": "text", "document": "title"})
    assert pairs.columns == {"query": ("text",), "document": ("title",)}
    assert {one.title for one in pairs.collection.documents.values()} == {""}
    with pytest.raises(DataError, match="no column for the document"):
        read_pairs(path, columns={"query": "text"})


def test_one_text_is_one_query_and_one_document(tmp_path: Path) -> None:
    rows = [
        {"query": "tea?", "positive": "Green.", "reasoning": "", "id": 7},
        {"query": " tea?", "positive": "Black.", "reasoning": "It is a drink.", "id": 8},
        {"query": "tea?", "positive": "Green. "},
        {"query": "pot?", "positive": "Black.", "title": "Tea", "negative": ["Green.", "Black."]},
        {"query": "Tea", "positive": "Leaves.", "title": "Tea"},
    ]
    pairs = read_pairs(write(tmp_path / "pairs.jsonl", rows))
    assert sorted(one.full_text for one in pairs.collection.documents.values()) == ["Green.", "Leaves.", "Tea Black."]
    assert texts_of(pairs, "tea?") == (["Green.", "Tea Black."], [])
    assert texts_of(pairs, "pot?") == (["Tea Black."], ["Green."])
    assert texts_of(pairs, "Tea")[0] == ["Leaves."], "a title that is the query would give the answer away"
    assert pairs.duplicates == 1
    assert pairs.collection.queries["q1"].metadata == {"reasoning": "It is a drink.", "id": "7"}
    assert set(pairs.columns) == {"query", "document", "negative", "title", "reasoning", "id"}


def test_a_document_with_label_0_is_a_negative(tmp_path: Path) -> None:
    rows = [
        {"query": "tea?", "document": "Green.", "label": 1},
        {"query": "tea?", "document": "Chess.", "label": 0},
        {"query": "tea?", "document": "Green.", "label": 0},
        {"query": "pot?", "document": "Clay.", "label": "1.0"},
        {"query": "pot?", "document": "Tin.", "label": None},
        {"query": "moon?", "document": "Green.", "label": False},
    ]
    pairs = read_pairs(write(tmp_path / "pairs.jsonl", rows))
    assert texts_of(pairs, "tea?") == (["Green."], ["Chess."]), "what one row says is relevant is no negative"
    assert texts_of(pairs, "pot?") == (["Clay.", "Tin."], [])
    assert {one.text for one in pairs.collection.queries.values()} == {"tea?", "pot?"}
    assert pairs.report.examples == {"a query whose documents all have label 0": [f"{tmp_path}/pairs.jsonl:6"]}
    assert pairs.columns["label"] == ("label",)


def test_quotation_marks_in_a_tsv_file_are_text_unless_they_stand_around_cells(tmp_path: Path) -> None:
    (tmp_path / "raw.tsv").write_text(
        'query\tdocument\nq one\tdoc one\n"what is love\tdoc two\nq three\tdoc three\n12" pipe\t"doc" five\n'
    )
    raw = read_pairs(tmp_path / "raw.tsv")
    assert raw.report.documents == 4
    assert texts_of(raw, '"what is love') == (["doc two"], []) and texts_of(raw, '12" pipe') == (['"doc" five'], [])
    (tmp_path / "quoted.tsv").write_text('query\tdocument\n"12"" pipe"\t"two\nlines"\n"q"\t"a\ttab"\n')
    quoted = read_pairs(tmp_path / "quoted.tsv")
    assert texts_of(quoted, '12" pipe') == (["two\nlines"], []) and texts_of(quoted, "q") == (["a\ttab"], [])


def test_no_query_text_is_in_two_splits_whatever_the_order_of_the_rows(tmp_path: Path) -> None:
    rows = [*ROWS, *({**row, "query": row["query"].upper(), "positive": "x"} for row in ROWS)]
    pairs = read_pairs(write(tmp_path / "one.jsonl", rows), dev_share=0.5)
    collection = pairs.collection
    dev = {collection.queries[one].text.casefold() for one in collection.split("dev")}
    train = {collection.queries[one].text.casefold() for one in collection.split("train")}
    assert len(dev) == len(train) == 10 and not dev & train
    assert hold_out(collection, ["train"], ["dev"]).qrels == collection.qrels, "nothing is left for it to take out"
    other = read_pairs(write(tmp_path / "two.jsonl", rows[::-1]), dev_share=0.5, rl_share=0.4).collection
    assert {other.queries[one].text.casefold() for one in other.split("dev")} == dev
    rl, rest = ({other.queries[one].text.casefold() for one in other.split(split)} for split in ("rl", "train"))
    assert len(rl) == 4 and len(rest) == 6 and rl | rest == train


def test_rows_without_text_are_counted_with_their_places(tmp_path: Path) -> None:
    rows = [*ROWS[:3], {"query": " ", "positive": "x"}, {"query": "x", "positive": None}, {"query": "y"}]
    pairs = read_pairs(write(tmp_path / "pairs.jsonl", rows))
    assert pairs.report.documents == 3
    assert pairs.report.skipped == {"a row without a query": 1, "a row without a document": 2}
    assert pairs.report.examples["a row without a query"][0].endswith("pairs.jsonl:4")


def test_queries_without_negatives_are_searched_for_some(tmp_path: Path) -> None:
    rows = [*ROWS, {"query": "z?", "positive": "zz", "negative": "yy"}]
    collection = read_pairs(write(tmp_path / "pairs.jsonl", rows)).collection
    examples = training_examples(collection, "train", lambda texts, k, pools: [["d1", "d2"] for _ in texts], 1)
    assert all(example.negative_ids for example in examples)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", "", "0 different queries and 0 different documents; expected at least two of each"),
        ("p.jsonl", '{"query": "a", "positive": "b"}\n', "1 different queries and 1 different documents"),
        ("p.csv", "query,positive\n", "p.csv: a table without rows; mend or remove it"),
        ("p.csv", "query,positive\na,b\na,c\n", "1 different queries and 2 different documents"),
        ("p.csv", "query,positive\na,b\nA ,c\n", "too few queries of different texts for the splits train, dev"),
        ("p.csv", "query,positive\na,b\nc,b\n", "2 different queries and 1 different documents"),
        (
            "p.csv",
            "query,positive\n,b\nc,\n",
            "not read: 1 x a row without a query: .*p.csv:1; 1 x a row wi",
        ),
        (
            "p.csv",
            "q,positive\na,b\n",
            r"no column for the query \(query, .*\); it has 'positive', 'q'; name it: --column query=COLUMN",
        ),
        (
            "p.csv",
            "query,p\na,b\n",
            r"no column for the document \(.*\); it has 'p', 'query'; name it: --column doc",
        ),
        (
            "p.jsonl",
            '{"query": "a", "positive": "b"}\n{oops\n',
            "p.jsonl:2: a line that is not JSON; mend or remove",
        ),
        ("p.jsonl", '{"query": "a"}\r{"query": "b"}\r', "p.jsonl:1: a line that is not JSON; mend or remove"),
        ("p.jsonl", "[1]\n", "p.jsonl:1: a line that is no JSON object"),
        (
            "p.csv",
            'query,positive\na,b\n"c,d\ne,f\n',
            r'p.csv: line 3: a quotation does not end where its cell does; write each " in one twice$',
        ),
        (
            "p.csv",
            "query,positive\na,b\nc,d, and a comma\n",
            "p.csv:2: a row with more cells than there are columns; mend or remove it",
        ),
        (
            "p.jsonl",
            '{"query": "a", "positive": "b", "label": 3}\n',
            r"p.jsonl:1: the label is 3; expected 1 \(the document is relevant\) or 0; rename a column",
        ),
        ("p.parquet", "no", "p.parquet: a damaged Parquet file"),
        ("p.txt", "a b", "expected a file that ends in .jsonl, "),
    ],
)
def test_what_cannot_be_trained_on_is_refused_with_its_place(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_pairs(tmp_path / name)


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.csv", ROWS)
    with pytest.raises(DataError, match=r"no file at .*nowhere.csv$"):
        read_pairs(tmp_path / "nowhere.csv")
    with pytest.raises(DataError, match="it is a folder: give one file"):
        read_pairs(tmp_path)
    with pytest.raises(DataError, match=r"no column 'ask'; it has 'positive', 'query'$"):
        read_pairs(path, columns={"query": "ask"})
    with pytest.raises(ConfigError, match="unknown field 'doc'; expected query, document, negative"):
        read_pairs(path, columns={"doc": "positive"})
    with pytest.raises(ConfigError, match="columns='positive': expected field -> column"):
        read_pairs(path, columns="positive")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"rl_share=1.0: expected a share"):
        read_pairs(path, rl_share=1.0)
    with pytest.raises(ConfigError, match=r"dev_share=1.0: expected a share"):
        read_pairs(path, dev_share=1.0)
