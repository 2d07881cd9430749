"""The exact index on a GPU answers as on the CPU. Run with `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from search_r3.retrieval.index import ExactIndex

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_index_on_the_gpu_answers_as_on_the_cpu(tmp_path: Path, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    # Eighths: sums are exact in either precision, so ranks and ties are the same on every device.
    vectors = rng.integers(-4, 5, size=(20_000, 32)).astype(np.float32) / 8
    queries = rng.integers(-4, 5, size=(50, 32)).astype(np.float32) / 8
    doc_ids = [f"d{i:05d}" for i in range(len(vectors))]
    on_cpu, on_gpu = (ExactIndex(doc_ids, vectors, dtype=dtype, device=device) for device in ("cpu", "cuda"))
    for index in (on_cpu, on_gpu):
        index.update(index.rows_of(doc_ids[:100]), -vectors[:100], version=3)
    for found, expected in zip(on_gpu.search_rows(queries, 20), on_cpu.search_rows(queries, 20), strict=True):
        np.testing.assert_array_equal(found, expected)
    wanted = [range(i, i + 3) for i in range(50)]
    assert on_gpu.ranks(queries, wanted) == on_cpu.ranks(queries, wanted)
    on_gpu.save(tmp_path)
    loaded = ExactIndex.load(tmp_path, device="cuda")
    np.testing.assert_array_equal(loaded.matrix, on_cpu.matrix)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pair_has_the_same_score_whatever_is_asked_with_it(dtype: Any) -> None:
    vectors = np.random.default_rng(0).normal(size=(600, 896)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = ExactIndex([f"{600 - i:03}" for i in range(600)], vectors, dtype=dtype, device="cuda")
    [all_scores] = index.scores_at(vectors[:1], [np.arange(600)])
    for count in (1, 2, 7, 16, 40, 256, 300):
        np.testing.assert_array_equal(index.scores_at(vectors[:1], [np.arange(count)])[0], all_scores[:count])
    assert index.ranks(vectors[:50], [[row] for row in range(50)]) == [[1]] * 50
