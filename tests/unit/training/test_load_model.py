"""What a stage starts from: the prompts of its model, the limits of its recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from search_r3.config import Recipe
from search_r3.errors import ConfigError
from search_r3.model.loading import load_backbone
from search_r3.training.engine import load_model

LIMITS = {"max_length": 90, "max_new_tokens": 7}


@pytest.fixture
def trained(tmp_path: Path, tiny_path: Path) -> Path:
    backbone = load_backbone(tiny_path, prompts="published")
    backbone.settings = backbone.settings.model_copy(update={"trained": True})
    backbone.save(tmp_path / "trained")
    return tmp_path / "trained"


def test_a_stage_takes_the_prompts_of_its_model_and_the_limits_of_its_recipe(trained: Path) -> None:
    saved = load_backbone(trained).settings
    for prompts in (None, "published"):
        assert load_model(Recipe(prompts=prompts, **LIMITS), trained).backbone.settings == saved.model_copy(
            update=LIMITS
        )


def test_other_prompts_than_the_models_are_refused(trained: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompts=search-r3, but .*trained was trained with the prompts 'published'"):
        load_model(Recipe(prompts="search-r3", **LIMITS), trained)


def test_a_base_takes_those_of_the_recipe(tmp_path: Path, tiny_path: Path) -> None:
    load_backbone(tiny_path).save(tmp_path / "saved")
    for base in (tiny_path, tmp_path / "saved"):
        for prompts, name in ((None, "search-r3"), ("published", "published")):
            assert load_model(Recipe(prompts=prompts, **LIMITS), base).backbone.settings.prompts.name == name


def test_a_reply_has_room_for_its_end(tiny_path: Path) -> None:
    load_model(Recipe(max_length=200, max_new_tokens=55), tiny_path)
    with pytest.raises(ConfigError, match=r"max_length=200, max_new_tokens=56 and the end of the turn .* 256 tokens"):
        load_model(Recipe(max_length=200, max_new_tokens=56), tiny_path)
