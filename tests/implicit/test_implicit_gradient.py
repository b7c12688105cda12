"""`Implicit`: the adjoint system, solved to a tolerance."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from gradient_problems import EXACT, SOLVERS, TIGHT, cell, contraction, power_sum, problem, random

import implicit
from implicit import (
    Anderson,
    ConvergenceWarning,
    Gradient,
    Implicit,
    Naive,
    Steps,
    Tolerance,
    fixed_point,
)

# -- accuracy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_implicit_against_finite_differences(solver: implicit.Solver) -> None:
    w, x, y0 = problem()
    assert torch.autograd.gradcheck(
        lambda w, x: (
            fixed_point(
                lambda y: cell(y, w, x), y0, solver=solver, stop=TIGHT, gradient=EXACT
            ).value
        ),
        (w, x),
    )


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-7), (torch.float32, 1e-3)])
def test_implicit_is_accurate_by_default(dtype: torch.dtype, within: float) -> None:
    """Relative to ``(I − J)⁻ᵀ v`` with a radius of 0.9, without a stop being chosen."""
    j = contraction(8, 0.9, seed=1)
    exact = torch.linalg.inv(torch.eye(8, dtype=torch.float64) - j).sum(0)
    x = random(8, seed=2).to(dtype).requires_grad_()
    value = fixed_point(
        lambda y: y @ j.T.to(dtype) + x,
        torch.zeros(1, 8, dtype=dtype),
        stop=Tolerance(rtol=1e-5),
        gradient=Implicit(),
    ).value
    (found,) = torch.autograd.grad(value.sum(), x)
    assert float((found.double() - exact).norm() / exact.norm()) < within


def test_the_rounding_of_a_map_that_is_called_by_itself_is_taken_to_be_none() -> None:
    """`Gradient.attach` with a plain function: the tolerance is met, and not loosened."""
    matrix = contraction(6, 0.95, seed=4)
    x = random(2, 6, seed=5).requires_grad_()
    value = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - matrix, x.detach(), left=False)
    attached = Implicit().attach(lambda y: y @ matrix + x, value)
    v = random(2, 6, seed=6)
    (found,) = torch.autograd.grad(attached, x, v)
    exact = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - matrix.T, v, left=False)
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-9)


# -- the scale of what comes in ------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-8, 1e8, 1e-30])
def test_implicit_does_not_depend_on_the_scale_of_the_loss(scale: float) -> None:
    w, x, y0 = problem()
    value = fixed_point(lambda y: cell(y, w, x), y0, stop=TIGHT, gradient=Implicit()).value
    plain = torch.autograd.grad(value.sum(), (w, x), retain_graph=True)
    scaled = torch.autograd.grad(scale * value.sum(), (w, x))
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(other / scale, one, rtol=1e-6, atol=1e-9)


def test_implicit_scale_in_float32() -> None:
    w, x, y0 = (t.detach().float() for t in problem())
    x.requires_grad_()
    stop = Tolerance(rtol=1e-6, atol=0.0, max_steps=200)
    value = fixed_point(lambda y: cell(y, w, x), y0, stop=stop, gradient=Implicit()).value
    (plain,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
    (scaled,) = torch.autograd.grad(1e-8 * value.sum(), x)
    torch.testing.assert_close(scaled * 1e8, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_implicit_knows_no_scale_in_any_dtype(scale: float, dtype: torch.dtype) -> None:
    a = torch.tensor([0.5], dtype=dtype, requires_grad=True)
    value = fixed_point(
        lambda y: a * y + 1, torch.zeros(1, 2, dtype=dtype), stop=Tolerance(rtol=1e-6, atol=0.0)
    ).value
    (found,) = torch.autograd.grad(value, a, torch.full_like(value, scale))
    torch.testing.assert_close(found / scale, torch.tensor([8.0], dtype=dtype), rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-8, 1e-30])
@pytest.mark.parametrize("stop", [Tolerance(rtol=1e-9), Tolerance(rtol=0.0, atol=1e-9)], ids=repr)
def test_a_tolerance_of_the_caller_is_in_units_of_the_incoming_gradient(
    scale: float, stop: Tolerance
) -> None:
    a = torch.tensor([0.5, -0.3, 0.8], dtype=torch.float64, requires_grad=True)
    solution = fixed_point(
        lambda y: a * y + 1,
        torch.zeros(2, 3, dtype=torch.float64),
        stop=Tolerance(rtol=1e-13, atol=0.0, max_steps=100),
        gradient=Implicit(stop=stop),
    )
    (found,) = torch.autograd.grad(scale * solution.value.sum(), a)
    torch.testing.assert_close(found, scale * 2 / (1 - a.detach()) ** 2, rtol=1e-5, atol=0)


def test_implicit_samples_do_not_share_a_tolerance() -> None:
    """A tiny incoming gradient beside a huge one is solved as well as if it were alone."""
    rate = torch.tensor([[0.9], [0.9]], dtype=torch.float64)
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    value = fixed_point(lambda y: rate * y + x, torch.ones_like(x), gradient=EXACT).value
    (value[0].sum() * 1e9 + value[1].sum() * 1e-9).backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], torch.full((3,), 1e10, dtype=torch.float64))
    torch.testing.assert_close(x.grad[1], torch.full((3,), 1e-8, dtype=torch.float64))


def test_implicit_with_no_incoming_gradient() -> None:
    """A loss that ignores a sample sends zeros: solved at once, without a warning or NaN."""
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    value = fixed_point(lambda y: 0.5 * y + x, torch.zeros_like(x), gradient=EXACT).value
    value[0].sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [pytest.approx([2, 2, 2]), [0, 0, 0]]


# -- where it ends, and what it warns of ---------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [
        (torch.float64, 1e-9),
        (torch.float32, 1e-5),
        (torch.float16, 2 * torch.finfo(torch.float16).eps),
        (torch.bfloat16, 2 * torch.finfo(torch.bfloat16).eps),
    ],
)
def test_implicit_ends_at_its_default_tolerance_and_not_beyond(
    dtype: torch.dtype, rtol: float
) -> None:
    """On ``w = v + a w`` from ``v``, plain steps leave ``aⁿ`` of ``v`` after ``n`` evaluations."""
    a = torch.tensor(0.5, dtype=dtype, requires_grad=True)
    solution = fixed_point(
        lambda y: a * y + 1, torch.zeros(1, 1, dtype=dtype), gradient=Implicit(solver=Naive())
    )
    solution.value.sum().backward()
    n = 1
    while 0.5**n / sum(0.5**i for i in range(n + 1)) > rtol:
        n += 1
    assert solution.adjoints[0].products.tolist() == [n]


def test_implicit_with_fixed_steps_warns_of_nothing() -> None:
    """``n`` plain steps on ``w = v + Jᵀw`` from ``v`` are the first ``n + 1`` Neumann terms."""
    j = contraction(4, 0.9, seed=1)
    x = torch.zeros(4, dtype=torch.float64)
    gradient = Implicit(solver=Naive(), stop=Steps(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = torch.autograd.functional.jacobian(
            lambda x: fixed_point(
                lambda y: y @ j.T + x, torch.ones(1, 4, dtype=torch.float64), gradient=gradient
            ).value[0],
            x,
        )
    torch.testing.assert_close(found, power_sum(j, 4))


def test_implicit_warns_when_its_steps_do_not_suffice() -> None:
    x = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    rate = torch.tensor([0.99, 0.9, 0.5, 0.1], dtype=torch.float64)
    gradient = Implicit(solver=Naive(), stop=Tolerance(rtol=1e-9, max_steps=3))
    value = fixed_point(lambda y: rate * y + x, torch.ones_like(x), gradient=gradient).value
    with pytest.warns(ConvergenceWarning, match=r"3 of 3 samples is inexact.*Allow more steps"):
        value.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_adjoint_that_grows_until_it_overflows_is_told(dtype: torch.dtype) -> None:
    x = torch.ones(1, 3, dtype=dtype, requires_grad=True)
    gradient = Implicit(implicit.Naive(), Tolerance(rtol=1e-3, atol=0.0, max_steps=3000))
    solution = fixed_point(lambda y: 1.5 * y + x, -2 * x.detach(), gradient=gradient)
    with pytest.warns(implicit.ConvergenceWarning):
        torch.autograd.grad(solution.value.sum(), x)


@pytest.mark.parametrize("gradient", [Implicit(), implicit.Auto()], ids=repr)
def test_a_gradient_that_is_not_a_number_is_told(gradient: Gradient) -> None:
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    solution = fixed_point(lambda y: 0.5 * y + x, torch.zeros_like(x), gradient=gradient)
    v = torch.tensor([[1.0] * 3, [math.nan] * 3], dtype=torch.float64)
    with pytest.warns(implicit.ConvergenceWarning, match=r"1 of 2 samples"):
        (found,) = torch.autograd.grad(solution.value, x, v)
    torch.testing.assert_close(found[0], torch.full_like(found[0], 2.0), rtol=1e-3, atol=0)


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"solver": "anderson"}, {"solver": Anderson}, {"stop": 5}, {"stop": "exact"}]
)
def test_choices_of_implicit_are_checked_where_they_are_made(options: dict[str, Any]) -> None:
    """And not in the middle of a backward pass."""
    (name,) = options
    with pytest.raises(TypeError, match=rf"{name}=.*is not a {name}: pass an object such as"):
        Implicit(**options)
