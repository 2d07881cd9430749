"""Mode auto: who thinks, what it costs, and that a gate stays with the model that it was fitted to."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from search_r3 import SearchR3
from search_r3.cli.common import ModeName
from search_r3.errors import DataError, ModelError
from search_r3.model.engine.decoding import Decoder
from search_r3.model.modes import auto
from search_r3.model.modes.gate import Gate, read_gate, score_features, worth
from search_r3.model.prompts import MODES
from search_r3.publishing.hub import _leftovers, check_files
from search_r3.retrieval.index import ExactIndex
from tests.conftest import COLOURS, THINGS
from tests.gates import gate_for, of_scores

TEXTS = [f"where is the {colour} {thing}?" for colour in COLOURS[:3] for thing in THINGS[:4]]


@pytest.fixture
def gated(model: SearchR3) -> SearchR3:
    model.backbone.gate = gate_for(model, TEXTS)
    return model


def test_commands_know_all_modes() -> None:
    assert [one.value for one in ModeName] == [*MODES]


def test_each_query_has_the_vector_of_the_mode_that_its_gate_chose(gated: SearchR3) -> None:
    direct, reason = gated.encode_query(TEXTS, "direct"), gated.encode_query(TEXTS, "reason", max_new_tokens=6)
    auto = gated.encode_query(TEXTS, "auto", max_new_tokens=6)
    assert sum(auto.thought) == len(TEXTS) // 2
    assert not any(direct.thought) and all(reason.thought)
    for row, thinks in enumerate(auto.thought):
        one = reason if thinks else direct
        assert np.abs(auto.vectors[row] - one.vectors[row]).max() < 1e-5
        assert auto.reasoning[row] == one.reasoning[row] and auto.reasoning_tokens[row] == one.reasoning_tokens[row]
        assert (auto.gate[row]["probability"] > 0.5) == thinks
        assert set(auto.gate[row]) == {"probability", "bias", "vector"} and direct.gate[row] == {}


def test_vectors_are_the_same_alone_and_in_company(gated: SearchR3) -> None:
    together = gated.encode_query(TEXTS, "auto", max_new_tokens=6)
    for row, text in enumerate(TEXTS):
        alone = gated.encode_query([text], "auto", max_new_tokens=6)
        assert alone.thought == [together.thought[row]] and alone.reasoning == [together.reasoning[row]]
        assert np.abs(alone.vectors[0] - together.vectors[row]).max() < 1e-5
        *pieces, streamed = gated.stream_query(text, "auto", max_new_tokens=6)
        assert "".join(map(str, pieces)) == streamed.reasoning[0] == alone.reasoning[0]
        assert streamed.thought == alone.thought and streamed.gate == alone.gate
        assert np.abs(streamed.vectors - alone.vectors).max() < 1e-5


def test_only_those_that_think_are_decoded(gated: SearchR3, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    run = Decoder.run
    monkeypatch.setattr(
        Decoder, "run", lambda self, requests, *rest: decoded.extend(requests) or run(self, requests, *rest)
    )
    auto = gated.encode_query(TEXTS, "auto", max_new_tokens=3)
    assert len(decoded) == sum(auto.thought)
    gated.encode_query(TEXTS, "auto", price=1e9)
    assert len(decoded) == sum(auto.thought)


def test_a_price_lets_fewer_think_and_a_low_one_all(gated: SearchR3) -> None:
    counts = [sum(gated.encode_query(TEXTS, "auto", max_new_tokens=2, price=price).thought) for price in (-1, 0.001, 1)]
    assert counts == [len(TEXTS), len(TEXTS) // 2, 0]
    assert worth(np.array([0.4, 0.6]), gain=1.0, loss=-1.0, tokens=10.0).tolist() == [False, True]
    assert worth(np.array([0.4, 0.6]), gain=1.0, loss=-1.0, tokens=10.0, more=0.021).tolist() == [False, False]


def test_with_documents_at_hand_their_scores_decide(model: SearchR3) -> None:
    model.backbone.gate = gate_for(model, TEXTS, of_scores(model.dimension, margin=-1e6, top=1.0))
    texts = ["red house", "red boat"]
    vectors = model.encode_query(texts, "direct").vectors
    other = np.linalg.qr(np.vstack([vectors, np.eye(model.dimension)[:3]]).T)[0].T[2:]
    # The first query has two documents alike, the second one far ahead.
    index = ExactIndex(["a", "b", "c"], np.vstack([vectors[0], vectors[0], other[0]]).astype(np.float32))
    auto = model.encode_query(texts[:1], "auto", top_scores=index.top_scores, max_new_tokens=2)
    assert auto.thought == [True] and set(auto.gate[0]) == {"probability", "bias", "vector", "margin", "top"}
    index = ExactIndex(["a", "b"], np.vstack([vectors[0], other[0]]).astype(np.float32))
    assert model.encode_query(texts[:1], "auto", top_scores=index.top_scores, max_new_tokens=2).thought == [False]


def test_features_of_scores() -> None:
    scores = np.array([[0.9, 0.7, 0.5], [0.4, 0.4, 0.4]], dtype=np.float32)
    features = score_features(scores)
    np.testing.assert_allclose(features["top"], [0.9, 0.4], atol=1e-6)
    np.testing.assert_allclose(features["margin"], [0.2, 0.0], atol=1e-6)
    np.testing.assert_allclose(features["depth"], [0.4, 0.0], atol=1e-6)
    assert features["entropy"][0] < 0.2 and features["entropy"][1] == pytest.approx(1.0)
    assert {name: values.tolist() for name, values in score_features(scores[:1, :1]).items()} == {
        "top": [pytest.approx(0.9)], "margin": [0.0], "depth": [0.0], "entropy": [0.0],
    }  # fmt: skip


def test_fewer_dimensions_change_no_decision(gated: SearchR3) -> None:
    whole = gated.encode_query(TEXTS, "auto", max_new_tokens=2)
    short = gated.encode_query(TEXTS, "auto", max_new_tokens=2, truncate_dim=8)
    assert short.thought == whole.thought and short.shape == (len(TEXTS), 8)
    np.testing.assert_allclose(np.linalg.norm(short.vectors, axis=1), 1.0, atol=1e-6)


def test_facts_of_auto_travel_with_their_rows(gated: SearchR3) -> None:
    auto = gated.encode_query(TEXTS, "auto", max_new_tokens=2)
    for other in (auto[[2, 0]], pickle.loads(pickle.dumps(auto))[[2, 0]], copy.deepcopy(auto)[[2, 0]]):
        assert other.thought == [auto.thought[2], auto.thought[0]] and other.gate == [auto.gate[2], auto.gate[0]]


def test_a_model_without_a_gate_says_how_to_fit_one(model: SearchR3) -> None:
    for ask in (model.encode_query, lambda *args: list(model.stream_query(args[0][0], args[1]))):
        with pytest.raises(ModelError, match=r"has no gate.*search-r3 gate .*qwen2 --collection"):
            ask(TEXTS, "auto")
    with pytest.raises(DataError, match="expected one of direct, reason, latent, auto"):
        model.encode_query(TEXTS, "think")


def test_what_is_no_directory_gets_a_gate_in_a_copy(model: SearchR3) -> None:
    elsewhere = SearchR3(replace(model.backbone, source="smol"))
    with pytest.raises(ModelError, match="search-r3 gate smol --collection COLLECTION --splits SPLIT --out FOLDER"):
        elsewhere.encode_query(TEXTS, "auto")
    in_llama = SearchR3(replace(model.backbone, engine="llama.cpp"))
    with pytest.raises(ModelError, match=r"that llama.cpp computes has none; load it without backend"):
        auto.gate_of(in_llama.backbone)


def test_a_gate_is_saved_and_copied_with_its_model_and_changes_no_revision(gated: SearchR3, tmp_path: Path) -> None:
    gated.save_pretrained(tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", tmp_path / "copied")
    loaded = SearchR3(tmp_path / "copied", device="cpu")
    assert loaded.backbone.gate == gated.backbone.gate == read_gate(tmp_path / "copied")
    assert loaded.encode_query(TEXTS, "auto", max_new_tokens=2).thought.count(True) == len(TEXTS) // 2
    files = check_files(tmp_path / "saved")
    assert "gate.json" in files and _leftovers(["gate.json"], {}) == ["gate.json"], "that of another model has to go"
    revision = loaded.backbone.revision
    (tmp_path / "copied" / "gate.json").unlink()
    assert SearchR3(tmp_path / "copied", device="cpu").backbone.revision == revision


def test_a_gate_of_other_weights_is_left_out(gated: SearchR3, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gated.save_pretrained(tmp_path / "model")
    gate = json.loads((tmp_path / "model" / "gate.json").read_text())
    turned = gate | {"probe": gate["probe"][::-1]}
    (tmp_path / "model" / "gate.json").write_text(json.dumps(turned))
    with caplog.at_level(logging.WARNING):
        assert SearchR3(tmp_path / "model", device="cpu").backbone.gate is None
    assert "was fitted to other weights or prompts" in caplog.text
    for frame, kept in (([*gate["reason_frame"], 7], False), ([], True), (gate["reason_frame"], True)):
        (tmp_path / "model" / "gate.json").write_text(json.dumps(gate | {"reason_frame": frame}))
        assert (SearchR3(tmp_path / "model", device="cpu").backbone.gate is not None) is kept
    (tmp_path / "model" / "gate.json").write_text(json.dumps(gate | {"price": "much"}))
    with pytest.raises(ModelError, match=r"gate.json: not usable as a gate"):
        SearchR3(tmp_path / "model", device="cpu")


def test_a_gate_is_numbers_in_json(gated: SearchR3, tmp_path: Path) -> None:
    assert gated.backbone.gate is not None
    gated.backbone.gate.save(tmp_path)
    assert Gate.model_validate(json.loads((tmp_path / "gate.json").read_text())) == gated.backbone.gate
    assert not list(tmp_path.glob(".*"))
