"""The fingerprint: it names what differs in documents, and what encodes queries is no part of it."""

from __future__ import annotations

import base64
import copy
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from search_r3.errors import StoreError
from search_r3.model.backbone import Backbone
from search_r3.model.encoder import SearchR3
from search_r3.model.loading import load_backbone
from search_r3.serving import Fingerprint, Store
from tests.stores import fingerprint, vector


@pytest.fixture(scope="module")
def path(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has the row of the embed token."""
    folder = tmp_path_factory.mktemp("made") / "model"
    SearchR3(tiny_path, device="cpu").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(path: Path) -> Fingerprint:
    return Fingerprint.of(SearchR3(path, device="cpu"))


@pytest.mark.parametrize(
    ("options", "instruction", "difference"),
    [
        ({"max_length": 100}, "", "max_length=128, not max_length=100"),
        ({"truncate_dim": 16}, "", "vectors of size 32, not vectors of size 16"),
        ({}, "Find it.", "the document instruction '', not the document instruction 'Find it.'"),
        ({"prompts": "published"}, "", "other token ids around a document"),
    ],
)
def test_what_changes_document_vectors_is_named(
    made: Fingerprint, path: Path, options: dict[str, Any], instruction: str, difference: str
) -> None:
    assert made.difference(Fingerprint.of(SearchR3(path, **options), instruction)) == difference


def test_what_encodes_queries_and_where_a_model_lies_change_nothing(
    made: Fingerprint, path: Path, tmp_path: Path
) -> None:
    again = SearchR3(path)
    again.save_pretrained(tmp_path / "copy")
    assert made.difference(Fingerprint.of(SearchR3(tmp_path / "copy"))) is None
    documents = load_backbone(path)
    queries: Backbone = replace(documents, model=copy.deepcopy(documents.model), documents=documents)
    for parameter in queries.model.parameters():
        parameter.data += 0.1
    other = SearchR3(queries)
    assert not np.allclose(
        other.encode_query("x", "direct").vectors, again.encode_query("x", "direct").vectors, atol=1e-3
    )
    assert made.difference(Fingerprint.of(other)) is None


def test_one_changed_weight_is_another_model_and_other_precision_is_not(made: Fingerprint, path: Path) -> None:
    model = SearchR3(path)
    narrow = Fingerprint.of(SearchR3(path, dtype="bfloat16"))
    assert narrow.backend != made.backend and narrow.weights == made.weights
    assert made.difference(narrow) is None
    assert made.difference(Fingerprint.of(SearchR3(path, dtype="float16"))) is None
    model.backbone.model.get_input_embeddings().weight.data[5, 5] += 0.5
    difference = made.difference(Fingerprint.of(model))
    assert difference is not None and difference.startswith("other weights of documents (")
    assert made.difference(Fingerprint.of(SearchR3(model.backbone))) is not None


def test_the_same_weights_in_another_configuration_are_another_model(
    made: Fingerprint, path: Path, tmp_path: Path
) -> None:
    SearchR3(path).save_pretrained(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 10.0}))
    other = Fingerprint.of(SearchR3(tmp_path / "other"))
    assert other.weights == made.weights and other.backend == made.backend
    assert "the same weights in another configuration" in str(made.difference(other))


def test_a_single_number_counts_as_other_weights_do(made: Fingerprint, path: Path) -> None:
    model = SearchR3(path)
    layer = model.backbone.causal_lm.base_model.layers[0]
    layer.register_buffer("scale", torch.tensor(1.0))  # as quantised layers have them
    one = Fingerprint.of(model)
    layer.scale += 1
    assert len({one.weights, Fingerprint.of(model).weights, made.weights}) == 3


def test_the_output_layer_is_no_part_of_it(made: Fingerprint, path: Path) -> None:
    model = SearchR3(path)
    layer = model.backbone.model.get_output_embeddings()
    own = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
    model.backbone.model.set_output_embeddings(own)
    assert made.difference(Fingerprint.of(model)) is None


def test_vectors_that_another_precision_moved_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    moved = vector("probe") + 0.1 * vector("other")
    probe = base64.b64encode((moved / np.linalg.norm(moved)).astype("<f4").tobytes()).decode()
    with caplog.at_level(logging.WARNING):
        assert fingerprint().difference(fingerprint(backend="bfloat16 on cuda, fast", probe=probe)) is None
    assert "float32 on cpu, fast, now it is bfloat16 on cuda" in caplog.text
    caplog.clear()
    assert fingerprint().difference(fingerprint(backend="bfloat16 on cuda, fast")) is None
    assert not caplog.records


def test_other_weights_of_another_precision_are_told_by_the_vector_of_a_text() -> None:
    other = {"backend": "float16 on cpu, fast", "weights": "1" * 64}
    assert fingerprint().difference(fingerprint(**other)) is None
    probe = base64.b64encode(vector("other").tobytes()).decode()
    assert "other weights" in str(fingerprint().difference(fingerprint(**other, probe=probe)))
    assert "other weights" in str(fingerprint().difference(fingerprint(weights="1" * 64)))


def test_the_same_weights_may_stand_in_two_files_of_llama_cpp() -> None:
    mine, other = {"backend": "llama.cpp"}, {"backend": "llama.cpp", "weights": "1" * 64}
    assert fingerprint(**mine).difference(fingerprint(**other)) is None
    moved = vector("probe") + 0.01 * vector("other")
    probe = base64.b64encode((moved / np.linalg.norm(moved)).astype("<f4").tobytes()).decode()
    assert "other weights" in str(fingerprint(**mine).difference(fingerprint(**other, probe=probe)))


def test_a_store_refuses_another_model_by_name(tmp_path: Path) -> None:
    pytest.importorskip("lancedb")
    Store.create(tmp_path / "s", fingerprint())
    Store.open(tmp_path / "s", fingerprint())
    with pytest.raises(StoreError, match=r"vectors of another model: other weights of documents \(hashes, not theirs"):
        Store.open(tmp_path / "s", fingerprint(model="theirs", weights="1" * 64))
