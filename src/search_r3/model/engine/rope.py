"""Rotary frequencies that do not depend on the company."""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def freeze_rope(model: Any, longest: int) -> None:
    """Fix the frequencies of `longrope` and `dynamic` as they are for sequences of so many tokens.

    transformers chooses them anew in every forward pass, by the longest sequence of the batch; a long text would change
    the vectors of its neighbours, and a reply that grows would read keys that were turned otherwise.
    """
    example = next(iter(model.parameters()))[:1]
    last = torch.tensor([[longest - 1]], device=example.device)
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str) and _varies(kinds):
            module(example, last)
            module.rope_type = "frozen"
        elif isinstance(kinds, dict):
            for layer_type in [name for name, kind in kinds.items() if _varies(kind)]:
                module(example, last, layer_type)
                kinds[layer_type] = "frozen"


def _varies(kind: str) -> bool:
    return kind == "longrope" or "dynamic" in kind
