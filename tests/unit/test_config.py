from __future__ import annotations

from pathlib import Path
from typing import Any

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
        ("sft.bm25_negatives=2", "the setting 'sft.bm25_negatives' is called 'sft.hard_negatives' now; write that"),
        ("zzz=1", "unknown setting 'zzz'; known here: name, run_dir"),
        ("grpo.steps=0", "grpo.steps = 0: Input should be greater than or equal to 1"),
        ("grpo.refresh.policy=sometimes", "grpo.refresh.policy = 'sometimes'"),
        ("grpo.refresh=never", "refresh is a section; write refresh.policy=never"),
        ("grpo.refresh={policy: full, max_documents: 5}", "a budget goes with shortlist or selective, not with policy"),
        ("grpo.refresh={policy: never, correct_drift: true}", "correct_drift=true goes with shortlist or selective"),
        ("dtype=bfloat16", "recipe: Value error, dtype=bfloat16 with lora.rank=0 would train weights in bfloat16"),
        ("dtype=bfloat16", "set dtype=float32 and mixed_precision=bf16 (products in bfloat16), or lora.rank=16"),
        ("sft.read_styles=[own]", "read_styles names own, which reasoning_styles gives no weight (chain, restate)"),
        ("sft.splits={}", "splits={}: no split has a share; name one or more"),
        ("sft.splits={facts: 0, sft: 0}", "no split has a share; name one or more, such as {train: 1.0}"),
        ("sft.splits={facts: -1, sft: 2}", "sft.splits.facts = -1: Input should be greater than or equal to 0"),
        ("sft.splits={facts: .nan}", "sft.splits.facts = nan: Input should be a finite number"),
        ("sft.reasoning_styles={chain: -1}", "sft.reasoning_styles.chain = -1: Input should be greater"),
        ("sft.steps=yes", "sft.steps = True: Value error, expected a number"),
        ("sft.micro_batch_size=on", "sft.micro_batch_size = True: Value error, expected a number"),
        ("sft.splits={facts: 1, facts: 2}", "cannot read the value"),
        ("grpo.steps", "expected key=value"),
        ("name.first=x", "'name' is a single value, not a section"),
        ("sft.steps=[1", "cannot read the value"),
        ("sft.random_negatives=0", None),
    ],
)
def test_a_bad_override_is_one_clear_error(tmp_path: Path, override: str, message: str | None) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: r\nsft: {hard_negatives: 0}\n")
    with pytest.raises(ConfigError) as error:
        load_recipe(path, [override])
    expected = message or "triplet_weight=1.0 needs negatives"
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """A recipe that extends a second, which extends a third."""
    write(tmp_path / "a.yaml", "seed: 1\nmax_length: 99\nsft: {steps: 5, batch_size: 7, splits: {x: 0.5, y: 0.5}}\n")
    write(tmp_path / "more" / "b.yaml", "extends: ../a.yaml\nseed: 2\nsft: {steps: 6, splits: {z: 1.0}}\n")
    return write(tmp_path / "c.yaml", "extends: more/b.yaml\nname: c\ngrpo: {refresh: {policy: never}}\n")


def test_a_recipe_has_the_values_of_those_that_it_extends_except_for_its_own(chain: Path, tmp_path: Path) -> None:
    recipe = load_recipe(chain, ["sft.steps=9"])
    assert (recipe.name, recipe.seed, recipe.max_length) == ("c", 2, 99)
    assert (recipe.sft.steps, recipe.sft.batch_size, recipe.grpo.refresh.policy) == (9, 7, "never")
    assert recipe.sft.splits == {"z": 1.0}, "a setting that is a mapping is replaced, not merged"
    assert load_recipe(chain).sft.steps == 6
    dumped = write(tmp_path / "saved" / "settings.yaml", dump_recipe(recipe))
    assert "extends" not in dumped.read_text() and load_recipe(dumped) == recipe, "whole, wherever it lies"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "sft: {stps: 5}", "{a}: unknown setting 'sft.stps'; did you mean 'steps'?"),
        ("a.yaml", "sft: {batch_size: 1}", "{a}: sft.batch_size = 1: Input should be greater than or equal to 2"),
        ("more/b.yaml", "extends: ../a.yaml\nsft: 5", "{b}: sft = 5: "),
        ("a.yaml", "sft: {bm25_negatives: 1}", "{a}: the setting 'sft.bm25_negatives' is called 'sft.hard_negatives'"),
        ("a.yaml", "sft: {random_negatives: 0, hard_negatives: 0}", "{c}: sft: Value error, triplet_weight"),
        ("a.yaml", "a: [1", "{a} is not valid YAML"),
        (
            "a.yaml",
            "sft:\n  steps: 5\nname: x\nsft:\n  steps: 6\n",
            "{a} is not valid YAML in UTF-8: 'sft' stands twice",
        ),
        ("a.yaml", "extends: c.yaml", "{a} extends "),
        ("a.yaml", "extends: [c.yaml]", "{a}: extends = ['c.yaml']: expected the path of one recipe"),
        ("more/b.yaml", "extends: nowhere.yaml", "nowhere.yaml, which {b} extends: No such file"),
    ],
)
def test_a_fault_in_a_recipe_that_is_extended_is_named_with_its_file(
    chain: Path, tmp_path: Path, name: str, text: str, message: str
) -> None:
    write(tmp_path / name, text)
    with pytest.raises(ConfigError) as error:
        load_recipe(chain)
    paths = {"a": tmp_path / "more" / ".." / "a.yaml", "b": tmp_path / "more" / "b.yaml", "c": chain}
    if "extends: c" in text:
        assert str(error.value).startswith(f"{tmp_path / 'more' / '..' / 'c.yaml'} extends itself: {chain} extends ")
    else:
        assert message.format(**paths) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_fault_of_an_override_is_laid_to_no_file(chain: Path) -> None:
    with pytest.raises(ConfigError, match=r"^sft.batch_size = 0: Input"):
        load_recipe(chain, ["sft.batch_size=0"])
    with pytest.raises(ConfigError, match=r"^sft.steps = 0: Input"):
        load_recipe(chain, ["sft={steps: 0}"])


def test_a_run_that_was_saved_with_an_old_name_is_refused_with_the_remedy(tmp_path: Path) -> None:
    from search_r3.training.run import Run

    recipe = load_recipe(None, [f"run_dir={tmp_path / 'run'}"])
    settings = tmp_path / "run" / "settings.yaml"
    write(settings, dump_recipe(recipe).replace("hard_negatives", "bm25_negatives"))
    (settings.parent / "metrics.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        Run(recipe)
    remedy = "the setting 'sft.bm25_negatives' is called 'sft.hard_negatives' now; write that"
    assert str(error.value) == f"{settings}: {remedy}"
    settings.write_text(settings.read_text().replace("bm25_negatives", "hard_negatives"))
    assert Run(recipe).recipe == recipe


SFT_SPLITS = {
    "triviaqa": 0.1, "msmarco": 0.3, "codesearchnet": 0.12, "cosqa": 0.03, "miracl-en": 0.04,
    **{f"miracl-{code}": 0.01 for code in "ar bn es fa fi fr hi id ja ko ru sw te th zh".split()},
    "s2orc-abstracts": 0.14, "s2orc-titles-cited": 0.06, "s2orc-abstracts-cited": 0.06,
}  # fmt: skip
QWEN: dict[str, Any] = {
    "max_length": 512,
    "max_new_tokens": 512,
    "mixed_precision": "bf16",
    "gradient_checkpointing": True,
    "sft": {"uninstructed": 0.2},
    "grpo": {"uninstructed": 0.2},
}
SFT: dict[str, Any] = {
    "steps": 900, "batch_size": 1024, "micro_batch_size": 8, "learning_rate": 2e-5, "warmup_steps": 100,
    "splits": SFT_SPLITS, "random_negatives": 0, "contrastive_temperature": 0.02,
}  # fmt: skip
REFRESH = {"policy": "shortlist", "max_documents": 4096, "audit_every": 50}
GRPO: dict[str, Any] = {
    "steps": 500, "queries_per_step": 64, "learning_rate": 1e-6, "warmup_steps": 10, "refresh": REFRESH,
    "splits": ["triviaqa", "msmarco", "miracl-en", "s2orc-abstracts"],
    "rollout_batch_size": 64, "micro_batch_size": 4, "evaluate_every": 50,
}  # fmt: skip


@pytest.mark.parametrize("size", ["1.5b", "7b"])
@pytest.mark.parametrize("what", ["sft", "sft-lora", "grpo", "grpo-lora"])
def test_the_recipes_of_qwen_have_the_values_that_they_had_as_whole_files(size: str, what: str) -> None:
    name = f"qwen2.5-{size}-{what}"
    stage, lora = what.removesuffix("-lora"), what.endswith("-lora")
    section = SFT if stage == "sft" else GRPO
    rates = {"sft": 1e-4, "grpo": 1e-5} if lora else {"sft": 2e-5 if size == "1.5b" else 1e-5, "grpo": 1e-6}
    values = QWEN | {
        "name": name, "run_dir": f"runs/{name}", "base": f"Qwen/Qwen2.5-{size.upper()}-Instruct",
        "collection": "data/paper" if stage == "sft" else "data/paper-rl",
        "save_every": 100 if stage == "sft" else 20,
        stage: QWEN[stage] | section | {"learning_rate": rates[stage]},
    }  # fmt: skip
    if lora:
        values |= {"dtype": "bfloat16", "lora": {"rank": 16, "alpha": 32}}
        values["grpo"] |= {"documents": "frozen"} if stage == "grpo" else {}
    assert load_recipe(RECIPES[0].with_name(f"{name}.yaml")) == Recipe.model_validate(values)


def test_unreadable_recipes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        load_recipe(tmp_path / "nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_recipe(tmp_path / "bad.yaml")
    for content in (b"name: \xe9", b"name: 2020-13-45"):
        (tmp_path / "bad.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"bad\.yaml is not valid YAML in UTF-8: .*; mend it"):
            load_recipe(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="cannot read the value of 'name=2020-13-45' as YAML"):
        load_recipe(None, ["name=2020-13-45"])
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
    assert yaml.safe_load(dump_recipe(Recipe()))["grpo"]["reward"]["ndcg"] == 1.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ranking", "the setting 'grpo.reward.ranking' is called 'grpo.reward.ndcg' now"),
        ("similarity", "'grpo.reward.similarity' has gone.* use 'grpo.reward.log_rank' or 'grpo.reward.contrastive'"),
    ],
)
def test_a_reward_part_by_its_old_name_is_told_what_became_of_it(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "old.yaml").write_text(f"grpo:\n  reward: {{{name}: 1.0, format: 0.1}}\n")
    with pytest.raises(ConfigError, match=message):
        load_recipe(tmp_path / "old.yaml")
