"""What a killed or broken writer leaves, and how several processes agree that something was written."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from search_r3.config import Recipe
from search_r3.errors import ConfigError, RunError, StoppedError
from search_r3.files import atomic_directory, find_damage, leftovers, remove_leftovers, write_json, write_manifest
from search_r3.parallel import Communicator, agree
from search_r3.training import guard
from search_r3.training.run import MANIFEST, Run

KILLED = """
import os, signal, sys
from pathlib import Path
from search_r3.files import atomic_directory, write_text
target = Path(sys.argv[1])
if sys.argv[2] == "folder":
    with atomic_directory(target) as out:
        (out / "half").write_text("new")
        os.kill(os.getpid(), signal.SIGKILL)
else:
    os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
    write_text(target, "new")
"""


def killed(target: Path, kind: str) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED, str(target), kind], check=False)
    assert ended.returncode == -signal.SIGKILL


def checkpoint(folder: Path) -> Path:
    (folder / "environment").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    (folder / "environment" / "state.json").write_text("{}")
    write_manifest(folder, MANIFEST, stage="sft", step=1)
    assert json.loads((folder / MANIFEST).read_text())["files"].keys() == {
        "model.safetensors",
        "environment/state.json",
    }
    return folder


def test_a_whole_checkpoint_has_no_damage(tmp_path: Path) -> None:
    assert find_damage(checkpoint(tmp_path / "step-000001"), MANIFEST) is None


@pytest.mark.parametrize("name", ["model.safetensors", "environment/state.json"])
def test_damage_is_found_and_the_file_named(tmp_path: Path, name: str) -> None:
    folder = checkpoint(tmp_path / "step-000001")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert find_damage(folder, MANIFEST) == f"{name} is not what was written"
    (folder / name).write_bytes(content[:-1])
    assert find_damage(folder, MANIFEST) == f"{name} is not what was written"
    (folder / name).unlink()
    assert find_damage(folder, MANIFEST) == f"{name} is missing"
    (folder / name).mkdir()
    assert find_damage(folder, MANIFEST) == f"{name} cannot be read: Is a directory"
    (folder / name).rmdir()
    (folder / name).write_bytes(content)
    assert find_damage(folder, MANIFEST) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "{}", '{"files": "none"}', '{"files": [1]}', "\udce4"])
def test_a_manifest_that_cannot_be_read_is_damage(tmp_path: Path, text: str) -> None:
    folder = checkpoint(tmp_path / "step-000001")
    (folder / MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    assert find_damage(folder, MANIFEST) == f"{MANIFEST} cannot be read"
    (folder / MANIFEST).unlink()
    assert find_damage(folder, MANIFEST) == f"{MANIFEST} cannot be read"


class Two(Communicator):
    """The first of two processes; the other one says always the same."""

    world_size = 2

    def __init__(self, other: Any) -> None:
        self.other = other

    def all_gather(self, value: Any) -> list[Any]:
        return [value, self.other]


def test_work_that_all_have_done_is_agreed_on(tmp_path: Path) -> None:
    done = []
    assert agree(Two(""), tmp_path, lambda: done.append(1) or "result") == "result"
    assert done == [1]


def test_where_one_process_fails_all_raise_and_name_it(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"^what rank 1 says$"):
        agree(Two("what rank 1 says"), tmp_path / "target", lambda: None)

    def fails() -> None:
        raise OSError(28, "No space left\non device")

    with pytest.raises(RunError, match=r"write .*target \(rank 0: OSError: .* No space left on device\); .* --resume"):
        agree(Communicator(), tmp_path / "target", fails)


def test_an_interruption_is_no_failure_to_write(tmp_path: Path) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        agree(Communicator(), tmp_path, interrupted)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_killed_writer_changes_nothing_and_what_it_left_can_be_removed(tmp_path: Path, kind: str) -> None:
    target, other = tmp_path / "model", tmp_path / ".model.safetensors.abcd1234"
    other.mkdir()  # the scratch of somebody else's model.safetensors
    (tmp_path / ".model.keep").write_text("")
    if kind == "folder":
        target.mkdir()
        (target / "old").write_text("old")
    else:
        target.write_text("old")
    killed(target, kind)
    assert (target / "old" if kind == "folder" else target).read_text() == "old"
    assert len(leftovers(target)) == 1
    remove_leftovers(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.keep", other.name, "model"]


@pytest.mark.parametrize("replaced", [1, 2])
def test_a_folder_that_a_killed_writer_moved_aside_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: int
) -> None:
    """Killed before the second renaming, or before what was moved aside is removed."""
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("old")
    replace, calls = Path.replace, 0

    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    def counted(self: Path, other: Path) -> Path:
        nonlocal calls
        calls += 1
        return replace(self, other) if calls <= replaced else stop()

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch, atomic_directory(target) as out:
        (out / "new").write_text("new")
        patch.setattr(Path, "replace", counted)
        patch.setattr("shutil.rmtree", stop)
    remove_leftovers(target)
    assert list(tmp_path.iterdir()) == [target]
    assert [path.name for path in target.iterdir()] == (["old"] if replaced == 1 else ["new"])


def test_a_run_that_was_killed_at_its_settings_can_begin(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    killed(folder / "settings.yaml", "file")
    assert len(list(folder.iterdir())) == 1
    Run(Recipe(run_dir=str(folder)))
    assert [path.name for path in folder.iterdir()] == ["settings.yaml"]
    other = tmp_path / "other"
    other.mkdir()
    (other / ".settings.yaml.swp").write_text("an editor's")
    with pytest.raises(ConfigError, match="holds no run"):
        Run(Recipe(run_dir=str(other)))


def test_what_a_stage_began_from_is_written_anew_and_half_of_it_removed(tmp_path: Path) -> None:
    run = Run(Recipe(run_dir=str(tmp_path / "run")))
    killed(tmp_path / "run" / "sft" / "begun-from.json", "file")
    assert len(list((tmp_path / "run" / "sft").iterdir())) == 1
    run.begin_from("sft", SimpleNamespace(revision="one", source="a base"), "")  # type: ignore[arg-type]
    assert [path.name for path in (tmp_path / "run" / "sft").iterdir()] == ["begun-from.json"]


def test_a_broken_line_of_metrics_is_named(tmp_path: Path) -> None:
    run = Run(Recipe(run_dir=str(tmp_path / "run")))
    run.log("sft", 1, {"loss": 1.0})
    with run.metrics_path.open("ab") as file:
        file.write(b'{"stage": "s\xff"\n')
        file.write(b'{"stage": "unfinis')
    with pytest.raises(RunError, match=r"metrics\.jsonl:2: not a JSON object; mend or remove the line"):
        run.metrics("sft")


def test_checkpoints_of_a_finished_stage_are_removed(tmp_path: Path) -> None:
    """Its process was killed between the model and their removal."""
    run = Run(Recipe(run_dir=str(tmp_path / "run")))
    left = checkpoint(run.folder / "sft" / "checkpoints" / "step-000001")
    run.claim("sft", resume=True)
    assert left.exists()
    write_json(run.model_path("sft") / "config.json", {})
    run.claim("sft", resume=True)
    assert not left.parent.exists()
    assert json.loads((run.model_path("sft") / "config.json").read_text()) == {}


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("gloo: connection closed by peer")]
)
def test_a_checkpoint_that_a_full_gpu_or_a_lost_process_keeps_from_loading_is_not_said_to_be_unfit(
    tmp_path: Path, error: RuntimeError
) -> None:
    def load_state(folder: str) -> None:
        raise error

    run = Run(Recipe(run_dir=str(tmp_path / "run")))
    checkpoint(run.checkpoints_path("sft") / "step-000001")
    accelerator = SimpleNamespace(load_state=load_state, state=SimpleNamespace())
    with pytest.raises(RunError, match=rf"cannot read .*step-000001 \(rank 0: {type(error).__name__}: {error}\)"):
        run.restore("sft", SimpleNamespace(accelerator=accelerator, policy=None, communicator=Communicator()))


def test_a_checkpoint_that_one_process_cannot_load_stops_all(tmp_path: Path) -> None:
    """Each of two threads is a process; the second one's GPU is full."""
    run = Run(Recipe(run_dir=str(tmp_path / "run")))
    checkpoint(run.checkpoints_path("sft") / "step-000001")
    meeting, values = threading.Barrier(2, timeout=10), {}

    class Rank(Communicator):
        world_size = 2

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def all_gather(self, value: Any) -> list[Any]:
            values[self.rank] = value
            meeting.wait()
            everyone = [values[0], values[1]]
            meeting.wait()
            return everyone

        def load_state(self, folder: str) -> None:
            if self.rank == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")

    def restore(rank: int) -> str:
        one = Rank(rank)
        accelerator = SimpleNamespace(load_state=one.load_state, state=SimpleNamespace())
        with pytest.raises(RunError) as error:
            run.restore("sft", SimpleNamespace(accelerator=accelerator, policy=None, communicator=one))
        return str(error.value)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(restore, range(2))
    assert first == second and "step-000001 (rank 1: OutOfMemoryError: CUDA out of memory)" in first


def test_sigterm_is_held_back_only_while_a_stage_runs(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from search_r3.training.guard import Guard

    before = signal.getsignal(signal.SIGTERM)
    guard = Guard(Run(Recipe(run_dir=str(tmp_path / "run"))), "sft", SimpleNamespace(communicator=Communicator()))  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError), guard.watching():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_sigterm_later_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one waits for the end of the step."""
    run = Run(Recipe(run_dir=str(tmp_path / "run")))
    trained = SimpleNamespace(communicator=Communicator(), accelerator=None, policy=None)
    monkeypatch.setattr(guard, "TOGETHER_S", 0.0)
    for signals, status in ((1, 0), (2, -signal.SIGTERM)):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(StoppedError), guard.Guard(run, "sft", trained).watching():
                for _ in range(signals):
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(0.01)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert ended == status
