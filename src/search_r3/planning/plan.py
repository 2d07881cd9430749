"""What a recipe takes before anything is loaded: memory per GPU, tokens and FLOP per step, time. Only arithmetic.

Memory: `footprint`. FLOP per token: arXiv 2204.02311, appendix B; here attention is causal, and what is computed more
than once (cached gradients, checkpointing) or not at all (gradients of frozen weights) is counted so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..config import Recipe
from .corpus import Corpus, Rates
from .footprint import DIRECT_REPLY, Job, Lengths, Stage
from .memory import Strategy
from .shape import read_shape

SPARE = 0.1
"""Share of a GPU's memory that a plan leaves to the allocator's gaps."""
CONTEXT_BYTES, NCCL_BYTES = 500_000_000, 500_000_000
"""What CUDA with cuBLAS keeps on a GPU, and what NCCL does where there are several; about."""


@dataclass(frozen=True)
class Speed:
    """How fast all GPUs together are: either trained tokens per second, or what one GPU reaches.

    Attributes:
        tokens_per_second: forward and backward passes; a token of which only the forward pass is computed counts a
            third.
        tflops: a GPU's peak in TFLOP/s.
        utilisation: share of it that is reached.
        decoded_per_second: tokens of rollouts, of all GPUs; by default at the same FLOP/s as the rest, which decoding
            seldom reaches.
        rates: of a process, at what is not the model's work.
    """

    tokens_per_second: float | None = None
    tflops: float = 990.0
    utilisation: float = 0.4
    decoded_per_second: float | None = None
    rates: Rates = field(default_factory=Rates)


@dataclass(frozen=True)
class MemoryPlan:
    """The answer.

    Attributes:
        stage: `sft`, `grpo` or `distill`.
        strategy: how the GPUs hold the weights.
        gpus: how many.
        parameters: weights by part; `adapters` and `trained` are named too.
        phases: bytes per GPU by phase and part; the largest sum is the peak.
        context: bytes that CUDA and NCCL keep on each GPU.
        host: bytes of the machine's memory, for all its processes, by part.
        tokens: of a step, by kind, all GPUs together.
        flops: of a step, by kind.
        steps: optimizer steps of the stage.
        seconds: of a step by part, with the given speed.
        start_seconds: once, by part.
    """

    stage: Stage
    strategy: Strategy
    gpus: int
    parameters: dict[str, int]
    phases: dict[str, dict[str, int]]
    context: int
    host: dict[str, int]
    tokens: dict[str, int]
    flops: dict[str, float]
    steps: int
    seconds: dict[str, float]
    start_seconds: dict[str, float]

    @property
    def step_seconds(self) -> float:
        """Of a step."""
        return sum(self.seconds.values())

    @property
    def stage_seconds(self) -> float:
        """Of all steps, and of what is done once."""
        return self.steps * self.step_seconds + sum(self.start_seconds.values())

    @property
    def peak_phase(self) -> str:
        """The phase that takes most memory."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> int:
        """Bytes per GPU at the peak."""
        return sum(self.phases[self.peak_phase].values())

    def time_lines(self) -> list[str]:
        """What a person is told of the time, the parts of a step in seconds, those of what is done once too."""
        step, start = (
            ", ".join(f"{name} {value:,.1f}" for name, value in parts.items())
            for parts in (self.seconds, self.start_seconds)
        )
        hours = self.stage_seconds / 3600
        lines = [f"time: {self.step_seconds:,.1f} s per step ({step}), {hours:,.1f} h for {self.steps:,} steps"]
        if start:
            lines.append(f"before the first step: {sum(self.start_seconds.values()):,.1f} s ({start})")
        return lines

    def fits(self, gpu_bytes: float) -> bool:
        """Whether the peak and `context` leave `SPARE` of a GPU's memory free."""
        return self.peak + self.context <= (1 - SPARE) * gpu_bytes

    def record(self) -> dict[str, Any]:
        """As JSON."""
        own = {"peak_phase": self.peak_phase, "peak_bytes": self.peak}
        return asdict(self) | own | {"step_seconds": self.step_seconds, "stage_seconds": self.stage_seconds}


def plan(
    recipe: Recipe,
    stage: Stage,
    *,
    gpus: int = 8,
    strategy: Strategy | None = None,
    documents: int = 100_000,
    queries: int = 10_000,
    lengths: Lengths | None = None,
    speed: Speed | None = None,
    config: Path | None = None,
) -> MemoryPlan:
    """MemoryPlan one stage of a recipe.

    Args:
        recipe: settings.
        stage: `sft`, `grpo` or `distill`.
        gpus: processes, one per GPU.
        strategy: by default FSDP2 on several GPUs.
        documents: of the corpus.
        queries: that a distillation learns from.
        lengths: of its texts.
        speed: what time is computed from.
        config: a `config.json` instead of that of `recipe.base`.

    Raises:
        ConfigError: a batch cannot be shared by so many GPUs, or the model's shape cannot be read.
        ModelError: the model's architecture is unknown here.

    Example:
        >>> from search_r3.config import load_recipe
        >>> plan(load_recipe(None), "sft", gpus=1).parameters["total"]
        1685056
    """
    strategy = strategy or ("fsdp2" if gpus > 1 else "single")
    shape, lengths = read_shape(recipe.base, config), (lengths or Lengths()).within(recipe)
    job = Job(recipe, shape, stage, gpus, strategy, documents, lengths, queries)
    job.check()
    work, corpus, speed = Work(job), Corpus(job), speed or Speed()
    tokens, flops = {kind: count for kind, (count, _, _) in work.kinds().items()}, work.flops()
    refreshed, encoding = work.refreshed(), work.encoding(documents) / work.rate(speed)
    return MemoryPlan(
        stage=stage,
        strategy=job.strategy,
        gpus=gpus,
        parameters=job.shape.parameters() | job.counts(),
        phases=job.phases(),
        context=CONTEXT_BYTES + (NCCL_BYTES if gpus > 1 else 0),
        host=job.host() | corpus.host(),
        tokens=tokens,
        flops=flops,
        steps=recipe.stage(stage).steps,
        seconds=work.seconds(tokens, flops, speed) | corpus.step_seconds(refreshed, encoding, speed.rates),
        start_seconds=corpus.start_seconds(encoding, speed.rates) | work.teacher_seconds(speed),
    )


def suggest(recipe: Recipe, stage: Stage, gpu_bytes: float, **arguments: Any) -> str:
    """What to change so that a stage fits, as little as possible; empty where nothing known is enough.

    Changes are added until it fits; then each is dropped, or made smaller, where it fits without it.

    Args:
        recipe: settings that do not fit.
        stage: `sft`, `grpo` or `distill`.
        gpu_bytes: memory of a GPU.
        arguments: of `plan`.
    """

    def fits(changes: Iterable[dict[str, Any]]) -> bool:
        joined = {name: value for change in changes for name, value in change.items()}
        return plan(_changed(recipe, joined), stage, **arguments).fits(gpu_bytes)

    tried: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    kept: dict[tuple[str, ...], dict[str, Any]] = {}
    for change in _changes(recipe, stage):
        names = tuple(change)
        tried.setdefault(names, [{}]).append(change)
        kept[names] = change
        if fits(kept.values()):
            break
    else:
        return ""
    for names, options in tried.items():
        kept[names] = next(option for option in options if fits((kept | {names: option}).values()))
    return " ".join(f"{name}={str(value).lower()}" for change in kept.values() for name, value in change.items())


def _changes(recipe: Recipe, stage: Stage) -> Iterator[dict[str, Any]]:
    """Overrides, each kept when the next is tried: first what changes no result, then soft tokens, then adapters."""
    if recipe.mixed_precision == "no" and recipe.dtype == "float32":
        yield {"mixed_precision": "bf16"}
    if not recipe.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    size = recipe.stage(stage).micro_batch_size or 2 * recipe.sft.batch_size
    while size > 1:
        size //= 2
        yield {f"{stage}.micro_batch_size": size}
    slots: int = getattr(recipe.stage(stage), "rollout_batch_size", 1)
    while slots > 8:
        slots //= 2
        yield {f"{stage}.rollout_batch_size": slots}
    for steps in range(recipe.sft.latent_steps - 1, 0, -1) if stage == "sft" else ():
        yield {"sft.latent_steps": steps}
    if recipe.lora.rank == 0:
        yield {"lora.rank": 32, "dtype": "bfloat16"}


def _changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    values = recipe.model_dump()
    for name, value in changes.items():
        *section, leaf = name.split(".")
        place = values[section[0]] if section else values
        place[leaf] = value
    return Recipe.model_validate(values)


@dataclass(frozen=True)
class Work:
    """What a stage computes in a step."""

    job: Job

    def kinds(self) -> dict[str, tuple[int, int, int]]:
        """Kind of sequence -> its tokens in a step, their length, and the forward passes that its work equals.

        Tokens are those of all GPUs together, padding apart.
        """
        recipe, lengths = self.job.recipe, self.job.lengths
        prompt, document = lengths.query + lengths.template, lengths.document + lengths.template
        reply = prompt + lengths.reasoning
        passes = 2 if recipe.lora.rank else 3  # a frozen weight has no gradient of its own to compute
        passes += recipe.gradient_checkpointing
        if self.job.stage == "sft":
            queries, passes = recipe.sft.batch_size, passes + recipe.sft.cached
            documents = {"documents": (self.job.batch_documents * document, document, passes)}
            steps = recipe.sft.latent_steps  # the prompt, and again with each soft token
            latent = {"latent": (queries * (prompt + steps * (prompt + 1) + sum(range(1, steps + 1))), prompt, passes)}
            return {
                "direct": (queries * prompt, prompt, passes),
                "reasoned": (queries * reply, reply, passes),
                **(documents if self.job.moves else {}),
                **(latent if steps else {}),
            }
        if self.job.stage == "distill":
            queries = self.job.step_queries
            held = {"replies": (queries * reply, reply, passes)} if recipe.distill.hold_weight > 0 else {}
            return {"direct": (queries * prompt, prompt, passes), **held}
        settings = recipe.grpo
        queries, rollouts = settings.queries_per_step, settings.queries_per_step * settings.group_size
        direct = {"direct": (settings.num_iterations * queries * prompt, prompt, passes)}
        sampling = {
            "prompts": (queries * prompt, prompt, 1),
            # A decoded token sees all before it.
            "rollouts": (rollouts * lengths.reasoning, 2 * prompt + lengths.reasoning, 1),
        }
        if settings.sampler.url is not None:  # that is another machine's, and whole replies are read
            sampling = {"read": (rollouts * reply, reply, 1)}
        return {
            **sampling,
            "refresh": (self.refreshed() * document, document, 1),
            "trained": (settings.num_iterations * rollouts * reply, reply, passes),
            **(direct if settings.direct_loss_weight > 0 else {}),
        }

    def encoding(self, documents: int) -> float:
        """FLOP of encoding so many documents."""
        length = self.job.lengths.document + self.job.lengths.template
        return documents * length * self.forward(length)

    def refreshed(self) -> int:
        """Documents encoded per step, at most: by the policy, and the positives (one per query); frozen ones: none."""
        if not self.job.moves:
            return 0
        if self.job.stage == "sft":
            return self.job.batch_documents
        settings = self.job.recipe.grpo.refresh
        positives = self.job.recipe.grpo.queries_per_step
        rollouts = positives * self.job.recipe.grpo.group_size
        sample = settings.drift_sample if settings.correct_drift or settings.policy == "drift" else 0
        match settings.policy:
            case "full":
                return self.job.documents
            case "periodic":
                chosen = self.job.documents // settings.every
            case "shortlist":
                chosen = rollouts * settings.depth
            case "selective":
                reach: int = sum(settings.neighbours**hop for hop in range(settings.hops + 1))
                chosen = (rollouts * settings.depth + positives) * reach
            case _:
                chosen = 0
        if settings.max_documents is not None:
            chosen = max(0, min(chosen, settings.max_documents - positives))
        return min(self.job.documents, positives + chosen + sample)

    def flops(self) -> dict[str, float]:
        """FLOP of a step by kind: 2 per weight and token forward, twice that backward, and the extra passes."""
        kinds, prompt = self.kinds(), self.job.lengths.query + self.job.lengths.template
        flops = {kind: tokens * self.forward(length) * passes for kind, (tokens, length, passes) in kinds.items()}
        flops["logits"] = 2.0 * self.job.shape.table * self._logits()
        if self.job.stage == "sft" and self.job.has_reference:
            flops["reference"] = (
                self.job.recipe.sft.batch_size * prompt * (self.forward(prompt) + 2.0 * self.job.shape.table)
            )
        elif self.job.has_reference:
            tokens, length, _ = kinds["trained"]
            flops["reference"] = tokens * self.forward(length)
        return flops

    def forward(self, length: float) -> float:
        """FLOP of one token's forward pass through all blocks in a sequence of that length.

        Two products with causal attention, of which a token sees half of the sequence on average.
        """
        return self.job.shape.layers * (2.0 * self.job.shape.linear_weights + 2.0 * self.job.shape.query_width * length)

    def _logits(self) -> float:
        """Positions with logits, weighted by their passes."""
        times, lengths = 2 if self.job.recipe.lora.rank else 3, self.job.lengths
        if self.job.stage == "sft":
            prompt = lengths.query + lengths.template if self.job.has_reference else 0
            said = lengths.reasoning + DIRECT_REPLY + self.job.recipe.sft.latent_steps
            return times * self.job.step_queries * (said + prompt)
        if self.job.stage == "distill":
            return times * self.job.step_queries * lengths.reasoning * (self.job.recipe.distill.hold_weight > 0)
        replies = self.job.recipe.grpo.queries_per_step * self.job.recipe.grpo.group_size * lengths.reasoning
        return replies * (1 + times * self.job.recipe.grpo.num_iterations + self.job.has_reference)

    def teacher_seconds(self, speed: Speed) -> dict[str, float]:
        """Of the replies that a distillation learns from, which are made once."""
        if self.job.stage != "distill":
            return {}
        prompt = self.job.lengths.query + self.job.lengths.template
        decoded = self.job.queries * self.job.recipe.distill.samples * self.job.lengths.reasoning
        if speed.decoded_per_second is not None:
            return {"teacher": decoded / speed.decoded_per_second}
        return {"teacher": decoded * self.forward(2 * prompt + self.job.lengths.reasoning) / self.rate(speed)}

    def rate(self, speed: Speed) -> float:
        """FLOP per second of all GPUs together."""
        if speed.tokens_per_second is None:
            return self.job.gpus * speed.tflops * 1e12 * speed.utilisation
        mean = self.job.lengths.query + self.job.lengths.template + self.job.lengths.reasoning
        return speed.tokens_per_second * 3 * self.forward(mean)

    def seconds(self, tokens: Mapping[str, int], flops: Mapping[str, float], speed: Speed) -> dict[str, float]:
        """Of a step, on the GPUs: decoding, and all else."""
        decoded = {}
        if "rollouts" in tokens:
            whole = flops["rollouts"] / self.rate(speed)
            given = speed.decoded_per_second
            decoded["rollouts"] = whole if given is None else tokens["rollouts"] / given
        others = sum(count for kind, count in flops.items() if kind != "rollouts")
        return decoded | {"model": others / self.rate(speed)}
