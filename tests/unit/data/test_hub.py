"""Data sets in the hub's format, written to small local directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from search_r3.data.collection import Collection, Document, Query
from search_r3.data.generators.atlas import build_atlas
from search_r3.data.hub import load_hub
from search_r3.data.load import load_collection
from search_r3.errors import DataError

Rows = list[dict[str, Any]]

CORPUS = [
    {"_id": "d1", "title": "Uzbek", "text": "A Turkic language."},
    {"_id": "d2", "title": "", "text": "Tashkent is a city."},
    {"_id": "d3", "title": "Samarkand", "text": "A city."},
]
QUERIES = [{"_id": "q1", "text": "which language?"}, {"_id": "q2", "text": "which city?"}]
QRELS = {
    "test": [{"query-id": "q1", "corpus-id": "d1", "score": 1.0}],
    "validation": [
        {"query-id": "q2", "corpus-id": "d2", "score": 2.0},
        {"query-id": "q2", "corpus-id": "d1", "score": 0.0},
    ],
}
MTEB = {"corpus": {"corpus": CORPUS}, "queries": {"queries": QUERIES}, "default": QRELS}
EXPECTED = Collection(
    "tiny",
    {row["_id"]: Document(row["_id"], row["text"], row["title"]) for row in CORPUS},
    {row["_id"]: Query(row["_id"], row["text"]) for row in QUERIES},
    {"test": {"q1": {"d1": 1}}, "validation": {"q2": {"d2": 2, "d1": 0}}},
)


def write_rows(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".tsv":
        lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_hub(folder: Path, configs: dict[str, dict[str, Rows]], suffix: str = "jsonl", readme: bool = True) -> str:
    """A directory as a clone of a data set on the hub: a file for each split of each config, named in README.md."""
    described = []
    for config, splits in configs.items():
        for split, rows in splits.items():
            write_rows(folder / config / f"{split}.{suffix}", rows)
        files = [{"split": split, "path": f"{config}/{split}.{suffix}"} for split in splits]
        described.append({"config_name": config, "data_files": files})
    if readme:
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': described})}---\n# A data set\n")
    return str(folder)


def changed(**parts: dict[str, Rows] | None) -> dict[str, dict[str, Rows]]:
    """The small MTEB data set with other configs; None leaves one out."""
    return {name: splits for name, splits in (MTEB | parts).items() if splits is not None}


def message(source: str, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        load_hub(source, **{"strict": True} | options)
    return str(error.value)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("judgements", ["default", "qrels"])
def test_the_mteb_layout_is_read(tmp_path: Path, suffix: str, judgements: str) -> None:
    configs = {"corpus": MTEB["corpus"], "queries": MTEB["queries"], judgements: QRELS}
    assert load_hub(write_hub(tmp_path / "tiny", configs, suffix)) == EXPECTED


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_directory_with_a_sub_folder_for_each_config_needs_no_readme(tmp_path: Path, suffix: str) -> None:
    assert load_collection(write_hub(tmp_path / "tiny", MTEB, suffix, readme=False)) == EXPECTED


@pytest.mark.parametrize("suffix", ["tsv", "parquet"])
def test_the_judgements_of_the_beir_layout_stand_beside_it(tmp_path: Path, suffix: str) -> None:
    corpus = [{"_id": "31", "text": "A Turkic language."}, {"_id": "4", "text": "A city."}]
    queries = [{"_id": "7", "text": "which language?"}]
    source = write_hub(tmp_path / "tiny", {"corpus": {"corpus": corpus}, "queries": {"queries": queries}}, "parquet")
    assert "no judgements, neither in a config nor beside it" in message(source)
    for split in ("train", "test"):
        score = {"train": 1, "test": 2}[split]
        rows = [{"query-id": 7, "corpus-id": 31, "score": score}]
        write_rows(tmp_path / "tiny-qrels" / f"{split}.{suffix}", rows)
    collection = load_hub(source)
    assert collection.qrels == {"train": {"7": {"31": 1}}, "test": {"7": {"31": 2}}}
    assert collection.documents["31"] == Document("31", "A Turkic language.", "")


def test_ids_may_be_numbers_and_stand_in_a_column_id_and_titles_may_be_missing(tmp_path: Path) -> None:
    configs = {
        "corpus": {"corpus": [{"id": 1, "text": "A", "title": None}, {"id": 2, "text": "B", "title": "b"}]},
        "queries": {"queries": [{"id": 5, "text": "which?"}]},
        "default": {"test": [{"query-id": 5, "corpus-id": 2, "score": "1"}]},
        "top_ranked": {"top_ranked": [{"query-id": 5, "corpus-ids": [2, 1]}]},
    }
    collection = load_hub(write_hub(tmp_path / "tiny", configs))
    assert collection.documents == {"1": Document("1", "A"), "2": Document("2", "B", "b")}
    assert (collection.qrels, collection.pools) == ({"test": {"5": {"2": 1}}}, {"5": {"1", "2"}})


def test_pools_instructions_and_changed_documents_are_read(tmp_path: Path) -> None:
    configs = {
        "corpus": {"corpus": CORPUS},
        "queries": {"queries": [{"_id": "7-og", "text": "city?"}, {"_id": "7-changed", "text": "city?"}]},
        "default": {"test": [{"query-id": f"7-{kind}", "corpus-id": "d3", "score": 1} for kind in ("og", "changed")]},
        "top_ranked": {"top_ranked": [{"query-id": "7-og", "corpus-ids": ["d2", "d3"]}]},
        "instruction": {
            "instruction": [
                {"query-id": "7-og", "instruction": "Any city."},
                {"query-id": "7-changed", "instruction": "Not the capital."},
            ]
        },
        "qrel_diff": {"qrel_diff": [{"query-id": "7", "corpus-ids": ["d2"]}]},
    }
    collection = load_hub(write_hub(tmp_path / "follow", configs))
    assert {query.query_id: query.text for query in collection.queries.values()} == {
        "7-og": "city? Any city.",
        "7-changed": "city? Not the capital.",
    }
    assert collection.pools == {"7-og": {"d2", "d3"}}
    assert collection.changed == {"7": {"d2"}}
    collection.save(tmp_path / "folder")
    assert Collection.load(tmp_path / "folder").content_hash() == collection.content_hash()
    configs["instruction"]["instruction"].pop()
    text = message(write_hub(tmp_path / "less", configs))
    assert "config 'instruction': no instruction for the judged query '7-changed'" in text


def test_an_instruction_may_be_a_column_of_the_queries(tmp_path: Path) -> None:
    queries = [QUERIES[0] | {"instruction": "Answer in Uzbek."}, QUERIES[1] | {"instruction": None}]
    collection = load_hub(write_hub(tmp_path / "tiny", changed(queries={"queries": queries})))
    assert [query.text for query in collection.queries.values()] == ["which language? Answer in Uzbek.", "which city?"]


@pytest.mark.parametrize("form", ["{subset}-{part}", "{part}-{subset}"])
def test_one_of_several_subsets_is_read(tmp_path: Path, form: str) -> None:
    configs = {}
    for subset in ("en", "uz"):
        corpus = [row | {"text": f"{row['text']} ({subset})"} for row in CORPUS]
        parts = {"corpus": {"test": corpus}, "queries": {"test": QUERIES}, "qrels": {"test": QRELS["test"]}}
        configs |= {form.format(subset=subset, part=part): splits for part, splits in parts.items()}
    source = write_hub(tmp_path / "many", configs)
    assert "it has several subsets; ask for one of 'en', 'uz'" in message(source)
    assert "no subset 'de'; ask for one of 'en', 'uz'" in message(source, subset="de")
    collection = load_collection(f"{source}:uz")
    assert (collection.name, collection.documents["d3"].text) == ("many-uz", "A city. (uz)")
    assert load_hub(source, subset="uz/test") == Collection(
        "many-uz-test", collection.documents, collection.queries, collection.qrels
    )


def test_a_subset_without_judgements_does_not_take_those_of_another(tmp_path: Path) -> None:
    source = write_hub(tmp_path / "many", {"en-corpus": MTEB["corpus"], "en-queries": MTEB["queries"]})
    write_rows(tmp_path / "many-qrels" / "test.jsonl", QRELS["test"])
    assert "subset 'en' has no judgements; expected 'en-qrels'" in message(source)


def test_mteb_names_that_compete_are_chosen_as_mteb_does(tmp_path: Path) -> None:
    wrong = {"test": [{"query-id": "q1", "corpus-id": "d3", "score": 1}]}
    asked = {"test": [{"_id": "q1", "text": "from the config query"}]}
    right = {"test": QRELS["test"]}
    source = write_hub(tmp_path / "plain", changed(default=right, qrels=wrong, query=asked))
    assert load_hub(source).qrels == {"test": {"q1": {"d1": 1}}}
    assert load_hub(source).queries["q1"].text == "from the config query"
    subsets = {f"en-{name}": splits for name, splits in changed(default=wrong, qrels=right).items()}
    assert load_hub(write_hub(tmp_path / "en", subsets)).qrels == {"test": {"q1": {"d1": 1}}}


def test_documents_of_one_split_only_make_each_split_a_collection(tmp_path: Path) -> None:
    judged = {split: [{"query-id": "q1", "corpus-id": "d1", "score": 1}] for split in ("dev", "test")}
    same = changed(corpus={"dev": CORPUS, "test": CORPUS}, default=judged)
    assert load_hub(write_hub(tmp_path / "same", same)).split("dev") == {"q1": {"d1": 1}}
    other = changed(corpus={"dev": CORPUS, "test": CORPUS[:2]}, default=judged)
    source = write_hub(tmp_path / "other", other)
    text = message(source)
    assert "config 'corpus': split 'test' contradicts an earlier one" in text
    assert text.endswith("as the subset: 'dev', 'test'")
    collection = load_hub(source, subset="test")
    assert (list(collection.documents), list(collection.qrels)) == (["d1", "d2"], ["test"])
    assert collection.name == "other-test"
    assert "no subset or split 'train'; the splits are 'dev', 'test'" in message(source, subset="train")
    apart = {"dev": QUERIES, "test": [{"_id": "q1", "text": "another"}]}
    source = write_hub(tmp_path / "apart", changed(queries=apart, default=judged))
    assert "config 'queries': split 'test' contradicts an earlier one" in message(source)
    lacking = changed(corpus={"dev": CORPUS, "train": CORPUS}, default={"test": QRELS["test"]})
    text = message(write_hub(tmp_path / "lacking", lacking))
    assert "config 'corpus': no split 'test', which has judgements; it has 'dev', 'train'" in text


def bright() -> dict[str, dict[str, Rows]]:
    example = {"query": "why?", "reasoning": "...", "gold_ids_long": ["L1"]}
    return {
        "documents": {
            domain: [{"id": f"{domain}/{n}", "content": f"{domain} {n}"} for n in range(3)] for domain in "ab"
        },
        "long_documents": {"a": [{"id": "L1", "content": "long"}]},
        "examples": {
            domain: [
                example | {"id": "0", "gold_ids": [f"{domain}/0"], "excluded_ids": [f"{domain}/1", "elsewhere"]},
                example | {"id": "1", "gold_ids": [f"{domain}/1", f"{domain}/2"], "excluded_ids": ["N/A"]},
            ]
            for domain in "ab"
        },
    }


def test_a_domain_of_bright_is_read(tmp_path: Path) -> None:
    source = write_hub(tmp_path / "BRIGHT", bright(), "parquet")
    collection = load_hub(source, subset="b")
    assert collection == Collection(
        "BRIGHT-b",
        {f"b/{n}": Document(f"b/{n}", f"b {n}") for n in range(3)},
        {"0": Query("0", "why?"), "1": Query("1", "why?")},
        {"test": {"0": {"b/0": 1}, "1": {"b/1": 1, "b/2": 1}}},
        excluded={"0": frozenset({"b/1"})},
    )
    long = load_hub(source, subset="a/long")
    assert (long.texts(), long.qrels) == ({"L1": "long"}, {"test": {"0": {"L1": 1}, "1": {"L1": 1}}})
    assert "it has several domains; ask for one as the subset: 'a', 'b'" in message(source)
    for subset in ("c", "b/long", "a/short"):
        assert f"no domain {subset!r}; ask for one" in message(source, subset=subset)


def test_mteb_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaders = pytest.importorskip("mteb.abstasks.retrieval_dataset_loaders")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    instructions = [{"query-id": row["_id"], "instruction": f"Think of {row['_id']}."} for row in QUERIES]
    configs = changed(
        top_ranked={"top_ranked": [{"query-id": row["_id"], "corpus-ids": ["d2", "d1"]} for row in QUERIES]},
        instruction={"instruction": instructions},
    )
    configs |= {f"uz-{'qrels' if name == 'default' else name}": splits for name, splits in configs.items()}
    source = write_hub(tmp_path / "tiny", configs, "parquet")
    for subset, split in ((None, "validation"), ("uz", "test")):
        collection = load_hub(source, subset=subset)
        theirs = loaders.RetrievalDatasetLoader(source, None, split=split, config=subset).load()
        texts = {row["id"]: f"{row['title']} {row['text']}".strip() for row in theirs["corpus"]}
        assert collection.texts() == texts
        assert collection.split(split) == theirs["relevant_docs"]
        for row in theirs["queries"]:
            assert collection.queries[row["id"]].text == f"{row['text']} {row['instruction']}"
        assert collection.pools == {query: frozenset(ids) for query, ids in theirs["top_ranked"].items()}


def test_documents_without_text_are_refused_or_skipped_with_what_names_them(tmp_path: Path) -> None:
    configs = changed(
        corpus={"corpus": [*CORPUS, {"_id": "void", "title": "", "text": None}]},
        default={"test": [*QRELS["test"], {"query-id": "q1", "corpus-id": "void", "score": 1}]},
        top_ranked={"top_ranked": [{"query-id": "q1", "corpus-ids": ["void", "d1"]}]},
    )
    source = write_hub(tmp_path / "tiny", configs)
    assert "config 'corpus', split corpus, row 3: document 'void' has no text" in message(source)
    collection = load_collection(source, skip_empty_documents=True)
    assert (collection.without_text, len(collection.documents)) == (1, 3)
    assert (collection.qrels, collection.pools) == ({"test": {"q1": {"d1": 1}}}, {"q1": {"d1"}})


def judged(**values: Any) -> dict[str, dict[str, Rows]]:
    return {"default": {"test": [{"query-id": "q1", "corpus-id": "d1", "score": 1} | values]}}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (judged(score=0.5), "config 'default', split test, row 0: the score 0.5 is not an integer"),
        (judged(score=None), "the score None is not an integer"),
        (judged(**{"query-id": "q9"}), "row 0: query 'q9' is not in config 'queries'"),
        (judged(**{"corpus-id": "d9"}), "row 0: document 'd9' is not in config 'corpus', and no other document"),
        (judged(**{"corpus-id": None}), "the field 'corpus-id' is None; expected a string"),
        ({"default": {"test": [{"query": "q1"}]}}, "split test: no column 'query-id'; it has 'query'"),
        ({"corpus": {"corpus": [{"name": "d1", "text": "A"}]}}, "no column '_id' or 'id'; it has 'name', 'text'"),
        ({"corpus": {"corpus": CORPUS + CORPUS[:1]}}, "row 3: the _id 'd1' stands in an earlier row too"),
        ({"queries": {"queries": [{"_id": "q1", "text": " "}]}}, "row 0: query 'q1' has no text"),
        (
            {"queries": {"queries": [{"_id": "q1", "text": ["a", "b"]}]}},
            "the field 'text' is ['a', 'b']; expected a str",
        ),
        ({"top_ranked": {"t": [{"query-id": "q1", "corpus-ids": ["d9"]}]}}, "document 'd9' is not in config 'corpus'"),
        ({"top_ranked": {"t": [{"query-id": "q1", "corpus-ids": []}]}}, "the pool of query 'q1' has no document"),
        ({"top_ranked": {"t": [{"query-id": "q1", "corpus-ids": "d1"}]}}, "'d1'; expected a list of document ids"),
        ({"qrel_diff": {"t": [{"query-id": "q1", "corpus-ids": []}]}}, "query 'q1-og' is not in config 'queries'"),
        ({"instruction": {"t": [{"query-id": "q1"}]}}, "no column 'instruction'; it has 'query-id'"),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, parts: dict[str, dict[str, Rows]], expected: str) -> None:
    source = write_hub(tmp_path / "tiny", changed(**parts))
    assert expected in message(source)
    assert message(source).startswith(f"{source}, config '{next(iter(parts))}', split ")


def test_a_repeated_judgement_is_harmless_until_it_contradicts(tmp_path: Path) -> None:
    row = QRELS["test"][0]
    source = write_hub(tmp_path / "same", changed(default={"test": [row, row]}))
    assert load_hub(source).qrels == {"test": {"q1": {"d1": 1}}}
    source = write_hub(tmp_path / "other", changed(default={"test": [row, row | {"score": 2.0}]}))
    assert "row 1: the pair 'q1', 'd1' is judged in an earlier row too" in message(source)


def test_an_unknown_layout_is_named_with_those_that_are_known(tmp_path: Path) -> None:
    source = write_hub(tmp_path / "other", {"pairs": {"train": QUERIES}, "corpus": MTEB["corpus"]})
    text = message(source)
    assert f"{source}: no known layout; it has the configs 'corpus', 'pairs'; expected the configs 'corpus' and" in text
    assert "NAME-qrels (BEIR, MTEB" in text
    assert "'documents' and 'examples' (BRIGHT)" in text


def test_files_that_cannot_be_read_are_explained(tmp_path: Path) -> None:
    source = write_hub(tmp_path / "tiny", MTEB)
    corpus = tmp_path / "tiny" / "corpus" / "corpus.jsonl"
    corpus.write_text('{"_id": "d1", "text"\n')
    assert f"{source}, config 'corpus', split corpus: cannot be read: JSON parse error" in message(source)
    corpus.write_text("")
    assert message(source) == (
        f"{source}, config 'corpus': cannot be read: no data that can be read (StopIteration); mend the folder"
    )
    corpus.unlink()
    text = message(source)
    assert text.startswith(f"{source}: cannot be read: Unable to find '{corpus}'")
    assert text.endswith("... (FileNotFoundError); mend the folder")
    (tmp_path / "tiny" / "README.md").write_text("---\nconfigs: [\n---\n")
    assert f"{source}: cannot be read: while parsing" in message(source)
    source = write_hub(tmp_path / "none", MTEB, "tsv")
    (tmp_path / "none" / "corpus" / "corpus.tsv").write_text("_id\ttitle\ttext\n")
    assert message(source) == f"{source}, config 'corpus', split corpus: no rows"


def test_a_local_file_that_changed_is_read_anew(tmp_path: Path) -> None:
    source = write_hub(tmp_path / "tiny", MTEB)
    assert load_hub(source) == EXPECTED
    write_rows(tmp_path / "tiny" / "queries" / "queries.jsonl", [row | {"text": "new"} for row in QUERIES])
    assert load_hub(source).queries["q1"].text == "new"


def test_a_name_on_the_hub_gives_source_revision_and_subset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is a folder here, and the library is asked for ids."""
    beir = {"corpus": MTEB["corpus"], "queries": MTEB["queries"]}
    write_hub(tmp_path / "BeIR" / "tiny", beir)
    write_hub(tmp_path / "BeIR" / "tiny-qrels", {"default": QRELS})
    write_hub(tmp_path / "mteb" / "many", {f"uz-{name}".replace("default", "qrels"): MTEB[name] for name in MTEB})
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    real_names, real_load = datasets.get_dataset_config_names, datasets.load_dataset
    asked = []

    def names(path: str, revision: str | None) -> list[str]:
        return real_names(str(tmp_path / path))

    def load(path: str, name: str, revision: str | None) -> Any:
        asked.append((path, name, revision))
        return real_load(str(tmp_path / path), name)

    monkeypatch.setattr(datasets, "get_dataset_config_names", names)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_collection("BeIR/tiny@v2") == EXPECTED
    assert sorted(asked) == [
        ("BeIR/tiny", "corpus", "v2"),
        ("BeIR/tiny", "queries", "v2"),
        ("BeIR/tiny-qrels", "default", None),
    ]
    asked.clear()
    assert load_collection("mteb/many:uz@main").qrels == EXPECTED.qrels
    assert set(asked) == {("mteb/many", f"uz-{part}", "main") for part in ("corpus", "queries", "qrels")}
    assert load_collection("mteb/many:uz/test").qrels == {"test": {"q1": {"d1": 1}}}


def test_a_data_set_that_cannot_be_reached_is_explained() -> None:
    text = message("nobody/nothing", revision="v1")
    assert text.startswith("nobody/nothing: cannot be read: Couldn't reach 'nobody/nothing' on the Hub")
    assert "check id, revision and network (no folder has that name)" in text


def test_names_of_collections(tmp_path: Path, collection: Collection, collection_path: Path) -> None:
    assert load_collection("atlas").content_hash() == build_atlas().content_hash()
    assert load_collection(str(collection_path)) == collection
    copy = tmp_path / "copy"
    collection.save(copy)
    (copy / "README.md").write_text("---\nconfigs:\n- config_name: corpus\n  data_files: corpus.jsonl\n---\n")
    assert load_collection(str(copy)).qrels == collection.qrels, "a complete BEIR folder may have a README of the hub"
    (tmp_path / "empty").mkdir()
    for name, expected in {
        "atlass": "no collection 'atlass'; did you mean 'atlas'? expected one that is built in (atlas, atlas-wide, ",
        "atlas:x": "cannot read the seed of 'atlas:x': expected atlas:SEED",
        "qqqqqqqq": "no collection 'qqqqqqqq'; expected one that is built in",
        str(tmp_path / "nowhere"): f"no collection at {tmp_path / 'nowhere'}: the folder does not exist",
        "./nowhere": "no collection at ./nowhere: the folder does not exist",
        str(tmp_path / "empty"): "is no collection: expected corpus.jsonl",
        f"{write_hub(tmp_path / 'tiny', MTEB)}@v1": "is a folder and has no revision 'v1'; leave the revision out",
    }.items():
        with pytest.raises(DataError) as error:
            load_collection(name)
        assert expected in str(error.value)


def test_the_standard_library_is_built_in(monkeypatch: pytest.MonkeyPatch, collection: Collection) -> None:
    monkeypatch.setattr("search_r3.data.generators.stdlib.build_stdlib", lambda seed: collection)
    assert load_collection("stdlib") is collection


def test_rows_that_cannot_be_used_are_left_out_and_counted(tmp_path: Path) -> None:
    row = QRELS["test"][0]
    broken = [{"query-id": "q9"}, {"corpus-id": "d9"}, {"corpus-id": "d2", "score": 0.5}, {"score": 2.0}]
    configs = changed(
        corpus={"corpus": [*CORPUS, CORPUS[0] | {"text": "again"}, {"_id": "void", "title": "", "text": " "}]},
        queries={"queries": [*QUERIES, {"_id": "q3", "text": " "}]},
        default={"test": [row, *(row | change for change in broken), row | {"query-id": "q3"}]},
        top_ranked={"top_ranked": [{"query-id": one, "corpus-ids": ["d1", "d9"]} for one in ("q1", "q9")]},
    )
    collection = load_hub(write_hub(tmp_path / "tiny", configs))
    assert collection.documents == EXPECTED.documents
    assert (collection.qrels, collection.absent) == ({"test": {"q1": {"d1": 1}}}, {"test": {"q1": {"d9": 1}}})
    assert (collection.pools, collection.without_text) == ({"q1": frozenset({"d1"})}, 1)
    assert collection.dropped == {
        "documents or queries with the id of an earlier one": 1,
        "queries without text": 1,
        "judgements or lists of unknown queries": 3,
        "judgements without a whole score": 1,
        "judgements of a pair that was judged otherwise": 1,
        "unknown documents in lists": 1,
    }
    domain = bright()
    domain["examples"]["b"][0]["gold_ids"] = ["b/0", "nowhere"]
    collection = load_hub(write_hub(tmp_path / "BRIGHT", domain, "parquet"), subset="b")
    assert collection.absent == {"test": {"0": {"nowhere": 1}}}
