"""What a model directory says about its vectors, and what is said in its place: wording, token ids, limits."""

from __future__ import annotations

import json
import logging
from collections.abc import Set
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..errors import ConfigError, ModelError, SearchR3Error
from .prompts import EMBED_TOKEN, PROMPT_SETS, Mode, PromptSet, prompt_set, render_frames
from .templates import TEMPLATE_ARGUMENTS, Frames

logger = logging.getLogger(__name__)

SETTINGS_FILE = "search_r3.json"
QUERIES: Literal["queries"] = "queries"
"""The folder of a model directory that holds what encodes queries, where other weights encode documents."""
_PUBLISHED_ID, _PUBLISHED_CLASS = "ytgui/Search-R3.0-Small", "HFQwen2LM"


class EmbeddingSettings(BaseModel):
    """What a model directory says about its vectors, in `search_r3.json` next to the weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    embed_token: str = Field(EMBED_TOKEN, description="The token whose hidden state is the search embedding.")
    prompts: PromptSet = Field(PROMPT_SETS["search-r3"], description="The wording the model was trained with.")
    max_length: int = Field(1024, ge=8, description="Longest prompt in tokens; longer texts lose their end, counted.")
    max_new_tokens: int = Field(512, ge=1, description="Reasoning budget in tokens, the embed token included.")
    template_arguments: dict[str, Any] | None = Field(
        TEMPLATE_ARGUMENTS,
        description="What the chat template is rendered with; null: nothing, and nothing is mended (version 0.1).",
    )
    frames: Frames | None = Field(None, description="Token ids around texts; rendered when a model is loaded without.")
    # These are no part of what documents' vectors depend on, and are saved where they are not the default.
    latent_steps: int = Field(
        0, ge=0, exclude=True, description="Soft tokens of mode latent; 0: stage 1 has not trained it."
    )
    gate: Literal["policy"] | None = Field(
        None,
        exclude=True,
        description="What decides in mode auto. policy: the model's own first token, as stage 2 has taught it "
        "(grpo.at_once); null: the fitted gate of gate.json, where there is one.",
    )
    mode: Mode = Field("reason", exclude=True, description="What queries do where nobody says it.")
    trained: bool = Field(True, exclude=True, description="Whether a stage has trained the embed token.")
    queries: Literal["queries"] | None = Field(
        None, exclude=True, description="The folder of what encodes queries; null: all weights encode both."
    )


def read_settings(folder: Path) -> EmbeddingSettings | None:
    """The settings that are saved with a model; None where there are none.

    Raises:
        ModelError: they are not usable.
    """
    file = folder / SETTINGS_FILE
    if not file.is_file():
        return None
    return parse_settings(file.read_bytes(), str(file))


def parse_settings(text: str | bytes, place: str) -> EmbeddingSettings:
    """Settings as `settings_record` writes them.

    Args:
        text: JSON, in UTF-8.
        place: where they are saved, for messages.

    Raises:
        ModelError: they are not usable.
    """
    try:
        saved = json.loads(text)
        settings = EmbeddingSettings.model_validate(saved)
    except ValueError as error:  # of pydantic, JSON or UTF-8
        raise ModelError(f"{place}: not usable as model settings: {str(error).splitlines()[0]}") from error
    # Without them it was trained with what version 0.1 rendered.
    return settings if "template_arguments" in saved else settings.model_copy(update={"template_arguments": None})


def settings_record(settings: EmbeddingSettings, *, has_queries: bool) -> dict[str, Any]:
    """Settings as they are saved with a model, which may have a query side of its own."""
    more = ({} if settings.trained else {"trained": False}) | ({"queries": QUERIES} if has_queries else {})
    mode: dict[str, Any] = {} if settings.mode == "reason" else {"mode": settings.mode}
    mode |= {"latent_steps": settings.latent_steps} if settings.latent_steps else {}
    mode |= {"gate": settings.gate} if settings.gate else {}
    return settings.model_dump() | mode | more


def choose_settings(
    source: str | Path,
    config: Any,
    tokenizer: Any,
    *,
    saved: EmbeddingSettings | None = None,
    settings: EmbeddingSettings | None = None,
    prompts: str | PromptSet | None = None,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
) -> EmbeddingSettings:
    """The settings that a model is used with: saved or given ones, single ones of them replaced, within the context.

    Args:
        source: what the model is called.
        config: of the model.
        tokenizer: of the model.
        saved: the settings that were saved with it.
        settings: take the place of all that are saved.
        prompts: take the place of the saved prompts, by name or as they are.
        max_length: takes the place of the saved limit.
        max_new_tokens: takes the place of the saved budget.

    Raises:
        ConfigError: a limit that was given does not fit into the model's context; or unknown prompts.
    """
    limits = {"max_length": max_length, "max_new_tokens": max_new_tokens}
    changes: dict[str, Any] = {name: value for name, value in limits.items() if value is not None}
    for name, value in changes.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value!r}: expected a whole number of at least 1")
    given = set(changes) | (settings.model_fields_set if settings is not None else set())
    if settings is None:
        settings = saved or _assumed(source, config, tokenizer, prompts is not None)
    if prompts is not None and (chosen := prompt_set(prompts)) != settings.prompts:
        changes |= {"prompts": chosen, "frames": None, "template_arguments": TEMPLATE_ARGUMENTS}
    return _within_context(settings.model_copy(update=changes), given, config, source)


def with_frames(
    settings: EmbeddingSettings, tokenizer: Any, embed_token_id: int, eos_token_ids: Set[int], source: str | Path
) -> EmbeddingSettings:
    """The settings with the token ids that stand around texts: the saved ones, else what the template renders.

    Raises:
        ModelError: the saved ids are not of this tokenizer, or there are none and the template cannot be rendered.
    """
    saved = settings.frames
    if saved is not None:
        saved.check(tokenizer, embed_token_id)
    elif settings.template_arguments is None:
        logger.warning(
            "%s was saved without the token ids of its prompts; they are rendered from its chat template, as version "
            "0.1 did. Save it once more (save_pretrained) to keep them",
            source,
        )
    try:
        frames = render_frames(tokenizer, settings.prompts, embed_token_id, settings.template_arguments, eos_token_ids)
    except SearchR3Error:
        if saved is None:
            raise
        frames = None
    if saved is not None and frames != saved:
        logger.warning(
            "the chat template or the wording of %s has changed since its prompts were saved; the saved ones are used, "
            "since it was trained with them",
            source,
        )
    return settings.model_copy(update={"frames": saved or frames})


def _assumed(source: str | Path, config: Any, tokenizer: Any, prompts_given: bool) -> EmbeddingSettings:
    """Settings of a model that has none: the published checkpoint's, or the defaults."""
    if str(source) == _PUBLISHED_ID or _PUBLISHED_CLASS in (getattr(config, "architectures", None) or ()):
        return EmbeddingSettings().model_copy(update={"prompts": PROMPT_SETS["published"]})
    settings = EmbeddingSettings()
    if not prompts_given and settings.embed_token in tokenizer.get_vocab():
        logger.warning(
            "%s has the token %s but no %s: the prompts %r are assumed; if it was trained with others, give prompts=",
            *(source, settings.embed_token, SETTINGS_FILE, settings.prompts.name),
        )
    return settings


def _within_context(settings: EmbeddingSettings, given: Set[str], config: Any, source: str | Path) -> EmbeddingSettings:
    """The settings with limits that fit into the context together; those that nobody gave are cut."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    length, budget = settings.max_length, settings.max_new_tokens
    if context is None or length + budget <= context:
        return settings
    if "max_new_tokens" not in given:
        budget = min(budget, context - length if "max_length" in given else context // 2)
    if "max_length" not in given:
        length = min(length, context - budget)
    if budget < 1 or length < 1 or length + budget > context:
        raise ConfigError(
            f"max_length={settings.max_length} and max_new_tokens={settings.max_new_tokens} do not fit into the "
            f"context of {source}, {context} tokens for both together; lower them"
        )
    limits = {"max_length": length, "max_new_tokens": budget}
    if settings.model_fields_set.intersection(name for name in limits if limits[name] != getattr(settings, name)):
        logger.warning(
            "max_length=%d and max_new_tokens=%d, saved with %s, do not fit into its context of %d tokens together; "
            "used are %d and %d",
            *(settings.max_length, settings.max_new_tokens, source, context, length, budget),
        )
    return settings.model_copy(update=limits)
