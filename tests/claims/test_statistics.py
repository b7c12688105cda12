"""Means, intervals and verdicts: by hand, and whatever the figures."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from benchmarks.claims.statistics import Estimate, difference, verdict

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
    assert verdict(nothing, 0) == "not measured"
    assert verdict(one, 0) == "undecided at this size"


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


@given(LISTS, LISTS)
def test_the_other_way_round_is_the_negative(a: list[float], b: list[float]) -> None:
    one, other = (dict(enumerate(values)) for values in (a, b))
    there, back = difference(one, other), difference(other, one)
    assert there.count == back.count == min(len(a), len(b))
    assert there.mean == pytest.approx(-back.mean) and there.half == pytest.approx(back.half)


@given(FIGURES, st.floats(0, 50), st.floats(-5, 5))
def test_a_verdict_is_never_both(mean: float, half: float, least: float) -> None:
    found = verdict(Estimate(mean, half, 3), least)
    if found == "holds":
        assert mean >= least and mean - half > min(0, least)
    elif found == "does not hold":
        assert mean + half < least
    else:
        assert mean + half >= least


@given(FIGURES, st.floats(0, 50), st.floats(0, 5), st.floats(0, 10))
def test_more_is_never_worse(mean: float, half: float, least: float, more: float) -> None:
    order = ("does not hold", "undecided at this size", "holds")
    first, second = (verdict(Estimate(m, half, 3), least) for m in (mean, mean + more))
    assert order.index(first) <= order.index(second)


@pytest.mark.parametrize(
    ("mean", "half", "least", "expected"),
    [
        (1.5, 0.5, 1.0, "holds"),
        (1.5, 1.6, 1.0, "undecided at this size"),  # the interval holds 0
        (0.9, 0.1, 1.0, "undecided at this size"),  # ahead, by too little, but not surely so
        (0.9, 0.05, 1.0, "does not hold"),
        (-2.0, 0.5, 0.0, "does not hold"),
        (-0.2, 0.1, -0.5, "holds"),  # it loses little
        (-0.2, 0.4, -0.5, "undecided at this size"),
    ],
)
def test_verdicts_by_hand(mean: float, half: float, least: float, expected: str) -> None:
    assert verdict(Estimate(mean, half, 3), least) == expected
