"""Memory per GPU of a stage of a recipe, by phase and part: the formulas of `memory` applied to its settings.

Sources: AdamW's state and the three ZeRO stages, arXiv 1910.02054, section 3; DeepSpeed's own
`estimate_zero2_model_states_mem_needs` (4 bytes per weight and 16 shared) and `..zero3..` (18 shared); FSDP2: torch's
`fully_shard` with one unit per block and one for the tables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..config import GRPOSettings, Recipe, SFTSettings
from ..errors import ConfigError
from ..sections import DistillSettings
from . import memory
from .memory import FULL, HALF, Pass, Precision, Strategy
from .shape import ModelShape

Stage = Literal["sft", "grpo", "distill"]
ENCODING_TOKENS = 32_768
"""Tokens of documents encoded together on a GPU (`model/documents.py`)."""
OPTIMIZER_MOMENTS = 2
DIRECT_REPLY = 8
"""Tokens of the direct form's reply, about."""
TEACHER_QUERIES = 64
"""Queries of a distillation whose replies are decoded together (`training/modes/teacher.py`)."""
SKETCH = 0.5
"""Of a vector's coordinates, the share that its sketch has at most (`environment/sketch.py`)."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of the texts of a collection, prompts' templates apart.

    Attributes:
        query: mean of a query.
        document: mean of a document.
        reasoning: mean of a reasoning trace or of a rollout's reasoning.
        longest_query: with it and the longest document memory is computed.
        longest_document: as cut at `max_length`.
        longest_reasoning: as cut at `max_new_tokens`.
        template: of the chat template and the wording around a text.
    """

    query: int = 24
    document: int = 180
    reasoning: int = 120
    longest_query: int = 128
    longest_document: int = 1_000_000
    longest_reasoning: int = 1_000_000
    template: int = 48

    def within(self, recipe: Recipe) -> Lengths:
        """Cut as the recipe cuts texts and replies."""
        room, budget = max(1, recipe.max_length - self.template), recipe.max_new_tokens
        return Lengths(
            query=min(self.query, room),
            document=min(self.document, room),
            reasoning=min(self.reasoning, budget),
            longest_query=min(max(self.longest_query, self.query), room),
            longest_document=min(max(self.longest_document, self.document), room),
            longest_reasoning=min(max(self.longest_reasoning, self.reasoning), budget),
            template=self.template,
        )


def _in_a_pass(settings: SFTSettings | GRPOSettings | DistillSettings, sequences: int, length: int) -> int:
    """Of so many sequences, all of `length` tokens, those that a pass holds."""
    limits = [settings.micro_batch_size, settings.micro_batch_tokens and max(1, settings.micro_batch_tokens // length)]
    return min(sequences, *(limit for limit in limits if limit is not None))


@dataclass(frozen=True)
class Job:
    """One stage of a recipe on some GPUs."""

    recipe: Recipe
    shape: ModelShape
    stage: Stage
    gpus: int
    strategy: Strategy
    documents: int
    lengths: Lengths
    queries: int = 10_000  # that a distillation learns from

    @property
    def section(self) -> SFTSettings | GRPOSettings | DistillSettings:
        """The settings of the stage."""
        return self.recipe.stage(self.stage)

    @property
    def precision(self) -> Precision:
        """In which bytes it computes."""
        return Precision.of(self.recipe, self.strategy)

    @property
    def trainable(self) -> int:
        """Weights that learn."""
        return self.shape.adapters(self.recipe.lora) if self.recipe.lora.rank else self.shape.total

    @property
    def has_reference(self) -> bool:
        """Whether a KL term needs a frozen model."""
        return {"sft": self.recipe.sft.kl_weight, "grpo": self.recipe.grpo.kl_coefficient}.get(self.stage, 0.0) > 0

    def counts(self) -> dict[str, int]:
        """Adapters, all weights, and those that learn."""
        adapters = self.shape.adapters(self.recipe.lora)
        return {"adapters": adapters, "total": self.shape.total + adapters, "trained": self.trainable}

    def check(self) -> None:
        """Refuse what the trainings refuse."""
        if self.gpus == 1 and self.strategy != "single":
            raise ConfigError(f"--strategy {self.strategy} is for several GPUs, and --gpus is 1")
        if self.gpus > 1 and self.strategy == "single":
            raise ConfigError(f"--strategy single is for one GPU, and --gpus is {self.gpus}")
        if self.step_queries < self.gpus:
            name = "queries_per_step" if self.stage == "grpo" else "batch_size"
            raise ConfigError(
                f"{self.stage}.{name} = {self.step_queries} cannot be shared by {self.gpus} GPUs; raise it"
            )

    def phases(self) -> dict[str, dict[str, int]]:
        """Bytes per GPU by phase and part."""
        resident = self.resident()
        learning = resident | self.gradients()
        phases = {"load": self.loading()}
        whole = resident | self.sampling_copy()
        # Outside of stage 2 all this ends before AdamW has moments.
        apart = {} if self.stage == "grpo" else {"optimizer": 0}
        if self.stage != "sft":
            phases["rollouts"] = whole | self.rollouts() | apart
        if self.stage == "grpo" or not self.moves:
            encoding = memory.encoding_memory(self.shape, ENCODING_TOKENS, self.sampling_bytes)
            phases["documents"] = whole | {"activations": encoding} | apart
        phases["train"] = learning | self.training()
        # The foreach kernels of AdamW hold the roots of all second moments at once.
        update = self.trainable * self.precision.trainable // (1 if self.strategy in ("single", "ddp") else self.gpus)
        phases["optimizer"] = resident | {"gradients": self.own_gradients(), "update": update}
        return {name: {part: size for part, size in parts.items() if size} for name, parts in phases.items()}

    def resident(self) -> dict[str, int]:
        """What stays on a GPU from the first step to the last."""
        precision, total, gpus = self.precision, self.shape.total, self.gpus
        frozen = total if self.recipe.lora.rank else 0
        adapters = self.shape.adapters(self.recipe.lora)
        moments = OPTIMIZER_MOMENTS * self.trainable * precision.trainable
        weights = total * precision.weights + adapters * FULL
        buckets = self.trainable * precision.trainable if self.strategy == "ddp" else 0
        if self.strategy == "fsdp2":
            weights, moments = weights // gpus, moments // gpus
        elif self.strategy in ("zero2", "zero3"):
            compute = precision.compute
            master = self.trainable * FULL if compute == HALF else 0
            weights, moments = (total + adapters) * compute, (moments + master) // gpus
            weights //= gpus if self.strategy == "zero3" else 1
            buckets = 2 * HALF * min(memory.ZERO_BUCKET, self.trainable)
        reference = 0
        if self.has_reference and not frozen:
            reference = total * (HALF if self.recipe.mixed_precision == "bf16" else precision.weights)
        parts = {"weights": weights, "reference": reference, "optimizer": moments, "buckets": buckets}
        return parts | {"index": self.index_bytes} if self.stage == "grpo" else parts

    @property
    def moves(self) -> bool:
        """Whether documents are encoded in the course of the stage."""
        return getattr(self.section, "documents", "frozen") == "moving"

    @property
    def index_rows(self) -> int:
        """Documents whose vectors a GPU holds in stage 2: its share, or all where a mechanism reads from everywhere."""
        settings = self.recipe.grpo.refresh
        whole = self.moves and (settings.correct_drift or settings.policy in ("selective", "drift"))
        return self.documents if whole else math.ceil(self.documents / self.gpus)

    @property
    def index_bytes(self) -> int:
        """Of these vectors, and of their sketches at their largest."""
        settings = self.recipe.grpo.refresh
        size = FULL if settings.dtype == "float32" else HALF
        sketch = HALF * SKETCH if settings.index == "approximate" else 0
        return int(self.index_rows * self.shape.hidden * (size + sketch))

    def own_gradients(self) -> int:
        """Gradients when all processes' are summed."""
        size = self.trainable * self.precision.trainable
        match self.strategy:
            case "fsdp2":
                return size // self.gpus
            case "zero2":
                return self.precision.compute * self.trainable + FULL * self.trainable // self.gpus
            case "zero3":
                return (self.precision.compute + HALF) * self.trainable // self.gpus
            case _:
                return size

    def gradients(self) -> dict[str, int]:
        """Gradients, and weights that are whole for a while; DDP's buckets are counted in `held`."""
        compute, own = self.precision.compute, self.own_gradients()
        # The gradient of a tied table waits for its second part until the end of the backward pass.
        tied = self.shape.table if self.shape.tied and not self.recipe.lora.rank else 0
        tables = self.shape.table * (1 if self.shape.tied else 2)
        if self.strategy == "fsdp2":
            units = compute * (tables + 2 * self.shape.block)
            # Each pass gives its gradients to the shards, summed in float32; until then those of two blocks and the
            # tables are whole.
            flying = FULL * min(tables + 2 * self.shape.block, self.trainable)
            return {"whole weights": units, "gradients": own + flying + compute * tied}
        if self.strategy == "zero3":
            live = compute * min(memory.ZERO_LIVE, self.shape.total)
            return {"whole weights": live, "gradients": own + compute * tied}
        size = compute if self.strategy == "zero2" else self.precision.trainable
        return {"gradients": own + size * tied}

    @property
    def step_queries(self) -> int:
        """Queries of a step."""
        section = self.section
        return section.queries_per_step if isinstance(section, GRPOSettings) else section.batch_size

    @property
    def own_queries(self) -> int:
        """Queries of a step on one GPU."""
        return math.ceil(self.step_queries / self.gpus)

    @property
    def batch_documents(self) -> int:
        """Documents of a stage-1 batch, if none is met twice."""
        settings = self.recipe.sft
        return settings.batch_size * (1 + settings.random_negatives + settings.hard_negatives)

    @property
    def own_documents(self) -> int:
        """Documents that one GPU computes in a stage-1 step, at most."""
        return math.ceil(self.batch_documents / self.gpus) if self.moves else 0

    @property
    def own_rollouts(self) -> int:
        """Rollouts of a stage-2 step on one GPU; of a distillation, those of the queries that reply together."""
        if isinstance(self.section, DistillSettings):
            return min(self.queries, TEACHER_QUERIES) * self.section.samples
        return self.own_queries * self.recipe.grpo.group_size

    def training(self) -> dict[str, int]:
        """Activations and logits of a forward and backward pass, and what contrastive losses compare."""
        return {"sft": self._sft_training, "grpo": self._grpo_training, "distill": self._distill_training}[self.stage]()

    def _sft_training(self) -> dict[str, int]:
        lengths, settings = self.lengths, self.recipe.sft
        prompt = lengths.template + lengths.longest_query
        reasoned, document = prompt + lengths.longest_reasoning, lengths.template + lengths.longest_document
        rows, columns = 2 * settings.batch_size, self.batch_documents
        latent_rows = settings.batch_size * self._latent_losses
        vectors = rows + columns + settings.batch_size * settings.latent_steps
        similarities = FULL * self.shape.hidden * 3 * vectors
        if not settings.cached:
            queries = self.own_queries
            passes = [Pass(queries, prompt + DIRECT_REPLY), Pass(queries, reasoned)]
            passes += [Pass(self.own_documents, document)] if self.moves else []
            passes += self._latent_passes(queries)
            parts = self._pass(passes, queries * (lengths.longest_reasoning + DIRECT_REPLY), queries * prompt, queries)
            return parts | {"contrastive": similarities + 6 * FULL * (rows + latent_rows) * columns}
        queries = _in_a_pass(settings, 2 * self.own_queries, reasoned)
        candidates = [self._pass([Pass(queries, reasoned)], queries * lengths.longest_reasoning, queries * prompt)]
        if self.moves:
            candidates.append(self._pass([Pass(_in_a_pass(settings, self.own_documents, document), document)], 0, 0))
        if settings.latent_steps:
            queries = _in_a_pass(settings, self.own_queries, prompt + settings.latent_steps)
            candidates.append(self._pass(self._latent_passes(queries), 0, 0, queries))
        largest = max(candidates, key=lambda parts: sum(parts.values()))
        return largest | {"contrastive": similarities + 6 * FULL * max(min(rows, 256), latent_rows) * columns}

    @property
    def _latent_losses(self) -> int:
        """Rows of similarities to the documents that each query has for its soft tokens."""
        steps = self.recipe.sft.latent_steps
        return {"words": 1, "gircse": steps, "laser": 3}[self.recipe.sft.latent_objective] if steps else 0

    def _latent_passes(self, queries: int) -> list[Pass]:
        """The prompts, and again with each soft token and the embed token behind it (`training/modes/think.py`)."""
        steps, prompt = self.recipe.sft.latent_steps, self.lengths.template + self.lengths.longest_query
        lengths = [prompt, *(prompt + step + 2 for step in range(steps))] if steps else []
        return [Pass(queries, length) for length in lengths]

    def _pass(self, passes: list[Pass], replies: int, prompts: int, latent: int = 0) -> dict[str, int]:
        """Parts of a stage-1 pass: `replies` and `prompts` are positions with logits, `latent` queries that think."""
        prompts = prompts if self.has_reference else 0
        settings, logits = self.recipe.sft, memory.logits_memory(self.shape.vocabulary, replies, prompts)
        if not (settings.latent_steps and latent):
            return self._activations(passes, logits)
        says = settings.latent_objective == "words"
        kept = memory.soft_token_memory(self.shape, latent, settings.latent_steps, says, self.precision)
        parts = self._activations(passes, max(logits, 2 * FULL * latent * self.shape.vocabulary))
        return {"soft tokens": kept} | parts

    def _activations(self, passes: list[Pass], logits: int) -> dict[str, int]:
        """Activations of passes that are held together, at the peak: either the losses or a block's backward pass.

        Args:
            passes: of the step's graph.
            logits: bytes of logits while the losses are computed; none are left when their gradients are.
        """
        shape, precision, lora = self.shape, self.precision, self.recipe.lora
        checkpointing = self.recipe.gradient_checkpointing
        kept = sum(memory.kept_activations(shape, size, precision, lora, checkpointing) for size in passes)
        work = max(memory.backward_work(shape, size, precision, lora, checkpointing) for size in passes)
        casts = memory.cast_weights(shape, precision, lora, checkpointing)
        waiting = self._waiting_gradients() if len(passes) > 1 else 0
        # By then the last pass has its gradients, and keeps nothing.
        waiting = max(0, waiting - memory.kept_activations(shape, passes[-1], precision, lora, checkpointing))
        if checkpointing and casts:
            work += precision.compute * shape.linear_weights  # cast again with the block
        moments = [{"logits": logits, "waiting gradients": waiting}, {"block": work, "waiting gradients": waiting}]
        if checkpointing:
            moments.append({"casts": casts})  # they end with the forward pass
        largest = max(moments, key=lambda parts: sum(parts.values()))
        return {"activations": kept, "casts": 0 if checkpointing else casts} | largest

    def _waiting_gradients(self) -> int:
        """Those of weights that several passes of a graph share: autograd adds them up before it hands them over.

        A tied table's are counted in `gradients`.
        """
        if self.recipe.lora.rank:
            return self.precision.adapters * self.trainable
        return self.precision.compute * (self.trainable - (self.shape.table if self.shape.tied else 0))

    def _grpo_training(self) -> dict[str, int]:
        settings, lengths = self.recipe.grpo, self.lengths
        length = lengths.template + lengths.longest_query + lengths.longest_reasoning
        rollouts = _in_a_pass(settings, self.own_rollouts, length)
        logits = memory.rollout_logits_memory(
            self.shape.vocabulary, rollouts * lengths.longest_reasoning, self.has_reference
        )
        parts = self._activations([Pass(rollouts, length)], logits)
        if settings.pathwise:
            documents = min(self.documents, rollouts * (settings.embedding_depth + 1))
            parts["nearest documents"] = FULL * documents * (self.shape.hidden + 4 * rollouts)
        return parts

    def _distill_training(self) -> dict[str, int]:
        """The larger of two passes: direct prompts, or whole replies, which hold reason mode; no document is computed.

        Beside it lie the best documents of all teachers, and the scores that a pass gives them.
        """
        settings, lengths = self.recipe.distill, self.lengths
        prompt = lengths.template + lengths.longest_query
        direct = _in_a_pass(settings, self.own_queries, prompt)
        candidates = [self._activations([Pass(direct, prompt)], 0)]
        if settings.hold_weight > 0:
            length = prompt + lengths.longest_reasoning
            replies = _in_a_pass(settings, self.own_queries, length)
            logits = memory.logits_memory(self.shape.vocabulary, replies * lengths.longest_reasoning, 0)
            candidates.append(self._activations([Pass(replies, length)], logits))
        scored = min(self.documents, settings.batch_size * settings.depth) if settings.target == "scores" else 0
        largest = max(candidates, key=lambda parts: sum(parts.values()))
        return largest | {"best documents": FULL * scored * (self.shape.hidden + 6 * direct)}

    @property
    def sampling_bytes(self) -> int:
        """Of a weight while decoding."""
        return HALF if self.recipe.mixed_precision == "bf16" else self.precision.compute

    def sampling_copy(self) -> dict[str, int]:
        """Whole weights for decoding and encoding, where the held ones are shards or of another type."""
        whole = self.strategy in ("single", "ddp", "zero2")
        if (whole and self.sampling_bytes == self.precision.weights) or self.strategy == "zero2":
            return {}
        return {"sampling copy": self.sampling_bytes * self.counts()["total"]}

    def rollouts(self) -> dict[str, int]:
        """The decoder's keys and values, and what choosing tokens takes."""
        section = self.recipe.distill if self.stage == "distill" else self.recipe.grpo
        slots = min(section.rollout_batch_size, self.own_rollouts)
        prompt = self.lengths.template + self.lengths.longest_query
        size = self.sampling_bytes
        if (
            self.stage == "grpo" and self.recipe.grpo.sampler.url is not None
        ):  # replies come from elsewhere, and are read
            states = memory.encoding_memory(self.shape, memory.PREFILL_TOKENS, size)
            return {"activations": states, "logits": memory.LOGIT_ROWS * self.shape.vocabulary * (size + 3 * FULL)}
        cache = memory.cache_memory(self.shape, slots, prompt, self.lengths.longest_reasoning, size)
        return {"rollout cache": cache, "logits": memory.sampling_memory(self.shape, slots, size)}

    def loading(self) -> dict[str, int]:
        """Every process loads the model whole, and copies it for the KL, before it is sharded."""
        stored = self.shape.total * (FULL if self.recipe.dtype == "float32" else HALF)
        resident = self.resident()
        copy = stored if resident["reference"] else 0
        shards = resident["weights"] if self.strategy in ("fsdp2", "zero3") else 0
        return {"weights": stored, "reference": max(copy, resident["reference"]), "shards": shards}

    def host(self) -> dict[str, int]:
        """Memory of the machine that the models take while every process reads one."""
        return {"loading": self.gpus * self.shape.total * (FULL if self.recipe.dtype == "float32" else HALF)}
