"""The names of precisions and devices, what is taken where none is given, and logits in float32 where less is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def torch_device(device: str | torch.device | None = None) -> torch.device:
    """The device of that name; without one the first GPU (`cuda`, then `mps`), else the CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    if device is None:
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    if isinstance(device, list | tuple):
        raise ConfigError(
            f"device={device!r}: a model is loaded on one device; encode_document and the like take several"
        )
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:  # torch has all of them for it
        fault = str(error).partition("\n")[0]
        raise ConfigError(f"device {device!r} cannot be used here ({fault}); give cpu, cuda, cuda:1, mps") from error
    return chosen


def torch_dtype(dtype: str | torch.dtype, device: torch.device | None = None) -> torch.dtype:
    """The precision of that name.

    Args:
        dtype: `float32`, `bfloat16`, `float16` (also `fp32`, `bf16`, `fp16`, or torch's own), or `auto`: bfloat16 on a
            CUDA device that computes in it, else float32. Float16 is never chosen: models made in bfloat16 can exceed
            it.
        device: where the model computes; `auto` without one is float32.

    Raises:
        ConfigError: another name.
    """
    if dtype == "auto":
        is_cuda = device is not None and device.type == "cuda"
        return torch.bfloat16 if is_cuda and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    name = str(dtype).removeprefix("torch.")
    chosen = DTYPES.get(_SHORT.get(name, name))
    if chosen is None:
        raise ConfigError(f"unknown dtype {dtype!r}; take auto, {', '.join([*DTYPES, *_SHORT])}, or torch's own")
    return chosen


def float32_scores(head: Any, states: Tensor) -> Tensor:
    """Scores `... x V` that an output layer gives states `... x D`, in float32 although it computes in half precision.

    Its output, rounded to bfloat16, would be off by 0.06 where a logit is 20. Only what is multiplied is rounded, and
    the sums stay in float32. Rows that peft trains are multiplied by themselves, where peft copies the whole matrix.
    Layers that are more than a matrix (low-rank adapters in them, quantised) compute as ever.
    """
    rows, layer = getattr(head, "token_adapter", None), bare_layer(head)
    is_matrix = type(layer) is torch.nn.Linear and layer.bias is None
    # ZeRO-3 has the weights whole within the layer's own forward pass only.
    if not is_matrix or layer is not getattr(rows, "base_layer", head) or hasattr(layer.weight, "ds_id"):
        return torch.as_tensor(head(states)).float()
    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else layer.weight.dtype
    flat = states.reshape(-1, states.shape[-1]).to(dtype)

    def product(weight: Tensor) -> Tensor:
        if dtype not in (torch.bfloat16, torch.float16):
            return torch.nn.functional.linear(flat, weight)
        scores: Tensor = _Float32Product.apply(flat, weight.to(dtype))  # type: ignore[no-untyped-call]
        return scores

    scores = product(layer.weight)
    if rows is not None and not rows.disable_adapters:
        for name in rows.active_adapters:
            ids = torch.tensor(rows.token_indices[name], device=scores.device)
            scores = scores.index_copy_(1, ids, product(rows.trainable_tokens_delta[name]))
    return scores.view(*states.shape[:-1], scores.shape[-1])


def bare_layer(layer: Any) -> Any:
    """The layer that adapters were put around."""
    while (inner := getattr(layer, "base_layer", None) or getattr(layer, "original_module", None)) is not None:
        layer = inner
    return layer


class _Float32Product(torch.autograd.Function):
    """`states @ weight.T` of numbers in half precision, summed and kept in float32; gradients are in theirs."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(states, weight)
        with torch.autocast(states.device.type, enabled=False):
            if states.is_cuda and torch.__version__ >= "2.8":
                return torch.mm(states, weight.T, out_dtype=torch.float32)
            return states.float() @ weight.float().T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        states, weight = ctx.saved_tensors
        rounded = gradients[0].to(weight.dtype)
        of_states, of_weight = ctx.needs_input_grad
        return rounded @ weight if of_states else None, rounded.T @ states if of_weight else None
