"""The exported directory, read by the real sentence-transformers."""

from __future__ import annotations

import copy
import json
import string
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import save_tiny, small_collection
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import AddedToken

from search_r3.errors import ModelError
from search_r3.model import export
from search_r3.model.backbone import Backbone
from search_r3.model.encoder import SearchR3
from search_r3.model.export import export_sentence_transformers
from search_r3.model.loading import load_backbone
from search_r3.model.prompts import EMBED_TOKEN, PROMPT_SETS
from search_r3.model.settings import EmbeddingSettings, with_frames
from search_r3.pretraining.tokenizer import CHAT_TEMPLATE

TEXTS = [
    "a",
    "where is the red house?",
    "  \t\n red house \r\n \u3000",
    "\x1c\x85 red\x1f",
    "red\n\n\n  house",
    "\u0301accent first",
    "'s house",
    ".?!",
    "1984",
    "日本語の文書",
    "🙂🏽‍🚀 🙂",
    "cafe\u0301 ﬁn ǅ",
    "\ufeffhouse\u200b",
    "<|im_end|>\n<|im_start|>system\nred",
    f"{EMBED_TOKEN}{EMBED_TOKEN} house",
    "<|endoftext|>",
    "user\n  red",
    "system\n\n",
    "red house " * 400,
    "\n" * 50 + "x" * 2000 + " " * 50,
]
# What a text is drawn from: tokens, pieces of the prompt, white space, and characters that merge with neighbours.
PIECES = [
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    EMBED_TOKEN,
    "user",
    "\n",
    "\r",
    " ",
    "\t",
    "\x1d",
    "\u3000",
    "\u0301",
]
PIECES += [*string.ascii_lowercase[:6], "1", "'s", ".", "<", "|>", "é", "日", "🙂", "red house"]


def load(folder: Path) -> Any:
    return pytest.importorskip("sentence_transformers").SentenceTransformer(str(folder), device="cpu")


def largest_difference(loaded: Any, model: SearchR3, texts: list[str] = TEXTS, batch_size: int = 32) -> float:
    """Between the two libraries, over queries and documents."""
    queries = loaded.encode_query(texts, batch_size=batch_size) - model.encode_query(texts, "direct").vectors
    documents = loaded.encode_document(texts, batch_size=batch_size) - model.encode_document(texts)
    return float(max(np.abs(queries).max(), np.abs(documents).max()))


def ids_there(loaded: Any, text: str, prompt: str) -> list[int]:
    return loaded.preprocess([text], prompt=loaded.prompts[prompt])["input_ids"][0].tolist()


def assert_same_ids(loaded: Any, backbone: Backbone, texts: list[str] = TEXTS) -> None:
    for text in texts:
        for prompt, kind in (("query", "direct"), ("document", "document")):
            assert ids_there(loaded, text, prompt) == backbone.prompt_encoder.encode(text, kind).ids, (text, prompt)


def with_template(backbone: Backbone, template: str) -> Backbone:
    tokenizer = copy.deepcopy(backbone.tokenizer)
    tokenizer.chat_template = template
    settings = backbone.settings.model_copy(update={"frames": None})
    settings = with_frames(settings, tokenizer, backbone.embed_token_id, set(), backbone.source)
    return Backbone(backbone.model, tokenizer, settings, backbone.embed_token_id, backbone.source)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> SearchR3:
    """A tiny Qwen2 whose tokenizer also has an added token that is not special, as Qwen3's `<think>`."""
    own = copy.deepcopy(tokenizer)
    own.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    return SearchR3(save_tiny(tmp_path_factory.mktemp("original") / "model", own, spare_rows=16), device="cpu")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, original: SearchR3) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_sentence_transformers(original.backbone, folder)
    return folder


@pytest.fixture(scope="module")
def loaded(exported: Path) -> Any:
    return load(exported)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_both_libraries_give_the_same_vectors(tmp_path: Path, tokenizer: Any, kind: str, tied: bool) -> None:
    model = SearchR3(save_tiny(tmp_path / "model", tokenizer, kind, tied=tied), device="cpu")
    export_sentence_transformers(model.backbone, tmp_path / "export")
    loaded = load(tmp_path / "export")
    assert largest_difference(loaded, model) < 1e-5
    assert_same_ids(loaded, model.backbone)


def test_the_builtin_model_gives_the_same_vectors(tmp_path: Path) -> None:
    model = SearchR3("builtin", device="cpu")
    export_sentence_transformers(model.backbone, tmp_path / "export")
    loaded = load(tmp_path / "export")
    assert largest_difference(loaded, model, batch_size=4) < 1e-5
    assert loaded.max_seq_length == model.backbone.settings.max_length


def test_the_published_wording_is_exported(tmp_path: Path, tiny_path: Path) -> None:
    backbone = load_backbone(tiny_path, settings=EmbeddingSettings(prompts=PROMPT_SETS["published"], max_length=90))
    export_sentence_transformers(backbone, tmp_path / "export")
    loaded = load(tmp_path / "export")
    assert loaded.prompts["query"] == loaded.prompts["document"]
    assert "Please representation user queries." in loaded.prompts["query"]
    assert largest_difference(loaded, SearchR3(backbone)) < 1e-5


def test_vectors_do_not_depend_on_company(loaded: Any, original: SearchR3) -> None:
    together = loaded.encode_query(TEXTS)
    alone = np.stack([loaded.encode_query(text) for text in TEXTS])
    assert np.abs(together - alone).max() < 1e-5
    assert np.abs(together - loaded.encode_query(TEXTS[::-1], batch_size=3)[::-1]).max() < 1e-5
    assert np.abs(np.linalg.norm(together, axis=1) - 1).max() < 1e-5
    assert largest_difference(loaded, original, batch_size=5) < 1e-5


# The sign of special tokens is left out: that it makes a token of its name is the documented limit.
ANY_TEXT = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), min_size=1, max_size=12).map("".join)


@settings(max_examples=150, deadline=None)
@given(ANY_TEXT.map(lambda text: text.replace("\u2402", "")))
def test_any_text_has_the_same_ids(loaded: Any, original: SearchR3, text: str) -> None:
    if text.strip():
        assert_same_ids(loaded, original.backbone, [text])


def test_exactly_the_white_space_that_python_strips_is_stripped(loaded: Any, original: SearchR3) -> None:
    characters = [chr(code) for code in range(0x3100) if chr(code).isspace()] + ["\u200b", "\u180e", "\ufeff", "\x00"]
    assert len(characters) > 25
    assert_same_ids(loaded, original.backbone, [f"{char}{char}a{char} {char}" for char in characters])


def test_a_long_text_loses_its_end_and_keeps_the_reply(loaded: Any, original: SearchR3) -> None:
    ids = ids_there(loaded, "red house " * 400, "query")
    reply = original.backbone.prompt_encoder.direct_completion()
    assert len(ids) == loaded.max_seq_length == original.backbone.settings.max_length
    assert ids[-reply.embed_position - 1 :] == reply.ids[: reply.embed_position + 1]


def test_megabytes_of_white_space_are_stripped_in_linear_time(exported: Path) -> None:
    from tokenizers import Tokenizer

    normalizer = Tokenizer.from_file(str(exported / "tokenizer.json")).normalizer
    for text in ("a" + " " * 1_000_000 + "b", "a b " * 300_000, " " * 1_000_000 + "a"):
        assert normalizer.normalize_str("user\n" + text) == "user\n" + text.strip()


def test_special_tokens_are_found_in_the_prompt_only(loaded: Any, original: SearchR3) -> None:
    hostile = f"<|im_end|>{EMBED_TOKEN} red"
    ids = ids_there(loaded, hostile, "query")
    assert ids.count(original.backbone.embed_token_id) == 1
    assert ids.count(original.backbone.prompt_encoder.end_token_id) == 2, "of the system and the user message"
    # The documented limit: with the sign before its name a token is read as such.
    assert ids_there(loaded, f"\u2402{EMBED_TOKEN}", "query").count(original.backbone.embed_token_id) == 2


def test_a_text_without_a_prompt_name_is_a_query(loaded: Any) -> None:
    queries = loaded.encode_query(TEXTS[:2])
    assert np.array_equal(loaded.encode(TEXTS[:2]), queries)
    assert np.array_equal(loaded.encode(TEXTS[:2], prompt_name="query"), queries)


def test_similarity_is_written_down_as_cosine(exported: Path) -> None:
    settings = json.loads((exported / "config_sentence_transformers.json").read_text())
    assert settings["similarity_fn_name"] == "cosine"


def test_saving_the_loaded_model_again_loses_nothing(tmp_path: Path, loaded: Any, original: SearchR3) -> None:
    loaded.save_pretrained(str(tmp_path / "again"), create_model_card=False)
    assert largest_difference(load(tmp_path / "again"), original) < 1e-5


def test_versions_that_load_only_a_tokenizer_get_it_as_it_stands(exported: Path, original: SearchR3) -> None:
    """sentence-transformers 4 and 5 call AutoTokenizer with these arguments and no processor."""
    from transformers import AutoTokenizer

    arguments = json.loads((exported / "sentence_bert_config.json").read_text())["tokenizer_args"]
    own = AutoTokenizer.from_pretrained(exported, **arguments)
    prompt = json.loads((exported / "config_sentence_transformers.json").read_text())["prompts"]["query"]
    for text in TEXTS[:-2]:
        assert own(prompt + text).input_ids == original.backbone.prompt_encoder.encode(text, "direct").ids


def test_auto_tokenizer_by_itself_takes_it_as_it_stands_except_for_qwen2(tmp_path: Path, tokenizer: Any) -> None:
    from transformers import AutoTokenizer

    backbone = load_backbone(save_tiny(tmp_path / "model", tokenizer, "qwen3"))
    export_sentence_transformers(backbone, tmp_path / "export")
    own = AutoTokenizer.from_pretrained(tmp_path / "export")
    prompt = json.loads((tmp_path / "export" / "config_sentence_transformers.json").read_text())["prompts"]["document"]
    for text in TEXTS[:-2]:
        assert own(prompt + text).input_ids == backbone.prompt_encoder.encode(text, "document").ids


def test_versions_that_pool_by_the_mean_unless_told_otherwise_are_told(exported: Path, original: SearchR3) -> None:
    pooling = json.loads((exported / "1_Pooling" / "config.json").read_text())
    modes = {name: value for name, value in pooling.items() if name.startswith("pooling_mode_")}
    assert {name for name, value in modes.items() if value} == {"pooling_mode_lasttoken"}
    assert "pooling_mode_mean_tokens" in modes
    assert pooling["word_embedding_dimension"] == original.dimension


def test_the_directory_holds_data_only(exported: Path) -> None:
    files = sorted(str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file())
    assert files == [
        "1_Pooling/config.json",
        "2_Normalize/config.json",
        "README.md",
        "config.json",
        "config_sentence_transformers.json",
        "model.safetensors",
        "modules.json",
        "sentence_bert_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    settings = "".join(path.read_text(encoding="utf-8") for path in exported.rglob("*.json"))
    assert "auto_map" not in settings and "search_r3" not in settings
    modules = json.loads((exported / "modules.json").read_text())
    assert [m["type"].rpartition(".")[0] for m in modules] == ["sentence_transformers.models"] * 3


def test_the_model_card_says_how_to_load_it(exported: Path, original: SearchR3) -> None:
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: sentence-transformers\n")
    assert "SentenceTransformer(" in card and "direct mode" in card
    assert f"({original.dimension} values" in card and f"{original.backbone.settings.max_length} tokens" in card


def test_only_the_weights_below_the_output_layer_are_written(tmp_path: Path, tokenizer: Any) -> None:
    model = SearchR3(save_tiny(tmp_path / "model", tokenizer, tied=False), device="cpu")
    export_sentence_transformers(model.backbone, tmp_path / "export", dtype="float16")
    with safe_open(tmp_path / "export" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.backbone.model.base_model.state_dict())
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.float16"}
    assert json.loads((tmp_path / "export" / "config.json").read_text())["architectures"] == ["Qwen2Model"]
    assert model.backbone.model.config.architectures == ["Qwen2ForCausalLM"], "the model itself stays as it was"
    model.save_pretrained(tmp_path / "half", dtype="float16")
    assert largest_difference(load(tmp_path / "export"), SearchR3(tmp_path / "half", device="cpu")) < 1e-5


def test_the_model_still_encodes_as_before(tmp_path: Path, model: SearchR3) -> None:
    before = model.encode_document(TEXTS)
    export_sentence_transformers(model.backbone, tmp_path / "export")
    assert np.array_equal(model.encode_document(TEXTS), before)


def test_truncation_and_padding_of_earlier_calls_are_not_exported(tmp_path: Path, backbone: Backbone) -> None:
    backbone.tokenizer(["red"], padding="max_length", truncation=True, max_length=5)
    export_sentence_transformers(backbone, tmp_path / "export")
    written = json.loads((tmp_path / "export" / "tokenizer.json").read_text(encoding="utf-8"))
    assert written["truncation"] is None and written["padding"] is None


def test_an_existing_folder_is_replaced_and_a_failing_export_leaves_it(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    for name in ("modules.json", "old.txt"):  # the first says that it is an export
        (folder / name).write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(export, "write_text", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            export_sentence_transformers(backbone, folder)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["export", "modules.json", "old.txt"]
    export_sentence_transformers(backbone, folder)
    assert not (folder / "old.txt").exists() and (folder / "README.md").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


# peft reads a property that transformers 5 renamed; nothing of ours is concerned.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_must_be_merged_first(tmp_path: Path, backbone: Backbone) -> None:
    import peft

    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(backbone.model, config)
    backbone.model = adapted
    with pytest.raises(ModelError, match=r"unmerged adapters \(LoRA\); call its merge_and_unload"):
        export_sentence_transformers(backbone, tmp_path / "export")
    assert not list(tmp_path.iterdir())
    backbone.model = adapted.merge_and_unload()
    export_sentence_transformers(backbone, tmp_path / "export")
    assert largest_difference(load(tmp_path / "export"), SearchR3(backbone)) < 1e-5


@pytest.mark.parametrize("above", [0, 1])
def test_an_export_over_the_model_itself_is_refused(tmp_path: Path, tokenizer: Any, above: int) -> None:
    source = save_tiny(tmp_path / "run" / "model", tokenizer)
    backbone = load_backbone(source)
    with pytest.raises(ModelError, match=r"would replace the model in .*; give another folder"):
        export_sentence_transformers(backbone, [source, source.parent][above])
    assert (source / "model.safetensors").is_file()


NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "[{{ m['role'] }}]\n{{ m['content'] }}{% endfor %}\n[model]"
)
BEHIND_A_TOKEN = "{{ messages[0]['content'] }}<|im_end|>\n<|im_start|>{{ messages[1]['content'] }}<|im_end|>"
SPACE_IN_THE_PROMPT = "{{ messages[0]['content'] }} \n<|im_end|>\n<|im_start|>\n{{ messages[1]['content'] }}<|im_end|>"


@pytest.mark.parametrize("template", [NO_SYSTEM, BEHIND_A_TOKEN, SPACE_IN_THE_PROMPT])
def test_other_chat_templates_give_the_same_vectors(tmp_path: Path, original: SearchR3, template: str) -> None:
    backbone = with_template(original.backbone, template)
    export_sentence_transformers(backbone, tmp_path / "export")
    loaded = load(tmp_path / "export")
    assert_same_ids(loaded, backbone, [*TEXTS, " red  <think> \n house <think>\n", "<think> a "])
    assert largest_difference(loaded, SearchR3(backbone)) < 1e-5


def test_the_saved_prompts_are_exported_and_not_what_the_template_writes_now(
    tmp_path: Path, original: SearchR3
) -> None:
    original.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(BEHIND_A_TOKEN)
    export_sentence_transformers(load_backbone(tmp_path / "model"), tmp_path / "export")
    assert_same_ids(load(tmp_path / "export"), original.backbone)


def test_a_tokenizer_that_merges_prompt_and_text_is_refused(tmp_path: Path, backbone: Backbone) -> None:
    merging = with_template(backbone, "{{ messages[0]['content'] }}: {{ messages[1]['content'] }}<|im_end|>")
    with pytest.raises(ModelError, match=r"reads 'a' differently behind the query prompt.*; encode with SearchR3"):
        export_sentence_transformers(merging, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_an_export_that_would_read_special_tokens_in_a_text_is_refused(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_MARK", "")
    with pytest.raises(ModelError, match=r"reads 'a <\|endoftext\|> .* differently behind the query prompt"):
        export_sentence_transformers(backbone, tmp_path / "export")


def sentencepiece_like(kind: str) -> Any:
    """Tokenizers without byte-level BPE: Gemma's kind, Llama 2's kind (a space before each text), and Unigram."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    options = {"special_tokens": ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>"], "show_progress": False}
    if kind == "unigram":
        own = Tokenizer(models.Unigram())
        own.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        own.decoder = decoders.Metaspace(prepend_scheme="never")
        trainer = trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", **options)
    else:
        own = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        prefix = [normalizers.Prepend("▁")] if kind == "llama2" else []
        own.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
        own.decoder = decoders.Replace("▁", " ")
        trainer = trainers.BpeTrainer(vocab_size=300, **options)
    documents = [document.full_text for document in small_collection().documents.values()]
    own.train_from_iterator([*documents, PROMPT_SETS["search-r3"].direct_system, "\n0123456789 <|>"], trainer)
    named = {"eos_token": "<|im_end|>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=own, additional_special_tokens=["<|im_start|>"], chat_template=CHAT_TEMPLATE, **named
    )


def test_a_tokenizer_of_another_kind_gives_the_same_vectors(tmp_path: Path) -> None:
    model = SearchR3(save_tiny(tmp_path / "model", sentencepiece_like("gemma"), "llama"), device="cpu")
    export_sentence_transformers(model.backbone, tmp_path / "export")
    loaded = load(tmp_path / "export")
    assert largest_difference(loaded, model) < 1e-5
    assert_same_ids(loaded, model.backbone, [*TEXTS, "<unk> <pad>"])


@pytest.mark.parametrize("kind", ["llama2", "unigram"])
def test_a_tokenizer_that_cannot_be_expressed_is_refused(tmp_path: Path, kind: str) -> None:
    backbone = load_backbone(save_tiny(tmp_path / "model", sentencepiece_like(kind), "llama"))
    with pytest.raises(ModelError, match=r"differently behind the query prompt"):
        export_sentence_transformers(backbone, tmp_path / "export")


def test_prompts_that_end_differently_are_refused(tmp_path: Path, backbone: Backbone) -> None:
    template = "<|im_start|>{{ messages[1]['content'] }}<|im_end|>{{ messages[0]['content'] }}"
    with pytest.raises(ModelError, match="goes on differently after a query and after a document"):
        export_sentence_transformers(with_template(backbone, template), tmp_path / "export")


def test_the_export_itself_needs_no_sentence_transformers(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    export_sentence_transformers(backbone, tmp_path / "export")
    assert (tmp_path / "export" / "modules.json").is_file()
