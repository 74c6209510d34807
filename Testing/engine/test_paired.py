"""Paired differences: what they say of a known difference, and when they say nothing."""

from __future__ import annotations

import numpy as np
import pytest

from SemiSAMO1Lib.engine.evaluation.paired import paired_difference


def scores(values: np.ndarray) -> dict[str, float]:
    return {f"case_{number:02}": float(value) for number, value in enumerate(values)}


def test_a_constant_gain_is_proven_however_much_the_cases_differ() -> None:
    cases = np.random.default_rng(0).uniform(0.2, 0.95, 20)
    noise = np.random.default_rng(1).normal(0, 0.002, 20)
    found = paired_difference(scores(cases + 0.01 + noise), scores(cases))
    assert found.proven and found.low < found.mean < found.high and found.cases == 20


def test_a_gain_inside_the_noise_is_not_proven() -> None:
    noise = np.random.default_rng(2).normal(0, 0.05, 20)
    found = paired_difference(scores(0.8 + noise - noise.mean() + 0.001), scores(np.full(20, 0.8)))
    assert not found.proven and found.low < 0 < found.high


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(100):
        found = paired_difference(scores(rng.normal(0.1, 1, 25)), scores(np.zeros(25)))
        covered += found.low <= 0.1 <= found.high
    assert 85 <= covered <= 99, f"{covered} of 100 intervals of 95 % contain the truth"


def test_only_common_cases_count() -> None:
    found = paired_difference({"a": 0.9, "b": 0.8, "x": 0.0}, {"a": 0.8, "b": 0.7, "y": 1.0})
    assert found.cases == 2 and found.mean == pytest.approx(0.1)


def test_one_case_proves_nothing() -> None:
    assert not paired_difference({"a": 0.9}, {"a": 0.1}).proven


def test_the_same_scores_do_not_differ() -> None:
    same = {"a": 0.9, "b": 0.8}
    found = paired_difference(same, same)
    assert (found.mean, found.low, found.high, found.proven) == (0, 0, 0, False)


def test_nothing_in_common_is_refused() -> None:
    with pytest.raises(ValueError, match="no case that both have"):
        paired_difference({"a": 1.0}, {"b": 1.0})
