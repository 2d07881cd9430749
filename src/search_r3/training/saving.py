"""What a stage leaves behind: a model directory that transformers loads, and adapters as peft writes them."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..config import Recipe
from ..files import atomic_directory
from ..model.adapters import drop_token_rows, merge_adapters, merged_queries, save_adapters
from ..model.backbone import Backbone
from ..model.encoder import SearchR3
from ..model.settings import QUERIES
from ..parallel import agree
from .engine import Engine


def save_trained(
    engine: Engine, model: SearchR3, recipe: Recipe, folder: Path, adapter: Path, frozen: bool = False
) -> None:
    """Write the trained model, gathered from all processes, by the first of them.

    With adapters these are written too, by themselves; the model in `folder` then holds them merged into its weights.
    With frozen documents `folder` holds the files that the stage began from, and beside them what encodes queries: the
    adapters, or whole weights.

    Args:
        engine: holds the weights.
        model: the model as it was loaded, with its tokenizer and settings.
        recipe: says whether there are adapters.
        folder: the model directory.
        adapter: the directory of the adapters.
        frozen: whether documents keep the weights that the stage began from.
    """
    backbone = model.backbone
    # Which mode is better was measured of the model before, and the gate was fitted to that one.
    backbone.settings, backbone.gate = backbone.settings.model_copy(update={"trained": True, "mode": "reason"}), None
    state = policy_state(engine, backbone)
    if engine.rank == 0:
        if frozen:
            _save_queries(backbone, state, folder)
        else:
            _save_whole(backbone, state, recipe, folder, adapter)


def save_policy(engine: Engine, backbone: Backbone, recipe: Recipe, folder: Path, dtype: str | None = None) -> None:
    """Write the model as it is in the middle of a stage, whole, adapters merged, for who computes with a copy of it.

    Args:
        engine: holds the weights.
        backbone: the model that is being trained.
        recipe: says whether there are adapters.
        folder: the model directory; where documents are frozen, of what encodes queries.
        dtype: storage type of the weights.

    Raises:
        RunError: it cannot be written; in every process.
    """
    state = policy_state(engine, backbone)

    def write() -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if backbone.documents is not None:  # loaded anew it would be the documents' model, with the adapters of before
            own = merged_queries(backbone)
            replace(own, documents=None).save(folder, dtype, state=state if own is backbone else None)
            return
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            _save_whole(backbone, state, recipe, folder, Path(scratch) / "adapter", dtype)

    agree(engine.communicator, folder, write if engine.rank == 0 else lambda: None)


def save_policy_adapters(engine: Engine, backbone: Backbone, folder: Path) -> None:
    """Write the adapters alone, without the embed token's row, which servers do not take; see `save_policy`."""
    state = policy_state(engine, backbone)

    def write() -> None:
        save_adapters(backbone, state, folder)
        drop_token_rows(folder)

    agree(engine.communicator, folder, write if engine.rank == 0 else lambda: None)


def _save_whole(
    backbone: Backbone,
    state: dict[str, Tensor],
    recipe: Recipe,
    folder: Path,
    adapter: Path,
    dtype: str | None = None,
) -> None:
    """A model directory, its adapters merged where it has any, which are then written too."""
    if recipe.lora.rank:
        save_adapters(backbone, state, adapter)
        merge_adapters(backbone, adapter, recipe.dtype).save(folder, dtype)
    else:
        backbone.save(folder, dtype, state=state)


def _save_queries(backbone: Backbone, state: dict[str, Tensor], folder: Path) -> None:
    assert backbone.files is not None
    with atomic_directory(folder) as out:
        backbone.files.copy_to(out)
        backbone.save_queries(out / QUERIES, state=state)
        backbone.save_settings(out, has_queries=True)


def policy_state(engine: Engine, backbone: Backbone) -> dict[str, Tensor]:
    """The weights by the names that transformers (or peft) gives them; whole in the first process."""
    weights = engine.accelerator.get_state_dict(engine.policy) or {}  # ZeRO-3 gives the other processes None
    state: dict[str, Tensor] = {name.removeprefix("model."): value for name, value in weights.items()}
    if backbone.causal_lm.config.get_text_config().tie_word_embeddings:
        # Shards of tied tables are gathered one by one.
        ties: dict[str, str] = backbone.causal_lm._tied_weights_keys
        state |= {name: state[source] for name, source in ties.items() if source in state}
    return state
