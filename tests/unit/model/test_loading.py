"""What a model is loaded from, and what is refused: one clear line, no code, no pickle, one commit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import typer
from conftest import call, save_tiny, tiny_model
from hub_server import Hub, Repository, reached_hub
from model_folders import make_adapter
from safetensors.torch import load_file, save_file

from search_r3 import SearchR3
from search_r3.cli import app
from search_r3.config import LoRASettings
from search_r3.errors import ConfigError, ModelError
from search_r3.files import hash_file, hash_folder, write_json
from search_r3.model.adapters import add_adapters, merge_adapters, save_adapters
from search_r3.model.loading import load_backbone
from search_r3.model.precision import torch_dtype
from search_r3.model.prompts import PROMPT_SETS
from search_r3.model.source import find_files, peer_files

TEXT = "where is the red house?"


@pytest.fixture
def base(tmp_path: Path, tiny_path: Path) -> Path:
    return Path(shutil.copytree(tiny_path, tmp_path / "base"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with reached_hub(monkeypatch, tmp_path) as hub:
        yield hub


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def vector(model: Any) -> Any:
    return SearchR3(model, device="cpu").encode_query([TEXT], mode="direct").vectors[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("auto", torch.float32),
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
        ("float32", torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_dtype_has_several_names(base: Path, name: Any, expected: torch.dtype) -> None:
    assert load_backbone(base, dtype=name, device="cpu").model.dtype == expected


def test_auto_is_bfloat16_where_cuda_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for supported, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, answer=supported: answer)
        assert torch_dtype("auto", torch.device("cuda")) == expected


def test_unknown_dtypes_and_devices_are_named_with_what_is_taken(base: Path) -> None:
    for wrong in ("int8", torch.int64, "half"):
        with pytest.raises(ConfigError, match=r"unknown dtype .*; take auto, float32, bfloat16, float16, fp32"):
            SearchR3(base, dtype=wrong)
    for wrong in ("gpu", "cuda:99"):
        with pytest.raises(ConfigError, match=f"device '{wrong}' cannot be used here .*; give cpu, cuda"):
            SearchR3(base, device=wrong)


def test_code_that_a_model_brings_is_neither_run_nor_asked_about(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = base.parent / "it-ran"
    (base / "own.py").write_text(f"open({str(mark)!r}, 'w').write('yes')\n")
    own = {"AutoConfig": "own.A", "AutoModelForCausalLM": "own.B", "AutoTokenizer": ["own.C", "own.C"]}
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    rewrite(base / "tokenizer_config.json", auto_map=own, tokenizer_class="C")
    rewrite(base / "config.json", auto_map=own)
    assert load_backbone(base).dimension == 32, "of an architecture that transformers has, its own code is run"
    rewrite(base / "config.json", model_type="own")
    with pytest.raises(ModelError, match=r"it needs code of its own \(auto_map .*no code of a model is run") as caught:
        load_backbone(base)
    assert not mark.exists() and "\n" not in str(caught.value)


def test_pickles_are_refused_with_what_to_do(base: Path, tiny_path: Path, tmp_path: Path) -> None:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"as a pickle \(pytorch_model.bin\); only safetensors .*save_pretrained"):
        load_backbone(base)
    with pytest.raises(ModelError, match="is a pickle, which can run code"):
        peer_files(str(base))
    adapter = make_adapter(tmp_path / "adapter", tiny_path)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"as a pickle \(adapter_model.bin\)"):
        load_backbone(adapter)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", POINTER, "model.safetensors is a pointer of Git LFS, .*git lfs pull"),
        ("tokenizer.json", POINTER, "tokenizer.json is a pointer of Git LFS"),
        ("config.json", POINTER, "config.json is a pointer of Git LFS"),
        ("model.safetensors", b"", "model.safetensors is empty; fetch or copy it again"),
        ("model.safetensors", None, "model.safetensors is damaged or not whole .*; fetch or copy it again"),
        ("config.json", b"{", "config.json is not valid JSON .*; fetch or save the model again"),
        ("tokenizer.json", b"{", "cannot load a tokenizer from"),
    ],
)
def test_damaged_files_are_named_with_the_remedy(base: Path, name: str, content: bytes | None, message: str) -> None:
    """None: the first half of the file."""
    whole = (base / name).read_bytes()
    (base / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ModelError, match=message):
        load_backbone(base)


def test_weights_that_do_not_fit_their_configuration_are_one_error(base: Path) -> None:
    whole = load_file(base / "model.safetensors")
    save_file(whole, base / "part.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(whole, "part.safetensors") | {"x": "lost.safetensors"}}
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks lost.safetensors, a part of its weights that"):
        load_backbone(base)
    del index["weight_map"]["x"]
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_backbone(base).dimension == 32
    rewrite(base / "config.json", vocab_size=999)
    with pytest.raises(ModelError, match=r"other shapes than its config.json says .*fetch or copy them again"):
        load_backbone(base)


@pytest.mark.parametrize("method", ["awq", "bitsandbytes"])
def test_a_quantised_model_without_its_library_names_the_library(base: Path, method: str) -> None:
    config = {"quant_method": method, "bits": 4, "group_size": 128, "load_in_4bit": method == "bitsandbytes"}
    rewrite(base / "config.json", quantization_config=config)
    with pytest.raises(ModelError, match=r"cannot load a causal LM from .* requires (gptqmodel|bitsandbytes)"):
        load_backbone(base)


def test_arguments_for_transformers_are_handed_on_but_none_that_would_load_code(base: Path) -> None:
    backbone = load_backbone(
        base, model_kwargs={"attn_implementation": "eager"}, tokenizer_kwargs={"padding_side": "left"}
    )
    assert backbone.model.config._attn_implementation == "eager" and backbone.tokenizer.padding_side == "left"
    for name in ("model_kwargs", "tokenizer_kwargs"):
        with pytest.raises(ConfigError, match=f"{name} may not hold 'trust_remote_code'"):
            load_backbone(base, **{name: {"trust_remote_code": True}})


def test_a_model_that_is_placed_already_is_not_moved(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `.to` of quantised weights fails, and of weights on several devices undoes their map."""
    monkeypatch.setattr(torch.nn.Module, "to", lambda *_, **__: pytest.fail("it was moved"))
    assert load_backbone(base, model_kwargs={"device_map": {"": "cpu"}}, device="cpu").dimension == 32


def test_only_a_model_that_a_stage_trained_counts_as_one(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = SearchR3(base)
    assert not model.backbone.trained and "its vectors mean nothing before stage 1" in caplog.text
    model.save_pretrained(tmp_path / "saved")
    assert not load_backbone(tmp_path / "saved").trained, "its tokenizer has the embed token, but nobody trained it"
    caplog.clear()
    load_backbone(base)
    assert not caplog.text, "training loads bases, and that is no matter for a warning"
    rewrite(tmp_path / "saved" / "search_r3.json", trained=True)
    assert SearchR3(tmp_path / "saved").backbone.trained and not caplog.text


def test_an_untrained_model_searches_only_when_told_so(
    base: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for command in (["search", base, TEXT, "--mode", "direct"], ["encode", base, tmp_path / "index"]):
        assert call(monkeypatch, *command, "-c", collection_path) == 2
        shown = " ".join(capsys.readouterr().err.split())
        assert "no stage has trained" in shown and "or add --untrained" in shown
        assert call(monkeypatch, *command, "-c", collection_path, "--untrained") == 0
        assert "WARNING" not in capsys.readouterr().err


def test_every_command_that_loads_a_model_has_the_same_options() -> None:
    top = typer.main.get_command(app).commands
    commands = [
        top["data"].commands["mine"],
        *(top[name] for name in ("encode", "search", "export", "evaluate", "mteb")),
    ]
    shared = ["--device", "--dtype", "--revision", "--prompts", "--max-length", "--max-new-tokens"]
    helps = [{name: param.help for param in command.params for name in param.opts} for command in commands]
    assert all({name: helps[0][name] for name in shared}.items() <= one.items() for one in helps)


def test_the_options_reach_the_model(
    base: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    options = ["--dtype", "bf16", "--max-length", "60", "--max-new-tokens", "3", "--prompts", "published"]
    least = ["--permutations", "100", "--bootstrap", "100", "--modes", "direct", "--out", tmp_path / "out"]
    assert call(monkeypatch, "evaluate", "-m", base, "-c", collection_path, *least, *options) == 0
    [path] = (tmp_path / "out" / "results").glob("*.json")
    settings = json.loads(path.read_text())["system"]["settings"]
    assert (settings["dtype"], settings["max_length"], settings["max_new_tokens"]) == ("bfloat16", 60, 3)
    assert settings["prompts"] == PROMPT_SETS["published"].model_dump()
    assert call(monkeypatch, "export", base, tmp_path / "exported", "--dtype", "int8") == 2
    assert "unknown dtype 'int8'" in capsys.readouterr().err


def test_adapters_are_a_state_of_their_base_too(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    revision = load_backbone(adapter).revision
    assert revision == f"{hash_folder(adapter)}+{hash_folder(base)}"
    weights = load_file(base / "model.safetensors")
    save_file({name: value * 1.5 for name, value in weights.items()}, base / "model.safetensors", {"format": "pt"})
    assert load_backbone(adapter).revision != revision


def test_adapters_are_merged_into_their_base(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    loaded = SearchR3(adapter, device="cpu")
    assert not hasattr(loaded.backbone.model, "peft_config")
    loaded.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").is_file() and not np.array_equal(vector(adapter), vector(base))
    assert np.abs(vector(tmp_path / "whole") - vector(adapter)).max() < 1e-6
    add_adapters(loaded.backbone, LoRASettings(rank=2))
    save_adapters(loaded.backbone, loaded.backbone.model.state_dict(), tmp_path / "second")
    with pytest.raises(ModelError, match=r"adapter, the base of the adapters in .*second, holds adapters too"):
        load_backbone(tmp_path / "second")
    merged = merge_adapters(loaded.backbone, tmp_path / "second", "float32")
    assert np.abs(SearchR3(merged).encode_document([TEXT])[0] - loaded.encode_document([TEXT])[0]).max() < 1e-6


def test_adapters_without_a_trained_embed_token_are_refused_or_said_to_be_untrained(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    weights = load_file(adapter / "adapter_model.safetensors")
    plain = {
        name: value for name, value in weights.items() if "token_adapter" not in name and "embed_tokens" not in name
    }
    assert len(plain) < len(weights)
    save_file(plain, adapter / "adapter_model.safetensors", {"format": "pt"})
    rewrite(adapter / "adapter_config.json", trainable_token_indices=None)
    with pytest.raises(ModelError, match=r"hold no row of <\|embed_token\|>, and their base .* has none"):
        load_backbone(adapter)
    for name in ("tokenizer.json", "tokenizer_config.json", "search_r3.json"):
        (adapter / name).unlink(missing_ok=True)
    assert not load_backbone(adapter).trained


def test_a_model_of_the_hub_is_one_commit(hub: Hub, base: Path, tokenizer: Any, tmp_path: Path) -> None:
    repository = hub.repositories["o/m"] = Repository()
    extra = {"onnx/config.json": b"{", "own.py": b"raise SystemExit", "pytorch_model.bin": b"pickle"}
    first = repository.commit("main", files_of(base) | extra)
    fetched = load_backbone("o/m", device="cpu")
    assert fetched.revision == first and fetched.source == "o/m" and fetched.files is not None
    resolved = {path.split("/")[4] for _, path in hub.requests if "/resolve/" in path}
    assert resolved == {first}, "every file was asked for by its commit"
    assert not {"own.py", "pytorch_model.bin", "onnx"} & {path.name for path in fetched.files.folder.iterdir()}
    before = vector("o/m")
    assert np.array_equal(before, vector(base))

    other = save_tiny(tmp_path / "other", tokenizer, "llama")
    second = repository.commit("main", files_of(other))
    assert load_backbone("o/m").revision == second
    assert np.array_equal(vector("o/m"), vector(other))
    assert load_backbone("o/m", revision=first).revision == first
    hub.close()
    assert load_backbone("o/m", local_files_only=True).revision == second


def test_adapters_of_the_hub_bring_their_base_of_its_commit(hub: Hub, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    expected = vector(adapter)
    base_commit = hub.repositories.setdefault("o/base", Repository()).commit("main", files_of(base))
    rewrite(adapter / "adapter_config.json", base_model_name_or_path="o/base", revision=base_commit)
    commit = hub.repositories.setdefault("o/adapter", Repository()).commit("main", files_of(adapter))
    newer = {name: content for name, content in files_of(base).items() if name != "model.safetensors"}
    hub.repositories["o/base"].commit("main", newer)
    assert load_backbone("o/adapter").revision == f"{commit}+{base_commit}"
    assert np.abs(vector("o/adapter") - expected).max() < 1e-6


def test_adapters_remember_the_commit_that_they_were_put_into(hub: Hub, base: Path, tmp_path: Path) -> None:
    repository = hub.repositories["o/base"] = Repository()
    commit = repository.commit("main", files_of(base))
    backbone = load_backbone("o/base", device="cpu")
    add_adapters(backbone, LoRASettings(rank=2))
    save_adapters(backbone, backbone.model.state_dict(), tmp_path / "adapter")
    repository.commit("main", {"config.json": b"{}"})
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("o/base", commit)
    assert load_backbone(tmp_path / "adapter").revision.endswith(f"+{commit}")
    merged = merge_adapters(backbone, tmp_path / "adapter", "float32")
    assert not hasattr(merged.model, "peft_config") and merged.dimension == 32


def test_what_is_not_on_the_hub_is_one_line(hub: Hub, base: Path) -> None:
    hub.repositories["o/m"] = Repository()
    hub.repositories["o/m"].commit("main", {"config.json": (base / "config.json").read_bytes()})
    cases = [
        ("o/none", {}, "the hub shows no such model; check the name"),
        ("o/m", {"revision": "v9"}, "o/m has no revision 'v9'"),
        ("o/m", {}, "o/m has no model.safetensors; only safetensors are loaded"),
        ("o/m/file.gguf", {}, "o/m holds no file.gguf"),
        ("a model/x", {}, "no model directory at a model/x, and it is no hub id"),
        ("model", {"revision": "main"}, "the hub shows no such model; check the name"),
        ("a/b/c", {}, "no model directory at a/b/c"),
        ("./x.gguf", {}, "no model directory at ./x.gguf"),
        (str(base), {"revision": "main"}, "is no model of the hub and has no revision 'main'"),
    ]
    for source, options, message in cases:
        with pytest.raises(ModelError, match=message) as caught:
            find_files(source, **options)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nothing", "a model", "here/model", "./a/b", "~/a", "a/b/c", "a/", "..", "C:\\a"])
def test_a_path_that_is_not_there_asks_no_hub(hub: Hub, base: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (base / "here").mkdir()
    (base / "config.json").unlink()
    monkeypatch.chdir(base)
    monkeypatch.setenv("HOME", str(base))
    with pytest.raises(ModelError, match="no model directory") as caught:
        find_files(name)
    assert hub.requests == [] and "\n" not in str(caught.value)


def test_a_path_that_is_nearly_one_says_where_the_model_is(
    base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(base.parent))
    assert find_files("~/base").folder == base
    with pytest.raises(
        ModelError, match=r"model.safetensors is a file and no GGUF file; give the directory that holds"
    ):
        find_files(base / "model.safetensors")
    shutil.copytree(base, tmp_path / "run" / "sft" / "model")
    with pytest.raises(ModelError, match=r"config.json is missing; there is a model in .*run/sft/model$"):
        find_files(tmp_path / "run")
    shutil.copytree(base, tmp_path / "run" / "model")
    with pytest.raises(ModelError, match=r"there is a model in .*run/model$"):
        find_files(tmp_path / "run")


def write_gguf(path: Path, tokenizer: Any, chat_template: str | None) -> Any:
    """A tiny Qwen2 in a GGUF file; returns the model."""
    gguf = pytest.importorskip("gguf")
    model = tiny_model("qwen2", tokenizer)
    config, vocabulary = model.config, tokenizer.backend_tokenizer
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([vocabulary.id_to_token(number) for number in range(len(tokenizer))])
    special = set(tokenizer.all_special_ids)
    writer.add_token_types([3 if number in special else 1 for number in range(len(tokenizer))])
    merges = json.loads(vocabulary.to_str())["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            stem, _, kind = name.rpartition(".")
            writer.add_tensor(f"{names.get_name(stem)}.{kind}", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_gguf_file_is_a_model_and_is_saved_as_safetensors(tokenizer: Any, tmp_path: Path, hub: Hub) -> None:
    path = tmp_path / "tiny.gguf"
    model = write_gguf(path, tokenizer, tokenizer.chat_template)
    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    loaded = SearchR3(path, device="cpu")
    expected = vector(tmp_path / "plain")
    assert np.abs(loaded.encode_query([TEXT], mode="direct").vectors[0] - expected).max() < 1e-6
    backbone = loaded.backbone
    assert backbone.revision == hash_file(path) and backbone.tokenizer.eos_token == tokenizer.eos_token
    write_json(tmp_path / "search_r3.json", backbone.settings.model_dump())
    assert load_backbone(path).revision != hash_file(path), "the prompts beside it are a part of the model"
    assert backbone.tokenizer.chat_template == tokenizer.chat_template and not backbone.trained
    assert backbone.model.config.tie_word_embeddings

    loaded.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert np.abs(vector(tmp_path / "saved") - expected).max() < 1e-6

    add_adapters(backbone, LoRASettings(rank=2))
    save_adapters(backbone, backbone.model.state_dict(), tmp_path / "adapter")
    assert np.abs(vector(tmp_path / "adapter") - expected).max() < 1e-6, "new adapters change nothing"

    hub.repositories["o/m"] = Repository()
    hub.repositories["o/m"].commit("main", {"q/tiny.gguf": path.read_bytes(), "q/other.gguf": b"not fetched"})
    fetched = load_backbone("o/m/q/tiny.gguf")
    assert fetched.revision == hash_file(path) and fetched.source == "o/m/q/tiny.gguf"
    assert fetched.files is not None and [one.name for one in fetched.files.folder.iterdir()] == ["tiny.gguf"]


def test_a_base_without_a_chat_template_takes_a_given_one_and_keeps_it(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "base.gguf"
    write_gguf(path, tokenizer, None)
    with monkeypatch.context() as patch:
        patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)  # no weights are read for an error
        with pytest.raises(ModelError, match=r"no chat template; .*tokenizer_kwargs=\{'chat_template': TEXT\}"):
            load_backbone(path)
    template = (Path(__file__).parents[2] / "templates" / "gemma-3.jinja").read_text(encoding="utf-8")
    given = SearchR3(path, device="cpu", tokenizer_kwargs={"chat_template": template})
    prompt = given.backbone.tokenizer.decode(given.backbone.prompt_encoder.encode(TEXT, "direct").ids)
    assert f"{TEXT}<end_of_turn>" in prompt and prompt.count("<start_of_turn>") == 2
    given.save_pretrained(tmp_path / "saved")
    again = load_backbone(tmp_path / "saved", device="cpu")
    assert again.settings.frames == given.backbone.settings.frames
    assert again.tokenizer.chat_template == template


def test_a_damaged_gguf_file_is_one_error(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tokenizer, tokenizer.chat_template)
    whole = path.read_bytes()
    for content in (POINTER, whole[: len(whole) // 2], b"GGML" + whole[4:]):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=r"pointer of Git LFS|cannot load a"):
            load_backbone(path)


def test_the_packages_own_base_has_no_path_of_this_machine(tmp_path: Path) -> None:
    loaded = load_backbone("builtin")
    add_adapters(loaded, LoRASettings(rank=2))
    assert loaded.source == "builtin"
    save_adapters(loaded, loaded.model.state_dict(), tmp_path / "adapter")
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "builtin"
    )
    assert find_files(tmp_path / "adapter").base == find_files("builtin")
