"""What the benchmarks on a GPU share: a record on disk from the first part on, time limits, and texts to measure with.

A GPU is there for minutes. So each part fills its record while it runs, a part that fails does not end the others, and
Ctrl-C (which `timeout -s INT` sends) ends the benchmark with all that it has.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import machine, say, versions

Part = tuple[str, Callable[[dict[str, Any]], None]]
"""A part's name, and what fills its record."""
INTERRUPTED = 130


class Record:
    """The JSON object of one benchmark.

    Args:
        values: what it begins with.
        out: where it is written after every part, if anywhere.
        budget: seconds after which no part starts.
        device: the device that is measured; its name goes into the record.
    """

    def __init__(self, values: dict[str, Any], out: Path | None, budget: float, device: str) -> None:
        self.values = values | {"parts": {}, "left_out": [], "failed": {}, "seconds_by_part": {}}
        self.out, self.budget, self.device, self.started = out, budget, device, time.perf_counter()
        # A shell that runs this in the background has let it ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.budget - (time.perf_counter() - self.started)

    def measure(self, parts: Sequence[Part]) -> None:
        """Run the parts in their order."""
        for name, fill in parts:
            if self.left <= 0:
                self.values["left_out"].append(name)
                continue
            found: dict[str, Any] = {}
            self.values["parts"][name] = found
            begun = time.perf_counter()
            try:
                fill(found)
            except KeyboardInterrupt:
                self.values["failed"][name] = "its time was over"
                self.budget = 0.0  # and that of all others
            except Exception as error:  # whatever it is: the others may work
                self.values["failed"][name] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
                traceback.print_exc()
            self.values["seconds_by_part"][name] = time.perf_counter() - begun
            print(json.dumps({name: found}), flush=True)
            say(f"{name}: {time.perf_counter() - begun:.0f} s, {self.left:.0f} s are left")
            self.write()
            with contextlib.suppress(RuntimeError):  # a part may have broken the device for good
                free_memory(self.device)

    def write(self) -> None:
        """As far as it is."""
        self.values["seconds"] = time.perf_counter() - self.started
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(self.values, indent=2) + "\n", encoding="utf-8")

    def finish(self, *packages: str) -> None:
        """Write the whole record, print it as the last line, and end the process: with 1 where a part has failed."""
        self.values |= {"machine": machine() | describe(self.device), "versions": versions(*packages)}
        parts = self.values["parts"]
        self.values["ratio"] = {name: part["ratio"] for name, part in parts.items() if "ratio" in part}
        self.write()
        print(json.dumps(self.values), flush=True)
        sys.exit(1 if self.values["failed"] else 0)


def free_memory(device: str) -> None:
    """What nobody holds any more: exceptions and accelerate leave cycles."""
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()


def describe(device: str) -> dict[str, Any]:
    """The card, for the record."""
    if not device.startswith("cuda"):
        return {"device": "cpu"}
    import torch

    found = torch.cuda.get_device_properties(torch.device(device))
    return {"device": found.name, "device_bytes": found.total_memory, "cuda": torch.version.cuda}


def synchronize(device: str) -> None:
    """Wait until the device has done all that it was given."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def made_up_words(seed: int) -> list[str]:
    """Some thousand words that no language has: enough for a tokenizer of real entries, without a package or a file."""
    rng = random.Random(f"words/{seed}")
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    return sorted({"".join(rng.choices(syllables, k=rng.randint(2, 4))) for _ in range(6000)})


def made_up_texts(seed: int, count: int = 2000) -> list[str]:
    """Texts of these words, to train a tokenizer on."""
    rng, words = random.Random(f"corpus/{seed}"), made_up_words(seed)
    return [" ".join(rng.choices(words, k=50)) for _ in range(count)]


def texts_of(count: int, median_words: int, seed: int) -> list[str]:
    """Texts of the tokenizer's own words, their lengths spread log-normally."""
    rng = random.Random(f"texts/{seed}")
    words = made_up_words(seed)
    lengths = [int(min(700, max(8, rng.lognormvariate(0, 0.7) * median_words))) for _ in range(count)]
    return [" ".join(rng.choices(words, k=length)) for length in lengths]


def timed(device: str, work: Callable[[], Any]) -> tuple[float, int]:
    """Seconds of one run, and the peak of the device's memory meanwhile (0 on a CPU)."""
    import torch

    on_gpu = device.startswith("cuda")
    if on_gpu:
        synchronize(device)
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started, torch.cuda.max_memory_allocated() if on_gpu else 0


def default_threads() -> int:
    """The cores that this process may use, eight at most."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
