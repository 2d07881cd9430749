"""Our BM25 against mteb's, on the same collections; samples, subsets and identical ids as mteb has them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

mteb = pytest.importorskip("mteb")

from search_r3.data.collection import Collection, Document, Query
from search_r3.errors import DataError
from search_r3.evaluation.baselines import BM25System
from search_r3.evaluation.benchmark import EvaluationOptions, evaluate
from search_r3.evaluation.mteb import run_mteb, suite_tasks
from search_r3.evaluation.mteb_tasks import collection_task, leaves_out_identical_ids
from search_r3.model.encoder import SearchR3
from search_r3.retrieval.ranking import make_requests

QUICK = EvaluationOptions(latency_queries=0, bootstrap=100)
SENTENCES = {
    "en": "The houses of a city were painted; running foxes are quicker than happy dogs; house painting by a fox.",
    "de": "Die Häuser der Stadt sind rot, und laufende Füchse sind schneller als glückliche Hunde. Haus Hund Städte.",
    "fi": "Kaupungin talot maalattiin ja juoksevat ketut ovat nopeampia kuin onnelliset koirat. Talo taloja koira.",
    "ru": "Дома города были покрашены в красный цвет, пока бегущие лисы быстрее счастливых собак. Дом в городе, лиса.",
    "pl": "Domy miasta zostały pomalowane na czerwono, a biegnące lisy są szybsze niż szczęśliwe psy.",
    "zh": "这座城市的房子被漆成了红色、奔跑的狐狸比快乐的狗更快、河流从山上流下来。",
    "ja": "町の家は赤く塗られ、走るキツネは幸せな犬よりも速く、川は山から流れている。",
    "ko": "도시의 집들은 빨간색으로 칠해졌고 달리는 여우는 행복한 개보다 빠르다.",
}
CODES = {
    **{"en": "eng-Latn", "de": "deu-Latn", "fi": "fin-Latn", "ru": "rus-Cyrl"},
    **{"pl": "pol-Latn", "zh": "zho-Hans", "ja": "jpn-Jpan", "ko": "kor-Hang"},
}


def made(language: str) -> Collection:
    """Documents of words (or characters) drawn from a sentence, which queries share with most of them."""
    chance = random.Random(language)
    glue = "" if language in ("zh", "ja") else " "
    words = list(SENTENCES[language]) if not glue else SENTENCES[language].split()

    def text(count: int) -> str:
        return glue.join(chance.choices(words, k=count))

    documents = {f"d{i:02d}": Document(f"d{i:02d}", text(3 + i % 9), text(2) if i % 3 else "") for i in range(40)}
    queries = {f"q{i}": Query(f"q{i}", text(5)) for i in range(8)}
    qrels = {one: {doc_id: 1 for doc_id in chance.sample(list(documents), 3)} for one in queries}
    return Collection(f"made-{language}", documents, queries, {"test": qrels})


def theirs(collection: Collection, language: str, folder: Path) -> tuple[dict[str, dict[str, float]], float]:
    """The scores of mteb's own BM25 for all documents, and its nDCG@10."""
    task = collection_task(collection, languages=[CODES[language]])
    model = mteb.get_model("mteb/baseline-bm25s")
    found = mteb.evaluate(
        model, task, cache=None, co2_tracker=False, prediction_folder=folder, show_progress_bar=False
    ).task_results
    [path] = folder.rglob("*_predictions.json")
    saved = json.loads(path.read_text())["default"]["test"]
    return saved, found[0].scores["test"][0]["ndcg_at_10"]


@pytest.mark.parametrize("language", SENTENCES)
def test_bm25_has_the_scores_of_mteb(language: str, tmp_path: Path) -> None:
    collection = made(language)
    saved, ndcg = theirs(collection, language, tmp_path)
    system = BM25System(language="auto" if language in ("en", "zh", "ja", "ko") else language)
    requests = make_requests(collection, collection.qrels["test"])
    rankings = system.index(collection).answer(requests, 1000).rankings
    for request, ranking in zip(requests, rankings, strict=True):
        shared = {doc_id: score for doc_id, score in saved[request.query_id].items() if score > 0}
        assert dict(zip(*ranking, strict=True)) == pytest.approx(shared, rel=1e-5), request
        assert len(ranking.doc_ids) >= 10, "so that nDCG@10 sees no document without a score"
    assert evaluate(system, collection, "test", QUICK).scores["ndcg@10"] == pytest.approx(ndcg, abs=1e-5)
    unstemmed = evaluate(BM25System(stemmed=False), collection, "test", QUICK)
    if language in ("en", "de", "ru", "fi"):
        assert unstemmed.per_query["ndcg@10"] != evaluate(system, collection, "test", QUICK).per_query["ndcg@10"]


def test_identical_ids_follow_the_tasks_of_mteb(collection: Collection) -> None:
    for source, expected in (
        *(("mteb/arguana", True), ("mteb/quora:default@1", True), ("mteb/fiqa", True)),
        *(("mteb/scifact", False), ("mteb/nq", False), ("owner/unknown", False)),
    ):
        assert leaves_out_identical_ids(source, collection) == expected, source
    own = replace(collection, qrels={"test": {"d00": {"d00": 1}}})
    assert leaves_out_identical_ids("atlas", collection)
    assert not leaves_out_identical_ids("atlas", own)
    assert collection_task(collection).ignore_identical_ids


def test_a_sample_of_a_task_is_a_result_of_its_own(
    model: SearchR3, collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    encode_query = SearchR3.encode_query

    def counted(self: SearchR3, texts: list[str], *args: Any, **options: Any) -> Any:
        asked.append(len(texts))
        return encode_query(self, texts, *args, **options)

    monkeypatch.setattr(SearchR3, "encode_query", counted)

    def scores(**options: Any) -> Any:
        [score] = run_mteb(model, ["direct"], collection_task(collection), tmp_path, **options)
        return score

    whole, some = scores(), scores(queries=3)
    assert asked == [10, 3]
    assert (whole.part, some.part) == ("", "a sample of 3 queries")
    assert "queries_3__seed_0" in some.path.as_posix()
    assert some.path != whole.path and some.score != whole.score
    assert scores(queries=3).score == some.score
    assert scores(queries=3, seed=5).path != some.path
    assert scores(queries=10).score == pytest.approx(whole.score, abs=1e-5), "all of them"
    chosen = random.Random(0).sample(sorted(collection.qrels["test"]), 3)
    part = replace(collection, qrels={"test": {one: collection.qrels["test"][one] for one in chosen}})
    [expected] = run_mteb(model, ["direct"], collection_task(part), tmp_path)
    assert some.score == pytest.approx(expected.score, abs=1e-5)


def test_subsets_of_a_task_are_chosen_by_name_or_language() -> None:
    [by_name] = suite_tasks("MKQARetrieval", ["de", "en"])
    [by_language] = suite_tasks("MKQARetrieval", ["deu", "eng"])
    assert sorted(by_name.hf_subsets) == sorted(by_language.hf_subsets) == ["de", "en"]
    [single] = suite_tasks("SciFact", ["de"])
    assert list(single.hf_subsets) == ["default"], "a task without subsets is what it is"
    with pytest.raises(DataError, match="MKQARetrieval has no subset xx; it has ar, "):
        suite_tasks("MKQARetrieval", ["xx"])
    with pytest.raises(DataError, match="is no retrieval task: it has no queries"):
        run_mteb("builtin", ["direct"], "STS12", "unused", queries=3)


def test_a_judgement_of_an_absent_document_counts_in_mteb_too(
    model: SearchR3, collection: Collection, tmp_path: Path
) -> None:
    absent = replace(collection, absent={"test": {one: {"nowhere": 1} for one in collection.qrels["test"]}})
    [score] = run_mteb(model, ["direct"], collection_task(absent), tmp_path)
    from search_r3.evaluation.systems import EncodedCollections, SearchR3System

    system = SearchR3System(EncodedCollections(model), "direct")
    ours, whole = (evaluate(system, one, "test", QUICK).scores["ndcg@10"] for one in (absent, collection))
    assert score.score == pytest.approx(ours, abs=1e-5)
    assert ours < whole
