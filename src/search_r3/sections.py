"""Sections of a recipe that stand by themselves: the small base model, dev evaluations, distillation, evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .loader import Section


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


class DevSettings(Section):
    """Evaluation on `evaluation.dev_split` while a stage trains."""

    evaluate_every: int = Field(0, ge=0, description="Steps between evaluations on `evaluation.dev_split`; 0: none.")
    keep: Literal["last", "best"] = Field(
        "last", description="Model left: the last, or the best on dev in reason mode."
    )
    patience: int | None = Field(None, ge=1, description="Evaluations without a better one that stop it; null: never.")

    @model_validator(mode="after")
    def _need_evaluations(self) -> DevSettings:
        if self.evaluate_every == 0 and (self.keep == "best" or self.patience is not None):
            raise ValueError(
                f"keep={self.keep}, patience={self.patience}, evaluate_every=0: nothing says what is best; raise "
                "evaluate_every"
            )
        return self


class DistillSettings(DevSettings):
    """Reasoning distilled into one glance: direct vectors learn from the model's own reasoned vectors."""

    steps: int = Field(300, ge=1, description="Optimizer steps.")
    batch_size: int = Field(48, ge=1, description="Queries per step.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak rate; linear warm-up, cosine to 0.")
    warmup_steps: int = Field(10, ge=0, description="Steps of linear warm-up.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's, as in stage 1.")
    splits: tuple[str, ...] = Field(
        (),
        description="Splits whose queries are learned from; none: every query of the collection, judged or not, but "
        "for those of `evaluation.dev_split` and `test_split`.",
    )
    target: Literal["scores", "vector"] = Field(
        "scores",
        description="What the direct vector learns: the reasoned vector's scores of the best documents (a KL between "
        "softmaxes), or the vector itself (1 - cosine).",
    )
    depth: int = Field(
        50,
        ge=2,
        description="scores: best documents of each reasoned vector; those of all queries of a batch are scored for "
        "each of them.",
    )
    score_temperature: float = Field(0.05, gt=0, description="scores: tau of both softmaxes.")
    samples: int = Field(1, ge=1, description="Replies to each query: 1 is the greedy one, more are sampled.")
    sampling_temperature: float = Field(1.0, gt=0, description="Of sampled replies.")
    teacher: Literal["mean", "best"] = Field(
        "mean",
        description="Of several replies: the mean of their vectors, or the reply whose vector ranks best, which needs "
        "judgements of the queries.",
    )
    hold_weight: float = Field(
        1.0,
        ge=0,
        description="Weight of what holds reason mode: cross-entropy of the model's own replies, and 1 - cosine of "
        "their vectors to what they were.",
    )
    rollout_batch_size: int = Field(256, ge=1, description="Replies decoded at once; changes results by rounding.")
    micro_batch_size: int = Field(128, ge=1, description="Sequences per forward and backward pass; memory only.")
    evaluate_every: int = Field(50, ge=0, description="Steps between evaluations on `evaluation.dev_split`; 0: none.")

    @model_validator(mode="after")
    def _a_choice_to_make(self) -> DistillSettings:
        if self.teacher == "best" and self.samples == 1:
            raise ValueError("teacher=best chooses among several replies, and samples=1; raise samples")
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
