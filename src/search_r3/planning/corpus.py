"""What the corpus costs beside the model's own work: memory of the machine, searches, tokenizing, evaluations.

The index is searched on the CPU, by every process. Rates are those of one thread, and can be replaced by measured ones.

Shapes: `N` documents, `D` vector size, `P` processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .footprint import Job
from .memory import FULL

TEXT_BYTES = 5
"""Bytes of text per token, about: English in the tokenizers of large models has 4 to 5 letters and blanks a token."""
DOCUMENT_BYTES = 420
"""Bytes of a document's Python objects in a collection and in an index, its text apart (measured by a test)."""
PROCESS_BYTES = 2_000_000_000
"""Bytes of a training process without model and data: Python, torch and what CUDA keeps of its own; about."""
VERSION_BYTES = 8
LINK_BYTES = 8


@dataclass(frozen=True)
class Processor:
    """What a process has of the machine's CPUs.

    Attributes:
        threads: `OMP_NUM_THREADS`.
        gflops: GFLOP/s of a thread in products with an index (docs/results.md, "Exact and approximate": 65 queries a
            second over a million vectors of 896 on two threads).
        tokens_per_second: tokens that a thread makes of text.
    """

    threads: int = 8
    gflops: float = 58.0
    tokens_per_second: float = 250_000.0


@dataclass(frozen=True)
class Corpus:
    """The corpus of a stage."""

    job: Job

    @property
    def moves(self) -> bool:
        """Whether documents are encoded in the course of the stage, and evaluated ones anew."""
        return self.job.stage == "sft" or self.job.recipe.grpo.documents == "moving"

    @property
    def evaluated_every(self) -> int:
        """Steps between two evaluations of the stage, 0 for none."""
        return (self.job.recipe.sft if self.job.stage == "sft" else self.job.recipe.grpo).evaluate_every

    @property
    def has_graph(self) -> bool:
        """Whether the policy keeps a neighbour graph."""
        return self.job.stage == "grpo" and self.moves and self.job.recipe.grpo.refresh.policy == "selective"

    def host(self) -> dict[str, int]:
        """Bytes of the machine's memory by part, of all processes together."""
        count, processes = self.job.documents, self.job.gpus
        matrix = FULL * self.job.shape.hidden * count
        parts = {
            "processes": PROCESS_BYTES,
            "texts": count * (TEXT_BYTES * self.job.lengths.document + DOCUMENT_BYTES),
        }
        if self.job.stage == "grpo":
            links = LINK_BYTES * self.job.recipe.grpo.refresh.neighbours if self.has_graph else 0
            parts["index"] = matrix + count * (VERSION_BYTES + links)
            # What all encoded, and the copy that an index makes of it: at the start the second one stays.
            parts["index, while made"] = matrix * (2 if self.moves and self.evaluated_every else 1)
        elif self.evaluated_every:
            parts["index, while made"] = 2 * matrix
        return {part: processes * size for part, size in parts.items()}

    def searches(self, refreshed: int) -> dict[str, float]:
        """FLOP of a process's searches in a step, by what they are for; none where a graph does them (usearch).

        Args:
            refreshed: documents encoded in a step.
        """
        settings = self.job.recipe.grpo
        if self.job.stage == "sft" or settings.refresh.index == "approximate":
            return {}
        one = 2.0 * self.job.documents * self.job.shape.hidden
        queries = math.ceil(settings.queries_per_step / self.job.gpus)
        # One pass for the ranks of the relevant documents, one for the best ones where a reward or a loss looks there.
        passes = 1 + (settings.reward.contrastive > 0 or settings.pathwise)
        direct = queries if settings.baseline == "direct" or settings.direct_loss_weight > 0 else 0
        looked_at = queries * settings.curriculum if settings.curriculum > 1 else 0
        flops = {"reward": passes * one * (self.job.own_rollouts + direct + looked_at)}
        if self.moves and settings.refresh.policy in ("shortlist", "selective"):
            flops["choice"] = one * settings.queries_per_step * settings.group_size
        if self.has_graph:
            flops["graph"] = one * refreshed
        return flops

    def step_seconds(self, refreshed: int, encoding: float, cpu: Processor) -> dict[str, float]:
        """Seconds of a step, the model's apart, by part; an evaluation counts by its share of the steps.

        Args:
            refreshed: documents encoded in a step.
            encoding: seconds in which all GPUs encode the corpus.
            cpu: of a process.
        """
        rate = cpu.threads * cpu.gflops * 1e9
        seconds = {"search": sum(self.searches(refreshed).values()) / rate}
        seconds["tokenizing"] = self._tokenizing(refreshed / self.job.gpus, cpu)
        if self.moves and self.evaluated_every:
            whole = encoding + self._tokenizing(self.job.documents / self.job.gpus, cpu)
            seconds["evaluation"] = whole / self.evaluated_every
        return {part: value for part, value in seconds.items() if value}

    def start_seconds(self, encoding: float, cpu: Processor) -> dict[str, float]:
        """Seconds before the first step of stage 2 has ended that no other step takes, by part; see `step_seconds`."""
        if self.job.stage == "sft":
            return {}
        count = self.job.documents
        # Every process counts the tokens of all documents, and encodes its share.
        seconds = {"encoding": encoding, "tokenizing": self._tokenizing(count * (1 + 1 / self.job.gpus), cpu)}
        if self.has_graph:
            graph = 2.0 * count * count * self.job.shape.hidden
            seconds["graph"] = graph / (cpu.threads * cpu.gflops * 1e9)
        return seconds

    def _tokenizing(self, documents: float, cpu: Processor) -> float:
        return documents * self.job.lengths.document / (cpu.threads * cpu.tokens_per_second)
