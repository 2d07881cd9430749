"""`search-r3 evaluate` and `report` as a user meets them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from search_r3.data.collection import Collection
from search_r3.errors import ConfigError
from search_r3.evaluation import baselines
from search_r3.evaluation.baselines import BM25System, PeerModel, SentenceTransformersSystem
from search_r3.evaluation.benchmark import EvaluationOptions, evaluate
from search_r3.evaluation.results import load_results
from search_r3.evaluation.runner import label_models
from search_r3.model.encoder import SearchR3
from search_r3.model.export import export_sentence_transformers
from search_r3.retrieval.ranking import make_requests, ranked
from tests.conftest import call, small_collection


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory, run_dir: Path) -> Path:
    """A sentence-transformers directory with the weights of the tiny model."""
    pytest.importorskip("sentence_transformers")
    folder = tmp_path_factory.mktemp("peer") / "exported"
    export_sentence_transformers(SearchR3(run_dir / "model").backbone, folder, None)
    return folder


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another collection: fewer documents, a split of its own."""
    whole = small_collection()
    queries = {"q03": whole.queries["q03"]}
    path = tmp_path_factory.mktemp("data") / "second"
    Collection("second", whole.documents, queries, {"dev": {"q03": {"d03": 1}}}).save(path)
    return path


QUICK = ["--bootstrap", 100, "--permutations", 100, "--latency-queries", 1]


def test_one_command_evaluates_all_modes_and_baselines(
    run_dir: Path,
    peer: Path,
    collection_path: Path,
    second: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    out = tmp_path / "out"
    baselines = ["bm25", "bm25+reasoning", f"sentence-transformers:{peer}"]
    args = ["evaluate", "--model", run_dir / "model", "--collections", collection_path, second]
    args += ["--modes", "direct", "reason", "--baselines", *baselines, "--out", out, *QUICK]
    assert call(monkeypatch, *args) == 0
    shown = capsys.readouterr().out
    results = load_results(out / "results")
    names = {"bm25", "bm25+reasoning", "exported", "direct", "reason"}
    assert {(result.place, result.system.name) for result in results} == {
        (place, name) for place in (("small", "test"), ("second", "dev")) for name in names
    }
    report = json.loads((run_dir / "report.json").read_text())["rows"]
    [reason] = [result for result in results if result.system.name == "reason" and result.place[0] == "small"]
    assert reason.scores["ndcg@10"] == report["reason/rl"]["ndcg@10"], "the same number from both commands"
    assert reason.collection.hash == small_collection().content_hash()
    assert reason.collection.source == str(collection_path)
    by_name = {result.system.name: result for result in results if result.place[0] == "small"}
    assert by_name["exported"].scores["ndcg@10"] == pytest.approx(by_name["direct"].scores["ndcg@10"], abs=1e-6), (
        "the same weights in another library"
    )
    summary = json.loads((out / "summary.json").read_text())
    assert len(summary["rows"]) == 10
    assert set(summary["means"]) == names
    assert len(summary["comparisons"]) == 20
    [row] = [row for row in summary["rows"] if (row["collection"], row["system"]) == ("small", "reason")]
    gain = reason.scores["ndcg@10"] - by_name["direct"].scores["ndcg@10"]
    assert row["gain_per_100_tokens"] == pytest.approx(100 * gain / reason.cost.tokens_per_query)
    table = (out / "summary.md").read_text()
    assert f"| small | test | 10 | `reason` | {reason.scores['ndcg@10']:.3f} (" in table
    assert "mean over 2 splits" in table and "p (Holm)" in table
    assert "small, test: 10 queries, 40 documents" in shown and "mean over 2 splits" in shown
    assert not list((out / "indexes").iterdir()), "an encoded corpus does not stay when its results are complete"


def test_what_is_known_is_not_computed_again(
    run_dir: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["evaluate", "-m", run_dir / "model", "-c", collection_path, "--out", tmp_path, *QUICK]
    assert call(monkeypatch, *args, "--modes", "direct") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "results").iterdir()}
    encoded: list[str] = []
    whole = SearchR3.encode_query

    def counted(self: SearchR3, texts: list[str], mode: str, **options: object) -> object:
        encoded.append(mode)
        return whole(self, texts, mode, **options)

    monkeypatch.setattr(SearchR3, "encode_query", counted)
    assert call(monkeypatch, *args, "--modes", "direct", "reason", "--baselines", "bm25") == 0
    assert set(encoded) == {"reason"}
    after = {path.name: path.read_bytes() for path in (tmp_path / "results").iterdir()}
    assert len(after) == 3
    assert before.items() <= after.items()


def test_a_stopped_evaluation_goes_on(
    run_dir: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["evaluate", "-m", run_dir / "model", "-c", collection_path, "--out", tmp_path, *QUICK]
    whole = SearchR3.encode_query

    def stopped(self: SearchR3, texts: list[str], mode: str, **options: object) -> object:
        if mode == "reason":
            raise KeyboardInterrupt
        return whole(self, texts, mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr(SearchR3, "encode_query", stopped)
        assert call(patch, *args) == 130
    [kept] = (tmp_path / "results").iterdir()
    before = kept.read_bytes()
    assert list((tmp_path / "indexes").iterdir()), "the vectors stay for the modes that are still to come"
    with monkeypatch.context() as patch:
        patch.setattr(SearchR3, "encode_document", None)
        patch.setattr("search_r3.retrieval.encode._Job._checked", None)
        patch.setattr(SearchR3, "encode_document", lambda self, texts, **_: _only_the_probe(self, texts))
        assert call(patch, *args) == 0
    assert kept.read_bytes() == before
    assert len(load_results(tmp_path / "results")) == 2


def test_an_index_that_is_given_is_searched_as_it_is(
    run_dir: Path, collection_path: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model, index, out = run_dir / "model", tmp_path / "index", tmp_path / "out"
    plain = ["evaluate", "--model", model, "--collections", collection_path, "--modes", "direct", "--out", out, *QUICK]
    assert call(monkeypatch, "encode", model, index, "-c", collection_path, "--vectors", "float32") == 0
    assert call(monkeypatch, *plain) == 0
    read = Collection.load
    reads: list[bool] = []
    monkeypatch.setattr(
        Collection, "load", lambda *where, **how: reads.append(how.get("mapped", False)) or read(*where, **how)
    )
    with monkeypatch.context() as patch:
        patch.setattr(SearchR3, "encode_document", lambda self, texts, **_: _only_the_probe(self, texts))
        assert call(patch, *plain, "--index", index) == 0
    assert reads == [True], "the collection is read once, and its documents stay in their file"
    assert index.exists()
    exact, given = sorted(load_results(out / "results"), key=lambda result: "index_type" in result.system.settings)
    assert given.system.settings["index_type"] == "exact" and given.system.settings["vectors"] == "float32"
    assert (given.per_query, given.top) == (exact.per_query, exact.top)
    assert given.cost.documents_per_second is None
    graph = ["encode", model, index, "-c", collection_path, "--vectors", "float32", "--index-type", "hnsw"]
    assert call(monkeypatch, *graph) == 0
    capsys.readouterr()
    assert call(monkeypatch, *plain, "--index", index) == 0
    said = "searched by a graph (hnsw): recall@10 1.000 against exact search"
    assert said in " ".join(capsys.readouterr().out.split())
    assert call(monkeypatch, *plain, "--index-type", "hnsw") == 0
    assert said in " ".join(capsys.readouterr().out.split())
    settings = [result.system.settings for result in load_results(out / "results")]
    assert sorted(one.get("vectors", "") for one in settings if one.get("index_type") == "hnsw") == ["", "float32"]
    for args, message in (
        ([*plain, "--collections", second], "is of one collection and one model; evaluate these alone"),
        ([*plain, "--document-instruction", "A page."], "with document_instruction='', not 'A page.'"),
    ):
        assert call(monkeypatch, *args, "--index", index) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def _only_the_probe(model: SearchR3, texts: list[str]) -> object:
    assert len(texts) == 1, "no document is encoded again"
    return model._vectors([model.backbone], texts, "document", "", None)[0]


def test_two_models_stand_side_by_side(
    run_dir: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = ["--model", f"before={run_dir / 'sft' / 'model'}", f"after={run_dir / 'model'}"]
    args = ["evaluate", *models, "-c", collection_path, "--modes", "reason", "--baselines", "bm25+reasoning"]
    assert call(monkeypatch, *args, "--out", tmp_path, *QUICK) == 0
    names = {result.system.name for result in load_results(tmp_path / "results")}
    assert names == {"reason/before", "reason/after", "bm25+reasoning/before", "bm25+reasoning/after"}


def test_labels_of_models() -> None:
    assert label_models(["runs/a/model"]) == {"": "runs/a/model"}
    assert label_models(["x=runs/a/model"]) == {"x": "runs/a/model"}
    assert label_models(["runs/lr=1e-5/model"]) == {"": "runs/lr=1e-5/model"}
    assert label_models(["runs/a/model", "Qwen/Qwen2.5-1.5B"]) == {
        "a": "runs/a/model",
        "Qwen2.5-1.5B": "Qwen/Qwen2.5-1.5B",
    }
    with pytest.raises(ConfigError, match="two models are called 'a'"):
        label_models(["runs/a/model", "other/a/model"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--baselines", "bm52"], "unknown baseline 'bm52'; did you mean 'bm25'?"),
        (["--baselines", "bm25+reasoning"], "add --model and --modes reason"),
        ([], "nothing to evaluate; give --model, --baselines, or both"),
        (["--baselines", "bm25", "--splits", "tset"], "has no split 'tset'; it has: dev, test, train"),
        (["--baselines", "sentence-transformers:./nowhere"], "cannot load './nowhere' with sentence-transformers"),
        (["--baselines", "bm25", "--depth", "30"], "100"),
        (["--model", "./nowhere"], "no model directory at ./nowhere"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_computed(
    args: list[str],
    message: str,
    collection_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    out = tmp_path / "out"
    if "sentence-transformers" in message:
        pytest.importorskip("sentence_transformers")
    assert call(monkeypatch, "evaluate", "-c", collection_path, *args, "--out", out) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_late_collection_that_lacks_the_split_is_refused_first(
    collection_path: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    args = ["evaluate", "-c", collection_path, second, "--splits", "test", "--baselines", "bm25"]
    assert call(monkeypatch, *args, "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err.strip() == "error: collection 'second' has no split 'test'; it has: dev"
    assert not (tmp_path / "out").exists()


def test_two_collections_of_one_name_are_refused(
    collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    small_collection().save(tmp_path / "small")
    args = ["evaluate", "-c", collection_path, tmp_path / "small", "--baselines", "bm25", "--out", tmp_path / "out"]
    assert call(monkeypatch, *args) == 2
    assert "two collections are called 'small'" in capsys.readouterr().err
    small_collection().save(tmp_path / "t.1")
    small_collection().save(tmp_path / "t-1")
    args = ["evaluate", "-c", tmp_path / "t.1", tmp_path / "t-1", "--baselines", "bm25", "--out", tmp_path / "out"]
    assert call(monkeypatch, *args) == 2
    assert "two collections are called 't-1' in files" in capsys.readouterr().err


def test_a_package_that_carries_a_model_is_found_by_its_name(
    peer: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class File:
        name = "modules.json"

        def locate(self) -> Path:
            return peer / "modules.json"

    monkeypatch.setattr(baselines.metadata, "files", lambda name: [File()] if name == "carrier" else None)
    model = PeerModel("carrier")
    assert SentenceTransformersSystem(model).info.revision == PeerModel(str(peer)).revision
    loaded = pytest.importorskip("sentence_transformers").SentenceTransformer(str(peer))
    expected = loaded.encode_query(["a"], normalize_embeddings=True)
    assert model.encode(["a"], "query") == pytest.approx(expected)


def test_a_peer_has_its_own_prompts_and_takes_an_instruction(peer: Path, collection: Collection) -> None:
    model = PeerModel(str(peer))

    def plain(text: str) -> object:
        return model._model.encode([text], prompt="", normalize_embeddings=True)

    instruct = "Instruct: Given a web search query, retrieve relevant passages\nQuery: "
    model._model.prompts = {
        "query": instruct,
        "SciFact-query": "claim: ",
        "document": "",
        "Retrieval-document": "text: ",
    }
    assert model.encode(["a"], "query", "scifact") == pytest.approx(plain("claim: a"))
    assert model.encode(["a"], "query", "nfcorpus") == pytest.approx(plain(f"{instruct}a"))
    assert model.encode(["a"], "document", "nfcorpus") == pytest.approx(plain("text: a"))
    asked = model.encode(["a"], "query", "nfcorpus", "Find proofs.")
    assert asked == pytest.approx(plain("Instruct: Find proofs.\nQuery: a")), "in the place of the task"
    asked = model.encode(["a"], "query", "scifact", "Find proofs.")
    assert asked == pytest.approx(plain("claim: a Find proofs.")), "no place in the prompt: it follows the text"
    own = {
        one: replace(query, text=f"{query.text} Only houses.", instruction="Only houses.")
        for one, query in (collection.queries.items())
    }
    instructed = replace(collection, queries=own)
    for choice, expected in (("own", "Only houses."), ("none", ""), ("Find it.", "Only houses.")):
        system = SentenceTransformersSystem(model, instruction=choice)
        requests = make_requests(instructed, instructed.qrels["test"])[:1]
        [ranking] = system.index(instructed).answer(requests, 40).rankings
        vector = model.encode([requests[0].bare], "query", "small", expected)[0]
        index = model.index(instructed)[0]
        assert ranking.best(40) == ranked(index, vector[None], requests, 40)[0], choice
    model._model.max_seq_length = 12
    assert SentenceTransformersSystem(model).index(collection).truncated_documents == sum(
        len(ids) > 12
        for ids in model._model.tokenizer([f"text: {text}" for text in collection.texts().values()])["input_ids"]
    )


def test_a_peer_takes_device_precision_and_revision(
    peer: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    args = ["evaluate", "-c", collection_path, "--out", tmp_path / "out", *QUICK]
    args += ["--baselines", f"sentence-transformers:{peer}", "--device", "cpu"]
    assert call(monkeypatch, *args, "--dtype", "bfloat16") == 0
    assert call(monkeypatch, *args) == 0
    results = load_results(tmp_path / "out" / "results")
    assert {result.system.settings["dtype"] for result in results} == {"bfloat16", "float32"}
    weights = PeerModel(str(peer), device="cpu", dtype="bfloat16")._model.parameters()
    assert {str(weight.dtype) for weight in weights} == {"torch.bfloat16"}
    assert call(monkeypatch, *args[:-3], f"sentence-transformers:{peer}@main") == 2
    assert "is no model of the hub and has no revision 'main'" in capsys.readouterr().err
    assert call(monkeypatch, *args[:-1], "no-device") == 2
    assert "device 'no-device' cannot be used here" in capsys.readouterr().err


def test_what_a_model_wrote_is_searched_with_and_without_the_query(
    run_dir: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["evaluate", "-m", run_dir / "model", "-c", collection_path, "--out", tmp_path / "out", *QUICK]
    args += ["--modes", "reason", "--baselines", "bm25+reasoning", "bm25+query+reasoning", "--queries", 5, "--runs"]
    assert call(monkeypatch, *args) == 0
    by_name = {result.system.name: result for result in load_results(tmp_path / "out" / "results")}
    assert set(by_name) == {"reason", "bm25+reasoning", "bm25+query+reasoning"}
    reason, both = by_name["reason"], by_name["bm25+query+reasoning"]
    collection = small_collection()
    texts = {
        one: f"{query} {written}"
        for one, query, written in zip(reason.query_ids, reason.queries, reason.reasoning, strict=True)
    }
    options = EvaluationOptions(latency_queries=0, bootstrap=100, queries=5)
    assert both.per_query == evaluate(BM25System("x", texts, "x"), collection, "test", options).per_query
    assert both.key != by_name["bm25+reasoning"].key
    assert both.cost.tokens_per_query == reason.cost.tokens_per_query
    runs = sorted(path.name.split(".")[2] for path in (tmp_path / "out" / "runs").glob("*.run"))
    assert runs == ["bm25+query+reasoning", "bm25+reasoning", "reason"]
    assert [path.name for path in (tmp_path / "out" / "runs").glob("*.qrels")] == ["small.test.sample-5-0.qrels"]


def test_two_systems_of_one_name_are_refused(
    peer: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(peer, tmp_path / "exported")
    both = [f"sentence-transformers:{path}" for path in (peer, tmp_path / "exported")]
    args = ["evaluate", "-c", collection_path, "--baselines", *both, "--out", tmp_path / "out"]
    assert call(monkeypatch, *args) == 2
    assert "two systems are called 'exported'" in capsys.readouterr().err


def test_report_shows_the_last_state_of_a_collection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    args = ["evaluate", "-c", tmp_path / "small", "--baselines", "bm25", "--out", tmp_path / "e", *QUICK]
    small_collection().save(tmp_path / "small")
    assert call(monkeypatch, *args) == 0
    with (tmp_path / "small" / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "new", "title": "", "text": "a lamp"}\n')
    assert call(monkeypatch, *args) == 0
    assert len(load_results(tmp_path / "e" / "results")) == 2, "the old result stays"
    assert call(monkeypatch, "report", tmp_path / "e", "--out", tmp_path / "page") == 0
    last = [row["key"] for row in json.loads((tmp_path / "e" / "summary.json").read_text())["rows"]]
    page = (tmp_path / "page" / "report.html").read_text()
    assert [result.key in page for result in load_results(tmp_path / "e" / "results")].count(True) == 1
    assert last[0] in page


def test_report_gathers_runs(
    run_dir: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert (
        call(monkeypatch, "evaluate", "-c", collection_path, "--baselines", "bm25", "--out", tmp_path / "e", *QUICK)
        == 0
    )
    out = tmp_path / "page"
    assert call(monkeypatch, "report", run_dir, tmp_path / "e", "--out", out, "--permutations", 100) == 0
    page = (out / "report.html").read_text()
    assert "reason/rl" in page and "bm25 (e)" in page, "of two systems of one name the second bears that of its run"
    assert (out / "plots").is_dir()
    assert call(monkeypatch, "report", run_dir, "--out", out) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert call(monkeypatch, "report", collection_path, "--out", tmp_path / "n") == 2
    assert "give a folder that quickstart or evaluate wrote" in capsys.readouterr().err
    assert not (tmp_path / "n").exists()


def test_mteb_runs_on_a_folder_and_names_the_nearest_task(
    run_dir: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("mteb")
    args = ["mteb", "--model", run_dir / "model", "--out", tmp_path / "mteb"]
    assert call(monkeypatch, *args, "--tasks", "SciFakt", collection_path) == 2
    assert "'SciFakt' is neither a suite nor a task of mteb; nearest: SciFact" in capsys.readouterr().err
    assert call(monkeypatch, *args, "--tasks", "SciFact", "--splits", "train") == 2
    assert "--splits is for folders" in capsys.readouterr().err
    assert call(monkeypatch, *args, "--tasks", collection_path, "--modes", "direct", "reason") == 0
    out = capsys.readouterr().out
    report = json.loads((run_dir / "report.json").read_text())["rows"]
    for mode in ("direct", "reason"):
        assert f"{report[f'{mode}/rl']['ndcg@10']:.4f}" in out, "the same number from both commands"
    names = {path.relative_to(tmp_path / "mteb" / "results").parts[0] for path in tmp_path.rglob("small-*.json")}
    assert names == {"local__tiny-direct", "local__tiny-reason"}


def test_a_folder_in_no_known_layout_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "data.csv").write_text("a,b\n1,2\n")
    assert call(monkeypatch, "evaluate", "-c", tmp_path / "odd", "--baselines", "bm25", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert f"{tmp_path / 'odd'} is no collection: expected corpus.jsonl, queries.jsonl and qrels/*.tsv (BEIR)" in error
