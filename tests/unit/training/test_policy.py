"""What training asks of a model: no mask where none is needed, logits by chunks, and in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional

from benchmarks import models_matrix as matrix
from search_r3.config import LoRASettings, load_recipe
from search_r3.model.adapters import add_adapters
from search_r3.model.backbone import Backbone, pad
from search_r3.model.encoder import SearchR3
from search_r3.model.loading import load_backbone
from search_r3.training import policy as policies
from search_r3.training.engine import _recompute_activations, make_engine
from search_r3.training.policy import Answer, Policy, Tokens
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
    """Log-probabilities, vectors, and the gradients of a loss on both."""
    backbone, generator = policy.backbone, torch.Generator().manual_seed(0)
    sequences = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in LENGTHS]
    ids, mask = pad(sequences, backbone.tokenizer.pad_token_id, backbone.device)
    policy.needs_mask = masked
    policy.zero_grad()
    asked = Tokens(mask.bool(), torch.full((sum(LENGTHS),), 7))
    vectors, logprobs, *_ = policy(ids, mask, embed=mask.sum(-1) - 1, tokens=asked)
    (logprobs.sum() + (vectors @ vectors.T).tanh().sum()).backward()
    gradients = torch.cat([one.grad.flatten() for one in policy.parameters() if one.grad is not None])
    return [logprobs.detach(), vectors.detach()], gradients


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


@pytest.mark.parametrize(
    "name", ["Gemma 2", "Gemma 3", "GPT-OSS", "Qwen3-Next", "Falcon-H1", "LFM2", "DeepSeek-V3", "Mamba", "OPT", "BLOOM"]
)
def test_windows_states_and_positions_of_other_architectures_need_none_either(tmp_path: Path, name: str) -> None:
    matrix.save_random(matrix.FAMILIES[name], matrix.load_tokenizer(), str(tmp_path))
    policy = Policy(load_backbone(tmp_path, device="cpu"))
    assert not policy.needs_mask
    (expected, gradient), (outputs, found) = computed(policy, True), computed(policy, False)
    for one, two in zip(outputs, expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    assert (found - gradient).abs().max() <= 1e-5 * gradient.abs().max()


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "Gemma 3"])
def test_attention_is_asked_causal_and_without_a_mask_which_is_what_flash_kernels_take(
    tmp_path: Path, tokenizer: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind in matrix.FAMILIES:
        matrix.save_random(matrix.FAMILIES[kind], matrix.load_tokenizer(), str(tmp_path / "model"))
        policy = Policy(load_backbone(tmp_path / "model", device="cpu"))
    else:
        policy = Policy(load(kind, tmp_path / "model", tokenizer))
    asked: list[tuple[bool, bool]] = []
    attend = functional.scaled_dot_product_attention

    def noted(*tensors: torch.Tensor, attn_mask: Any = None, is_causal: bool = False, **options: Any) -> torch.Tensor:
        asked.append((attn_mask is None, is_causal))
        return attend(*tensors, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", noted)
    computed(policy, False)
    layers = policy.backbone.causal_lm.config.get_text_config().num_hidden_layers
    assert asked == [(True, True)] * layers


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
    states = engine.policy(ids, mask, states=mask.bool()).states
    assert masks == [None, None]
    torch.testing.assert_close(frozen, states, atol=1e-5, rtol=1e-5)


# The output layer


def asked(policy: Policy, temperature: float) -> tuple[Answer, torch.Tensor]:
    """All that a head can be asked, and the gradients of a loss on it; the reference's states are drawn."""
    backbone, generator = policy.backbone, torch.Generator().manual_seed(0)
    sequences = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in LENGTHS]
    ids, mask = pad(sequences, backbone.tokenizer.pad_token_id, backbone.device)
    places, count = mask.bool(), sum(LENGTHS)
    reference = torch.randn(count, backbone.dimension, generator=generator)
    chosen = torch.randint(3, 300, (count,), generator=generator)
    policy.zero_grad()
    answer = policy(ids, mask, tokens=Tokens(places, chosen, temperature, reference), kl=(places, reference))
    weights = torch.rand(2, count, generator=generator)
    assert answer.logprobs is not None and answer.kl is not None and answer.reference_logprobs is not None
    assert not answer.reference_logprobs.requires_grad
    (weights[0] @ answer.logprobs + weights[1] @ answer.kl).backward()
    gradients = torch.cat([one.grad.flatten() for one in policy.parameters() if one.grad is not None])
    return answer, gradients


def adapted(folder: Path, tokenizer: Any, tied: bool) -> Backbone:
    """A model with adapters, the embed token's row moved away from where it began."""
    backbone = load_backbone(save_tiny(folder, tokenizer, tied=tied))
    add_adapters(backbone, LoRASettings(rank=2))
    with torch.no_grad():
        for name, parameter in backbone.model.named_parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    return backbone


@pytest.mark.parametrize("kind", ["tied", "untied", "adapters", "adapters-untied", "frozen", "Gemma 2", "Granite"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunks_of_positions_change_nothing_and_hold_little(
    tmp_path: Path, tokenizer: Any, kind: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind in matrix.FAMILIES:
        matrix.save_random(matrix.FAMILIES[kind], matrix.load_tokenizer(), str(tmp_path))
        policy = Policy(load_backbone(tmp_path, device="cpu"))
        assert policy.backbone._logit_scale != (1.0, None)
    elif kind.startswith("adapters"):
        policy = Policy(adapted(tmp_path, tokenizer, tied=kind == "adapters"))
    else:
        backbone = load_backbone(save_tiny(tmp_path, tokenizer, tied=kind != "untied"))
        policy = Policy(backbone, backbone.frozen_copy() if kind == "frozen" else None)
    inner, rows = Backbone.logits, []

    def counted(self: Backbone, hidden: torch.Tensor, *, adapters: bool = True) -> torch.Tensor:
        rows.append(len(hidden))
        return inner(self, hidden, adapters=adapters)

    monkeypatch.setattr(Backbone, "logits", counted)
    whole, expected = asked(policy, temperature)
    assert set(rows) == {sum(LENGTHS)}
    rows.clear()
    monkeypatch.setattr(policies, "LOGITS_AT_A_TIME", 8 * policy.vocabulary)
    answer, gradient = asked(policy, temperature)
    assert max(rows) == 8 and sum(rows) == 7 * sum(LENGTHS), "4 times each, 3 of them again in the backward pass"
    for name in ("logprobs", "reference_logprobs", "kl"):
        torch.testing.assert_close(getattr(answer, name), getattr(whole, name), atol=1e-5, rtol=1e-5)
    assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max() > 0


def test_what_the_head_gives_is_what_torch_computes_of_all_logits(tmp_path: Path, tokenizer: Any) -> None:
    policy = Policy(adapted(tmp_path, tokenizer, tied=True))
    backbone = policy.backbone
    ids = torch.randint(3, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    places = torch.zeros_like(ids, dtype=torch.bool)
    places[0, 2:5] = places[2, 7] = True
    targets = ids.roll(-1, 1)[places]
    with backbone.model.disable_adapter():
        base = backbone.causal_lm(ids).logits[places]
    tuned = backbone.causal_lm(ids).logits[places]
    states = policies.make_reference(policy, None)(ids, torch.ones_like(ids), places)
    answer = policy(ids, torch.ones_like(ids), tokens=Tokens(places, targets, 0.5, states), kl=(places, states))
    assert answer.logprobs is not None and answer.kl is not None and answer.reference_logprobs is not None
    own = -functional.cross_entropy(tuned / 0.5, targets, reduction="none")
    others = -functional.cross_entropy(base / 0.5, targets, reduction="none")
    logs = tuned.log_softmax(-1), base.log_softmax(-1)
    kl = functional.kl_div(*logs, log_target=True, reduction="none").sum(-1)
    for found, expected in ((answer.logprobs, own), (answer.reference_logprobs, others), (answer.kl, kl)):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (own - others).abs().min() > 1e-3, "adapters and the embed token's row change both"


def test_places_without_a_token_give_nothing_and_keep_the_graph(tiny_path: Path) -> None:
    policy = Policy(load_backbone(tiny_path))
    ids = torch.full((2, 3), 5)
    none = torch.zeros_like(ids, dtype=torch.bool)
    answer = policy(ids, torch.ones_like(ids), tokens=Tokens(none, ids[none]))
    assert answer.logprobs is not None and answer.logprobs.shape == (0,)
    answer.logprobs.sum().backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())


@pytest.mark.parametrize("how", ["bfloat16 weights", "autocast", "adapters"])
def test_the_head_rounds_no_logit_to_bfloat16(tmp_path: Path, tokenizer: Any, how: str) -> None:
    if how == "adapters":
        backbone = adapted(tmp_path, tokenizer, tied=True)
        backbone.model.bfloat16()
    else:
        path = save_tiny(tmp_path, tokenizer, tied=False)
        backbone = load_backbone(path, dtype="float32" if how == "autocast" else "bfloat16")
    head, generator = backbone.causal_lm.get_output_embeddings(), torch.Generator().manual_seed(0)
    weight = head.weight.detach().bfloat16().double()
    states = torch.randn(2, 5, 32, generator=generator).mul(20).to(backbone.model.dtype).requires_grad_()
    exact = states.detach().bfloat16().double() @ weight.T
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        rounded = backbone.logits(states)
        backbone.float32_logits = True
        scores = backbone.logits(states)
    assert scores.dtype == torch.float32
    assert (scores - exact).abs().max() < 1e-5 * exact.abs().max() < 1e-2 * (rounded - exact).abs().max()
    direction = torch.randn(scores.shape, generator=generator)
    learning = [states, *(one for one in head.parameters() if one.requires_grad)]
    found, usual = (torch.autograd.grad((one * direction).sum(), learning) for one in (scores, rounded))
    for one, two in zip(found, usual, strict=True):
        torch.testing.assert_close(one, two, atol=1e-2 * float(two.abs().max()), rtol=1e-2)
