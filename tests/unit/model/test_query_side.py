"""A folder of adapters whose queries have adapters of their own, over the weights that encode documents."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from search_r3 import SearchR3
from search_r3.errors import ModelError
from search_r3.files import hash_folder
from search_r3.model import loading
from search_r3.model.engine.packed import PackedLinear, can_pack
from search_r3.model.source import find_files
from search_r3.publishing.card import model_card
from search_r3.publishing.facts import gather_facts
from search_r3.publishing.hub import check_files
from search_r3.serving import Fingerprint
from tests.conftest import save_tiny
from tests.hub_server import Repository, reached_hub
from tests.model_folders import add_query_side, make_adapter

TEXTS = ["where is the red house?", "a blue boat", "the white chair"]


class Folders(NamedTuple):
    documents: Path
    """Adapters over a base."""
    pair: Path
    """The same, with a query side."""
    whole: Path
    """The same as whole weights with adapters for queries."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Folders:
    folder = tmp_path_factory.mktemp("sides")
    documents = make_adapter(folder / "documents", save_tiny(folder / "base", tokenizer, tied=True))
    whole = folder / "whole"
    SearchR3(documents, device="cpu").save_pretrained(whole)
    side = make_adapter(folder / "side", whole, seed=4)
    pair = shutil.copytree(documents, folder / "pair")
    return Folders(documents, add_query_side(pair, side), add_query_side(whole, side))


def test_documents_are_those_of_the_adapters_and_queries_those_of_the_pair(folders: Folders) -> None:
    before = hash_folder(folders.pair)
    documents, pair, whole = (SearchR3(one, device="cpu") for one in folders)
    assert hash_folder(folders.pair) == before, "a folder of the package may be read-only"
    np.testing.assert_array_equal(pair.encode_document(TEXTS), documents.encode_document(TEXTS))
    assert Fingerprint.of(documents).difference(Fingerprint.of(pair)) is None, "its stores stay valid"
    for mode in ("direct", "reason"):
        one, other = (model.encode_query(TEXTS, mode, max_new_tokens=8) for model in (pair, whole))
        assert one.reasoning == other.reasoning
        np.testing.assert_allclose(one.vectors, other.vectors, atol=1e-5)
        moved = one.vectors - documents.encode_query(TEXTS, mode, max_new_tokens=8).vectors
        assert np.abs(moved).max() > 1e-2
    shared = {id(one) for one in pair.backbone.model.parameters()}
    assert all(id(one) in shared for one in pair.backbone.document_side.model.parameters()), "no second copy of weights"


@pytest.mark.skipif(not can_pack(), reason="this machine's torch has no such products")
def test_both_sides_are_packed_for_a_cpu(folders: Folders, tmp_path: Path) -> None:
    documents, pair, whole = (SearchR3(one, device="cpu", dtype="float16") for one in folders)
    for side in (pair.backbone, pair.backbone.document_side):
        assert any(isinstance(module, PackedLinear) for module in side.model.modules())
    np.testing.assert_array_equal(pair.encode_document(TEXTS), documents.encode_document(TEXTS))
    vectors = pair.encode_query(TEXTS, "direct").vectors
    np.testing.assert_allclose(vectors, whole.encode_query(TEXTS, "direct").vectors, atol=2e-3)
    exact = SearchR3(folders.pair, device="cpu").encode_query(TEXTS, "direct").vectors
    np.testing.assert_allclose(vectors, exact, atol=2e-3)
    pair.save_pretrained(tmp_path / "saved")
    names = {path.relative_to(tmp_path / "saved").as_posix() for path in (tmp_path / "saved").rglob("*.safetensors")}
    assert names == {"model.safetensors", "queries/model.safetensors"}, "which need no peft"
    saved = SearchR3(tmp_path / "saved", device="cpu", dtype="float16")
    np.testing.assert_array_equal(saved.encode_document(TEXTS), pair.encode_document(TEXTS))
    np.testing.assert_array_equal(saved.encode_query(TEXTS, "direct").vectors, vectors)


def test_it_is_saved_as_whole_weights_with_adapters_for_queries(folders: Folders, tmp_path: Path) -> None:
    pair = SearchR3(folders.pair, device="cpu")
    pair.save_pretrained(tmp_path / "saved")
    names = {path.relative_to(tmp_path / "saved").as_posix() for path in (tmp_path / "saved").rglob("*.safetensors")}
    assert names == {"model.safetensors", "queries/adapter_model.safetensors"}
    saved = SearchR3(tmp_path / "saved", device="cpu")
    np.testing.assert_array_equal(saved.encode_document(TEXTS), pair.encode_document(TEXTS))
    np.testing.assert_array_equal(
        saved.encode_query(TEXTS, "direct").vectors, pair.encode_query(TEXTS, "direct").vectors
    )
    assert str(folders.pair) not in (tmp_path / "saved" / "queries" / "adapter_config.json").read_text()


def test_its_revision_names_both_sides_and_the_base(folders: Folders, tmp_path: Path) -> None:
    own, _, base = find_files(folders.pair).revision.partition("+")
    one, _, same = find_files(folders.documents).revision.partition("+")
    assert base == same and own != one
    other = shutil.copytree(folders.pair, tmp_path / "other")
    weights = load_file(other / "queries" / "adapter_model.safetensors")
    save_file({name: value + 0.1 for name, value in weights.items()}, other / "queries" / "adapter_model.safetensors")
    assert find_files(other).revision != find_files(folders.pair).revision


def test_it_goes_to_the_hub_and_back(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = check_files(folders.pair)
    assert {"adapter_model.safetensors", "queries/adapter_model.safetensors"} <= files.keys()
    card = model_card(gather_facts(folders.pair), "o/m")
    assert "an index of that side stays valid" in card and "over that one" in card
    with reached_hub(monkeypatch, tmp_path) as hub:
        repository = hub.repositories["o/m"] = Repository()
        commit = repository.commit("main", {name: path.read_bytes() for name, path in files.items()})
        fetched = SearchR3("o/m", device="cpu")
    assert fetched.backbone.revision.partition("+")[0] == commit
    local = SearchR3(folders.pair, device="cpu")
    np.testing.assert_array_equal(fetched.encode_document(TEXTS), local.encode_document(TEXTS))
    np.testing.assert_array_equal(*(model.encode_query(TEXTS, "direct").vectors for model in (fetched, local)))


def test_a_query_side_that_is_missing_or_damaged_is_one_error(folders: Folders, tmp_path: Path) -> None:
    broken = shutil.copytree(folders.pair, tmp_path / "broken")
    weights = broken / "queries" / "adapter_model.safetensors"
    whole = load_file(weights)
    save_file({name: value for name, value in whole.items() if "layers.1" not in name}, weights)
    with pytest.raises(ModelError, match=r"broken/queries lacks \d+ weights"):
        SearchR3(broken)
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ModelError, match=r"queries/adapter_model\.safetensors is damaged or not whole"):
        SearchR3(broken)
    weights.unlink()
    with pytest.raises(ModelError, match=r"queries has no adapter_model\.safetensors"):
        SearchR3(broken)
    shutil.rmtree(broken / "queries")
    message = r"other weights than documents \(search_r3\.json\), but these are missing: .*queries/adapter_config\.json"
    with pytest.raises(ModelError, match=message) as caught:
        SearchR3(broken)
    assert "\n" not in str(caught.value)


def test_adapters_over_adapters_need_a_base_that_is_not_quantised(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = loading.load_causal_lm

    def quantised(*arguments: Any) -> Any:
        model, missing = load(*arguments)
        model.quantization_method = "some"
        return model, missing

    monkeypatch.setattr(loading, "load_causal_lm", quantised)
    with pytest.raises(ModelError, match="into quantised weights none are merged; take the base as it is"):
        SearchR3(folders.pair, device="cpu")


def test_settings_that_name_no_query_side_leave_the_folder_alone(folders: Folders, tmp_path: Path) -> None:
    alone = shutil.copytree(folders.pair, tmp_path / "alone")
    settings = json.loads((alone / "search_r3.json").read_text())
    del settings["queries"]
    (alone / "search_r3.json").write_text(json.dumps(settings))
    assert SearchR3(alone, device="cpu").backbone.documents is None
