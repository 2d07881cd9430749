"""One process of a training by several, started by tests/integration/test_distributed.py; also what it compares with.

It runs short trainings one after the other and keeps the gradients of every step and the lines of metrics.jsonl.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

STAGES = {
    "sft": [
        "sft.steps=2", "sft.batch_size=7", "sft.splits={train: 1.0}", "sft.reasoning_styles={chain: 1.0}",
        "sft.random_negatives=2", "sft.matryoshka_dimensions=[8, 16]",
        "sft.kl_weight=1.0", "sft.evaluate_every=1", "sft.keep=best",
    ],
    "grpo": [
        "grpo.steps=2", "grpo.queries_per_step=5", "grpo.group_size=3", "grpo.splits=[train]",
        "grpo.embedding_loss_weight=0.3", "grpo.kl_coefficient=0.1", "grpo.evaluate_every=2",
        "grpo.refresh={policy: selective, depth: 3, neighbours: 3, max_documents: 12}",
    ],
    "distill": ["distill.steps=2", "distill.batch_size=5", "distill.depth=3", "distill.evaluate_every=2"],
}  # fmt: skip
COMMON = ["max_length=120", "max_new_tokens=16", "save_every=1000"]


def train(stage: str, folder: Path, base: str, collection: str, options: list[str]) -> dict[str, Any]:
    """Run one stage; the gradients of each step by name (summed over the processes), the metrics, the weights."""
    from search_r3.config import load_recipe
    from search_r3.training import engine, grpo, sft
    from search_r3.training.modes import distill

    where = [f"run_dir={folder}", f"base={base}", f"collection={collection}"]
    recipe = load_recipe(None, [*COMMON, *STAGES[stage], *where, *options])
    gradients = []
    step = engine.Engine.step

    def keep(self: Any) -> None:
        found = {}
        for name, parameter in self.accelerator.unwrap_model(self.policy).named_parameters():
            if parameter.grad is not None:
                gradient = parameter.grad
                found[name] = (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()
        gradients.append(found)
        step(self)

    engine.Engine.step = keep
    sft.ROWS_AT_A_TIME = 4  # a tiny batch has several blocks of rows, too
    try:
        if stage == "distill":
            result = distill.train_distill(base, recipe)
        else:
            result = sft.train_sft(recipe) if stage == "sft" else grpo.train_grpo(recipe, model=base)
    finally:
        engine.Engine.step = step
    return {"gradients": gradients, "metrics": result.log_history, "path": str(result.model_path)}


def main() -> None:
    """Read the trainings from the first argument (JSON), run them, write what was kept."""
    from search_r3.training import policy

    given = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    policy.LOGITS_AT_A_TIME = 8000  # several chunks of positions, where one process computes all at once
    if given["fsdp"]:
        pretend_to_be_gpus()
    for name, (stage, base, options) in given["trainings"].items():
        kept = train(stage, Path(given["out"]) / name, base, given["collection"], options)
        torch.save(kept, Path(given["out"]) / f"{name}-{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


def pretend_to_be_gpus() -> None:
    """Accelerate offers FSDP2 to accelerators only, though torch runs it over gloo on CPUs as well."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    check = PartialState.__init__
    PartialState.__init__ = lambda self, cpu=False, **options: check(self, **options)


if __name__ == "__main__":
    main()
