"""The check of training queries against what evaluation collections hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub_rows import write_rows, write_source

from search_r3.data.collection import Collection, Document, Query
from search_r3.data.mixing import contamination
from search_r3.data.mixing.contamination import Contamination, EvaluationText, ngrams, words
from search_r3.data.mixing.mix_settings import ContaminationSettings, QueryTable
from search_r3.errors import DataError

LONG = "which of the old cities on the silk road had the largest market for fine silk"
RELEVANT = "In the market of the old city they sold silk and paper and horses to all who came from afar."


def check(*queries: str, **settings: object) -> Contamination:
    made = Contamination(ContaminationSettings(**settings))
    for number, query in enumerate(queries):
        made.add_query(EvaluationText("set", f"q{number}", query))
    return made


def load_contamination(settings: ContaminationSettings) -> Contamination:
    seen: list[int] = []
    made = contamination.load_contamination(settings, lambda done, _: seen.append(done))
    assert sum(seen) == len(settings.collections) + len(settings.tables)
    return made


def test_a_query_of_few_words_is_a_hit_only_as_a_whole() -> None:
    made = check("Who wrote War & Peace?")
    found = made.find_query("WHO WROTE   war, peace")
    assert found == EvaluationText("set", "q0", "Who wrote War & Peace?")
    assert made.find_query("who wrote war") is None
    assert made.find_query("tell me who wrote war and peace") is None


def test_a_query_is_a_hit_when_n_grams_cover_half_of_the_evaluation_query() -> None:
    made, parts = check(LONG), LONG.split()
    assert len(parts) == 16
    for shared, hit in ((16, True), (9, True), (8, True), (7, False)):
        query = " ".join(["my", "own", *parts[:shared], "and", "more", "words"])
        assert (made.find_query(query) is not None) == hit, shared
    # Eight words of sixteen are half of it; of a query of seventeen they are less.
    assert check(f"{LONG} long").find_query(" ".join(parts[:8])) is None
    assert check(f"{LONG} long", coverage=0.4).find_query(" ".join(parts[:8]))
    # Two stretches of eight words, apart from each other, count together.
    longer = f"{LONG} of the year twelve hundred and then also in the summer"
    apart = " ".join([*longer.split()[:8], "but", *longer.split()[-8:]])
    assert check(longer).find_query(apart)
    assert check(longer, query_ngram=9).find_query(apart) is None


def test_words_are_compared_without_case_and_punctuation_and_by_letter_where_nothing_parts_them() -> None:
    assert words("The \N{FULLWIDTH LATIN CAPITAL LETTER A}-10's STRASSE, Straße") == [
        *("the", "a", "10", "s", "strasse", "strasse")
    ]
    assert words("東京はどこ? Tokyo") == ["東", "京", "は", "ど", "こ", "tokyo"]
    made = check("日本で最も高い山は何という山ですか")
    assert made.find_query("日本で最も高い山は何という山ですか。")
    assert made.find_query("日本で最も高い山は何という山でしょう")
    assert made.find_query("日本の首都はどこですか") is None


def test_texts_without_a_word_match_nothing() -> None:
    made = check("???", "who?")
    assert made.find_query("!") is None
    assert made.find_query("") is None
    assert check().find_query("who?") is None
    assert (len(made), len(check("Who", "who?"))) == (1, 1)


def test_n_grams_of_a_text() -> None:
    assert ngrams(["a", "b"], 3) == []
    assert len(ngrams(["a", "b", "c", "d"], 3)) == 2
    assert ngrams(["x", "a", "b", "c"], 3)[1] == ngrams(["a", "b", "c"], 3)[0]


def evaluation(folder: Path, splits: dict[str, str]) -> str:
    documents = {"d": Document("d", RELEVANT), "e": Document("e", "Nothing of interest is written here. " * 3)}
    queries = {split: Query(split, text) for split, text in splits.items()}
    qrels = {split: {split: {"d": 1, "e": 0}} for split in splits}
    Collection("evaluation", documents, queries, qrels).save(folder)
    return str(folder)


def test_queries_of_all_splits_but_train_are_held(tmp_path: Path) -> None:
    name = evaluation(tmp_path / "three", {"train": "who was it", "dev": "what was it", "test": "where was it"})
    made = load_contamination(ContaminationSettings(collections=(name,)))
    assert made.find_query("who was it") is None
    assert made.find_query("what was it") == EvaluationText(name, "dev", "what was it")
    assert made.find_query("where was it")
    asked = load_contamination(ContaminationSettings(collections=(name,), splits=("test", "validation")))
    assert (len(asked), asked.find_query("what was it")) == (1, None)
    alone = evaluation(tmp_path / "alone", {"train": "who was it"})
    assert load_contamination(ContaminationSettings(collections=(alone,))).find_query("who was it")
    with pytest.raises(DataError, match=r"no split validation; it has dev, test, train"):
        load_contamination(ContaminationSettings(collections=(name,), splits=("validation",)))


def test_a_query_is_held_without_its_instruction_too(tmp_path: Path) -> None:
    """The instruction of a config of its own, as in the hub's FollowIR sets, and that of a row, as in BEIR folders."""
    instruction = "Relevant are only pages by people who were there, not those of a later time or of another country."
    folder = Path(evaluation(tmp_path / "rows", {"test": "who was it"}))
    (folder / "queries.jsonl").write_text(
        json.dumps({"_id": "test", "text": "who was it", "instruction": instruction}) + "\n"
    )
    hub = tmp_path / "hub"
    asked = f"{LONG} and the best"
    for config, row in (
        ("corpus", {"_id": "d", "text": RELEVANT}),
        ("queries", {"_id": "q", "text": asked}),
        ("instruction", {"query-id": "q", "instruction": f"{instruction} {RELEVANT}"}),
        ("default", {"query-id": "q", "corpus-id": "d", "score": 1}),
    ):
        write_rows(hub / config / "test.jsonl", [row])
    made = load_contamination(ContaminationSettings(collections=(str(folder), str(hub))))
    assert len(made) == 2, "a query with and without its instruction is one"
    assert made.find_query("Who was it?") == EvaluationText(str(folder), "test", "who was it")
    assert made.find_query(f"who was it {instruction}") == EvaluationText(
        str(folder), "test", f"who was it {instruction}"
    )
    assert made.find_query(asked) == EvaluationText(str(hub), "q", asked), (
        "n-grams cover little of it with its instruction"
    )
    assert made.find_query(f"so {' '.join(asked.split()[:12])}") == EvaluationText(str(hub), "q", asked)


def test_a_positive_is_a_hit_by_one_n_gram_of_a_relevant_document_or_query_only_where_it_is_asked(
    tmp_path: Path,
) -> None:
    name = evaluation(tmp_path / "set", {"test": LONG})
    made = load_contamination(ContaminationSettings(collections=(name,), positives=True))
    parts = RELEVANT.split()
    found = made.find_document("They say: " + " ".join(parts[3:16]))
    assert found == EvaluationText(name, "d", RELEVANT)
    assert made.find_document(" ".join(parts[3:15])) is None, "twelve words are one too few"
    assert made.find_document("Nothing of interest is written here. " * 3) is None, "that document is not relevant"
    assert made.find_document(f"A page with the question {LONG}? And more.") == EvaluationText(name, "test", LONG)
    off = load_contamination(ContaminationSettings(collections=(name,)))
    assert off.find_document(RELEVANT) is None


def test_queries_in_a_table_of_their_own_are_held(tmp_path: Path) -> None:
    source = write_source(tmp_path / "set", [{"query": "who was it"}, {"query": "what"}], config="query", split="full")
    table = QueryTable(path=f"{source}:query", splits=("full",))
    made = load_contamination(ContaminationSettings(tables=(table,)))
    assert made.find_query("What?") == EvaluationText(f"{source}:query", "full 1", "what")
    broken = write_source(tmp_path / "broken", [{"query": 5}], split="test")
    with pytest.raises(DataError, match=r"split test, row 0: the field 'query' is 5; expected a string"):
        load_contamination(ContaminationSettings(tables=(QueryTable(path=broken),)))
