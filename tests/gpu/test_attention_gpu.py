"""Every way that encoding and decoding attend gives what the model's own forward pass gives. Run with `pytest -m gpu`.

In bfloat16 two correct computations differ by their rounding. So there the measure is the distance to the same weights
in float32 on the CPU, and ours may be no farther away than the model's own pass is, up to a factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from search_r3 import SearchR3

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = "cuda"
TEXTS = [
    "river", "where is the red house?", "a black horse", "the green lamp and the white apple by the blue river",
    "a white chair on a green boat", "stone", "what is about a red lamp?", "a black horse and a white chair",
]  # fmt: skip
KINDS: dict[str, Any] = {
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "llama": transformers.LlamaConfig,
    "mistral": partial(transformers.MistralConfig, sliding_window=200),
    "olmo2": transformers.Olmo2Config,
}
"""Driven layer by layer, but for the last two: a window that cuts nothing, and an architecture unknown to us."""


@pytest.fixture(scope="module", params=KINDS)
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    torch.manual_seed(1)
    config = KINDS[request.param](
        vocab_size=len(tokenizer) + 16, hidden_size=64, num_hidden_layers=3, intermediate_size=128,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("attention") / request.param
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@torch.no_grad()
def plain(model: SearchR3, sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Vectors and log-probabilities of the model's own forward pass, one sequence at a time."""
    vectors, logprobs = [], []
    for ids in sequences:
        found = torch.tensor([ids], device=model.backbone.device)
        hidden = model.backbone.causal_lm.base_model(input_ids=found, use_cache=False).last_hidden_state[0]
        vectors.append(torch.nn.functional.normalize(hidden[-1].float(), dim=-1).cpu())
        scores = model.backbone.logits(hidden).log_softmax(-1)[:-1]
        logprobs.append(scores.gather(-1, found[0, 1:, None])[:, 0].cpu())
    return torch.stack(vectors), logprobs


def check(ours: torch.Tensor, own: torch.Tensor, truth: torch.Tensor, dtype: str) -> None:
    """`own`: the model's pass in this type; `truth`: in float32 on the CPU."""
    if dtype == "float32":
        torch.testing.assert_close(own, truth, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours, own, atol=1e-4, rtol=0)
        return
    distances = [(found - truth).norm(dim=-1) for found in (ours, own)]
    assert distances[0].mean() <= 1.5 * distances[1].mean() + 1e-3
    assert distances[0].max() <= 2.5 * distances[1].max() + 1e-3
    assert torch.nn.functional.cosine_similarity(ours, own).min() > 0.999


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_documents_attend_as_the_model_does(folder: Path, dtype: str) -> None:
    exact, model = SearchR3(folder, device="cpu"), SearchR3(folder, device=DEVICE, dtype=dtype)
    sequences = [prompt.ids for prompt in model.backbone.prompt_encoder.encode_batch(TEXTS, "document")]
    (truth, _), (own, _) = plain(exact, sequences), plain(model, sequences)
    together = torch.from_numpy(model.encode_document(TEXTS))  # they share the template before the text
    few = torch.from_numpy(model.encode_document(TEXTS, batch_tokens=64))
    alone = torch.cat([torch.from_numpy(model.encode_document(text)) for text in TEXTS])
    for ours in (together, few, alone):
        check(ours, own, truth, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("slots", [3, 8])
def test_rollouts_attend_as_the_model_does(folder: Path, dtype: str, slots: int) -> None:
    """Slots are reused, lengths differ, and a prompt comes twice."""
    exact, model = SearchR3(folder, device="cpu"), SearchR3(folder, device=DEVICE, dtype=dtype)
    prompts = [prompt.ids for prompt in model.backbone.prompt_encoder.encode_batch([*TEXTS, TEXTS[1]], "reason")]
    rollouts = model.rollouts(
        prompts,
        max_new_tokens=[3 + 4 * (place % 5) for place in range(len(prompts))],
        sampling_temperature=1.0,
        seeds=range(len(prompts)),
        batch_size=slots,
    )
    sequences = [[*rollout.prompt_ids, *rollout.completion_ids] for rollout in rollouts]
    (truth, _), (own, logprobs) = plain(exact, sequences), plain(model, sequences)
    check(torch.stack([rollout.vector for rollout in rollouts]).cpu(), own, truth, dtype)
    for rollout, expected in zip(rollouts, logprobs, strict=True):
        chosen = torch.tensor(rollout.completion_mask, dtype=torch.bool)
        found = torch.tensor(rollout.logprobs)[chosen]
        # Logits in bfloat16 are rounded to 8 bits: those of this model to about 0.02.
        torch.testing.assert_close(
            found, expected[-len(chosen) :][chosen], atol=1e-3 if dtype == "float32" else 0.08, rtol=0
        )
