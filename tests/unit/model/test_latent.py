"""Soft tokens: what they are, in decoding and in training, with each engine and with adapters."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from search_r3.config import LoRASettings
from search_r3.errors import ModelError
from search_r3.model.adapters import add_adapters
from search_r3.model.backbone import Backbone, pad
from search_r3.model.engine.decoding import Decoder, DecodeRequest
from search_r3.model.engine.latent import soft_tokens
from search_r3.training.modes.think import Words, think
from search_r3.training.policy import Policy
from tests.conftest import save_tiny

TEXTS = ["where is the red house?", "river", "a black horse and a white chair"]


def by_hand(backbone: Backbone, ids: list[int], steps: int, said: list[torch.Tensor] | None = None) -> torch.Tensor:
    """With transformers alone, from the beginning at every step; `said` gets the logits before each soft token."""
    lm = backbone.model
    table = lm.get_input_embeddings()
    every = table(torch.arange(table.weight.shape[0]))
    inputs = table(torch.tensor([ids]))
    for _ in range(steps):
        logits = lm(inputs_embeds=inputs).logits[:, -1]
        if said is not None:
            said.append(logits)
        inputs = torch.cat([inputs, (torch.softmax(logits, -1) @ every)[:, None]], dim=1)
    inputs = torch.cat([inputs, table(torch.tensor([[backbone.embed_token_id]]))], dim=1)
    hidden = lm(inputs_embeds=inputs, output_hidden_states=True).hidden_states[-1][0, -1]
    return torch.nn.functional.normalize(hidden, dim=0)


def logits_by_hand(backbone: Backbone, ids: list[int], steps: int) -> list[torch.Tensor]:
    said: list[torch.Tensor] = []
    by_hand(backbone, ids, steps, said)
    return said


def some_words(rows: int, steps: int) -> Words:
    """Two for each soft token, one of which weighs more."""
    ids = torch.arange(7, 7 + 2 * rows * steps).view(rows, steps, 2)
    return Words(ids, torch.tensor([0.75, 0.25]).expand(rows, steps, 2))


@pytest.fixture(params=["plain", "adapters"])
def changed(request: Any, backbone: Backbone) -> Backbone:
    """As it is, or with adapters, among them a row of the embed token that is not the table's."""
    if request.param == "adapters":
        add_adapters(backbone, LoRASettings(rank=2))
        torch.manual_seed(4)
        with torch.no_grad():
            for name, parameter in backbone.model.named_parameters():
                if parameter.requires_grad:
                    parameter += (0.5 if "token" in name else 0.05) * torch.randn_like(parameter)
    return backbone


@pytest.mark.parametrize("engine", ["fast", "fallback"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_soft_tokens_are_the_models_mean_next_inputs(changed: Backbone, engine: Any, steps: int) -> None:
    changed.engine = engine
    for text in TEXTS:
        ids = changed.prompt_encoder.encode(text, "latent").ids
        [rollout] = Decoder(changed).run([DecodeRequest(ids, steps + 1, latent=True)])
        torch.testing.assert_close(rollout.vector, by_hand(changed, ids, steps).detach(), atol=1e-5, rtol=1e-5)
        assert (rollout.soft_tokens, rollout.reasoning_tokens, rollout.forced) == (steps, steps, False)
        assert (rollout.completion_ids, rollout.reasoning) == ([changed.embed_token_id], "")


def test_other_architectures_take_soft_tokens_too(tmp_path: Path, tokenizer: Any) -> None:
    import transformers

    from search_r3.model.loading import load_backbone
    from tests.conftest import save_model

    torch.manual_seed(2)
    config = transformers.Gemma3TextConfig(
        vocab_size=len(tokenizer) + 8, hidden_size=32, num_hidden_layers=2, intermediate_size=64, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, sliding_window=32,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    path = save_model(tmp_path / "gemma", tokenizer, transformers.Gemma3ForCausalLM(config))
    backbone = load_backbone(path, device="cpu")
    ids = backbone.prompt_encoder.encode(TEXTS[0], "latent").ids
    [rollout] = Decoder(backbone).run([DecodeRequest(ids, 4, latent=True)])
    expected = by_hand(backbone, ids, 3).detach()
    torch.testing.assert_close(rollout.vector, expected, atol=1e-5, rtol=1e-5)


def test_training_computes_the_vectors_that_decoding_does(changed: Backbone) -> None:
    prompts = [changed.prompt_encoder.encode(text, "latent").ids for text in TEXTS]
    ids, mask = pad(prompts, changed.tokenizer.pad_token_id, changed.device)
    words = some_words(3, 3)
    vectors, said = Policy(changed)(ids, mask, words=words)[:2]
    assert vectors is not None
    assert vectors.shape == (3, 3, 32)
    for steps in (1, 2, 3):
        rollouts = Decoder(changed).run([DecodeRequest(one, steps + 1, latent=True) for one in prompts])
        expected = torch.stack([rollout.vector for rollout in rollouts])
        torch.testing.assert_close(vectors[:, steps - 1].detach(), expected, atol=1e-5, rtol=1e-5)
    masked = think(changed, ids, mask, words, needs_mask=True)
    torch.testing.assert_close(masked, (vectors, said), atol=1e-5, rtol=1e-5)


def test_a_soft_token_of_a_model_that_looks_ahead_does_not_see_the_embed_token_behind_it(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = backbone.hidden_states

    def ahead(_: Any, seen: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
        weights = (torch.ones(inputs.shape[:2]) if seen is None else seen)[..., None]
        return inner(None, seen, inputs) + 20 * (weights * inputs).sum(1, keepdim=True) / weights.sum(1, keepdim=True)

    monkeypatch.setattr(backbone, "hidden_states", ahead)
    prompts = [backbone.prompt_encoder.encode(text, "latent").ids for text in TEXTS]
    vectors, _ = think(backbone, *pad(prompts, 0, backbone.device), some_words(3, 3), needs_mask=True)
    table = backbone.causal_lm.get_input_embeddings()
    for prompt, found in zip(prompts, vectors, strict=True):
        inputs = table(torch.tensor([prompt]))
        for vector in found:
            logits = backbone.logits(ahead(None, None, inputs)[:, -1])
            inputs = torch.cat([inputs, soft_tokens(backbone, logits)[:, None]], dim=1)
            fed = torch.cat([inputs, table(torch.tensor([[backbone.embed_token_id]]))], dim=1)
            expected = torch.nn.functional.normalize(ahead(None, None, fed)[0, -1], dim=0)
            torch.testing.assert_close(vector, expected, atol=1e-5, rtol=1e-5)


def test_what_soft_tokens_say_is_measured_before_each_of_them(changed: Backbone) -> None:
    prompts = [changed.prompt_encoder.encode(text, "latent").ids for text in TEXTS]
    ids, mask = pad(prompts, changed.tokenizer.pad_token_id, changed.device)
    words = some_words(3, 2)
    _, said = think(changed, ids, mask, words, needs_mask=False)
    assert said is not None
    for row, prompt in enumerate(prompts):
        for step, logits in enumerate(logits_by_hand(changed, prompt, 2)):
            each = torch.log_softmax(logits[0], -1)[words.ids[row, step]] * words.weights[row, step]
            torch.testing.assert_close(said[row, step], each.sum(), atol=1e-5, rtol=1e-5)


def test_nothing_is_kept_of_words_that_are_not_asked_for(backbone: Backbone) -> None:
    prompts = [backbone.prompt_encoder.encode(text, "latent").ids for text in TEXTS]
    ids, mask = pad(prompts, backbone.tokenizer.pad_token_id, backbone.device)
    none = Words(ids.new_empty(3, 2, 0), torch.empty(3, 2, 0))

    def compute(words: Words) -> tuple[torch.Tensor, torch.Tensor | None, int]:
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            vectors, said = think(backbone, ids, mask, words, needs_mask=False)
        return vectors, said, sum(kept.values())

    vectors, said, kept = compute(some_words(3, 2))
    without, nothing, fewer = compute(none)
    assert said is not None and nothing is None
    assert torch.equal(vectors, without)
    logits = 4 * 3 * 2 * backbone.causal_lm.config.vocab_size
    assert logits <= kept - fewer < 1.2 * logits


def test_gradients_go_through_all_soft_tokens(tmp_path: Path, tokenizer: Any) -> None:
    from search_r3.model.loading import load_backbone

    backbone = load_backbone(save_tiny(tmp_path / "untied", tokenizer, tied=False), device="cpu")
    backbone.model.double()
    ids, mask = pad([backbone.prompt_encoder.encode(TEXTS[0], "latent").ids], 0, backbone.device)
    weight = backbone.causal_lm.get_output_embeddings().weight  # a vector depends on it through soft tokens alone
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))

    def value() -> torch.Tensor:
        vectors, _ = think(backbone, ids, mask, some_words(1, 2), needs_mask=False)
        return (vectors[0, -1] * direction).sum()

    value().backward()
    assert weight.grad is not None
    step = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).double() * 1e-2
    with torch.no_grad():
        weight += step
        above = value()
        weight -= 2 * step
        below = value()
    expected = float(above - below) / 2
    assert float((weight.grad * step).sum()) == pytest.approx(expected, rel=2e-2)
    assert abs(expected) > 1e-6


def test_states_that_are_not_finite_end_a_latent_request_alone(backbone: Backbone) -> None:
    from tests.conftest import favour

    prompts = [backbone.prompt_encoder.encode(text, "latent").ids for text in TEXTS]
    favour(backbone, 0, float("nan"))
    with pytest.raises(ModelError, match="not finite in request 0"):
        Decoder(backbone).run([DecodeRequest(ids, 3, latent=True) for ids in prompts])


def test_vectors_differ_by_what_would_have_been_written(backbone: Backbone) -> None:
    ids = backbone.prompt_encoder.encode(TEXTS[0], "latent").ids
    found = [Decoder(backbone).run([DecodeRequest(ids, steps, latent=True)])[0].vector for steps in (1, 2, 3)]
    assert all(np.abs((one - other).numpy()).max() > 1e-3 for one, other in pairwise(found))
