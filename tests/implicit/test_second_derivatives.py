"""Gradients of gradients: where there are any, and what says so where there are none."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradient_problems import EXACT_ADJOINT, TIGHT, cell, problem, random
from torch import Tensor

import implicit
from implicit import (
    BPTT,
    JFB,
    RAG,
    Gradient,
    Implicit,
    Naive,
    Neumann,
    Phantom,
    Steps,
    Tolerance,
    fixed_point,
)

# -- of Implicit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_implicit_can_be_differentiated_twice(scale: float) -> None:
    w, x, y0 = problem()

    def value(w: Tensor, x: Tensor) -> Tensor:
        x = x if scale == 1 else scale * x  # closed over as a leaf, or as something computed
        options: dict[str, Any] = {"stop": TIGHT, "gradient": EXACT_ADJOINT}
        return fixed_point(lambda y: cell(y, w, x), y0, **options).value

    inputs = (w.detach().requires_grad_(), x.detach().requires_grad_())
    assert torch.autograd.gradgradcheck(value, inputs)


def test_second_derivatives_of_a_map_that_forgets_its_state() -> None:
    """``f(y) = w² x``: the state is not in it, the weight is."""
    w = random(3, seed=1).requires_grad_()
    x = random(2, 3, seed=2).requires_grad_()

    def solved(w: Tensor, x: Tensor) -> Tensor:
        y0 = torch.zeros(2, 3, dtype=torch.float64)
        value = fixed_point(lambda y: w.square() * x, y0, gradient=Implicit()).value
        assert isinstance(value, Tensor)
        return value.square()

    assert torch.autograd.gradcheck(solved, (w, x))
    assert torch.autograd.gradgradcheck(solved, (w, x))


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_a_branch_that_is_not_taken_again_has_no_gradient() -> None:
    """A weight that the tracked application used and the later ones do not: it counts nothing.

    ``f(y) = a y + x (+ b)``, with ``b`` while the solve lasts.  First and second derivatives by
    ``a`` and ``x`` are those of ``x / (1 − a)``.
    """
    a, b, x = (
        torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.5, 0.0, 3.0)
    )
    branch = True

    def f(y: Tensor) -> Tensor:
        return a * y + x + b if branch else a * y + x

    tight = Tolerance(rtol=0.0, atol=1e-13, max_steps=100)
    y0 = torch.zeros(1, 1, dtype=torch.float64)
    value = fixed_point(f, y0, stop=tight, gradient=Implicit()).value.sum()
    branch = False
    by_a, by_b, by_x = torch.autograd.grad(
        value, (a, b, x), create_graph=True, allow_unused=True, materialize_grads=True
    )
    assert [g.item() for g in (by_a, by_b, by_x)] == pytest.approx([3 / 0.25, 0, 2], rel=1e-9)
    twice = torch.autograd.grad(by_a, (a, b, x), allow_unused=True, materialize_grads=True)
    expected = (2 * 3 / 0.125, 0.0, 1 / 0.25)
    assert [g.item() for g in twice] == pytest.approx(expected, rel=1e-8)


def test_twice_through_a_scripted_module() -> None:
    """What torch.jit has compiled uses its parameters out of Python's sight."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(3, 3, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that scripting is deprecated
        scripted: Any = torch.jit.script(linear)
    x = random(2, 3, seed=1)

    def derivatives(module: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        value = fixed_point(
            lambda y: torch.tanh(0.3 * module(y) + x), torch.zeros_like(x), stop=TIGHT
        ).value
        first = torch.autograd.grad(value.square().sum(), linear.weight, create_graph=True)[0]
        return first, torch.autograd.grad(first.square().sum(), linear.weight)[0]

    for ours, plain in zip(derivatives(scripted), derivatives(linear), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-8, atol=0.0)


def test_implicit_cannot_be_differentiated_three_times() -> None:
    a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    value = fixed_point(lambda y: a * y.sin() + 1, torch.zeros(1, 1, dtype=torch.float64)).value
    (first,) = torch.autograd.grad(value.sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice, not three times: use BPTT"):
        torch.autograd.grad(first, a, create_graph=True)


# -- of the others -------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [RAG(2), Phantom(2, 0.5), JFB(), BPTT()], ids=repr)
def test_double_backward_of_tracked_steps(gradient: Gradient) -> None:
    """The second derivative is that of the tracked steps from the solution held fixed."""
    w, x, y0 = problem()
    stop = Steps(3) if gradient == BPTT() else TIGHT
    options: dict[str, Any] = {"solver": Naive(), "stop": stop, "gradient": gradient}
    value = fixed_point(lambda y: cell(y, w, x), y0, **options).value
    start = y0 if gradient == BPTT() else value.detach()
    k, rate = {RAG(2): (2, 1.0), Phantom(2, 0.5): (2, 0.5), JFB(): (1, 1.0), BPTT(): (3, 1.0)}[
        gradient
    ]

    def second(y: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    y = start
    for _ in range(k):
        y = (1 - rate) * y + rate * cell(y, w, x)
    torch.testing.assert_close(second(value), second(y), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("gradient", [implicit.Auto(1e-6), Neumann(2)], ids=repr)
def test_double_backward_of_a_truncated_adjoint_raises(gradient: Gradient) -> None:
    w, x, y0 = problem()
    value = fixed_point(lambda y: cell(y, w, x), y0, gradient=gradient).value
    with pytest.raises(RuntimeError, match=r"create_graph=True.*use Implicit, or RAG"):
        torch.autograd.grad(value.sum(), x, create_graph=True)
