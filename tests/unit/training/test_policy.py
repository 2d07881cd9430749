"""Training computes right-padded sequences without a mask, where that changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from search_r3.config import LoRASettings, load_recipe
from search_r3.model.adapters import add_adapters
from search_r3.model.backbone import Backbone, pad
from search_r3.model.encoder import SearchR3
from search_r3.model.loading import load_backbone
from search_r3.training.engine import _recompute_activations, make_engine
from search_r3.training.policy import Policy
from tests.conftest import save_model, save_tiny

LENGTHS = (23, 9, 17, 4)


def load(kind: str, folder: Path, tokenizer: Any, dtype: str = "float32") -> Backbone:
    if kind in ("qwen2", "qwen3", "llama"):
        return load_backbone(save_tiny(folder, tokenizer, kind), dtype=dtype)
    torch.manual_seed(1)
    config = {"mistral": transformers.MistralConfig, "olmo2": transformers.Olmo2Config}[kind](
        vocab_size=len(tokenizer) + 2, hidden_size=32, num_hidden_layers=2, intermediate_size=64,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        **({"sliding_window": 6} if kind == "mistral" else {}),
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    return load_backbone(save_model(folder, tokenizer, model), dtype=dtype)


def computed(policy: Policy, masked: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Logits, vectors, and the gradients of a loss on both."""
    backbone, generator = policy.backbone, torch.Generator().manual_seed(0)
    sequences = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in LENGTHS]
    ids, mask = pad(sequences, backbone.tokenizer.pad_token_id, backbone.device)
    policy.needs_mask = masked
    policy.zero_grad()
    vectors, [logits] = policy(ids, mask, embed=mask.sum(-1) - 1, places=[mask.bool()])
    assert vectors is not None
    (logits.log_softmax(-1)[:, 7].sum() + (vectors @ vectors.T).tanh().sum()).backward()
    gradients = torch.cat([one.grad.flatten() for one in policy.parameters() if one.grad is not None])
    return [logits.detach(), vectors.detach()], gradients


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "mistral", "olmo2"])
@pytest.mark.parametrize("how", ["plain", "recomputed", "adapters"])
def test_without_a_mask_losses_and_gradients_are_the_same(tmp_path: Path, tokenizer: Any, kind: str, how: str) -> None:
    backbone = load(kind, tmp_path / "model", tokenizer)
    if how == "adapters":
        add_adapters(backbone, LoRASettings(rank=2))
    if how == "recomputed":
        _recompute_activations(backbone)
    policy = Policy(backbone)
    assert not policy.needs_mask
    (expected, gradient), (outputs, found) = computed(policy, True), computed(policy, False)
    for one, two in zip(outputs, expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    assert (found - gradient).abs().max() <= 1e-5 * gradient.abs().max()


def test_without_a_mask_bfloat16_differs_by_its_rounding(tmp_path: Path, tokenizer: Any) -> None:
    exact = computed(Policy(load("qwen2", tmp_path / "exact", tokenizer)), True)[0]
    policy = Policy(load("qwen2", tmp_path / "model", tokenizer, "bfloat16"))
    assert not policy.needs_mask
    for one, two, true in zip(computed(policy, False)[0], computed(policy, True)[0], exact, strict=True):
        assert (one - true).abs().max() <= 1.5 * (two - true).abs().max() + 1e-3


def test_a_model_that_looks_ahead_keeps_its_mask(tmp_path: Path, tokenizer: Any) -> None:
    backbone = load("qwen2", tmp_path / "model", tokenizer)
    for layer in backbone.causal_lm.model.layers:
        layer.self_attn.is_causal = False
    assert Policy(backbone).needs_mask


def test_what_trains_keeps_nothing_of_its_prompts_between_calls(tmp_path: Path, tiny_path: Path) -> None:
    recipe = load_recipe(None, [f"run_dir={tmp_path}"])
    model = SearchR3(tiny_path, device="cpu")
    assert model.backbone.prefixes.keeps
    make_engine(model, recipe, recipe.sft)
    model.encode_query("red house", "direct")
    assert not model.backbone.prefixes.keeps
    assert not model.backbone.prefixes._kept


def test_the_reference_of_a_kl_takes_no_mask_either(
    tmp_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(None, [f"run_dir={tmp_path}", "sft.kl_weight=1.0"])
    engine = make_engine(SearchR3(tiny_path, device="cpu"), recipe, recipe.sft)
    masks: list[Any] = []
    inner = Backbone.hidden_states
    monkeypatch.setattr(Backbone, "hidden_states", lambda self, ids, mask: masks.append(mask) or inner(self, ids, mask))
    ids, mask = pad([[5, 6, 7], [5, 6]], 0, torch.device("cpu"))
    assert engine.reference is not None
    frozen = engine.reference(ids, mask, mask.bool())
    _, [logits] = engine.policy(ids, mask, places=[mask.bool()])
    assert masks == [None, None]
    torch.testing.assert_close(frozen, logits, atol=1e-5, rtol=1e-5)
