"""Plans of recipes: counts of weights, memory by strategy, tokens, time, what to change; the shipped recipes."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import transformers
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from search_r3.config import GRPOSettings, LoRASettings, Recipe, RefreshSettings, SFTSettings, load_recipe
from search_r3.errors import ConfigError, ModelError
from search_r3.model.backbone import Backbone
from search_r3.model.engine import decoding
from search_r3.model.loading import load_backbone
from search_r3.planning import memory
from search_r3.planning.footprint import Lengths, _in_a_pass
from search_r3.planning.memory import Precision, cache_memory, logits_memory, rollout_logits_memory
from search_r3.planning.plan import Speed, plan, suggest
from search_r3.planning.shape import SHAPES, read_shape, shape_of
from tests.conftest import call

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "recipes").glob("qwen2.5-*.yaml"))
LAUNCHES = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
LARGE = Recipe(
    base="Qwen/Qwen2.5-1.5B-Instruct",
    mixed_precision="bf16",
    gradient_checkpointing=True,
    sft=SFTSettings(kl_weight=1.0),
)
WEIGHTS = 1_543_714_304


@pytest.mark.parametrize(
    ("name", "count"), [("0.5B", 494_032_768), ("1.5B", WEIGHTS), ("3B", 3_085_938_688), ("7B", 7_615_616_512)]
)
def test_known_models_have_the_weights_that_their_files_have(name: str, count: int) -> None:
    assert SHAPES[f"Qwen/Qwen2.5-{name}-Instruct"].total == count


@pytest.mark.parametrize(("kind", "tied"), [("qwen2", True), ("qwen2", False), ("qwen3", True), ("llama", False)])
def test_weights_are_counted_as_transformers_makes_them(kind: str, tied: bool) -> None:
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=120, hidden_size=48, num_hidden_layers=3, intermediate_size=80, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    shape = shape_of(json.loads(config.to_json_string(use_diff=False)), "here")
    assert shape.total == sum(part.numel() for part in model.parameters())
    assert shape.block == sum(part.numel() for part in model.model.layers[0].parameters())


def test_adapters_are_counted_as_peft_makes_them(tiny_path: Path) -> None:
    from search_r3.model.adapters import add_adapters

    for settings in (LoRASettings(rank=4), LoRASettings(rank=2, target_modules=("q_proj", "down_proj"))):
        backbone = load_backbone(tiny_path)
        add_adapters(backbone, settings)
        learns = sum(part.numel() for part in backbone.model.parameters() if part.requires_grad)
        assert read_shape(str(tiny_path)).adapters(settings) == learns
    with pytest.raises(ConfigError, match="names 'query'; the plan knows"):
        read_shape(str(tiny_path)).adapters(LoRASettings(rank=1, target_modules=("query",)))


def test_a_shape_comes_from_a_folder_a_file_or_a_clear_error(tiny_path: Path, tmp_path: Path) -> None:
    found = read_shape(str(tiny_path))
    assert read_shape("no/model", tiny_path / "config.json") == found == read_shape(str(tiny_path))
    with pytest.raises(ConfigError, match=r"no model directory some/model.*--config FILE"):
        read_shape("some/model")
    other = tmp_path / "config.json"
    other.write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelError, match="model_type is 'gpt2'; the plan knows llama"):
        read_shape("x", other)
    other.write_text('{"model_type": "qwen2", "hidden_size": 64}')
    with pytest.raises(ModelError, match="no usable 'num_attention_heads'"):
        read_shape("x", other)
    other.write_text("{")
    with pytest.raises(ConfigError, match=r"no readable config\.json"):
        read_shape("x", other)


def held(strategy: str, gpus: int = 8, recipe: Recipe = LARGE) -> dict[str, float]:
    """Bytes per weight in the phase `train`."""
    parts = plan(recipe, "sft", gpus=gpus, strategy=strategy).phases["train"]  # type: ignore[arg-type]
    return {name: size / WEIGHTS for name, size in parts.items()}


def test_what_each_strategy_holds_per_weight() -> None:
    one = held("single", 1)
    assert one["weights"] == pytest.approx(4) and one["optimizer"] == pytest.approx(8)
    tied = SHAPES[LARGE.base].table / WEIGHTS
    assert one["gradients"] == pytest.approx(4 + 4 * tied)
    assert one["reference"] == pytest.approx(2), "the KL's base is a bfloat16 copy"
    ddp = held("ddp")
    assert ddp["buckets"] == pytest.approx(4) and ddp["weights"] == pytest.approx(4)
    sharded = held("fsdp2")
    assert sharded["weights"] == pytest.approx(4 / 8) and sharded["optimizer"] == pytest.approx(1)
    two, three = held("zero2"), held("zero3")
    assert two["buckets"] * WEIGHTS == pytest.approx(2 * 2 * 5e8)
    assert two["weights"] == pytest.approx(2) and two["optimizer"] == pytest.approx(12 / 8)
    assert three["weights"] == pytest.approx(2 / 8) and three["optimizer"] == pytest.approx(12 / 8)
    assert sum(three[part] for part in ("weights", "optimizer")) + 4 / 8 == pytest.approx(18 / 8), "DeepSpeed's own sum"


def test_a_base_is_held_for_the_kl_only_and_not_beside_adapters() -> None:
    without = LARGE.model_copy(update={"sft": LARGE.sft.model_copy(update={"kl_weight": 0.0})})
    adapted = LARGE.model_copy(update={"lora": LoRASettings(rank=16)})
    assert "reference" not in held("ddp", recipe=without)
    assert "reference" not in held("ddp", recipe=adapted)
    assert held("ddp", recipe=adapted)["optimizer"] < 0.2


def test_memory_of_stage_1_grows_with_the_passes_and_not_with_the_batch() -> None:
    def train(batch: int, size: int | None) -> dict[str, int]:
        settings = LARGE.sft.model_copy(update={"batch_size": batch, "micro_batch_size": size, "kl_weight": 1.0})
        return plan(LARGE.model_copy(update={"sft": settings}), "sft").phases["train"]

    small = train(1024, 8)
    assert small["activations"] == train(256, 8)["activations"]
    assert train(1024, 16)["activations"] == pytest.approx(2 * small["activations"], rel=0.01)
    assert train(1024, None)["activations"] > 10 * small["activations"]
    assert small["logits"] <= 7 * 4 * 2**25, "of a chunk of positions, whatever the pass is"


def test_logits_grow_to_a_chunk_and_no_further() -> None:
    one = 4 * 151_936
    assert logits_memory(151_936, 100, 0) == 3 * 100 * one
    assert logits_memory(151_936, 100, 100) == (100 + 7 * 100) * one, "both losses stand in one graph"
    assert logits_memory(151_936, 5000, 5000) == 7 * 220 * one, "what is computed again keeps nothing"
    assert rollout_logits_memory(151_936, 5000, reference=False) == 3 * 220 * one


def test_a_budget_in_tokens_says_how_many_sequences_a_pass_holds() -> None:
    assert _in_a_pass(SFTSettings(micro_batch_tokens=100), 64, 30) == 3
    assert _in_a_pass(SFTSettings(micro_batch_tokens=100, micro_batch_size=2), 64, 30) == 2, "both limit"
    assert _in_a_pass(GRPOSettings(micro_batch_tokens=100), 64, 300) == 1, "a longer one is a pass of its own"
    assert _in_a_pass(GRPOSettings(micro_batch_tokens=10**6), 64, 300) == 64, "there are no more"


def test_the_cache_is_what_the_decoder_reserves_on_a_gpu(backbone: Backbone) -> None:
    assert memory.LOOK_EVERY == decoding._LOOK_EVERY["cuda"]
    ids = backbone.prompt_encoder.encode("river", "reason").ids
    decoder = decoding.Decoder(backbone, 3, memory.LOOK_EVERY)
    decoder.run([decoding.DecodeRequest(ids, 20)] * 5)
    cache: Any = decoder._engine
    assert cache._cache.values.nbytes == cache_memory(
        shape_of(backbone.causal_lm.config.to_dict(), "tiny"), 3, len(ids), 20, 4
    )


def test_precision_follows_recipe_and_strategy() -> None:
    assert Precision.of(LARGE, "ddp").casts and not Precision.of(LARGE, "fsdp2").casts
    half = Recipe().model_copy(update={"dtype": "bfloat16"})  # refused by trainings
    assert (Precision.of(half, "single").weights, Precision.of(half, "single").trainable) == (2, 2)
    assert Precision.of(half.model_copy(update={"mixed_precision": "bf16"}), "fsdp2").weights == 4


def test_tokens_and_time_of_a_step() -> None:
    lengths = Lengths(query=20, document=100, reasoning=50, template=10)
    speed = Speed(tokens_per_second=1000.0)
    settings = {"steps": 10, "batch_size": 16, "random_negatives": 1, "hard_negatives": 0}
    recipe = LARGE.model_copy(
        update={"max_length": 512, "gradient_checkpointing": False, "sft": LARGE.sft.model_copy(update=settings)}
    )
    found = plan(recipe, "sft", gpus=1, lengths=lengths, speed=speed)
    assert found.tokens == {"direct": 16 * 30, "reasoned": 16 * 80, "documents": 32 * 110}
    trained = sum(found.flops[kind] for kind in found.tokens) / sum(found.tokens.values())
    assert trained == pytest.approx(6 * 1.31e9, rel=0.02), "6 per weight of the blocks, and attention"
    assert found.step_seconds == pytest.approx(sum(found.tokens.values()) / 1000, rel=0.4)
    assert found.record()["stage_seconds"] == pytest.approx(10 * found.step_seconds)
    assert found.seconds["tokenizing"] == pytest.approx(32 * 100 / (8 * 250_000))
    cached = recipe.model_copy(update={"sft": recipe.sft.model_copy(update={"micro_batch_size": 4})})
    more = plan(cached, "sft", gpus=1, lengths=lengths).flops["documents"] / found.flops["documents"]
    assert more == pytest.approx(4 / 3), "one more forward pass"
    again = plan(cached.model_copy(update={"gradient_checkpointing": True}), "sft", gpus=1, lengths=lengths)
    assert again.flops["documents"] / found.flops["documents"] == pytest.approx(5 / 3)


def test_the_refresh_policy_decides_how_many_documents_are_encoded() -> None:
    lengths = Lengths(document=100, template=0)

    def documents(kind: str = "moving", **settings: Any) -> float:
        changes = {"refresh": RefreshSettings(**settings), "queries_per_step": 16, "documents": kind}
        grpo = LARGE.grpo.model_copy(update=changes)
        recipe = LARGE.model_copy(update={"max_length": 512, "grpo": grpo})
        return plan(recipe, "grpo", documents=50_000, lengths=lengths).tokens["refresh"] / 100

    assert documents(policy="full") == 50_000
    assert documents(policy="never") == 16, "the positives"
    assert documents(policy="periodic", every=10) == 5016
    assert documents(policy="shortlist", depth=10) == 16 * 8 * 10 + 16
    assert documents(policy="selective", max_documents=1000) == 1000
    assert documents(policy="drift", drift_sample=64) == 16 + 64
    assert documents("frozen", policy="full") == 0


def test_the_pathwise_terms_cost_direct_passes_and_the_best_documents() -> None:
    lengths = Lengths(query=20, template=10)

    def planned(**settings: Any) -> Any:
        recipe = LARGE.model_copy(update={"max_length": 512, "grpo": LARGE.grpo.model_copy(update=settings)})
        return plan(recipe, "grpo", gpus=1, documents=50_000, lengths=lengths)

    grpo, without = LARGE.grpo, planned()
    assert "direct" not in without.tokens
    found = planned(direct_loss_weight=0.1, embedding_depth=50)
    assert found.tokens["direct"] == grpo.queries_per_step * 30
    rollouts, documents = grpo.micro_batch_size, grpo.micro_batch_size * 51
    assert found.phases["train"]["nearest documents"] == 4 * documents * (1536 + 4 * rollouts)
    assert "nearest documents" not in without.phases["train"]


def test_soft_tokens_cost_a_pass_each_and_their_probabilities() -> None:
    lengths = Lengths(query=20, template=10, reasoning=50)

    def planned(steps: int, **settings: Any) -> Any:
        section = {"micro_batch_size": 8, "latent_steps": steps, **settings}
        recipe = Recipe.model_validate(LARGE.model_dump() | {"max_length": 512, "sft": section})
        return plan(recipe, "sft", gpus=1, lengths=lengths)

    plans = [planned(steps) for steps in range(5)]
    train = [one.phases["train"] for one in plans]
    assert all(sum(two.values()) > sum(one.values()) for one, two in pairwise(train))
    assert plans[4].peak > plans[3].peak > plans[0].peak, "of few soft tokens AdamW's step is the peak"
    assert "soft tokens" not in train[0] and "latent" not in plans[0].tokens
    # Float32 probabilities, their copies in bfloat16, log-probabilities; and the table's copy.
    assert train[3]["soft tokens"] == 3 * (8 * 151_936 * (4 + 2 + 4) + 2 * SHAPES[LARGE.base].table)
    others = [planned(3, latent_objective=name).phases["train"]["soft tokens"] for name in ("gircse", "laser")]
    assert others == [train[3]["soft tokens"] - 3 * 8 * 151_936 * 4] * 2, "nothing is said"
    assert plans[3].tokens["latent"] == 24 * (30 + 32 + 33 + 34)
    assert plans[3].flops["logits"] > plans[0].flops["logits"]


def test_soft_tokens_that_do_not_fit_are_fewer_in_what_is_suggested() -> None:
    given = ["base=Qwen/Qwen2.5-1.5B-Instruct", "mixed_precision=bf16", "sft.latent_steps=60"]
    recipe = load_recipe(None, given)
    # Weights, moments and gradients take nearly all of it.
    assert not plan(recipe, "sft", gpus=1).fits(40e9)
    change = suggest(recipe, "sft", 40e9, gpus=1)
    (steps,) = (int(one.partition("=")[2]) for one in change.split() if one.startswith("sft.latent_steps="))
    assert 1 <= steps < 60 and "lora" not in change
    assert plan(load_recipe(None, [*given, *change.split()]), "sft", gpus=1).fits(40e9)
    one_more = [*given, *change.split(), f"sft.latent_steps={steps + 1}"]
    assert not plan(load_recipe(None, one_more), "sft", gpus=1).fits(40e9)


def test_a_distillation_computes_queries_alone_and_says_what_it_counts() -> None:
    lengths = Lengths(query=20, document=100, reasoning=50, template=10)
    sections = {"sft": {"batch_size": 48, "micro_batch_size": 48}, "distill": {"micro_batch_size": 48, "samples": 2}}
    recipe = Recipe.model_validate(LARGE.model_dump() | {"max_length": 512, **sections})
    given = {"gpus": 1, "documents": 50_000, "lengths": lengths, "speed": Speed(decoded_per_second=1_000)}
    first, found = plan(recipe, "sft", **given), plan(recipe, "distill", queries=2_000, **given)
    assert found.peak < first.peak
    assert found.tokens == {"direct": 48 * 30, "replies": 48 * 80}
    assert found.phases.keys() == {"load", "rollouts", "documents", "train", "optimizer"}
    assert found.phases["train"]["best documents"] == 4 * 48 * 50 * (1_536 + 6 * 48)
    assert found.host["index"] == 4 * 50_000 * 1_536
    assert found.host["teacher"] == 2_000 * (2 * (4 * 1_536 + 52 * 80) + 4 * 1_536)
    assert found.start_seconds.keys() == {"encoding", "tokenizing", "teacher"}
    assert found.start_seconds["teacher"] == pytest.approx(2_000 * 2 * 50 / 1_000)
    assert found.seconds["search"] == pytest.approx(2 * 50_000 * 1_536 * 48 / (8 * 0.03e12))
    assert found.steps == recipe.distill.steps
    bare = recipe.distill.model_copy(update={"hold_weight": 0.0, "target": "vector"})
    fewer = plan(recipe.model_copy(update={"distill": bare}), "distill", **given)
    assert fewer.tokens == {"direct": 48 * 30} and fewer.peak <= found.peak
    assert "best documents" not in fewer.phases["train"] and "search" not in fewer.seconds
    with pytest.raises(ConfigError, match=r"distill.batch_size = 48 cannot be shared by 64 GPUs"):
        plan(recipe, "distill", gpus=64)
    large = recipe.distill.model_copy(update={"batch_size": 2048, "micro_batch_size": 2048})
    change = suggest(recipe.model_copy(update={"distill": large}), "distill", 40e9, gpus=1)
    assert change.startswith("distill.micro_batch_size=")


def test_replies_of_a_server_are_read_and_not_decoded() -> None:
    def planned(**settings: Any) -> Any:
        recipe = LARGE.model_copy(update={"max_length": 512, "grpo": GRPOSettings(**settings)})
        return plan(recipe, "grpo", gpus=1, lengths=Lengths(query=20, reasoning=50, template=10))

    own, served = planned(), planned(sampler={"url": "http://localhost:8000/v1"})
    rollouts = own.tokens["rollouts"] // 50
    assert {"prompts", "rollouts"} <= set(own.tokens) and not {"prompts", "rollouts"} & set(served.tokens)
    assert served.tokens["read"] == rollouts * 80 == served.tokens["trained"]
    assert "rollout cache" in own.phases["rollouts"] and "rollout cache" not in served.phases["rollouts"]
    logits = served.phases["rollouts"]["logits"]
    assert logits == 256 * 151_936 * (2 + 3 * 4)
    assert served.seconds.keys() == own.seconds.keys() - {"rollouts"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_large_recipe_fits_where_it_says(path: Path) -> None:
    recipe = load_recipe(path)
    stage: Any = "grpo" if "grpo" in path.stem else "sft"
    strategy: Any = "ddp" if "lora" in path.stem or "1.5b" in path.stem else "fsdp2"
    assert plan(recipe, stage, gpus=8, strategy=strategy, documents=400_000).fits(80e9)
    if "1.5b" in path.stem or "lora" in path.stem:
        assert plan(recipe, stage, gpus=1, documents=400_000).fits(80e9)
    command = path.read_text().partition("name:")[0]
    assert f"recipes/{path.name}" in command and f"recipes/accelerate/{strategy}.yaml" in command
    assert "OMP_NUM_THREADS=8 accelerate launch" in command, "else each process searches with one thread"
    if stage == "grpo":
        assert recipe.grpo.documents == "frozen" if "lora" in path.stem else recipe.grpo.refresh.policy == "shortlist"
        first = load_recipe(path.with_name(path.name.replace("grpo", "sft")))
        assert f"--model {first.run_dir}/sft/model" in command
        assert (first.base, first.max_length, first.lora) == (recipe.base, recipe.max_length, recipe.lora)


def test_the_recipes_split_names_are_those_of_the_mixes() -> None:
    from search_r3.data.mixing.mix_settings import load_mix

    for path in RECIPES:
        recipe = load_recipe(path)
        mix = "paper-rl" if "grpo" in path.stem else "paper"
        names = {source.name for source in load_mix(ROOT / "recipes" / "data" / f"{mix}.yaml").sources}
        if "grpo" in path.stem:
            assert set(recipe.grpo.splits) == names
        else:
            assert set(recipe.sft.splits) == names
            assert sum(recipe.sft.splits.values()) == pytest.approx(1)


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_every_launch_file_is_one_that_accelerate_knows(path: Path) -> None:
    found = load_config_from_file(str(path))
    assert isinstance(found, ClusterConfig) and found.num_processes == 8
    assert found.mixed_precision == load_recipe(RECIPES[0]).mixed_precision
    known = {action.dest for action in launch_command_parser()._actions}
    assert set(found.fsdp_config) | set(found.deepspeed_config) <= known, "keys that launch turns into variables"
    if path.stem == "fsdp2":
        layer = found.fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
        assert hasattr(transformers.models.qwen2.modeling_qwen2, layer)
        assert (found.fsdp_config["fsdp_version"], found.fsdp_config["fsdp_state_dict_type"]) == (
            2,
            "SHARDED_STATE_DICT",
        )


def test_the_fsdp2_file_sets_what_the_trainings_are_tested_with() -> None:
    given = ["--config_file", str(ROOT / "recipes" / "accelerate" / "fsdp2.yaml"), "-m", "search_r3.cli", "sft"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    found = prepare_multi_gpu_env(arguments)
    expected = {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen2DecoderLayer", "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "FSDP_OFFLOAD_PARAMS": "false", "FSDP_ACTIVATION_CHECKPOINTING": "false", "ACCELERATE_MIXED_PRECISION": "bf16",
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected


def test_the_least_change_that_fits_is_named() -> None:
    batch = LARGE.sft.model_copy(update={"batch_size": 4096})
    recipe = LARGE.model_copy(update={"gradient_checkpointing": False, "sft": batch})
    change = suggest(recipe, "sft", 80e9)
    assert change.startswith("gradient_checkpointing=true sft.micro_batch_size=")
    given = ["base=Qwen/Qwen2.5-1.5B-Instruct", "mixed_precision=bf16", "sft.batch_size=4096"]
    fitting = load_recipe(None, [*given, *change.split()])
    assert plan(fitting, "sft").fits(80e9) and not plan(recipe, "sft").fits(80e9)
    assert "lora.rank=32" in suggest(LARGE.model_copy(update={"base": "Qwen/Qwen2.5-7B-Instruct"}), "sft", 80e9, gpus=1)
    assert suggest(LARGE, "sft", 1e9) == "", "nothing is enough"


def test_changes_without_which_it_still_fits_are_not_named() -> None:
    large = LARGE.model_copy(update={"base": "Qwen/Qwen2.5-7B-Instruct", "gradient_checkpointing": False})
    for gpu_bytes in (80e9, 60e9, 40e9):
        given = {"gpus": 8, "strategy": "ddp"}
        change = suggest(large, "sft", gpu_bytes, **given).split()
        assert "lora.rank=32" in change
        base = [f"base={large.base}", "mixed_precision=bf16"]
        assert plan(load_recipe(None, [*base, *change]), "sft", **given).fits(gpu_bytes)
        for one in {name.split("=")[0] for name in change} - {"dtype", "lora.rank"}:
            fewer = [name for name in change if not name.startswith(one)]
            assert not plan(load_recipe(None, [*base, *fewer]), "sft", **given).fits(gpu_bytes), (gpu_bytes, one)
            if one == "sft.micro_batch_size":
                (size,) = (int(name.split("=")[1]) for name in change if name.startswith(one))
                double = [*fewer, f"{one}={2 * size}"]
                assert not plan(load_recipe(None, [*base, *double]), "sft", **given).fits(gpu_bytes)


def test_the_command_shows_the_plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    where = ROOT / "recipes" / "qwen2.5-1.5b-sft.yaml"
    assert (
        call(
            monkeypatch,
            "plan",
            where,
            "sft.batch_size=512",
            "sft.kl_weight=1",
            "--stage",
            "sft",
            "--tokens-per-second",
            "60000",
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "total 1,543.7 M" in shown and "\nfits: " in shown and "reference" in shown
    assert "s per step (model " in shown and ", processes 16.00 GB" in shown and "1.00 of CUDA's own" in shown
    assert all(len(line) <= 160 for line in shown.splitlines())
    large = ("sft.batch_size=4096", "sft.micro_batch_size=1024")
    assert call(monkeypatch, "plan", where, *large, "--stage", "sft") == 0
    assert "does not fit" in (shown := capsys.readouterr().out) and "change first: sft.micro_batch_size=" in shown
    assert call(monkeypatch, "plan", where, "--json", "--gpus", "1") == 0
    record = json.loads(capsys.readouterr().out)
    assert set(record) == {"sft", "grpo"} and record["sft"]["fits"] is True
    assert record["sft"]["peak_bytes"] == sum(record["sft"]["phases"][record["sft"]["peak_phase"]].values())


def test_what_cannot_be_planned_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ROOT / "recipes" / "qwen2.5-1.5b-sft.yaml"
    for arguments, message in (
        (["--gpus", "2", "--strategy", "single"], "--strategy single is for one GPU, and --gpus is 2"),
        (["--gpus", "1", "--strategy", "fsdp2"], "--strategy fsdp2 is for several GPUs, and --gpus is 1"),
        (["grpo.queries_per_step=4", "--stage", "grpo"], "grpo.queries_per_step = 4 cannot be shared by 8 GPUs"),
        (["base=someone/model"], "give --config FILE"),
    ):
        assert call(monkeypatch, "plan", where, *arguments) == 2
        assert message in capsys.readouterr().err


def test_planning_loads_no_torch() -> None:
    code = (
        "import sys; from search_r3.config import load_recipe; from search_r3.planning.plan import plan; "
        "plan(load_recipe(None), 'sft', gpus=1); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
