"""The embed token's row: where it starts, how fast it learns, and adapters whose base lacks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
import transformers

from search_r3 import train_grpo, train_sft
from search_r3.config import LoRASettings, Recipe, SFTSettings
from search_r3.data.collection import Collection
from search_r3.errors import ConfigError
from search_r3.model.adapters import add_adapters
from search_r3.model.encoder import SearchR3
from search_r3.model.loading import load_backbone
from search_r3.training.engine import _parameter_groups, make_engine
from search_r3.training.policy import Policy
from tests.conftest import save_tiny

TEXTS = ["hello there", "where is the town"]


@pytest.fixture(params=[0, 8])
def base(tmp_path: Path, tokenizer: Any, request: pytest.FixtureRequest) -> Path:
    return save_tiny(tmp_path / "base", tokenizer, spare_rows=request.param)


def test_a_new_row_starts_where_it_is_told(base: Path) -> None:
    table = load_backbone(base).model.get_input_embeddings().weight
    known = load_backbone(base)
    assert torch.allclose(table[known.embed_token_id], table[: len(known.tokenizer) - 1].mean(0), atol=1e-6)
    ended = load_backbone(base, embed_start="end_of_turn")
    table = ended.model.get_input_embeddings().weight
    assert torch.equal(table[ended.embed_token_id], table[ended.tokenizer.eos_token_id])


def test_a_row_starts_as_the_end_of_the_template_and_not_as_the_eos_of_the_tokenizer(base: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = "<|im_start|>"
    tokenizer.save_pretrained(base)
    ended = load_backbone(base, embed_start="end_of_turn")
    table, end = ended.model.get_input_embeddings().weight, tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert torch.equal(table[ended.embed_token_id], table[end])


def test_the_row_learns_at_its_own_rate(base: Path) -> None:
    backbone = load_backbone(base)
    add_adapters(backbone, LoRASettings(rank=2))
    assert _parameter_groups(Policy(backbone), 0.1, 1.0)[1]["lr"] == pytest.approx(0.1)
    adapters, row = _parameter_groups(Policy(backbone), 0.1, 5.0)
    assert row["lr"] == pytest.approx(0.5) and "lr" not in adapters
    assert [one.shape[0] for one in row["params"]] == [1]
    assert len(adapters["params"]) + 1 == sum(one.requires_grad for one in backbone.model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_norms_biases_and_token_tables_are_not_decayed(tmp_path: Path, tokenizer: Any, tied: bool) -> None:
    policy = Policy(load_backbone(save_tiny(tmp_path / "tied", tokenizer, tied=tied)))
    decayed, kept = _parameter_groups(policy, 0.1, 3.0)
    names = {id(parameter): name for name, parameter in policy.named_parameters()}
    assert kept["weight_decay"] == 0.0 and "weight_decay" not in decayed
    assert len(decayed["params"]) + len(kept["params"]) == len(names), "each once, a tied table too"
    matrices = ("_proj.weight",) if tied else ("_proj.weight", "lm_head.weight")
    assert all(names[id(one)].endswith(matrices) for one in decayed["params"])
    assert all(names[id(one)].endswith(("norm.weight", "bias", "embed_tokens.weight")) for one in kept["params"])


def test_adapters_load_on_a_base_without_the_row_and_hold_no_table(base: Path, tmp_path: Path) -> None:
    backbone = load_backbone(base)
    add_adapters(backbone, LoRASettings(rank=2))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in backbone.model.named_parameters():
        if parameter.requires_grad and ("lora_B" in name or "trainable_tokens" in name):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    adapter = tmp_path / "adapter"
    backbone.model.save_pretrained(adapter, save_embedding_layers=False)
    backbone.save_companions(adapter)
    whole, loaded = SearchR3(backbone), SearchR3(adapter)
    assert (adapter / "adapter_model.safetensors").stat().st_size < 0.2 * (base / "model.safetensors").stat().st_size
    for mode in ("direct", "reason"):
        first = whole.encode_query(TEXTS, mode, max_new_tokens=8)  # type: ignore[arg-type]
        second = loaded.encode_query(TEXTS, mode, max_new_tokens=8)  # type: ignore[arg-type]
        np.testing.assert_allclose(first.vectors, second.vectors, atol=1e-5)
        assert first.reasoning == second.reasoning
    sequences = [[1, 2, backbone.embed_token_id], [3, backbone.embed_token_id, 4]]
    ids = torch.tensor(sequences)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = backbone.logits(backbone.hidden_states(ids, mask))
        found = loaded.backbone.logits(loaded.backbone.hidden_states(ids, mask))
    assert torch.allclose(expected, found, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_frozen_token_table_learns_the_embed_tokens_row_alone(
    tmp_path: Path, tokenizer: Any, collection: Collection, tied: bool, stage: str
) -> None:
    base = save_tiny(tmp_path / "base", tokenizer, tied=tied)
    settings = {"steps": 1, "evaluate_every": 0, "learning_rate": 0.01, "warmup_steps": 0}
    recipe = {
        "freeze_token_table": True,
        "sft": {**settings, "batch_size": 4},
        "grpo": {**settings, "queries_per_step": 4, "embedding_loss_weight": 1.0},
    }
    train = train_sft if stage == "sft" else train_grpo
    trained = train(recipe, run_dir=tmp_path / "run", model=base, collection=collection)
    before, after = load_backbone(base), load_backbone(trained.model_path)
    moved = (before.model.get_input_embeddings().weight != after.model.get_input_embeddings().weight).any(dim=1)
    assert moved.nonzero().flatten().tolist() == [after.embed_token_id]
    layers = zip(before.model.named_parameters(), after.model.named_parameters(), strict=True)
    still = [name for (name, old), (_, new) in layers if torch.equal(old, new)]
    assert still == [], "everything else learns"


def test_a_frozen_token_table_is_refused_where_gradients_are_sharded(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerate.Accelerator, "is_fsdp2", property(lambda self: True))
    with pytest.raises(ConfigError, match="freeze_token_table=true needs gradients of whole tables: launch with DDP"):
        make_engine(SearchR3(base), Recipe(freeze_token_table=True), SFTSettings())
