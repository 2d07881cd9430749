"""Which architectures encode as their own forward pass computes: the table of docs/models.md, from tiny random models.

`python benchmarks/models_matrix.py` writes it there; a test compares each row with what the page says.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
import transformers as t

from search_r3 import SearchR3
from search_r3.errors import ModelError
from search_r3.model.backbone import Backbone
from search_r3.model.loading import load_backbone
from search_r3.model.source import BUILTIN, packaged_path

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
START, END = "<!-- written by benchmarks/models_matrix.py -->", "<!-- end -->"
TEXTS = ["where is the red house?", "river", "a black horse and a white chair on a green boat " * 6]
WINDOW = 24
"""Tokens of a sliding window: fewer than a prompt has, so that every row sees it cut."""
NEAR = {"documents": 1e-5, "replies": 1e-4}
"""What rounding in float32 may change: in a coordinate of a vector of length 1; there or in a log-probability."""


@dataclass(frozen=True)
class Family:
    """One architecture: its configuration class, what models use it, and what its tiny model needs."""

    config: str
    models: str
    options: Callable[[], dict[str, Any]] = dict


def load_tokenizer() -> Any:
    return t.AutoTokenizer.from_pretrained(packaged_path(BUILTIN))


SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.15,
}  # fmt: skip
LOCAL = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
ABSOLUTE = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512, "initializer_range": 0.15}
ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 64, "factor": 8.0}


def family(config: str, models: str, shape: dict[str, Any] = SHAPE, /, **options: Any) -> Family:
    """A family whose tiny model has this shape and these options."""
    return Family(config, models, lambda: shape | options)


FAMILIES = {
    "Llama": family("Llama", "Llama 3, SmolLM2"),
    "Mistral": family("Mistral", "Mistral 0.1 and later; with a window", sliding_window=WINDOW),
    "Qwen2": family("Qwen2", "Qwen2.5"),
    "Qwen3": family("Qwen3", "Qwen3"),
    "Qwen3-MoE": family("Qwen3Moe", "Qwen3 A3B", **EXPERTS),
    "Mixtral": family("Mixtral", "Mixtral", num_local_experts=4),
    "SmolLM3": family("SmolLM3", "SmolLM3", no_rope_layers=[1, 0, 1, 1]),
    "OLMo2": family("Olmo2", "OLMo 2"),
    "OLMo3": family("Olmo3", "OLMo 3", **LOCAL),
    "Phi": family("Phi", "Phi-1.5, Phi-2"),
    "Phi-3": family(
        "Phi3", "Phi-3.5, Phi-4-mini; with `longrope`",
        rope_parameters=ROPE
        | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 4.0, 9.0, 20.0]},
    ),
    "Llama, dynamic RoPE": family("Llama", "`dynamic` scaling", rope_parameters=ROPE | {"rope_type": "dynamic"}),
    "GLM-4": family("Glm4", "GLM-4"),
    "Gemma": family("Gemma", "Gemma 1"),
    "Gemma 2": family("Gemma2", "Gemma 2", **LOCAL),
    "Gemma 3": family("Gemma3Text", "Gemma 3", **LOCAL),
    "Gemma 3n": family(
        "Gemma3nText", "Gemma 3n", **LOCAL, num_kv_shared_layers=2, hidden_size_per_layer_input=8, laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4, vocab_size_per_layer_input=8000,
    ),
    "Gemma 4": family(
        "Gemma4Text", "Gemma 4", **LOCAL, global_head_dim=16, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=8000,
    ),
    "Granite": family("Granite", "Granite 3", logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.5),
    "Granite hybrid": family(
        "GraniteMoeHybrid", "Granite 4 H", layer_types=["mamba", "attention"] * 2, **MAMBA2,
        shared_intermediate_size=64, num_local_experts=0, logits_scaling=4.0,
    ),
    "Cohere": family("Cohere", "Command R", logit_scale=0.3),
    "Cohere2": family("Cohere2", "Command R7B", logit_scale=0.3, **LOCAL),
    "GPT-OSS": family("GptOss", "gpt-oss", **LOCAL, num_local_experts=4),
    "LFM2": family("Lfm2", "LFM2", layer_types=["conv", "full_attention"] * 2),
    "Qwen3-Next": family("Qwen3Next", "Qwen3-Next", **DELTA, **EXPERTS, shared_expert_intermediate_size=32),
    "Qwen3.5": family("Qwen3_5Text", "Qwen3.5", **DELTA),
    "DeepSeek-V3": family(
        "DeepseekV3", "DeepSeek-V3, Kimi K2", moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
        num_key_value_heads=4,
    ),
    "Falcon-H1": family(
        "FalconH1", "Falcon-H1", **MAMBA2 | {"mamba_d_head": 8}, mamba_d_ssm=32, lm_head_multiplier=0.4
    ),
    "Bamba": family("Bamba", "Bamba", **MAMBA2, attn_layer_indices=[1, 3]),
    "Jamba": family(
        "Jamba", "Jamba", attn_layer_period=2, attn_layer_offset=1, num_experts=2, expert_layer_period=2,
        expert_layer_offset=1, mamba_d_state=8, use_mamba_kernels=False,
    ),
    "Mamba": family("Mamba", "Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "GPT-2": family("GPT2", "GPT-2", ABSOLUTE),
    "OPT": family(
        "OPT", "OPT",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 32,
         "max_position_embeddings": 512, "init_std": 0.15},
    ),
    "BLOOM": family("Bloom", "BLOOM", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.15}),
    "RecurrentGemma": family("RecurrentGemma", "RecurrentGemma", block_types=["recurrent", "attention"]),
}  # fmt: skip


def save_random(kind: Family, tokenizer: Any, folder: str) -> None:
    """Write a tiny random model."""
    torch.manual_seed(1)
    size = len(tokenizer) + 64
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    options = {"vocab_size": size} | ids | kind.options()
    if kind.config in {"Lfm2", "GraniteMoeHybrid", "Jamba", "Bamba", "Phi", "DeepseekV3"}:
        options.pop("head_dim")  # theirs follows from the other sizes
    model = t.AutoModelForCausalLM.from_config(getattr(t, f"{kind.config}Config")(**options)).eval()
    with torch.no_grad():  # norms that start at 1 or 0 hide a missing one
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.ndim == 1:
                parameter.add_(torch.rand_like(parameter) * 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def _own(backbone: Backbone, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Vector at the last token, and log-probabilities at all, by the model's own forward pass over one sequence."""
    tokens = torch.tensor([ids])
    hidden = backbone.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0, -1]
    return F.normalize(hidden, dim=-1), backbone.model(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)


def deviations(backbone: Backbone) -> tuple[float, float]:
    """How far documents, and replies with their vectors, are at most from the model's own forward pass."""
    model = SearchR3(backbone)
    encode = backbone.prompt_encoder.encode_batch
    vectors = torch.from_numpy(model.encode_document(TEXTS))
    direct = max(
        float((vector - _own(backbone, prompt.ids)[0]).abs().max())
        for vector, prompt in zip(vectors, encode(TEXTS, "document"), strict=True)
    )
    reason = 0.0
    prompts = [prompt.ids for prompt in encode([*TEXTS, TEXTS[1]], "reason")]
    assert min(map(len, prompts)) > WINDOW, "windows have to cut"
    for reply in model.rollouts(prompts, max_new_tokens=[3, 12, 40, 30], sampling_temperature=1.0, seeds=range(4)):
        vector, logprobs = _own(backbone, [*reply.prompt_ids, *reply.completion_ids])
        chosen = logprobs[len(reply.prompt_ids) - 1 : -1].gather(-1, torch.tensor(reply.completion_ids)[:, None])[:, 0]
        mask = torch.tensor(reply.completion_mask)
        reason = max(reason, float(((chosen - torch.tensor(reply.logprobs)) * mask).abs().max()))
        reason = max(reason, float((vector - reply.vector).abs().max()))
    return direct, reason


def row(name: str, tokenizer: Any) -> str:
    """A family's row of the table."""
    kind = FAMILIES[name]
    with TemporaryDirectory() as folder:
        save_random(kind, tokenizer, folder)
        try:
            backbone = load_backbone(folder, dtype="float32", device="cpu")
        except ModelError:
            return f"| {name} | {kind.models} | none | refused when it loads | |"
    limits = zip(deviations(backbone), NEAR.values(), strict=True)
    shown = [f"within {near:.0e}" if value <= near else "**wrong**" for value, near in limits]
    return f"| {name} | {kind.models} | {backbone.engine} | {' | '.join(shown)} |"


def main() -> None:
    """Write the table into the page."""
    t.utils.logging.disable_progress_bar()
    tokenizer = load_tokenizer()
    head = ["| architecture | models | engine | documents | replies |", "|---|---|---|---|---|"]
    table = "\n".join([START, "", *head, *(row(name, tokenizer) for name in FAMILIES), "", END])
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(before + table + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
