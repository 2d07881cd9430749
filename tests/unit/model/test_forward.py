from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from search_r3 import SearchR3
from search_r3.model.backbone import Backbone
from search_r3.model.engine import attention, forward
from search_r3.model.engine.forward import compute_prefix, length_batches, prefill
from search_r3.model.loading import load_backbone
from tests.conftest import save_model, save_tiny

TEXTS = ["where is the red house?", "river", "a black horse and a white chair on a green boat", "the green lamp"]


def prompts_of(backbone: Backbone) -> list[list[int]]:
    return [backbone.prompt_encoder.encode(text, "document").ids for text in TEXTS]


def plain(backbone: Backbone, ids: list[int]) -> torch.Tensor:
    """The model's own forward pass over one sequence."""
    with torch.no_grad():
        output = backbone.causal_lm.base_model(input_ids=torch.tensor([ids], device=backbone.device), use_cache=False)
    hidden: torch.Tensor = output.last_hidden_state[0, -1]
    return hidden


@pytest.fixture(params=["qwen2", "qwen3", "llama", "generic", "olmo2"])
def any_backbone(request: Any, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Backbone:
    """Architectures driven layer by layer, and two that run their own forward pass around our attention."""
    if request.param == "olmo2":
        torch.manual_seed(1)
        config = transformers.Olmo2Config(
            vocab_size=len(tokenizer) + 2, hidden_size=32, num_hidden_layers=2, intermediate_size=64,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        return load_backbone(
            save_model(tmp_path / "model", tokenizer, transformers.AutoModelForCausalLM.from_config(config))
        )
    if request.param == "generic":
        monkeypatch.setattr(forward, "LLAMA_LIKE", set())
        return load_backbone(save_tiny(tmp_path / "model", tokenizer))
    return load_backbone(save_tiny(tmp_path / "model", tokenizer, request.param))


def test_hidden_states_equal_the_models_own(any_backbone: Backbone) -> None:
    model, prompts = any_backbone.causal_lm, prompts_of(any_backbone)
    expected = torch.stack([plain(any_backbone, ids) for ids in prompts])
    together, _ = prefill(model, prompts)
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=1e-5)
    common = any_backbone.prompt_encoder.prefix_of(prompts[0])
    prefix = compute_prefix(model, common)
    shared, kept = prefill(model, [ids[len(common) :] for ids in prompts], prefix, keep=True)
    torch.testing.assert_close(shared, expected, atol=1e-5, rtol=1e-5)
    _, whole = prefill(model, prompts, keep=True)
    assert kept is not None
    assert whole is not None
    for row, ids in enumerate(prompts):
        torch.testing.assert_close(
            kept[:, :, row, :, : len(ids) - len(common)],
            whole[:, :, row, :, len(common) : len(ids)],
            atol=1e-5,
            rtol=1e-5,
        )


def test_rollouts_and_documents_of_any_architecture_equal_a_teacher_forced_pass(any_backbone: Backbone) -> None:
    model = SearchR3(any_backbone)
    prompts = [any_backbone.prompt_encoder.encode(text, "reason").ids for text in TEXTS]
    for rollout in model.rollouts(prompts, max_new_tokens=9, sampling_temperature=1.0, seeds=[1, 2, 3, 4]):
        hidden = plain(any_backbone, [*rollout.prompt_ids, *rollout.completion_ids])
        torch.testing.assert_close(rollout.vector, hidden / hidden.norm(), atol=1e-5, rtol=1e-5)
    expected = [plain(any_backbone, ids) for ids in prompts_of(any_backbone)]
    np.testing.assert_allclose(
        model.encode_document(TEXTS), torch.stack([hidden / hidden.norm() for hidden in expected]), atol=1e-5
    )


def windowed(tmp_path: Path, tokenizer: Any, window: int) -> SearchR3:
    torch.manual_seed(1)
    config = transformers.MistralConfig(
        vocab_size=len(tokenizer) + 2, hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, sliding_window=window, initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    return SearchR3(save_model(tmp_path / "model", tokenizer, model), device="cpu")


@pytest.mark.parametrize("how", ["driven", "generic"])
@pytest.mark.parametrize("window", [200, 8, 1])
def test_a_sliding_window_cuts_as_the_model_cuts(
    tmp_path: Path, tokenizer: Any, window: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "generic":
        monkeypatch.setattr(forward, "LLAMA_LIKE", set())
    model = windowed(tmp_path, tokenizer, window)
    assert model.backbone.engine == "fast"
    expected = [plain(model.backbone, ids) for ids in prompts_of(model.backbone)]
    np.testing.assert_allclose(
        model.encode_document(TEXTS), torch.stack([hidden / hidden.norm() for hidden in expected]), atol=1e-5
    )
    prompts = [model.backbone.prompt_encoder.encode(text, "reason").ids for text in TEXTS]
    for rollout in model.rollouts(prompts, max_new_tokens=[9, 1, 12, 5]):
        hidden = plain(model.backbone, [*rollout.prompt_ids, *rollout.completion_ids])
        torch.testing.assert_close(rollout.vector, hidden / hidden.norm(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_a_model_around_our_attention_has_its_own_elsewhere(tmp_path: Path, tokenizer: Any, padding: str) -> None:
    """Its forward pass, as training runs it, is that of `sdpa`, also while another thread encodes."""
    monkey = windowed(tmp_path, tokenizer, 8).backbone.source
    own = transformers.AutoModelForCausalLM.from_pretrained(monkey).eval()
    ours = transformers.AutoModelForCausalLM.from_pretrained(monkey).eval()
    attention.register()
    ours.set_attn_implementation(attention.OURS)
    ids, mask = torch.arange(3, 27).reshape(2, 12), torch.ones(2, 12, dtype=torch.long)
    if padding != "none":
        mask[0, slice(5) if padding == "left" else slice(7, None)] = 0
    with torch.no_grad(), attention.attending(attention.CausalAttention(torch.tensor([12, 12]))):
        found = []
        thread = threading.Thread(target=lambda: found.append(ours(input_ids=ids, attention_mask=mask).logits))
        thread.start()
        thread.join()
    expected = own(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found[0][mask.bool()], expected[mask.bool()], atol=0, rtol=0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own call
def test_wrapped_in_lora_equals_merged(tiny_path: Path) -> None:
    backbone = load_backbone(tiny_path)
    bare = SearchR3(backbone).encode_document(TEXTS)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(backbone.model, config)
    model = SearchR3(Backbone(wrapped, backbone.tokenizer, backbone.settings, backbone.embed_token_id, "lora"))
    documents = model.encode_document(TEXTS)
    queries = model.encode_query(TEXTS, max_new_tokens=8)
    assert np.abs(documents - bare).max() > 1e-3, "the adapter is in force"
    merged_model = wrapped.merge_and_unload()
    merged = SearchR3(Backbone(merged_model, backbone.tokenizer, backbone.settings, backbone.embed_token_id, "merged"))
    np.testing.assert_allclose(merged.encode_document(TEXTS), documents, atol=1e-5)
    again = merged.encode_query(TEXTS, max_new_tokens=8)
    assert again.reasoning == queries.reasoning
    np.testing.assert_allclose(again.vectors, queries.vectors, atol=1e-5)


def test_bfloat16_stays_near_float32(tiny_path: Path) -> None:
    exact, rounded = SearchR3(tiny_path, device="cpu"), SearchR3(tiny_path, device="cpu", dtype="bfloat16")
    texts = [f"{text} {number}" for text in TEXTS for number in range(8)]
    for vectors, truth in (
        (rounded.encode_document(texts), exact.encode_document(texts)),
        (rounded.encode_query(texts, "direct").vectors, exact.encode_query(texts, "direct").vectors),
    ):
        assert (vectors * truth).sum(-1).min() > 0.999
    own = torch.stack([plain(rounded.backbone, ids).float() for ids in prompts_of(rounded.backbone)])
    ours, _ = prefill(rounded.backbone.causal_lm, prompts_of(rounded.backbone))
    assert torch.nn.functional.cosine_similarity(ours.float(), own).min() > 0.9995


@pytest.mark.parametrize("rows", [1, 11, 12, 30, 48, 49])
def test_the_product_for_few_rows_is_the_same_product(rows: int) -> None:
    torch.manual_seed(0)
    layer, values = torch.nn.Linear(24, 40), torch.randn(rows, 1, 24)
    torch.testing.assert_close(forward._linear(layer, values), layer(values), atol=1e-5, rtol=1e-5)


@given(lengths=st.lists(st.integers(1, 40), max_size=60), budget=st.integers(1, 200))
def test_batches_hold_every_sequence_once_and_keep_to_the_budget(lengths: list[int], budget: int) -> None:
    batches = list(length_batches([[0] * length for length in lengths], budget))
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[place] for place in batch) <= budget
    longest = [max(lengths[place] for place in batch) for batch in batches]
    assert longest == sorted(longest), "of like length together"
