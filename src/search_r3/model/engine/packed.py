"""Weights of 16 bits under float32 arithmetic, for CPUs.

To decode one sequence is to read all weights once per token, so half the bytes is half the time. torch's own products
in bfloat16 and float16 lose that again, with one row or with many (docs/laptop.md). FBGEMM, which torch has in it on
x86, reads float16 and computes in float32, so that nothing is rounded but the weights.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .forward import is_drivable

# Packing takes a float32 copy; the output layer's would be larger than all else, so it is packed in pieces.
_PIECE_ROWS = 32768
# Layers that take the same inputs. A product has a price of its own, which small models pay more often than they like.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class PackedWeights:
    """Weights of layers that take the same inputs, below each other, in float16: one product for all of them.

    Args:
        layers: as many as are computed together; all have a bias or none has.
    """

    def __init__(self, layers: Sequence[torch.nn.Linear]) -> None:
        self.has_bias = layers[0].bias is not None
        weights = torch.split(torch.cat([layer.weight.detach() for layer in layers]), _PIECE_ROWS)
        biases: Sequence[Tensor | None] = [None] * len(weights)
        if self.has_bias:
            biases = torch.split(torch.cat([layer.bias.detach().float() for layer in layers]), _PIECE_ROWS)
        self.pieces = [_prepack(weight, bias) for weight, bias in zip(weights, biases, strict=True)]

    def product(self, values: Tensor) -> Tensor:
        """`... x in` to `... x out` of all layers, float32."""
        parts = [torch.ops.quantized.linear_dynamic_fp16(values, piece) for piece in self.pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def unpacked(self) -> tuple[Tensor, Tensor | None]:
        """Weights in float16, `out x in`, and biases."""
        weights, biases = zip(*map(torch.ops.quantized.linear_unpack_fp16, self.pieces), strict=True)
        return torch.cat(weights).half(), torch.cat(biases) if self.has_bias else None


class PackedLinear(torch.nn.Module):
    """A linear layer with float16 weights and with inputs, sums and outputs in float32; it cannot learn.

    Args:
        layer: what it stands for.
        shared: weights that hold the layer's among others.
        start: the first of its rows there.
        is_tied: whether its weights are the token table's, and are saved as those.
    """

    def __init__(self, layer: torch.nn.Linear, shared: PackedWeights, start: int = 0, is_tied: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.is_tied = layer.in_features, layer.out_features, is_tied
        self.shared, self.rows = shared, slice(start, start + layer.out_features)

    def forward(self, values: Tensor) -> Tensor:
        """`... x in` to `... x out`, float32."""
        return self.shared.product(values)[..., self.rows]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.is_tied:
            return
        weight, bias = self.shared.unpacked()
        destination[f"{prefix}weight"] = weight[self.rows].clone()
        if bias is not None:
            destination[f"{prefix}bias"] = bias[self.rows].clone()


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


def suits_packing(model: Any) -> bool:
    """Whether a causal LM in float16 on a CPU can be packed: its layers are driven one by one, and torch is able."""
    return is_drivable(model) and can_pack()


@torch.no_grad()
def pack(model: Any) -> None:
    """Put packed layers into a causal LM in float16 on a CPU; one that cannot have them stays as it is."""
    if not suits_packing(model):
        return
    table = model.get_input_embeddings()
    for parent in list(model.modules()):
        layers = {name: layer for name, layer in parent.named_children() if type(layer) is torch.nn.Linear}
        together = [names for names in _TOGETHER if layers.keys() >= set(names)]
        for names in [*together, *((name,) for name in layers.keys() - set(chain(*together)))]:
            shared, start = PackedWeights([layers[name] for name in names]), 0
            for name in names:
                setattr(parent, name, PackedLinear(layers[name], shared, start, layers[name].weight is table.weight))
                start += layers[name].out_features
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
