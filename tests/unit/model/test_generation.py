from __future__ import annotations

from typing import Any

import pytest
import torch

from search_r3.errors import ModelError
from search_r3.model.backbone import Backbone, vectors_at
from search_r3.model.encoder import SearchR3
from search_r3.model.engine.generation import sequence_batch
from search_r3.training.losses import chosen_logprobs
from tests.conftest import favour

TEXTS = ["where is the red house?", "river", "a black horse and a white chair", "the green lamp"]


def prompts_of(backbone: Backbone) -> list[list[int]]:
    return [backbone.prompt_encoder.encode(text, "reason").ids for text in TEXTS]


def test_greedy_ids_equal_those_of_transformers_generate(backbone: Backbone) -> None:
    for prompt, rollout in zip(
        prompts_of(backbone), SearchR3(backbone).rollouts(prompts_of(backbone), max_new_tokens=12), strict=True
    ):
        expected = backbone.model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=11, do_sample=False, eos_token_id=[backbone.embed_token_id, backbone.tokenizer.eos_token_id],
            pad_token_id=backbone.tokenizer.pad_token_id,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert rollout.completion_ids[: len(expected)] == expected


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_and_vectors_equal_a_teacher_forced_pass(backbone: Backbone, temperature: float) -> None:
    favour(backbone, backbone.embed_token_id, 3.0)
    rollouts = SearchR3(backbone).rollouts(
        prompts_of(backbone), max_new_tokens=16, sampling_temperature=temperature, seeds=[1, 2, 3, 4]
    )
    batch = sequence_batch(backbone, rollouts)
    places = batch.sampled.nonzero(as_tuple=True)
    with torch.no_grad():
        hidden = backbone.hidden_states(batch.ids, batch.mask)
        logprobs = chosen_logprobs(
            backbone.logits(hidden[places]), batch.ids[places[0], places[1] + 1], temperature or 1.0
        )
    assert torch.allclose(logprobs, batch.sampler_logprobs[places], atol=1e-5)
    vectors = torch.stack([rollout.vector for rollout in rollouts])
    assert torch.allclose(vectors_at(hidden, batch.embed_positions), vectors, atol=1e-5)
    assert len({len(rollout.completion_ids) for rollout in rollouts}) > 1 or temperature == 0


def test_a_rollout_does_not_depend_on_its_company(backbone: Backbone) -> None:
    favour(backbone, backbone.embed_token_id, 2.0)
    seeds, prompts = [5, 6, 7, 8], prompts_of(backbone)
    together = SearchR3(backbone).rollouts(prompts, max_new_tokens=12, sampling_temperature=1.0, seeds=seeds)
    for order, size in (([3, 1, 0, 2], 4), ([0, 1, 2, 3], 1), ([2, 3], 2)):
        again = SearchR3(backbone).rollouts(
            [prompts[i] for i in order],
            max_new_tokens=12,
            sampling_temperature=1.0,
            seeds=[seeds[i] for i in order],
            batch_size=size,
        )
        for i, rollout in zip(order, again, strict=True):
            assert rollout.completion_ids == together[i].completion_ids
            assert torch.allclose(rollout.vector, together[i].vector, atol=1e-5)


def test_sampling_follows_the_models_distribution(backbone: Backbone) -> None:
    prompt = prompts_of(backbone)[0]
    count = 1500
    rollouts = SearchR3(backbone).rollouts(
        [prompt] * count, max_new_tokens=2, sampling_temperature=1.0, seeds=range(count), batch_size=500
    )
    with torch.no_grad():
        ids = torch.tensor([prompt])
        expected = backbone.logits(backbone.hidden_states(ids, torch.ones_like(ids))[:, -1])[0].softmax(-1)
    found = torch.zeros_like(expected)
    for rollout in rollouts:
        found[rollout.completion_ids[0]] += 1 / count
    # Total variation of an empirical distribution over V tokens is about sqrt(V / (2 pi n)) for a flat one.
    assert (found - expected).abs().sum() / 2 < (len(expected) / (2 * 3.14 * count)) ** 0.5 * 1.2


def test_an_emitted_token_is_not_forced_and_ends_the_reply(backbone: Backbone) -> None:
    favour(backbone, backbone.embed_token_id, 100.0)
    rollout = SearchR3(backbone).rollouts(prompts_of(backbone)[:1], max_new_tokens=8)[0]
    assert rollout.completion_ids == [backbone.embed_token_id]
    assert not rollout.forced
    assert rollout.completion_mask == [1]
    assert rollout.reasoning_tokens == 0


def test_a_token_that_is_never_emitted_is_forced_at_the_budgets_end(backbone: Backbone) -> None:
    favour(backbone, backbone.embed_token_id, -100.0)
    favour(backbone, backbone.prompt_encoder.end_token_id, -100.0)
    for rollout in SearchR3(backbone).rollouts(prompts_of(backbone), max_new_tokens=8):
        assert rollout.forced
        assert len(rollout.completion_ids) == 8
        assert rollout.completion_ids[-1] == backbone.embed_token_id
        assert rollout.completion_mask == [1] * (len(rollout.completion_ids) - 1) + [0]
        assert rollout.logprobs[-1] == 0.0


def test_a_turn_that_would_end_without_the_token_gets_it_in_the_place_of_the_end(backbone: Backbone) -> None:
    options = {"max_new_tokens": 8, "sampling_temperature": 1.0, "seeds": [3]}
    [free] = SearchR3(backbone).rollouts(prompts_of(backbone)[:1], **options)  # type: ignore[arg-type]
    end = free.completion_ids[3]  # a second token that ends turns
    assert end not in free.completion_ids[:3]
    backbone.prompt_encoder.end_token_ids |= {end}
    [rollout] = SearchR3(backbone).rollouts(prompts_of(backbone)[:1], **options)  # type: ignore[arg-type]
    assert rollout.completion_ids == [*free.completion_ids[:3], backbone.embed_token_id]
    assert rollout.forced
    assert rollout.completion_mask == [1, 1, 1, 0]
    expected = backbone.embed([[*rollout.prompt_ids, *rollout.completion_ids]])[0].detach()
    torch.testing.assert_close(rollout.vector, expected, atol=1e-5, rtol=1e-5)


def test_a_reply_that_only_ends_is_the_forced_token_alone(backbone: Backbone) -> None:
    favour(backbone, backbone.prompt_encoder.end_token_id, 100.0)
    [rollout] = SearchR3(backbone).rollouts(prompts_of(backbone)[:1], max_new_tokens=8)
    assert (rollout.completion_ids, rollout.completion_mask) == ([backbone.embed_token_id], [0])
    assert (rollout.forced, rollout.reasoning_tokens, rollout.reasoning) == (True, 0, "")


def test_bad_requests_are_refused(backbone: Backbone) -> None:
    with pytest.raises(ModelError, match="exceed the model's context of 256 tokens"):
        SearchR3(backbone).rollouts(prompts_of(backbone), max_new_tokens=250)
    with pytest.raises(ValueError, match="one seed per prompt"):
        SearchR3(backbone).rollouts(prompts_of(backbone), max_new_tokens=4, sampling_temperature=1.0, seeds=[1])


def test_broken_weights_are_named(backbone: Backbone) -> None:
    with torch.no_grad():
        backbone.model.get_input_embeddings().weight[:] = float("nan")
    with pytest.raises(ModelError, match="states are not finite in request 0"):
        SearchR3(backbone).rollouts(prompts_of(backbone), max_new_tokens=4)


def test_the_text_of_a_rollout_has_no_special_tokens(backbone: Any) -> None:
    for rollout in SearchR3(backbone).rollouts(prompts_of(backbone), max_new_tokens=8):
        assert "<|" not in rollout.reasoning
