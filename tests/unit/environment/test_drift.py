"""The correction of stale vectors: each map on the motion it is made for, and the choice between them."""

from __future__ import annotations

import numpy as np
import pytest

from search_r3.environment.drift import (
    CANDIDATES,
    MIN_PAIRS,
    fit_drift,
    low_rank_affine,
    procrustes,
    weighted_mean_drift,
)

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def same_numbers_for_every_test() -> None:
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def points(count: int, dimension: int = 12) -> np.ndarray:
    return unit(RNG.normal(size=(count, dimension)))


def small_rotation(dimension: int, size: float) -> np.ndarray:
    skew = RNG.normal(size=(dimension, dimension)) * size
    return np.linalg.qr(np.eye(dimension) + skew - skew.T)[0].astype(np.float32)


def test_procrustes_finds_a_rotation() -> None:
    stale, rotation = points(60), small_rotation(12, 0.1)
    rotation *= np.sign(np.diag(rotation))  # QR may flip axes
    found = procrustes(stale[:40], stale[:40] @ rotation, ridge=1e-6)(stale[40:])
    np.testing.assert_allclose(found, stale[40:] @ rotation, atol=1e-4)


def test_procrustes_with_few_pairs_leaves_unseen_directions_alone() -> None:
    stale = points(3)
    moved = procrustes(stale, stale)(points(20))
    assert moved.shape == (20, 12)
    unseen = np.linalg.svd(stale)[2][3:].astype(np.float32)
    np.testing.assert_allclose(procrustes(stale, stale)(unseen), unseen, atol=1e-5)


def test_weighted_mean_drift_by_hand() -> None:
    before = np.eye(2, dtype=np.float32)
    after = before + np.array([[0.1, 0.0], [0.0, 0.3]], dtype=np.float32)
    weight = np.exp(1 / 0.5) / (np.exp(1 / 0.5) + 1)
    moved = weighted_mean_drift(before, after, similarity_temperature=0.5)(before[:1])
    np.testing.assert_allclose(moved, [[1 + 0.1 * weight, 0.3 * (1 - weight)]], rtol=1e-5)


def test_low_rank_affine_finds_a_shift_and_a_rank_one_change() -> None:
    stale = points(200)
    change = np.outer(RNG.normal(size=12), RNG.normal(size=12)).astype(np.float32) * 0.1
    shift = RNG.normal(size=12).astype(np.float32) * 0.1
    fresh = stale + shift + stale @ change
    moved = low_rank_affine(stale[:150], fresh[:150], ridge=1e-3, rank=1)(stale[150:])
    np.testing.assert_allclose(moved, fresh[150:], atol=3e-3)


def test_motion_without_a_pattern_is_left_alone() -> None:
    stale = points(60, 40)
    correction = fit_drift(stale, unit(stale + 0.2 * RNG.normal(size=stale.shape)))
    assert correction.name == "identity"
    assert correction.gain == 0.0
    assert correction.apply(stale) is stale


@pytest.mark.parametrize("common", ["rotation", "shift"])
def test_common_motion_is_found_and_removed_from_others(common: str) -> None:
    stale = points(300)
    rotation = small_rotation(12, 0.1)
    rotation *= np.sign(np.diag(rotation))
    fresh = stale @ rotation if common == "rotation" else unit(stale + 0.3 * points(1))
    correction = fit_drift(stale[:100], fresh[:100])
    corrected = correction.apply(stale[100:])
    np.testing.assert_allclose(np.linalg.norm(corrected, axis=1), 1.0, rtol=1e-5)
    before = (1 - (stale[100:] * fresh[100:]).sum(axis=1)).mean()
    after = (1 - (corrected * fresh[100:]).sum(axis=1)).mean()
    assert after < 0.2 * before
    assert correction.gain == pytest.approx(1 - after / before, abs=0.15)
    assert set(correction.held_out) == set(CANDIDATES)


def test_too_few_pairs_choose_nothing() -> None:
    stale = points(MIN_PAIRS - 1)
    assert fit_drift(stale, unit(stale + 0.3)).name == "identity"
    more = points(4 * MIN_PAIRS)
    assert fit_drift(more, unit(more + 0.3)).name != "identity"


def test_the_processes_can_agree_on_another_map() -> None:
    stale = points(100)
    fresh = unit(stale + 0.3 * points(1))
    assert fit_drift(stale, fresh, agree=lambda name: "procrustes").name == "procrustes"
    assert fit_drift(stale, fresh).name != "procrustes"
