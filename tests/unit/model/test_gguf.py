"""GGUF files: what is written, read by gguf and by transformers; and that the file alone is the model again."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import call, save_model, save_tiny, tiny_model
from hub_server import Repository, reached_hub
from tokenizers import AddedToken, pre_tokenizers

from search_r3 import SearchR3
from search_r3.config import LoRASettings
from search_r3.errors import ConfigError, ModelError
from search_r3.files import hash_file
from search_r3.model.adapters import add_adapters
from search_r3.model.backbone import Backbone
from search_r3.model.engine.packed import can_pack
from search_r3.model.llamacpp.vocabulary import vocabulary_of
from search_r3.model.llamacpp.writing import export_gguf
from search_r3.model.loading import load_backbone
from search_r3.model.prompts import EMBED_TOKEN

gguf = pytest.importorskip("gguf")

TEXTS = [
    "where is the red house?",
    "1984 and 日本語 🙂",
    f"<|im_end|> {EMBED_TOKEN} <think>",
    "cafe\u0301's  house\n\n .?!",
    "red house " * 60,
]


@pytest.fixture(scope="module")
def thinking(tokenizer: Any) -> Any:
    """With an added token that is not special, as Qwen3's."""
    own = copy.deepcopy(tokenizer)
    own.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    return own


@pytest.fixture
def saved(tmp_path: Path, thinking: Any) -> Path:
    return save_tiny(tmp_path / "model", thinking, spare_rows=16)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors."""
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {one.name: one for one in reader.tensors}


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_file_alone_is_the_model_again(tmp_path: Path, thinking: Any, kind: str, tied: bool) -> None:
    folder = save_tiny(tmp_path / "model", thinking, kind, tied=tied, spare_rows=16)
    original = SearchR3(folder, device="cpu", max_length=100, max_new_tokens=12, prompts="published")
    (tmp_path / "alone").mkdir()
    [path] = export_gguf(original.backbone, tmp_path / "alone" / "model.gguf", "f32")
    again = SearchR3(path, device="cpu")
    assert again.backbone.settings == original.backbone.settings
    assert again.backbone.tokenizer.chat_template == thinking.chat_template
    for text in TEXTS:
        for mode in ("direct", "reason", "document"):
            ids = original.backbone.prompt_encoder.encode(text, mode).ids
            assert again.backbone.prompt_encoder.encode(text, mode).ids == ids, (text, mode)
    for mode in ("direct", "reason"):
        expected, result = original.encode_query(TEXTS, mode), again.encode_query(TEXTS, mode)
        assert result.reasoning == expected.reasoning
        np.testing.assert_allclose(result, expected, atol=1e-5)
    np.testing.assert_allclose(again.encode_document(TEXTS), original.encode_document(TEXTS), atol=1e-5)
    assert again.backbone.revision == hash_file(path)
    assert [one.name for one in (tmp_path / "alone").iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_own_loader_computes_the_same_logits(tmp_path: Path, thinking: Any, kind: str, tied: bool) -> None:
    backbone = load_backbone(save_tiny(tmp_path / "model", thinking, kind, tied=tied), device="cpu")
    [path] = export_gguf(backbone, tmp_path / "model.gguf", "f32")
    own = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype="float32")
    ids = torch.tensor([[*range(40), backbone.embed_token_id]])
    with torch.no_grad():
        torch.testing.assert_close(own(input_ids=ids).logits, backbone.model(input_ids=ids).logits, atol=1e-4, rtol=0)


@pytest.mark.skipif(not can_pack(), reason="this machine's torch has no such products")
@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_model_is_written_as_its_float16_weights(tmp_path: Path, thinking: Any, tied: bool) -> None:
    folder = save_tiny(tmp_path / "model", thinking, tied=tied, spare_rows=16)
    written = [
        export_gguf(load_backbone(folder, device="cpu", dtype=dtype), tmp_path / f"{dtype}.gguf", "f16")[0]
        for dtype in ("float32", "float16")
    ]
    expected, found = (read(path)[1] for path in written)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name].data, tensor.data, rtol=1e-3, atol=1e-5)


def test_what_llama_cpp_reads_is_there(saved: Path, tmp_path: Path) -> None:
    backbone = load_backbone(saved, device="cpu")
    [path] = export_gguf(backbone, tmp_path / "model.gguf")
    values, tensors = read(path)
    rows = backbone.model.get_input_embeddings().weight.shape[0]
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == rows == values["qwen2.vocab_size"] == tensors["token_embd.weight"].shape[1]
    place, think = backbone.embed_token_id, tokens.index("<think>")
    assert (tokens[place], types[place], types[think]) == (EMBED_TOKEN, 3, 4)
    assert (tokens[-1], types[-1]) == (f"[PAD{rows - 1}]", 5) and len(set(tokens)) == rows
    assert types[tokens.index("e")] == 1
    eos = backbone.tokenizer.eos_token_id
    assert values["tokenizer.ggml.eos_token_id"] == values["tokenizer.ggml.eot_token_id"] == eos
    assert (values["tokenizer.ggml.model"], values["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")
    assert values["tokenizer.ggml.add_bos_token"] is False
    assert values["tokenizer.chat_template"] == backbone.tokenizer.chat_template
    merge = values["tokenizer.ggml.merges"][0].split(" ")
    assert len(merge) == 2 and "".join(merge) in tokens
    record = json.loads(values["search_r3.settings"])
    assert record["trained"] is False and record["frames"]["direct"]["reply"][-1] == place
    assert "output.weight" not in tensors, "the tied table is written once"
    assert values["qwen2.context_length"] == 256 and values["qwen2.attention.head_count_kv"] == 2


def test_matrices_are_stored_as_asked_and_numbers_in_vectors_whole(saved: Path, tmp_path: Path) -> None:
    model = SearchR3(saved, device="cpu")
    expected, sizes = model.encode_document(TEXTS), {}
    for kind, cosine in {"f32": 1 - 1e-6, "f16": 0.99999, "bf16": 0.999, "q8_0": 0.999}.items():
        [path] = export_gguf(model.backbone, tmp_path / f"{kind}.gguf", kind)
        _, tensors = read(path)
        assert {one.tensor_type.name for one in tensors.values() if len(one.shape) > 1} == {kind.upper()}
        assert {one.tensor_type.name for one in tensors.values() if len(one.shape) == 1} == {"F32"}
        sizes[kind] = sum(one.n_bytes for one in tensors.values())
        vectors = SearchR3(path, device="cpu").encode_document(TEXTS)
        assert (vectors * expected).sum(1).min() >= cosine, kind
    assert sizes["q8_0"] < 0.6 * sizes["f16"] < 0.4 * sizes["f32"]


def test_a_saved_file_is_trained_if_the_model_was_and_keeps_its_mode(saved: Path, tmp_path: Path) -> None:
    backbone = load_backbone(saved, device="cpu")
    backbone.settings = backbone.settings.model_copy(update={"trained": True, "mode": "direct"})
    [path] = export_gguf(backbone, tmp_path / "model.gguf", "f32")
    again = load_backbone(path, device="cpu")
    assert again.trained and again.settings.mode == "direct"
    again.save(tmp_path / "saved")
    assert load_backbone(tmp_path / "saved", device="cpu").trained


def test_a_file_holds_no_gate_and_so_no_mode_auto(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = load_backbone(saved, device="cpu")
    backbone.settings = backbone.settings.model_copy(update={"trained": True, "mode": "auto"})
    [path] = export_gguf(backbone, tmp_path / "model.gguf", "f32")
    assert load_backbone(path, device="cpu").settings.mode == "reason" and "holds no gate" in caplog.text


def two_sides(folder: Path) -> Backbone:
    """Queries with adapters, documents as they were."""
    documents, queries = load_backbone(folder, device="cpu"), load_backbone(folder, device="cpu")
    torch.manual_seed(2)
    add_adapters(queries, LoRASettings(rank=2))
    for name, one in queries.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(one.data, std=0.3)
    return replace(queries, documents=documents)


def test_a_model_with_frozen_documents_gives_two_files_which_are_one_model(saved: Path, tmp_path: Path) -> None:
    backbone = two_sides(saved)
    model = SearchR3(backbone)
    files = export_gguf(backbone, tmp_path / "out" / "model.gguf", "f32")
    assert [file.name for file in files] == ["model.gguf", "model.queries.gguf"]
    again = SearchR3(files[0], device="cpu")
    assert again.backbone.documents is not None
    np.testing.assert_allclose(again.encode_document(TEXTS), model.encode_document(TEXTS), atol=1e-5)
    queries = model.encode_query(TEXTS, "direct")
    np.testing.assert_allclose(again.encode_query(TEXTS, "direct"), queries, atol=1e-5)
    assert np.abs(model.encode_query(TEXTS, "direct") - SearchR3(saved).encode_query(TEXTS, "direct")).max() > 1e-2
    assert again.backbone.revision == "+".join(map(hash_file, files))
    files[1].unlink()
    with pytest.raises(ModelError, match=r"model\.queries\.gguf.* is missing"):
        SearchR3(files[0])


def test_both_files_are_fetched_from_the_hub(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = export_gguf(two_sides(saved), tmp_path / "model.gguf")
    with reached_hub(monkeypatch, tmp_path / "hub") as hub:
        hub.repositories["o/m"] = Repository()
        hub.repositories["o/m"].commit("main", {file.name: file.read_bytes() for file in files})
        fetched = load_backbone("o/m/model.gguf", device="cpu")
    assert fetched.documents is not None and fetched.revision == "+".join(map(hash_file, files))


def other_layers(backbone: Backbone, **changes: Any) -> Backbone:
    model = copy.deepcopy(backbone.model)
    for name, value in changes.items():
        setattr(model.config, name, value)
    return replace(backbone, model=model)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "gemma3_text"}, r"architecture gemma3_text, and GGUF files are written of llama, qwen2, qwen3"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rotary positions of another"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "windows of attention"),
        ({"hidden_act": "gelu"}, "activation gelu"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    saved: Path, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    backbone = load_backbone(saved, device="cpu")
    with pytest.raises(ModelError, match=match):
        export_gguf(other_layers(backbone, **changes), tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_tokenizers_and_other_weights_are_refused_and_leave_nothing(saved: Path, tmp_path: Path) -> None:
    backbone = load_backbone(saved, device="cpu")
    tokenizer = copy.deepcopy(backbone.tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ModelError, match=r"splits texts in another way.* gpt-2, smollm, qwen2, llama-bpe"):
        export_gguf(replace(backbone, tokenizer=tokenizer), tmp_path / "model.gguf")
    odd = copy.deepcopy(backbone.model)
    odd.model.layers[0].mlp.register_parameter("gate", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(ModelError, match=r"has the weight model\.layers\.0\.mlp\.gate"):
        export_gguf(replace(backbone, model=odd), tmp_path / "model.gguf")
    large = copy.deepcopy(backbone.model)
    large.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e5
    with pytest.raises(
        ModelError, match=r"blk\.1\.ffn_up\.weight holds 1e\+05, beyond what f16 can hold .*; take bf16"
    ):
        export_gguf(replace(backbone, model=large), tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("steps", "split"),
    [
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)], "smollm"),
    ],
)
def test_how_texts_are_split_has_llama_cpps_name(thinking: Any, steps: list[Any], split: str) -> None:
    own = copy.deepcopy(thinking)
    own.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    assert vocabulary_of(own, len(own), "it").split == split
    with pytest.raises(ModelError, match=r"it: the token .* and the table 100 rows"):
        vocabulary_of(own, 100, "it")


def test_unmerged_adapters_other_names_and_what_is_there_are_refused(saved: Path, tmp_path: Path) -> None:
    backbone = load_backbone(saved, device="cpu")
    path = tmp_path / "model.gguf"
    with pytest.raises(ConfigError, match=r"model\.bin does not end with \.gguf"):
        export_gguf(backbone, tmp_path / "model.bin")
    with pytest.raises(ConfigError, match=r"expected f32, f16, bf16, q8_0"):
        export_gguf(backbone, path, "q4_k")  # type: ignore[arg-type]
    path.write_text("mine")
    with pytest.raises(ConfigError, match=r"model\.gguf exists; nothing is overwritten"):
        export_gguf(backbone, path)
    assert path.read_text() == "mine"
    path.unlink()
    (tmp_path / "model.queries.gguf").write_text("mine")
    with pytest.raises(ConfigError, match=r"model\.queries\.gguf exists"):
        export_gguf(two_sides(saved), path)
    add_adapters(backbone, LoRASettings(rank=2))
    with pytest.raises(ModelError, match="unmerged adapters"):
        export_gguf(backbone, path)
    assert not path.exists()


def test_adapters_are_merged_and_the_command_says_what_it_wrote(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from model_folders import make_adapter

    adapter = make_adapter(tmp_path / "adapter", saved)
    path = tmp_path / "out.gguf"
    assert call(monkeypatch, "export", adapter, path, "--gguf", "--type", "f32") == 0
    assert f"search-r3 search {path} --backend llama.cpp" in " ".join(capsys.readouterr().out.split())
    expected = SearchR3(adapter, device="cpu").encode_query(TEXTS, "direct")
    np.testing.assert_allclose(SearchR3(path, device="cpu").encode_query(TEXTS, "direct"), expected, atol=1e-5)
    for words in (["--type", "f16"], ["--gguf", "--weights", "float16"], ["--gguf"]):
        assert call(monkeypatch, "export", adapter, path, *words) == 2
        assert "exists; nothing is overwritten" in capsys.readouterr().err
    for words, said in ((["--type", "f16"], "add --gguf"), (["--gguf", "--weights", "float16"], "say --type")):
        assert call(monkeypatch, "export", adapter, tmp_path / "new.gguf", *words) == 2
        assert said in capsys.readouterr().err


def test_a_damaged_file_and_settings_of_another_version_are_one_error(saved: Path, tmp_path: Path) -> None:
    [path] = export_gguf(load_backbone(saved, device="cpu"), tmp_path / "model.gguf")
    whole = path.read_bytes()
    path.write_bytes(whole[:3000])
    with pytest.raises(ModelError, match=r"cannot load a model from .*model\.gguf"):
        load_backbone(path)
    path.write_bytes(whole.replace(b'"max_length"', b'"max_lenght"'))
    with pytest.raises(ModelError, match=r"model\.gguf: not usable as model settings"):
        load_backbone(path)


def test_a_model_beside_other_settings_keeps_its_own(saved: Path, tmp_path: Path) -> None:
    backbone = load_backbone(saved, device="cpu", max_length=90)
    [path] = export_gguf(backbone, tmp_path / "model.gguf", "f32")
    shutil.copy(
        save_model(tmp_path / "x", backbone.tokenizer, tiny_model("qwen2", backbone.tokenizer)) / "config.json",
        tmp_path,
    )
    (tmp_path / "search_r3.json").write_text(json.dumps({"max_length": 50, "template_arguments": {}}))
    assert load_backbone(path, device="cpu").settings.max_length == 90
