"""What a model is used with: saved settings, single ones of them replaced, limits within the context."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import save_tiny

from search_r3.errors import ConfigError, ModelError
from search_r3.model.encoder import SearchR3
from search_r3.model.loading import load_backbone
from search_r3.model.prompts import PROMPT_SETS, PromptSet
from search_r3.model.settings import EmbeddingSettings
from search_r3.model.source import BUILTIN, packaged_path

DATED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.first %}Today: {{ strftime_now('%d') }}\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path, tiny_path: Path) -> Path:
    """A trained model, as far as its files say: saved with its settings."""
    load_backbone(tiny_path, prompts="published", max_length=100, max_new_tokens=9).save(tmp_path / "model")
    return tmp_path / "model"


def edit(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def show(backbone: Any, kind: Any = "direct") -> str:
    return str(backbone.tokenizer.decode(backbone.prompt_encoder.encode("red house", kind).ids))


def limits(source: Path, **options: Any) -> tuple[int, int]:
    settings = load_backbone(source, **options).settings
    return settings.max_length, settings.max_new_tokens


def test_one_setting_is_replaced_and_the_others_stay(folder: Path) -> None:
    saved = load_backbone(folder).settings
    assert SearchR3(folder, device="cpu", max_length=80).backbone.settings == saved.model_copy(
        update={"max_length": 80}
    )
    assert load_backbone(folder, max_new_tokens=3).settings == saved.model_copy(update={"max_new_tokens": 3})
    assert load_backbone(folder, prompts="published").settings == saved
    other = load_backbone(folder, prompts="search-r3")
    assert other.settings.max_length == 100 and "Represent the document." in show(other, "document")
    own = PromptSet(name="own", direct_system="Find.", reason_system="Think.", document_system="Keep.")
    assert "system\nFind.<|im_end|>" in show(load_backbone(folder, prompts=own))
    whole = load_backbone(folder, settings=EmbeddingSettings(max_length=90)).settings
    assert (whole.prompts.name, whole.max_length) == ("search-r3", 90), "settings= replaces all"


def test_what_cannot_be_replaced_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match="prompts='paper' is no prompt set; expected search-r3, published, thinking"):
        load_backbone(folder, prompts="paper")
    with pytest.raises(ConfigError, match="max_new_tokens=0: expected a whole number of at least 1"):
        load_backbone(folder, max_new_tokens=0)
    with pytest.raises(ConfigError, match="a Backbone has its settings already"):
        SearchR3(load_backbone(folder), max_length=50)


def test_a_saved_model_keeps_its_prompts_when_its_template_changes(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = load_backbone(folder)
    (folder / "chat_template.jinja").write_text(DATED)
    assert not caplog.records
    after = load_backbone(folder)
    assert "has changed since its prompts were saved; the saved ones are used" in caplog.text
    for kind in ("direct", "reason", "document"):
        assert show(after, kind) == show(before, kind)
    assert after.prompt_encoder.end_token_ids == before.prompt_encoder.end_token_ids
    (folder / "chat_template.jinja").write_text("{{ 1 + 'a' }}")
    assert show(load_backbone(folder)) == show(before)
    with pytest.raises(ModelError, match="cannot be rendered"):
        load_backbone(folder, prompts="search-r3")


def test_frames_that_are_not_of_the_tokenizer_are_refused_with_the_remedy(folder: Path) -> None:
    frames = json.loads((folder / "search_r3.json").read_text())["frames"]
    edit(folder / "search_r3.json", frames=frames | {"end_token_id": 99_999})
    with pytest.raises(ModelError, match=r"hold the id 99999, .* or remove `frames` from search_r3.json"):
        load_backbone(folder)


def test_settings_without_frames_are_rendered_as_version_0_1_did(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(folder / "search_r3.json", frames=None, template_arguments=None)
    opened = "{% if add_generation_prompt %}{% if enable_thinking is not defined %}ON{% endif %}<think>\n{% endif %}"
    template = (folder / "chat_template.jinja").read_text() + "{# </think> #}" + opened
    (folder / "chat_template.jinja").write_text(template)
    old = load_backbone(folder)
    assert "was saved without the token ids of its prompts" in caplog.text
    assert show(old, "reason").endswith("<|im_start|>assistant\nON<think>\n"), "nothing is passed, nothing mended"
    old.save(folder.parent / "again")
    caplog.clear()
    again = load_backbone(folder.parent / "again")
    assert again.settings == old.settings and not caplog.records
    assert show(load_backbone(folder, prompts="search-r3"), "reason").endswith("assistant\n<think>\n\n</think>\n\n")


def test_a_base_that_knows_the_token_gets_assumed_prompts_with_a_word(
    folder: Path, tiny_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_backbone(tiny_path)
    (folder / "search_r3.json").unlink()
    assert load_backbone(folder, prompts="published").settings.prompts.name == "published"
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert load_backbone(folder).settings.prompts.name == "search-r3"
    assert "no search_r3.json: the prompts 'search-r3' are assumed" in caplog.text


def test_limits_that_nobody_gave_are_cut_to_the_context(tmp_path: Path, tiny_path: Path) -> None:
    context = 256
    assert limits(tiny_path) == (128, 128)
    assert limits(tiny_path, max_length=200) == (200, context - 200)
    assert limits(tiny_path, max_new_tokens=100) == (context - 100, 100)
    assert limits(tiny_path, settings=EmbeddingSettings(max_new_tokens=20)) == (context - 20, 20)
    assert limits(packaged_path(BUILTIN)) == (512, 512)


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        ({"max_length": 256}, "max_length=256 and max_new_tokens=512"),
        ({"max_new_tokens": 256}, "max_length=1024 and max_new_tokens=256"),
        ({"max_length": 200, "max_new_tokens": 57}, "max_length=200 and max_new_tokens=57"),
    ],
)
def test_limits_beyond_the_context_are_refused_with_the_numbers(
    tiny_path: Path, given: dict[str, int], numbers: str
) -> None:
    for options in (given, {"settings": EmbeddingSettings(**given)}):
        with pytest.raises(ConfigError, match=rf"{numbers} do not fit into the context of .*, 256 tokens"):
            load_backbone(tiny_path, **options)


def test_saved_limits_beyond_the_context_are_cut_with_a_word(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(folder / "search_r3.json", max_length=250, max_new_tokens=100)
    assert limits(folder) == (156, 100)
    assert "used are 156 and 100" in caplog.text


def test_a_long_query_is_cut_and_counted_by_the_defaults(tiny_path: Path) -> None:
    queries = SearchR3(tiny_path, device="cpu").encode_query(["red house", "red house " * 300])
    assert queries.truncated == [False, True]


def test_a_tokenizer_without_eos_is_padded_with_the_end_of_the_turn(tmp_path: Path, tokenizer: Any) -> None:
    path = save_tiny(tmp_path / "m", tokenizer)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None, "pad_token": None}))
    backbone = load_backbone(path)
    end = backbone.prompt_encoder.end_token_id
    assert backbone.tokenizer.eos_token_id is None
    assert backbone.tokenizer.pad_token_id == end == backbone.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_the_model_of_the_package_has_the_ids_that_it_always_had() -> None:
    """As `apply_chat_template` of its tokenizer and the reply give them."""
    backbone = load_backbone(packaged_path(BUILTIN))
    tokenizer = transformers.AutoTokenizer.from_pretrained(packaged_path(BUILTIN))
    for kind, system in (("direct", "direct_system"), ("reason", "reason_system"), ("document", "document_system")):
        messages = [
            {"role": "system", "content": getattr(PROMPT_SETS["search-r3"], system)},
            {"role": "user", "content": "what do people pay with in Tashkent?"},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False)
        if kind != "reason":
            ids += [*tokenizer.encode("The embedding is ", add_special_tokens=False), backbone.embed_token_id]
        assert backbone.prompt_encoder.encode("what do people pay with in Tashkent?", kind).ids == ids
    assert backbone.prompt_encoder.end_token_ids == {tokenizer.eos_token_id}


def test_several_ends_in_the_generation_settings_end_a_reply(tmp_path: Path, tiny_path: Path) -> None:
    shutil.copytree(tiny_path, tmp_path / "m")
    end = load_backbone(tiny_path).prompt_encoder.end_token_id
    edit(tmp_path / "m" / "generation_config.json", eos_token_id=[end, 7])
    backbone = load_backbone(tmp_path / "m")
    assert backbone.prompt_encoder.end_token_ids == {end, 7} and backbone.prompt_encoder.end_token_id == end
    assert torch.isfinite(backbone.embed([[5, backbone.embed_token_id]])).all()
