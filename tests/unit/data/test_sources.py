"""Readers of public training sets, on folders in the hub's own formats and schemas."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import datasets
import hub_rows as rows
import pytest
from hub_rows import write_rows, write_source

from search_r3.data.collection import Collection, Document, Query
from search_r3.data.mixing import sources, sources_text
from search_r3.data.mixing.sources import Passage, SourceExample, SourcePlace
from search_r3.data.pairs import read_pairs
from search_r3.errors import DataError


def read(reader: str, path: object, split: str = "train", *, shuffle: int = 0, seed: int = 0) -> list[SourceExample]:
    place = SourcePlace(str(path), split, shuffle, seed)
    return list(sources.read_examples(reader, place, str(Path(str(path)).parent / "scratch"), passage_words=10))


def in_lists(found: rows.Rows) -> rows.Rows:
    """The rows with each struct of lists as a list of structs, as JSON often has them."""
    changed = copy.deepcopy(found)
    for row in changed:
        for name, value in row.items():
            if isinstance(value, dict) and all(isinstance(one, list) for one in value.values()):
                row[name] = [dict(zip(value, one, strict=True)) for one in zip(*value.values(), strict=True)]
    return changed


EXPECTED = {
    "msmarco": SourceExample(
        "how long do cats sleep",
        (Passage("", "Cats sleep 12 to 16 hours a day."),),
        (Passage("", "Dogs sleep about half of the day."), Passage("", "Cats eat meat twice.")),
    ),
    "codesearchnet": SourceExample(
        "Give the longest of the rows.", (Passage("", "def longest(rows):\n    return max(rows, key=len)"),)
    ),
    "cosqa": SourceExample("python sort a dict by value", (Passage("", "def by_value(d):\n    return sorted(d)"),)),
    "miracl": SourceExample(
        "Wann wurde Taschkent gegründet?",
        (Passage("Taschkent", "Taschkent ist sehr alt und gross."),),
        (Passage("Samarkand", "Samarkand ist auch sehr alt und schön."),),
    ),
    "s2orc": SourceExample("A study of cats and of sleep", (Passage("", "We watch cats while they sleep at night."),)),
    "pairs": SourceExample(
        "who was the first queen of the hive",
        (Passage("", "The first queen of the hive was old Beatrice."),),
        (
            Passage("", "The second queen of the hive was Anna."),
            Passage("", "Hives have workers, drones and one queen."),
        ),
    ),
}
ROWS = {
    "triviaqa": rows.TRIVIAQA,
    "msmarco": rows.MSMARCO,
    "codesearchnet": rows.CODESEARCHNET,
    "cosqa": rows.COSQA,
    "miracl": rows.MIRACL,
    "s2orc": rows.S2ORC_ABSTRACTS,
    "pairs": rows.PAIRS,
}


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize("reader", EXPECTED)
def test_a_reader_reads_the_hub_s_schema_in_both_formats(tmp_path: Path, reader: str, suffix: str) -> None:
    assert read(reader, write_source(tmp_path / "data", ROWS[reader], suffix))[0] == EXPECTED[reader]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json"])
def test_a_single_file_is_a_source(tmp_path: Path, suffix: str) -> None:
    assert read("cosqa", write_rows(tmp_path / f"cosqa-train.{suffix}", rows.COSQA))[0] == EXPECTED["cosqa"]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize("form", [copy.deepcopy, in_lists], ids=["struct of lists", "list of structs"])
def test_triviaqa_positives_hold_an_answer_and_are_cut_around_it(tmp_path: Path, suffix: str, form: Any) -> None:
    source = write_source(tmp_path / "data", form(rows.TRIVIAQA), suffix, config="rc")
    first, second = read("triviaqa", source)
    # Of two places that name the answer, the one that shares words with the question; ten words of some six hundred.
    assert first.positives == (
        Passage("Tashkent", "capital of Uzbekistan is Tashkent, a city. word0 word1 word2"),
        Passage("Toshkent", "TOSHKENT is large, says this page. word0 word1 word2 word3"),
    )
    assert [len(passage.text.split()) for passage in first.positives] == [10, 10]
    assert first.negatives == (Passage("Samarkand", "Samarkand was a capital once. word0 word1 word2 word3 word4"),)
    assert (second.positives, len(second.negatives)) == ((), 1), "a page without an answer answers nothing"


def test_an_answer_is_found_as_whole_words_only() -> None:
    answer = sources_text.answer_pattern(["Ur", "C++", "..."])
    assert answer
    assert sources_text.answer_passage("Our urn is in Europe.", answer, "", 20) == ""
    assert sources_text.answer_passage("They built (Ur) long ago.", answer, "", 3) == "built (Ur) long"
    assert sources_text.answer_passage("Ur one. Far from all of this. Ur two.", answer, "", 2) == "Ur one."
    assert sources_text.answer_passage("It needs C++ here.", answer, "", 20) == "It needs C++ here."
    assert sources_text.answer_pattern(["...", ""]) is None


@pytest.mark.parametrize(
    ("code", "docstring", "expected"),
    [
        ("def f():\n    r'''Add\n    two.'''\n    return 2", "Add\n    two.", "def f():\n    return 2"),
        ("// Adds two.\n// Always.\nfunc Add() int {}", "Adds two.\nAlways.", "func Add() int {}"),
        ("/**\n * Adds two.\n */\nint add() {}", "Adds two.", "int add() {}"),
        ("def add(x):\n    return x", "add", "def add(x):\n    return x"),
        ("def add(x):\n    'add'\n    return x", "add", "def add(x):\n    return x"),
        ("def f():\n    return 1", "Nowhere to be found.", "def f():\n    return 1"),
    ],
)
def test_the_docstring_that_asks_is_not_in_the_code_that_answers(code: str, docstring: str, expected: str) -> None:
    assert sources_text.without_docstring(code, docstring) == expected


def test_codesearchnet_reads_its_mirrors_too(tmp_path: Path) -> None:
    for name, columns in (("hub", ("comment", "code")), ("github", ("docstring", "code"))):
        row = dict(zip(columns, ("Give the longest of the rows.", rows.CODE), strict=True))
        found = read("codesearchnet", write_source(tmp_path / name, [row], config="pair"))
        assert found[0].query == "Give the longest of the rows."


def test_cosqa_code_with_label_0_is_a_negative(tmp_path: Path) -> None:
    wrong = read("cosqa", write_source(tmp_path / "data", rows.COSQA))[1]
    assert (wrong.positives, wrong.negatives) == ((), (Passage("", "def add_up(a, b):\n    return a + b"),))


def test_s2orc_reads_its_three_pairs(tmp_path: Path) -> None:
    cited = read("s2orc", write_source(tmp_path / "cited", rows.S2ORC_CITED, config="title-citation-pair"))
    assert cited == [
        SourceExample("A study of cats and of sleep", (Passage("", "An older study of the sleep of cats"),))
    ]
    lists = read("s2orc", write_source(tmp_path / "lists", rows.S2ORC_LISTS, config="abstract-citation-pair"))
    assert lists[0].query == "We watch cats while they sleep at night."
    assert [passage.text for passage in lists[0].positives] == ["Cats slept long before us.", "Dogs sleep as well."]


def test_pairs_may_come_with_reasoning_and_with_a_list_of_negatives(tmp_path: Path) -> None:
    row = {"question": "why?", "answer": "Because.", "negative": ["No.", None, " "], "reasoning": "Think."}
    (found,) = read("pairs", write_source(tmp_path / "data", [row], "jsonl"))
    assert found == SourceExample("why?", (Passage("", "Because."),), (Passage("", "No."),), {"trace": "Think."})


@pytest.mark.parametrize(
    "row",
    [
        {"query": "why?", "pos": ["Because.", "So."], "neg": ["No."]},
        {"query": "why?", "positive_passages": [{"title": "", "text": "Because."}, {"title": "", "text": "So."}],
         "negative_passages": [{"title": "", "text": "No."}]},
    ],
)  # fmt: skip
def test_pairs_have_the_columns_that_fit_knows(tmp_path: Path, row: dict[str, Any]) -> None:
    (found,) = read("pairs", write_source(tmp_path / "data", [row], "jsonl"))
    assert found == SourceExample("why?", (Passage("", "Because."), Passage("", "So.")), (Passage("", "No."),))
    known = read_pairs(write_rows(tmp_path / "pairs.jsonl", [row, {**row, "query": "how?"}])).collection
    assert [one.text for one in known.documents.values()] == ["Because.", "So.", "No."]


def test_a_beir_train_split_keeps_its_reasoning_and_its_negatives(tmp_path: Path) -> None:
    documents = {name: Document(name, f"The text of {name}.", name.upper()) for name in ("a", "b", "c", "d")}
    metadata = {"reasoning": {"chain": "First a."}, "negatives": ["d"]}
    queries = {"q": Query("q", "which?", metadata), "r": Query("r", "what?")}
    qrels = {"train": {"q": {"a": 2, "c": 0}}, "test": {"r": {"b": 1}}}
    Collection("beir", documents, queries, qrels).save(tmp_path / "beir")
    (found,) = read("beir", tmp_path / "beir")
    assert found == SourceExample(
        "which?",
        (Passage("A", "The text of a."),),
        (Passage("D", "The text of d."), Passage("C", "The text of c.")),
        {"chain": "First a."},
    )
    with pytest.raises(DataError, match="has no split 'dev'; it has: test, train"):
        read("beir", tmp_path / "beir", "dev")


def test_a_shuffle_draws_from_its_buffer_by_its_seed(tmp_path: Path) -> None:
    many = [{"anchor": f"question {number}", "positive": f"answer {number}"} for number in range(50)]
    source = write_source(tmp_path / "data", many, "jsonl")  # after parquet, datasets sleeps for 5 seconds
    plain, once, again, other = (
        [one.query for one in read("pairs", source, shuffle=shuffle, seed=seed)]
        for shuffle, seed in ((0, 0), (20, 0), (20, 0), (20, 1))
    )
    assert plain == [row["anchor"] for row in many]
    assert once == again != plain
    assert other not in (plain, once)
    assert sorted(once) == sorted(plain)


def test_of_a_stream_no_more_is_read_than_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [{"anchor": f"question {number}", "positive": f"answer {number}"} for number in range(5000)]
    source = write_source(tmp_path / "data", many, "jsonl")
    seen = []
    real = sources.READERS["pairs"]
    spy = sources.Reader(real.columns, lambda *args: seen.append(1) or real.read(*args), real.schema, real.optional)
    monkeypatch.setattr(sources, "READERS", {"pairs": spy})
    examples = sources.read_examples("pairs", SourcePlace(source), str(tmp_path / "scratch"))
    assert next(examples).query == "question 0"
    assert len(seen) == 1


BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("triviaqa", {"answer": "Tashkent"}, "the field 'answer' is 'Tashkent', which cannot be used; expected value and"),
    (
        "triviaqa",
        {"entity_pages": [{"title": "A"}]},
        "the field 'entity_pages' is [{'title': 'A'}], which cannot be used",
    ),
    ("msmarco", {"query": 5}, "the field 'query' is 5; expected a string"),
    (
        "msmarco",
        {"passages": "text"},
        "the field 'passages' is 'text', which cannot be used; expected a list with is_selected",
    ),
    ("msmarco", {"passages": {"is_selected": [2], "passage_text": ["a"]}}, "is_selected 2; expected 0 or 1"),
    (
        "msmarco",
        {"passages": {"is_selected": [1], "passage_text": []}},
        "the field 'passages' is {'is_selected': [1], 'passage_text': []}",
    ),
    ("codesearchnet", {"func_code_string": ["a"]}, "the field 'code' is ['a']; expected a string"),
    ("cosqa", {"label": "yes"}, "the label is 'yes'; expected 1 (the document is relevant) or 0"),
    ("miracl", {"positive_passages": [{"docid": "1"}]}, "the field 'positive_passages' is [{'docid': '1'}]"),
    ("miracl", {"negative_passages": [{"title": "a", "text": 5}]}, "('a', 5); expected two strings"),
    ("s2orc", {"abstract": 7}, "the field 'document' is 7; expected a string"),
    ("pairs", {"negative_1": 3}, "expected two strings"),
]


@pytest.mark.parametrize(("reader", "change", "expected"), BROKEN)
def test_a_broken_row_is_named_with_the_remedy(
    tmp_path: Path, reader: str, change: dict[str, Any], expected: str
) -> None:
    broken = {**ROWS[reader][0], **change}
    source = write_source(tmp_path / "data", [broken], "jsonl", config="rc")
    with pytest.raises(DataError) as error:
        read(reader, source)
    text = str(error.value)
    assert expected in text
    assert text.startswith(f"{source}, config 'rc', split train, row 0: ")
    assert f"the reader {reader!r} expects" in text
    assert text.endswith("mend the source or choose another reader")


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize("reader", ROWS)
def test_a_missing_column_is_named(tmp_path: Path, reader: str, suffix: str) -> None:
    source = write_source(tmp_path / "data", [{"idx": 1, "rows": "a"}], suffix)
    with pytest.raises(DataError, match=r"split train: no column .*; it has 'idx', 'rows'; the reader .* expects"):
        read(reader, source)


STRANGE = (
    "v[2]",
    "v[!a]",
    "a*",
    "what?",
    "a::b",
    "json::c",
    "file:",
    "50%",
    "a#b",
    "{x}",
    "~",
    "-d",
    " ",
    "a&b;c",
    "é",
)
"""Names that patterns, chains of URLs, shells and the like mean something by."""


@pytest.mark.parametrize("name", STRANGE)
def test_a_path_means_itself_whatever_signs_are_in_it(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"query": "who sleeps all day?", "positive": "Cats do, and so do bats and sloths."}
    other = [{"query": "a neighbour", "positive": "This is a text of a neighbour."}]
    for neighbour in ("v2", "va", "vb", "ab", "what1", "a", "b", "x"):
        write_rows(tmp_path / neighbour / "pairs.jsonl", other)
        write_source(tmp_path / neighbour / "data", other, "jsonl")
    file = write_rows(tmp_path / name / "pairs.jsonl", [row])
    folder = write_source(tmp_path / name / "data", [row], "jsonl")
    (tmp_path / "scratch").mkdir()

    def queries(path: object) -> list[str]:
        examples = sources.read_examples("pairs", SourcePlace(str(path)), str(tmp_path / "scratch"))
        return [one.query for one in examples]

    for path in (file, folder, write_rows(tmp_path / name / f"{name}.jsonl", [row])):
        assert queries(path) == [row["query"]], path
    monkeypatch.chdir(tmp_path / name)
    for path in ("pairs.jsonl", "data"):
        assert queries(path) == [row["query"]], path


def test_a_source_that_is_not_there_is_explained(tmp_path: Path) -> None:
    source = write_source(tmp_path / "data", rows.COSQA)
    for path, split, expected in (
        (source, "test", "no split 'test'; it has 'train'"),
        (f"{source}@v1", "train", "is a folder and has no revision 'v1'"),
        (tmp_path / "nothing", "train", "no source at"),
        (
            write_rows(tmp_path / "rows.txt", rows.COSQA),
            "train",
            "expected a file that ends in .jsonl, .json, .parquet",
        ),
    ):
        with pytest.raises(DataError) as error:
            read("cosqa", path, split)
        assert expected in str(error.value)
    second = Path(write_source(tmp_path / "two", rows.COSQA, config="one")) / "README.md"
    text = second.read_text().replace("configs:", "configs:\n- config_name: two\n  data_files: one/*")
    second.write_text(text)
    with pytest.raises(DataError, match="several configs; ask for one as PATH:CONFIG: 'one', 'two'"):
        read("cosqa", second.parent)
    assert len(read("cosqa", f"{second.parent}:two")) == 2


def test_the_hub_is_read_as_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is a folder here, and the library is asked for ids."""
    write_source(tmp_path / "owner" / "name", rows.MSMARCO, config="v2.1")
    real, asked = datasets.load_dataset, []

    def load(path: str, **options: Any) -> Any:
        asked.append((path, dict(options)))
        options.pop("revision")
        return real(str(tmp_path / path), **options, cache_dir=str(tmp_path / "scratch"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("msmarco", "owner/name:v2.1@abc")[0] == EXPECTED["msmarco"]
    assert asked == [("owner/name", {"name": "v2.1", "revision": "abc", "streaming": True})]
