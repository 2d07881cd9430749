"""Refresh policies: which documents are encoded again before the rollouts of a step are ranked.

The environment always encodes the positives of the batch freshly; a policy names what else is worth it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..errors import ConfigError
from ..retrieval.index import Array, VectorIndex


@dataclass(frozen=True)
class RefreshRequest:
    """What a policy may look at.

    Attributes:
        index: the live index with its `encoded_at_version`.
        policy_version: the version of the weights that made the queries.
        queries: the vectors about to be ranked, `B x D`.
        positive_ids: the positives of the batch (encoded freshly whatever the policy says).
    """

    index: VectorIndex
    policy_version: int
    queries: Array
    positive_ids: Sequence[str]


class RefreshPolicy(Protocol):
    """A rung of the ladder in docs/method.md."""

    name: str

    def choose(self, request: RefreshRequest) -> Sequence[str]:
        """The doc_ids to encode again; those that are already fresh are skipped by the environment."""
        ...


class Never:
    """No document but the batch's positives is ever encoded again."""

    name = "never"

    def choose(self, request: RefreshRequest) -> Sequence[str]:
        """Nothing."""
        return []


class Full:
    """Every document is encoded again at every step: the truth, at full price."""

    name = "full"

    def choose(self, request: RefreshRequest) -> Sequence[str]:
        """Everything."""
        return request.index.doc_ids


POLICIES: dict[str, Callable[[], RefreshPolicy]] = {"never": Never, "full": Full}


def make_policy(name: str) -> RefreshPolicy:
    """The policy of that name.

    Raises:
        ConfigError: no such policy.
    """
    if name not in POLICIES:
        raise ConfigError(f"unknown refresh policy {name!r}; known: {', '.join(POLICIES)}")
    return POLICIES[name]()
