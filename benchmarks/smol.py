"""Train SmolLM2-135M-Instruct in both stages and look at it on dev queries; the last line is one JSON object.

    python benchmarks/smol_data.py PAIRS DATA_ROOT data/smol           # on any machine: texts, traces, hard negatives
    python benchmarks/smol.py --base SMOL_DIRECTORY --data data/smol --work runs/smol --out runs/smol/out --seconds 420

`--base` may also be a GGUF file, or its parts as `split -n 2` writes them, `--data` the archive of
benchmarks/smol_data.py. Stages: base, data, sft, evaluate, grpo, evaluate; a stage that is finished is not repeated.
The steps of both trainings follow from the measured speed of their first ones, so that each cosine ends within its
share of `--seconds`; what is done by then is in `--out` (adapters in float16, metrics, dev results, replies).
`--quick`: a few steps on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import machine, say
from safetensors.torch import load_file, save_file
from smol_eval import evaluate
from transformers import TrainerCallback

from search_r3.config import Recipe, load_recipe
from search_r3.data.collection import Collection, Document, Query
from search_r3.model.encoder import SearchR3
from search_r3.training.grpo import train_grpo
from search_r3.training.sft import train_sft

RECIPES = Path(__file__).parent.parent / "recipes"
PROBE = {"sft": 24, "grpo": 3}
"""Steps whose speed decides how many are made."""
QUICK = {
    "sft": [
        "sft.splits={openbookqa: 0.5, strategyqa_facts: 0.5}",
        "sft.micro_batch_size=8",
        "sft.steps=20",
        "sft.batch_size=8",
        "sft.warmup_steps=2",
        "mixed_precision='no'",
    ],
    "grpo": ["grpo.steps=2", "grpo.queries_per_step=4", "grpo.group_size=4", "mixed_precision='no'"],
}
RL_SPLITS = ("openbookqa", "strategyqa_facts", "entailmentbank", "qasc")
RL_DEV = 25


@dataclass(frozen=True)
class Clock:
    """Seconds since the start, and when to be done."""

    start: float
    seconds: float

    def left(self) -> float:
        """Seconds until then."""
        return self.start + self.seconds - time.monotonic()

    def say(self, text: str) -> None:
        """A line with the time."""
        say(f"[{time.monotonic() - self.start:6.1f} s] {text}")


def prepare(options: argparse.Namespace, work: Path) -> tuple[Path, Path]:
    """The base, the data as a folder, and the collection of stage 2."""
    base, data = options.base[0], options.data
    if len(options.base) > 1:
        base = work / "base.gguf"
        work.mkdir(parents=True, exist_ok=True)
        base.write_bytes(b"".join(part.read_bytes() for part in options.base))
    if data.is_file():
        data = work / "data"
        if not (data / "manifest.json").exists():
            with tarfile.open(options.data) as tar:
                tar.extractall(data, filter="data")
    if not (rl_folder(data, options.quick) / "corpus.jsonl").exists():
        whole = rl_collection(data)
        (first_of(whole) if options.quick else whole).save(rl_folder(data, options.quick))
    return base, data


def rl_folder(data: Path, quick: bool) -> Path:
    return data / ("rl-quick" if quick else "rl")


def first_of(whole: Collection, queries: int = 10) -> Collection:
    """A few queries of each split, and the documents that they need."""
    splits = {name: dict(list(qrels.items())[:queries]) for name, qrels in whole.qrels.items()}
    documents = {one for qrels in splits.values() for gains in qrels.values() for one in gains}
    asked = {one for qrels in splits.values() for one in qrels}
    return Collection(
        "rl",
        {one: document for one, document in whole.documents.items() if one in documents},
        {one: query for one, query in whole.queries.items() if one in asked},
        splits,
    )


def rl_collection(data: Path) -> Collection:
    """The documents of a few sources, to be ranked as a whole, their train queries, and some dev queries."""
    train = Collection.load(data / "train")
    keep = tuple(f"{name}/" for name in RL_SPLITS if name in train.qrels)
    documents = {one: document for one, document in train.documents.items() if one.startswith(keep)}
    queries = {
        one: Query(one, train.queries[one].text)
        for name in RL_SPLITS
        if name in train.qrels
        for one in train.qrels[name]
    }
    splits = {name: train.qrels[name] for name in RL_SPLITS if name in train.qrels}
    dev: dict[str, dict[str, int]] = {}
    for name in ("openbookqa", "strategyqa_facts"):
        own = Collection.load(data / "dev" / name)
        documents |= {
            f"{name}/{d.doc_id}": Document(f"{name}/{d.doc_id}", d.text, d.title) for d in own.documents.values()
        }
        for query_id, gains in list(own.split("dev").items())[:RL_DEV]:
            queries[f"{name}/{query_id}"] = Query(f"{name}/{query_id}", own.queries[query_id].text)
            dev[f"{name}/{query_id}"] = {f"{name}/{one}": gain for one, gain in gains.items()}
    return Collection("rl", documents, queries, {**splits, "dev": dev})


def fitted(recipe: Recipe, overrides: list[str], stage: str, seconds: float, clock: Clock, work: Path) -> list[str]:
    """More overrides: how many steps fill `seconds`, by a run of a few, which is part of them and thrown away."""
    began = time.monotonic()
    probe = work / f"probe-{stage}"
    shutil.rmtree(probe, ignore_errors=True)
    few = [*overrides, f"{stage}.steps={PROBE[stage]}", f"run_dir={probe}", f"{stage}.warmup_steps=1"]
    train(stage, load_recipe(recipe_of(stage), few), probe, clock)
    spent = time.monotonic() - began
    rows = [row for row in metrics_of(probe) if row["step"] > 0]
    around = spent - sum(row["seconds"] for row in rows)  # to load, to look at dev, to save
    each = statistics.mean(row["seconds"] for row in rows if row["step"] > PROBE[stage] // 4)
    steps = int((seconds - spent - around) / each)
    clock.say(
        f"{stage}: {each:.3f} s a step, {around:.0f} s around them, so {steps} steps in {seconds:.0f} s{memory()}"
    )
    if steps < 5:
        raise RuntimeError(f"{seconds:.0f} s are too few for {stage}")
    shutil.rmtree(probe, ignore_errors=True)
    return [f"{stage}.steps={steps}", f"{stage}.warmup_steps={max(2, min(40, steps // 12))}"]


def recipe_of(stage: str) -> Path:
    return RECIPES / f"smol-{stage}.yaml"


class Lines(TrainerCallback):
    """Every so many steps a line."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_log(
        self, args: Any, state: Any, control: Any, *, logs: dict[str, float], stage: str, **keywords: Any
    ) -> None:
        """After every step."""
        step, steps = state.global_step, state.max_steps
        if step in (1, steps) or step % max(10, steps // 10) == 0 or (stage == "grpo" and step % 3 == 0):
            shown = ("loss", "info_nce", "cross_entropy", "reward", "forced_share", "reasoning_tokens", "seconds")
            self.clock.say(f"{stage} {step}/{steps} " + " ".join(f"{k}={logs[k]:.3f}" for k in shown if k in logs))


def train(stage: str, recipe: Recipe, folder: Path, clock: Clock) -> Path:
    """One training."""
    if stage == "sft":
        return train_sft(recipe, callbacks=[Lines(clock)], resume=True).model_path
    return train_grpo(recipe, model=recipe.base, callbacks=[Lines(clock)], resume=True).model_path


def stage_of(stage: str, overrides: list[str], seconds: float | None, clock: Clock, work: Path, out: Path) -> Path:
    """Train one stage within its seconds and leave its adapters in `out`; a batch too large is computed in parts."""
    folder = work / stage
    overrides = [*overrides, f"run_dir={folder}"]
    for attempt in range(3):
        try:
            recipe = load_recipe(recipe_of(stage), overrides)
            settings = folder / "settings.yaml"
            if settings.exists():  # begun by a run that was stopped
                section = getattr(load_recipe(settings), stage)
                names = ("steps", "warmup_steps", "micro_batch_size")
                overrides += [f"{stage}.{one}={json.dumps(getattr(section, one))}" for one in names]
            elif seconds is not None:
                overrides += fitted(recipe, overrides, stage, min(seconds, clock.left() - 20), clock, work)
            model = train(stage, load_recipe(recipe_of(stage), overrides), folder, clock)
            break
        except torch.cuda.OutOfMemoryError:
            size = {"sft": 128, "grpo": 32}[stage] // (2**attempt)
            clock.say(f"{stage}: out of memory; now in passes of {size}")
            overrides.append(f"{stage}.micro_batch_size={size}")
            shutil.rmtree(folder, ignore_errors=True)
        free()
    else:
        raise RuntimeError(f"{stage} does not fit")
    keep_adapter(folder / stage / "adapter", out, stage)
    others = [row for row in metrics_of(out) if row["stage"] != stage] if (out / "metrics.jsonl").exists() else []
    lines = "".join(json.dumps(row) + "\n" for row in [*others, *metrics_of(folder)])
    (out / "metrics.jsonl").write_text(lines, encoding="utf-8")
    free()
    return model


def keep_adapter(adapter: Path, out: Path, stage: str) -> None:
    """The adapters in float16, and their settings."""
    tensors = {name: value.half() for name, value in load_file(adapter / "adapter_model.safetensors").items()}
    (out / stage).mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / stage / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copy(adapter / "adapter_config.json", out / stage / "adapter_config.json")


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    with (folder / "metrics.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def memory() -> str:
    if not torch.cuda.is_available():
        return ""
    return f"; peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"


def free() -> None:
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def look(
    name: str, model: Path, data: Path, out: Path, sizes: tuple[int, int], clock: Clock, until: float
) -> dict[str, Any]:
    """Dev results of one model, as long as there is time."""
    encoder = SearchR3(model)
    found = evaluate(name, encoder, data, out, sizes, clock.say, lambda: clock.left() > until)
    del encoder
    free()
    return found


def attempt(name: str, clock: Clock, action: Callable[[], Any]) -> Any:
    """What fails does not end what comes after it."""
    try:
        return action()
    except Exception:
        clock.say(f"{name} failed:\n{traceback.format_exc()[-2500:]}")
        free()
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, nargs="+", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/smol"))
    parser.add_argument("--out", type=Path, default=Path("runs/smol/out"))
    parser.add_argument("--seconds", type=float, default=420, help="for all stages together")
    parser.add_argument("--started", type=float, help="when the clock began, in seconds since 1970; default: now")
    parser.add_argument("--sft-seconds", type=float, help="default: 60 %% of --seconds")
    parser.add_argument("--queries", type=int, default=200, help="dev queries of each collection")
    parser.add_argument("--set", nargs="*", default=[], help="key=value for stage 1")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    begun = time.time() - options.started if options.started else 0.0
    clock = Clock(time.monotonic() - begun, options.seconds)
    work, out = options.work, options.out
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = True
    base, data = prepare(options, work)
    clock.say(f"base and data; {machine()}")
    sizes = (8, 100) if options.quick else (options.queries, 10**6)
    where = [f"base={base}", f"collection={data / 'train'}"]
    if torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        where.append("sft.micro_batch_size=64")
    seconds = None if options.quick else options.sft_seconds or 0.6 * options.seconds
    where += [*(QUICK["sft"] if options.quick else []), *options.set]
    sft = stage_of("sft", where, seconds, clock, work, out)
    clock.say("stage 1 saved")
    results = {"sft": attempt("evaluation", clock, lambda: look("sft", sft, data, out, sizes, clock, 12))}
    left = clock.left() - 25  # to look at it
    if options.quick or left > 40:
        rl = [f"base={sft}", f"collection={rl_folder(data, options.quick)}", *(QUICK["grpo"] if options.quick else [])]
        seconds = None if options.quick else 0.95 * left
        model = attempt("stage 2", clock, lambda: stage_of("grpo", rl, seconds, clock, work, out))
        if model is not None:
            results["grpo"] = attempt("evaluation", clock, lambda: look("grpo", model, data, out, sizes, clock, 8))
    record = {"benchmark": "smol", "results": results, "quick": options.quick, "machine": machine()}
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
