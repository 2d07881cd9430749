from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from search_r3.config import Recipe, dump_recipe, load_recipe
from search_r3.errors import ConfigError

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    assert load_recipe(path).name == path.stem


def test_overrides_reach_nested_settings_with_their_types() -> None:
    recipe = load_recipe(None, ["grpo.steps=7", "sft.learning_rate=1e-3", "grpo.reward.length=0.5", "name=x"])
    assert (recipe.grpo.steps, recipe.sft.learning_rate, recipe.grpo.reward.length, recipe.name) == (7, 1e-3, 0.5, "x")
    assert load_recipe(None, ["sft.splits={facts: 1.0}"]).sft.splits == {"facts": 1.0}


def test_the_dumped_settings_load_as_they_were(tmp_path: Path) -> None:
    recipe = load_recipe(None, ["seed=3", "grpo.refresh.policy=never"])
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.stps=7", "unknown setting 'grpo.stps'; did you mean 'steps'?"),
        ("zzz=1", "unknown setting 'zzz'; known here: name, run_dir"),
        ("grpo.steps=0", "grpo.steps = 0: Input should be greater than or equal to 1"),
        ("grpo.refresh.policy=sometimes", "grpo.refresh.policy = 'sometimes'"),
        ("grpo.refresh=never", "refresh is a section; write refresh.policy=never"),
        ("grpo.refresh={policy: full, max_documents: 5}", "a budget goes with shortlist or selective, not with policy"),
        ("grpo.refresh={policy: drift, index: approximate}", "set index=exact, or correct no drift"),
        ("grpo.refresh={policy: never, correct_drift: true}", "correct_drift=true goes with shortlist or selective"),
        ("dtype=bfloat16", "recipe: Value error, dtype=bfloat16 with lora.rank=0 would train weights in bfloat16"),
        ("dtype=bfloat16", "set dtype=float32 and mixed_precision=bf16 (products in bfloat16), or lora.rank=16"),
        ("grpo.steps", "expected key=value"),
        ("name.first=x", "'name' is a single value, not a section"),
        ("sft.steps=[1", "cannot read the value"),
        ("sft.random_negatives=0", None),
    ],
)
def test_a_bad_override_is_one_clear_error(tmp_path: Path, override: str, message: str | None) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: r\nsft: {bm25_negatives: 0}\n")
    with pytest.raises(ConfigError) as error:
        load_recipe(path, [override])
    expected = message or "triplet_weight=1.0 needs negatives"
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_unreadable_recipes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        load_recipe(tmp_path / "nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="expected `key: value` lines, found list"):
        load_recipe(tmp_path / "list.yaml")


def test_every_setting_has_a_description() -> None:
    def check(model: type) -> None:
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                check(field.annotation)
            else:
                assert field.description, f"{model.__name__}.{name}"

    check(Recipe)
    assert yaml.safe_load(dump_recipe(Recipe()))["grpo"]["reward"]["ranking"] == 1.0
