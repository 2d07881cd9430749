"""What is counted, what is left out, and that the reader is told; TREC files."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import ir_measures
import pytest

from search_r3.data.collection import Collection, Document, Query
from search_r3.errors import ConfigError, DataError, VectorIndexError
from search_r3.evaluation import benchmark
from search_r3.evaluation.baselines import BM25System
from search_r3.evaluation.benchmark import EvaluationOptions, evaluate
from search_r3.evaluation.results import Result
from search_r3.evaluation.runner import EvaluationPlan, run_plan, write_summary
from search_r3.evaluation.systems import EncodedCollections, SearchR3System
from search_r3.evaluation.table import markdown, notes
from search_r3.model.encoder import SearchR3
from search_r3.retrieval.encode import encode_corpus
from search_r3.retrieval.metrics import MEASURES

QUICK = EvaluationOptions(latency_queries=0, bootstrap=100)


def run(collection: Collection, **options: object) -> Result:
    return evaluate(BM25System(), collection, "test", replace(QUICK, **options))


def test_a_judgement_of_an_absent_document_counts_and_is_never_found(tmp_path: Path, collection: Collection) -> None:
    collection.save(tmp_path / "c")
    with (tmp_path / "c" / "qrels" / "test.tsv").open("a") as file:
        file.writelines(["q03\telsewhere\t1\n", "q05\telsewhere\t1\n"])
    loaded = Collection.load(tmp_path / "c")
    assert loaded.absent == {"test": {"q03": {"elsewhere": 1}, "q05": {"elsewhere": 1}}}
    assert loaded.qrels == collection.qrels, "training sees nothing of them"
    whole, partly = run(collection), run(loaded)
    row = whole.query_ids.index("q03")
    assert whole.per_query["recall@100"][row] == 1.0
    assert partly.per_query["recall@100"][row] == 0.5
    rankings = {"q03": {doc_id: score for doc_id, score in whole.top[row]}}
    judged = {"q03": collection.qrels["test"]["q03"] | {"elsewhere": 1}}
    measure = ir_measures.parse_measure("nDCG@10")
    expected = ir_measures.calc_aggregate([measure], judged, rankings)[measure]
    assert partly.per_query["ndcg@10"][row] == pytest.approx(expected, abs=1e-9)
    assert ("q05" in partly.query_ids, partly.collection.absent) == (True, 2)
    assert partly.snippets["elsewhere"] == "(not in the corpus)"
    said = "2 judgements name documents that are not in the corpus: counted and never found, as trec_eval does"
    assert said in notes([partly]) and said in markdown([partly], []) and not notes([whole])
    loaded.save(tmp_path / "again")
    assert Collection.load(tmp_path / "again").absent == loaded.absent
    assert loaded.content_hash() != collection.content_hash()
    (tmp_path / "c" / "qrels" / "test.tsv").write_text("q03\telsewhere\t1\n")
    with pytest.raises(DataError, match=r"test\.tsv:1: document 'elsewhere' is not in corpus\.jsonl, and no other"):
        Collection.load(tmp_path / "c")


def test_both_conventions_for_queries_without_a_relevant_document_are_named(collection: Collection) -> None:
    qrels = {"test": collection.qrels["test"] | {"q00": {"d00": 0}, "q01": {"d00": -1}}}
    whole, more = run(collection), run(replace(collection, qrels=qrels))
    assert more.query_ids == whole.query_ids
    assert more.collection.without_relevant == 2
    count = len(whole.query_ids)
    with_0 = whole.scores["ndcg@10"] * count / (count + 2)
    [note] = notes([more])
    assert note.startswith("2 queries without a relevant document are left out; counted as 0")
    assert note.endswith(f"nDCG@10 is: bm25 {with_0:.3f}")


def test_a_sample_is_drawn_by_the_seed_and_marked(collection: Collection, tmp_path: Path) -> None:
    whole, some = run(collection), run(collection, queries=4)
    assert len(some.query_ids) == 4
    assert [one for one in whole.query_ids if one in some.query_ids] == some.query_ids
    assert run(collection, queries=4).query_ids == some.query_ids
    assert run(collection, queries=4, seed=1).query_ids != some.query_ids
    assert some.key != whole.key
    assert (some.collection.sample_of, whole.collection.sample_of) == (len(whole.query_ids), 0)
    assert run(collection, queries=99).collection.sample_of == 0, "all of them are no sample"
    assert "| 4, a sample of 10 |" in markdown([some], []) and "a sample" not in markdown([whole], [])
    write_summary([some], tmp_path, 100, 0)
    assert '"sample_of": 10' in (tmp_path / "summary.json").read_text()
    assert notes([some]) == ["a sample: 4 of 10 queries, drawn by the seed"]


def test_a_sample_keeps_both_instructions_of_a_query(collection: Collection) -> None:
    queries = {
        f"{n}-{kind}": Query(f"{n}-{kind}", collection.queries[f"q{n:02d}"].text)
        for n in range(6)
        for kind in ("og", "changed")
    }
    qrels = {"test": {one: {"d00": 1} for one in queries}}
    changed = {str(n): frozenset({"d00"}) for n in range(6)}
    followed = Collection("f", collection.documents, queries, qrels, changed=changed)
    result = run(followed, queries=2)
    assert len(result.query_ids) == 2 and all(one.endswith("-og") for one in result.query_ids)
    assert result.collection.sample_of == 6
    assert result.scores["p-mrr"] == 0.0, "the same text twice"


def test_measures_look_no_deeper_than_the_rankings(collection: Collection) -> None:
    assert set(run(collection).per_query) == set(MEASURES)
    shallow = run(collection, depth=100).per_query
    assert set(MEASURES) - set(shallow) == {"ndcg@1000", "map@1000", "recall@1000"}


@pytest.mark.parametrize(("rule", "expected"), [("unless-relevant", 1), ("beir", 2), ("keep", 0)])
def test_identical_ids_follow_the_rule(rule: str, expected: int) -> None:
    documents = {name: Document(name, "a red apple") for name in ("a", "b", "c")}
    queries = {name: Query(name, "red apple") for name in ("a", "b")}
    collection = Collection("own", documents, queries, {"test": {"a": {"a": 1}, "b": {"c": 1}}})
    result = run(collection, identical_ids=rule)
    assert result.collection.identical_ids == expected
    found = {one: [doc_id for doc_id, _ in top] for one, top in zip(result.query_ids, result.top, strict=True)}
    assert ("a" in found["a"], "b" in found["b"]) == (expected < 2, expected == 0)


def test_documents_that_lose_their_end_are_counted(model: SearchR3, collection: Collection) -> None:
    long = {f"x{i}": Document(f"x{i}", "a red house and a blue boat " * (200 + i)) for i in range(3)}
    whole = replace(collection, documents=collection.documents | long)
    result = evaluate(SearchR3System(EncodedCollections(model), "direct"), whole, "test", QUICK)
    assert result.cost.truncated_documents == 3
    prompts = model.backbone.prompt_encoder.encode_batch(list(whole.texts().values()), "document")
    assert sum(prompt.truncated for prompt in prompts) == 3
    assert "direct: 3 documents were longer than the model's limit and lost their end" in notes([result])


def test_bm25_says_what_it_does_not_find(collection: Collection) -> None:
    foreign = {one: replace(query, text="где дом") for one, query in collection.queries.items()}
    [note] = notes([run(replace(collection, queries=foreign))])
    assert note == "bm25: 10 of 10 queries share no word with a document (read as language en)"
    texts = {"d1": Document("d1", "塔什干是乌兹别克斯坦的首都。"), "d2": Document("d2", "東京は日本の首都です。")}
    queries = {"q1": Query("q1", "乌兹别克斯坦的首都"), "q2": Query("q2", "日本の首都")}
    mixed = Collection("cjk", texts, queries, {"test": {"q1": {"d1": 1}, "q2": {"d2": 1}}})
    result = run(mixed)
    assert result.scores["ndcg@10"] == 1.0
    assert notes([result]) == ["bm25: texts were read character by character, as language ja"]


def test_bm25_says_when_it_knows_nothing_of_a_language(collection: Collection) -> None:
    for language, expected in (("de", []), ("xx", ["bm25: no stems and no stop words of language xx are known"])):
        assert notes([evaluate(BM25System(language=language), collection, "test", QUICK)]) == expected


def test_a_version_is_part_of_the_key(collection: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {run(collection).key}
    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "ENGINE", 99)
        keys.add(run(collection).key)
    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "version", lambda name: "9.9")
        keys.add(run(collection).key)
    assert run(collection).key in keys and len(keys) == 3


def tied() -> Collection:
    """Many equal scores, graded judgements, a document that is nowhere."""
    chance = random.Random(0)
    words = [f"word{i}" for i in range(30)]
    documents = {f"d{i:03d}": Document(f"d{i:03d}", " ".join(chance.sample(words, 3))) for i in range(200)}
    queries = {f"q{i}": Query(f"q{i}", " ".join(chance.sample(words, 2))) for i in range(20)}
    judged = {one: {doc_id: chance.randrange(3) for doc_id in chance.sample(list(documents), 15)} for one in queries}
    absent = {"test": {"q3": {"nowhere": 2}}}
    return Collection("tied", documents, queries, {"test": judged}, absent=absent)


def test_ir_measures_finds_our_numbers_in_a_run_file(tmp_path: Path) -> None:
    result = evaluate(BM25System("b m"), tied(), "test", QUICK, folder=tmp_path, runs=tmp_path / "runs")
    [path] = (tmp_path / "runs").glob("*.run")
    qrels = list(ir_measures.read_trec_qrels(str(tmp_path / "runs" / "tied.test.qrels")))
    found = list(ir_measures.read_trec_run(str(path)))
    names = {"ndcg@10": "nDCG@10", "ndcg@1000": "nDCG@1000", "map": "AP", "recall@100": "R@100", "p@20": "P@20"}
    names |= {"hit@5": "Success@5", "ndcg@1": "nDCG@1", "map@100": "AP@100"}
    measures = {ours: ir_measures.parse_measure(theirs) for ours, theirs in names.items()}
    aggregate = ir_measures.calc_aggregate(measures.values(), qrels, found)
    for ours, theirs in measures.items():
        assert result.scores[ours] == pytest.approx(aggregate[theirs], abs=1e-9), ours
    per_query = ir_measures.iter_calc([measures["ndcg@10"]], qrels, found)
    values = {one.query_id: one.value for one in per_query}
    assert [values[one] for one in result.query_ids] == pytest.approx(result.per_query["ndcg@10"], abs=1e-9)
    first = path.read_text().splitlines()[0].split()
    assert (first[1], first[3], first[5], len(first)) == ("Q0", "1", "b_m", 6)
    path.unlink()
    again = evaluate(BM25System("b m"), tied(), "test", QUICK, folder=tmp_path, runs=tmp_path / "runs")
    assert path.exists() and again.scores == result.scores, "a known result without its run is measured again"


def test_run_files_cannot_hold_ids_with_blanks(tmp_path: Path, collection: Collection) -> None:
    replace(collection, documents=collection.documents | {"a b": Document("a b", "text")}).save(tmp_path / "blank")
    plan = EvaluationPlan({}, (), ["bm25"], [str(tmp_path / "blank")], write_runs=True)
    with pytest.raises(ConfigError, match="has the document id 'a b'; rename it, or leave --runs out"):
        list(run_plan(plan, tmp_path / "out"))


def test_a_language_that_is_none_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    plan = EvaluationPlan({"": "no/model"}, ("reason",), ["bm25+reasoning"], ["no-such-collection"], language="english")
    with pytest.raises(ConfigError, match="language 'english': expected two letters"):
        list(run_plan(plan, tmp_path / "out"))


def test_both_kinds_of_bm25_stand_side_by_side(tmp_path: Path, collection: Collection) -> None:
    collection.save(tmp_path / "c")
    plan = EvaluationPlan({}, (), ["bm25", "bm25-unstemmed"], [str(tmp_path / "c")], options=QUICK)
    stemmed, plain = run_plan(plan, tmp_path / "out")
    assert (stemmed.system.name, plain.system.name) == ("bm25", "bm25-unstemmed")
    assert stemmed.key != plain.key
    assert plain.system.settings["stemming"] == "none"
    assert fmean(plain.per_query["ndcg@10"]) == 1.0


def test_an_index_that_is_not_finished_is_refused_with_the_remedy(model: SearchR3, tmp_path: Path) -> None:
    for content, name in (("no index", ""), ("an encoding that is not finished", "unfinished.json")):
        if name:
            (tmp_path / name).write_text("{}")
        with pytest.raises(VectorIndexError, match=f"holds {content}; encode the corpus into it"):
            EncodedCollections(model, index=tmp_path)


def test_vectors_of_another_precision_are_a_system_of_their_own(model: SearchR3, tmp_path: Path) -> None:
    encode_corpus(model, [("a", "a red house")], tmp_path)
    own = EncodedCollections(model, index=tmp_path).index_settings
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["origin"]["precision"] == model.backbone.dtype
    manifest["origin"]["precision"] = "bfloat16"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert EncodedCollections(model, index=tmp_path).index_settings == {**own, "encoded_in": "bfloat16"}
