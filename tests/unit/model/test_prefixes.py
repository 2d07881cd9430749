from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from search_r3 import SearchR3
from search_r3.model.backbone import Backbone
from search_r3.model.engine.prefixes import MOST
from search_r3.model.engine.slots import SlotEngine

TEXTS = ["where is the red house?", "river", "a black horse and a white chair"]


def answers(model: SearchR3, text: str = TEXTS[0]) -> list[Any]:
    """What each way to a vector gives for one text."""
    *_, streamed = model.stream_query(text, max_new_tokens=6)
    results = [streamed, *(model.encode_query(text, mode, max_new_tokens=6) for mode in ("reason", "direct"))]
    return [*(np.asarray(result) for result in results), model.encode_document(text)]


def assert_same(ours: list[Any], expected: list[Any]) -> None:
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def forgetful(model: SearchR3) -> SearchR3:
    """The same weights, and nothing is kept."""
    old = model.backbone
    backbone = Backbone(old.model, old.tokenizer, old.settings, old.embed_token_id, "forgetful")
    backbone.prefixes.stop()
    return SearchR3(backbone)


def computed_tokens(backbone: Backbone) -> list[int]:
    counts: list[int] = []
    backbone.causal_lm.base_model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: counts.append(inputs[0].numel())
    )
    return counts


def test_what_is_kept_changes_no_result(model: SearchR3) -> None:
    for text in (*TEXTS, TEXTS[0]):
        assert_same(answers(model, text), answers(forgetful(model), text))


@pytest.mark.parametrize("mode", ["direct", "reason", "document"])
def test_a_second_call_computes_only_what_comes_after_the_template(model: SearchR3, mode: Any) -> None:
    encode = model.encode_document if mode == "document" else lambda text: model.encode_query(text, mode)
    encode(TEXTS[0])
    counts = computed_tokens(model.backbone)
    encode(TEXTS[1])
    encoder = model.backbone.prompt_encoder
    before = len(encoder.frame(mode)[0])
    assert before > 15
    assert counts[0] == len(encoder.encode(TEXTS[1], mode).ids) - before


def test_the_first_of_a_run_of_calls_has_the_very_vector_of_the_last(model: SearchR3) -> None:
    first = answers(model)
    for one, other in zip(answers(model), first, strict=True):
        np.testing.assert_array_equal(one, other)


def step(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()


def read_others(model: Any) -> None:
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})


def replace_one(model: Any) -> None:
    model.base_model.layers[0].self_attn.v_proj.weight = torch.nn.Parameter(torch.randn(16, 32))


def move(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1


@pytest.mark.parametrize("change", [step, read_others, replace_one, move, lambda model: model.to(torch.bfloat16)])
def test_other_weights_forget_what_was_kept(model: SearchR3, change: Callable[[Any], None]) -> None:
    before = answers(model)
    change(model.backbone.model)
    after = answers(model)
    assert_same(after, answers(forgetful(model)))
    assert all(np.abs(one - other).max() > 1e-4 for one, other in zip(after, before, strict=True))


def test_adapters_that_are_switched_and_merged_forget_what_was_kept(tiny_path: Path) -> None:
    base = SearchR3(tiny_path, device="cpu").backbone
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["v_proj", "down_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(base.model, config)
    tuned.add_adapter("other", config)
    model = SearchR3(Backbone(tuned, base.tokenizer, base.settings, base.embed_token_id, "lora"))
    first = answers(model)
    with tuned.disable_adapter():
        assert_same(answers(model), answers(forgetful(model)))
    tuned.set_adapter("other")
    assert np.abs(answers(model)[0] - first[0]).max() > 1e-4
    assert_same(answers(model), answers(forgetful(model)))
    for module in tuned.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("other", 3.0)
    assert_same(answers(model), answers(forgetful(model)))
    tuned.base_model.merge_adapter(["default"])  # in place, where nothing is counted
    assert_same(answers(model), answers(forgetful(model)))


def test_no_more_is_kept_than_templates_need(backbone: Backbone) -> None:
    engine = SlotEngine(backbone)
    for length in range(1, 3 * MOST):
        engine.share(range(length))
    assert len(backbone.prefixes._kept) == MOST


def test_weights_whose_changes_nobody_counts_keep_nothing(backbone: Backbone) -> None:
    model = SearchR3(backbone)
    with torch.inference_mode():
        for parameter in backbone.model.parameters():
            parameter.data = parameter.data.clone()
    model.encode_query(TEXTS[0], "direct")
    with torch.inference_mode():
        for parameter in backbone.model.parameters():
            parameter.data.mul_(1.1)
    assert_same([model.encode_query(TEXTS[0], "direct")], [forgetful(model).encode_query(TEXTS[0], "direct")])


def test_threads_that_ask_at_once_get_what_one_gets(model: SearchR3) -> None:
    expected = [answers(forgetful(model), text) for text in TEXTS]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(5):
            for one, other in zip(pool.map(lambda text: answers(model, text), TEXTS), expected, strict=True):
                assert_same(one, other)


def test_what_autocast_computed_is_not_kept_for_others(model: SearchR3) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        model.encode_document(TEXTS[0])
    result = model.encode_document(TEXTS[0])
    np.testing.assert_allclose(result, forgetful(model).encode_document(TEXTS[0]), atol=1e-6)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_can_be_copied_and_pickled_and_its_copy_keeps_its_own(
    model: SearchR3, twin_of: Callable[[SearchR3], SearchR3]
) -> None:
    expected = model.encode_document(TEXTS[0])
    twin = twin_of(model)
    assert (twin.backbone.prefixes.keeps, twin.backbone.prefixes._kept) == (True, {})
    np.testing.assert_allclose(twin.encode_document(TEXTS[0]), expected, atol=1e-6)
    model.backbone.prefixes.stop()
    assert not twin_of(model).backbone.prefixes.keeps
