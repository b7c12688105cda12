"""Means, intervals and verdicts: by hand, and whatever the figures."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from benchmarks.claims.statistics import (
    LEAST_SEEDS,
    NOISE,
    Estimate,
    difference,
    quantile,
    verdict,
)

FIGURES = st.floats(-100, 100).map(lambda x: round(x, 3))
LISTS = st.lists(FIGURES, min_size=2, max_size=8)


def test_an_interval_by_hand() -> None:
    """Three values 40, 41, 43: mean 124/3, deviation √(7/3), t of two degrees 4.30265."""
    found = Estimate.of([40, 41, 43])
    assert found.mean == pytest.approx(124 / 3)
    assert found.half == pytest.approx(4.302653 * math.sqrt(7 / 3) / math.sqrt(3), rel=1e-6)
    assert str(found) == "41.3 ± 3.8"


def test_nothing_and_one() -> None:
    nothing, one = Estimate.of([]), Estimate.of([3.0])
    assert math.isnan(nothing.mean) and str(nothing) == "–"
    assert (one.mean, one.half, str(one)) == (3.0, math.inf, "3.0")
    assert verdict(nothing, 0) == verdict(one, 0) == "too few seeds"


def test_what_is_not_finite_is_not_measured() -> None:
    found = Estimate.of([math.nan, 1.0, 2.0, math.inf])
    assert found == Estimate.of([1.0, 2.0]) and found.count == 2
    assert difference({0: math.nan, 1: 2.0}, {0: 1.0, 1: 1.5}).count == 1


@given(LISTS)
def test_the_interval_is_that_of_scipy(values: list[float]) -> None:
    found = Estimate.of(values)
    assert found.low <= found.mean + 1e-9 and found.mean <= found.high + 1e-9
    if len(set(values)) > 1:
        theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=1e-6)


@given(LISTS, FIGURES)
def test_what_a_seed_does_to_both_does_not_count(values: list[float], shift: float) -> None:
    """The same runs, each ahead by the same: the interval is nothing, however much seeds differ."""
    worse = dict(enumerate(values))
    found = difference({seed: value + shift for seed, value in worse.items()}, worse)
    assert found.mean == pytest.approx(shift, abs=1e-9) and found.half == pytest.approx(0, abs=1e-9)


def test_another_order_of_adding_up_is_no_difference() -> None:
    better = {0: 0.1 + 0.2, 1: 1 + 5e-10, 2: 1 + 2e-9}
    found = difference(better, {0: 0.3, 1: 1.0, 2: 1.0})
    assert better[0] != 0.3 and found.mean == pytest.approx(2e-9 / 3, rel=1e-3)


@given(LISTS, LISTS)
def test_the_other_way_round_is_the_negative(a: list[float], b: list[float]) -> None:
    one, other = (dict(enumerate(values)) for values in (a, b))
    there, back = difference(one, other), difference(other, one)
    assert there.count == back.count == min(len(a), len(b))
    assert there.mean == pytest.approx(-back.mean) and there.half == pytest.approx(back.half)


ORDER = (
    "does not hold",
    "undecided at this size",
    "ahead, by how much is undecided",
    "holds",
)


@given(FIGURES, st.floats(0, 50), st.floats(-5, 5))
def test_a_verdict_says_where_the_interval_lies(mean: float, half: float, least: float) -> None:
    low, high = mean - half, mean + half
    found = verdict(Estimate(mean, half, 3), least)
    if found == "holds":  # of every value in it
        assert low >= least - NOISE and (low > 0 or least < 0)
    elif found == "does not hold":  # of none
        assert high < least
    elif found == "ahead, by how much is undecided":
        assert 0 < low < least <= high + NOISE
    else:
        assert found == "undecided at this size"
        assert low <= NOISE and high >= least - NOISE and (low < least or least >= 0)


@given(FIGURES, st.floats(0, 50), st.floats(-5, 5), st.floats(0, 10))
def test_more_is_never_worse(mean: float, half: float, least: float, more: float) -> None:
    """Of a statement that allows no loss, ahead is more than undecided."""
    first, second = (verdict(Estimate(m, half, 3), least) for m in (mean, mean + more))
    assert ORDER.index(first) <= ORDER.index(second)


@given(LISTS, st.floats(-5, 5))
def test_fewer_than_three_seeds_say_nothing(values: list[float], least: float) -> None:
    assert verdict(Estimate.of(values[:2]), least) == "too few seeds"
    assert (verdict(Estimate.of(values), least) == "too few seeds") == (len(values) < LEAST_SEEDS)


@pytest.mark.parametrize(
    ("mean", "half", "least", "expected"),
    [
        (1.6, 0.5, 1.0, "holds"),
        (1.5, 0.5, 1.0, "holds"),  # at what is stated
        (1.2, 0.5, 1.0, "ahead, by how much is undecided"),  # it may be 0.7
        (0.9, 0.2, 1.0, "ahead, by how much is undecided"),
        (1.5, 1.6, 1.0, "undecided at this size"),  # the interval holds 0
        (0.9, 0.05, 1.0, "does not hold"),  # ahead, by too little
        (-2.0, 0.5, 0.0, "does not hold"),
        (0.3, 0.2, 0.0, "holds"),
        (0.2, 0.2, 0.0, "undecided at this size"),  # as good is not ahead
        (0.0, 0.0, 0.0, "undecided at this size"),
        (-0.2, 0.1, -0.5, "holds"),  # it loses little
        (-0.2, 0.4, -0.5, "undecided at this size"),
        (-0.9, 0.2, -0.5, "does not hold"),
    ],
)
def test_verdicts_by_hand(mean: float, half: float, least: float, expected: str) -> None:
    assert verdict(Estimate(mean, half, 3), least) == expected


@pytest.mark.parametrize(
    ("differences", "least", "expected"),
    [
        ([0.95, 1.06, 1.0], 1.0, "ahead, by how much is undecided"),  # 1.00 ± 0.14
        ([0.02, 0.02], 0.0, "too few seeds"),
        ([5.6e-17] * 3, 0.0, "undecided at this size"),
        ([1.1 - 0.1] * 3, 1.0, "holds"),
    ],
)
def test_verdicts_of_differences(differences: list[float], least: float, expected: str) -> None:
    """A difference of 5.6e-17, three times, has no spread, and is no evidence."""
    better = dict(enumerate(differences))
    assert verdict(difference(better, dict.fromkeys(better, 0.0)), least) == expected


@given(st.lists(FIGURES, min_size=1, max_size=9), st.floats(0, 1))
def test_quantiles_are_those_of_numpy(values: list[float], share: float) -> None:
    assert quantile(values, share) == pytest.approx(np.quantile(values, share), abs=1e-9)


def test_what_ran_away_is_beyond_every_number() -> None:
    assert quantile([1.0, math.nan, 3.0], 0.5) == 3.0
    assert quantile([1.0, math.inf, math.nan], 0.75) == math.inf
    assert math.isnan(quantile([], 0.5))
