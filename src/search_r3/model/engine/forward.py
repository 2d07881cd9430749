"""Hidden states without gradients and without waste: the forward pass of encoding and decoding.

Training runs the model's own forward pass. Here nobody wants gradients, logits of a prompt, or any output of the last
layer but one per sequence, and the keys and values of a common beginning are known. So the layers are driven from
here, with an attention that is told where keys and values come from. Layers built as Llama's are (Llama, Mistral,
Qwen2, Qwen3) are driven one by one; any other architecture runs its own forward pass around the same attention.

Shapes: `B` sequences, `T` tokens, `P` tokens of a common beginning, `D` hidden size, `H` heads, `h` key-value heads,
`d` head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from ...errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

LLAMA_LIKE = {"llama", "mistral", "qwen2", "qwen3"}
_OURS = "search_r3"
# Between these numbers of rows the CPU's matrix product of a small input with a weight is 2 to 4 times slower than the
# product of the weight with the transposed input (MKL, float32; benchmarks/queries.py shows the whole effect).
_FEW_ROWS = range(12, 49)


class Attention(Protocol):
    """Where queries meet keys: `B x H x T x d` and twice `B x h x T x d` in, `B x H x T x d` out.

    `keys` is the most keys that a query sees.
    """

    keys: int

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend in one layer; `query` holds the last positions alone where the caller wants no others."""
        ...


@dataclass(frozen=True, eq=False)
class Prefix:
    """Tokens that several sequences begin with, and their keys and values, `L x 2 x h x P x d`."""

    ids: tuple[int, ...]
    values: Tensor


class CausalAttention:
    """Attention within right-padded sequences that may share a beginning.

    A padded position is the key of no real one, since it comes later; so no mask is needed, and the fast kernels are
    taken.

    Args:
        lengths: `B`, tokens of each sequence without the shared beginning.
        prefix: the shared beginning.
        keep: whether `values` collects the keys and values of all layers.
    """

    def __init__(self, lengths: Tensor, prefix: Prefix | None = None, keep: bool = False) -> None:
        self.lengths, self.prefix, self.keep = lengths, prefix, keep
        self.values: list[Tensor] = []  # per layer 2 x B x h x T x d
        self.shared = len(prefix.ids) if prefix is not None else 0
        self.keys = self.shared + int(lengths.max())

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `Attention`."""
        if self.keep:
            self.values.append(torch.stack([key, value]))
        if self.prefix is not None:
            before = self.prefix.values[layer].unsqueeze(1).expand(-1, len(key), -1, -1, -1)
            key, value = torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)
        if query.shape[2] + self.shared < key.shape[2]:
            places = torch.arange(key.shape[2], device=key.device)
            return _one_query(query, key, value, places < (self.lengths + self.shared)[:, None], scale)
        # The causal kernels want as many queries as keys; those of the shared beginning are made up and thrown away.
        query = F.pad(query, (0, 0, self.shared, 0))
        grouped = query.shape[1] != key.shape[1]
        if grouped and query.is_cuda and query.dtype == torch.float32:
            # CUDA's fast kernels take no grouped heads in float32; the slow one is slower than this (docs/results.md).
            key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for part in (key, value))
            grouped = False
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
        return attended[:, :, self.shared :]


def _one_query(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """One position per sequence: `B x H x 1 x d`. Heads that share keys stand in the place of positions."""
    batch, heads, _, size = query.shape
    grouped = query.view(batch, key.shape[1], heads // key.shape[1], size)
    mask = None if visible is None else visible[:, None, None].expand(-1, -1, grouped.shape[2], -1)
    attended = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
    return attended.reshape(batch, heads, 1, size)


class SlotCache:
    """Keys and values of sequences that are being decoded; each has a slot, and slots are reused."""

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        parameter = next(iter(model.parameters()))
        shape = (config.num_hidden_layers, 2, 0, heads, 0, size)
        self.values = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)

    def reserve(self, slots: int, tokens: int) -> None:
        """Make room for that many sequences of that many tokens."""
        lack = max(0, slots - self.values.shape[2]), max(0, tokens - self.values.shape[4])
        if any(lack):
            # Every growth is a copy, so the room grows by a half at least. It is filled with zeros, since a masked NaN
            # would still spoil a sum.
            longer = max(lack[1], self.values.shape[4] // 2) if lack[1] else 0
            self.values = F.pad(self.values, (0, 0, 0, longer, 0, 0, 0, lack[0]))

    def write(self, slots: Sequence[int], start: int, values: Tensor) -> None:
        """Store `L x 2 x h x T x d` from position `start` on in each of the slots."""
        places = torch.tensor(slots, device=values.device)
        self.values[:, :, places, :, start : start + values.shape[3]] = values.unsqueeze(2)

    def move(self, source: int, target: int) -> None:
        """Let `target` hold what `source` holds."""
        self.values[:, :, target] = self.values[:, :, source]


class SlotAttention:
    """Attention of one new token per slot, for the first `B` slots of a cache.

    Args:
        cache: it receives the new keys and values.
        lengths: tokens already in each slot.
    """

    def __init__(self, cache: SlotCache, lengths: Sequence[int]) -> None:
        device = cache.values.device
        self.cache, self.keys = cache, max(lengths) + 1
        self.lengths = torch.tensor(lengths, device=device)
        self.rows = torch.arange(len(lengths), device=device)
        self.visible = None
        if min(lengths) + 1 < self.keys:
            self.visible = torch.arange(self.keys, device=device) <= self.lengths[:, None]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `Attention`; `T` is 1."""
        keys, values = self.cache.values[layer, :, : len(query)]
        keys[self.rows, :, self.lengths] = key[:, :, 0]
        values[self.rows, :, self.lengths] = value[:, :, 0]
        return _one_query(query, keys[:, :, : self.keys], values[:, :, : self.keys], self.visible, scale)


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
    return hidden, torch.stack(attention.values) if keep else None


def compute_prefix(model: Any, ids: Sequence[int]) -> Prefix:
    """Keys and values of a beginning, for `prefill`."""
    _, values = prefill(model, [ids], keep=True)
    assert values is not None
    return Prefix(tuple(ids), values[:, :, 0])


def length_batches(sequences: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Places of sequences, of like length together, so many that with padding a batch has at most `batch_tokens`."""
    batch: list[int] = []
    for place in sorted(range(len(sequences)), key=lambda i: len(sequences[i])):
        if batch and (len(batch) + 1) * len(sequences[place]) > batch_tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


@torch.no_grad()
def last_hidden(model: Any, ids: Tensor, positions: Tensor, last: Tensor, attention: Attention) -> Tensor:
    """The final norm's output at one position of each sequence.

    Args:
        model: the causal LM.
        ids: `B x T`.
        positions: `B x T`, each token's position in its sequence.
        last: `B`, the column that is wanted.
        attention: where keys and values come from.

    Returns:
        `B x D`.
    """
    if is_drivable(model):
        return _drive(model.base_model, ids, positions, last, attention)
    with _own_attention(model):
        output = model.base_model(
            input_ids=ids, attention_mask=None, position_ids=positions, use_cache=False, search_r3_attention=attention
        )
    hidden: Tensor = output.last_hidden_state
    return hidden[torch.arange(len(ids), device=ids.device), last]


def is_drivable(model: Any) -> bool:
    """Whether the layers of this causal LM are driven one by one."""
    config = model.config.get_text_config()
    return config.model_type in LLAMA_LIKE and not _has_window(config)


def _has_window(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    return "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None) is not None


def _drive(base: Any, ids: Tensor, positions: Tensor, last: Tensor, attention: Attention) -> Tensor:
    hidden = base.embed_tokens(ids)
    rotation = tuple(part.unsqueeze(2) for part in base.rotary_emb(hidden, positions))  # B x T x 1 x d
    rows = torch.arange(len(ids), device=ids.device)
    final = len(base.layers) - 1
    for number, layer in enumerate(base.layers):
        block = layer.self_attn
        normed = _norm(layer.input_layernorm, hidden)
        key = _heads(block, "k", normed, rotation)
        value = _heads(block, "v", normed, None)
        if number == final:
            # Nobody reads the other positions of the last layer: they give keys and values and are dropped.
            normed, hidden = normed[rows, last].unsqueeze(1), hidden[rows, last].unsqueeze(1)
            rotation = tuple(part[rows, last].unsqueeze(1) for part in rotation)
        query = _heads(block, "q", normed, rotation)
        attended = attention(number, query, key, value, block.scaling)
        hidden = hidden.add_(_linear(block.o_proj, attended.transpose(1, 2).flatten(2)))
        mlp, normed = layer.mlp, _norm(layer.post_attention_layernorm, hidden)
        gated = mlp.act_fn(_linear(mlp.gate_proj, normed)).mul_(_linear(mlp.up_proj, normed))
        hidden = hidden.add_(_linear(mlp.down_proj, gated))
    return _norm(base.norm, hidden)[:, 0]


def _norm(layer: Any, values: Tensor) -> Tensor:
    return F.rms_norm(values, values.shape[-1:], layer.weight, layer.variance_epsilon)


def _heads(block: Any, name: str, hidden: Tensor, rotation: tuple[Tensor, ...] | None) -> Tensor:
    """Queries, keys or values by head, `B x heads x T x d`, turned to their positions."""
    projected = _linear(getattr(block, f"{name}_proj"), hidden)
    projected = projected.view(*projected.shape[:-1], -1, block.head_dim)
    norm = getattr(block, f"{name}_norm", None)
    if norm is not None:
        projected = _norm(norm, projected)
    if rotation is not None:
        cos, sin = rotation
        left, right = projected.chunk(2, dim=-1)
        half = sin[..., : left.shape[-1]]  # both halves turn by the same angles
        projected = projected * cos
        projected[..., : left.shape[-1]].addcmul_(right, half, value=-1)
        projected[..., left.shape[-1] :].addcmul_(left, half)
    return projected.transpose(1, 2)


def _linear(layer: Any, values: Tensor) -> Tensor:
    rows = values.shape[:-1].numel()
    plain = type(layer) is torch.nn.Linear and values.device.type == "cpu" and values.dtype == torch.float32
    if not plain or rows not in _FEW_ROWS:
        result: Tensor = layer(values)
        return result
    product: Tensor = (layer.weight @ values.reshape(rows, -1).T).T
    if layer.bias is not None:
        product = product + layer.bias
    return product.reshape(*values.shape[:-1], -1)


@contextmanager
def _own_attention(model: Any) -> Iterator[None]:
    """Let the model's layers call the attention that its forward pass is given."""
    from transformers import AttentionInterface

    AttentionInterface.register(_OURS, _call_attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(_OURS)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _call_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    attend: Attention = options["search_r3_attention"]
    unknown = [name for name in ("softcap", "s_aux") if options.get(name) is not None]
    window = options.get("sliding_window")
    if unknown or (window is not None and window < attend.keys):
        what = unknown[0] if unknown else f"a sliding window of {window} tokens, and a sequence has {attend.keys}"
        raise ModelError(
            f"the attention of {type(module).__name__} uses {what}, which encoding here does not know; choose a model "
            "with full attention, or lower max_length and max_new_tokens"
        )
    return attend(module.layer_idx, query, key, value, options["scaling"]).transpose(1, 2), None
