"""The settings of a training, and recipes: YAML files of them, with `key=value` overrides.

Defaults are common values of the field; the recipes set what the experiments in `docs/log.md` chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, model_validator

from .loader import Section, load_settings
from .sections import DistillSettings, PassSettings, RefreshSettings, SamplerSettings

Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class BaseModelSettings(Section):
    """Making a small base model (`search-r3 base`)."""

    steps: int = Field(1500, ge=1, description="Optimizer steps.")
    batch_size: int = Field(32, ge=1, description="Packed sequences per step.")
    sequence_length: int = Field(128, ge=16, description="Tokens per packed sequence.")
    learning_rate: float = Field(3e-3, gt=0, description="Peak rate; cosine to 5 % after 50 warm-up steps.")
    vocab_size: int = Field(3072, ge=300, description="Tokenizer entries, special tokens included.")
    hidden_size: int = Field(192, ge=64, description="D, a multiple of 64.")
    layers: int = Field(2, ge=1, description="Transformer blocks.")
    intermediate_size: int = Field(768, ge=32, description="Width of the MLP.")


class SFTSettings(PassSettings):
    """Stage 1: `L = L_SFT + L_KL + L_InfoNCE + L_TripletMargin`."""

    steps: int = Field(600, ge=1, description="Optimizer steps.")
    batch_size: int = Field(24, ge=2, description="Queries per step.")
    learning_rate: float = Field(1.5e-3, gt=0, description="Peak rate; linear warm-up, cosine to 0.")
    warmup_steps: int = Field(20, ge=0, description="Steps of linear warm-up.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's, of matrices; not of norms, biases, token tables.")
    splits: dict[str, Share] = Field({"facts": 0.5, "sft": 0.5}, description="Share of each batch drawn from a split.")
    batching: Literal["mixed", "homogeneous"] = Field(
        "mixed",
        description="mixed: each example's split is drawn by its share, the example uniformly, with replacement. "
        "homogeneous: a whole batch comes from one split, in passes without replacement, and no two of its examples "
        "share a query text or a positive; a batch may then be smaller than batch_size.",
    )
    untraced: Literal["embed", "direct"] = Field(
        "embed",
        description="What reason mode learns from a query without a trace: to embed at once, or (direct) nothing.",
    )
    at_once: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the traces that are left out, drawn anew at each use: there reason mode embeds at once, "
        "so that stage 2 can teach it when to (grpo.at_once).",
    )
    swapped_traces: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of reasoned sequences that hold another query's trace: their vector learns, the trace is "
        "not supervised. So the vector is not taught to believe whatever is written.",
    )
    uninstructed: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the queries with an `instruction` that are trained without it, drawn anew at each use.",
    )
    reasoning_styles: dict[str, Share] = Field(
        {"chain": 0.6, "restate": 0.4},
        description="Sampling weight of each style of reasoning trace; a query that has one trace uses it.",
    )
    read_styles: tuple[str, ...] = Field(
        (),
        description="Styles that are read and not written: the vector learns, the trace is not supervised. For the "
        "model's own replies, wrong ones among them, so that the vector learns how far to trust them.",
    )
    random_negatives: int = Field(1, ge=0, description="Random negatives per query.")
    hard_negatives: int = Field(
        1,
        ge=0,
        description="Hard negatives per query: those that its metadata names (`search-r3 data mine`), else those that "
        "BM25 finds, unstemmed, when training starts.",
    )
    cross_entropy_weight: float = Field(1.0, ge=0, description="Weight of L_SFT.")
    kl_weight: float = Field(0.0, ge=0, description="Weight of L_KL to the base; above 0 it costs a second model.")
    info_nce_weight: float = Field(1.0, ge=0, description="Weight of L_InfoNCE.")
    triplet_weight: float = Field(1.0, ge=0, description="Weight of L_TripletMargin.")
    contrastive_temperature: float = Field(0.05, gt=0, description="tau of InfoNCE.")
    triplet_margin: float = Field(0.1, ge=0, le=2, description="theta of the triplet loss, in cosine.")
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="Sequences per forward and backward pass. With it or micro_batch_tokens gradients are cached "
        "(arXiv 2101.06983): batch_size costs no memory, but one more forward pass. Neither: the whole batch at once.",
    )
    matryoshka_dimensions: tuple[int, ...] = Field(
        (),
        description="Prefixes of the vector that L_InfoNCE and L_TripletMargin are taken of too; the losses of all "
        "sizes are averaged (arXiv 2205.13147).",
    )
    documents: Literal["moving", "frozen"] = Field(
        "moving",
        description="moving: documents learn with the queries. frozen: they keep the weights that the stage begins "
        "from, an index made before stays valid, and negatives cost next to nothing.",
    )
    latent_steps: int = Field(
        0, ge=0, description="K, soft tokens that mode latent is trained with, beside the other modes; 0: it is not."
    )
    latent_objective: Literal["words", "laser", "gircse"] = Field(
        "words",
        description="words: each soft token is to say its piece of the trace. laser, gircse: the published objectives, "
        "to compare with; on atlas they teach nothing (docs/modes.md).",
    )
    latent_weight: float = Field(
        0.3,
        ge=0,
        description="Weight of the losses of mode latent among the others; with 1 reason mode pays (docs/log.md).",
    )

    @property
    def cached(self) -> bool:
        """Whether the batch is computed in passes, with cached gradients."""
        return self.micro_batch_size is not None or self.micro_batch_tokens is not None

    @model_validator(mode="after")
    def _need_splits(self) -> SFTSettings:
        if sum(self.splits.values()) <= 0:
            raise ValueError(f"splits={self.splits}: no split has a share; name one or more, such as {{train: 1.0}}")
        return self

    @model_validator(mode="after")
    def _need_negatives(self) -> SFTSettings:
        if self.triplet_weight > 0 and self.random_negatives + self.hard_negatives == 0:
            raise ValueError(
                f"triplet_weight={self.triplet_weight} needs negatives, but random_negatives=0 and hard_negatives=0; "
                "set triplet_weight=0 or ask for negatives"
            )
        return self

    @model_validator(mode="after")
    def _know_read_styles(self) -> SFTSettings:
        if unknown := sorted(set(self.read_styles) - set(self.reasoning_styles)):
            raise ValueError(
                f"read_styles names {', '.join(unknown)}, which reasoning_styles gives no weight "
                f"({', '.join(self.reasoning_styles)})"
            )
        return self


class LoRASettings(Section):
    """Low-rank adapters (arXiv 2106.09685), and the embed token's row of the token table, learn; nothing else does."""

    rank: int = Field(0, ge=0, description="Rank of the adapters; 0 trains all weights.")
    alpha: int = Field(32, gt=0, description="The adapters' output is multiplied by alpha / rank.")
    target_modules: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="Names of the linear layers that get adapters.",
    )
    embed_row_rate: float = Field(
        1.0, gt=0, description="The embed token's row learns at this multiple of the learning rate."
    )


class RewardSettings(Section):
    """Weights of the reward's parts, whose weighted sum it is, and what the parts need."""

    ndcg: float = Field(1.0, ge=0, description="nDCG@k of the rollout's vector over the live corpus, 0 to 1.")
    log_rank: float = Field(
        0.5, ge=0, description="1 - log(rank) / log(1000) of the relevant documents, the mean; 0 to 1, 0 from 1,000 on."
    )
    contrastive: float = Field(
        0.5, ge=0, description="Softmax probability of the relevant among the index's best; moves where all rank first."
    )
    format: float = Field(0.1, ge=0, description="1 if the model emitted the embed token itself, else 0.")
    length: float = Field(0.0, ge=0, description="0 up to three quarters of the budget, -1 where it is used up.")
    tokens: float = Field(0.0, ge=0, description="A price per token: minus the used share of the budget, -1 to 0.")
    custom: float = Field(1.0, ge=0, description="What `function` returns.")
    function: str | None = Field(
        None,
        pattern=r"^[\w.]+:\w+$",
        description="`module:function`, a part of your own: `environment.reward.RewardFunction`.",
    )
    forced_ranks: bool = Field(
        False, description="Whether replies whose embed token was forced earn ndcg, log_rank and contrastive."
    )
    contrastive_temperature: float = Field(0.05, gt=0, description="tau of the part contrastive.")
    contrastive_depth: int = Field(100, ge=1, description="Best documents of the index that contrastive looks at.")


class GRPOSettings(PassSettings):
    """Stage 2: GRPO with the retrieval reward."""

    steps: int = Field(60, ge=1, description="Optimizer steps (with num_iterations=1, one per batch of rollouts).")
    queries_per_step: int = Field(16, ge=1, description="Q, queries per batch of rollouts.")
    group_size: int = Field(8, ge=2, description="G, rollouts per query.")
    num_iterations: int = Field(1, ge=1, description="Passes over each batch of rollouts.")
    learning_rate: float = Field(3e-4, gt=0, description="Peak rate; linear warm-up, cosine to 0.")
    warmup_steps: int = Field(5, ge=0, description="Steps of linear warm-up.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's, as in stage 1.")
    splits: tuple[str, ...] = Field(("rl",), min_length=1, description="Splits whose queries are rolled out.")
    uninstructed: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the queries with an `instruction` that are rolled out without it, whole groups.",
    )
    sampling_temperature: float = Field(1.0, gt=0, description="Temperature of rollouts; log-probabilities use it too.")
    clip_epsilon: float = Field(0.2, gt=0, lt=1, description="PPO clip range of the probability ratio.")
    kl_coefficient: float = Field(0.0, ge=0, description="Weight of the KL to the stage-1 model (k3 estimate).")
    advantage_scale: Literal["group", "batch", "none"] = Field(
        "batch",
        description="What centred rewards are divided by: the group's, the batch's standard deviation, or 1.",
    )
    baseline: Literal["group_mean", "leave_one_out", "direct"] = Field(
        "group_mean",
        description="What is taken from a reward: the mean of its group, of the group's others, or what direct mode "
        "earns with the same weights, so that reasoning is paid for what it adds.",
    )
    at_once: bool = Field(
        False,
        description="Of each group one reply embeds at once and the others write, so that the policy learns when to; "
        "in mode auto its own first token then decides (docs/modes.md). Give tokens a price: reward.tokens.",
    )
    redraws: int = Field(
        0, ge=0, description="Times that a step replaces groups whose ranks are all alike by other queries'."
    )
    curriculum: int = Field(
        1,
        ge=1,
        description="Queries looked at in direct mode for each that is rolled out; those that it ranks 2 to 1,000 come "
        "first. 1: none.",
    )
    embedding_loss_weight: float = Field(
        0.0, ge=0, description="Weight of InfoNCE on the rollouts' own vectors against the best of their rankings."
    )
    embedding_loss_on: Literal["all", "winners"] = Field(
        "all",
        description="The rollouts that it is taken of. winners: those with an advantage above 0, so that the vector is "
        "not taught to find the way after reasoning that leads astray, that is, to look past what is written.",
    )
    direct_loss_weight: float = Field(0.0, ge=0, description="Weight of the same InfoNCE on the direct vectors.")
    embedding_depth: int = Field(100, ge=1, description="Best documents of a ranking that these terms look at.")
    contrastive_temperature: float = Field(0.05, gt=0, description="tau of these terms.")
    reward: RewardSettings = RewardSettings()
    reward_k: int = Field(10, ge=1, description="k of the nDCG in the reward.")
    documents: Literal["moving", "frozen"] = Field(
        "moving",
        description="moving: documents follow the weights, as `refresh` says. frozen: they keep those that the stage "
        "began from, an index made before stays valid, and of `refresh` only `index` and `dtype` count.",
    )
    refresh: RefreshSettings = RefreshSettings()
    sampler: SamplerSettings = SamplerSettings()
    rollout_batch_size: int = Field(256, ge=1, description="Rollouts decoded at once; changes results by rounding.")
    micro_batch_size: int = Field(128, ge=1, description="Rollouts per forward and backward pass; changes memory only.")
    evaluate_every: int = Field(10, ge=0, description="Steps between evaluations on `evaluation.dev_split`; 0: none.")

    @property
    def pathwise(self) -> bool:
        """Whether a vector is trained by InfoNCE."""
        return self.embedding_loss_weight > 0 or self.direct_loss_weight > 0

    @model_validator(mode="after")
    def _a_baseline_that_fits(self) -> GRPOSettings:
        if self.baseline == "direct" and self.advantage_scale == "group":
            raise ValueError(
                "baseline=direct with advantage_scale=group divides by 0 where all rewards of a group are equal, but "
                "not direct mode's; set advantage_scale=batch"
            )
        if self.at_once and (self.baseline == "direct" or self.group_size < 3):
            raise ValueError(
                f"at_once=true with baseline={self.baseline}, group_size={self.group_size}: one reply of each group is "
                "direct, and the others are compared with each other; set baseline=group_mean, and 3 replies or more"
            )
        return self


class EvaluationSettings(Section):
    """What is evaluated, and on which queries."""

    dev_split: str = Field("dev", description="Split looked at during training.")
    test_split: str = Field("test", description="Split read once, by the final evaluation.")
    batch_size: int = Field(128, ge=1, description="Queries reasoned about at once; changes results by rounding.")
    rollout_queries: int = Field(
        64, ge=1, description="Test queries whose sampled rollouts are scored before and after RL."
    )
    permutations: int = Field(10_000, ge=100, description="Permutations of the paired randomisation tests.")
    bootstrap: int = Field(1_000, ge=100, description="Resamples of the confidence intervals.")

    @property
    def held_out(self) -> list[str]:
        """The splits that are measured on."""
        return list(dict.fromkeys((self.dev_split, self.test_split)))


class Recipe(Section):
    """One training, from collection to report."""

    name: str = Field("quickstart", description="Name of the run.")
    run_dir: str = Field("runs/quickstart", description="Where everything is written.")
    seed: int = Field(0, ge=0, description="Seed of sampling, shuffling and initialisation.")
    collection: str = Field(
        "atlas", description="`atlas`, `atlas-wide` (`:SEED` divides by another seed), or a folder in the BEIR layout."
    )
    base: str = Field(
        "builtin", description="`builtin` (the package's own), `smol`, a directory, a GGUF file or a hub id."
    )
    prompts: Literal["search-r3", "published", "thinking"] | None = Field(
        None, description="Prompt set, saved with the model; null: the one of `base`, or search-r3 where it has none."
    )
    embed_start: Literal["mean", "end_of_turn"] = Field(
        "mean",
        description="Where a new embed token's row starts: at the mean of all rows, or at the row of the token that "
        "ends a turn, which also says that the reply is over.",
    )
    freeze_token_table: bool = Field(
        False,
        description="Of the table of input tokens the embed token's row alone learns, as it is with adapters. AdamW "
        "moves the rows of rare tokens far, and a small model then no longer copies them.",
    )
    max_length: int = Field(128, ge=8, description="Longest prompt in tokens; longer texts lose their end, counted.")
    max_new_tokens: int = Field(64, ge=1, description="Reasoning budget in tokens, the embed token included.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Of the weights; bfloat16: under adapters.")
    mixed_precision: Literal["no", "bf16"] = Field(
        "no", description="bf16: compute in bfloat16 while weights and optimizer stay as `dtype` says."
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass instead of keeping them."
    )
    lora: LoRASettings = LoRASettings()
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        (), description="Where metrics go beside metrics.jsonl, through accelerate; each needs its own package."
    )
    save_every: int = Field(50, ge=1, description="Steps between checkpoints.")
    base_model: BaseModelSettings = BaseModelSettings()
    sft: SFTSettings = SFTSettings()
    grpo: GRPOSettings = GRPOSettings()
    distill: DistillSettings = DistillSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _weights_that_can_learn(self) -> Recipe:
        if self.dtype == "bfloat16" and self.lora.rank == 0:
            raise ValueError(
                "dtype=bfloat16 with lora.rank=0 would train weights in bfloat16, where most updates at usual rates "
                "round to nothing; set dtype=float32 and mixed_precision=bf16 (products in bfloat16), or lora.rank=16 "
                "(adapters over frozen bfloat16 weights)"
            )
        return self

    def stage(self, name: str) -> SFTSettings | GRPOSettings | DistillSettings:
        """The section of a stage: `sft`, `grpo` or `distill`."""
        stages: dict[str, SFTSettings | GRPOSettings | DistillSettings]
        stages = {"sft": self.sft, "grpo": self.grpo, "distill": self.distill}
        return stages[name]


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply `key=value` overrides (`grpo.steps=10`); values are read as YAML.

    Where a recipe says `extends: other.yaml` (a path relative to its own folder), it has the values of that one, which
    may extend a third, except for those that it sets itself. Sections are merged, all else is replaced.

    Example:
        >>> load_recipe(None, ["grpo.steps=10"]).grpo.steps
        10

    Raises:
        ConfigError: a file cannot be read or extends itself, a key is unknown (the nearest known one is named) or a
            value does not fit; the message names the file that holds it.
    """
    return load_settings(Recipe, path, overrides)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved settings as YAML, readable by `load_recipe`."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
