"""The arithmetic of an audit, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from search_r3.environment.account import RANK_CAP, compare_scores


def test_an_audit_by_hand() -> None:
    live, fresh = np.eye(2, dtype=np.float32), np.array([[1.0, 0.0], [0.6, 0.8]], dtype=np.float32)
    audit = compare_scores(
        rewards=[[1.0, 0.5, 0.0], [0.5, 0.5, 0.25]],
        ranks=[[1, 4, 5000], [2, 4, 3 * RANK_CAP]],
        top=[[["a", "b"], ["a", "b"], ["c", "d"]], [["b", "a"], ["a", "c"], ["e", "f"]]],
        sample=[live, fresh],
        documents=7,
        seconds=1.5,
    )
    assert audit.reward_error == pytest.approx(0.25)
    assert audit.rank_error == pytest.approx(1 / 3), "ranks beyond the cap are alike"
    assert audit.top10_overlap == pytest.approx((1 + 0.5 + 0) / 3)
    assert audit.drift_mean == pytest.approx((0 + 0.2) / 2)
    assert audit.metrics() == {
        "audit_reward_error": audit.reward_error,
        "audit_rank_error": audit.rank_error,
        "audit_top10_overlap": audit.top10_overlap,
        "audit_drift_mean": audit.drift_mean,
        "audit_documents": 7,
        "audit_seconds": 1.5,
    }
