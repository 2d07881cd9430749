from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from search_r3 import SearchR3
from search_r3.errors import ConfigError
from search_r3.model.engine import packed
from search_r3.model.engine.packed import PackedLinear
from tests.conftest import save_tiny

TEXTS = ["where is the red house?", "river", "a black horse and a white chair on a green boat"]

pytestmark = pytest.mark.skipif(not packed.can_pack(), reason="this machine's torch has no such products")


def folder_of(tmp_path: Path, tokenizer: Any, kind: str, tied: bool) -> Path:
    """A tiny model that has the embed token."""
    whole = SearchR3(save_tiny(tmp_path / "base", tokenizer, kind, tied=tied), device="cpu")
    whole.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def halved(folder: Path) -> SearchR3:
    """The weights rounded to float16, in float32: what a packed model has to compute as."""
    model = SearchR3(folder, device="cpu")
    with torch.no_grad():
        for parameter in model.backbone.model.parameters():
            parameter.copy_(parameter.half())
    return model


def is_packed(model: SearchR3) -> bool:
    return any(isinstance(module, PackedLinear) for module in model.backbone.model.modules())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_float16_on_a_cpu_rounds_nothing_but_the_weights(
    tmp_path: Path, tokenizer: Any, kind: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_PIECE_ROWS", 100)  # the output layer has more
    folder = folder_of(tmp_path, tokenizer, kind, tied)
    ours, exact = SearchR3(folder, device="cpu", dtype="float16"), halved(folder)
    assert is_packed(ours)
    assert (ours.backbone.dtype, ours.backbone.engine) == ("float16", "fast")
    np.testing.assert_allclose(ours.encode_document(TEXTS), exact.encode_document(TEXTS), atol=1e-5)
    options: dict[str, Any] = {"max_new_tokens": 8, "sampling_temperature": 1.0, "seed": 3}
    for texts in (TEXTS, TEXTS[0]):
        one, other = ours.encode_query(texts, "reason", **options), exact.encode_query(texts, "reason", **options)
        assert one.reasoning == other.reasoning
        np.testing.assert_allclose(one.vectors, other.vectors, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_model_is_saved_as_any_other(tmp_path: Path, tokenizer: Any, tied: bool) -> None:
    folder = folder_of(tmp_path, tokenizer, "qwen2", tied)
    SearchR3(folder, device="cpu", dtype="float16").save_pretrained(tmp_path / "saved")
    names = [set(load_file(path / "model.safetensors")) for path in (folder, tmp_path / "saved")]
    assert names[0] == names[1], "a tied table is written once"
    weights = SearchR3(tmp_path / "saved", device="cpu").backbone.model.state_dict()
    expected = halved(folder).backbone.model.state_dict()
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, atol=0, rtol=0)


def test_a_packed_model_stays_on_its_cpu_and_can_be_copied(tiny_path: Path) -> None:
    ours = SearchR3(tiny_path, device="cpu", dtype="float16")
    with pytest.raises(ConfigError, match="packed for this CPU"):
        ours.backbone.on([torch.device("meta")])
    twin = copy.deepcopy(ours.backbone.model)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(twin(input_ids=ids).logits, ours.backbone.model(input_ids=ids).logits)


def test_where_there_are_no_such_products_float16_is_torchs_own(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any) -> Any:
        raise RuntimeError("Didn't find engine for operation quantized::linear_prepack_fp16")

    monkeypatch.setattr(packed, "_prepack", missing)
    packed.can_pack.cache_clear()
    try:
        ours = SearchR3(tiny_path, device="cpu", dtype="float16")
        assert not is_packed(ours)
        assert ours.encode_query(TEXTS[0], "direct").vectors.shape == (1, 32)
    finally:
        packed.can_pack.cache_clear()


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_nothing_else_is_packed(tiny_path: Path, dtype: str) -> None:
    assert not is_packed(SearchR3(tiny_path, device="cpu", dtype=dtype))
