"""The base model that ships: it loads offline, knows its facts, and fits its budget."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from search_r3.config import BaseModelSettings
from search_r3.data.generators.atlas import build_atlas, fact_dialogues, fact_probes, read_atlas
from search_r3.model.loading import load_backbone
from search_r3.model.source import BUILTIN, packaged_path
from search_r3.pretraining import base


@pytest.fixture(scope="module")
def shipped() -> object:
    path = packaged_path(BUILTIN)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(path)


def test_it_is_small_and_a_qwen2_without_the_embed_token(shipped: tuple) -> None:
    model, tokenizer = shipped
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert 1e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 3e6
    assert (packaged_path(BUILTIN) / "model.safetensors").stat().st_size < 6_000_000
    assert "<|embed_token|>" not in tokenizer.get_vocab()
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nx<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_it_knows_the_facts_and_names_the_entity_of_a_query_it_never_saw(shipped: tuple) -> None:
    model, tokenizer = shipped
    atlas, rng = read_atlas(), random.Random(1)
    probes = rng.sample(fact_probes(atlas), 150)
    questions = rng.sample(fact_dialogues(atlas), 150)
    built = build_atlas()
    queries = [built.queries[query_id] for query_id in built.split("dev")]
    openings = [(query.text, query.metadata["reasoning"]["chain"].partition(". ")[0]) for query in queries]
    prefixes = [f"<|endoftext|> {prefix}" for prefix, _ in probes]
    assert base.completed_share(model, tokenizer, prefixes, [answer for _, answer in probes]) >= 0.97
    for dialogues, least in ((questions, 0.97), (openings, 0.9)):
        prompts = [base.chat(tokenizer, question) for question, _ in dialogues]
        assert base.completed_share(model, tokenizer, prompts, [answer for _, answer in dialogues]) >= least


def test_search_r3_can_use_it() -> None:
    backbone = load_backbone(packaged_path(BUILTIN))
    assert backbone.prompt_encoder.decode(backbone.prompt_encoder.encode("Tashkent", "reason").ids).count("Tashkent")


class Losses(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, float], **keywords: Any) -> None:
        self.seen.append(logs["loss"])


def test_base_makes_a_model_that_loads(tmp_path: Path) -> None:
    settings = BaseModelSettings(steps=3, batch_size=2, sequence_length=32, vocab_size=600, hidden_size=64, layers=1)
    losses = Losses()
    known = base.train_base(settings, tmp_path / "base", seed=0, callbacks=[losses])
    assert len(losses.seen) == 3
    assert 0.0 <= known["recall_chat"] < 0.1, "three steps teach nothing: the measure must not say otherwise"
    assert load_backbone(tmp_path / "base").dimension == 64
