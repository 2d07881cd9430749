"""Decoding on a GPU: a look after every token or after several, one kernel after the other or CUDA graphs.

A part of gpu.py.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import warnings
from collections.abc import Iterator
from statistics import median
from typing import Any

from common import never_ending, say
from gpu_record import texts_of, timed

WAYS = {"each_token": (1, False), "several_tokens": (8, False), "graphs": (8, True)}
"""Tokens between two looks at the device, and whether steps are CUDA graphs."""


@contextlib.contextmanager
def waits(device: str, found: dict[str, Any]) -> Iterator[None]:
    """Counts how often the host waits for the device, as torch says (a CPU is never waited for), and looks at it."""
    import torch

    from search_r3.model.engine.sampling import Chooser

    look, looks = Chooser.look, []

    def counted(chooser: Chooser) -> Any:
        looks.append(chooser)
        return look(chooser)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Chooser.look = counted
        if device.startswith("cuda"):
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            Chooser.look = look
            if device.startswith("cuda"):
                torch.cuda.set_sync_debug_mode("default")
    found |= {"looks": len(looks), "syncs": sum("called a synchronizing" in str(one.message) for one in said)}


def run_way(device: str, decoder: Any, requests: list[Any], runs: int) -> tuple[dict[str, Any], list[Any]]:
    """Speed of a decoder, and what it gives; its first run makes what the others have: caches, and graphs."""
    found: dict[str, Any] = {}
    kept: list[Any] = []
    length = requests[0].max_new_tokens
    found["first_seconds"], _ = timed(device, lambda: kept.extend(decoder.run(requests)))
    with waits(device, found):
        decoder.run(requests)
    spent = [timed(device, lambda: decoder.run(requests)) for _ in range(runs)]
    seconds, peak = median(took for took, _ in spent), max(peak for _, peak in spent)
    found |= {"tokens_per_second": len(requests) * length / seconds, "milliseconds": 1000 * seconds / length}
    return found | {"peak_bytes": peak}, kept


def alike(some: list[Any], others: list[Any]) -> dict[str, float]:
    """How far rollouts are the same. In half precision rounding may part greedy replies, but not their first token."""
    pairs = list(zip(some, others, strict=True))
    return {
        "same_replies": sum(one.completion_ids == two.completion_ids for one, two in pairs) / len(pairs),
        "first_logprob_difference": max(abs(one.logprobs[0] - two.logprobs[0]) for one, two in pairs),
        "least_cosine": min(float(one.vector @ two.vector) for one, two in pairs),
    }


def decoding(options: argparse.Namespace, backbone: Any, found: dict[str, Any]) -> None:
    """Replies of one length, some at once and one alone, in every way.

    `graphs_say` holds what was logged where graphs do not work; what comes after is measured with them if they are
    faster. `ratio` is theirs to the same without.
    """
    from search_r3.model.engine.decoding import Decoder, DecodeRequest

    never_ending(backbone)
    length, sizes, runs = (20, (4, 1), 1) if options.quick else (33, (64, 1), 2)
    prompts = [prompt.ids for prompt in backbone.prompt_encoder.encode_batch(texts_of(64, 12, 2), "reason")]
    said = Said()
    logging.getLogger("search_r3").addHandler(said)
    for rows in sizes:
        requests = [DecodeRequest(ids, length) for ids in prompts[:rows]]
        here: dict[str, Any] = {}
        found[f"{rows} rows"] = here
        expected: list[Any] = []
        for name, (look_every, backbone.graphs) in WAYS.items():
            here[name], replies = run_way(options.device, Decoder(backbone, rows, look_every), requests, runs)
            expected = expected or replies
            here[name] |= alike(expected, replies)
            say(f"{rows} rows, {name}: {here[name]['milliseconds']:.2f} ms a step, {here[name]['looks']} looks")
    logging.getLogger("search_r3").removeHandler(said)
    largest = next(iter(found.values()))
    eager, graphed = (largest[name]["tokens_per_second"] for name in ("several_tokens", "graphs"))
    backbone.graphs = graphed > eager and not said.messages
    found |= {"graphs_say": said.messages, "graphs_taken": backbone.graphs, "ratio": graphed / eager}


class Said(logging.Handler):
    """Keeps warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        self.messages.append(record.getMessage())
