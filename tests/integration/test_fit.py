"""One command from a file of pairs to a trained model, through the command line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from search_r3.config import load_recipe
from search_r3.data.collection import Collection
from search_r3.evaluation.results import load_results
from search_r3.training.run import Run
from tests.conftest import call, small_collection

SETTINGS = [
    "max_length=120", "max_new_tokens=16", "save_every=50", "sft.steps=100", "sft.learning_rate=1e-2",
    "sft.batch_size=8", "lora.rank=0", "grpo.steps=2", "grpo.queries_per_step=2", "grpo.group_size=3",
    "grpo.evaluate_every=0", "evaluation.permutations=100", "evaluation.bootstrap=100",
]  # fmt: skip


def write_pairs(path: Path, **more: Any) -> Path:
    documents = small_collection().documents.values()
    rows = [{"anchor": f"where is the {one.title}?", "text": one.text, **more} for one in documents]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> tuple[Path, Path]:
    """A file of pairs, and the folder of both stages on it."""
    folder = tmp_path_factory.mktemp("fit")
    pairs = write_pairs(folder / "pairs.jsonl", reasoning="A thing.")
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, "fit", pairs, "--out", folder / "run", "--rl", f"base={tiny_path}", *SETTINGS) == 0
    return pairs, folder / "run"


def test_it_leaves_a_collection_models_results_and_the_next_command(
    fitted: tuple[Path, Path],
    tiny_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pairs, run = fitted
    collection = Collection.load(run / "collection")
    assert {name: len(qrels) for name, qrels in collection.qrels.items()} == {"train": 25, "rl": 11, "dev": 4}
    mined = [collection.queries[one].metadata.get("negatives") for one in collection.split("train")]
    assert all(mined) and not (run / "collection.cache").exists()
    results = {result.system.name: result.scores["ndcg@10"] for result in load_results(run / "results")}
    assert set(results) == {"bm25", "direct/base", "direct/sft", "direct/rl", "reason/sft", "reason/rl"}
    assert results["direct/sft"] > results["direct/base"]
    again = ("fit", pairs, "--out", run, "--rl", f"base={tiny_path}", *SETTINGS)
    assert call(monkeypatch, *again) == 2
    assert "holds the stage 'sft' already; add --resume" in " ".join(capsys.readouterr().err.split())
    assert call(monkeypatch, *again, "--resume") == 0
    out = capsys.readouterr().out
    assert "40 rows (query: anchor; document: text; reasoning: reasoning)" in out
    assert "40 documents; queries: train 25, rl 11, dev 4" in out
    settings = load_recipe(run / "settings.yaml")
    assert (settings.sft.splits, settings.grpo.splits) == ({"train": 1.0}, ("rl",)), "stage 2 asks what is new"
    assert "direct/base" in out and "reason/rl" in out
    *_, last = out.strip().splitlines()
    assert last.startswith("Next: ")
    words = shlex.split(last.removeprefix("Next: "))[1:]
    assert words[:2] == ["search", str(run / "model")]
    assert call(monkeypatch, *words) == 0


def test_other_pairs_do_not_go_on_in_the_same_folder(
    fitted: tuple[Path, Path],
    tiny_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = fitted[1]
    other = write_pairs(tmp_path / "pairs.jsonl", reasoning="Another thing.")
    options = ("--out", run, "--rl", "--resume", f"base={tiny_path}", *SETTINGS)
    assert call(monkeypatch, "fit", other, *options) == 2
    assert f"was made of other pairs, columns or shares ({fitted[0]}," in " ".join(capsys.readouterr().err.split())
    assert call(monkeypatch, "fit", fitted[0], *[one for one in options if one != "--rl"]) == 2
    assert "grpo.splits is ('train',) now but ('rl',)" in " ".join(capsys.readouterr().err.split())


def test_without_a_recipe_the_settings_suit_the_pairs_and_a_recipe_decides_all(
    tmp_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Any] = []

    def stop(recipe: Any, **options: Any) -> None:
        trained.append(recipe)
        raise SystemExit(3)

    monkeypatch.setattr("search_r3.training.sft.train_sft", stop)
    pairs = write_pairs(tmp_path / "pairs.jsonl", negative="A thing of no colour.")
    assert call(monkeypatch, "fit", pairs, "--out", tmp_path / "a b", f"base={tiny_path}", "sft.batch_size=4") == 3
    assert (trained[0].name, trained[0].sft.steps, trained[0].sft.batch_size) == ("a b", 100, 4)
    assert (trained[0].lora.rank, trained[0].sft.splits, trained[0].grpo.splits) == (16, {"train": 1.0}, ("train",))
    assert trained[0] == load_recipe(tmp_path / "a b" / "settings.yaml")
    queries = Collection.load(tmp_path / "a b" / "collection").queries.values()
    assert {tuple(query.metadata["negatives"]) for query in queries} == {("d2",)}, "its own, and none is mined"
    (tmp_path / "mine.yaml").write_text("sft: {steps: 7}\n")
    call(monkeypatch, "fit", pairs, "--out", tmp_path / "run", "--recipe", tmp_path / "mine.yaml", "grpo.group_size=3")
    assert (trained[1].sft.steps, trained[1].sft.batch_size, trained[1].lora.rank) == (7, 24, 0)
    assert (trained[1].run_dir, trained[1].sft.splits) == (str(tmp_path / "run"), {"train": 1.0})


def test_what_cannot_be_used_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs, out = write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "run"
    for words, message in (
        ([tmp_path / "no.jsonl"], "no file at"),
        ([pairs, "run_dir=elsewhere"], "run_dir cannot be set here"),
        ([pairs, "sft.splits={dev: 1}"], "sft.splits cannot be set here"),
        ([pairs, "--column", "query"], "--column query: expected FIELD=COLUMN"),
        ([pairs, "--column", "query=q"], "no column 'q'; it has 'anchor', 'text'"),
        ([pairs, "sft.step=3"], "unknown setting 'sft.step'"),
        ([pairs, "base=models/typo"], "no model directory at models/typo"),
        ([pairs, "--rl", "grpo.queries_per_step=99"], "grpo.queries_per_step=99, but 11 of the queries are kept"),
    ):
        assert call(monkeypatch, "fit", *words, "--out", out) == 2
        assert message in " ".join(capsys.readouterr().err.split())
        assert not out.exists()
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert call(monkeypatch, "fit", pairs, "--out", out) == 2
    assert "exists and holds no run; give another --out" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_a_run_that_was_stopped_goes_on_and_says_what_the_lack_of_traces_means(
    tmp_path: Path,
    tiny_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from search_r3.mining import mining

    pairs, save = write_pairs(tmp_path / "pairs.jsonl"), mining.replace

    def stop(*args: Any, **options: Any) -> None:
        raise SystemExit(3)

    words = ("fit", pairs, "--out", tmp_path / "run", f"base={tiny_path}", *SETTINGS, "sft.steps=2")
    monkeypatch.setattr(mining, "replace", stop)
    assert call(monkeypatch, *words) == 3
    assert not (tmp_path / "run" / "collection").exists()
    monkeypatch.setattr(mining, "replace", save)
    assert call(monkeypatch, *words, "--resume") == 0
    run = Run(load_recipe(tmp_path / "run" / "settings.yaml"))
    assert run.finished("sft") and len(run.metrics("sft")) == 2
    assert "has a reasoning trace: reason mode learns to embed at once" in caplog.text
    assert "reason mode is not measured: " in capsys.readouterr().err, "two steps do not teach it"
    assert [result.system.name for result in load_results(tmp_path / "run" / "results")]


def test_the_python_that_the_page_shows_runs(tmp_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text().partition("## From Python")[2]
    code = page.partition("```python\n")[2].partition("```")[0]
    for shown, small in (
        ('"base": "builtin"', f'"base": "{tiny_path}", "max_length": 120, "max_new_tokens": 16'),
        ('"steps": 200, "evaluate_every": 50', '"steps": 120, "evaluate_every": 120, "learning_rate": 1e-2'),
        ('"steps": 40', '"steps": 2, "queries_per_step": 2, "group_size": 3'),
    ):
        assert shown in code
        code = code.replace(shown, small)
    monkeypatch.chdir(tmp_path)
    write_pairs(Path("pairs.jsonl"), reasoning="A thing.")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["model"].backbone.trained and names["result"].model_path == Path("runs/mine/model")
