"""`search-r3 gate`, and what then takes `--mode auto`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from search_r3 import SearchR3
from search_r3.data.collection import Collection
from search_r3.evaluation.results import load_results
from search_r3.model.modes.gate import Gate
from search_r3.training.modes import gate as fitting
from tests.conftest import call
from tests.gates import gate_for


@pytest.fixture
def folder(run_dir: Path, tmp_path: Path) -> Path:
    shutil.copytree(run_dir / "model", tmp_path / "model")
    return tmp_path / "model"


def test_a_gate_is_fitted_used_and_measured(
    folder: Path,
    collection_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    asked = ["search", folder, "red house", "--collection", collection_path, "--mode", "auto"]
    assert call(monkeypatch, *asked) == 2
    assert "search-r3 gate" in capsys.readouterr().err
    monkeypatch.setattr(fitting, "FOLDS", 2)
    fit = ["gate", folder, "--collection", collection_path, "--splits", "train", "dev", "--price", "0"]
    assert call(monkeypatch, *fit, "--measure", "ndcg@1000") == 0
    shown = capsys.readouterr().out
    assert "calibration" in shown and "30 queries" in shown and "AUC" in shown
    gate = json.loads((folder / "gate.json").read_text())
    assert gate["price"] == 0 and gate["fitted"]["queries"] == 30 and len(gate["by_vector"]["vector"]) == 32
    assert call(monkeypatch, *fit, "--measure", "ndcg@1000", "--json") == 0
    assert json.loads(capsys.readouterr().out)["fitted"]["by_scores"].keys() >= {
        "auc",
        "brier",
        "bins",
        "share",
        "gain",
    }

    assert call(monkeypatch, *asked, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["thought"] is (answer["reasoning_tokens"] > 0) or not answer["reasoning"]
    assert set(answer["gate"]) == {"probability", "bias", "vector", "top", "margin", "depth", "entropy"}

    out = tmp_path / "out"
    args = ["evaluate", "--model", folder, "--collections", collection_path, "--splits", "test", "--out", out]
    args += ["--frontier", "--budgets", 2, 4, "--samples", 2, "--bootstrap", 100, "--permutations", 100]
    assert call(monkeypatch, *args, "--latency-queries", 1) == 0
    shown = capsys.readouterr().out
    assert "frontier: small, test" in shown and "oracle" in shown
    names = {result.system.name for result in load_results(out / "results")}
    assert names == {"direct", "reason", "auto", "reason 2 tokens", "reason 4 tokens", "reason mean of 2"}
    assert json.loads((out / "frontier.json").read_text())["splits"][0]["points"]
    assert call(monkeypatch, "report", out, "--out", tmp_path / "page") == 0
    assert "What thinking is worth" in (tmp_path / "page" / "report.html").read_text()


def test_queries_of_dev_and_test_are_left_out_of_other_splits(
    folder: Path, collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned = {**collection.qrels["train"], **collection.qrels["dev"]}
    replace(collection, qrels={**collection.qrels, "train": learned}).save(tmp_path / "leaky")
    (tmp_path / "own.yaml").write_text("evaluation: {dev_split: none, test_split: test}\n")
    learned_from = []

    def fit_gate(model: SearchR3, labelled: fitting.Labelled, *more: object) -> Gate:
        learned_from.append(set(labelled.query_ids))
        return gate_for(model, ["red house", "a boat"])

    monkeypatch.setattr(fitting, "fit_gate", fit_gate)
    for more in ([], ["--recipe", tmp_path / "own.yaml"]):
        assert call(monkeypatch, "gate", folder, "--collection", tmp_path / "leaky", "--json", *more) == 0
    assert learned_from == [{*collection.qrels["train"]}, {*learned}]


def test_training_on_drops_the_gate(
    folder: Path, collection_path: Path, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SearchR3(folder, device="cpu")
    gate_for(model, ["red house", "a boat"]).save(folder)
    assert SearchR3(folder, device="cpu").backbone.gate is not None
    for frozen in ("moving", "frozen"):
        out = tmp_path / frozen
        args = ["grpo", "--model", folder, f"run_dir={out}", f"collection={collection_path}", "grpo.steps=1"]
        args += ["grpo.queries_per_step=2", "grpo.group_size=2", "grpo.splits=[train]", "grpo.evaluate_every=0"]
        args += ["max_length=120", "max_new_tokens=16", f"grpo.documents={frozen}"]
        assert call(monkeypatch, *args) == 0
        assert not list(out.rglob("gate.json"))


def test_a_gate_needs_a_place(
    collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert call(monkeypatch, "gate", "builtin", "--collection", collection_path) == 2
    assert "give --out" in capsys.readouterr().err
    assert call(monkeypatch, "evaluate", "--budgets", 3) == 2
    assert "add it" in capsys.readouterr().err
    assert call(monkeypatch, "evaluate", "--baselines", "bm25", "--frontier") == 2
    assert "add --model" in capsys.readouterr().err
