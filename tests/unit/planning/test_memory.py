"""The formulas of memory against what torch allocates on a CPU, for the operations that training runs."""

from __future__ import annotations

import contextlib
import gc
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from torch.profiler import ProfilerActivity, profile

from search_r3.config import GRPOSettings, LoRASettings, Recipe
from search_r3.data.collection import Collection
from search_r3.data.triples import training_examples
from search_r3.model.encoder import SearchR3
from search_r3.model.engine.decoding import Rollout
from search_r3.planning import footprint, memory
from search_r3.planning.footprint import Job, Lengths
from search_r3.planning.memory import (
    Pass,
    Precision,
    backward_work,
    block_activations,
    cast_weights,
    kept_activations,
)
from search_r3.planning.shape import ModelShape, shape_of
from search_r3.retrieval.index import ExactIndex
from search_r3.sections import DistillSettings
from search_r3.training import grpo, policy, sft
from search_r3.training.batches import make_batch
from search_r3.training.engine import Engine, make_engine
from search_r3.training.modes.distill import Course
from search_r3.training.modes.teacher import BLOCK, Lesson
from tests.conftest import save_model

GROUPED = ModelShape(300, 64, 3, 4, 2, 16, 160, tied=True)
WIDE = ModelShape(300, 96, 2, 6, 6, 16, 384, tied=False)
QWEN3 = ModelShape(300, 64, 2, 4, 2, 16, 160, tied=True, bias=False, head_norms=True)


def build(shape: ModelShape, dtype: str = "float32") -> Any:
    kind = transformers.Qwen3Config if shape.head_norms else transformers.Qwen2Config
    config = kind(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate, num_attention_heads=shape.heads, num_key_value_heads=shape.key_heads,
        head_dim=shape.head_size, max_position_embeddings=512, tie_word_embeddings=shape.tied, bos_token_id=None,
        eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def allocated(work: Callable[[], Any]) -> tuple[int, int, Any]:
    """Bytes that some work allocates at its peak and that are left at its end, and its result."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = work()
    events = found.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    sums = list(itertools.accumulate(size for _, size in changes))
    return max(sums, default=0), sums[-1] if sums else 0, result


def saved(model: Any, work: Callable[[], Any]) -> int:
    """Bytes of the storages that autograd saves, parameters and buffers apart."""
    own = {part.untyped_storage().data_ptr() for part in [*model.parameters(), *model.buffers()]}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    del result
    return sum(storage.nbytes() for storage in found.values())


def runner(model: Any, size: Pass, mixed: str) -> Callable[[], Any]:
    """The forward pass to the final norm as `Backbone.hidden_states` runs it."""
    ids = torch.randint(2, 300, (size.sequences, size.length))
    mask = torch.ones_like(ids)
    if size.with_mask:
        mask[0, size.length - 5 :] = 0

    def run() -> Any:
        given, positions = ids.clone(), (mask.cumsum(-1) - 1).clamp(min=0)
        autocast = torch.autocast("cpu", torch.bfloat16) if mixed == "bf16" else contextlib.nullcontext()
        with autocast:
            hidden = model.base_model(
                input_ids=given, attention_mask=mask, position_ids=positions, use_cache=False
            ).last_hidden_state
        return hidden, given, positions

    return run


def adapted(model: Any, lora: LoRASettings) -> tuple[Any, Any]:
    if lora.rank == 0:
        return model, model
    import peft

    config = peft.LoraConfig(
        r=lora.rank, lora_dropout=0.0, target_modules=list(lora.target_modules), trainable_token_indices=[5]
    )
    wrapped = peft.get_peft_model(model, config)
    return wrapped, wrapped.get_base_model()


CASES = [
    (GROUPED, "float32", "no", 0, True),
    (GROUPED, "float32", "no", 0, False),
    (GROUPED, "bfloat16", "no", 0, True),
    (GROUPED, "float32", "bf16", 0, True),
    (GROUPED, "float32", "no", 4, False),
    (GROUPED, "bfloat16", "bf16", 4, True),
    (WIDE, "float32", "bf16", 4, True),
    (QWEN3, "float32", "no", 0, True),
]


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's on tied tables
@pytest.mark.parametrize(("shape", "dtype", "mixed", "rank", "with_mask"), CASES)
def test_what_autograd_saves_is_what_the_formula_says(
    shape: ModelShape, dtype: str, mixed: str, rank: int, with_mask: bool
) -> None:
    # As a copy, since trainings refuse whole weights in bfloat16.
    recipe = Recipe().model_copy(update={"dtype": dtype, "mixed_precision": mixed, "lora": LoRASettings(rank=rank)})
    precision, size = Precision.of(recipe, "single"), Pass(8, 40, with_mask)
    whole, model = adapted(build(shape, dtype), recipe.lora)
    run = runner(model, size, mixed)
    measured = saved(whole, run)
    blocks = shape.layers * block_activations(shape, size, precision, recipe.lora)
    casts = cast_weights(shape, precision, recipe.lora, checkpointing=False)
    casts -= precision.compute * shape.table if casts else 0  # the output layer is not run here
    kept = kept_activations(shape, size, precision, recipe.lora, checkpointing=False)
    assert blocks < measured < 1.01 * (kept + casts), "the blocks and the final norm"
    assert measured == pytest.approx(kept + casts, rel=0.04), "which counts what is alive and not saved, too"
    left = allocated(run)[1]
    assert left == pytest.approx(kept + casts, rel=0.02)


@pytest.mark.parametrize(
    ("shape", "dtype", "mixed"),
    [(GROUPED, "bfloat16", "no"), (WIDE, "float32", "bf16")],
)
def test_with_checkpointing_a_block_keeps_its_input_and_is_computed_again(
    shape: ModelShape, dtype: str, mixed: str
) -> None:
    recipe = Recipe().model_copy(update={"dtype": dtype, "mixed_precision": mixed, "gradient_checkpointing": True})
    precision, size = Precision.of(recipe, "single"), Pass(24, 40)
    model = build(shape, dtype)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    run = runner(model, size, mixed)
    kept = kept_activations(shape, size, precision, recipe.lora, checkpointing=True)
    assert allocated(run)[1] == pytest.approx(kept, rel=0.02)
    assert kept < kept_activations(shape, size, precision, recipe.lora, checkpointing=False) / 2

    def step() -> None:
        run()[0].sum().backward()

    step()  # gradients are there from now on
    work = backward_work(shape, size, precision, recipe.lora, checkpointing=True)
    # An upper bound: what is computed again does not stand beside the widest gradient at the same moment.
    assert (kept + work) / 1.25 < allocated(step)[0] < kept + work


# The steps of both stages, as the trainings run them


@pytest.fixture(autouse=True)
def products_without_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN copies bfloat16 operands to float32 where the processor has no bfloat16 instructions; GPUs never do."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate keeps one precision per process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A model whose logits and activations are larger than its weights."""
    shape = replace(GROUPED, vocabulary=2000)
    return save_model(tmp_path_factory.mktemp("larger") / "qwen2", tokenizer, build(shape))


def shape_at(model: SearchR3) -> ModelShape:
    return shape_of(model.backbone.causal_lm.config.to_dict(), "")


def trained(job: Job) -> int:
    """Bytes of a pass over what is there before and after it."""
    parts = job.training()
    tied = job.shape.table * job.precision.trainable if job.recipe.lora.rank == 0 else 0
    return sum(parts.values()) + tied


def stage_1(
    path: Path, collection: Collection, tmp_path: Path, **settings: Any
) -> tuple[Job, Callable[[], Any], Engine]:
    sections = {"sft": {"batch_size": 12, "random_negatives": 1, "hard_negatives": 0, "splits": {"train": 1.0}}}
    sections["sft"] |= settings.pop("sft", {})
    recipe = Recipe(run_dir=str(tmp_path), max_length=120, max_new_tokens=16, **settings, **sections)
    model = SearchR3(path, device="cpu", dtype=recipe.dtype)
    shape = shape_at(model)
    engine = make_engine(model, recipe, recipe.sft)
    examples = training_examples(collection, "train")[: recipe.sft.batch_size]
    batch = make_batch(collection, list(collection.documents), examples, recipe.sft, random.Random(0))
    share = sft.take_share(engine, batch, collection, model)
    prompt = max(item.prompt_length for item in share.reason)
    lengths = Lengths(
        longest_query=prompt,
        longest_reasoning=max(len(item.ids) - item.prompt_length for item in share.reason),
        longest_document=max(len(item.ids) for item in share.documents),
        template=0,
    )
    job = Job(recipe, shape, "sft", 1, "single", 40, lengths)
    return job, lambda: sft.compute_gradients(engine, model.backbone, batch, share, recipe.sft), engine


def in_chunks(monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    """Let no more positions have logits at once."""
    assert memory.LOGITS_AT_A_TIME == policy.LOGITS_AT_A_TIME
    for module in (memory, policy):
        monkeypatch.setattr(module, "LOGITS_AT_A_TIME", positions * 2000)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "settings",
    [
        {"sft": {"micro_batch_size": 6, "kl_weight": 1.0}},
        {"sft": {"micro_batch_tokens": 300, "kl_weight": 1.0}},
        {"sft": {"micro_batch_size": 6, "kl_weight": 1.0}, "chunk": 40},
        {"sft": {"micro_batch_size": None, "kl_weight": 0.0}},
        {"sft": {"micro_batch_size": 6, "kl_weight": 1.0}, "mixed_precision": "bf16"},
        {"sft": {"micro_batch_size": 6, "kl_weight": 0.0}, "gradient_checkpointing": True},
        {"sft": {"micro_batch_size": 6, "kl_weight": 1.0}, "lora": {"rank": 4}, "dtype": "bfloat16"},
        {"sft": {"micro_batch_size": 6, "latent_steps": 3}},
        {"sft": {"micro_batch_size": None, "latent_steps": 1, "latent_objective": "gircse"}},
        {"sft": {"micro_batch_size": 6, "latent_steps": 2, "documents": "frozen"}, "mixed_precision": "bf16"},
        {"sft": {"micro_batch_size": 6, "latent_steps": 3}, "lora": {"rank": 4}, "dtype": "bfloat16"},
    ],
)
def test_a_step_of_stage_1_takes_what_the_plan_says(
    larger: Path, collection: Collection, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dict(settings)
    in_chunks(monkeypatch, settings.pop("chunk", 10_000))
    job, step, engine = stage_1(larger, collection, tmp_path, **settings)
    step()  # gradients are there from now on
    measured = allocated(step)[0]
    assert measured == pytest.approx(trained(job), rel=0.15)
    resident = job.resident()
    gradients = sum(part.grad.nbytes for part in engine.policy.parameters() if part.grad is not None)
    assert gradients == pytest.approx(job.own_gradients(), rel=0.01)
    engine.step()
    weights = {part.data_ptr(): part.nbytes for part in engine.policy.parameters()}
    assert sum(weights.values()) == pytest.approx(resident["weights"], rel=0.02)
    moments = [value for state in engine.optimizer.state.values() for value in state.values() if value.numel() > 1]
    assert sum(value.nbytes for value in moments) == pytest.approx(resident["optimizer"], rel=0.01)


@pytest.mark.parametrize("mixed", ["no", "bf16"])
def test_gradients_of_weights_that_several_passes_share_wait_for_the_last_of_them(
    collection: Collection, tmp_path: Path, tokenizer: Any, mixed: str
) -> None:
    shape = replace(GROUPED, hidden=128, head_size=32, intermediate=1024, layers=4, vocabulary=len(tokenizer) + 8)
    path = save_model(tmp_path / "qwen2", tokenizer, build(shape))
    settings, more = (
        {"micro_batch_size": 2, "batch_size": 4},
        {"gradient_checkpointing": True, "mixed_precision": mixed},
    )
    job, step, _ = stage_1(path, collection, tmp_path, sft=settings | {"latent_steps": 3}, **more)
    step()
    assert allocated(step)[0] == pytest.approx(trained(job), rel=0.15)
    assert job.training()["waiting gradients"] > 0.3 * trained(job)
    job, _, _ = stage_1(path, collection, tmp_path, sft=settings, **more)
    assert not job.training().get("waiting gradients"), "each pass has a graph of its own"


@pytest.mark.parametrize("size", [3, 12])
def test_a_step_of_a_distillation_takes_what_the_plan_says(
    larger: Path, collection: Collection, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_chunks(monkeypatch, 10_000)
    assert footprint.TEACHER_QUERIES == BLOCK
    settings = DistillSettings(batch_size=12, depth=5, micro_batch_size=size)
    recipe = Recipe(run_dir=str(tmp_path), max_length=120, max_new_tokens=24, distill=settings)
    model = SearchR3(larger, device="cpu")
    prompt = model.backbone.prompt_encoder.encode("where is the red house?", "reason").ids
    vectors = torch.nn.functional.normalize(torch.randn(40, 64), dim=-1)
    reply = [7] * 23 + [model.backbone.embed_token_id]
    lessons = [
        Lesson(query, vectors[0], [Rollout(prompt, reply, [1] * 24, [-5.0] * 24, vectors[1], "")])
        for query in list(collection.queries.values())[:12]
    ]
    engine = make_engine(model, recipe, settings)
    index = ExactIndex(list(collection.documents), vectors.numpy())
    course = Course(model, engine, collection, index, lessons, settings, 0)
    lengths = Lengths(longest_query=len(prompt), longest_reasoning=24, template=0)
    job = Job(recipe, shape_at(model), "distill", 1, "single", 40, lengths)

    def step() -> None:
        course.compute_gradients(course.batch(0))

    step()
    assert allocated(step)[0] == pytest.approx(trained(job), rel=0.15)


@pytest.mark.parametrize(("mixed", "chunk"), [("no", 10_000), ("bf16", 10_000), ("no", 100)])
def test_a_pass_of_stage_2_takes_what_the_plan_says(
    larger: Path, collection: Collection, tmp_path: Path, mixed: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_chunks(monkeypatch, chunk)
    settings = GRPOSettings(queries_per_step=4, group_size=4, micro_batch_size=16)
    recipe = Recipe(run_dir=str(tmp_path), max_length=120, max_new_tokens=24, mixed_precision=mixed, grpo=settings)
    model = SearchR3(larger, device="cpu")
    shape = shape_at(model)
    prompt = model.backbone.prompt_encoder.encode("where is the red house?", "reason").ids
    reply = [7] * 23 + [model.backbone.embed_token_id]
    rollout = Rollout(prompt, reply, [1] * 24, [-5.0] * 24, torch.zeros(64), "")
    short = Rollout(prompt, reply[-20:], [1] * 20, [-5.0] * 20, torch.zeros(64), "")
    experience: Any = type("E", (), {"rollouts": [rollout] * 15 + [short], "advantages": torch.ones(16)})
    engine = make_engine(model, recipe, settings)
    environment: Any = None

    def step() -> None:
        totals = {"tokens": 380.0, "computed_tokens": 380.0, "rollouts": 16.0}
        loss, _ = grpo._micro_loss(model, engine, environment, experience, range(16), settings, totals)
        engine.backward(loss)

    step()
    job = Job(
        recipe, shape, "grpo", 1, "single", 40, Lengths(longest_query=len(prompt), longest_reasoning=24, template=0)
    )
    assert allocated(step)[0] == pytest.approx(trained(job), rel=0.15)
