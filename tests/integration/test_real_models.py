"""Real pretrained models of the user's: `SEARCH_R3_REAL_MODELS=FOLDER pytest -m real`, GGUF files or model directories.

A base without a chat template gets Gemma 3's. GGUF files take minutes each to load; `benchmarks/real_models.py` writes
directories.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers

from search_r3 import SearchR3
from search_r3.errors import ModelError

pytestmark = pytest.mark.real

PLACE = os.environ.get("SEARCH_R3_REAL_MODELS")
MODELS = sorted(path for path in Path(PLACE).iterdir() if path.suffix == ".gguf" or path.is_dir()) if PLACE else []
TEMPLATE = Path(__file__).parents[1] / "templates" / "gemma-3.jinja"
QUERY = "What is the capital of France?"
TEXTS = [
    "Rivers.",
    "The Danube flows through Vienna, Budapest and Belgrade into the Black Sea. " * 4,
    " ".join(f"Line {i} of the ledger: {i * 7} barrels of salt, {i * 13 % 50} of rye." for i in range(40)),
]


class Loaded(NamedTuple):
    model: SearchR3
    folder: Path
    own: Any


@pytest.fixture(scope="module", params=MODELS, ids=lambda path: path.stem)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A model, the directory that it was saved to, and what transformers alone loads from there."""
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
    try:
        model = SearchR3(request.param, **options)
    except ModelError as error:
        assert "no chat template" in str(error)
        more = {"chat_template": TEMPLATE.read_text(encoding="utf-8")}
        model = SearchR3(request.param, tokenizer_kwargs=more, **options)
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    own = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    return Loaded(model, folder, own)


@torch.no_grad()
def forward(own: Any, ids: list[int], reply: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Vector at the last token, and log-probabilities of the reply's tokens, by the model's own forward pass."""
    options = {"use_cache": False, "output_hidden_states": True, "logits_to_keep": reply + 1}
    output = own(input_ids=torch.tensor([ids]), **options)
    vector = torch.nn.functional.normalize(output.hidden_states[-1][0, -1], dim=-1)
    return vector, output.logits[0, :-1].log_softmax(-1)


@pytest.mark.parametrize("engine", ["fast", "fallback"])
def test_documents_and_replies_are_those_of_the_models_own_forward_pass(loaded: Loaded, engine: str) -> None:
    backbone = loaded.model.backbone
    assert backbone.engine == "fast"
    model = SearchR3(backbone if engine == "fast" else replace(backbone, model=loaded.own, engine="fallback"))
    prompts = backbone.prompt_encoder.encode_batch(TEXTS, "document")
    assert len(prompts[-1].ids) > 600, "longer than a window"
    expected = torch.stack([forward(loaded.own, prompt.ids)[0] for prompt in prompts]).numpy()
    assert np.abs(model.encode_document(TEXTS, batch_tokens=10**6) - expected).max() <= 1e-5
    prompts = backbone.prompt_encoder.encode_batch([QUERY, TEXTS[-1]], "reason")
    for reply in model.rollouts([prompt.ids for prompt in prompts], max_new_tokens=12):
        ids = [*reply.prompt_ids, *reply.completion_ids]
        vector, logprobs = forward(loaded.own, ids, len(reply.completion_ids))
        assert (vector - reply.vector).abs().max() <= 1e-5
        for row, token, mask, logprob in zip(
            logprobs, reply.completion_ids, reply.completion_mask, reply.logprobs, strict=True
        ):
            assert not mask or (abs(row[token] - logprob) <= 1e-4 and row.max() - row[token] <= 1e-4)


def test_a_saved_model_has_the_same_vectors_and_prompts(loaded: Loaded) -> None:
    again = SearchR3(loaded.folder, dtype="float32", device="cpu")
    assert again.backbone.settings == loaded.model.backbone.settings
    assert np.array_equal(again.encode_document(TEXTS), loaded.model.encode_document(TEXTS))


@pytest.mark.parametrize("kind", ["direct", "reason", "document"])
def test_a_prompt_is_what_the_template_writes_and_nothing_more(loaded: Loaded, kind: Any) -> None:
    backbone = loaded.model.backbone
    prompt_encoder, tokenizer, wording = backbone.prompt_encoder, backbone.tokenizer, backbone.settings.prompts
    system = getattr(wording, f"{kind}_system")
    ids = prompt_encoder.encode(QUERY, kind).ids
    text = tokenizer.decode(ids)
    assert text.count(system) == text.count(QUERY) == 1
    assert not re.search(r"\b(19|20)\d\d\b|Today|Cutting|You are", text), "no date, no system message of another"
    messages = [{"role": "system", "content": system}, {"role": "user", "content": QUERY}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids[: len(rendered)] == list(rendered), "special tokens are single ids; one at the beginning, not two"
    assert tokenizer.decode(ids[len(rendered) :]) == ("" if kind == "reason" else "The embedding is <|embed_token|>")
    following = [*messages, {"role": "assistant", "content": "A reply"}]
    whole = tokenizer.apply_chat_template(following, tokenize=False)
    end = tokenizer.convert_ids_to_tokens(prompt_encoder.end_token_id)
    assert whole.rstrip().endswith(f"A reply{end}")


def test_a_reply_is_words(loaded: Loaded) -> None:
    [reply] = loaded.model.encode_query(QUERY, max_new_tokens=24).reasoning
    words = re.findall(r"[A-Za-z]{2,}", reply)
    assert len(set(words)) >= 4 and sum(map(len, words)) > len(reply) / 2
    assert not any(token in reply for token in loaded.model.backbone.tokenizer.all_special_tokens)
