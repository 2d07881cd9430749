"""The encoding engine on a GPU gives what it gives on the CPU. Run with `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from search_r3 import SearchR3

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

TEXTS = [f"the {colour} {thing} is here" for colour in ("red", "green", "blue") for thing in ("house", "boat", "lamp")]


def test_documents_and_queries_are_those_of_the_cpu(tiny_path: Path) -> None:
    here, there = SearchR3(tiny_path, device="cpu"), SearchR3(tiny_path, device="cuda", dtype="float32")
    np.testing.assert_allclose(there.encode_document(TEXTS), here.encode_document(TEXTS), atol=1e-4)
    options = {"max_new_tokens": 12, "sampling_temperature": 1.0, "batch_size": 4}
    expected, found = here.encode_query(TEXTS, **options), there.encode_query(TEXTS, **options)
    prompt = there.backbone.prompt_encoder.encode(TEXTS[0], "reason").ids
    assert there.rollouts([prompt], max_new_tokens=4)[0].vector.device.type == "cpu"
    assert found.reasoning == expected.reasoning
    np.testing.assert_allclose(found.vectors, expected.vectors, atol=1e-4)


def test_a_gpu_and_bfloat16_are_the_defaults(tiny_path: Path) -> None:
    backbone = SearchR3(tiny_path).backbone
    assert (backbone.device.type, backbone.dtype) == ("cuda", "bfloat16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_stay_near_float32(tiny_path: Path, dtype: str) -> None:
    exact, rounded = SearchR3(tiny_path, dtype="float32"), SearchR3(tiny_path, device="cuda", dtype=dtype)
    cosines = (exact.encode_document(TEXTS) * rounded.encode_document(TEXTS)).sum(-1)
    assert cosines.min() > 0.999
