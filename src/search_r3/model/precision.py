"""The names of precisions and devices, and what is taken where none is given."""

from __future__ import annotations

import torch

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
