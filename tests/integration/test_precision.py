"""bfloat16 computation over float32 weights, and trackers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from search_r3.config import Recipe, load_recipe
from search_r3.errors import ConfigError
from search_r3.model.encoder import SearchR3
from search_r3.training import tracking
from search_r3.training.engine import make_engine
from search_r3.training.grpo import train_grpo
from search_r3.training.run import Run
from search_r3.training.sft import train_sft
from tests.conftest import SMALL


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps one precision per process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def recipe(folder: Path, base: Path, collection: Path, *more: str) -> Recipe:
    where = [f"run_dir={folder}", f"base={base}", f"collection={collection}"]
    return load_recipe(None, [*SMALL, *where, *more])


def test_both_stages_compute_in_bfloat16_and_keep_float32_weights(
    tmp_path: Path, tiny_path: Path, collection_path: Path
) -> None:
    settings = recipe(tmp_path / "run", tiny_path, collection_path, "mixed_precision=bf16", "grpo.kl_coefficient=0.1")
    run = Run(settings)
    first = train_sft(settings).model_path
    assert run.metrics("sft")[-1]["loss"] < 0.6 * run.metrics("sft")[0]["loss"]
    weights = load_file(first / "model.safetensors")
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in weights.values()), "steps are kept whole"
    train_grpo(settings, model=first)
    rows = run.metrics("grpo")[1:]
    # Sampled with bfloat16 weights, trained under autocast: near, but not to float32's rounding.
    gaps = [row["sampler_gap"] for row in rows]
    assert 1e-6 < min(gaps) <= max(gaps) < 0.1


def test_sampling_sees_the_precision_of_training_and_gives_the_weights_back(tiny_path: Path, tmp_path: Path) -> None:
    model = SearchR3(tiny_path, device="cpu")
    settings = Recipe(mixed_precision="bf16", run_dir=str(tmp_path))
    engine = make_engine(model, settings, settings.grpo)
    before = {name: value.clone() for name, value in model.backbone.model.state_dict().items()}
    with engine.full_params():
        assert model.backbone.dtype == "bfloat16"
        assert model.encode_document(["a red house"]).dtype == "float32"
    after = model.backbone.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_second_precision_in_one_process_is_refused(tiny_path: Path, tmp_path: Path) -> None:
    for precision in ("bf16", "no"):
        settings = Recipe(mixed_precision=precision, run_dir=str(tmp_path))
        if precision == "no":
            with pytest.raises(ConfigError, match="mixed_precision=no, but this process has begun with bf16"):
                make_engine(SearchR3(tiny_path, device="cpu"), settings, settings.grpo)
        else:
            make_engine(SearchR3(tiny_path, device="cpu"), settings, settings.grpo)


def test_metrics_reach_a_tracker_beside_the_file(tmp_path: Path, tiny_path: Path, collection_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ["trackers=[tensorboard]", "sft.steps=3"]
    settings = recipe(tmp_path / "run", tiny_path, collection_path, *options)
    run = Run(settings)
    train_sft(settings)
    found = EventAccumulator(str(tmp_path / "run" / "trackers" / "search-r3"))
    found.Reload()
    logged = [event.value for event in found.Scalars("sft/loss")]
    assert logged == pytest.approx([row["loss"] for row in run.metrics("sft")])


def test_a_tracker_that_is_not_installed_is_named(
    tmp_path: Path, tiny_path: Path, collection_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    settings = recipe(tmp_path / "run", tiny_path, collection_path, "trackers=[wandb]")
    with pytest.raises(ConfigError, match="the package wandb is not installed; pip install wandb"):
        train_sft(settings)
