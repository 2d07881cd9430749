"""The encoding engine on a GPU gives what it gives on the CPU. Run with `pytest -m gpu`."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from search_r3 import SearchR3
from search_r3.model.engine.decoding import Decoder, DecodeRequest

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


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("look_every", [1, 8])
def test_replies_do_not_depend_on_how_often_the_host_looks_nor_on_graphs(
    tiny_path: Path, look_every: int, graphs: bool, caplog: pytest.LogCaptureFixture
) -> None:
    here, there = (SearchR3(tiny_path, device=device, dtype="float32").backbone for device in ("cpu", "cuda"))
    requests = [
        DecodeRequest(here.prompt_encoder.encode(text, "reason").ids, 5 + 9 * (place % 5), place % 2, 0.9, seed=place)
        for place, text in enumerate(TEXTS)
    ]
    there.graphs = graphs
    expected, decoder = Decoder(here).run(requests), Decoder(there, 4, look_every)
    for found in (decoder.run(requests), decoder.run(requests)):
        for one, other in zip(found, expected, strict=True):
            assert one.completion_ids == other.completion_ids
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-3)
            np.testing.assert_allclose(one.vector, other.vector, atol=1e-4)
    assert not [record for record in caplog.records if "CUDA graphs" in record.getMessage()]


def test_between_two_looks_nothing_waits_for_the_device(tiny_path: Path) -> None:
    backbone = SearchR3(tiny_path, device="cuda", dtype="float32").backbone
    prompts = [backbone.prompt_encoder.encode(text, "reason").ids for text in TEXTS]
    waited = []
    for steps in (2, 8):
        decoder = Decoder(backbone, look_every=8)
        for seed, ids in enumerate(prompts):
            decoder.submit(DecodeRequest(ids, 60, 1.0, 0.9, seed=seed))
        decoder.step()
        decoder.look_every = steps
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            decoder.step()
            torch.cuda.set_sync_debug_mode("default")
        waited.append(sum("called a synchronizing" in str(one.message) for one in said))
    assert waited[0] == waited[1] > 0


def test_a_gpu_and_bfloat16_are_the_defaults(tiny_path: Path) -> None:
    backbone = SearchR3(tiny_path).backbone
    assert (backbone.device.type, backbone.dtype) == ("cuda", "bfloat16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_stay_near_float32(tiny_path: Path, dtype: str) -> None:
    exact, rounded = SearchR3(tiny_path, dtype="float32"), SearchR3(tiny_path, device="cuda", dtype=dtype)
    cosines = (exact.encode_document(TEXTS) * rounded.encode_document(TEXTS)).sum(-1)
    assert cosines.min() > 0.999
