"""Every loss against numbers worked out by hand, so that a changed sign, divisor or temperature fails."""

from __future__ import annotations

import math

import pytest
import torch

from search_r3.training import losses


def test_kl_goes_from_the_base_to_the_tuned_model() -> None:
    base, tuned = torch.log(torch.tensor([[0.9, 0.1]])), torch.log(torch.tensor([[0.5, 0.5]]))
    forward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert losses.kl_to_base(tuned, base).item() == pytest.approx(forward, abs=1e-6)
    assert losses.kl_to_base(base + 3.0, base).item() == pytest.approx(0.0, abs=1e-6), "a constant changes nothing"
    two = losses.kl_to_base(torch.cat([tuned, base]), torch.cat([base, base]))
    assert two.tolist() == pytest.approx([forward, 0.0], abs=1e-6), "at each position"


def test_info_nce_by_hand() -> None:
    queries = torch.tensor([[1.0, 0.0]])
    documents = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
    none = torch.zeros(1, 3, dtype=torch.bool)
    tau = 0.5
    scores = [0.6 / tau, 1.0 / tau, 0.0]
    expected = -math.log(math.exp(scores[0]) / sum(map(math.exp, scores)))
    assert losses.info_nce(queries, documents, torch.tensor([0]), none, tau).item() == pytest.approx(expected, abs=1e-6)
    masked = torch.tensor([[False, True, False]])
    expected = -math.log(math.exp(scores[0]) / (math.exp(scores[0]) + math.exp(scores[2])))
    found = losses.info_nce(queries, documents, torch.tensor([0]), masked, tau).item()
    assert found == pytest.approx(expected, abs=1e-6), "a false negative must not be in the sum"


def test_triplet_margin_by_hand() -> None:
    positive, negative = torch.tensor([0.9, 0.2]), torch.tensor([[0.85, 0.5], [0.1, 0.4]])
    expected = (0.1 + 0.85 - 0.9 + 0.0 + 0.0 + 0.1 + 0.4 - 0.2) / 4
    assert losses.triplet_margin(positive, negative, 0.1).item() == pytest.approx(expected, abs=1e-6)


def test_what_is_left_out_of_a_querys_sum_is_no_negative_of_the_triplet_loss() -> None:
    queries = torch.tensor([[1.0, 0.0]])
    documents = torch.tensor([[0.8, 0.6], [1.0, 0.0], [0.6, 0.8]], requires_grad=True)
    arguments = torch.tensor([[1, 2]]), 0.05, 0.3
    free, masked = torch.tensor([[False, False, False]]), torch.tensor([[False, True, False]])
    found = losses.contrastive(queries, documents, torch.tensor([0]), free, *arguments)
    assert found["triplet"].item() == pytest.approx((0.3 + 1.0 - 0.8 + 0.3 + 0.6 - 0.8) / 2)
    found = losses.contrastive(queries, documents, torch.tensor([0]), masked, *arguments)
    assert found["triplet"].item() == pytest.approx((0.3 + 0.6 - 0.8) / 2)
    found["triplet"].backward()
    assert documents.grad is not None and not documents.grad[1].any() and documents.grad[2].any()


def test_advantages_are_relative_to_the_group_and_scaled_once() -> None:
    rewards = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    group = losses.group_advantages(rewards, "group")
    std = 0.5**0.5  # of (0, 1) with one degree of freedom
    assert group.values[0].tolist() == pytest.approx([-0.5 / (std + 1e-4), 0.5 / (std + 1e-4)])
    assert group.values[1].tolist() == [0.0, 0.0], "equal rewards teach nothing"
    assert group.equal_share == 0.5
    batch = losses.group_advantages(rewards, "batch")
    assert batch.values[0].tolist() == pytest.approx([-0.5 / (0.125**0.5 + 1e-4), 0.5 / (0.125**0.5 + 1e-4)])
    assert losses.group_advantages(rewards, "none").values[0].tolist() == [-0.5, 0.5]


def test_grpo_loss_by_hand() -> None:
    policy = torch.log(torch.tensor([0.6, 0.2, 0.5]))
    sampler = torch.log(torch.tensor([0.3, 0.4, 0.5]))
    advantages = torch.tensor([1.0, -1.0, 2.0])
    # Ratios 2, 0.5, 1: the first is clipped to 1.2 (A > 0); the second to 0.8, and the minimum of
    # -0.5 and -0.8 is -0.8 (A < 0).
    result = losses.grpo_loss(policy, sampler, advantages, 0.2)
    assert result.total.item() == pytest.approx(-(1.2 - 0.8 + 2.0), abs=1e-6)
    assert result.clipped.item() == 2


def test_grpo_kl_is_the_k3_estimate_to_the_reference() -> None:
    policy, reference = torch.log(torch.tensor([0.5])), torch.log(torch.tensor([0.25]))
    result = losses.grpo_loss(policy, policy, torch.zeros(1), 0.2, reference, kl_coefficient=0.3)
    expected = math.exp(math.log(0.5)) - math.log(0.5) - 1
    assert result.kl.item() == pytest.approx(expected, abs=1e-6)
    assert result.total.item() == pytest.approx(0.3 * expected, abs=1e-6)
    with pytest.raises(ValueError, match="needs reference_logprobs"):
        losses.grpo_loss(policy, policy, torch.zeros(1), 0.2, None, kl_coefficient=0.3)


def test_the_policy_gradient_raises_good_tokens_and_lowers_bad_ones() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    logprobs = losses.chosen_logprobs(logits, torch.tensor([0, 0]), 1.0)
    losses.grpo_loss(logprobs, logprobs.detach(), torch.tensor([1.0, -1.0]), 0.2).total.backward()
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([-2 / 3, 1 / 3, 1 / 3])
    assert logits.grad[1].tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3])


def test_chosen_logprobs_use_the_sampling_temperature() -> None:
    logits = torch.tensor([[2.0, 0.0]])
    expected = math.log(math.exp(4.0) / (math.exp(4.0) + 1))
    assert losses.chosen_logprobs(logits, torch.tensor([0]), 0.5).item() == pytest.approx(expected, abs=1e-6)


def test_k3_as_a_loss_has_the_gradient_of_the_other_direction() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, generator=generator, requires_grad=True)
    policy, reference = logits.log_softmax(-1), torch.randn(6, generator=generator).log_softmax(-1)
    weights, zeros = policy.detach().exp(), torch.zeros(6)  # an exact expectation over samples of the policy
    losses_of = [
        losses.grpo_loss(policy[i : i + 1], policy[i : i + 1].detach(), zeros[:1], 0.2, reference[i : i + 1], 1.0).total
        for i in range(6)
    ]
    expected_k3 = (weights * torch.stack(losses_of)).sum()
    [gradient] = torch.autograd.grad(expected_k3, logits, retain_graph=True)
    [to_policy] = torch.autograd.grad((reference.exp() * (reference - policy)).sum(), logits, retain_graph=True)
    [to_reference] = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits)
    assert torch.allclose(gradient, to_policy, atol=1e-6), "KL(reference || policy)"
    assert not torch.allclose(gradient, to_reference, atol=1e-3)
    assert expected_k3.item() == pytest.approx((weights * (policy - reference)).sum().item(), abs=1e-5), "its value"
