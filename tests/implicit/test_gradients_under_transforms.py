"""Forward mode, `torch.func` and `torch.compile`, and what says so where they cannot be had."""

from __future__ import annotations

import warnings

import pytest
import torch
from gradient_problems import (
    EXACT,
    EXACT_ADJOINT,
    TIGHT,
    cell,
    contraction,
    problem,
    put_for_the_inverse,
    random,
)
from torch import Tensor

import implicit
from implicit import JFB, RAG, Gradient, Implicit, Neumann, Steps, fixed_point

# -- forward mode --------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [EXACT_ADJOINT, implicit.Auto(1e-11)], ids=repr)
def test_forward_mode_and_reverse_mode_meet_finite_differences(gradient: Gradient) -> None:
    w, x, y0 = problem()

    def value(w: Tensor, x: Tensor) -> Tensor:
        return fixed_point(lambda y: cell(y, w, x), y0, stop=TIGHT, gradient=gradient).value

    inputs = (w.detach().requires_grad_(), x.detach().requires_grad_())
    assert torch.autograd.gradcheck(value, inputs)
    with warnings.catch_warnings():  # torch scripts its forward-mode rules when it loads them
        warnings.simplefilter("ignore", FutureWarning)
        assert torch.autograd.gradcheck(value, inputs, check_forward_ad=True)


@pytest.mark.parametrize("gradient", [EXACT, Neumann(3), RAG(3), JFB()], ids=repr)
@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # by torch, of its forward-mode rules
def test_forward_transforms_meet_the_closed_form(gradient: Gradient) -> None:
    """A Jacobian that is not symmetric, so that ``J`` and ``Jᵀ`` differ."""
    j, x, t = contraction(4, 0.8, seed=1), random(4, seed=2), random(4, seed=3)

    def answer(x: Tensor) -> Tensor:
        y0 = torch.zeros(1, 4, dtype=torch.float64)
        return fixed_point(lambda y: y @ j.T + x, y0, stop=TIGHT, gradient=gradient).value[0]

    wanted = put_for_the_inverse(gradient, j)
    _, tangent = torch.func.jvp(answer, (x,), (t,))
    torch.testing.assert_close(tangent, wanted @ t, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(torch.func.jacfwd(answer)(x), wanted, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(torch.func.jacrev(answer)(x), wanted, rtol=1e-9, atol=1e-10)


# -- several at once -----------------------------------------------------------------------------


def test_a_mapped_solve_is_the_solve_of_each() -> None:
    w, x, y0 = problem()
    xs = torch.stack([x.detach(), 2 * x.detach()])

    def value(x: Tensor) -> Tensor:
        return fixed_point(lambda y: cell(y, w.detach(), x), y0, stop=TIGHT).value

    expected = torch.stack([value(x) for x in xs])
    torch.testing.assert_close(torch.func.vmap(value)(xs), expected)


def test_a_mapped_start_is_solved_from() -> None:
    starts = torch.linspace(0, 1, 6, dtype=torch.float64).reshape(3, 2, 1)
    mapped = torch.func.vmap(lambda y: fixed_point(torch.cos, y).value)(starts)
    each = torch.stack([fixed_point(torch.cos, y).value for y in starts])
    torch.testing.assert_close(mapped, each)


@pytest.mark.parametrize("gradient", [Neumann(3), RAG(2)], ids=repr)
def test_several_gradients_in_one_backward_pass(gradient: Gradient) -> None:
    a, x = contraction(3, 0.5, seed=2), random(2, 3, seed=3)

    def layer(x: Tensor) -> Tensor:
        solution = fixed_point(
            lambda y: torch.tanh(y @ a + x), torch.zeros_like(x), stop=TIGHT, gradient=gradient
        )
        value: Tensor = solution.value
        return value

    one_by_one = torch.autograd.functional.jacobian(layer, x)
    together = torch.autograd.functional.jacobian(layer, x, vectorize=True)
    torch.testing.assert_close(one_by_one, together)


# -- what cannot be transformed ------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [Implicit(), implicit.Auto()], ids=repr)
def test_solving_for_several_gradients_in_one_backward_pass(gradient: Gradient) -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    value = fixed_point(lambda y: 0.5 * y + x, torch.zeros(2, 3), gradient=gradient).value
    with pytest.raises(RuntimeError, match=r"several gradients.*is_grads_batched"):
        torch.autograd.grad(value, x, torch.ones(4, 2, 3), is_grads_batched=True)


def test_nested_transforms_of_an_adjoint_say_what_to_use() -> None:
    w, x, y0 = problem()

    def loss(x: Tensor) -> Tensor:
        return fixed_point(lambda y: cell(y, w.detach(), x), y0, stop=TIGHT).value.square().sum()

    gradient = torch.func.grad(loss)(x.detach())
    leaf = x.detach().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(loss(leaf), leaf)[0])
    with pytest.raises(RuntimeError, match=r"first derivatives under torch\.func"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(x.detach())


def test_auto_says_what_to_use_where_it_cannot_look() -> None:
    def slope(a: Tensor) -> Tensor:
        y0 = torch.zeros(1, 1, dtype=torch.float64)
        return fixed_point(lambda y: a * y + 1, y0, gradient=implicit.Auto()).value.sum()

    with pytest.raises(RuntimeError, match=r"use Implicit, Neumann or RAG"):
        torch.func.vmap(torch.func.grad(slope))(torch.tensor([0.1, 0.2], dtype=torch.float64))


def test_a_solver_that_must_look_says_so_under_vmap() -> None:
    gradient = Implicit(solver=implicit.NewtonKrylov())

    def slope(a: Tensor) -> Tensor:
        y0 = torch.zeros(1, 1, dtype=torch.float64)
        return fixed_point(lambda y: a * y + 1, y0, gradient=gradient).value.sum()

    with pytest.raises(RuntimeError, match=r"NewtonKrylov looks.*Anderson or Broyden"):
        torch.func.vmap(torch.func.grad(slope))(torch.tensor([0.1, 0.2], dtype=torch.float64))


# -- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gradient",
    [
        JFB(),
        RAG(3),
        implicit.Phantom(2, 0.5),
        Neumann(3),
        Implicit(implicit.Anderson(3), Steps(8)),
        Implicit(implicit.Broyden(3), Steps(8)),
        implicit.BPTT(),
    ],
    ids=repr,
)
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler, as it loads
def test_gradients_that_do_not_wait_compile_whole(gradient: Gradient) -> None:
    weight = torch.randn(3, 3, dtype=torch.float64, generator=torch.manual_seed(0)) / 4
    weight.requires_grad_()

    def value(x: Tensor) -> Tensor:
        return fixed_point(
            lambda y: torch.tanh(y @ weight + x),
            torch.zeros_like(x),
            stop=Steps(6),
            gradient=gradient,
        ).value

    x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
    compiled = torch.compile(value, fullgraph=True, backend="eager")
    gradients = [torch.autograd.grad(f(x).sum(), weight)[0] for f in (compiled, value)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("gradient", [Implicit(), implicit.Auto()], ids=repr)
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler, as it loads
def test_gradients_that_wait_compile_whole_only_where_nobody_asks_for_them(
    gradient: Gradient,
) -> None:
    def value(x: Tensor, weight: Tensor) -> Tensor:
        def f(y: Tensor) -> Tensor:
            return torch.tanh(y @ weight + x)

        return fixed_point(f, torch.zeros_like(x), stop=Steps(6), gradient=gradient).value

    x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
    weight = torch.randn(3, 3, dtype=torch.float64, generator=torch.manual_seed(0)) / 4
    found = torch.compile(value, fullgraph=True, backend="eager")(x, weight)
    torch.testing.assert_close(found, value(x, weight))
    inputs = x.requires_grad_(), weight.requires_grad_()
    in_pieces = torch.compile(value, backend="eager")
    slopes = [torch.autograd.grad(f(*inputs).sum(), inputs) for f in (in_pieces, value)]
    torch.testing.assert_close(*slopes)
