"""What the benchmarks share: machine facts, timing, a random model with a real tokenizer, the peer without our decoder.

Nothing heavy is imported here until a function needs it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

MEDIAN_LENGTH, SPREAD, SHORTEST, LONGEST = 80, 0.7, 20, 300
"""Reasoning lengths in tokens: a log-normal distribution (its median, its sigma), clipped."""

NEVER = -30.0
"""A bias on a logit with which a token is not drawn in this universe, yet every log-probability stays small."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    return {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}


def versions(*packages: str) -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in packages}


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median and, of more than one value, the range."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def need(*modules: str) -> None:
    """End with one line where a peer's package is missing."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            sys.exit(f"this benchmark needs {module} ({error}); pip install search-r3[benchmarks]")


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def alternating(sides: dict[str, Callable[[], Any]], runs: int) -> dict[str, list[float]]:
    """Seconds of each side, run after run; every other round goes through the sides backwards."""
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for run in range(runs):
        names = list(sides) if run % 2 == 0 else list(sides)[::-1]
        for name in names:
            spent[name].append(seconds(sides[name]))
            say(f"run {run + 1}/{runs} {name}: {spent[name][-1]:.2f} s")
    return spent


def fastest(measure: Callable[[int], Any], sizes: Iterable[int]) -> tuple[int, dict[str, float]]:
    """The size with which a side takes least time, and the seconds with each."""
    spent = {}
    for size in sizes:
        spent[size] = seconds(measure, size)
        say(f"peer with batch size {size}: {spent[size]:.2f} s")
    return min(spent, key=lambda size: spent[size]), {str(size): value for size, value in spent.items()}


def ratio_of_medians(ours: Sequence[float], peer: Sequence[float]) -> float:
    """How many times faster we are, from seconds."""
    return median(peer) / median(ours)


def add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that `worker` gives to a benchmark's own script."""
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)


def worker(script: str, name: str, folder: Path, threads: int, rounds: int) -> tuple[dict[str, Any], float]:
    """What a benchmark prints as its last line for one contender, in a process of its own, and the seconds it took."""
    limits = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS")}
    # Threads of one library must not spin while the other one works.
    environment = {**os.environ, **limits, "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, script, "--worker", name, "--folder", str(folder)]
    command += ["--threads", str(threads), "--rounds", str(rounds)]
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1]), time.perf_counter() - started


def finish(record: dict[str, Any], out: Path | None) -> None:
    """The record as the last line on stdout, and into a file if one was asked for."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record))


def peak_memory() -> int:
    """Bytes of resident memory that this process had at its peak.

    On Linux not from `getrusage`, which also knows the peak of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class Shape:
    """Size of a model in Qwen2's proportions: heads of 64, two of them for keys and values, an MLP of 8/3."""

    layers: int
    hidden: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From `layers x hidden`, for instance `6x384`."""
        layers, _, hidden = text.partition("x")
        if not (layers.isdigit() and hidden.isdigit()) or int(hidden) % 64:
            raise argparse.ArgumentTypeError(f"{text!r} is no shape: write LAYERSxHIDDEN, HIDDEN a multiple of 64")
        return cls(int(layers), int(hidden))

    @property
    def heads(self) -> int:
        """Heads of queries."""
        return self.hidden // 64

    @property
    def key_heads(self) -> int:
        """Heads of keys and of values."""
        return 2 if self.heads % 2 == 0 else 1

    @property
    def intermediate(self) -> int:
        """Width of the MLP."""
        return round(self.hidden * 8 / 3 / 64) * 64

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Outputs and inputs of the matrices of one layer."""
        wide = self.intermediate
        keys = (64 * self.key_heads, self.hidden)
        return [(self.hidden,) * 2, keys, keys, (self.hidden,) * 2, *[(wide, self.hidden)] * 2, (self.hidden, wide)]

    @property
    def layer_parameters(self) -> int:
        """Parameters of all layers' matrices."""
        return self.layers * sum(rows * columns for rows, columns in self.matrices)

    def __str__(self) -> str:
        return f"{self.layers}x{self.hidden}"


def add_arguments(parser: argparse.ArgumentParser, runs: int) -> None:
    """The arguments that the benchmarks of whole models have in common."""
    parser.add_argument("--shape", type=Shape.parse, default=Shape(6, 384), help="layers x hidden size, e.g. 12x768")
    parser.add_argument("--vocabulary", type=int, default=16_384, help="rows of the token table")
    parser.add_argument("--runs", type=int, default=runs, help="alternating runs; medians count")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the JSON object here too")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few texts, within a minute")


def prepare(options: argparse.Namespace) -> None:
    """No downloads, no progress bars, as many threads as asked for."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["RAYON_NUM_THREADS"] = str(options.threads)  # of the tokenizers
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)


def make_model(folder: Path, texts: Iterable[str], shape: Shape, vocabulary: int, context: int, seed: int = 0) -> Path:
    """A random Qwen2 whose BPE tokenizer was trained on the texts, with Qwen's chat template; a model directory."""
    import torch
    import transformers

    from search_r3.model.prompts import PROMPT_SETS
    from search_r3.pretraining.tokenizer import train_tokenizer

    wording = PROMPT_SETS["search-r3"]
    systems = [wording.direct_system, wording.reason_system, wording.document_system, "system user assistant"]
    tokenizer = train_tokenizer([*texts, *systems * 5], vocabulary - 1)
    config = transformers.Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,  # attention and next-token probabilities less even than those of 0.02
    )
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def atlas_texts() -> list[str]:
    """Enough different words for a vocabulary of real size, without a download."""
    from search_r3.data.load import load_collection

    collection = load_collection("atlas-wide")
    documents = [document.full_text for document in collection.documents.values()]
    return documents + [query.text for query in collection.queries.values()]


def never_ending(backbone: Any) -> None:
    """Make the tokens that end a reply, and rows without a text, impossible: a reply ends where its budget ends.

    Random weights would draw them once in a vocabulary, and each side would draw them elsewhere.
    """
    import torch

    table = backbone.model.get_input_embeddings().weight
    layer = torch.nn.Linear(table.shape[1], table.shape[0], device=table.device, dtype=table.dtype)
    layer.weight = table  # still tied
    layer.bias.data.zero_()
    layer.bias.data[len(backbone.tokenizer) :] = NEVER
    layer.bias.data[[backbone.embed_token_id, *backbone.tokenizer.all_special_ids]] = NEVER
    backbone.model.set_output_embeddings(layer)


def reasoning_lengths(count: int, seed: int | str, longest: int = LONGEST) -> list[int]:
    """Tokens of reasoning per rollout, spread as those of real models are."""
    rng = random.Random(f"lengths/{seed}")
    drawn = (rng.lognormvariate(float(np.log(MEDIAN_LENGTH)), SPREAD) for _ in range(count))
    return [int(min(max(length, SHORTEST), longest)) for length in drawn]


class RowsEnd:
    """A stopping criterion: each row is done where its reasoning has the length it was given."""

    def __init__(self, lengths: Sequence[int], prompt_width: int) -> None:
        import torch

        self.ends = torch.tensor(lengths) + prompt_width

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """Which rows are done."""
        return input_ids.shape[1] >= self.ends.to(input_ids.device)


class GenerateThenEmbed:
    """The peer: `transformers.generate` in fixed batches, then a second forward pass over all tokens.

    Prompts of like length share a batch, and so do sequences of like length in the second pass. How long a reply
    will be, no batch can know before.

    Args:
        model: a causal LM of transformers.
        pad_id: the padding token.
        embed_id: the token whose hidden state is the vector.
        temperature: of sampling; 0 is greedy.
    """

    def __init__(self, model: Any, pad_id: int, embed_id: int, temperature: float) -> None:
        self.model, self.pad_id, self.embed_id = model, pad_id, embed_id
        self.sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            self.sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}

    def __call__(
        self, prompts: Sequence[list[int]], lengths: Sequence[int], batch_size: int
    ) -> tuple[Any, list[list[int]]]:
        """Vectors `B x D` and the reasoning's ids."""
        replies: list[list[int]] = [[] for _ in prompts]
        for rows in in_batches(prompts, batch_size):
            found = self.generate([prompts[row] for row in rows], [lengths[row] for row in rows])
            for row, reply in zip(rows, found, strict=True):
                replies[row] = reply
        sequences = [[*prompt, *reply, self.embed_id] for prompt, reply in zip(prompts, replies, strict=True)]
        return self.embed(sequences, batch_size), replies

    def generate(self, prompts: Sequence[list[int]], lengths: Sequence[int]) -> list[list[int]]:
        """One fixed batch of replies, padded on the left."""
        import torch

        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(prompt), 1
        done = self.model.generate(
            input_ids=ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=max(lengths),
            stopping_criteria=[RowsEnd(lengths, width)],
            pad_token_id=self.pad_id,
            **self.sampling,
        )
        return [reply[:length] for reply, length in zip(done[:, width:].tolist(), lengths, strict=True)]

    def embed(self, sequences: Sequence[list[int]], batch_size: int) -> Any:
        """Vectors at the last tokens. Padding on the right needs no mask: no token looks to its right."""
        import torch

        found: dict[int, Any] = {}
        with torch.inference_mode():
            for rows in in_batches(sequences, batch_size):
                last = torch.tensor([len(sequences[row]) for row in rows]) - 1
                ids = torch.full((len(rows), int(last.max()) + 1), self.pad_id)
                for place, row in enumerate(rows):
                    ids[place, : len(sequences[row])] = torch.tensor(sequences[row])
                hidden = self.model.base_model(input_ids=ids.to(self.model.device), use_cache=False).last_hidden_state
                vectors = torch.nn.functional.normalize(hidden[torch.arange(len(rows)), last].float(), dim=-1).cpu()
                found |= dict(zip(rows, vectors, strict=True))
        return torch.stack([found[row] for row in range(len(sequences))]).numpy()


def in_batches(sequences: Sequence[Sequence[int]], batch_size: int) -> Iterable[list[int]]:
    """Row numbers, sorted by length."""
    order = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def check_vectors(ours: np.ndarray, peer: np.ndarray, tolerance: float = 1e-4) -> float:
    """The largest difference; more than the tolerance ends the benchmark."""
    worst = float(np.abs(np.asarray(ours) - np.asarray(peer)).max())
    if not worst <= tolerance:
        sys.exit(f"the two sides' vectors differ by {worst:.2e}, more than {tolerance:g}: nothing to compare")
    return worst
