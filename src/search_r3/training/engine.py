"""What both training loops share: accelerate around the model, any number of processes, seeds of the step alone.

A step's batch is one batch for all processes together: its draws are the same everywhere, each process computes its
share, and gradients are those of one process that computes all. `accelerate launch` chooses how the weights are held
(DDP, FSDP2, DeepSpeed); without it there is one process.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..config import GRPOSettings, Recipe, SFTSettings
from ..errors import ConfigError, ModelError
from ..extras import extra
from ..model.adapters import choose_what_learns
from ..model.backbone import Backbone
from ..model.encoder import SearchR3
from ..model.engine.forward import is_drivable
from ..model.loading import load_backbone
from ..model.settings import SETTINGS_FILE, read_settings
from ..model.source import find_files
from ..parallel import Communicator, make_communicator
from ..sections import DistillSettings
from .modes.frozen import check_begins, check_documents, check_query_side, keeps_documents, without_queries
from .policy import Policy, Reference, make_reference
from .tracking import check_trackers, start_trackers

T = TypeVar("T")
StageSettings = SFTSettings | GRPOSettings | DistillSettings


@dataclass
class Engine:
    """Accelerate's objects around one model."""

    accelerator: Any
    policy: Any  # the prepared `Policy`; what learns
    optimizer: Any  # prepared
    scheduler: Any  # prepared
    communicator: Communicator  # the other processes
    reference: Reference | None  # what the KL term stays close to; None without one
    adapters: bool  # whether only adapters learn; the reference is then the policy without them
    learning_rate: float = 0.0  # of the last step

    @property
    def rank(self) -> int:
        """This process's number."""
        return self.communicator.rank

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self.communicator.world_size

    def share(self, count: int, what: str) -> range:
        """The places of `count` things that are this process's: a run of them, as long as any other's or one shorter.

        Raises:
            ConfigError: there are fewer than processes.
        """
        if count < self.world_size:
            raise ConfigError(f"{what} = {count} cannot be shared by {self.world_size} processes; raise it")
        return range(self.rank * count // self.world_size, (self.rank + 1) * count // self.world_size)

    def padded(self, chunks: Sequence[T]) -> list[tuple[T, bool]]:
        """Chunks of this process, and whether they count: as many as the process with most has.

        A forward pass may be a collective, so that all processes make equally many.
        """
        most = max(self.communicator.all_gather(len(chunks)))
        return [(chunk, True) for chunk in chunks] + [(chunks[-1], False)] * (most - len(chunks))

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around one forward and backward pass; in the `last` of a step gradients are summed over the processes.

        FSDP2 sums them in every pass.
        """
        self.accelerator.gradient_state._set_sync_gradients(last)  # DeepSpeed asks it whether to step
        # FSDP2 would hold whole gradients of all weights, in the precision of the products, until the last pass.
        now = last or self.accelerator.is_fsdp2
        with contextlib.nullcontext() if now else self.accelerator.no_sync(self.policy):
            yield

    def backward(self, loss: Tensor) -> None:
        """Gradients of this process's part of the batch's loss; the wrappers average, and parts are to be summed.

        DeepSpeed clips and steps here, in the last pass of a step: whoever refuses a step afterwards comes too late.
        """
        self.accelerator.backward(loss * self.world_size)

    def clip(self, max_grad_norm: float) -> float:
        """Clip the gradients of the whole batch; returns their norm before."""
        norm = self.accelerator.clip_grad_norm_(self.policy.parameters(), max_grad_norm)
        return float("nan") if norm is None else float(norm)

    def step(self) -> None:
        """Step, advance the schedule, clear the gradients."""
        self.learning_rate = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def sum_over_processes(self, values: Tensor) -> Tensor:
        """The sum of every process's tensor; no gradients."""
        if self.world_size == 1:
            return values
        summed: Tensor = self.accelerator.reduce(values, "sum")
        return summed

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over all processes."""
        everyone = self.communicator.all_gather(dict(values))
        return {name: sum(own[name] for own in everyone) for name in values}

    def track(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Give one step's values to the trackers."""
        self.accelerator.log({f"{stage}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """End what the trackers began. The processes stay together: another stage may follow."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    @contextlib.contextmanager
    def full_params(self) -> Iterator[None]:
        """While decoding and encoding: weights whole on this process, in the precision that training computes in."""
        from torch.distributed.fsdp import FSDPModule

        shards = [module for module in self.policy.modules() if isinstance(module, FSDPModule)]
        parameters = list(self.policy.parameters())
        with contextlib.ExitStack() as stack:
            if shards:
                for module in shards:
                    module.unshard()
                    stack.callback(module.reshard)
            elif (plugin := deepspeed_plugin(self.accelerator)) is not None and plugin.zero_stage == 3:
                with extra("deepspeed"):
                    import deepspeed

                # It takes the hooks away too, which would shard a layer again after its first call.
                stack.enter_context(deepspeed.zero.unwrap_model_for_generation(self.policy))
            elif self.accelerator.mixed_precision == "bf16":
                for parameter in parameters:
                    stack.callback(setattr, parameter, "data", parameter.data)
                    parameter.data = parameter.data.bfloat16()
            yield


def make_engine(model: SearchR3, recipe: Recipe, settings: StageSettings) -> Engine:
    """AdamW with linear warm-up and cosine decay to 0 over a stage's optimizer steps, on accelerate.

    Args:
        model: what learns; from here on it is driven through the engine's `policy`, and within `full_params`.
        recipe: precision, adapters, seed, trackers.
        settings: of the stage.

    Raises:
        ConfigError: the settings do not fit the machine or how the processes were launched.
    """
    with extra("train"):
        from accelerate import Accelerator, DataLoaderConfiguration
        from accelerate.utils import set_seed

    make_communicator().barrier()  # no process waits in a collective for one that could not load the data or the model
    set_seed(recipe.seed)  # before the adapters are drawn
    backbone = model.backbone
    backbone.prefixes.stop()  # FSDP and DeepSpeed write weights where nothing counts it
    stage, kl = _stage_and_kl(settings)
    copy = None
    choose_what_learns(backbone, recipe.lora)
    if not recipe.lora.rank:
        if kl is not None:
            copy = backbone.frozen_copy("bfloat16" if recipe.mixed_precision == "bf16" else None)
        if recipe.freeze_token_table:
            _hold_token_table(backbone)
    if recipe.gradient_checkpointing:
        _recompute_activations(backbone)
    _check_precision(recipe)
    check_trackers(recipe)
    accelerator = Accelerator(
        cpu=backbone.device.type == "cpu",
        mixed_precision=recipe.mixed_precision,
        # One batch is split among the processes, so the schedule advances once a step and not once a process.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        log_with=list(recipe.trackers) or None,
        project_dir=str(Path(recipe.run_dir) / "trackers"),
    )
    _fit_deepspeed(accelerator, settings)
    _fit_fsdp2(accelerator, recipe)
    _check_launch(accelerator, recipe, backbone)
    check_query_side(accelerator, recipe, backbone, kl)
    if recipe.lora.rank:
        accelerator.register_save_state_pre_hook(_keep_what_learns)
    policy = Policy(backbone, copy)
    optimizer = torch.optim.AdamW(
        _parameter_groups(policy, settings.learning_rate, recipe.lora.embed_row_rate),
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
    )
    steps = settings.steps * (settings.num_iterations if isinstance(settings, GRPOSettings) else 1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, settings.warmup_steps, steps)
    )
    policy, optimizer, scheduler = accelerator.prepare(policy, optimizer, scheduler)
    reference = make_reference(policy, copy) if kl is not None else None
    start_trackers(accelerator, recipe, stage)
    return Engine(accelerator, policy, optimizer, scheduler, make_communicator(), reference, recipe.lora.rank > 0)


def _stage_and_kl(settings: StageSettings) -> tuple[str, str | None]:
    """The stage that has these settings, and the name of the one that asks for a KL to where it began, if any does."""
    if isinstance(settings, SFTSettings):
        return "sft", "sft.kl_weight" if settings.kl_weight > 0 else None
    if isinstance(settings, GRPOSettings):
        return "grpo", "grpo.kl_coefficient" if settings.kl_coefficient > 0 else None
    return "distill", None


def _parameter_groups(policy: Policy, learning_rate: float, embed_row_rate: float) -> list[dict[str, Any]]:
    """What learns: matrices; norms, biases and token tables, which are not decayed; the adapters' embed row.

    The row, of the token table too, learns at a multiple of the rate.
    """
    tables = {id(one.weight) for one in policy.modules() if isinstance(one, torch.nn.Embedding)}
    groups: list[dict[str, Any]] = [
        {"params": []},
        {"params": [], "weight_decay": 0.0},
        {"params": [], "weight_decay": 0.0, "lr": learning_rate * embed_row_rate},
    ]
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            without_decay = parameter.ndim < 2 or id(parameter) in tables
            groups[2 if "trainable_tokens" in name else int(without_decay)]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def _hold_token_table(backbone: Backbone) -> None:
    """Let the embed token's row alone learn; AdamW leaves rows alone that never have a gradient."""

    def of_that_row(gradient: Tensor) -> Tensor:
        kept = torch.zeros_like(gradient)
        kept[backbone.embed_token_id] = gradient[backbone.embed_token_id]
        return kept

    backbone.causal_lm.get_input_embeddings().weight.register_hook(of_that_row)


def _recompute_activations(backbone: Backbone) -> None:
    lm = backbone.causal_lm
    # The name since transformers 5.20, and the one before.
    enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    backbone.model.train()  # transformers recomputes in training mode only


def _check_precision(recipe: Recipe) -> None:
    with extra("train"):
        from accelerate.state import AcceleratorState

    current = AcceleratorState().mixed_precision if AcceleratorState._shared_state else recipe.mixed_precision
    if current != recipe.mixed_precision:
        raise ConfigError(
            f"mixed_precision={recipe.mixed_precision}, but this process has begun with {current}, and accelerate "
            "keeps one for good: train in a process of its own"
        )


def _keep_what_learns(models: list[Any], weights: list[dict[str, Tensor]], folder: str) -> None:
    """Leave the frozen weights out of a checkpoint; accelerate calls it with what it is about to write."""
    for model, state in zip(models, weights, strict=False):  # FSDP2 and DeepSpeed write theirs in other ways
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        for name in set(state) - learning:
            del state[name]


def _fit_fsdp2(accelerator: Any, recipe: Recipe) -> None:
    """Let what the policy returns, and so all losses, and the sums of gradients stay in float32."""
    if accelerator.is_fsdp2 and recipe.mixed_precision == "bf16":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )


def _check_launch(accelerator: Any, recipe: Recipe, backbone: Backbone) -> None:
    """Refuse what cannot be trained as the processes were launched."""
    if accelerator.is_fsdp2 and not is_drivable(backbone.causal_lm):
        raise ModelError(
            f"{type(backbone.causal_lm).__name__} cannot be trained with FSDP2 here, since its layers are not "
            "decoded one by one; launch with DDP or DeepSpeed"
        )
    plugin = deepspeed_plugin(accelerator)
    if recipe.freeze_token_table and not recipe.lora.rank and (accelerator.is_fsdp2 or plugin is not None):
        raise ConfigError(
            "freeze_token_table=true needs gradients of whole tables: launch with DDP, or set lora.rank above 0, which "
            "freezes the table as well"
        )
    if recipe.lora.rank and plugin is not None and plugin.zero_stage == 3:
        raise ConfigError("lora.rank above 0 cannot be trained with ZeRO-3 here; launch with DDP, FSDP2 or ZeRO-2")


def deepspeed_plugin(accelerator: Any) -> Any:
    """Accelerate's plugin where DeepSpeed holds the weights, else None."""
    return getattr(accelerator.state, "deepspeed_plugin", None)


def _fit_deepspeed(accelerator: Any, settings: StageSettings) -> None:
    """Tell DeepSpeed what it would read off a data loader, that it clips, and that weights are saved whole."""
    from transformers.integrations import unset_hf_deepspeed_config

    plugin = deepspeed_plugin(accelerator)
    if plugin is not None:
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
        plugin.deepspeed_config["gradient_clipping"] = settings.max_grad_norm
        plugin.deepspeed_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
        # From here on transformers would load every model in shards: the next stage's, and the one of merged adapters.
        unset_hf_deepspeed_config()


def warmup_cosine(step: int, warmup_steps: int, steps: int, floor: float = 0.0) -> float:
    """Factor on the learning rate: linear to 1 over the warm-up, then half a cosine to `floor` at `steps`."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def rates(tokens: float, started: float, ready: float) -> dict[str, float]:
    """Times of a step that ends now, and its speed: all processes' `tokens` over the update, which began at `ready`."""
    now = time.perf_counter()
    return {"tokens_per_second": tokens / (now - ready), "update_seconds": now - ready, "seconds": now - started}


def load_model(recipe: Recipe, source: str | Path, stage: str = "sft") -> SearchR3:
    """A model for training, with its own prompts and the recipe's limits, on this process's device.

    Args:
        recipe: the settings.
        source: the model.
        stage: that begins from it; it may keep the documents' weights.

    Raises:
        ConfigError: the recipe names other prompts than those that are saved with the model, its limits do not fit
            into the context, the model has a query side of its own and documents are to move, or they cannot stay.
    """
    with extra("train"):
        from accelerate import PartialState

    device = str(PartialState(cpu=not torch.cuda.is_available()).device)
    files = find_files(source)
    frozen = keeps_documents(recipe, stage)
    check_begins(files, source, frozen)
    saved = read_settings(files.folder_of(SETTINGS_FILE))
    own = saved.prompts.name if saved is not None and saved.trained else None
    if None not in (own, recipe.prompts) and recipe.prompts != own:
        raise ConfigError(
            f"prompts={recipe.prompts}, but {source} was trained with the prompts {own!r}; leave prompts out of the "
            "recipe (it then takes the model's own), or start from the model's base"
        )
    backbone = load_backbone(
        source,
        prompts=None if own is not None else recipe.prompts,
        max_length=recipe.max_length,
        max_new_tokens=recipe.max_new_tokens,
        dtype=recipe.dtype,
        device=device,
        embed_start=recipe.embed_start,
        revision=files.commit,  # the commit whose settings were read
    )
    longest = recipe.max_length + recipe.max_new_tokens + 1  # a supervised reply goes on to the end of its turn
    if longest > backbone.context_length:
        raise ConfigError(
            f"max_length={recipe.max_length}, max_new_tokens={recipe.max_new_tokens} and the end of the turn do not "
            f"fit into the context of {source}, {backbone.context_length} tokens; lower them"
        )
    if frozen:
        check_documents(backbone, stage)
    return SearchR3(backbone if frozen else without_queries(backbone))
