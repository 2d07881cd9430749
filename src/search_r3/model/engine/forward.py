"""Hidden states without gradients and without waste: the forward pass of encoding and decoding.

Training runs the model's own forward pass. Here nobody wants gradients, logits of a prompt, or any output of the last
layer but one per sequence, and the keys and values of a common beginning are known. So the layers are driven from
here, with an attention that is told where keys and values come from. Layers built as Llama's are (Llama, Mistral,
Qwen2, Qwen3) are driven one by one; any other architecture runs its own forward pass around the same attention.

Shapes: `B` sequences, `T` tokens, `P` tokens of a common beginning, `D` hidden size, `H` heads, `h` key-value heads,
`d` head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from ..backbone import Backbone, pad
from .attention import Attention, CausalAttention, Prefix, attending

LLAMA_LIKE = {"llama", "mistral", "qwen2", "qwen3"}
# Between these numbers of rows the CPU's matrix product of a small input with a weight is 2 to 4 times slower than the
# product of the weight with the transposed input (MKL, float32; benchmarks/queries.py shows the whole effect).
_FEW_ROWS = range(12, 49)


def prefill(
    model: Any, sequences: Sequence[Sequence[int]], prefix: Prefix | None = None, *, keep: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Compute sequences whole.

    Args:
        model: the causal LM.
        sequences: ids, without the prefix.
        prefix: what all of them begin with.
        keep: whether keys and values are wanted.

    Returns:
        The final norm's output at the last token of each sequence, `B x D`, and with `keep` the keys and values,
        `L x 2 x B x h x T x d`, whose places beyond a sequence's end mean nothing.
    """
    device = next(iter(model.parameters())).device
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(sequence) for sequence in sequences], batch_first=True)
    start = len(prefix.ids) if prefix is not None else 0
    positions = torch.arange(start, start + ids.shape[1]).expand(len(ids), -1)
    ids, positions, lengths = ids.to(device), positions.to(device), lengths.to(device)
    attention = CausalAttention(lengths, prefix, keep)
    hidden = last_hidden(model, ids, positions, lengths - 1, attention)
    return hidden, attention.values() if keep else None


@torch.no_grad()
def sequence_states(backbone: Backbone, sequences: Sequence[Sequence[int]]) -> Tensor:
    """The final norm's output at every token of some sequences, `B x T x D`; beyond a sequence's end it means nothing.

    Padding stands on the right, where no token of a model that looks back only sees it.
    """
    ids, mask = pad(sequences, backbone.tokenizer.pad_token_id, backbone.device)
    model = backbone.causal_lm
    if not is_drivable(model):
        return backbone.hidden_states(ids, None)
    positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    base = model.base_model
    return _drive(base, base.embed_tokens(ids), positions, None, CausalAttention(mask.sum(-1)))


def compute_prefix(model: Any, ids: Sequence[int]) -> Prefix:
    """Keys and values of a beginning, for `prefill`."""
    _, values = prefill(model, [ids], keep=True)
    assert values is not None
    return Prefix(tuple(ids), values[:, :, 0])


def length_batches(
    sequences: Sequence[Sequence[int]], batch_tokens: int, batch_size: int | None = None
) -> Iterator[list[int]]:
    """Places of sequences, of like length together, so many that with padding a batch has at most `batch_tokens`."""
    batch: list[int] = []
    for place in sorted(range(len(sequences)), key=lambda i: len(sequences[i])):
        if batch and ((len(batch) + 1) * len(sequences[place]) > batch_tokens or len(batch) == batch_size):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


@torch.no_grad()
def last_hidden(
    model: Any, ids: Tensor, positions: Tensor, last: Tensor, attention: Attention, inputs: Tensor | None = None
) -> Tensor:
    """The final norm's output at one position of each sequence.

    Args:
        model: the causal LM; its attention is `attention.OURS` unless it `is_drivable`.
        ids: `B x T`.
        positions: `B x T`, each token's position in its sequence.
        last: `B`, the column that is wanted.
        attention: where keys and values come from.
        inputs: `B x T x D`, what goes in instead of the rows of the ids; the caller's no more.

    Returns:
        `B x D`.
    """
    if is_drivable(model):
        base = model.base_model
        return _drive(base, base.embed_tokens(ids) if inputs is None else inputs, positions, last, attention)[:, 0]
    what = {"input_ids": ids} if inputs is None else {"inputs_embeds": inputs}
    with attending(attention):
        output = model.base_model(**what, attention_mask=None, position_ids=positions, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden[torch.arange(len(ids), device=ids.device), last]


def is_drivable(model: Any) -> bool:
    """Whether the layers of this causal LM are driven one by one."""
    return model.config.get_text_config().model_type in LLAMA_LIKE


def layer_windows(config: Any) -> list[int | None]:
    """By layer, the most keys that a query sees, its own the last of them; None sees all."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _drive(base: Any, hidden: Tensor, positions: Tensor, last: Tensor | None, attention: Attention) -> Tensor:
    """`B x 1 x D` at one position of each sequence, or `B x T x D` at all."""
    rotation = tuple(part.unsqueeze(2) for part in base.rotary_emb(hidden, positions))  # B x T x 1 x d
    final = len(base.layers) - 1
    windows = layer_windows(base.config)
    rows = torch.arange(len(hidden), device=hidden.device)

    def all_of(values: Tensor) -> Tensor:
        return values

    def picked(values: Tensor) -> Tensor:
        """Nobody reads the other positions of the last layer: they give keys and values and are dropped."""
        return values if values.shape[1] == 1 else values[rows, last].unsqueeze(1)

    for number, layer in enumerate(base.layers):
        block = layer.self_attn
        normed = _norm(layer.input_layernorm, hidden)
        wanted = picked if number == final and last is not None else all_of
        query, key, value = _heads(block, normed, rotation, wanted)
        hidden = wanted(hidden)
        attended = attention(number, query, key, value, block.scaling, windows[number])
        hidden = hidden.add_(_linear(block.o_proj, attended.transpose(1, 2).flatten(2)))
        mlp, normed = layer.mlp, _norm(layer.post_attention_layernorm, hidden)
        hidden = hidden.add_(_linear(mlp.down_proj, _gated(mlp, normed)))
    return _norm(base.norm, hidden)


def _norm(layer: Any, values: Tensor) -> Tensor:
    return F.rms_norm(values, values.shape[-1:], layer.weight, layer.variance_epsilon)


def _heads(
    block: Any, hidden: Tensor, rotation: tuple[Tensor, ...], wanted: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the wanted positions, keys and values by head, `B x heads x T x d`, turned to their positions."""
    shared = getattr(block.q_proj, "shared", None)
    if shared is None:
        key, value = (_split(block, _linear(layer, hidden)) for layer in (block.k_proj, block.v_proj))
        key = _turn(_normed(block, "k", key), rotation)
        query = _normed(block, "q", _split(block, _linear(block.q_proj, wanted(hidden))))
        query = _turn(query, tuple(map(wanted, rotation)))
    else:
        keys = block.k_proj.out_features // block.head_dim
        both, value = _split(block, shared.product(hidden)).tensor_split([-keys], dim=-2)
        if hasattr(block, "q_norm"):
            parts = both.tensor_split([-keys], dim=-2)
            both = torch.cat([_normed(block, name, part) for name, part in zip("qk", parts, strict=True)], dim=-2)
        query, key = _turn(both, rotation).tensor_split([-keys], dim=-2)
        query = wanted(query)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _split(block: Any, projected: Tensor) -> Tensor:
    """By head, `B x T x heads x d`."""
    return projected.view(*projected.shape[:-1], -1, block.head_dim)


def _normed(block: Any, name: str, heads: Tensor) -> Tensor:
    norm = getattr(block, f"{name}_norm", None)
    return heads if norm is None else _norm(norm, heads)


def _turn(heads: Tensor, rotation: tuple[Tensor, ...]) -> Tensor:
    cos, sin = rotation
    left, right = heads.chunk(2, dim=-1)
    half = sin[..., : left.shape[-1]]  # both halves turn by the same angles
    turned = heads * cos
    turned[..., : left.shape[-1]].addcmul_(right, half, value=-1)
    turned[..., left.shape[-1] :].addcmul_(left, half)
    return turned


def _gated(mlp: Any, hidden: Tensor) -> Tensor:
    shared = getattr(mlp.gate_proj, "shared", None)
    if shared is None:
        gate, up = _linear(mlp.gate_proj, hidden), _linear(mlp.up_proj, hidden)
    else:
        gate, up = shared.product(hidden).chunk(2, dim=-1)
    gated: Tensor = mlp.act_fn(gate)
    return gated.mul_(up)


def _linear(layer: Any, values: Tensor) -> Tensor:
    plain = type(layer) is torch.nn.Linear and values.device.type == "cpu" and values.dtype == torch.float32
    if not plain or (rows := values.shape[:-1].numel()) not in _FEW_ROWS:
        result: Tensor = layer(values)
        return result
    product: Tensor = (layer.weight @ values.reshape(rows, -1).T).T
    if layer.bias is not None:
        product = product + layer.bias
    return product.reshape(*values.shape[:-1], -1)
