"""Mode auto of a model whose own first token says which queries think."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from search_r3 import SearchR3
from search_r3.errors import ConfigError
from search_r3.model.engine.decoding import Decoder, DecodeRequest
from search_r3.model.modes.first import First, check_can_decide, hold
from tests.conftest import COLOURS, THINGS, favour
from tests.gates import let_it_decide

TEXTS = [f"where is the {colour} {thing}?" for colour in COLOURS[:3] for thing in THINGS[:4]]


@pytest.fixture
def decider(model: SearchR3) -> SearchR3:
    let_it_decide(model, TEXTS)
    return model


def first_logprobs(model: SearchR3, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        logits = model.backbone.logits(model.backbone.hidden_states(torch.tensor([ids]), None))[0, -1]
    return torch.log_softmax(logits / temperature, dim=-1)


def writing(model: SearchR3, logprobs: torch.Tensor) -> float:
    """The probability of a first token that is neither the embed token nor an end of the turn."""
    ends = sorted(model.backbone.prompt_encoder.end_token_ids)
    return 1 - float(logprobs[[model.backbone.embed_token_id, *ends]].exp().sum())


def test_the_first_token_decides_and_its_state_is_the_vector(decider: SearchR3) -> None:
    auto = decider.encode_query(TEXTS, "auto", max_new_tokens=6)
    reason = decider.encode_query(TEXTS, "reason", max_new_tokens=6)
    assert 0 < sum(auto.thought) < len(TEXTS)
    embed = decider.backbone.embed_token_id
    for row, text in enumerate(TEXTS):
        ids = decider.backbone.prompt_encoder.encode(text, "reason").ids
        logprobs = first_logprobs(decider, ids)
        writes = writing(decider, logprobs)
        assert auto.thought[row] == (writes > 0.5) == (auto.reasoning_tokens[row] > 0)
        assert auto.gate[row] == {"probability": pytest.approx(writes, abs=1e-5)}
        at_once = decider.backbone.embed([[*ids, embed]])[0].detach().numpy()
        expected = reason.vectors[row] if auto.thought[row] else at_once
        np.testing.assert_allclose(auto.vectors[row], expected, atol=1e-5)
        assert auto.reasoning[row] == (reason.reasoning[row] if auto.thought[row] else "")


def test_in_mode_reason_it_always_writes(decider: SearchR3) -> None:
    favour(decider.backbone, decider.backbone.embed_token_id, 50.0)
    assert not any(decider.encode_query(TEXTS, "auto").thought)
    reason = decider.encode_query(TEXTS, "reason")
    assert reason.reasoning_tokens == [1] * len(TEXTS) and all(reason.thought) and not any(reason.gate)
    *_, streamed = decider.stream_query(TEXTS[0], "reason")
    assert streamed.reasoning_tokens == [1]  # type: ignore[union-attr]


def test_a_decision_is_the_same_alone_in_company_and_streamed(decider: SearchR3) -> None:
    together = decider.encode_query(TEXTS, "auto", max_new_tokens=6)
    for row, text in enumerate(TEXTS):
        alone = decider.encode_query(text, "auto", max_new_tokens=6)
        *pieces, streamed = decider.stream_query(text, "auto", max_new_tokens=6)
        for one in (alone, streamed):
            np.testing.assert_allclose(one.vectors[0], together.vectors[row], atol=1e-5)  # type: ignore[union-attr]
            assert one.thought == [together.thought[row]] and one.reasoning == [together.reasoning[row]]  # type: ignore[union-attr]
            assert one.gate[0] == pytest.approx(together.gate[row], abs=1e-5)  # type: ignore[union-attr]
        assert "".join(map(str, pieces)) == together.reasoning[row]


def test_first_tokens_that_are_given_keep_the_policys_own_log_probabilities(decider: SearchR3) -> None:
    embed = decider.backbone.embed_token_id
    favour(decider.backbone, embed, 6.0)
    ids = decider.backbone.prompt_encoder.encode(TEXTS[0], "reason").ids
    logprobs = first_logprobs(decider, ids, 0.8)
    firsts: list[First] = ["embed", "text", "own"] * 40
    replies = decider.rollouts(
        [ids] * 120, max_new_tokens=3, sampling_temperature=0.8, seeds=range(120), first=firsts
    )  # fmt: skip
    for reply in replies:
        assert reply.logprobs[0] == pytest.approx(float(logprobs[reply.completion_ids[0]]), abs=1e-4)
    begun = [Counter(reply.completion_ids[0] == embed for reply in replies[start::3]) for start in range(3)]
    assert begun[0] == {True: 40} and begun[1] == {False: 40} and 0 < begun[2][True] < 40
    assert not any(reply.forced for reply in replies[::3]), "it is the policy's choice, with its probability"
    assert {reply.writes is None for reply in replies[1::3]} == {True}
    assert replies[0].writes == replies[2].writes == pytest.approx(writing(decider, logprobs), abs=1e-5)


@pytest.mark.parametrize(("embed", "thinks"), [(0.4, True), (0.6, False)])
def test_many_words_together_may_be_likelier_than_to_embed_at_once(embed: float, thinks: bool) -> None:
    words = [0.5 * (1 - embed)] * 2  # neither is as likely as the embed token
    held, facts = hold(torch.tensor([[*words, embed, 0.0]]).log(), ["own"], [0.0], 2, torch.tensor([3]))
    assert int(held[0].argmax()) == (0 if thinks else 2)
    mass, writes = facts[0]
    assert writes == pytest.approx(1 - embed)
    chosen = torch.log_softmax(held[0], dim=-1).max() + mass
    assert float(chosen.exp()) == pytest.approx(max(words) if thinks else embed), "the policy's own probability"


def test_a_reply_that_would_end_at_once_writes_nothing(decider: SearchR3) -> None:
    """The row of the embed token may have begun as that of the end of the turn: what raises one raises the other."""
    end = decider.backbone.prompt_encoder.frames.end_token_id
    favour(decider.backbone, end, 50.0)
    ids = decider.backbone.prompt_encoder.encode(TEXTS[0], "reason").ids
    [written] = decider.rollouts([ids], max_new_tokens=4, first=["text"])
    assert written.completion_ids[0] not in (end, decider.backbone.embed_token_id)
    auto = decider.encode_query(TEXTS[0], "auto", max_new_tokens=4)
    assert auto.thought == [False] and auto.gate[0]["probability"] < 1e-6 and not auto.forced[0]


def test_other_requests_beside_it_are_left_alone(decider: SearchR3) -> None:
    ids = decider.backbone.prompt_encoder.encode(TEXTS[0], "reason").ids
    free = DecodeRequest(ids, 4, 1.0, seed=3)
    [alone] = Decoder(decider.backbone).run([free])
    held = [DecodeRequest(ids, 4, 1.0, seed=3, first=first) for first in ("embed", "text")]
    [_, beside, _] = Decoder(decider.backbone).run([held[0], free, held[1]])
    assert (beside.completion_ids, beside.writes) == (alone.completion_ids, None)


def test_another_price_is_refused(decider: SearchR3) -> None:
    with pytest.raises(ConfigError, match=r"price=0.1: .* decides itself .* \(grpo.reward.tokens\)"):
        decider.encode_query(TEXTS, "auto", price=0.1)
    with pytest.raises(ConfigError, match="decides itself"):
        list(decider.stream_query(TEXTS[0], "auto", price=0.1))


def test_it_is_saved_with_the_model(decider: SearchR3, tmp_path: Path) -> None:
    expected = decider.encode_query(TEXTS, "auto", max_new_tokens=3)
    decider.save_pretrained(tmp_path / "again")
    again = SearchR3(tmp_path / "again", device="cpu")
    assert again.backbone.settings.gate == "policy"
    assert len(again.encode_query(TEXTS, "auto", max_new_tokens=3)) == len(expected)


def test_prompts_that_open_a_thought_leave_no_decision_to_the_first_token(decider: SearchR3) -> None:
    check_can_decide(decider.backbone, "grpo.at_once")
    frames = decider.backbone.prompt_encoder.frames
    decider.backbone.prompt_encoder.frames = frames.model_copy(update={"thought_end": (5,)})
    with pytest.raises(ConfigError, match=r"grpo.at_once: the prompts of .* open a thought"):
        check_can_decide(decider.backbone, "grpo.at_once")
