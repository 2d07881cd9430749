"""Trainings that meet with a fault, for tests/integration/test_faults.py.

Run as a program it imports everything once and then forks, for every line on stdin, one training of one or several
processes; so that a process which is killed costs the training and not the imports.
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

REMOVALS = ("os.remove", "os.rmdir", "shutil.rmtree")
CHANGES = ("open", "os.mkdir", "os.rename", *REMOVALS)


class Forker:
    """The other side of the program: starts trainings and hears how they ended."""

    def __init__(self, model: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults", str(model)], cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip

    def start(self, log: Path, *arguments: object, world_size: int = 1, **fault: Any) -> list[int]:
        """Begin a call of the command line, whose output goes to `log`.

        Returns the ids of its processes, which are nobody else's until `wait` has returned.
        """
        given = {"log": str(log), "arguments": list(map(str, arguments)), "world_size": world_size, "fault": fault}
        self.pids: list[int] = self._ask(given, "pids", 60)
        return self.pids

    def wait(self, timeout: float = 180) -> list[int]:
        """The exit statuses, -9 of a process that was killed; a training that does not end in time is an error."""
        try:
            return self._ask({}, "statuses", timeout)
        except TimeoutError:
            for pid in self.pids:
                os.kill(pid, signal.SIGKILL)
            self._hear("statuses", 60)
            raise

    def run(self, log: Path, *arguments: object, world_size: int = 1, **fault: Any) -> list[int]:
        """Begin, and wait for the end."""
        self.start(log, *arguments, world_size=world_size, **fault)
        return self.wait()

    def close(self) -> None:
        """End the program."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def _ask(self, given: dict[str, Any], wanted: str, timeout: float) -> list[int]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(given) + "\n")
        return self._hear(wanted, timeout)

    def _hear(self, wanted: str, timeout: float) -> list[int]:
        stdout = self._process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], timeout)[0]:
            raise TimeoutError(f"no {wanted} after {timeout} s")
        return list(json.loads(stdout.readline())[wanted])


def main() -> None:
    """Fork what is asked for until stdin ends."""
    import torch

    torch.set_num_threads(1)
    for name in ("_dynamo", "distributed.fsdp", "distributed.checkpoint", "nn.parallel"):
        import_module(f"torch.{name}")
    for name in ("cli", "console", "evaluation.report.plots", "training.grpo", "training.sft"):
        import_module(f"search_r3.{name}")
    for name in ("accelerate", "accelerate.utils", "rich.progress", "rich.live", "safetensors.torch", "scipy.stats"):
        import_module(name)
    import_module("search_r3.model.loading").load_backbone(Path(sys.argv[1]))  # with what transformers puts off
    for line in iter(sys.stdin.readline, ""):
        given = json.loads(line)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pids = []
        for rank in range(given["world_size"]):
            pid = os.fork()
            if pid == 0:
                _train(given, rank, port)
            pids.append(pid)
        _tell({"pids": pids})
        sys.stdin.readline()
        for pid in pids:  # ended, but not yet gone: whoever kills them by their ids kills nobody else
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        _tell({"statuses": [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]})


def _tell(message: dict[str, list[int]]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _train(given: dict[str, Any], rank: int, port: int) -> None:
    """The forked process: the command line's `main`, with the fault in its way."""
    from search_r3 import cli

    out = os.open(f"{given['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(out, number)
    if given["world_size"] > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(given["world_size"]),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    for name, value in given["fault"].items():
        FAULTS[name](rank, *value)
    sys.argv = ["search-r3", *given["arguments"]]
    status = 1
    try:
        cli.main()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def before_a_change(rank: int, folder: str, number: int, count_to: str | None = None) -> None:
    """SIGKILL before the `number`-th change of the disk under `folder`; `count_to` receives how many there were."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in CHANGES or (folder not in str(arguments[0]) and event not in REMOVALS):
            return  # the names of what rmtree removes are relative
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    if count_to is not None:
        end = os._exit

        def count(status: int) -> None:
            Path(count_to).write_text(str(seen))
            end(status)

        os._exit = count  # type: ignore[assignment]


def at_a_call(rank: int, who: int, place: str, number: int, sent: int = signal.SIGKILL, times: int = 1) -> None:
    """A signal to process `who` as it calls `module:Class.function` for the `number`-th time."""
    if rank == who:
        _wrap(place, number, lambda: [os.kill(os.getpid(), sent) for _ in range(times)])


def own_error(rank: int, who: int, place: str, number: int) -> None:
    """An error of torch in process `who` alone."""

    def fail() -> None:
        raise RuntimeError("out of memory")

    if rank == who:
        _wrap(place, number, fail)


def full_at(rank: int, folder: str, spare: int, place: str, number: int) -> None:
    """The disk of `folder` is full, but for `spare` bytes, from a call on; the file `filler` in it takes the room."""

    def fill() -> None:
        size, block = 0, bytes(4096)
        with Path(folder, "filler").open("wb", buffering=0) as file:
            try:
                while file.write(block) == len(block):
                    size += len(block)
            except OSError:
                file.truncate(size)
            file.truncate(max(0, size - spare))

    _wrap(place, number, fill)


def no_large_files(rank: int, largest: int) -> None:
    """No file may become larger than so many bytes: stands for a full disk where none can be mounted."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))


def nan_of(rank: int, who: int, function: str, number: int) -> None:
    """The `number`-th value of a loss is NaN in process `who`."""
    from search_r3.training import losses

    plain, calls, nan = getattr(losses, function), 0, float("nan")

    def broken(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        value = plain(*arguments)
        if calls != number or rank != who:
            return value
        return value * nan if function == "info_nce" else dataclasses.replace(value, total=value.total * nan)

    setattr(losses, function, broken)


def nan_weights(rank: int, number: int) -> None:
    """The weights are NaN after the `number`-th optimizer step, in all processes."""
    from search_r3.training.engine import Engine

    plain, calls = Engine.step, 0

    def broken(self: Engine) -> None:
        nonlocal calls
        calls += 1
        plain(self)
        if calls == number:
            next(iter(self.policy.parameters())).data.fill_(float("nan"))

    Engine.step = broken  # type: ignore[method-assign]


def impatient(rank: int, seconds: float) -> None:
    """The first process lingers for so long only."""
    from datetime import timedelta

    from search_r3 import parallel

    parallel.LINGER = timedelta(seconds=seconds)


def _wrap(place: str, number: int, act: Callable[[], object]) -> None:
    module, _, path = place.partition(":")
    *parents, name = path.split(".")
    holder: Any = import_module(module)
    for parent in parents:
        holder = getattr(holder, parent)
    plain, calls = getattr(holder, name), 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return plain(*arguments, **options)

    setattr(holder, name, wrapped)


FAULTS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (before_a_change, at_a_call, own_error, full_at, no_large_files, nan_of, nan_weights, impatient)
}


if __name__ == "__main__":
    main()
