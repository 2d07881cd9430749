"""The shape of a causal LM and how many weights it has, read from its `config.json` without loading it.

Shapes: `V` vocabulary, `D` hidden size, `L` layers, `F` width of the MLP, `A` width of all query heads together, `K`
of all key heads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import LoRASettings
from ..errors import ConfigError, ModelError
from ..model.source import BUILTIN, CONFIG, SMOL, packaged_path

KNOWN_TYPES = ("llama", "mistral", "qwen2", "qwen3")
NORMS_PER_LAYER = 2


@dataclass(frozen=True)
class ModelShape:
    """A model whose layers are built as Llama's are."""

    vocabulary: int  # rows of the token table, spare ones included
    hidden: int  # `D`
    layers: int  # `L`
    heads: int  # heads of queries
    key_heads: int  # heads of keys, and of values
    head_size: int  # width of a head
    intermediate: int  # `F`
    tied: bool  # whether the output layer is the token table
    bias: bool = True  # whether queries, keys and values have biases (Qwen2)
    head_norms: bool = False  # whether queries and keys are normalised by head (Qwen3)

    @property
    def query_width(self) -> int:
        """`A`."""
        return self.heads * self.head_size

    @property
    def key_width(self) -> int:
        """`K`."""
        return self.key_heads * self.head_size

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the linear layers of one block, by name."""
        wide, query, key = self.intermediate, self.query_width, self.key_width
        return {
            "q_proj": (self.hidden, query),
            "k_proj": (self.hidden, key),
            "v_proj": (self.hidden, key),
            "o_proj": (query, self.hidden),
            "gate_proj": (self.hidden, wide),
            "up_proj": (self.hidden, wide),
            "down_proj": (wide, self.hidden),
        }

    @property
    def table(self) -> int:
        """Weights of the token table."""
        return self.vocabulary * self.hidden

    @property
    def linear_weights(self) -> int:
        """Weights of the linear layers of one block, without biases."""
        return sum(inputs * outputs for inputs, outputs in self.linear.values())

    @property
    def block(self) -> int:
        """Weights of one block."""
        parts = self.parameters()
        return (parts["attention"] + parts["mlp"] + parts["norms"] - self.hidden) // self.layers

    def parameters(self) -> dict[str, int]:
        """Weights by part; tied tables count once."""
        attention = self.linear_weights - 3 * self.hidden * self.intermediate
        if self.bias:
            attention += self.query_width + 2 * self.key_width
        norms = self.layers * NORMS_PER_LAYER * self.hidden + self.hidden
        if self.head_norms:
            norms += self.layers * 2 * self.head_size
        return {
            "embedding": self.table,
            "attention": self.layers * attention,
            "mlp": self.layers * 3 * self.hidden * self.intermediate,
            "norms": norms,
            "output": 0 if self.tied else self.table,
        }

    @property
    def total(self) -> int:
        """All weights."""
        return sum(self.parameters().values())

    def adapters(self, settings: LoRASettings) -> int:
        """Weights that learn with LoRA: `rank x (inputs + outputs)` per adapted layer (arXiv 2106.09685, section 4.1).

        And the embed token's row of each table.

        Raises:
            ConfigError: the model has no layers of these names.
        """
        if settings.rank == 0:
            return 0
        unknown = [name for name in settings.target_modules if name not in self.linear]
        if unknown:
            raise ConfigError(
                f"lora.target_modules names {unknown[0]!r}; the plan knows the layers {', '.join(self.linear)}"
            )
        per_block = sum(settings.rank * sum(self.linear[name]) for name in settings.target_modules)
        return self.layers * per_block + self.hidden * (1 if self.tied else 2)


SHAPES = {
    "Qwen/Qwen2.5-0.5B-Instruct": ModelShape(151_936, 896, 24, 14, 2, 64, 4_864, tied=True),
    "Qwen/Qwen2.5-1.5B-Instruct": ModelShape(151_936, 1_536, 28, 12, 2, 128, 8_960, tied=True),
    "Qwen/Qwen2.5-3B-Instruct": ModelShape(151_936, 2_048, 36, 16, 2, 128, 11_008, tied=True),
    "Qwen/Qwen2.5-7B-Instruct": ModelShape(152_064, 3_584, 28, 28, 4, 128, 18_944, tied=False),
    SMOL: ModelShape(49_152, 576, 30, 9, 3, 64, 1_536, tied=True, bias=False),
}
"""Shapes that are known without the hub (their `config.json` there)."""


def read_shape(base: str, config: Path | None = None) -> ModelShape:
    """The shape of a recipe's `base`.

    Args:
        base: `smol`, `builtin`, a model directory or a hub id.
        config: a `config.json` to read instead.

    Raises:
        ConfigError: there is no such file, or the hub does not answer.
        ModelError: an architecture that the plan does not know.
    """
    if config is None:
        if base in SHAPES:
            return SHAPES[base]
        config = _find(base)
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{config} is no readable config.json: {error}") from error
    return shape_of(values, str(config))


def shape_of(values: Mapping[str, Any], where: str) -> ModelShape:
    """The shape that the content of a `config.json` describes; `where` is named in errors.

    Raises:
        ModelError: an architecture that the plan does not know, or a number is missing.
    """
    values = values.get("text_config", values)
    kind = values.get("model_type")
    if kind not in KNOWN_TYPES:
        raise ModelError(f"{where}: model_type is {kind!r}; the plan knows {', '.join(KNOWN_TYPES)}")
    try:
        heads, hidden = int(values["num_attention_heads"]), int(values["hidden_size"])
        return ModelShape(
            vocabulary=int(values["vocab_size"]),
            hidden=hidden,
            layers=int(values["num_hidden_layers"]),
            heads=heads,
            key_heads=int(values.get("num_key_value_heads") or heads),
            head_size=int(values.get("head_dim") or hidden // heads),
            intermediate=int(values["intermediate_size"]),
            tied=bool(values.get("tie_word_embeddings", False)),
            bias=kind == "qwen2",
            head_norms=kind == "qwen3",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{where}: no usable {error}; the plan needs the sizes of a causal LM") from error


def _find(base: str) -> Path:
    """The `config.json` of a model directory or of the hub."""
    if base == BUILTIN or Path(base).is_dir():
        return (packaged_path(BUILTIN) if base == BUILTIN else Path(base)) / CONFIG
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(base, "config.json"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"no model directory {base}, and its config.json cannot be read from the hub; give --config FILE "
            f"(known without it: {', '.join(SHAPES)})"
        ) from error
