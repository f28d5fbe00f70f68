"""The lower bound of a proportion is that of Clopper and Pearson."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.probes.statistics import lower_bound


@pytest.mark.parametrize(
    ("successes", "trials", "percent"),
    [(200, 200, 98.5), (300, 300, 99.0), (499, 500, 99.05), (997, 1000, 99.2), (110, 110, 97.3)],
)
def test_known_bounds(successes, trials, percent):
    decimals = 2 if percent == 99.05 else 1
    assert round(100 * lower_bound(successes, trials), decimals) == pytest.approx(percent)


@given(st.integers(1, 3000), st.floats(0.5, 0.999))
def test_without_a_failure_the_bound_has_a_closed_form(trials, confidence):
    expected = (1 - confidence) ** (1 / trials)
    assert lower_bound(trials, trials, confidence=confidence) == pytest.approx(expected, rel=1e-9)


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n))))
def test_at_the_bound_so_many_successes_have_five_percent(case):
    successes, trials = case
    p = lower_bound(successes, trials)
    tail = sum(math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(successes, trials + 1))
    assert tail == pytest.approx(0.05, rel=1e-9)


def test_no_success_proves_nothing():
    assert lower_bound(0, 10) == 0


def test_the_bound_of_many_trials_is_close_to_the_share():
    assert 0.989 < lower_bound(99_000, 100_000) < 0.99


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 3), (4, 3)])
def test_impossible_counts_are_refused(successes, trials):
    with pytest.raises(ValueError, match="give at least one trial"):
        lower_bound(successes, trials)


@pytest.mark.parametrize("confidence", [0, 1, 95, float("nan")])
def test_a_confidence_outside_0_and_1_is_refused(confidence):
    with pytest.raises(ValueError, match=r"such as 0\.95"):
        lower_bound(1, 2, confidence=confidence)
