"""Bytes of GPU memory that training takes, by part, as arithmetic on shapes.

What autograd keeps is counted operation by operation in transformers' Qwen2 block with SDPA (RMSNorm, projections,
rotation, attention, gated MLP); `tests/unit/test_memory.py` measures the same operations. Not counted: what CUDA, NCCL
and the allocator need for themselves.

Shapes: `n` tokens (padding included) in `b` sequences of `T`, `S` positions with logits; others as in `shape`. `c` are
bytes of a number in matrix products, `r` bytes of one in the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..config import LoRASettings, Recipe
from .shape import ModelShape

Strategy = Literal["single", "ddp", "fsdp2", "zero2", "zero3"]
FULL = 4
"""Bytes of a float32."""
HALF = 2
"""Bytes of a bfloat16."""
ZERO_BUCKET = 500_000_000
"""Numbers in a bucket of DeepSpeed's reductions (its default `reduce_bucket_size`)."""
ZERO_LIVE = 1_000_000_000
"""Weights that ZeRO-3 keeps whole at most (its default `stage3_max_live_parameters`)."""
LOGITS_AT_A_TIME = 2**25
"""Logits, positions times vocabulary, that a loss holds at once (`training/policy.py`)."""
PREFILL_TOKENS = 4096
"""Tokens of prompts that the decoder computes together, and of another sampler's replies that are read so."""
LOOK_EVERY = 8
"""Of the decoder on a GPU: tokens between two looks, which a reply may be computed beyond its end."""
LOGIT_ROWS = 256
"""Positions of such replies whose logits are held at once (`training/rl/sampler.py`)."""


@dataclass(frozen=True)
class Precision:
    """In which bytes a step computes."""

    weights: int  # of a base weight as it is stored
    trainable: int  # of a weight that learns, and of each of its moments in AdamW
    compute: int  # `c`
    residual: int  # `r`
    casts: bool  # whether every linear layer casts its own input and weight (autocast over float32 weights)
    adapters: int  # of an adapter's weight in the forward pass
    copies: bool  # whether every adapter casts its own input

    @classmethod
    def of(cls, recipe: Recipe, strategy: Strategy) -> Precision:
        """What the recipe's `dtype` and `mixed_precision` mean under a strategy.

        One process and DDP run autocast. FSDP2 and DeepSpeed compute with bfloat16 weights instead, and keep float32
        ones of what learns; peft keeps its adapters in float32.
        """
        storage, has_adapters = FULL if recipe.dtype == "float32" else HALF, recipe.lora.rank > 0
        if recipe.mixed_precision == "no":
            return cls(
                storage, FULL if has_adapters else storage, storage, storage, False, FULL, copies=storage != FULL
            )
        if strategy in ("single", "ddp"):
            trainable = FULL if has_adapters else storage
            return cls(storage, trainable, HALF, storage, storage == FULL, HALF, copies=True)
        return cls(storage if has_adapters else FULL, FULL, HALF, HALF, False, HALF, copies=False)


@dataclass(frozen=True)
class Pass:
    """One forward pass with gradients: `b` sequences, padded to `T` tokens."""

    sequences: int  # `b`
    length: int  # `T`
    with_mask: bool = False  # whether attention takes a mask, and keys and values by query head; training gives none

    @property
    def tokens(self) -> int:
        """`n`."""
        return self.sequences * self.length


def block_activations(shape: ModelShape, size: Pass, precision: Precision, lora: LoRASettings) -> int:
    """Bytes that one block keeps for its backward pass.

    An RMSNorm keeps its input in float32, the inverse root and, where its weight learns, the normalised values. SDPA
    keeps queries, keys, values, its output and the log of the sums; with a mask, keys and values repeated for all query
    heads and the mask in its own type, `b x T x T`. The MLP keeps the gate, SiLU of the gate and the other branch.
    What the linear layers keep is counted by `_linear_inputs`.
    """
    c, learns, hidden = precision.compute, lora.rank == 0, shape.hidden
    # A single head of keys is not copied for the others but read again.
    grouped = shape.query_width if size.with_mask and shape.key_heads > 1 else shape.key_width
    norms = 2 * (FULL * hidden + FULL + (precision.residual * hidden if learns else 0))
    if shape.head_norms:
        width = shape.query_width + shape.key_width
        norms += FULL * width + FULL * (shape.heads + shape.key_heads) + (c * width if learns else 0)
    attention = 2 * c * (shape.query_width + grouped) + FULL * shape.heads + (c * size.length if size.with_mask else 0)
    return size.tokens * (norms + attention + 3 * c * shape.intermediate + _linear_inputs(shape, precision, lora))


def _linear_inputs(shape: ModelShape, precision: Precision, lora: LoRASettings) -> int:
    """Bytes per token of inputs that linear layers keep beside what others keep anyhow.

    Layers share an input unless each casts it. The output layer of the attention shares SDPA's output. A frozen layer
    keeps no input; its adapter keeps one, and the `rank` numbers between its two matrices.
    """
    groups = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",))
    sizes, c = {name: inputs for name, (inputs, _) in shape.linear.items()}, precision.compute
    if lora.rank == 0:
        return sum(c * sizes[group[0]] * (len(group) if precision.casts else 1) for group in groups)
    inner = precision.adapters * lora.rank * len(lora.target_modules)
    if precision.copies:
        return inner + sum(precision.adapters * sizes[name] for name in lora.target_modules)
    return inner + sum(c * sizes[group[0]] for group in groups if set(group) & set(lora.target_modules))


def kept_activations(
    shape: ModelShape, size: Pass, precision: Precision, lora: LoRASettings, checkpointing: bool
) -> int:
    """Bytes alive when the forward pass through all blocks and the final norm has ended, logits apart.

    With checkpointing a block keeps its input alone. Cosines and sines, ids, positions and masks are shared by all
    blocks.
    """
    r = precision.residual
    block = r * size.tokens * shape.hidden if checkpointing else block_activations(shape, size, precision, lora)
    final = FULL * shape.hidden + FULL + (r * shape.hidden if lora.rank == 0 else 0)
    output = r * shape.hidden
    shared = 2 * r * shape.head_size + 3 * 8 + (size.length if size.with_mask else 0)
    return shape.layers * block + size.tokens * (final + output + shared)


def cast_weights(shape: ModelShape, precision: Precision, lora: LoRASettings, checkpointing: bool) -> int:
    """Bytes of the bfloat16 copies that autocast makes of the weights of linear layers.

    Each is held until the forward pass ends and, where its layer is not computed again, until its backward pass.
    Frozen weights are cast anew at each use.
    """
    if not precision.casts or (lora.rank and checkpointing):
        return 0
    return precision.compute * (shape.layers * shape.linear_weights + shape.table)


def backward_work(shape: ModelShape, size: Pass, precision: Precision, lora: LoRASettings, checkpointing: bool) -> int:
    """Bytes that the backward pass through one block adds to what was kept.

    Of the MLP's three wide gradients two take the place of values that are freed; the residual stream has two, and one
    more in float32 where bfloat16 is computed with. An adapter adds a gradient of its input, and its copy of the
    widest. With checkpointing the block's own activations are computed again first.
    """
    per_token = precision.compute * shape.intermediate + 2 * FULL * shape.hidden
    per_token += FULL * shape.hidden * ((precision.compute == HALF) + (lora.rank > 0))
    per_token += precision.adapters * shape.intermediate if lora.rank and precision.copies else 0
    work = size.tokens * per_token
    return work + (block_activations(shape, size, precision, lora) if checkpointing else 0)


def logits_memory(vocabulary: int, replies: int, prompts: int) -> int:
    """Bytes of stage 1's logits and what the losses on them make, at their peak; all in float32.

    Log-probabilities of `replies` tokens keep one number per position and vocabulary row, and have three in the
    backward pass. The KL on `prompts` positions: both models' logits and log-probabilities, the base's probabilities,
    the difference and the product. What is more than a chunk is computed a chunk at a time, and again in the backward
    pass, and keeps nothing.
    """
    kept = replies if replies <= chunk_positions(vocabulary) else 0
    own, of_kl = (min(positions, chunk_positions(vocabulary)) for positions in (replies, prompts))
    return FULL * vocabulary * max(3 * own, kept + 7 * of_kl)


def soft_token_memory(shape: ModelShape, rows: int, steps: int, says_words: bool, precision: Precision) -> int:
    """Bytes that `steps` soft tokens of `rows` queries keep until the pass before them has its gradients.

    Each keeps its probabilities in float32, in bfloat16 too where that is computed with, and log-probabilities where it
    has words to say. Where the table is cast, each step has a copy of its own.
    """
    numbers = FULL * (1 + says_words) + (HALF if precision.compute == HALF else 0)
    copy = precision.compute * shape.table if precision.casts else 0
    return steps * (rows * shape.vocabulary * numbers + copy)


def chunk_positions(vocabulary: int) -> int:
    """Positions whose logits are held at once."""
    return max(1, LOGITS_AT_A_TIME // vocabulary)


def rollout_logits_memory(vocabulary: int, positions: int, reference: bool) -> int:
    """Bytes of stage 2's logits at their peak, in float32, as in stage 1.

    With a reference its logits, those divided by the temperature and its log-probabilities stand beside the policy's.
    """
    return FULL * vocabulary * min(positions, chunk_positions(vocabulary)) * (4 if reference else 3)


def cache_memory(shape: ModelShape, slots: int, prompt: int, new_tokens: int, bytes_each: int) -> int:
    """Bytes of the decoder's keys and values on a GPU, where the room for whole budgets is reserved at once."""
    return slots * 2 * shape.layers * shape.key_width * bytes_each * (prompt + new_tokens + LOOK_EVERY)


def sampling_memory(shape: ModelShape, slots: int, bytes_each: int) -> int:
    """Bytes of choosing a token for every slot: logits, in float32, scaled, exponentiated, padded; and of a prefill."""
    logits = slots * shape.vocabulary * (bytes_each + 4 * FULL)
    return max(logits, PREFILL_TOKENS * (4 * shape.layers * shape.key_width + 2 * shape.intermediate) * bytes_each)


def encoding_memory(shape: ModelShape, tokens: int, bytes_each: int) -> int:
    """Bytes of encoding documents without gradients: residual stream, its norm, two wide values of the MLP."""
    return tokens * bytes_each * 2 * (shape.hidden + shape.intermediate)
