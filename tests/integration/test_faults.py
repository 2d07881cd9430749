"""Faults that are really made: nothing is lost, it is said what to do, and a resumed run ends as an unbroken one."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from search_r3.files import find_damage
from search_r3.training.run import MANIFEST
from tests.faults import Forker

logger = logging.getLogger(__name__)

SETTINGS = [
    "max_length=120", "max_new_tokens=16", "save_every=1",
    "sft.steps=4", "sft.batch_size=4", "sft.splits={train: 1.0}", "sft.warmup_steps=2",
    "grpo.steps=4", "grpo.queries_per_step=2", "grpo.group_size=3", "grpo.splits=[train]", "grpo.evaluate_every=3",
    "grpo.embedding_loss_weight=0.1", "grpo.kl_coefficient=0.01", "grpo.learning_rate=2e-3",
    "grpo.refresh={policy: selective, depth: 3, neighbours: 3, max_documents: 8}",
]  # fmt: skip
STAGES = ("sft", "grpo")
EVALUATE = "search_r3.training.dev:DevSplit.evaluate"
FORWARD = "search_r3.training.policy:Policy.forward"
BACKWARD = "search_r3.training.engine:Engine.backward"
GATHER = "search_r3.parallel:ProcessGroup.all_gather"
SAVE_STATE = "accelerate:Accelerator.save_state"
LOADING = "search_r3.training.sft:load_model"
LOG = "search_r3.training.run:Run.log"


def slow(*values: Any) -> Any:
    """A case that is left to the slow tests."""
    return pytest.param(*values, marks=pytest.mark.slow)


class Lab:
    """Runs the command line in forked processes, and knows what an unbroken run ends with."""

    def __init__(self, folder: Path, tiny_path: Path, collection_path: Path) -> None:
        self.folder, self.tiny_path, self.collection_path = folder, tiny_path, collection_path
        self.forker = Forker(tiny_path)
        self.unbroken: dict[tuple[str, int], Path] = {}
        self.seconds: dict[str, float] = {}
        self.changes: dict[str, int] = {}
        taught = ["sft.steps=120", "sft.learning_rate=1e-2", "sft.reasoning_styles={restate: 1.0}", "save_every=1000"]
        assert self.forker.run(folder / "log", *self.call("sft", folder / "taught", *taught)) == [0]
        self.stage_1 = folder / "taught" / "sft" / "model"

    def call(self, stage: str, run_dir: Path, *more: str) -> list[str]:
        """A command line."""
        where = [f"run_dir={run_dir}", f"base={self.tiny_path}", f"collection={self.collection_path}"]
        return [stage, *SETTINGS, *where, *more, *(["--model", str(self.stage_1)] if stage == "grpo" else [])]

    def run(self, stage: str, run_dir: Path, *more: str, world_size: int = 1, **fault: Any) -> tuple[list[int], str]:
        """Exit statuses and what all processes said, on one line."""
        log = self.folder / "log"
        statuses = self.forker.run(log, *self.call(stage, run_dir, *more), world_size=world_size, **fault)
        return statuses, self.said(world_size)

    def said(self, world_size: int = 1) -> str:
        """What the processes of the last call said."""
        return " ".join(" ".join(self.heard(rank).split()) for rank in range(world_size))

    def heard(self, rank: int) -> str:
        """What one process said."""
        return (self.folder / f"log.{rank}").read_text()

    def whole(self, stage: str, world_size: int = 1) -> Path:
        """An unbroken run."""
        key = stage, world_size
        if key not in self.unbroken:
            run_dir, count = self.folder / f"whole-{stage}-{world_size}", self.folder / "count"
            started = time.monotonic()
            fault = {"before_a_change": [str(run_dir), -1, str(count)]}
            assert self.run(stage, run_dir, world_size=world_size, **fault)[0] == [0] * world_size, self.said()
            self.seconds[stage], self.changes[stage] = time.monotonic() - started, int(count.read_text())
            self.unbroken[key] = run_dir
        return self.unbroken[key]

    def check(self, stage: str, run_dir: Path, world_size: int = 1) -> None:
        """The run ended as the unbroken one did, and left nothing behind."""
        whole = self.whole(stage, world_size)
        assert same_weights(model_path(stage, run_dir), model_path(stage, whole))
        assert timeless(run_dir, "metrics.jsonl") == timeless(whole, "metrics.jsonl")
        assert timeless(run_dir, "rollouts.jsonl") == timeless(whole, "rollouts.jsonl")
        assert names(run_dir) == names(whole)


def model_path(stage: str, run_dir: Path) -> Path:
    return run_dir / "model" if stage == "grpo" else run_dir / stage / "model"


def same_weights(first: Path, second: Path) -> bool:
    one, two = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def timeless(run_dir: Path, name: str) -> list[dict[str, Any]]:
    path = run_dir / name
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [
        {key: value for key, value in row.items() if "second" not in key} for row in rows if row["stage"] != "padding"
    ]


def names(run_dir: Path) -> list[str]:
    return sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.name != "plots")


def checkpoints(stage: str, run_dir: Path) -> list[Path]:
    return sorted((run_dir / stage / "checkpoints").glob("step-*"))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, collection_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("faults"), tiny_path, collection_path)
    yield made
    made.forker.close()


def test_the_unbroken_runs_learn(lab: Lab) -> None:
    """Else equal weights would show nothing."""
    for stage, before in (("sft", lab.tiny_path), ("grpo", lab.stage_1)):
        after = load_file(model_path(stage, lab.whole(stage)) / "model.safetensors")
        old = load_file(before / "model.safetensors")
        assert any(not torch.equal(after[name], old[name]) for name in old if after[name].shape == old[name].shape)
        assert len(timeless(lab.whole(stage), "metrics.jsonl")) == (4 if stage == "sft" else 5)


# SIGKILL


def kill_once(lab: Lab, stage: str, run_dir: Path, how: str, at: float, rng: random.Random) -> str:
    """One life that ends by SIGKILL, at the share `at` of an unbroken one; where it hit."""
    log, call = lab.folder / "log", lab.call(stage, run_dir, "--resume")
    if how == "change":
        number = 1 + int(at * lab.changes[stage])
        lab.forker.run(log, *call, before_a_change=[str(run_dir), number])
        return where(stage, run_dir)
    [pid] = lab.forker.start(log, *call)
    if how == "time":
        time.sleep(at * lab.seconds[stage])
    else:
        wanted = ["sft/checkpoints/.step*", "grpo/checkpoints/.step*", "sft/.model.*", ".model.*"]
        wanted += [f"*/checkpoints/step-{rng.randint(1, 4):06d}"]
        deadline = time.monotonic() + 0.5 * lab.seconds[stage] + at * lab.seconds[stage]
        armed = time.monotonic() + at * lab.seconds[stage]
        while time.monotonic() < deadline and not (
            time.monotonic() > armed and any(found for one in wanted for found in run_dir.glob(one))
        ):
            pass
        time.sleep(rng.random() * 0.01)
    os.kill(pid, signal.SIGKILL)
    lab.forker.wait()
    return where(stage, run_dir)


def where(stage: str, run_dir: Path) -> str:
    """What a killed process was at."""
    left = {
        f"{stage}/checkpoints/.step-*.partial": "writing a checkpoint",
        f"{stage}/checkpoints/.step-*.old": "removing a checkpoint",
        f"{stage}/.model.*": "writing the model",
        ".model.*": "writing the model",
        ".*.jsonl.*": "cutting a log",
        ".settings*": "writing the settings",
    }
    for pattern, what in left.items():
        if any(run_dir.glob(pattern)):
            return what
    if not (run_dir / "settings.yaml").exists():
        return "before the settings"
    if model_path(stage, run_dir).exists():
        return "after the model"
    rows, saved = timeless(run_dir, "metrics.jsonl"), checkpoints(stage, run_dir)
    if not rows:
        return "before the first line"
    step = int(saved[-1].name[5:]) if saved else 0
    return f"step {step + 1}, " + ("before its line" if rows[-1]["step"] == step else "before its checkpoint")


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_six_times_ends_as_an_unbroken_one(lab: Lab, tmp_path: Path, stage: str) -> None:
    lab.whole(stage)
    rng, run_dir = random.Random(), tmp_path / "run"
    hits = [kill_once(lab, stage, run_dir, how, rng.random(), rng) for how in ("time", "change", "writing") * 2]
    logger.info("%s: %s", stage, hits)
    assert lab.run(stage, run_dir, "--resume")[0] == [0], lab.said()
    lab.check(stage, run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_thirty_random_kills(lab: Lab, tmp_path: Path, stage: str) -> None:
    lab.whole(stage)
    rng, exact = random.Random(), 0
    for number in range(30):
        run_dir, how = tmp_path / str(number), ("time", "change", "writing")[number % 3]
        at = (number // 3 + rng.random()) / 10
        logger.info("%s %s %.2f: %s", stage, how, at, kill_once(lab, stage, run_dir, how, at, rng))
        assert lab.run(stage, run_dir, "--resume")[0] == [0], lab.said()
        lab.check(stage, run_dir)
        exact += 1
        shutil.rmtree(run_dir)
    assert exact == 30


# A full disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_while_a_checkpoint_is_written(lab: Lab, disk: Path, stage: str) -> None:
    run_dir = disk / "run"
    place = "search_r3.training.run:Run.save_checkpoint"
    statuses, said = lab.run(stage, run_dir, full_at=[str(disk), 200_000, place, 2])
    assert statuses == [2]
    assert f"error: cannot write {run_dir}/{stage}/checkpoints/step-000002" in said and "make room" in said
    assert "--resume" in said and "Traceback" not in said
    [left] = (run_dir / stage / "checkpoints").iterdir()
    assert left.name == "step-000001" and find_damage(left, MANIFEST) is None, "and no scratch takes room"
    (disk / "filler").unlink()
    assert lab.run(stage, run_dir, "--resume")[0] == [0]
    lab.check(stage, run_dir)


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_while_the_model_is_written(lab: Lab, disk: Path, stage: str) -> None:
    run_dir = disk / "run"
    place = "search_r3.training.dev:save_trained"
    statuses, said = lab.run(stage, run_dir, full_at=[str(disk), 100_000, place, 1])
    assert statuses == [2]
    assert f"error: cannot write {model_path(stage, run_dir)}" in said and "make room" in said
    assert "Traceback" not in said
    assert not list(model_path(stage, run_dir).parent.glob(".model*")), "no scratch takes room"
    assert find_damage(checkpoints(stage, run_dir)[-1], MANIFEST) is None
    (disk / "filler").unlink()
    assert lab.run(stage, run_dir, "--resume")[0] == [0]
    lab.check(stage, run_dir)


def test_a_full_disk_while_the_best_model_is_written(lab: Lab, disk: Path, tmp_path: Path) -> None:
    run_dir, whole = disk / "run", tmp_path / "whole"
    options = ["sft.evaluate_every=2", "sft.keep=best"]
    place = "search_r3.training.dev:save_trained"
    statuses, said = lab.run("sft", run_dir, *options, full_at=[str(disk), 100_000, place, 1])
    assert statuses == [2]
    assert f"error: cannot write {run_dir}/sft/checkpoints/best-000002" in said and "make room" in said
    assert [path.name for path in checkpoints("sft", run_dir)] == ["step-000001"]
    (disk / "filler").unlink()
    assert lab.run("sft", run_dir, *options, "--resume")[0] == [0]
    assert lab.run("sft", whole, *options)[0] == [0]
    assert same_weights(run_dir / "sft" / "model", whole / "sft" / "model")
    assert timeless(run_dir, "metrics.jsonl") == timeless(whole, "metrics.jsonl")
    assert names(run_dir) == names(whole), "nothing is left behind"


def test_a_full_disk_in_the_middle_of_a_line_of_metrics(lab: Lab, disk: Path) -> None:
    run_dir = disk / "run"
    assert lab.run("sft", run_dir, at_a_call=[0, LOG, 3])[0] == [-9]
    metrics = run_dir / "metrics.jsonl"
    row = {"stage": "padding", "step": 0, "text": ""}
    row["text"] = "x" * (2 * 4096 - 50 - metrics.stat().st_size - len(json.dumps(row)) - 1)
    with metrics.open("a") as file:
        file.write(json.dumps(row) + "\n")  # a tmpfs gives room by pages of 4096: 50 bytes of the next line fit
    statuses, said = lab.run("sft", run_dir, "--resume", full_at=[str(disk), 0, LOG, 1])
    assert statuses == [2]
    assert f"error: cannot write {metrics}: No space left on device" in said and "make room" in said
    assert not metrics.read_text().endswith("\n"), "half a line is there"
    assert [find_damage(path, MANIFEST) for path in checkpoints("sft", run_dir)] == [None, None]
    (disk / "filler").unlink()
    assert lab.run("sft", run_dir, "--resume")[0] == [0]
    lab.check("sft", run_dir)


def test_a_file_that_may_not_grow(lab: Lab, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    statuses, said = lab.run("sft", run_dir, no_large_files=[100_000])
    assert statuses == [2]
    assert f"error: cannot write {run_dir}/sft/checkpoints/step-000001" in said
    assert not list((run_dir / "sft" / "checkpoints").iterdir())
    assert lab.run("sft", run_dir, "--resume")[0] == [0]
    lab.check("sft", run_dir)


# A broken checkpoint


@pytest.fixture(scope="module")
def stopped(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that were killed before the line of their last step."""
    folders = {stage: tmp_path_factory.mktemp("stopped") / stage for stage in STAGES}
    for stage, folder in folders.items():
        assert lab.run(stage, folder, at_a_call=[0, LOG, 4 if stage == "sft" else 5])[0] == [-9]
        assert [path.name for path in checkpoints(stage, folder)] == ["step-000002", "step-000003"]
    return folders


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


BREAKS = {
    "weights": lambda folder: flip(folder / "model.safetensors"),
    "optimizer": lambda folder: flip(folder / "optimizer.bin"),
    "truncated": lambda folder: os.truncate(folder / "optimizer.bin", 1000),
    "missing": lambda folder: (folder / "scheduler.bin").unlink(),
    "manifest": lambda folder: os.truncate(folder / MANIFEST, 100),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "empty manifest": lambda folder: (folder / MANIFEST).write_text('{"files": "none"}'),
    "environment": lambda folder: flip(next(folder.glob("environment/index/*.npy"))),
}


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        ("sft", "weights"),
        *(slow("sft", fault) for fault in ("optimizer", "truncated", "missing", "manifest", "empty manifest")),
        ("sft", "no manifest"),
        ("grpo", "environment"),
    ],
)
def test_a_broken_checkpoint_is_passed_over(
    lab: Lab, stopped: dict[str, Path], tmp_path: Path, stage: str, fault: str
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(stopped[stage], run_dir)
    BREAKS[fault](run_dir / stage / "checkpoints" / "step-000003")
    statuses, said = lab.run(stage, run_dir, "--resume")
    assert statuses == [0]
    assert "WARNING: broken: the checkpoint" in said and "step-000003 (" in said
    assert f"the checkpoint before, {run_dir}/{stage}/checkpoints/step-000002, is used" in said
    lab.check(stage, run_dir)


def test_where_every_checkpoint_is_broken_the_remedy_is_said_and_works(
    lab: Lab, stopped: dict[str, Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(stopped["sft"], run_dir)
    for path in checkpoints("sft", run_dir):
        flip(path / "model.safetensors")
    before = (run_dir / "metrics.jsonl").read_text()
    statuses, said = lab.run("sft", run_dir, "--resume")
    assert statuses == [2]
    assert "error: every checkpoint is broken" in said and "model.safetensors is not what was written" in said
    assert f"remove {run_dir}/sft/checkpoints and go on with --resume" in said
    assert (run_dir / "metrics.jsonl").read_text() == before
    shutil.rmtree(run_dir / "sft" / "checkpoints")
    assert lab.run("sft", run_dir, "--resume")[0] == [0]
    lab.check("sft", run_dir)


# NaN


@pytest.mark.parametrize(
    ("stage", "loss", "number", "world_size"),
    [
        ("sft", "info_nce", 3, 1),
        slow("grpo", "grpo_loss", 3, 1),
        slow("sft", "info_nce", 3, 2),
        ("grpo", "grpo_loss", 3, 2),
    ],
)
def test_a_loss_that_is_no_number_is_named_with_its_batch(
    lab: Lab, tmp_path: Path, stage: str, loss: str, number: int, world_size: int
) -> None:
    """Made by the last process; another run has the same state without it."""
    run_dir, short = tmp_path / "run", ["save_every=1000", "grpo.refresh={policy: periodic, every: 2}"]
    fault = {"nan_of": [world_size - 1, loss, number]}
    statuses, said = lab.run(stage, run_dir, *short, world_size=world_size, **fault)
    assert statuses == [2] * world_size, said
    for rank in range(world_size):
        heard = " ".join(lab.heard(rank).split())
        assert f" is nan at step 3 of {stage}, in the batch of the queries q" in heard and "failed-batch.json" in heard
        assert f"{stage}.learning_rate" in heard and "Traceback" not in heard
    failed = json.loads((run_dir / "failed-batch.json").read_text())
    assert (failed["stage"], failed["step"]) == (stage, 3)
    asked = 4 if stage == "sft" else 2
    assert 0 < len(failed["query_ids"]) <= asked and (stage == "sft" or len(failed["query_ids"]) == asked)
    [saved] = checkpoints(stage, run_dir)
    assert saved.name == "step-000002" and find_damage(saved, MANIFEST) is None
    assert all(bool(part.isfinite().all()) for part in load_file(saved / "model.safetensors").values())
    first = 1 if stage == "sft" else 0
    assert [row["step"] for row in timeless(run_dir, "metrics.jsonl")] == list(range(first, 3))
    assert lab.run(stage, run_dir, *short, "--resume", world_size=world_size)[0] == [0] * world_size
    if stage == "sft":
        (run_dir / "failed-batch.json").unlink()
        lab.check(stage, run_dir, world_size)
    else:  # the live index was refreshed in the step that failed: the metrics of its refresh differ
        assert lab.run(stage, tmp_path / "whole", *short, world_size=world_size)[0] == [0] * world_size
        assert same_weights(model_path(stage, run_dir), model_path(stage, tmp_path / "whole"))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("save_every", [1, 2])
def test_weights_that_are_no_numbers_are_not_saved_over_those_before(
    lab: Lab, tmp_path: Path, stage: str, save_every: int
) -> None:
    """Found as they are to be saved, or else in the next step: by a loss, or by what encodes with them."""
    run_dir = tmp_path / "run"
    statuses, said = lab.run(stage, run_dir, f"save_every={save_every}", nan_weights=[3])
    assert statuses == [2], said
    if save_every == 2 and stage == "sft":
        assert "is nan at step 4 of sft" in said and "hold NaN or infinity already, and are not saved" in said
        assert json.loads((run_dir / "failed-batch.json").read_text())["query_ids"]
    else:
        assert f"the weights hold NaN or infinity after step 3 of {stage}" in said
    assert f"{stage}.learning_rate" in said and "Traceback" not in said
    saved = checkpoints(stage, run_dir)
    assert [path.name for path in saved] == ["step-000001", "step-000002"][save_every - 1 :]
    for path in saved:
        assert all(bool(part.isfinite().all()) for part in load_file(path / "model.safetensors").values())


def test_a_step_that_has_changed_the_weights_saves_nothing(lab: Lab, tmp_path: Path) -> None:
    """With several changes on one batch of rollouts, the weights are not those before the step when it fails."""
    run_dir = tmp_path / "run"
    statuses, said = lab.run("grpo", run_dir, "grpo.num_iterations=2", "save_every=1", nan_of=[0, "grpo_loss", 4])
    assert statuses == [2]
    assert "loss is nan at step 2 of grpo" in said and "changed the weights already" in said
    [saved] = checkpoints("grpo", run_dir)
    assert saved.name == "step-000001"
    assert lab.run("grpo", run_dir, "grpo.num_iterations=2", "save_every=1", "--resume")[0] == [0]
    whole = tmp_path / "whole"
    assert lab.run("grpo", whole, "grpo.num_iterations=2", "save_every=1")[0] == [0]
    assert same_weights(run_dir / "model", whole / "model")


# A process that dies


@pytest.mark.parametrize(
    ("stage", "place", "number", "who", "world_size"),
    [
        slow("sft", FORWARD, 5, 1, 2),
        ("sft", BACKWARD, 2, 1, 3),
        slow("sft", GATHER, 9, 2, 3),
        slow("sft", SAVE_STATE, 2, 1, 2),
        ("sft", SAVE_STATE, 2, 0, 2),
        slow("grpo", FORWARD, 2, 0, 2),
        slow("grpo", BACKWARD, 2, 1, 2),
        ("grpo", "search_r3.training.grpo:collect", 2, 1, 2),
        slow("grpo", SAVE_STATE, 1, 1, 2),
    ],
)
def test_the_others_end_and_name_who_died(
    lab: Lab, tmp_path: Path, stage: str, place: str, number: int, who: int, world_size: int
) -> None:
    run_dir = tmp_path / "run"
    options = ["grpo.queries_per_step=2" if world_size == 2 else "grpo.queries_per_step=3"]
    lab.forker.start(
        lab.folder / "log", *lab.call(stage, run_dir, *options), world_size=world_size,
        at_a_call=[who, place, number], impatient=[0.5],
    )  # fmt: skip
    statuses = lab.forker.wait(timeout=90)
    assert statuses == [-9 if rank == who else 2 for rank in range(world_size)], lab.said(world_size)
    for rank in set(range(world_size)) - {who}:
        heard = " ".join(lab.heard(rank).split())
        assert f"error: rank {rank} of {world_size} lost another process: rank {who} did not come" in heard
        assert "--resume" in heard
    if place == SAVE_STATE:
        assert lab.run(stage, run_dir, *options, "--resume", world_size=world_size)[0] == [0] * world_size
        lab.check(stage, run_dir, world_size)


@pytest.mark.parametrize(("who", "place", "number"), [(1, FORWARD, 5), (0, LOG, 2), (0, LOADING, 1), (1, LOADING, 1)])
def test_an_error_of_one_process_ends_all_with_its_words(
    lab: Lab, tmp_path: Path, who: int, place: str, number: int
) -> None:
    """Before the first exchange, too."""
    lab.forker.start(
        lab.folder / "log", *lab.call("sft", tmp_path / "run"), world_size=2, own_error=[who, place, number]
    )
    assert lab.forker.wait(timeout=60)[who] == 1, lab.said(2)
    assert "RuntimeError: out of memory" in lab.heard(who) and "lost another" not in lab.heard(who)
    said = " ".join(lab.heard(1 - who).split())
    assert f"rank {1 - who} of 2 lost another process: rank {who} ended by its own error: RuntimeError: out of" in said


def test_an_error_while_the_first_process_of_fit_prepares_ends_all_with_its_words(lab: Lab, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"query": f"what is {number}?", "positive": f"{number} is a number"} for number in range(24)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    call = "fit", pairs, "--out", tmp_path / "run", f"base={lab.tiny_path}"
    lab.forker.start(lab.folder / "log", *call, world_size=2, own_error=[0, "search_r3.cli.fit:_mine", 1])
    assert lab.forker.wait(timeout=60) == [1, 2], lab.said(2)
    assert "rank 0 ended by its own error: RuntimeError: out of memory" in " ".join(lab.heard(1).split())


# SIGTERM


def test_sigterm_to_the_command_saves_and_says_how_to_go_on(lab: Lab, tmp_path: Path) -> None:
    run_dir, options = tmp_path / "run", ["sft.steps=60", "save_every=1000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "search_r3.cli", *lab.call("sft", run_dir, *options)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        metrics = run_dir / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 2):
            time.sleep(0.01)
        process.terminate()
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, said
    step = timeless(run_dir, "metrics.jsonl")[-1]["step"]
    assert f"stopped by SIGTERM after step {step} of sft; all is saved: go on with --resume" in " ".join(said.split())
    assert [path.name for path in checkpoints("sft", run_dir)] == [f"step-{step:06d}"] and 2 < step < 60
    whole = tmp_path / "whole"
    for folder, more in ((run_dir, ["--resume"]), (whole, [])):
        assert lab.run("sft", folder, *options, *more)[0] == [0]
    assert same_weights(run_dir / "sft" / "model", whole / "sft" / "model")
    assert timeless(run_dir, "metrics.jsonl") == timeless(whole, "metrics.jsonl")


@pytest.mark.parametrize(
    ("stage", "place", "number", "times", "status", "said", "saved"),
    [
        ("sft", LOADING, 1, 1, -15, "", []),
        ("sft", FORWARD, 5, 2, 143, "after step 2 of sft", ["step-000001", "step-000002"]),
        ("sft", "search_r3.training.dev:save_trained", 1, 1, 143, "sft is complete", []),
        ("grpo", EVALUATE, 1, 1, 143, "after step 1 of grpo", ["step-000001"]),
        ("grpo", EVALUATE, 2, 1, 143, "step 3 of grpo", ["step-000002", "step-000003"]),
    ],
    ids=["loading", "twice at once", "saving the model", "first evaluation", "evaluation"],
)  # fmt: skip
def test_sigterm_at_other_moments(
    lab: Lab, tmp_path: Path, stage: str, place: str, number: int, times: int, status: int, said: str, saved: list[str]
) -> None:
    run_dir = tmp_path / "run"
    statuses, heard = lab.run(stage, run_dir, at_a_call=[0, place, number, signal.SIGTERM, times])
    assert statuses == [status], heard
    assert said in heard
    assert [path.name for path in checkpoints(stage, run_dir)] == saved
    assert lab.run(stage, run_dir, "--resume")[0] == [0]
    lab.check(stage, run_dir)


@pytest.mark.parametrize("stage", STAGES)
def test_sigterm_to_one_of_two_processes_stops_both(lab: Lab, tmp_path: Path, stage: str) -> None:
    run_dir = tmp_path / "run"
    fault = {"at_a_call": [1, BACKWARD, 2, signal.SIGTERM]}
    statuses, said = lab.run(stage, run_dir, "save_every=1000", world_size=2, **fault)
    assert statuses == [143, 143]
    assert "stopped by SIGTERM after step 2" in said or "stopped by SIGTERM after step 1" in said
    assert len(checkpoints(stage, run_dir)) == 1
    assert lab.run(stage, run_dir, "save_every=1000", "--resume", world_size=2)[0] == [0, 0]
    lab.check(stage, run_dir, 2)
