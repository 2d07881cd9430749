"""What a query can do before it is embedded: the one list of modes, for models, commands, servers and clients."""

from __future__ import annotations

from typing import Literal, get_args

PlainMode = Literal["direct", "reason"]
"""The modes of every trained model: embed at once, or reason first."""
Mode = Literal[PlainMode, "latent", "auto"]
"""All modes. `latent`: soft tokens instead of a text. `auto`: the model's gate says for each query which of the plain
ones it takes.
"""
SearchMode = Literal[Mode, "bm25"]
"""How a store can be searched."""
PLAIN_MODES: tuple[PlainMode, ...] = get_args(PlainMode)
MODES: tuple[Mode, ...] = get_args(Mode)
