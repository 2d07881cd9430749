"""A run that was stopped and resumed gives the same weights, bit for bit, as one that was not (CPU)."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from search_r3.config import Recipe, load_recipe
from search_r3.training.grpo import train_grpo
from search_r3.training.run import Run
from search_r3.training.sft import train_sft
from tests.conftest import Stop, StopAt

SETTINGS = [
    "max_length=120", "max_new_tokens=16", "save_every=2",
    "sft.steps=7", "sft.batch_size=4", "sft.splits={train: 1.0}", "sft.warmup_steps=2",
    "grpo.steps=7", "grpo.queries_per_step=2", "grpo.group_size=3", "grpo.splits=[train]", "grpo.evaluate_every=3",
    "grpo.embedding_loss_weight=0.1", "grpo.kl_coefficient=0.01", "grpo.learning_rate=2e-3",
]  # fmt: skip


def recipe(folder: Path, tiny_path: Path, collection_path: Path, *more: str) -> Recipe:
    where = [f"run_dir={folder}", f"base={tiny_path}", f"collection={collection_path}"]
    return load_recipe(None, [*SETTINGS, *where, *more])


def same_weights(first: Path, second: Path) -> bool:
    one, two = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def steps_logged(run: Run, stage: str) -> list[int]:
    return [row["step"] for row in run.metrics(stage)]


def check_described(run: Run, stage: str) -> None:
    described = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    for name in {name for row in run.metrics(stage) for name in row} - {"stage", "step"}:
        assert f"`{name}`" in described, name


@pytest.mark.parametrize("stopped_at", [1, 2, 5])
def test_a_resumed_stage_1_equals_an_unbroken_one(
    tmp_path: Path, tiny_path: Path, collection_path: Path, stopped_at: int
) -> None:
    whole = recipe(tmp_path / "whole", tiny_path, collection_path)
    expected = train_sft(whole).model_path
    broken = recipe(tmp_path / "broken", tiny_path, collection_path)
    with pytest.raises(Stop):
        train_sft(broken, callbacks=[StopAt(stopped_at)], resume=True)
    assert not Run(broken).finished("sft")
    run = Run(broken)
    assert same_weights(train_sft(broken, resume=True).model_path, expected)
    assert steps_logged(run, "sft") == list(range(1, 8))
    assert not same_weights(expected, tiny_path), "seven steps must change the weights"
    check_described(run, "sft")


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, collection_path: Path) -> Path:
    """A tiny model that stage 1 has taught to emit the embed token."""
    options = ["sft.steps=120", "sft.learning_rate=1e-2", "sft.reasoning_styles={restate: 1.0}", "save_every=100"]
    settings = recipe(tmp_path_factory.mktemp("stage1") / "run", tiny_path, collection_path, *options)
    return train_sft(settings).model_path


REFRESHES = {
    "never": "{policy: never}",
    "full": "{policy: full}",
    "periodic": "{policy: periodic, every: 3}",
    "drift": "{policy: drift, drift_sample: 20}",
    "shortlist": "{policy: shortlist, depth: 3, correct_drift: true, drift_sample: 16}",
    "selective": "{policy: selective, depth: 3, neighbours: 3, max_documents: 8, audit_every: 2, audit_documents: 10}",
}


CHOSEN = [
    "grpo.refresh={policy: shortlist}", "grpo.baseline=direct", "grpo.redraws=2", "grpo.curriculum=3",
    "grpo.reward.contrastive=0.5", "grpo.embedding_loss_on=winners", "grpo.direct_loss_weight=0.2",
]  # fmt: skip


@pytest.mark.parametrize("refresh", [*REFRESHES, "chosen"])
@pytest.mark.parametrize("stopped_at", [1, 5])
def test_a_resumed_stage_2_equals_an_unbroken_one(
    tmp_path: Path, tiny_path: Path, collection_path: Path, stage_1: Path, refresh: str, stopped_at: int
) -> None:
    options = CHOSEN if refresh == "chosen" else [f"grpo.refresh={REFRESHES[refresh]}"]
    whole = recipe(tmp_path / "whole", tiny_path, collection_path, *options)
    expected = train_grpo(whole, model=stage_1).model_path
    broken = recipe(tmp_path / "broken", tiny_path, collection_path, *options)
    with pytest.raises(Stop):
        train_grpo(broken, model=stage_1, callbacks=[StopAt(stopped_at)], resume=True)
    run = Run(broken)
    assert same_weights(train_grpo(broken, model=stage_1, resume=True).model_path, expected)
    assert steps_logged(run, "grpo") == list(range(8))
    assert (sum(row.get("redrawn_groups", 0) for row in run.metrics("grpo")) > 0) == (refresh == "chosen")
    assert not same_weights(expected, stage_1)
    for one, two in zip(run.metrics("grpo"), Run(whole).metrics("grpo"), strict=True):
        assert {k: v for k, v in one.items() if "second" not in k} == {
            k: v for k, v in two.items() if "second" not in k
        }
    check_described(run, "grpo")
    rows = [json.loads(line) for line in run.rollouts_path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [step for step in range(1, 8) for _ in range(6)]


def test_a_run_on_an_approximate_index_resumes(
    tmp_path: Path, tiny_path: Path, collection_path: Path, stage_1: Path
) -> None:
    broken = recipe(
        tmp_path / "run", tiny_path, collection_path, "grpo.refresh={policy: shortlist, index: approximate}"
    )
    with pytest.raises(Stop):
        train_grpo(broken, model=stage_1, callbacks=[StopAt(3)], resume=True)
    run = Run(broken)
    train_grpo(broken, model=stage_1, resume=True)
    assert [row["index_recall"] for row in run.metrics("grpo") if row["step"]] == [1.0] * 7


def test_the_refresh_policies_learn_differently(
    tmp_path: Path, tiny_path: Path, collection_path: Path, stage_1: Path
) -> None:
    """Else the tests above would not show that the policy's state is restored."""
    models = []
    for name, refresh in REFRESHES.items():
        settings = recipe(tmp_path / name, tiny_path, collection_path, f"grpo.refresh={refresh}")
        models.append(train_grpo(settings, model=stage_1).model_path)
    for one, two in combinations(models, 2):
        assert not same_weights(one, two)


def test_an_audited_run_learns_what_an_unaudited_one_does(
    tmp_path: Path, tiny_path: Path, collection_path: Path, stage_1: Path
) -> None:
    models, logs = [], []
    for every in (0, 2):
        options = ["grpo.refresh.policy=never", f"grpo.refresh.audit_every={every}", "grpo.refresh.audit_documents=0"]
        settings = recipe(tmp_path / str(every), tiny_path, collection_path, *options)
        models.append(train_grpo(settings, model=stage_1).model_path)
        logs.append(Run(settings).metrics("grpo"))
    assert same_weights(*models)
    assert not any("audit_reward_error" in row for row in logs[0])
    audited = [row for row in logs[1] if "audit_reward_error" in row]
    assert [row["step"] for row in audited] == [2, 4, 6]
    assert all(row["audit_documents"] == 40 for row in audited)
    assert audited[-1]["audit_drift_mean"] > audited[0]["audit_drift_mean"] > 0, "never lets the corpus drift away"


def test_a_finished_stage_is_not_trained_again(tmp_path: Path, tiny_path: Path, collection_path: Path) -> None:
    settings = recipe(tmp_path / "run", tiny_path, collection_path)
    path = train_sft(settings).model_path
    before = (path / "model.safetensors").stat().st_mtime_ns
    train_sft(settings, callbacks=[StopAt(1)], resume=True)
    assert (path / "model.safetensors").stat().st_mtime_ns == before


def test_a_policy_that_never_emits_the_token_stops_stage_2(
    tmp_path: Path, tiny_path: Path, collection_path: Path
) -> None:
    from search_r3.errors import RunError

    settings = recipe(tmp_path / "run", tiny_path, collection_path)
    with pytest.raises(RunError, match="emitted the embed token"):
        train_grpo(settings, model=tiny_path)
