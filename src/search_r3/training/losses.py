"""The losses of both stages as pure functions on tensors.

Shapes: `B` queries or rollouts, `M` documents, `K` negatives per query, `S` supervised or
sampled tokens, `V` vocabulary, `Q` queries, `G` rollouts per query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..model.backbone import shorten


def kl_to_base(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """`L_KL`: `KL(base || tuned)` in nats at each position, `S`, of both logits, `S x V`.

    This direction makes the tuned model keep every continuation that the base considers likely.
    """
    reference = torch.log_softmax(reference_logits, dim=-1)
    policy = torch.log_softmax(logits, dim=-1)
    return (reference.exp() * (reference - policy)).sum(-1)


def info_nce(
    queries: Tensor, documents: Tensor, positives: Tensor, excluded: Tensor, contrastive_temperature: float
) -> Tensor:
    """`L_InfoNCE = -log( exp(cos(q,d+)/tau) / sum_i exp(cos(q,d_i)/tau) )`, mean over queries (paper, section 3).

    Args:
        queries: `B x D`, L2-normalised.
        documents: `M x D`, L2-normalised.
        positives: `B`, the column of each query's positive.
        excluded: `B x M`, True for a document left out of a query's sum (its other positives, doubled texts).
        contrastive_temperature: tau.
    """
    scores = queries @ documents.T / contrastive_temperature  # B x M
    scores = scores.masked_fill(excluded, float("-inf"))
    return functional.cross_entropy(scores, positives)


def triplet_margin(positive_cosines: Tensor, negative_cosines: Tensor, margin: float) -> Tensor:
    """`L_TripletMargin = max(0, theta + cos(q,d-) - cos(q,d+))`, mean over `B x K` pairs.

    Args:
        positive_cosines: `B`.
        negative_cosines: `B x K`.
        margin: theta.
    """
    return functional.relu(margin + negative_cosines - positive_cosines[:, None]).mean()


def contrastive(
    queries: Tensor,
    documents: Tensor,
    positives: Tensor,
    excluded: Tensor,
    negatives: Tensor,
    contrastive_temperature: float,
    margin: float,
    prefixes: Sequence[int] = (),
) -> dict[str, Tensor]:
    """`info_nce` and, where there are negatives, `triplet`, averaged over the whole vectors and prefixes of them.

    Args:
        queries: `B x D`, L2-normalised.
        documents: `M x D`, L2-normalised.
        positives: `B`, columns.
        excluded: `B x M`; see `info_nce`.
        negatives: `B x K`, columns.
        contrastive_temperature: tau.
        margin: theta.
        prefixes: their dimensions.
    """
    sizes = (*prefixes, queries.shape[1])
    parts: dict[str, Tensor] = {}
    for size in sizes:
        near, far = queries, documents
        if size < queries.shape[1]:
            near, far = shorten(queries, size), shorten(documents, size)
        terms = {"info_nce": info_nce(near, far, positives, excluded, contrastive_temperature)}
        if negatives.shape[1] > 0:
            cosines = near @ far.T  # B x M
            nearness = cosines.gather(1, positives[:, None])[:, 0]
            # What is no negative stands as far away as can be.
            against = cosines.masked_fill(excluded, -1.0 - margin).gather(1, negatives)
            terms["triplet"] = triplet_margin(nearness, against, margin)
        for name, value in terms.items():
            parts[name] = parts[name] + value if name in parts else value
    return {name: value / len(sizes) for name, value in parts.items()}


@dataclass(frozen=True)
class Advantages:
    """`values` `Q x G`; `equal_share`: share of groups whose rewards are all equal and which teach nothing."""

    values: Tensor
    equal_share: float


def group_advantages(
    rewards: Tensor,
    scale: Literal["group", "batch", "none"],
    baseline: Tensor | str = "group_mean",
    tolerance: float = 1e-6,
) -> Advantages:
    """Group-relative advantages: reward minus a baseline, divided once as `scale` says.

    `group` divides by the group's own standard deviation (GRPO, arXiv 2402.03300), which gives the smallest
    differences the same weight as the largest; `batch` by the root mean square of all centred rewards; `none` by 1
    (arXiv 2503.20783).

    Args:
        rewards: `Q x G`.
        scale: the divisor.
        baseline: `group_mean`; `leave_one_out`, the mean of the group's others (arXiv 2402.14740), which differs by the
            factor `G / (G - 1)` and so only where `scale` is `none`; or a reward for each query, `Q`. With the first
            two a group whose rewards are equal within `tolerance` gets exactly 0.
        tolerance: rewards closer than this count as equal.
    """
    equal = (rewards.amax(-1) - rewards.amin(-1)) <= tolerance
    if isinstance(baseline, Tensor):
        centred = rewards - baseline[:, None]
    else:
        size = rewards.shape[-1]
        factor = size / (size - 1) if baseline == "leave_one_out" else 1.0
        centred = (factor * (rewards - rewards.mean(-1, keepdim=True))).masked_fill(equal[:, None], 0.0)
    if scale == "group":
        divisor = rewards.std(-1, keepdim=True) + 1e-4
    elif scale == "batch":
        divisor = centred.pow(2).mean().sqrt() + 1e-4
    else:
        divisor = torch.ones(())
    return Advantages(centred / divisor, equal.float().mean().item())


@dataclass(frozen=True)
class GRPOLoss:
    """Sums over tokens; divide by the number of tokens of the whole batch. `clipped`, `kl`: for the metrics."""

    total: Tensor
    clipped: Tensor
    kl: Tensor


def grpo_loss(
    policy_logprobs: Tensor,
    sampler_logprobs: Tensor,
    advantages: Tensor,
    clip_epsilon: float,
    reference_logprobs: Tensor | None = None,
    kl_coefficient: float = 0.0,
) -> GRPOLoss:
    """Clipped policy-gradient loss of GRPO, summed over sampled tokens.

    `-min(r A, clip(r, 1 - eps, 1 + eps) A) + beta (exp(d) - d - 1)` with `r = exp(policy - sampler)` and
    `d = reference - policy`. The last term is the k3 estimate of KL(policy || reference); its gradient, `1 - exp(d)`
    times that of the log-probability, is however that of KL(reference || policy) in expectation over the policy's
    samples, as everywhere where k3 serves as a loss.

    Args:
        policy_logprobs: `S`, log-probabilities under the weights being trained, of tokens that the model chose.
        sampler_logprobs: `S`, those recorded while sampling.
        advantages: `S`, the advantage of the rollout that each token belongs to.
        clip_epsilon: eps.
        reference_logprobs: `S`, needed when `kl_coefficient` is above 0.
        kl_coefficient: beta.
    """
    ratio = torch.exp(policy_logprobs - sampler_logprobs)
    scaled, limited = ratio * advantages, ratio.clamp(1 - clip_epsilon, 1 + clip_epsilon) * advantages
    per_token = -torch.minimum(scaled, limited)
    kl = torch.zeros(())
    if kl_coefficient > 0:
        if reference_logprobs is None:
            raise ValueError("kl_coefficient > 0 needs reference_logprobs")
        delta = reference_logprobs - policy_logprobs
        divergence = torch.exp(delta) - delta - 1
        per_token = per_token + kl_coefficient * divergence
        kl = divergence.sum().detach()
    return GRPOLoss(per_token.sum(), (limited < scaled).sum().detach(), kl)


def chosen_logprobs(logits: Tensor, ids: Tensor, sampling_temperature: float) -> Tensor:
    """Log-probability of chosen tokens under the sampling distribution, `S`.

    Args:
        logits: `S x V`, at the positions that predict the tokens.
        ids: `S`, the tokens.
        sampling_temperature: the temperature that they were sampled at.
    """
    if sampling_temperature != 1.0:  # a copy of the largest tensor there is
        logits = logits / sampling_temperature
    return torch.log_softmax(logits, dim=-1).gather(-1, ids[:, None])[:, 0]


def score_distillation(students: Tensor, teachers: Tensor, documents: Tensor, score_temperature: float) -> Tensor:
    """`KL(softmax(teacher's scores / tau) || softmax(student's scores / tau))` in nats, summed over queries.

    Args:
        students: `B x D`, L2-normalised.
        teachers: `B x D`, L2-normalised; they get no gradient.
        documents: `M x D`, scored for every query.
        score_temperature: tau.
    """
    student = torch.log_softmax(students @ documents.T / score_temperature, dim=-1)  # B x M
    teacher = torch.log_softmax(teachers.detach() @ documents.T / score_temperature, dim=-1)
    return (teacher.exp() * (teacher - student)).sum()
