"""Encoding by actors of Ray beside one process: seconds, memory, a kill; the last line is one JSON object.

    pip install search-r3[benchmarks,ray]
    python benchmarks/ray_encode.py --documents 20000 --out runs/ray.json
    python benchmarks/ray_encode.py --quick                                # a few minutes: Ray itself takes its time

A random model of Qwen2's proportions encodes synthetic documents into an index folder: in this process, with one actor,
with two, with two of which one is killed after a third of the documents, and with two after a run that was stopped
there. All compute with as many threads as an actor of two, one actor too, and must give the same bytes. Seconds are of
the whole call, Ray's start and end among them; those of encoding are from the first block's end to the last one's.
Memory is the most that this process and all of Ray's held at once: unique (on Linux), so
that what they share is not counted again and again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common import Shape, add_arguments, finish, machine, make_model, need, prepare, say

BLOCK = 256


class StoppedError(Exception):
    """Ends a run where it stands."""


def load(path: str, threads: int) -> Any:
    """The model, in this process or in an actor, which would have more threads where it is alone."""
    import torch

    from search_r3 import SearchR3

    torch.set_num_threads(threads)
    return SearchR3(path, device="cpu")


def texts(count: int, seed: int) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    words = [f"{first}{second}{third}" for first in "bdklmnprst" for second in "aeiou" for third in ("", "na", "to")]
    return [(f"d{i:07}", " ".join(draw.choices(words, k=draw.randint(20, 100)))) for i in range(count)]


class Memory:
    """The most bytes that this process and its children held, looked at twice a second."""

    def __init__(self) -> None:
        import psutil

        self._root, self._ended = psutil.Process(), threading.Event()
        self.peak = 0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        import psutil

        while not self._ended.wait(0.5):
            total = 0
            for process in [self._root, *self._root.children(recursive=True)]:
                try:
                    total += process.memory_full_info().uss
                except psutil.Error:
                    continue
            self.peak = max(self.peak, total)

    def end(self) -> float:
        """GiB."""
        self._ended.set()
        self._thread.join()
        return round(self.peak / 2**30, 2)


def kill_an_actor() -> None:
    """Kill one of the actors that encode."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        if process.name().startswith("ray::") and "MapWorker" in process.name():
            process.send_signal(signal.SIGKILL)
            return
    raise SystemExit("no actor was found to kill")


def digest(folder: Path) -> str:
    [path] = folder.glob("vectors-*.npy")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000)
    add_arguments(parser, 1)
    options = parser.parse_args()
    need("ray", "psutil")
    if options.quick:
        options.documents, options.shape = 2048, Shape(2, 128)
    prepare(options)
    from search_r3.retrieval.encode import encode_corpus
    from search_r3.retrieval.encoding.workers import RayWorkers

    threads = max(os.cpu_count() or 1, 3) // 2
    documents = texts(options.documents, options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        make_model(Path(scratch) / "model", (text for _, text in documents[:2000]), options.shape, 4096, 512)
        loads = partial(load, str(Path(scratch) / "model"), threads)
        model = loads()

        def run(name: str, actors: int | None, at_third: Callable[[], None] | None = None) -> dict[str, Any]:
            done, acted, ends = 0, at_third is None, list[tuple[float, int]]()

            def progress(count: int, tokens: int) -> None:
                nonlocal done, acted
                done += count
                ends.append((time.perf_counter(), count))
                if not acted and done > len(documents) / 3:
                    acted = True
                    assert at_third is not None
                    at_third()

            workers = None if actors is None else RayWorkers(loads, "local", actors)
            memory, started = Memory(), time.perf_counter()
            try:
                encode_corpus(
                    *(model, documents, Path(scratch) / name), workers=workers, block_size=BLOCK, progress=progress
                )
            except StoppedError:
                say(f"{name}: stopped after {done:,} documents")
            took = time.perf_counter() - started
            say(f"{name}: {took:.1f} s")
            encoding = ends[-1][0] - ends[0][0]
            rate = round(sum(count for _, count in ends[1:]) / encoding, 1) if encoding > 1 else None  # a block or two
            facts = {"seconds": round(took, 1), "encoding_seconds": round(encoding, 1), "per_second": rate}
            return facts | {"memory_gib": memory.end(), "encoded": done}

        def stop() -> None:
            raise StoppedError

        runs = {
            "one process": run("one process", None),
            "one actor": run("one actor", 1),
            "two actors": run("two actors", 2),
            "two actors, one killed": run("two actors, one killed", 2, kill_an_actor),
            "two actors, stopped": run("resumed", 2, stop),
            "two actors, resumed": run("resumed", 2),
        }
        folders = [path for path in Path(scratch).iterdir() if path.name != "model"]
        same = len({digest(folder) for folder in folders}) == 1
    one, two = runs["one actor"], runs["two actors"]
    ratios = {"seconds": one["seconds"] / two["seconds"]}
    if one["per_second"] and two["per_second"]:
        ratios["per_second"] = two["per_second"] / one["per_second"]
    record = {"documents": options.documents, "shape": str(options.shape), "threads": threads, "runs": runs}
    record |= {"same_bytes": same, "two_over_one": {name: round(value, 2) for name, value in ratios.items()}}
    finish({"benchmark": "ray_encode", "machine": machine(), **record}, options.out)


if __name__ == "__main__":
    main()
