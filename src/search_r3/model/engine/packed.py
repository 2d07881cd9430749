"""Weights of 16 bits under float32 arithmetic, for CPUs.

To decode one sequence is to read all weights once per token, so half the bytes is half the time. torch's own products
in bfloat16 and float16 lose that again, with one row or with many (docs/laptop.md). FBGEMM, which torch has in it on
x86, reads float16 and computes in float32, so that nothing is rounded but the weights.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .forward import is_drivable

# Packing takes a float32 copy; the output layer's would be larger than all else, so it is packed in pieces.
_PIECE_ROWS = 32768


class PackedLinear(torch.nn.Module):
    """A linear layer with float16 weights, `out x in`, and with inputs, sums and outputs in float32; it cannot learn.

    Args:
        layer: what it stands for.
        is_tied: whether its weights are the token table's, and are saved as those.
    """

    def __init__(self, layer: torch.nn.Linear, is_tied: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.is_tied = layer.in_features, layer.out_features, is_tied
        self.has_bias = layer.bias is not None
        weights = torch.split(layer.weight.detach(), _PIECE_ROWS)
        biases = torch.split(layer.bias.detach().float(), _PIECE_ROWS) if self.has_bias else [None] * len(weights)
        self.pieces = [_prepack(weight, bias) for weight, bias in zip(weights, biases, strict=True)]

    def forward(self, values: Tensor) -> Tensor:
        """`... x in` to `... x out`, float32."""
        parts = [torch.ops.quantized.linear_dynamic_fp16(values, piece) for piece in self.pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.is_tied:
            return
        weights, biases = zip(*map(torch.ops.quantized.linear_unpack_fp16, self.pieces), strict=True)
        destination[f"{prefix}weight"] = torch.cat(weights).half()
        if self.has_bias:
            destination[f"{prefix}bias"] = torch.cat(biases)


class HalfEmbedding(torch.nn.Embedding):
    """A token table in float16 that gives rows in float32."""

    def forward(self, input: Tensor) -> Tensor:
        """Ids to rows, `... x D`."""
        return super().forward(input).float()


def _prepack(weight: Tensor, bias: Tensor | None) -> Any:
    return torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)


@cache
def can_pack() -> bool:
    """Whether this machine's torch has such products."""
    try:
        torch.ops.quantized.linear_dynamic_fp16(torch.zeros(1, 1), _prepack(torch.zeros(1, 1), None))
    except RuntimeError:
        return False
    return True


@torch.no_grad()
def pack(model: Any) -> None:
    """Put packed layers into a causal LM in float16 on a CPU; one that cannot have them stays as it is.

    It can where its layers are driven one by one, and where `can_pack`.
    """
    if not is_drivable(model) or not can_pack():
        return
    table = model.get_input_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is torch.nn.Linear:
                setattr(parent, name, PackedLinear(layer, layer.weight is table.weight))
    rows, columns = table.weight.shape
    half = HalfEmbedding(rows, columns, padding_idx=table.padding_idx, _weight=table.weight.detach())
    model.set_input_embeddings(half)
    for parameter in model.parameters():  # norms
        parameter.requires_grad_(False)
        if parameter is not half.weight:
            parameter.data = parameter.data.float()
    model.is_packed = True
    with suppress(AttributeError, OSError, TypeError):  # glibc keeps what other threads, which loaded, had and freed
        ctypes.CDLL(None).malloc_trim(0)
