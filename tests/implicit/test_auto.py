"""`Auto`: what it estimates, and where it goes on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gradient_problems import contraction, random
from torch import Tensor

import implicit
from implicit import ConvergenceWarning, Steps, fixed_point
from implicit.solution import Adjoint


def by_auto(
    gradient: implicit.Auto, rates: list[list[float]], v: list[list[float]]
) -> tuple[Tensor, Adjoint]:
    """``(I − J)⁻¹ v`` for diagonal Jacobians, one a row, as `Auto` finds it, and its figures."""
    j = torch.tensor(rates, dtype=torch.float64)
    x = torch.zeros_like(j, requires_grad=True)
    solution = fixed_point(lambda y: j * y + x, x.detach(), stop=Steps(1), gradient=gradient)
    (w,) = torch.autograd.grad(solution.value, x, torch.tensor(v, dtype=torch.float64))
    (figures,) = solution.adjoints
    return w, figures


# -- where the series is enough ------------------------------------------------------------------


@pytest.mark.parametrize("rtol", [1e-1, 1e-2, 1e-3])
def test_auto_ends_where_the_geometric_series_is_near_enough(rtol: float) -> None:
    """For ``J = aI`` the estimate is no estimate: ``|a|ⁿ⁺¹ / (1 − |a|)`` over ``|Σ aⁱ|``.

    Each sample ends after its own number of terms, and goes no further with those that need more.
    """
    rates = [0.5, 0.3, -0.4, 0.1, 0.01]
    gradient = implicit.Auto(rtol=rtol, terms=50)
    w, figures = by_auto(gradient, [[a, a] for a in rates], [[3.0, -4.0]] * len(rates))
    for i, a in enumerate(rates):
        n, error = 1, math.inf
        while error > rtol:
            n += 1
            series = sum(a**k for k in range(n + 1))
            error = abs(a) ** (n + 1) / (1 - abs(a)) / abs(series)
        assert int(figures.products[i]) == n
        assert float(figures.error[i]) == pytest.approx(error, rel=1e-9)
        assert w[i].tolist() == pytest.approx([3 * series, -4 * series], rel=1e-14)


def test_auto_looks_at_the_slower_of_two_ratios() -> None:
    """``v`` alternates under ``J = [[0, a], [b, 0]]``: the ratios are ``b, a, b, a, …``."""
    a, b = 0.01, 0.6
    j = torch.tensor([[0.0, a], [b, 0.0]], dtype=torch.float64)
    x = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    solution = fixed_point(
        lambda y: y @ j + x, x.detach(), stop=Steps(1), gradient=implicit.Auto(5e-3, terms=20)
    )
    v = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    (w,) = torch.autograd.grad(solution.value, x, v)
    exact = torch.linalg.solve(torch.eye(2, dtype=torch.float64) - j, v.T).T
    (figures,) = solution.adjoints
    # After 0.01: 0.6; terms of length 0.6, 0.006, 0.0036, with q = 0.6 all the way.
    assert figures.products.tolist() == [3]
    assert float(figures.error) == pytest.approx(
        0.6 * 0.01 * 0.6 * 0.6 / 0.4 / math.hypot(1.006, 0.6 * 1.006), rel=1e-9
    )
    assert float((w - exact).norm()) <= 5e-3 * float(exact.norm())


def test_auto_needs_one_term_where_the_map_forgets_its_state() -> None:
    w, figures = by_auto(implicit.Auto(), [[0.0, 0.0], [0.0, 0.0]], [[1.0, 2.0], [0.0, 0.0]])
    assert w.tolist() == [[1, 2], [0, 0]]
    assert figures.error.tolist() == [0, 0]
    assert figures.products.tolist() == [1, 1]


# -- where it solves -----------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [1, 2, 8])
def test_auto_solves_where_the_series_does_not_converge(terms: int) -> None:
    """Two eigenvalues need two dimensions, and one product is for the residual of the sum.

    The easy sample beside them, and the one whose series overflows, end as they do alone.
    """
    gradient = implicit.Auto(rtol=1e-8, terms=terms)
    rates = [[-3.0, 2.0], [1.5, 1.5], [-1.0, -1.0], [0.0, 0.0]]
    w, figures = by_auto(gradient, rates, [[1.0, 1.0]] * 4)
    exact = 1 / (1 - torch.tensor(rates, dtype=torch.float64))
    torch.testing.assert_close(w, exact, rtol=1e-8, atol=0)
    assert figures.products.tolist() == [terms + 3, terms + 2, terms + 2, 1]
    assert float(figures.error.max()) <= 1e-8


@pytest.mark.parametrize(
    ("dtype", "rate"), [(torch.float32, 20.0), (torch.float32, 300.0), (torch.float64, 1e6)]
)
def test_auto_forgets_a_sum_that_has_grown_beyond_its_digits(
    dtype: torch.dtype, rate: float
) -> None:
    """Or beyond the range of the dtype: eight terms of a map that expands so much."""
    j = torch.tensor([[rate, 0.5]], dtype=dtype)
    w, figures = implicit.Auto().inverse(lambda t: j * t, torch.ones_like(j), 0.0)
    torch.testing.assert_close(w, 1 / (1 - j), rtol=2e-3, atol=1e-6)
    assert float(figures.error) <= 1e-3


def test_auto_asks_for_a_smaller_residual_where_the_error_is_not_small() -> None:
    """``‖w − ŵ‖ ≤ ‖residual‖ / σ``: a residual of half the tolerance leaves too much by ``1/σ``."""
    rates = [[0.5 * math.cos(k) for k in range(29)] + [0.999]]
    v = [[1.0] * 29 + [0.1]]
    exact = torch.tensor(v, dtype=torch.float64) / (1 - torch.tensor(rates, dtype=torch.float64))
    for rtol in (1e-4, 1e-6):
        w, figures = by_auto(implicit.Auto(rtol=rtol), rates, v)
        assert rtol / 10 < float(figures.error) <= rtol, "no smaller than that needs"
        assert float((w - exact).norm() / exact.norm()) <= rtol


def test_auto_knows_of_a_slow_direction_that_the_gradient_hardly_has() -> None:
    """``1e-4`` of ``v`` becomes a hundred: the residual is small from the start, the error 1."""
    w, figures = by_auto(implicit.Auto(), [[0.0, 1 - 1e-6]], [[1.0, 1e-4]])
    torch.testing.assert_close(
        w, torch.tensor([[1.0, 100.0]], dtype=torch.float64), rtol=1e-3, atol=0
    )
    assert float(figures.error) <= 1e-3


class Counted(torch.autograd.Function):
    """The identity, which counts how often it is differentiated."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        Counted.calls += 1
        return g


@pytest.mark.parametrize(
    ("dtype", "slow", "others", "rtol", "most"),
    [
        (torch.float64, 0.99, 60, 1e-6, 80),
        (torch.float64, 0.9999, 60, 1e-6, 100),
        (torch.float64, 0.9999, 60, 1e-9, 130),
        (torch.float32, 0.99, 200, 1e-3, 60),
        (torch.float32, 0.99, 200, 1e-7, 60),
        (torch.float32, 0.999, 200, 1e-6, 60),
    ],
)
@pytest.mark.filterwarnings("ignore::implicit.ConvergenceWarning")
def test_auto_tells_as_many_products_as_it_takes_and_takes_few(
    dtype: torch.dtype, slow: float, others: int, rtol: float, most: int
) -> None:
    """Three terms, the residual of their sum, and GMRES: once, and once more where it must.

    A slow direction makes the first error larger than its residual.  The second pass then asks for
    as much less as that was too large; where rounding would leave no less, there is none.
    """
    rates = torch.tensor([0.9 * math.cos(k + 0.5) for k in range(others)] + [slow], dtype=dtype)
    x = torch.zeros(1, others + 1, dtype=dtype, requires_grad=True)
    gradient = implicit.Auto(rtol=rtol, terms=3, krylov=2 * others)
    solution = fixed_point(
        lambda y: Counted.apply(y) * rates + x, x.detach(), stop=Steps(1), gradient=gradient
    )
    Counted.calls = 0
    v = torch.ones_like(x)
    (w,) = torch.autograd.grad(solution.value, x, v)
    (figures,) = solution.adjoints
    assert Counted.calls == int(figures.products) <= most
    exact = v / (1 - rates)
    reachable = 10 * torch.finfo(dtype).eps / (1 - slow)
    assert float((w - exact).norm() / exact.norm()) <= max(rtol, reachable)


# -- what it tells -------------------------------------------------------------------------------


def test_what_auto_reports_is_relative() -> None:
    """The same products and the same error, whatever the loss is multiplied by."""
    j, x = contraction(12, 0.995, seed=31), random(2, 12, seed=32).requires_grad_()

    def figures(scale: float) -> Adjoint:
        solution = fixed_point(
            lambda y: y @ j + x,
            torch.zeros(2, 12, dtype=torch.float64),
            gradient=implicit.Auto(1e-6),
        )
        torch.autograd.grad(scale * solution.value.square().sum(), x)
        found: Adjoint = solution.adjoints[0]
        return found

    plain = figures(1.0)
    assert int(plain.products.min()) > 8  # it escalates
    for scale in (2.0**20, 2.0**-20):
        scaled = figures(scale)
        assert torch.equal(scaled.products, plain.products)
        torch.testing.assert_close(scaled.error, plain.error, rtol=1e-6, atol=0.0)


def test_auto_tells_what_it_could_not_reach() -> None:
    """Three eigenvalues in two dimensions, beside a sample with a series of one term."""
    gradient = implicit.Auto(rtol=1e-6, terms=2, krylov=2)
    with pytest.warns(ConvergenceWarning, match="Auto: the gradient of 1 of 2 samples is inexact"):
        w, figures = by_auto(gradient, [[-3.0, 2.0, 0.5], [0.0] * 3], [[1.0] * 3] * 2)
    assert w[1].tolist() == [1, 1, 1]
    assert figures.products.tolist() == [2 + 1 + 2, 1]
    assert float(figures.error[0]) > 1e-6 >= float(figures.error[1])


def test_auto_warns_where_the_adjoint_system_is_singular() -> None:
    """``f(y) = y + x − 1`` at slope 1: ``I − Jᵀ`` is zero, and no gradient exists."""
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    slope = torch.tensor([[0.5], [1.0]], dtype=torch.float64)
    y0 = torch.zeros(2, 3, dtype=torch.float64)
    solution = fixed_point(lambda y: slope * y + (x - 1), y0, gradient=implicit.Auto())
    with pytest.warns(implicit.ConvergenceWarning, match=r"1 of 2 samples"):
        (found,) = torch.autograd.grad(solution.value.sum(), x)
    torch.testing.assert_close(found[0], torch.full_like(found[0], 2.0), rtol=1e-3, atol=0)
    assert solution.adjoints[0].error.tolist()[1] == math.inf


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rtol", [0.0, -1.0, math.inf, math.nan])
def test_auto_needs_a_tolerance_that_can_be_met(rtol: float) -> None:
    with pytest.raises(ValueError, match=r"Auto\(rtol=.*must be a finite number above 0"):
        implicit.Auto(rtol)
