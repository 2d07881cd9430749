"""`mode="latent"`: soft tokens in the place of a text; how many, and whether a model was trained for it."""

from __future__ import annotations

from ...errors import UntrainedError
from ...modes import PLAIN_MODES, Mode
from ..backbone import Backbone


def latent_budget(backbone: Backbone, max_new_tokens: int | None = None) -> int:
    """Soft tokens and the embed token behind them, as a budget of the decoder; a smaller one holds fewer.

    Raises:
        UntrainedError: stage 1 has not trained the mode, or llama.cpp computes the model.
    """
    steps = backbone.settings.latent_steps
    if not steps:
        raise UntrainedError(
            f"{backbone.source} was not trained with soft tokens, which mode='latent' reads instead of a text: train "
            "stage 1 with sft.latent_steps=3, or take another mode"
        )
    if backbone.engine == "llama.cpp":
        raise UntrainedError(
            f"{backbone.source} is computed in llama.cpp, which is given tokens here and no soft ones; load it without "
            "backend, or take another mode"
        )
    return steps + 1 if max_new_tokens is None else max(1, min(steps + 1, max_new_tokens))


def trained_modes(backbone: Backbone) -> list[Mode]:
    """The modes that stage 1 has trained and that can be computed here: the plain ones, and latent where it can."""
    latent = backbone.settings.latent_steps and backbone.engine != "llama.cpp"
    return [*PLAIN_MODES, *(("latent",) if latent else ())]
