"""What both training loops share: accelerator, optimizer and schedule, seeds that depend on the step alone."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import GRPOSettings, Recipe, SFTSettings
from ..errors import ConfigError
from ..model.backbone import EmbeddingSettings
from ..model.encoder import SearchR3
from ..model.prompts import PROMPT_SETS


@dataclass
class Engine:
    """Accelerate's objects around one model."""

    accelerator: Any
    optimizer: Any
    scheduler: Any

    def step(self, parameters: Any, max_grad_norm: float) -> float:
        """Clip, step, advance the schedule, clear; returns the gradient norm before clipping."""
        norm = self.accelerator.clip_grad_norm_(parameters, max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return float(norm)


def make_engine(model: SearchR3, settings: SFTSettings | GRPOSettings, seed: int) -> Engine:
    """AdamW with linear warm-up and cosine decay to 0 over a stage's optimizer steps, on accelerate.

    Raises:
        ConfigError: more than one process.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    accelerator = Accelerator(cpu=model.backbone.device.type == "cpu")
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"training runs on one process so far, but {accelerator.num_processes} were launched; start it without "
            "accelerate launch"
        )
    set_seed(seed)
    optimizer = torch.optim.AdamW(
        model.backbone.model.parameters(),
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
    )
    steps = settings.steps * (settings.num_iterations if isinstance(settings, GRPOSettings) else 1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, settings.warmup_steps, steps)
    )
    model.backbone.model, optimizer, scheduler = accelerator.prepare(model.backbone.model, optimizer, scheduler)
    return Engine(accelerator, optimizer, scheduler)


def warmup_cosine(step: int, warmup_steps: int, steps: int, floor: float = 0.0) -> float:
    """Factor on the learning rate: linear to 1 over the warm-up, then half a cosine to `floor` at `steps`."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def step_rng(seed: int, stage: str, step: int) -> random.Random:
    """The random numbers of one step: a resumed run draws the same ones without a saved state."""
    return random.Random(f"{seed}/{stage}/{step}")


def load_model(recipe: Recipe, source: str | Path) -> SearchR3:
    """A model for training, with the recipe's prompts and limits."""
    settings = EmbeddingSettings(
        prompts=PROMPT_SETS[recipe.prompts],
        max_length=recipe.max_length,
        max_new_tokens=recipe.max_new_tokens,
    )
    return SearchR3(source, dtype=recipe.dtype, settings=settings)
