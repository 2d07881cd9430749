"""Sections of a recipe that stand by themselves: what stages share, the moving corpus, samplers, distillation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from .loader import Section


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


class PassSettings(DevSettings):
    """What a stage computes at once, beside its `micro_batch_size`."""

    micro_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens per forward and backward pass at most, padding included, beside micro_batch_size; a longer "
        "sequence is a pass of its own. Changes memory and speed only. Null: no such limit.",
    )


def _no_bare_value(value: Any, setting: str) -> Any:
    """Refuse a text in the place of a section, and say which of its settings was meant."""
    if isinstance(value, str):
        raise ValueError(f"{setting.partition('.')[0]} is a section; write {setting}={value}")
    return value


class RefreshSettings(Section):
    """How document vectors follow the model (docs/method.md, "The moving corpus")."""

    policy: Literal["never", "periodic", "drift", "shortlist", "selective", "full"] = Field(
        "full", description="Rung of the ladder; whatever it is, the positives of the batch are encoded freshly."
    )
    every: int = Field(10, ge=1, description="periodic: versions between two refreshes of the whole corpus.")
    depth: int = Field(10, ge=1, description="shortlist, selective: L, the top documents of each rollout looked at.")
    hops: int = Field(1, ge=0, description="selective: steps in the neighbour graph from shortlist and positives.")
    neighbours: int = Field(10, ge=1, le=100, description="selective: links per document in the neighbour graph.")
    max_documents: int | None = Field(
        None, ge=1, description="Budget: documents encoded per step; positives count but are never left out."
    )
    max_tokens: int | None = Field(None, ge=1, description="Budget: tokens encoded per step, counted in the same way.")
    correct_drift: bool = Field(
        False, description="shortlist, selective: also correct stale vectors, as the policy drift always does."
    )
    drift_sample: int = Field(64, ge=16, description="Random documents encoded per step to fit the drift correction.")
    index: Literal["exact", "approximate"] = Field(
        "exact",
        description="Search by products of whole vectors, or of short sketches of them, whose best alone are scored "
        "exactly: for corpora of a million documents; ranks beyond 1,000 are not told apart.",
    )
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="How the index stores vectors; scores are sums of float32 products in any case."
    )
    audit_every: int = Field(0, ge=0, description="Steps between audits of the live index; 0: none.")
    audit_documents: int = Field(
        256, ge=0, description="Random documents that an audit encodes beside the best-ranked ones; 0: all documents."
    )

    @model_validator(mode="before")
    @classmethod
    def _was_a_name(cls, value: Any) -> Any:
        return _no_bare_value(value, "refresh.policy")

    @model_validator(mode="after")
    def _fits_the_policy(self) -> RefreshSettings:
        by_shortlist = self.policy in ("shortlist", "selective")
        if self.correct_drift and not by_shortlist:
            raise ValueError(
                f"correct_drift=true goes with shortlist or selective, not with policy={self.policy} (the policy drift "
                "alone corrects all stale vectors)"
            )
        if (self.max_documents or self.max_tokens) and not by_shortlist:
            raise ValueError(f"a budget goes with shortlist or selective, not with policy={self.policy}")
        return self


class SamplerSettings(Section):
    """Who writes the rollouts of stage 2: the model itself, or a server that holds a copy of it (vLLM, SGLang)."""

    url: str | None = Field(
        None,
        pattern=r"^https?://[^\s/]+\S*$",
        description="Address of a server of OpenAI's completions that returns token ids, such as "
        "http://localhost:8000/v1; null: the model itself, decoded here.",
    )
    model: str | None = Field(None, description="The model's name at the server; null: the only one that it has.")
    api_key_variable: str = Field("OPENAI_API_KEY", description="Environment variable with the server's key, if any.")
    timeout: float = Field(600.0, gt=0, description="Seconds for one reply, its wait in the server's queue included.")
    retries: int = Field(2, ge=0, description="Times that a request is sent again after a timeout or status 5xx.")
    reload: Literal["none", "vllm", "vllm_adapter", "sglang"] = Field(
        "none",
        description="How the server gets the new weights. none: it keeps those that it was started with. vllm, sglang: "
        "the whole model is written to a folder, which the server reads. vllm_adapter: the LoRA adapters alone "
        "(docs/training.md).",
    )
    reload_every: int = Field(1, ge=1, description="Steps between two reloads.")
    folder: str | None = Field(
        None, description="Where the weights are written, as the server sees it too; null: `sampler` in the run."
    )
    importance_cap: float = Field(
        2.0,
        gt=0,
        description="Most that a token counts by the ratio of its probability here to that at the server (truncated "
        "importance sampling); 1 for the model's own replies.",
    )

    @model_validator(mode="before")
    @classmethod
    def _was_an_address(cls, value: Any) -> Any:
        return _no_bare_value(value, "sampler.url")

    @model_validator(mode="after")
    def _reloads_a_server(self) -> SamplerSettings:
        if self.reload != "none" and self.url is None:
            raise ValueError(f"reload={self.reload} tells a server of new weights, and url=null names none; set url")
        return self


class DistillSettings(PassSettings):
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
