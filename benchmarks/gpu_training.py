"""Training on a GPU, in a minute and a half: tokens/s, share of the matrix-product rate, peak memory.

    python benchmarks/gpu_training.py --out gpu_training.json   # Qwen2.5-1.5B's shape, random weights
    python benchmarks/gpu_training.py --quick --device cpu      # the same code at a tiny size, to try it

Steps of both stages run through `train_sft` and `train_grpo` on a model directory with random weights and a generated
collection: float32 weights, bfloat16 products, activation checkpointing, cached gradients in stage 1. Lengths are
spread little, so that the longest batch is no matter of luck. `tokens_per_second` are tokens of forward and backward
passes, padding apart; `share_of_rate` is their FLOP (6 per weight of the blocks, a third of it in passes without
gradients; what checkpointing computes again does not count) against the device's measured matrix products.
`peak_bytes` is the peak of torch's allocator after the first step, and `over_plan` that of `search-r3 plan` over it.
`phases` are the seconds of a step of stage 2: rollouts, documents encoded again, passes and update, all else (search,
rewards, advantages).
The first step of a stage warms up; medians are over the others. A stage ends after its steps, or after the first of
them that its share of --budget is over at; no model is written at its end. Ctrl-C ends with what there is.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from common import need, prepare, say
from gpu import QWEN_1_5B, TINY, build, product_rate
from gpu_record import Record, default_threads, free_memory, made_up_words

WORDS = {"query": (10, 14), "document": (180, 220), "reasoning": (80, 100)}
"""Words of a text, from the least to the most."""
REPLY_TOKENS = 100
"""Mean length of a rollout: the model emits the embed token with one over this probability."""


def write_model(options: argparse.Namespace, folder: Path, scratch: Path) -> Path:
    """Random weights of the wanted shape with a real tokenizer, such that replies end after about `REPLY_TOKENS`."""
    import torch

    backbone = build(argparse.Namespace(**{**vars(options), "dtype": "float32"}), scratch)
    with torch.no_grad():
        # One number is the same in every row of the table, so that all hidden states have much in common; their mean in
        # the embed token's row adds to its logit, by about as much everywhere.
        table = backbone.model.get_input_embeddings().weight
        table[:, 0] = 1.0
        ids = torch.randint(0, len(backbone.tokenizer), (4, 64), device=options.device)
        hidden = backbone.hidden_states(ids, torch.ones_like(ids))
        missing = backbone.logits(hidden).logsumexp(-1).mean() - math.log(REPLY_TOKENS)
        missing -= backbone.logits(hidden)[..., backbone.embed_token_id].mean()
        common = hidden.flatten(0, 1).mean(0)  # D
        table[backbone.embed_token_id] += missing / common.square().sum() * common
    backbone.save(folder, "bfloat16")
    return folder


def write_collection(options: argparse.Namespace, folder: Path) -> Path:
    """Queries with a document and a trace each; words are drawn at random from the tokenizer's own."""
    from search_r3.data.collection import Collection, Document, Query

    rng = random.Random(f"training/{options.seed}")
    words = made_up_words(options.seed)

    def text(kind: str) -> str:
        return " ".join(rng.choices(words, k=rng.randint(*WORDS[kind]) // (4 if options.quick else 1)))

    count = 24 if options.quick else 256
    documents = {f"d{i}": Document(f"d{i}", text("document"), "") for i in range(2 * count)}
    queries = {f"q{i}": Query(f"q{i}", text("query"), {"reasoning": text("reasoning")}) for i in range(count)}
    judged = {f"q{i}": {f"d{i}": 1} for i in range(count)}
    Collection("training", documents, queries, {"train": judged, "dev": dict(list(judged.items())[:8])}).save(folder)
    return folder


def make_recipe(options: argparse.Namespace, scratch: Path) -> Any:
    """Both stages' settings."""
    from search_r3.config import load_recipe

    small = options.quick
    return load_recipe(
        None,
        [
            *(f"run_dir={scratch / 'run'}", f"base={scratch / 'model'}", f"collection={scratch / 'collection'}"),
            *("max_length=512", f"max_new_tokens={48 if small else 256}", "save_every=1000", f"seed={options.seed}"),
            *(f"mixed_precision={'bf16' if options.dtype == 'bfloat16' else 'no'}", "gradient_checkpointing=true"),
            *(f"sft.steps={options.steps + 1}", f"sft.batch_size={4 if small else 64}", "sft.learning_rate=1e-6"),
            *("sft.splits={train: 1.0}", "sft.random_negatives=1", "sft.hard_negatives=0"),
            f"sft.micro_batch_size={4 if small else options.micro}",
            *(f"grpo.steps={options.steps + 1}", f"grpo.queries_per_step={4 if small else 32}", "grpo.group_size=8"),
            *("grpo.splits=[train]", "grpo.learning_rate=1e-7", "grpo.evaluate_every=1000"),
            *(f"grpo.micro_batch_size={8 if small else options.micro}", "grpo.rollout_batch_size=256"),
        ],
    )


class EnoughError(Exception):
    """The steps that were to be measured are done; the evaluation and the model of the last one are not wanted."""


class Passes:
    """Counts tokens of the policy's forward passes, with and without gradients, and ends a stage after its steps.

    Args:
        device: where it trains.
        steps: how many are measured, the first one included.
        until: the reading of `time.perf_counter` after which two are enough.
    """

    def __init__(self, device: str, steps: int, until: float) -> None:
        self.device, self.wanted, self.until = device, steps, until
        self.steps: list[dict[str, float]] = []
        self.counted: dict[bool, list[Any]] = {True: [], False: []}
        self.sequences = self.tokens = 0

    def count(self, mask: Any) -> None:
        """Before every forward pass."""
        import torch

        self.counted[torch.is_grad_enabled()].append(mask.sum())
        self.sequences += mask.shape[0]

    def observe(self, stage: str, step: int, values: dict[str, float]) -> None:
        """After every step."""
        import torch

        tokens = {grad: sum(int(part) for part in parts) for grad, parts in self.counted.items()}
        self.counted = {True: [], False: []}
        self.tokens += sum(tokens.values())
        self.steps.append({"trained": tokens[True], "forward": tokens[False], **values})
        say(f"{stage}, step {step}: {values['seconds']:.2f} s")
        if len(self.steps) == self.wanted or (len(self.steps) > 1 and time.perf_counter() > self.until):
            raise EnoughError
        if step == 1 and self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()


def callback(passes: Passes) -> Any:
    """What `train_sft` and `train_grpo` tell of their steps."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_log(
            self, args: Any, state: Any, control: Any, *, logs: dict[str, float], stage: str, **keywords: Any
        ) -> None:
            if state.global_step:  # not of the evaluation before the first
                passes.observe(stage, state.global_step, logs)

    return Steps()


@contextlib.contextmanager
def counting(passes: Passes) -> Iterator[None]:
    """While a stage trains: every forward pass of the policy is counted."""
    from search_r3.training.policy import Policy

    forward = Policy.forward

    def counted(policy: Any, ids: Any, mask: Any, **arguments: Any) -> Any:
        passes.count(mask)
        return forward(policy, ids, mask, **arguments)

    Policy.forward = counted
    try:
        yield
    finally:
        Policy.forward = forward


def longest(recipe: Any, stage: str) -> Any:
    """The plan's lengths: of prompts whole, since all texts are known; replies take their whole budget in stage 2."""
    import transformers

    from search_r3.data.load import load_collection
    from search_r3.data.triples import reasoning_traces
    from search_r3.model.prompts import EMBED_TOKEN, PromptEncoder, prompt_set, render_frames
    from search_r3.model.templates import TEMPLATE_ARGUMENTS
    from search_r3.planning.footprint import Lengths

    collection = load_collection(recipe.collection)
    tokenizer = transformers.AutoTokenizer.from_pretrained(recipe.base)
    embed = tokenizer.convert_tokens_to_ids(EMBED_TOKEN)
    frames = render_frames(tokenizer, prompt_set(recipe.prompts or "search-r3"), embed, TEMPLATE_ARGUMENTS)
    encoder = PromptEncoder(tokenizer, frames, embed, recipe.max_length)
    queries, documents = list(collection.queries.values()), list(collection.documents.values())
    traces = [encoder.reason_completion(next(iter(reasoning_traces(query).values()))).ids for query in queries]
    return Lengths(
        longest_query=max(len(p.ids) for p in encoder.encode_batch([query.text for query in queries], "reason")),
        longest_reasoning=max(map(len, traces)) if stage == "sft" else recipe.max_new_tokens,
        longest_document=max(
            len(p.ids) for p in encoder.encode_batch([one.full_text for one in documents], "document")
        ),
        template=0,
    )


def run_stage(
    options: argparse.Namespace, recipe: Any, stage: str, rate: float, seconds: float, record: dict[str, Any]
) -> None:
    """Train a stage, for about these seconds, and compare."""
    import torch

    from search_r3.data.load import load_collection
    from search_r3.planning.footprint import Job
    from search_r3.planning.plan import Work, plan
    from search_r3.planning.shape import read_shape
    from search_r3.training.grpo import train_grpo
    from search_r3.training.sft import train_sft

    on_gpu = options.device == "cuda"
    free_memory(options.device)
    record["held_before_bytes"] = torch.cuda.memory_allocated() if on_gpu else 0
    passes = Passes(options.device, options.steps, time.perf_counter() + seconds)
    record["steps"] = passes.steps
    with contextlib.suppress(EnoughError), counting(passes):
        if stage == "sft":
            train_sft(recipe, callbacks=[callback(passes)], resume=True)
        else:
            train_grpo(recipe, model=recipe.base, callbacks=[callback(passes)], resume=True)
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    free_memory(options.device)
    lengths = longest(recipe, stage)
    documents = len(load_collection(recipe.collection).documents)
    found = plan(recipe, stage, gpus=1, documents=documents, lengths=lengths)
    work = Work(Job(recipe, read_shape(recipe.base), stage, 1, "single", documents, lengths))
    steps = passes.steps[1:]
    spent = [step["update_seconds"] for step in steps]
    per_token = work.forward(passes.tokens / passes.sequences)
    flop = [(3 * step["trained"] + step["forward"]) * per_token for step in steps]
    expected = max(sum(parts.values()) for phase, parts in found.phases.items() if phase != "load")
    record |= {
        "seconds": [step["seconds"] for step in steps],
        "training_seconds": spent,
        "tokens_trained": [step["trained"] for step in steps],
        "tokens_forward": [step["forward"] for step in steps],
        "tokens_per_second": median(s["trained"] / t for s, t in zip(steps, spent, strict=True)),
        "share_of_rate": median(count / t for count, t in zip(flop, spent, strict=True)) / rate,
        "peak_bytes": peak,
        "tokens_per_sequence": passes.tokens / passes.sequences,
        "plan_bytes": expected,
        "over_plan": expected / peak if peak else None,
        "plan": {phase: parts for phase, parts in found.phases.items() if phase != "load"},
    }
    if stage == "grpo":
        phases = {
            phase: median(step[f"{phase}_seconds"] for step in steps) for phase in ("rollout", "refresh", "update")
        }
        record["phases"] = phases | {"other": median(step["seconds"] for step in steps) - sum(phases.values())}
        record["decoded_per_second"] = median(step["decoded_tokens_per_second"] for step in steps)
        record |= {name: median(step[name] for step in steps) for name in ("reasoning_tokens", "forced_share")}
        record["refresh_tokens_per_second"] = median(s["tokens_encoded"] / s["refresh_seconds"] for s in steps)
    if peak:
        record["ratio"] = expected / peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the products")
    parser.add_argument("--steps", type=int, default=3, help="steps of each stage, the first one to warm up")
    parser.add_argument("--micro", type=int, default=16, help="sequences per forward and backward pass")
    parser.add_argument("--budget", type=float, default=80.0, help="seconds after which no further stage starts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--out", type=Path, help="write the JSON object here too")
    parser.add_argument("--quick", action="store_true", help="a tiny model, within two minutes")
    options = parser.parse_args()
    record = Record(
        {"benchmark": "gpu_training", "peer": "search-r3 plan", "unit": "plan over measured peak"},
        options.out,
        options.budget,
        options.device,
    )
    need("torch", "transformers", "accelerate")
    prepare(options)
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this process sees no CUDA device; --quick --device cpu tries the script without one")
    if options.device == "cpu" and torch.cuda.is_available():
        parser.error("training takes the GPU that it sees; hide it with CUDA_VISIBLE_DEVICES= to try the CPU")
    options.size = TINY if options.quick else QWEN_1_5B
    record.values["settings"] = {
        "shape": options.size, "dtype": options.dtype, "micro": options.micro, "steps": options.steps,
        "seed": options.seed, "threads": options.threads, "quick": options.quick,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        write_model(options, scratch / "model", scratch)
        write_collection(options, scratch / "collection")
        recipe, rate = make_recipe(options, scratch), product_rate(options)
        record.values["product_rate"] = rate
        free_memory(options.device)
        say(f"model and collection written, {record.left:.0f} s are left; {rate / 1e12:.3g} TFLOP/s")
        record.measure(
            [
                ("sft", lambda found: run_stage(options, recipe, "sft", rate, record.left / 2, found)),
                ("grpo", lambda found: run_stage(options, recipe, "grpo", rate, record.left, found)),
            ]
        )
    record.finish("torch", "transformers", "accelerate")


if __name__ == "__main__":
    main()
