"""What the corpus costs beside the model's own work: memory of the machine, searches, tokenizing, evaluations.

The index lies on the GPUs, each of which holds and searches its share (`retrieval/sharded.py`).

Shapes: `N` documents, `D` vector size, `P` processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .footprint import SKETCH, Job
from .memory import FULL

TEXT_BYTES = 5
"""Bytes of text per token, about: English in the tokenizers of large models has 4 to 5 letters and blanks a token."""
DOCUMENT_BYTES = 420
"""Bytes of a document's Python objects in a collection and in an index, its text apart (measured by a test)."""
PROCESS_BYTES = 2_000_000_000
"""Bytes of a training process without model and data: Python, torch and what CUDA keeps of its own; about."""
TOKEN_BYTES = 52
"""Bytes of a token in Python's lists of a reply: its id, its mark, its probability; about."""
VERSION_BYTES = 8
LINK_BYTES = 8


@dataclass(frozen=True)
class Rates:
    """How fast a process is at what is not the model's work; all are guesses.

    Attributes:
        index_tflops: TFLOP/s of a GPU in float32 products with its part of the index (an H100's peak is 67).
        thread_tflops: TFLOP/s of a thread in float32 products, where the index lies in the machine's memory.
        tokens_per_second: tokens that a thread makes of text.
        threads: of a process (`OMP_NUM_THREADS`).
    """

    index_tflops: float = 30.0
    thread_tflops: float = 0.03
    tokens_per_second: float = 250_000.0
    threads: int = 8


@dataclass(frozen=True)
class Corpus:
    """The corpus of a stage."""

    job: Job

    @property
    def evaluated_every(self) -> int:
        """Steps between two evaluations of the stage, 0 for none."""
        return self.job.section.evaluate_every

    @property
    def has_graph(self) -> bool:
        """Whether the policy keeps a neighbour graph."""
        return self.job.stage == "grpo" and self.job.moves and self.job.recipe.grpo.refresh.policy == "selective"

    @property
    def evaluates_apart(self) -> bool:
        """Whether an evaluation encodes the corpus into an index of its own, rather than into the live one."""
        if self.job.stage == "sft" or not self.job.moves:
            return self.job.moves
        settings = self.job.recipe.grpo.refresh
        return settings.policy in ("never", "drift", "selective")

    def host(self) -> dict[str, int]:
        """Bytes of the machine's memory by part, of all processes together."""
        count, processes = self.job.documents, self.job.gpus
        parts = {
            "processes": PROCESS_BYTES,
            "texts": count * (TEXT_BYTES * self.job.lengths.document + DOCUMENT_BYTES),
        }
        if self.job.stage == "grpo":
            links = LINK_BYTES * self.job.recipe.grpo.refresh.neighbours if self.has_graph else 0
            parts["index"] = count * (VERSION_BYTES + links)
        elif not self.job.moves:
            parts["index"] = FULL * self.job.shape.hidden * count
        if self.job.stage == "distill":
            reply = self.job.lengths.query + self.job.lengths.template + self.job.lengths.reasoning
            replies, vector = self.job.recipe.distill.samples, FULL * self.job.shape.hidden
            parts["teacher"] = self.job.queries * (replies * (vector + TOKEN_BYTES * reply) + vector)
        if self.evaluated_every and self.evaluates_apart:
            parts["evaluated index"] = FULL * self.job.shape.hidden * math.ceil(count / processes)
        return {part: processes * size for part, size in parts.items()}

    def searches(self, refreshed: int) -> dict[str, float]:
        """FLOP of a process's searches in a step, by what they are for; of sketches at their largest.

        Args:
            refreshed: documents encoded in a step.
        """
        settings = self.job.recipe.grpo
        if self.job.stage == "distill" and self.job.recipe.distill.target == "scores":  # each process ranks for all
            return {"targets": 2.0 * self.job.documents * self.job.shape.hidden * self.job.step_queries}
        if self.job.stage != "grpo":
            return {}
        # All processes' queries are searched in every part; where a process holds all, it searches its own.
        shares = self.job.gpus if self.job.index_rows == self.job.documents else 1
        queries = math.ceil(settings.queries_per_step / shares)
        one = 2.0 * self.job.index_rows * self.job.shape.hidden
        one *= SKETCH if settings.refresh.index == "approximate" else 1.0
        direct = queries if settings.baseline == "direct" or settings.direct_loss_weight > 0 else 0
        looked_at = queries * settings.curriculum if settings.curriculum > 1 else 0
        # One pass gives ranks and the best documents, and to `shortlist` its choice.
        flops = {"reward": one * (queries * settings.group_size + direct + looked_at)}
        if self.has_graph:
            flops["choice"] = one * settings.queries_per_step * settings.group_size
            flops["graph"] = one * refreshed
        return flops

    def step_seconds(self, refreshed: int, encoding: float, rates: Rates) -> dict[str, float]:
        """Seconds of a step, the model's apart, by part; an evaluation counts by its share of the steps.

        Args:
            refreshed: documents encoded in a step.
            encoding: seconds in which all GPUs encode the corpus.
            rates: of a process.
        """
        speed = rates.index_tflops if self.job.stage == "grpo" else rates.threads * rates.thread_tflops
        seconds = {"search": sum(self.searches(refreshed).values()) / (speed * 1e12)}
        seconds["tokenizing"] = self._tokenizing(refreshed, rates)
        if self.job.moves and self.evaluated_every:
            whole = encoding + self._tokenizing(self.job.documents, rates)
            seconds["evaluation"] = whole / self.evaluated_every
        return {part: value for part, value in seconds.items() if value}

    def start_seconds(self, encoding: float, rates: Rates) -> dict[str, float]:
        """Seconds before the first step has ended that no other step takes, by part; see `step_seconds`."""
        if self.job.stage == "sft" and self.job.moves:
            return {}
        count = self.job.documents
        seconds = {"encoding": encoding, "tokenizing": self._tokenizing(count, rates)}
        if self.has_graph:
            seconds["graph"] = 2.0 * count * count * self.job.shape.hidden / (rates.index_tflops * 1e12)
        return seconds

    def _tokenizing(self, documents: int, rates: Rates) -> float:
        """Of so many documents, each of them by one process."""
        tokens = documents * self.job.lengths.document
        return tokens / (self.job.gpus * rates.threads * rates.tokens_per_second)
