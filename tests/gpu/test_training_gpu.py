"""Both stages learn on a GPU, in float32 and with products in bfloat16, and go on where they were stopped.

Run with `pytest -m gpu`. Sums on a GPU come in any order, so a resumed run equals an unbroken one to rounding only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from search_r3.config import Recipe, load_recipe
from search_r3.model.precision import float32_scores
from search_r3.training.grpo import train_grpo
from search_r3.training.run import Run
from search_r3.training.sft import train_sft
from tests.conftest import Stop, StopAt

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SETTINGS = [
    "max_length=120", "max_new_tokens=16", "save_every=2", "sft.steps=4", "sft.batch_size=4", "sft.warmup_steps=2",
    "sft.splits={train: 1.0}", "sft.reasoning_styles={restate: 1.0}", "sft.random_negatives=3",
    "sft.hard_negatives=0", "grpo.steps=4", "grpo.queries_per_step=2", "grpo.group_size=3", "grpo.splits=[train]",
    "grpo.evaluate_every=3", "grpo.embedding_loss_weight=0.1", "grpo.kl_coefficient=0.01", "grpo.learning_rate=2e-3",
]  # fmt: skip
PRECISIONS: dict[str, list[str]] = {
    "float32": [],
    "bf16": ["mixed_precision=bf16"],
    "checkpointed": ["mixed_precision=bf16", "gradient_checkpointing=true", "sft.micro_batch_size=3"],
    "adapters": ["dtype=bfloat16", "lora.rank=4", "lora.alpha=8"],
}


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps one precision per process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def recipe(folder: Path, base: Path, collection: Path, precision: str, *more: str) -> Recipe:
    if precision == "adapters":
        pytest.importorskip("peft")
    where = [f"run_dir={folder}", f"base={base}", f"collection={collection}"]
    return load_recipe(None, [*SETTINGS, *where, *PRECISIONS[precision], *more])


def difference(first: Path, second: Path) -> float:
    """The largest, over all weights."""
    one, two = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return max(float((one[name].float() - two[name].float()).abs().max()) for name in one)


def finite(run: Run, stage: str) -> bool:
    return all(math.isfinite(value) for row in run.metrics(stage) for name, value in row.items() if name != "stage")


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, collection_path: Path) -> tuple[Run, Path]:
    """A stage 1 in float32, long enough for some rollouts to emit the embed token."""
    AcceleratorState._reset_state(reset_partial_state=True)
    more = ["sft.steps=80", "sft.learning_rate=1e-2", "save_every=100"]
    run = Run(recipe(tmp_path_factory.mktemp("gpu") / "run", tiny_path, collection_path, "float32", *more))
    path = train_sft(run.recipe).model_path
    AcceleratorState._reset_state(reset_partial_state=True)
    return run, path


def test_stage_1_learns(taught: tuple[Run, Path]) -> None:
    rows = taught[0].metrics("sft")
    assert finite(taught[0], "sft")
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_stage_1_goes_on(
    tmp_path: Path, tiny_path: Path, collection_path: Path, taught: tuple[Run, Path], precision: str
) -> None:
    whole, broken = (Run(recipe(tmp_path / name, tiny_path, collection_path, precision)) for name in ("one", "two"))
    path = train_sft(whole.recipe).model_path
    assert finite(whole, "sft")
    assert difference(path, tiny_path) > 0
    first = taught[0].metrics("sft")[0]["loss"]
    assert whole.metrics("sft")[0]["loss"] == pytest.approx(first, rel=1e-4 if precision == "float32" else 2e-2)
    with pytest.raises(Stop):
        train_sft(broken.recipe, callbacks=[StopAt(3)], resume=True)
    assert (broken.folder / "sft" / "checkpoints" / "step-000002").is_dir()
    again = Run(broken.recipe)
    train_sft(again.recipe, resume=True)
    assert [row["step"] for row in again.metrics("sft")] == [1, 2, 3, 4]
    for one, two in zip(whole.metrics("sft"), again.metrics("sft"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3 if precision == "float32" else 2e-2)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_stage_2_learns_and_goes_on(
    tmp_path: Path, tiny_path: Path, collection_path: Path, taught: tuple[Run, Path], precision: str
) -> None:
    base = taught[1]
    run = Run(recipe(tmp_path / "run", tiny_path, collection_path, precision))
    with pytest.raises(Stop):
        train_grpo(run.recipe, model=base, callbacks=[StopAt(3)])
    again = Run(run.recipe)
    path = train_grpo(again.recipe, model=base, resume=True).model_path
    assert [row["step"] for row in again.metrics("grpo")] == [0, 1, 2, 3, 4]
    assert finite(again, "grpo")
    assert difference(path, base) > 0
    # Decoding and training compute the same log-probabilities; in bfloat16 by other kernels, to its rounding.
    gaps = [row["sampler_gap"] for row in again.metrics("grpo")[1:]]
    assert max(gaps) < (1e-3 if precision == "float32" else 0.1)


def test_logits_are_summed_and_kept_in_float32() -> None:
    layer = torch.nn.Linear(64, 1000, bias=False, device="cuda", dtype=torch.bfloat16)
    states = torch.randn(7, 64, device="cuda").mul(20).bfloat16().requires_grad_()
    scores, usual = float32_scores(layer, states), layer(states).float()
    exact = states.double() @ layer.weight.double().T
    assert (scores - exact).abs().max() < 1e-5 * exact.abs().max() < 1e-2 * (usual - exact).abs().max()
    direction = torch.randn_like(scores)
    found, expected = (torch.autograd.grad((one * direction).sum(), [states, layer.weight]) for one in (scores, usual))
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-2 * float(two.abs().max()), rtol=1e-2)
