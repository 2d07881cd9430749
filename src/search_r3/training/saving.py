"""What a stage leaves behind: a model directory that transformers loads, and adapters as peft writes them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..config import Recipe
from ..model.adapters import merge_adapters, save_adapters
from ..model.backbone import Backbone
from ..model.encoder import SearchR3
from .engine import Engine


def save_trained(engine: Engine, model: SearchR3, recipe: Recipe, folder: Path, adapter: Path) -> None:
    """Write the trained model, gathered from all processes, by the first of them.

    With adapters these are written too, by themselves; the model in `folder` then holds them merged into its weights.

    Args:
        engine: holds the weights.
        model: the model as it was loaded, with its tokenizer and settings.
        recipe: says whether there are adapters.
        folder: the model directory.
        adapter: the directory of the adapters.
    """
    backbone = model.backbone
    backbone.settings = backbone.settings.model_copy(update={"trained": True})
    state = _state(engine, backbone)
    if engine.rank == 0:
        if recipe.lora.rank:
            save_adapters(backbone, state, adapter)
            merge_adapters(backbone, adapter, recipe.dtype).save(folder)
        else:
            backbone.save(folder, state=state)


def _state(engine: Engine, backbone: Backbone) -> dict[str, Tensor]:
    """The weights by the names that transformers (or peft) gives them; whole in the first process."""
    weights = engine.accelerator.get_state_dict(engine.policy) or {}  # ZeRO-3 gives the other processes None
    state: dict[str, Tensor] = {name.removeprefix("model."): value for name, value in weights.items()}
    if backbone.causal_lm.config.get_text_config().tie_word_embeddings:
        # Shards of tied tables are gathered one by one.
        ties: dict[str, str] = backbone.causal_lm._tied_weights_keys
        state |= {name: state[source] for name, source in ties.items() if source in state}
    return state
