"""Gradients under autocast and in half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradient_problems import SOLVERS
from torch import Tensor

import implicit
from implicit import BPTT, JFB, RAG, Gradient, Implicit, Neumann, Steps, Tolerance, fixed_point

# -- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [JFB(), RAG(2), Neumann(2), Implicit(), BPTT()], ids=repr)
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_gradients_under_autocast(gradient: Gradient, solver: implicit.Solver) -> None:
    """bfloat16 inside f, float32 outside: the gradients come near those of full precision."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 6)
    with torch.no_grad():
        linear.weight.mul_(0.5 / torch.linalg.matrix_norm(linear.weight, 2))
    x = torch.randn(3, 6)
    options: dict[str, Any] = {"solver": solver, "stop": Steps(8)}
    if isinstance(gradient, Implicit):
        gradient = Implicit(stop=Steps(8))

    def weight_gradient() -> Tensor:
        value = fixed_point(
            lambda y: torch.tanh(linear(y) + x), torch.zeros(3, 6), gradient=gradient, **options
        ).value
        assert value.dtype == torch.float32
        return torch.autograd.grad(value.square().sum(), linear.weight)[0]

    wanted = weight_gradient()
    with torch.autocast("cpu", torch.bfloat16):
        found = weight_gradient()
    assert found.dtype == torch.float32
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.parametrize("autocast", [False, True])
def test_later_evaluations_are_in_the_precision_of_the_solve(autocast: bool) -> None:
    """The second derivative evaluates ``f`` again, in a backward pass that may be elsewhere."""
    x, seen = torch.ones(2, 3, requires_grad=True), []

    def f(y: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return 0.5 * torch.tanh(y) + x

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = fixed_point(f, torch.zeros(2, 3)).value
    solved = len(seen)
    with torch.autocast("cpu", torch.bfloat16, enabled=not autocast):
        torch.autograd.grad(value.sum(), x, create_graph=True)
    assert len(seen) > solved
    assert set(seen) == {autocast}


# -- half precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [JFB(), RAG(2), Neumann(2), Implicit(), BPTT()], ids=repr)
def test_gradients_of_a_bfloat16_state(gradient: Gradient) -> None:
    x = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    if isinstance(gradient, Implicit):
        gradient = Implicit(stop=Tolerance(rtol=1e-2))
    value = fixed_point(
        lambda y: 0.5 * y + x,
        torch.zeros(2, 3, dtype=torch.bfloat16),
        stop=Tolerance(rtol=1e-2),
        gradient=gradient,
    ).value
    (found,) = torch.autograd.grad(value.sum(), x)
    assert found.dtype == torch.bfloat16
    wanted = {JFB: 1.0, RAG: 1.5, Neumann: 1.5, Implicit: 2.0, BPTT: 2.0}[type(gradient)]
    torch.testing.assert_close(found.float(), torch.full((2, 3), wanted), rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_settles_for_what_its_products_can_express(dtype: torch.dtype) -> None:
    """Without a `ConvergenceWarning`, which would be an error here, and in few products."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(0.15 * torch.randn(8, 8, dtype=torch.float64).to(dtype))
    solution = fixed_point(lambda y: torch.tanh(y @ weight + 1), torch.zeros(4, 8, dtype=dtype))
    solution.value.float().sum().backward()
    assert int(solution.adjoints[0].products.max()) <= 12
