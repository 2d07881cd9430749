"""Stage 1 and stage 2 with LoRA adapters: what learns, what is written, who can load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from search_r3.config import Recipe, load_recipe
from search_r3.errors import ConfigError
from search_r3.model.encoder import SearchR3
from search_r3.training.grpo import train_grpo
from search_r3.training.run import Run
from search_r3.training.sft import train_sft
from tests.conftest import Stop, StopAt, save_tiny

SETTINGS = [
    "max_length=120", "max_new_tokens=16", "lora.rank=8", "lora.alpha=16", "sft.steps=150", "sft.batch_size=4",
    "sft.learning_rate=2e-2", "sft.splits={train: 1.0}", "sft.reasoning_styles={restate: 1.0}", "save_every=100",
    "sft.kl_weight=1.0",
    "grpo.steps=4", "grpo.queries_per_step=4", "grpo.group_size=4", "grpo.splits=[train]", "grpo.evaluate_every=4",
    "grpo.kl_coefficient=0.1", "grpo.sampling_temperature=0.5", "grpo.learning_rate=5e-4",
]  # fmt: skip


def recipe(folder: Path, base: Path, collection: Path, *more: str) -> Recipe:
    return load_recipe(None, [*SETTINGS, f"run_dir={folder}", f"base={base}", f"collection={collection}", *more])


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def trained(request: Any, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, collection_path: Path) -> Run:
    folder = tmp_path_factory.mktemp("lora")
    base = save_tiny(folder / "base", tokenizer, tied=request.param, spare_rows=16)
    run = Run(recipe(folder / "run", base, collection_path))
    train_sft(run.recipe)
    return run


def test_the_losses_fall_though_only_adapters_learn(trained: Run) -> None:
    rows = trained.metrics("sft")
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    assert rows[0]["kl_to_base"] == pytest.approx(0.0, abs=1e-6), "new adapters change nothing"
    assert rows[-1]["kl_to_base"] > 0.01, "the reference is the model without adapters"
    weights = load_file(trained.adapter_path("sft") / "adapter_model.safetensors")
    assert sum(value.numel() for value in weights.values()) < 20_000
    assert any("lora_A" in name for name in weights)


def test_the_merged_model_computes_what_the_adapters_do(trained: Run) -> None:
    """In three ways: our own model directory, peft on the base, transformers on the adapter directory."""
    text, path = "where is the red house?", trained.model_path("sft")
    ours = SearchR3(path, device="cpu")
    ids = torch.tensor([ours.backbone.prompt_encoder.encode(text, "reason").ids])
    base = transformers.AutoModelForCausalLM.from_pretrained(trained.recipe.base)
    logits = [
        ours.backbone.model(input_ids=ids).logits,
        transformers.AutoModelForCausalLM.from_pretrained(path)(input_ids=ids).logits,
        peft.PeftModel.from_pretrained(base, trained.adapter_path("sft"))(input_ids=ids).logits,
        transformers.AutoModelForCausalLM.from_pretrained(trained.adapter_path("sft"))(input_ids=ids).logits,
    ]
    for other in logits[1:]:
        assert (logits[0] - other).abs().max() < 1e-4
    adapted = SearchR3(trained.adapter_path("sft"), device="cpu")
    for mode in ("direct", "reason"):
        found, expected = adapted.encode_query([text], mode), ours.encode_query([text], mode)
        assert found.reasoning == expected.reasoning
        assert abs(found.vectors - expected.vectors).max() < 1e-4
    untouched = transformers.AutoModelForCausalLM.from_pretrained(trained.recipe.base)(input_ids=ids).logits
    assert (logits[0] - untouched).abs().max() > 0.1
    assert json.loads((trained.adapter_path("sft") / "search_r3.json").read_text())["max_new_tokens"] == 16


def test_stage_2_goes_on_from_it_and_resumes(trained: Run, collection_path: Path, tmp_path: Path) -> None:
    base, path = Path(trained.recipe.base), trained.model_path("sft")
    whole = recipe(tmp_path / "whole", base, collection_path, "save_every=2")
    expected = load_file(train_grpo(whole, model=path).model_path / "model.safetensors")
    broken = recipe(tmp_path / "broken", base, collection_path, "save_every=2")

    with pytest.raises(Stop):
        train_grpo(broken, model=path, callbacks=[StopAt(3)], resume=True)
    [checkpoint] = (tmp_path / "broken" / "grpo" / "checkpoints").iterdir()
    saved = load_file(checkpoint / "model.safetensors")
    assert saved and all("lora" in name or "trainable_tokens" in name for name in saved), "only what learns is saved"
    found = load_file(train_grpo(broken, model=path, resume=True).model_path / "model.safetensors")
    before = load_file(path / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(not torch.equal(found[name], before[name]) for name in before)


def test_a_layer_that_does_not_exist_is_named(tiny_path: Path, collection_path: Path, tmp_path: Path) -> None:
    settings = recipe(tmp_path / "run", tiny_path, collection_path, "lora.target_modules=[no_such_layer]")
    with pytest.raises(ConfigError, match=r"lora.target_modules=\['no_such_layer'\]"):
        train_sft(settings)
