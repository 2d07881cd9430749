"""Training data from several sources in one folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hub_rows as rows
import huggingface_hub
import pytest
import yaml
from conftest import call
from hub_rows import write_source

from search_r3.data.collection import Collection, Document, Query
from search_r3.data.mixing import mix as mixing
from search_r3.data.mixing.mix import mix
from search_r3.data.mixing.mix_settings import MixSettings, load_mix
from search_r3.data.triples import training_examples
from search_r3.errors import ConfigError, DataError

SHIPPED = sorted((Path(__file__).parents[3] / "recipes" / "data").glob("*.yaml"))


def pair(query: str, positive: str, *negatives: str) -> dict[str, Any]:
    """A row whose documents are long enough."""
    texts = [f"{text}, a document of some length" for text in (positive, *negatives)]
    return {"anchor": query, "positive": texts[0], "negative": texts[1:]}


def settings(*sources: dict[str, Any], **others: Any) -> MixSettings:
    return MixSettings.model_validate({"dev": 0, "sources": [{"reader": "pairs", **one} for one in sources], **others})


def made(tmp_path: Path, *found: rows.Rows, **others: Any) -> tuple[Collection, dict[str, mixing.SourceReport]]:
    """The mix of one source `a`, `b`, ... for each list of rows."""
    named = [
        {"name": name, "path": write_source(tmp_path / name, one, "jsonl")}
        for name, one in zip("abcd", found, strict=False)
    ]
    reports = mix(settings(*named, **others), tmp_path / "out")
    return Collection.load(tmp_path / "out"), reports


def texts(collection: Collection, split: str) -> dict[str, tuple[list[str], list[str]]]:
    """Query -> the first words of its positives and negatives."""
    found = {}
    for query_id, judged in collection.qrels[split].items():
        query = collection.queries[query_id]
        found[query.text] = tuple(
            [collection.documents[doc_id].full_text.partition(",")[0] for doc_id in doc_ids]
            for doc_ids in (judged, query.metadata.get("negatives", ()))
        )
    return found


@pytest.fixture
def every_source(tmp_path: Path) -> list[dict[str, Any]]:
    """One source of each reader."""
    found = [
        ("triviaqa", rows.TRIVIAQA),
        ("msmarco", rows.MSMARCO),
        ("codesearchnet", rows.CODESEARCHNET),
        ("cosqa", rows.COSQA),
        ("miracl", rows.MIRACL),
        ("s2orc", rows.S2ORC_ABSTRACTS),
        ("pairs", rows.PAIRS),
    ]
    made = [
        {"name": reader, "reader": reader, "path": write_source(tmp_path / "sources" / reader, one)}
        for reader, one in found
    ]
    documents = {name: Document(name, f"This is the text of {name}.") for name in ("x", "y", "z")}
    query = Query("q", "which of them is it?", {"reasoning": {"chain": "It is x."}, "negatives": ["z"]})
    Collection("set", documents, {"q": query}, {"train": {"q": {"x": 1, "y": 0}}}).save(tmp_path / "sources" / "beir")
    return [*made, {"name": "beir", "reader": "beir", "path": str(tmp_path / "sources" / "beir")}]


def test_every_reader_gives_a_split_that_stage_1_reads(tmp_path: Path, every_source: list[dict[str, Any]]) -> None:
    reports = mix(settings(*every_source), tmp_path / "out")
    collection = Collection.load(tmp_path / "out")
    assert list(reports) == [source["name"] for source in every_source]
    assert set(collection.qrels) == set(reports)
    for name in reports:
        examples = training_examples(collection, name)
        assert len(examples) == reports[name].queries == 1
        assert examples[0].positive_ids
        assert examples[0].query.metadata["source"] == name
    (example,) = training_examples(collection, "msmarco")
    assert [collection.documents[doc_id].text for doc_id in example.negative_ids] == [
        "Dogs sleep about half of the day.",
        "Cats eat meat twice.",
    ]
    (example,) = training_examples(collection, "beir")
    assert example.reasoning == {"chain": "It is x."}
    assert [collection.documents[doc_id].text[-2] for doc_id in example.negative_ids] == ["z", "y"]
    assert reports["triviaqa"].dropped == reports["msmarco"].dropped == {"no positive document": 1}
    assert reports["cosqa"].dropped == {"no positive document": 1}


def test_the_same_query_is_one_query_and_takes_the_documents_of_all_its_rows(tmp_path: Path) -> None:
    collection, reports = made(
        tmp_path,
        [pair("Who is  it?", "one", "two"), pair("who is it", "two", "three"), pair("c++ sort", "plus")],
        [pair("WHO IS IT", "four", "one"), pair("c# sort", "sharp")],
    )
    assert texts(collection, "a") == {"Who is it?": (["one", "two", "four"], ["three"]), "c++ sort": (["plus"], [])}
    assert texts(collection, "b") == {"c# sort": (["sharp"], [])}
    assert (reports["a"].merged, reports["b"].merged, reports["b"].queries) == (1, 1, 1)


def test_a_query_with_another_instruction_is_another_query_and_loads_as_it_was_saved(tmp_path: Path) -> None:
    source = write_source(tmp_path / "data", [pair("cats asleep", "one")], "jsonl")
    other = write_source(tmp_path / "other", [pair("cats asleep", "two")], "jsonl")
    mix(
        settings({"name": "a", "path": source, "instruction": "Find a page."}, {"name": "b", "path": other}),
        tmp_path / "out",
    )
    collection = Collection.load(tmp_path / "out")
    assert texts(collection, "a") == {"cats asleep Find a page.": (["one"], [])}
    assert texts(collection, "b") == {"cats asleep": (["two"], [])}
    assert [query.bare for query in collection.queries.values()] == ["cats asleep"] * 2, "training may ask without"
    collection.save(tmp_path / "again")
    assert Collection.load(tmp_path / "again").queries == collection.queries

    mix(settings({"name": "c", "reader": "beir", "path": str(tmp_path / "again"), "split": "a", "instruction": "Now."}),
        tmp_path / "both")  # fmt: skip
    [query] = Collection.load(tmp_path / "both").queries.values()
    assert (query.bare, query.instruction) == ("cats asleep", "Find a page. Now."), "a mix of a mix keeps them apart"


def test_the_same_text_is_one_document_in_all_sources(tmp_path: Path) -> None:
    collection, reports = made(
        tmp_path, [pair("q one", "same", "other")], [pair("q two", "same"), pair("q three", " same", "same", "same")]
    )
    assert len(collection.documents) == 2
    assert texts(collection, "b") == {"q two": (["same"], []), "q three": (["same"], [])}
    assert reports["b"].documents == {"kept before": 2}


def test_a_positive_without_room_is_never_a_negative(tmp_path: Path) -> None:
    found = [pair("who", "one"), pair("who", "two"), pair("who", "three", "one", "two"), pair("who", "one", "three")]
    source = {"name": "a", "path": write_source(tmp_path / "a", found, "jsonl"), "max_positives": 1, "max_negatives": 1}
    reports = mix(settings(source), tmp_path / "out")
    assert texts(Collection.load(tmp_path / "out"), "a") == {"who": (["one"], [])}
    assert reports["a"].documents["one too many for its query"] == 2


def test_rows_that_cannot_be_used_are_dropped_and_counted_by_reason(tmp_path: Path) -> None:
    found = [
        pair("?!", "one"),
        pair("ab", "two"),
        pair("x" * 31, "three"),
        {"anchor": None, "positive": "a document without a query", "negative": []},
        {"anchor": "no answer", "positive": " ", "negative": []},
        {"anchor": "short answer", "positive": "short", "negative": []},
        {"anchor": "long answer", "positive": "y" * 201, "negative": []},
        pair("kept", "kept", "z" * 300, "also kept"),
    ]
    collection, reports = made(tmp_path, found, max_query_chars=30, max_document_chars=200)
    assert reports["a"].dropped == {
        "empty query": 2,
        "query too short": 1,
        "query too long": 1,
        "no positive document": 3,
    }
    assert reports["a"].documents == {"too short": 1, "too long": 2}
    assert texts(collection, "a") == {"kept": (["kept"], ["also kept"])}
    assert (reports["a"].read, reports["a"].queries) == (8, 1)


def test_half_letters_are_refused_in_texts_and_taken_out_of_traces(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    document = Document("x", "a document of some length")
    query = Query("q", "a plain question", {"reasoning": "\ud800 why"})
    Collection("set", {"x": document}, {"q": Query("q", "plain")}, {"train": {"q": {"x": 1}}}).save(folder)
    row = {"_id": "q", "text": query.text, "metadata": dict(query.metadata)}
    (folder / "queries.jsonl").write_text(json.dumps(row) + "\n")
    source = settings({"name": "a", "reader": "beir", "path": str(folder)})
    mix(source, tmp_path / "out")
    [mixed] = Collection.load(tmp_path / "out").queries.values()
    assert mixed.metadata["reasoning"] == {"trace": " why"}
    (folder / "corpus.jsonl").write_text(json.dumps({"_id": "x", "text": "half a \udfff letter"}) + "\n")
    with pytest.raises(DataError, match=r"corpus.jsonl:1: the field 'text' holds half a surrogate pair"):
        mix(source, tmp_path / "other")


def test_reading_ends_with_the_queries_that_were_asked_for(tmp_path: Path) -> None:
    many = [pair(f"question {number // 2}", f"answer {number}") for number in range(500)]
    seen: list[int] = []
    source = {"name": "a", "path": write_source(tmp_path / "a", many, "jsonl"), "limit": 150}
    expected = []

    def watch(name: str, total: int | None) -> Any:
        expected.append((name, total))
        return lambda done, _: seen.append(done)

    reports = mix(settings(source), tmp_path / "out", watch)
    assert (reports["a"].queries, reports["a"].read) == (150, 299)
    assert (expected, sum(seen)) == ([("evaluation collections", 0), ("a", 150)], 100)


def test_a_share_of_the_queries_is_held_out(tmp_path: Path) -> None:
    first = [pair(f"question {number}", f"answer {number}") for number in range(400)]
    second = [pair(f"other {number}", f"other answer {number}") for number in range(200)]
    collection, reports = made(tmp_path, first, second, dev=0.1)
    assert [reports["a"].queries, reports["b"].queries] == [400, 200]
    assert 20 < reports["a"].dev < 60 and 8 < reports["b"].dev < 32, "about a tenth"
    dev = collection.qrels["dev"]
    assert len(dev) == reports["a"].dev + reports["b"].dev
    assert len(collection.qrels["a"]) == 400 - reports["a"].dev
    assert not set(dev) & {*collection.qrels["a"], *collection.qrels["b"]}


def test_a_held_out_query_is_trained_on_in_no_mix(tmp_path: Path) -> None:
    many = [pair(f"Question {number}?", f"answer {number}") for number in range(300)]
    path = write_source(tmp_path / "data", many, "jsonl")
    again = write_source(tmp_path / "again", [{**row, "anchor": row["anchor"].lower()} for row in many[::-1]], "jsonl")
    mixes = {
        "whole": settings({"name": "a", "path": path}, dev=0.1),
        "seed": settings({"name": "a", "path": path, "limit": 150, "shuffle_buffer": 80}, dev=0.1, seed=1),
        "share": settings({"name": "a", "path": path}, dev=0.05),
        "few": settings({"name": "a", "path": path}, dev=0.1, max_dev=4),
        "other": settings({"name": "b", "path": again, "instruction": "Find it."}, dev=0.1),
    }
    held, trained, reports = {}, {}, {}
    for name, plan in mixes.items():
        (reports[name],) = mix(plan, tmp_path / name).values()
        collection = Collection.load(tmp_path / name)
        found = {
            split: {collection.queries[one].text.lower().removesuffix(" find it.") for one in judged}
            for split, judged in collection.qrels.items()
        }
        held[name] = found.pop("dev")
        (trained[name],) = found.values()
    for name in ("seed", "few", "other"):
        assert held[name] <= held["whole"] and not trained[name] & held["whole"], name
    assert held["other"] == held["whole"], "neither source nor instruction nor case decides"
    assert held["share"] < held["whole"] and not held["share"] & trained["whole"]
    assert len(held["seed"]) > 4 == len(held["few"])
    assert reports["few"].dropped == {"one too many for dev": len(held["whole"]) - 4}


def test_a_source_of_which_nothing_is_left_to_train_on_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a: all of its 1 queries are held out by dev=0\.99.* choose a smaller dev"):
        made(tmp_path, [pair("q one", "one")], dev=0.99)


def test_the_shipped_mixes_hold_out_the_same_queries() -> None:
    assert len(SHIPPED) > 1 and len({load_mix(path).dev for path in SHIPPED}) == 1


def test_a_planted_query_is_dropped_with_an_example_and_a_near_miss_is_not(tmp_path: Path) -> None:
    asked = "which of the old cities on the silk road had the largest market"
    near = "which of the old cities of the silk road had the smallest market"
    Collection(
        "eval", {"d": Document("d", "a b c d e f g h i j k l m n o p q r s t")}, {"q": Query("q", asked)},
        {"test": {"q": {"d": 1}}},
    ).save(tmp_path / "eval")  # fmt: skip
    found = [
        pair(f"Please: {asked}?", "one"),
        pair(near, "two"),
        pair("a question of its own", "X a b c d e f g h i j k l m Y"),
    ]
    plan = {"collections": [str(tmp_path / "eval")]}
    collection, reports = made(tmp_path, found, contamination=plan)
    assert list(texts(collection, "a")) == [near, "a question of its own"]
    assert reports["a"].dropped == {"contaminated": 1}
    assert reports["a"].contaminated == [
        {"query": f"Please: {asked}?", "collection": str(tmp_path / "eval"), "text_id": "q", "text": asked}
    ]
    source = {"name": "a", "path": str(tmp_path / "a"), "instruction": "Find it."}
    reports = mix(settings(source, contamination={**plan, "positives": True}), tmp_path / "strict")
    assert list(texts(Collection.load(tmp_path / "strict"), "a")) == [f"{near} Find it."]
    assert reports["a"].dropped == {"contaminated": 2}
    assert reports["a"].contaminated[1]["text_id"] == "d"
    report = json.loads((tmp_path / "strict" / "mix.json").read_text())
    assert (report["dropped"], report["evaluation_queries"]) == ({"contaminated": 2}, 1)


def test_the_report_says_what_was_read_and_of_what(tmp_path: Path) -> None:
    collection, _ = made(tmp_path, [pair("q one", "same"), pair("", "none")], dev=0.5)
    report = json.loads((tmp_path / "out" / "mix.json").read_text())
    assert report["splits"] == {"a": 1}
    assert (report["queries"], report["documents"]) == (1, 1)
    assert report["content_hash"] == collection.content_hash()
    assert report["settings"]["dev"] == 0.5
    assert report["settings"]["sources"][0]["path"] == str(tmp_path / "a")
    source = report["sources"]["a"]
    assert source == {
        "path": str(tmp_path / "a"), "revision": None, "read": 2, "queries": 1, "dev": 0, "merged": 0,
        "dropped": {"empty query": 1}, "documents": {}, "contaminated": [],
    }  # fmt: skip
    other = settings({"name": "a", "path": str(tmp_path / "a")}, seed=3)
    mix(other, tmp_path / "other")
    assert json.loads((tmp_path / "other" / "mix.json").read_text())["settings_hash"] != report["settings_hash"]


def test_the_commit_on_the_hub_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = write_source(tmp_path / "a", [pair("q one", "one")], "jsonl")
    real = mixing.read_examples
    asked = []

    class Api:
        def dataset_info(self, name: str, revision: str | None) -> Any:
            asked.append((name, revision))
            return type("Info", (), {"sha": "abc123"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(
        mixing, "read_examples", lambda reader, place, *a, **k: real(reader, mixing.SourcePlace(local), *a, **k)
    )
    reports = mix(settings({"name": "a", "path": "owner/name:pair@v2"}), tmp_path / "out")
    assert (asked, reports["a"].revision) == ([("owner/name", "v2")], "abc123")


def test_nothing_is_overwritten_and_nothing_is_left_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [pair(f"question {number}", f"answer {number}") for number in range(5)]
    source = {"name": "a", "path": write_source(tmp_path / "sources" / "a", found, "jsonl")}
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="out exists; nothing is overwritten"):
        mix(settings(source), tmp_path / "out")
    (tmp_path / "out").rmdir()
    broken = {"name": "b", "path": write_source(tmp_path / "sources" / "b", [{"anchor": 1, "positive": "a"}], "jsonl")}
    with pytest.raises(DataError, match="row 0: the field 'query' is 1"):
        mix(settings(source, broken), tmp_path / "out")

    def stop(path: Path, value: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mixing, "write_json", stop)
        with pytest.raises(KeyboardInterrupt):
            mix(settings(source), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["sources"]
    mix(settings(source), tmp_path / "out")
    assert (tmp_path / "out" / "mix.json").is_file()


def test_a_built_in_collection_is_a_source(tmp_path: Path) -> None:
    source = {"name": "a", "reader": "beir", "path": "atlas", "split": "facts", "limit": 5, "shuffle_buffer": 1}
    reports = mix(settings(source, min_document_chars=5), tmp_path / "out")
    assert (reports["a"].queries, reports["a"].revision) == (5, None)


def test_a_source_of_which_nothing_is_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no query of its 2 rows is left: \{'empty query': 2, 'asked in an"):
        made(tmp_path, [pair("", "one"), pair("?", "two")])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_mix_loads(path: Path) -> None:
    found = load_mix(path)
    for source in found.sources:
        assert mixing.SourcePlace(source.path).parts()[0]
        assert source.instruction
    for table in found.contamination.tables:
        assert mixing.SourcePlace(table.path).parts()[1]


def test_the_paper_s_sources_are_in_its_mix() -> None:
    found = load_mix(next(path for path in SHIPPED if path.stem == "paper"))
    assert {source.name.partition("-")[0] for source in found.sources} == {
        *("triviaqa", "msmarco", "codesearchnet", "cosqa", "miracl", "s2orc")
    }
    assert "mteb/scifact" in found.contamination.collections


SOURCE = {"name": "a", "reader": "pairs", "path": "x"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"sources": [{**SOURCE, "limt": 5}]}, "unknown setting 'sources.0.limt'; did you mean 'limit'?"),
        ({"sources": [SOURCE], "contamination": {"colections": []}}, "did you mean 'collections'?"),
        (
            {"sources": [SOURCE], "contamination": {"tables": [{"path": "x", "spits": ["a"]}]}},
            "'contamination.tables.0.spits'; did you mean 'splits'?",
        ),
        ({"sorces": []}, "unknown setting 'sorces'; did you mean 'sources'?"),
        ({"sources": [{**SOURCE, "reader": "squad"}]}, "sources.0.reader = 'squad': Input should be 'triviaqa', "),
        ({"sources": [{**SOURCE, "name": "a/b"}]}, "sources.0.name = 'a/b'"),
        ({"sources": [SOURCE, SOURCE]}, "two sources have the name 'a'"),
        ({"sources": [{**SOURCE, "name": "dev"}]}, "'dev', the split of held-out queries"),
        ({"sources": []}, "at least 1 item"),
        ({"sources": [SOURCE], "min_query_chars": 9, "max_query_chars": 8}, "min_query_chars=9 is more than max_"),
    ],
)
def test_a_bad_mix_is_one_clear_error(tmp_path: Path, content: dict[str, Any], expected: str) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as error:
        load_mix(path)
    assert expected in str(error.value)
    assert str(error.value).startswith(str(path))


def test_every_setting_of_a_mix_has_a_description() -> None:
    fields = [MixSettings, *(MixSettings.model_fields[name].annotation for name in ("contamination",))]
    for kind in [*fields, mixing.SourceSettings]:
        for name, field in kind.model_fields.items():
            assert field.description or name in ("sources", "contamination"), f"{kind.__name__}.{name}"


def test_the_command_writes_the_folder_and_says_what_was_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_source(tmp_path / "a", [pair("q one", "one"), pair("", "none"), pair("q three", "two")], "jsonl")
    plan = {"dev": 0.5, "sources": [{**SOURCE, "path": source}]}
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(plan))
    assert call(monkeypatch, "data", "mix", tmp_path / "mix.yaml", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "a: 2 queries (1 in dev) of 3 rows, 1 dropped: empty query" in shown
    assert set(Collection.load(tmp_path / "out").qrels) == {"a", "dev"}
    assert call(monkeypatch, "data", "mix", tmp_path / "mix.yaml", tmp_path / "out") == 2
    assert "out exists; nothing is overwritten" in capsys.readouterr().err
    (tmp_path / "mix.yaml").write_text("sources: 5")
    assert call(monkeypatch, "data", "mix", tmp_path / "mix.yaml", tmp_path / "new") == 2
    assert "sources = 5" in capsys.readouterr().err
