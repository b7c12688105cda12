"""`BPTT`: the derivative of the path that a solver took."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradient_problems import cell, contraction, power_sum, problem, random
from torch import Tensor

import implicit
from implicit import BPTT, Anderson, Broyden, Naive, Steps, Tolerance, fixed_point


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_bptt_closed_form(steps: int) -> None:
    """T plain steps: ``Σ_{i<T} Jⁱ`` by ``x`` and ``J^T`` by ``y0``."""
    j, x, y0 = contraction(4, 0.9, seed=1), random(4, seed=2), random(4, seed=3)

    def answer(x: Tensor, y0: Tensor) -> Tensor:
        return fixed_point(
            lambda y: y @ j.T + x, y0[None], solver=Naive(), stop=Steps(steps), gradient=BPTT()
        ).value[0]

    of_x, of_start = torch.autograd.functional.jacobian(answer, (x, y0))
    torch.testing.assert_close(of_x, power_sum(j, steps))
    torch.testing.assert_close(of_start, torch.linalg.matrix_power(j, steps))


@pytest.mark.parametrize("damping", [0.3, 0.8])
def test_bptt_through_damped_steps(damping: float) -> None:
    j, x = contraction(4, 0.9, seed=1), random(4, seed=2)

    def answer(x: Tensor) -> Tensor:
        return fixed_point(
            lambda y: y @ j.T + x,
            torch.zeros(1, 4, dtype=torch.float64),
            solver=Naive(damping),
            stop=Steps(5),
            gradient=BPTT(),
        ).value[0]

    step = damping * j + (1 - damping) * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.functional.jacobian(answer, x), damping * power_sum(step, 5)
    )


@pytest.mark.parametrize(
    "solver",
    [Naive(), Naive(0.5), Anderson(memory=3), Anderson(memory=2, mixing=0.7), Broyden(memory=3)],
    ids=repr,
)
def test_bptt_against_finite_differences(solver: implicit.Solver) -> None:
    """The path of every solver is differentiable, also beyond its memory, also by ``y0``."""
    w, x, y0 = problem()
    assert torch.autograd.gradcheck(
        lambda w, x, y0: (
            fixed_point(
                lambda y: cell(y, w, x), y0, solver=solver, stop=Steps(6), gradient=BPTT()
            ).value
        ),
        (w, x, y0.requires_grad_()),
    )


def test_bptt_with_tolerance_against_finite_differences() -> None:
    w, x, y0 = problem()
    stop = Tolerance(rtol=1e-3, max_steps=40)

    def answer(w: Tensor, x: Tensor, y0: Tensor) -> Tensor:
        return fixed_point(
            lambda y: cell(y, w, x), y0, solver=Naive(), stop=stop, gradient=BPTT()
        ).value

    assert torch.autograd.gradcheck(answer, (w, x, y0.requires_grad_()))


def test_a_path_under_bptt_is_in_the_graph() -> None:
    """``yₙ = Σ_{i<n} aⁱ``, whose derivative every state on the path has."""
    a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    y0 = torch.zeros(1, 1, dtype=torch.float64)
    for stop in (Steps(4), Tolerance(rtol=1e-15, atol=0.0, max_steps=4)):
        solution = fixed_point(
            lambda y: a * y + 1, y0, solver=Naive(), stop=stop, gradient=BPTT(), path=(2, 3, 4)
        )
        slopes = [torch.autograd.grad(y, a, retain_graph=True)[0].item() for y in solution.path]
        assert slopes == pytest.approx([1, 2, 2.75])


@pytest.mark.parametrize(
    "solver", [implicit.Anderson(), implicit.Anderson(2), implicit.Broyden()], ids=repr
)
@pytest.mark.parametrize(
    "stop", [Tolerance(rtol=1e-12, atol=0.0, max_steps=99), Steps(30)], ids=repr
)
def test_bptt_has_second_derivatives_where_samples_stop_at_different_steps(
    solver: implicit.Solver, stop: Any
) -> None:
    """A sample that does not move makes differences of length zero."""
    scales = torch.tensor([[0.1], [1.0], [2.0], [5.0]], dtype=torch.float64)
    generator = torch.manual_seed(0)
    weight = torch.randn(6, 6, dtype=torch.float64, generator=generator) / 4
    x = (scales * torch.randn(4, 6, dtype=torch.float64, generator=generator)).requires_grad_()

    def first(y: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return slope

    def f(y: Tensor) -> Tensor:
        return torch.tanh(y @ weight + x)

    y = torch.zeros_like(x)
    for _ in range(200):
        y = f(y)
    found = fixed_point(f, torch.zeros_like(x), solver=solver, stop=stop, gradient=implicit.BPTT())
    seconds = [torch.autograd.grad(first(value).square().sum(), x)[0] for value in (found.value, y)]
    torch.testing.assert_close(*seconds, rtol=1e-6, atol=1e-9)
