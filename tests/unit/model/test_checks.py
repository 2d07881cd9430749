from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from search_r3 import SearchR3
from search_r3.errors import ModelError
from search_r3.model.checks import check_backbone
from search_r3.model.engine.fallback import FallbackEngine
from search_r3.model.engine.forward import is_drivable
from search_r3.model.engine.slots import SlotEngine
from search_r3.model.loading import load_backbone
from tests.conftest import save_model, save_tiny

TEXTS = ["where is the red house?", "river", "a black horse and a white chair on a green boat"]


def save_random(folder: Path, tokenizer: Any, kind: str, **options: Any) -> Path:
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer) + 2, hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **options,
    )  # fmt: skip
    return save_model(folder, tokenizer, transformers.AutoModelForCausalLM.from_config(config))


def off(states: torch.Tensor) -> torch.Tensor:
    return states * torch.linspace(0.99, 1.01, states.shape[-1])


def said(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What the checks have logged."""
    return [record for record in caplog.records if record.name == check_backbone.__module__]


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_usual_architectures_take_the_fast_engine(
    tmp_path: Path, tokenizer: Any, kind: str, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = load_backbone(save_random(tmp_path / "model", tokenizer, kind), dtype=dtype)
    assert is_drivable(backbone.causal_lm)
    assert backbone.engine == "fast"
    assert said(caplog) == []


@pytest.mark.parametrize("step", ["encode", "prompt_states", "advance"])
@pytest.mark.parametrize("kind", ["Qwen2", "Olmo2"])
def test_an_engine_that_computes_otherwise_is_not_taken(
    tmp_path: Path,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    step: str,
    kind: str,
) -> None:
    folder = save_random(tmp_path / "model", tokenizer, kind)
    expected = SearchR3(folder, device="cpu").encode_document(TEXTS)
    right = getattr(SlotEngine, step)
    monkeypatch.setattr(SlotEngine, step, lambda self, ids: off(right(self, ids)))
    model = SearchR3(folder, device="cpu")
    assert model.backbone.engine == "fallback"
    assert model.backbone.frozen_copy().engine == "fallback"
    [record] = said(caplog)
    assert record.levelno == logging.WARNING
    assert "slower" in record.message
    assert model.backbone.causal_lm.config._attn_implementation == "sdpa", "as it was"
    np.testing.assert_allclose(model.encode_document(TEXTS), expected, atol=1e-5)


def test_what_neither_engine_computes_is_refused(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "model", tokenizer)
    right = FallbackEngine.advance
    monkeypatch.setattr(SlotEngine, "share", lambda self, ids: 1 / 0)
    monkeypatch.setattr(FallbackEngine, "advance", lambda self, ids: off(right(self, ids)))
    with pytest.raises(ModelError, match=r"Qwen2ForCausalLM cannot be encoded here .*off by .*choose a base"):
        load_backbone(folder)
    monkeypatch.setattr(FallbackEngine, "advance", lambda self, ids: 1 / 0)
    with pytest.raises(ModelError, match=r"Qwen2ForCausalLM cannot .*\(ZeroDivisionError: division by zero\)"):
        load_backbone(folder)


def test_a_device_that_is_full_is_no_architecture_that_is_unknown(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: SlotEngine, ids: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(SlotEngine, "share", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_backbone(save_tiny(tmp_path / "model", tokenizer))


def test_a_window_that_the_attention_is_not_told_of_takes_the_fallback(tmp_path: Path, tokenizer: Any) -> None:
    """Qwen2-MoE cuts with a mask alone, which a probe shorter than the window cannot show."""
    folder = save_random(
        tmp_path / "model", tokenizer, "Qwen2Moe", use_sliding_window=True, sliding_window=16, max_window_layers=0,
        layer_types=["sliding_attention"] * 2, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )  # fmt: skip
    model = SearchR3(folder, device="cpu")
    assert model.backbone.engine == "fallback"
    own = model.backbone.causal_lm
    assert own.config._attn_implementation == "sdpa"
    for text, vector in zip(TEXTS, model.encode_document(TEXTS), strict=True):
        ids = torch.tensor([model.backbone.prompt_encoder.encode(text, "document").ids])
        assert ids.shape[1] > 16
        with torch.no_grad():
            hidden = own.model(ids).last_hidden_state[0, -1]
        np.testing.assert_allclose(vector, hidden / hidden.norm(), atol=1e-5)


def rope(kind: str) -> dict[str, Any]:
    more = {"short_factor": [1.0] * 4, "long_factor": [1.0, 4.0, 9.0, 20.0], "original_max_position_embeddings": 128}
    return {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0} | (more if kind == "longrope" else {})


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rope_does_not_depend_on_the_company(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    folder = save_random(tmp_path / "model", tokenizer, "Llama", rope_parameters=rope(kind))
    settings = SearchR3(folder, device="cpu").backbone.settings
    long = {"max_length": 200, "max_new_tokens": 50}
    model = SearchR3(folder, device="cpu", settings=settings.model_copy(update=long))
    text = "red house and blue boat " * 30
    together = model.encode_document([*TEXTS, text])
    np.testing.assert_allclose(together[:3], model.encode_document(TEXTS), atol=1e-5)
    np.testing.assert_allclose(together[:1], model.encode_document(TEXTS[:1]), atol=1e-5)
    ids = [model.backbone.prompt_encoder.encode(one, "document").ids for one in (*TEXTS, text)]
    assert len(ids[-1]) > 100
    for vector, one in zip(together, ids, strict=True):
        trained = model.backbone.embed([one])[0].detach().numpy()
        np.testing.assert_allclose(vector, trained, atol=1e-5, err_msg="training's forward pass turns alike")
    one, other = (
        model.encode_query([TEXTS[0]], max_new_tokens=12),
        model.encode_query([text, TEXTS[0]], max_new_tokens=12),
    )
    np.testing.assert_allclose(one.vectors[0], other.vectors[1], atol=1e-5)


@pytest.mark.parametrize(("limits", "factor"), [((100, 28), "short_factor"), ((100, 29), "long_factor")])
def test_the_limits_choose_the_factors_of_longrope(
    tmp_path: Path, tokenizer: Any, limits: tuple[int, int], factor: str
) -> None:
    folder = save_random(tmp_path / "model", tokenizer, "Llama", rope_parameters=rope("longrope"))
    backbone = load_backbone(folder)
    limited = backbone.settings.model_copy(update=dict(zip(("max_length", "max_new_tokens"), limits, strict=True)))
    rotary = load_backbone(folder, settings=limited).causal_lm.model.rotary_emb
    plain = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    expected = plain / torch.tensor(rope("longrope")[factor])
    for length in (3, 200):
        rotary(torch.zeros(1), torch.arange(length)[None])
        torch.testing.assert_close(rotary.inv_freq, expected)


def test_checking_twice_changes_nothing(tmp_path: Path, tokenizer: Any) -> None:
    backbone = load_backbone(save_random(tmp_path / "model", tokenizer, "Olmo2"))
    before = SearchR3(backbone).encode_document(TEXTS)
    check_backbone(backbone)
    assert backbone.engine == "fast"
    np.testing.assert_array_equal(SearchR3(backbone).encode_document(TEXTS), before)
