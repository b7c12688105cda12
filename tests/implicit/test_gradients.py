"""Gradients: closed forms on affine maps, finite differences on nonlinear ones.

With ``f(y) = J y + x`` the derivative of the solution with respect to ``x`` *is* the matrix that a
gradient mode puts in the place of ``(I − J)⁻¹``; each is compared with its own formula.
"""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import implicit
from implicit import (
    BPTT,
    JFB,
    RAG,
    Anderson,
    Broyden,
    ConvergenceWarning,
    Gradient,
    Implicit,
    Naive,
    Neumann,
    Phantom,
    Steps,
    Tolerance,
    fixed_point,
)
from implicit.solution import Adjoint

TIGHT = Tolerance(rtol=1e-13, atol=0.0, max_steps=500)
EXACT = Implicit(stop=Tolerance(rtol=1e-13, atol=0.0, max_steps=500))
MODES = [JFB(), RAG(1), RAG(3), Neumann(1), Neumann(3), Phantom(3, 0.4), EXACT, BPTT()]
SOLVERS = [Naive(), Anderson(), Broyden()]


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def contraction(dim: int, radius: float, seed: int) -> Tensor:
    j = random(dim, dim, seed=seed)
    return radius * j / torch.linalg.matrix_norm(j, 2)


def power_sum(matrix: Tensor, terms: int) -> Tensor:
    total = term = torch.eye(len(matrix), dtype=matrix.dtype)
    for _ in range(terms - 1):
        term = term @ matrix
        total = total + term
    return total


def put_for_the_inverse(gradient: Gradient, j: Tensor) -> Tensor:
    """The matrix ``M`` with ``∂y*/∂x = M ∂f/∂x``, as each method's paper gives it."""
    eye = torch.eye(len(j), dtype=j.dtype)
    if isinstance(gradient, JFB):
        return eye
    if isinstance(gradient, (RAG, Neumann)):
        return power_sum(j, gradient.k)
    if isinstance(gradient, Phantom):
        rate = gradient.damping
        return rate * power_sum(rate * j + (1 - rate) * eye, gradient.k)
    assert isinstance(gradient, Implicit)
    return torch.linalg.inv(eye - j)


CLOSED = [
    JFB(),
    *(RAG(k) for k in (1, 2, 5)),
    *(Neumann(k) for k in (1, 2, 5)),
    Phantom(3),
    Phantom(1, 0.3),
    Phantom(4, 0.5),
    Phantom(5, 1.0),
    EXACT,
    Implicit(solver=Broyden(), stop=TIGHT),
    Implicit(solver=Naive(), stop=TIGHT),
]


# -- affine maps: the closed form ----------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("gradient", CLOSED, ids=repr)
def test_closed_form(gradient: Gradient, solver: implicit.Solver) -> None:
    j = contraction(5, 0.8, seed=1)
    x = random(5, seed=2)

    def answer(x: Tensor) -> Tensor:
        y0 = torch.zeros(1, 5, dtype=torch.float64)
        return fixed_point(
            lambda y: y @ j.T + x, y0, solver=solver, stop=TIGHT, gradient=gradient
        ).value[0]

    found = torch.autograd.functional.jacobian(answer, x)
    torch.testing.assert_close(found, put_for_the_inverse(gradient, j), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("gradient", CLOSED, ids=repr)
@settings(max_examples=8, deadline=None)
@given(
    dim=st.integers(1, 6),
    batch=st.integers(1, 3),
    radius=st.floats(0.0, 0.85),
    seed=st.integers(0, 10**6),
)
def test_closed_form_of_every_dependence(
    gradient: Gradient, dim: int, batch: int, radius: float, seed: int
) -> None:
    """For ``Σ⟨v, y*⟩``: by ``x`` it is ``w = Mᵀv`` per sample, by ``J`` it is ``Σ w y*ᵀ``.

    This holds for every mode because all iterates are equal at the fixed point.
    """
    j = contraction(dim, radius, seed).requires_grad_()
    x = random(batch, dim, seed=seed + 1).requires_grad_()
    v = random(batch, dim, seed=seed + 2)
    solution = fixed_point(
        lambda y: y @ j.T + x,
        torch.zeros(batch, dim, dtype=torch.float64),
        stop=TIGHT,
        gradient=gradient,
    )
    of_j, of_x = torch.autograd.grad((v * solution.value).sum(), (j, x))
    w = v @ put_for_the_inverse(gradient, j.detach())
    torch.testing.assert_close(of_x, w, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(of_j, w.T @ solution.value.detach(), rtol=1e-8, atol=1e-9)


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


def test_more_terms_come_nearer_to_the_implicit_gradient() -> None:
    """The error of k terms is ``J^k (I − J)⁻¹``: it falls by the radius with each term."""
    j = torch.diag(torch.tensor([0.5, -0.5], dtype=torch.float64))
    exact = torch.linalg.inv(torch.eye(2, dtype=torch.float64) - j)
    x = random(2, seed=1)
    for k in range(1, 12):
        found = torch.autograd.functional.jacobian(
            lambda x, k=k: fixed_point(
                lambda y: y @ j + x,
                torch.zeros(1, 2, dtype=torch.float64),
                stop=TIGHT,
                gradient=RAG(k),
            ).value[0],
            x,
        )
        wanted = torch.linalg.matrix_power(j, k) @ exact
        torch.testing.assert_close(exact - found, wanted, rtol=1e-6, atol=1e-11)


# -- nonlinear maps: finite differences ----------------------------------------------------------


def cell(y: Tensor, w: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(y @ w + x) + 0.1 * torch.sin(y)


def problem() -> tuple[Tensor, Tensor, Tensor]:
    w = contraction(4, 0.6, seed=11).requires_grad_()
    x = random(3, 4, seed=12).requires_grad_()
    return w, x, random(3, 4, seed=13)


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


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_unrolled_gradients_against_finite_differences(k: int, rate: float) -> None:
    """RAG(k) and Phantom(k, λ) are the derivative of their k steps from a fixed solution."""
    w, x, y0 = problem()
    gradient = RAG(k) if rate == 1 else Phantom(k, rate)
    solution = fixed_point(lambda y: cell(y, w, x), y0, stop=TIGHT, gradient=gradient)
    v = random(3, 4, seed=14)
    found = torch.autograd.grad((v * solution.value).sum(), (w, x))
    start = solution.value.detach()

    def steps(w: Tensor, x: Tensor) -> Tensor:
        y = start
        for _ in range(k):
            y = (1 - rate) * y + rate * cell(y, w, x)
        return y

    assert torch.autograd.gradcheck(steps, (w, x))
    wanted = torch.autograd.grad((v * steps(w, x)).sum(), (w, x))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_jfb_is_rag_of_one_and_neumann_is_rag_on_nonlinear_maps() -> None:
    w, x, y0 = problem()
    v = random(3, 4, seed=14)

    def gradients(mode: Gradient) -> tuple[Tensor, ...]:
        value = fixed_point(lambda y: cell(y, w, x), y0, stop=TIGHT, gradient=mode).value
        return torch.autograd.grad((v * value.sin()).sum(), (w, x))

    for one, other in (
        (JFB(), RAG(1)),
        (RAG(1), Phantom(1, 1.0)),
        *((Neumann(k), RAG(k)) for k in (1, 2, 3, 6)),
        (RAG(3), Phantom(3, 1.0)),
    ):
        for a, b in zip(gradients(one), gradients(other), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("gradient", [EXACT, Neumann(3), RAG(3), JFB()], ids=repr)
def test_gradients_of_pytrees(gradient: Gradient) -> None:
    """The gradient of a state in two leaves is that of the same state in one."""
    w, x, y0 = problem()
    v = random(3, 4, seed=15)

    def split(y: dict[str, Tensor]) -> dict[str, Tensor]:
        image = cell(torch.cat([y["a"], y["b"].flatten(1)], dim=1), w, x)
        return {"a": image[:, :1], "b": image[:, 1:].reshape(3, 3, 1)}

    start = {"a": y0[:, :1], "b": y0[:, 1:].reshape(3, 3, 1)}
    whole = fixed_point(lambda y: cell(y, w, x), y0, stop=TIGHT, gradient=gradient).value
    parts = fixed_point(split, start, stop=TIGHT, gradient=gradient).value
    joined = torch.cat([parts["a"], parts["b"].flatten(1)], dim=1)
    for one, other in zip(
        torch.autograd.grad((v * whole).sum(), (w, x)),
        torch.autograd.grad((v * joined).sum(), (w, x)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("gradient", [EXACT, Neumann(2), RAG(2), BPTT()], ids=repr)
def test_gradient_through_one_leaf_of_the_state_only(gradient: Gradient) -> None:
    """A loss that looks at a single leaf, whose value depends on the other."""
    x = random(2, 3, seed=1).requires_grad_()

    def f(y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return 0.3 * y[0] + x, 0.5 * y[1] + y[0]

    zero = torch.zeros(2, 3, dtype=torch.float64)
    value = fixed_point(f, (zero, zero), stop=TIGHT, gradient=gradient).value
    (found,) = torch.autograd.grad(value[1].sum(), x)
    # y0* = x / 0.7, y1* = 2 y0*; one step reaches y1 only through y0, so k terms give
    # Σ_{i<k} (Jⁱ)₁₀ with J = [[0.3, 0], [1, 0.5]].
    j = torch.tensor([[0.3, 0.0], [1.0, 0.5]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    matrix = torch.linalg.inv(eye - j) if gradient in (EXACT, BPTT()) else eye + j
    torch.testing.assert_close(found, matrix[1, 0].expand(2, 3), rtol=1e-8, atol=1e-9)


# -- the value is not touched --------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("gradient", MODES, ids=repr)
@pytest.mark.parametrize("stop", [Steps(3), Tolerance(rtol=1e-2)])
def test_the_gradient_decides_nothing_but_the_derivative(
    gradient: Gradient, solver: implicit.Solver, stop: Any
) -> None:
    w, x, y0 = problem()
    with torch.no_grad():
        bare = fixed_point(lambda y: cell(y, w, x), y0, solver=solver, stop=stop)
    tied = fixed_point(lambda y: cell(y, w, x), y0, solver=solver, stop=stop, gradient=gradient)
    assert torch.equal(tied.value.detach(), bare.value)
    assert tied.value.requires_grad
    assert not bare.value.requires_grad
    for field in ("status", "steps", "evaluations", "residual", "relative_residual"):
        assert torch.equal(getattr(tied, field), getattr(bare, field))
        assert not getattr(tied, field).requires_grad


@pytest.mark.parametrize("gradient", MODES, ids=repr)
def test_nothing_to_differentiate(gradient: Gradient) -> None:
    solution = fixed_point(torch.cos, torch.ones(2, 2, dtype=torch.float64), gradient=gradient)
    assert not solution.value.requires_grad


@pytest.mark.parametrize("gradient", MODES, ids=repr)
def test_map_that_ignores_its_state(gradient: Gradient) -> None:
    """``f(y) = sin x`` is its own fixed point; ``J = 0`` and every term but the first vanishes."""
    x = random(2, 3, seed=1).requires_grad_()
    value = fixed_point(
        lambda y: torch.sin(x), torch.zeros(2, 3, dtype=torch.float64), gradient=gradient
    ).value
    torch.testing.assert_close(value.detach(), torch.sin(x.detach()))
    (found,) = torch.autograd.grad(value.sum(), x)
    # A damped step keeps 1 − λ of what it had: 1 − (1 − λ)^k of the gradient arrives.
    share = 1 - (1 - gradient.damping) ** gradient.k if isinstance(gradient, Phantom) else 1.0
    torch.testing.assert_close(found, share * torch.cos(x.detach()))


@pytest.mark.parametrize("gradient", [m for m in MODES if m != BPTT()], ids=repr)
def test_start_gets_no_gradient(gradient: Gradient) -> None:
    w, x, y0 = problem()
    y0 = y0.requires_grad_()
    value = fixed_point(lambda y: cell(y, w, x), y0, gradient=gradient).value
    assert torch.autograd.grad(value.sum(), y0, allow_unused=True) == (None,)


# -- what f closes over --------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", MODES, ids=repr)
def test_closed_over_leaves_modules_and_intermediate_tensors(gradient: Gradient) -> None:
    """Nothing is listed: a parameter, a leaf and a non-leaf all receive gradient."""
    linear = torch.nn.Linear(3, 3, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(contraction(3, 0.5, seed=1))
    leaf = random(2, 3, seed=2).requires_grad_()
    inner = random(2, 3, seed=3).requires_grad_()
    computed = (2 * inner).sin()  # a non-leaf, through which inner must be reached
    with_args = random(2, 3, seed=4).requires_grad_()
    value = fixed_point(
        lambda y, z: linear(y) + leaf + computed + z,
        torch.zeros(2, 3, dtype=torch.float64),
        stop=TIGHT,
        gradient=gradient,
        args=(with_args,),
    ).value
    value.sum().backward()
    # x enters as leaf, as sin(2·inner) and as an argument, always with the same factor.
    assert leaf.grad is not None and inner.grad is not None and with_args.grad is not None
    torch.testing.assert_close(with_args.grad, leaf.grad)
    torch.testing.assert_close(inner.grad, leaf.grad * 2 * torch.cos(2 * inner.detach()))
    if gradient != BPTT():
        matrix = put_for_the_inverse(gradient, linear.weight.detach())
        torch.testing.assert_close(leaf.grad, matrix.sum(0).expand(2, 3), rtol=1e-8, atol=1e-9)
    assert linear.bias.grad is not None and linear.weight.grad is not None
    torch.testing.assert_close(linear.bias.grad, leaf.grad.sum(0))


@pytest.mark.parametrize("gradient", MODES, ids=repr)
def test_retained_graph_and_two_uses_in_one_graph(gradient: Gradient) -> None:
    w, x, y0 = problem()

    def solve(offset: float) -> Tensor:
        return fixed_point(
            lambda y: cell(y, w, x + offset), y0, stop=TIGHT, gradient=gradient
        ).value

    one, two = solve(0.0), solve(0.5)
    (only_one,) = torch.autograd.grad(one.sum(), w, retain_graph=True)
    (again,) = torch.autograd.grad(one.sum(), w, retain_graph=True)
    (only_two,) = torch.autograd.grad(two.square().sum(), w, retain_graph=True)
    (both,) = torch.autograd.grad(one.sum() + two.square().sum(), w)
    torch.testing.assert_close(again, only_one)
    torch.testing.assert_close(both, only_one + only_two)


@pytest.mark.parametrize("gradient", [EXACT, Neumann(40)], ids=["Implicit", "Neumann"])
def test_one_solution_inside_another(gradient: Gradient) -> None:
    """``z* = a z* + y*`` with ``y* = a y* + x``: ``dz*/dx = 1/(1 − a)²``."""
    a = 0.4
    x = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    y = fixed_point(lambda y: a * y + x, zero, stop=TIGHT, gradient=gradient).value
    z = fixed_point(lambda z: a * z + y, zero, stop=TIGHT, gradient=gradient).value
    (found,) = torch.autograd.grad(z.sum(), x)
    assert found.item() == pytest.approx(1 / (1 - a) ** 2, rel=1e-9)


@pytest.mark.parametrize("gradient", MODES, ids=repr)
def test_hook_on_the_value_changes_what_flows_back(gradient: Gradient) -> None:
    w, x, y0 = problem()
    plain = fixed_point(lambda y: cell(y, w, x), y0, stop=TIGHT, gradient=gradient).value
    (wanted,) = torch.autograd.grad(plain.sum(), x)
    value = fixed_point(lambda y: cell(y, w, x), y0, stop=TIGHT, gradient=gradient).value
    value.register_hook(lambda grad: 3 * grad)
    (found,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(found, 3 * wanted, rtol=1e-8, atol=1e-10)


# -- Implicit: its own solve ---------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-8, 1e8, 1e-30])
def test_implicit_does_not_depend_on_the_scale_of_the_loss(scale: float) -> None:
    w, x, y0 = problem()
    value = fixed_point(lambda y: cell(y, w, x), y0, stop=TIGHT, gradient=Implicit()).value
    plain = torch.autograd.grad(value.sum(), (w, x), retain_graph=True)
    scaled = torch.autograd.grad(scale * value.sum(), (w, x))
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(other / scale, one, rtol=1e-6, atol=1e-9)


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


def test_implicit_scale_in_float32() -> None:
    w, x, y0 = (t.detach().float() for t in problem())
    x.requires_grad_()
    stop = Tolerance(rtol=1e-6, atol=0.0, max_steps=200)
    value = fixed_point(lambda y: cell(y, w, x), y0, stop=stop, gradient=Implicit()).value
    (plain,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
    (scaled,) = torch.autograd.grad(1e-8 * value.sum(), x)
    torch.testing.assert_close(scaled * 1e8, plain, rtol=1e-5, atol=1e-6)


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


def test_implicit_warns_when_its_steps_do_not_suffice() -> None:
    x = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    rate = torch.tensor([0.99, 0.9, 0.5, 0.1], dtype=torch.float64)
    gradient = Implicit(solver=Naive(), stop=Tolerance(rtol=1e-9, max_steps=3))
    value = fixed_point(lambda y: rate * y + x, torch.ones_like(x), gradient=gradient).value
    with pytest.warns(ConvergenceWarning, match=r"3 of 3 samples is inexact.*Allow more steps"):
        value.sum().backward()


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


@pytest.mark.parametrize("gradient", [implicit.Auto(1e-6), Neumann(2)], ids=repr)
def test_double_backward_of_a_truncated_adjoint_raises(gradient: Gradient) -> None:
    w, x, y0 = problem()
    value = fixed_point(lambda y: cell(y, w, x), y0, gradient=gradient).value
    with pytest.raises(RuntimeError, match=r"create_graph=True.*use Implicit, or RAG"):
        torch.autograd.grad(value.sum(), x, create_graph=True)


EXACT_ADJOINT = Implicit(stop=Tolerance(rtol=1e-13, atol=0.0, max_steps=300))


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


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_implicit_can_be_differentiated_twice(scale: float) -> None:
    w, x, y0 = problem()

    def value(w: Tensor, x: Tensor) -> Tensor:
        x = x if scale == 1 else scale * x  # closed over as a leaf, or as something computed
        options: dict[str, Any] = {"stop": TIGHT, "gradient": EXACT_ADJOINT}
        return fixed_point(lambda y: cell(y, w, x), y0, **options).value

    inputs = (w.detach().requires_grad_(), x.detach().requires_grad_())
    assert torch.autograd.gradgradcheck(value, inputs)


def test_nested_transforms_of_an_adjoint_say_what_to_use() -> None:
    w, x, y0 = problem()

    def loss(x: Tensor) -> Tensor:
        return fixed_point(lambda y: cell(y, w.detach(), x), y0, stop=TIGHT).value.square().sum()

    gradient = torch.func.grad(loss)(x.detach())
    leaf = x.detach().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(loss(leaf), leaf)[0])
    with pytest.raises(RuntimeError, match=r"first derivatives under torch\.func"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(x.detach())


def test_a_mapped_solve_is_the_solve_of_each() -> None:
    w, x, y0 = problem()
    xs = torch.stack([x.detach(), 2 * x.detach()])

    def value(x: Tensor) -> Tensor:
        return fixed_point(lambda y: cell(y, w.detach(), x), y0, stop=TIGHT).value

    expected = torch.stack([value(x) for x in xs])
    torch.testing.assert_close(torch.func.vmap(value)(xs), expected)


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


# -- memory --------------------------------------------------------------------------------------


def saved_bytes(make: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward pass of ``make()``."""
    storages: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor.detach())  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        make()
    return sum(storages.values())


def test_memory_of_each_gradient() -> None:
    """RAG(k) keeps k applications, adjoints one, BPTT one per step; none keeps the path else."""
    w = contraction(16, 0.5, seed=1).requires_grad_()
    x = random(64, 16, seed=2)

    def kept(gradient: Gradient, steps: int) -> int:
        return saved_bytes(
            lambda: (
                fixed_point(
                    lambda y: torch.tanh(y @ w + x),
                    torch.zeros_like(x),
                    solver=Naive(),
                    stop=Steps(steps),
                    gradient=gradient,
                ).value
            )
        )

    state = torch.zeros_like(x).requires_grad_()
    by_the_state_too = saved_bytes(lambda: torch.tanh(state @ w + x))
    one = kept(JFB(), 5)
    for steps in (5, 50):
        assert kept(JFB(), steps) == one <= by_the_state_too
        for gradient in (Implicit(), Neumann(1), Neumann(9)):
            assert kept(gradient, steps) == by_the_state_too, gradient
    for k in (2, 4):
        assert kept(RAG(k), 5) == kept(RAG(k), 50)
        assert (k - 1) * x.nbytes < kept(RAG(k), 5) <= k * by_the_state_too
    assert kept(BPTT(), 50) >= 5 * kept(BPTT(), 5)


@pytest.mark.parametrize("gradient", MODES, ids=repr)
def test_nothing_lives_on_after_the_backward_pass(gradient: Gradient) -> None:
    """No cycle of references keeps the graph: inputs are freed by counting alone."""
    gc.collect()
    gc.disable()
    try:
        w, x, y0 = problem()
        gone = weakref.ref(x)
        value = fixed_point(lambda y, x: cell(y, w, x), y0, gradient=gradient, args=(x,)).value
        value.sum().backward()
        del value, x
        assert gone() is None
    finally:
        gc.enable()


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


@pytest.mark.parametrize("gradient", [Implicit(), implicit.Auto()], ids=repr)
def test_solving_for_several_gradients_in_one_backward_pass(gradient: Gradient) -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    value = fixed_point(lambda y: 0.5 * y + x, torch.zeros(2, 3), gradient=gradient).value
    with pytest.raises(RuntimeError, match=r"several gradients.*is_grads_batched"):
        torch.autograd.grad(value, x, torch.ones(4, 2, 3), is_grads_batched=True)


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


# -- autocast and half precision -----------------------------------------------------------------


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


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [RAG, Neumann, Phantom])
@pytest.mark.parametrize("k", [0, -1, 2.0, 1.5, "2", True, None])
def test_k_must_be_a_positive_integer(kind: Any, k: Any) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}\(k=.*must be an integer of at least 1"):
        kind(k)


@pytest.mark.parametrize("damping", [0.0, -0.1, 1.1, float("nan")])
def test_phantom_damping_out_of_range(damping: float) -> None:
    with pytest.raises(ValueError, match=r"Phantom\(damping=.*must be a finite number in \(0, 1\]"):
        Phantom(2, damping)


@pytest.mark.parametrize(
    ("kind", "name"), [(RAG, "steps"), (Neumann, "terms"), (JFB, "k"), (BPTT, "k"), (Implicit, "m")]
)
def test_unknown_options_are_refused(kind: Any, name: str) -> None:
    with pytest.raises(TypeError, match=name):
        kind(**{name: 2})


@pytest.mark.parametrize(
    "options", [{"solver": "anderson"}, {"solver": Anderson}, {"stop": 5}, {"stop": "exact"}]
)
def test_choices_of_implicit_are_checked_where_they_are_made(options: dict[str, Any]) -> None:
    """And not in the middle of a backward pass."""
    (name,) = options
    with pytest.raises(TypeError, match=rf"{name}=.*is not a {name}: pass an object such as"):
        Implicit(**options)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_settles_for_what_its_products_can_express(dtype: torch.dtype) -> None:
    """Without a `ConvergenceWarning`, which would be an error here, and in few products."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(0.15 * torch.randn(8, 8, dtype=torch.float64).to(dtype))
    solution = fixed_point(lambda y: torch.tanh(y @ weight + 1), torch.zeros(4, 8, dtype=dtype))
    solution.value.float().sum().backward()
    assert int(solution.adjoints[0].products.max()) <= 12


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


def test_auto_says_what_to_use_where_it_cannot_look() -> None:
    def slope(a: Tensor) -> Tensor:
        y0 = torch.zeros(1, 1, dtype=torch.float64)
        return fixed_point(lambda y: a * y + 1, y0, gradient=implicit.Auto()).value.sum()

    with pytest.raises(RuntimeError, match=r"use Implicit, Neumann or RAG"):
        torch.func.vmap(torch.func.grad(slope))(torch.tensor([0.1, 0.2], dtype=torch.float64))


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


def test_a_mapped_start_is_solved_from() -> None:
    starts = torch.linspace(0, 1, 6, dtype=torch.float64).reshape(3, 2, 1)
    mapped = torch.func.vmap(lambda y: fixed_point(torch.cos, y).value)(starts)
    each = torch.stack([fixed_point(torch.cos, y).value for y in starts])
    torch.testing.assert_close(mapped, each)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_implicit_knows_no_scale_in_any_dtype(scale: float, dtype: torch.dtype) -> None:
    a = torch.tensor([0.5], dtype=dtype, requires_grad=True)
    value = fixed_point(
        lambda y: a * y + 1, torch.zeros(1, 2, dtype=dtype), stop=Tolerance(rtol=1e-6, atol=0.0)
    ).value
    (found,) = torch.autograd.grad(value, a, torch.full_like(value, scale))
    torch.testing.assert_close(found / scale, torch.tensor([8.0], dtype=dtype), rtol=1e-4, atol=0)


# -- Auto: what it estimates, and where it goes on -----------------------------------------------


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


def test_auto_asks_for_a_smaller_residual_where_the_error_is_not_small() -> None:
    """``‖w − ŵ‖ ≤ ‖residual‖ / σ``: a residual of half the tolerance leaves too much by ``1/σ``."""
    rates = [[0.5 * math.cos(k) for k in range(29)] + [0.999]]
    v = [[1.0] * 29 + [0.1]]
    exact = torch.tensor(v, dtype=torch.float64) / (1 - torch.tensor(rates, dtype=torch.float64))
    for rtol in (1e-4, 1e-6):
        w, figures = by_auto(implicit.Auto(rtol=rtol), rates, v)
        assert rtol / 10 < float(figures.error) <= rtol, "no smaller than that needs"
        assert float((w - exact).norm() / exact.norm()) <= rtol


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


def test_auto_tells_what_it_could_not_reach() -> None:
    """Three eigenvalues in two dimensions, beside a sample with a series of one term."""
    gradient = implicit.Auto(rtol=1e-6, terms=2, krylov=2)
    with pytest.warns(ConvergenceWarning, match="Auto: the gradient of 1 of 2 samples is inexact"):
        w, figures = by_auto(gradient, [[-3.0, 2.0, 0.5], [0.0] * 3], [[1.0] * 3] * 2)
    assert w[1].tolist() == [1, 1, 1]
    assert figures.products.tolist() == [2 + 1 + 2, 1]
    assert float(figures.error[0]) > 1e-6 >= float(figures.error[1])


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


def test_implicit_cannot_be_differentiated_three_times() -> None:
    a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    value = fixed_point(lambda y: a * y.sin() + 1, torch.zeros(1, 1, dtype=torch.float64)).value
    (first,) = torch.autograd.grad(value.sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice, not three times: use BPTT"):
        torch.autograd.grad(first, a, create_graph=True)


@pytest.mark.parametrize("rtol", [0.0, -1.0, math.inf, math.nan])
def test_auto_needs_a_tolerance_that_can_be_met(rtol: float) -> None:
    with pytest.raises(ValueError, match=r"Auto\(rtol=.*must be a finite number above 0"):
        implicit.Auto(rtol)


def test_auto_knows_of_a_slow_direction_that_the_gradient_hardly_has() -> None:
    """``1e-4`` of ``v`` becomes a hundred: the residual is small from the start, the error 1."""
    w, figures = by_auto(implicit.Auto(), [[0.0, 1 - 1e-6]], [[1.0, 1e-4]])
    torch.testing.assert_close(
        w, torch.tensor([[1.0, 100.0]], dtype=torch.float64), rtol=1e-3, atol=0
    )
    assert float(figures.error) <= 1e-3


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


# -- figures and defaults ------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5])
def test_neumann_tells_its_products_and_tests_nothing(k: int) -> None:
    x = torch.ones(3, 2, requires_grad=True)
    solution = fixed_point(lambda y: 0.5 * y + x, torch.zeros(3, 2), gradient=Neumann(k))
    solution.value.sum().backward()
    (figures,) = solution.adjoints
    assert figures.products.dtype == torch.int64
    assert figures.products.tolist() == [k - 1] * 3
    assert bool(figures.error.isnan().all())


def test_defaults_are_those_of_the_docstrings() -> None:
    assert implicit.Auto() == implicit.Auto(rtol=1e-3, terms=8, krylov=50)
    assert (RAG(), Neumann(), Implicit()) == (RAG(2), Neumann(2), Implicit(Anderson(), None))


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


@pytest.mark.parametrize("k", [1, 2, 4])
def test_recomputed_applications_give_the_same_gradient(k: int) -> None:
    """To the last bit, dropout and closed-over weights included; only states are kept."""
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout(0.3), torch.nn.Tanh())
    kept, gradients = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        layer.zero_grad()
        x = torch.ones(8, 64, requires_grad=True)
        sizes: list[int] = []
        # What is taken apart in the backward pass is not seen here.
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            solution = implicit.fixed_point(
                lambda y, x: layer(y) + x,
                torch.zeros(8, 64),
                solver=implicit.Naive(),
                stop=implicit.Steps(3),
                gradient=implicit.RAG(k, recompute=recompute),
                args=(x,),
            )
        solution.value.square().sum().backward()
        kept.append(sum(sizes))
        gradients.append([x.grad, *(p.grad for p in layer.parameters())])
    assert kept[1] < kept[0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_torch_func_cannot_recompute_and_says_what_can() -> None:
    def loss(w: Tensor) -> Tensor:
        gradient = implicit.RAG(2, recompute=True)
        return implicit.fixed_point(
            lambda y: torch.tanh(y * w), torch.zeros(1, 3), gradient=gradient
        ).value.sum()

    with pytest.raises(RuntimeError, match=r"cannot recompute. Use RAG\(2\), or Neumann\(2\)"):
        torch.func.grad(loss)(torch.ones(3))


def test_recompute_is_a_flag() -> None:
    with pytest.raises(ValueError, match=r"RAG\(recompute='no'\)"):
        implicit.RAG(2, recompute="no")  # type: ignore[arg-type]


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


def test_a_solver_that_must_look_says_so_under_vmap() -> None:
    gradient = Implicit(solver=implicit.NewtonKrylov())

    def slope(a: Tensor) -> Tensor:
        y0 = torch.zeros(1, 1, dtype=torch.float64)
        return fixed_point(lambda y: a * y + 1, y0, gradient=gradient).value.sum()

    with pytest.raises(RuntimeError, match=r"NewtonKrylov looks.*Anderson or Broyden"):
        torch.func.vmap(torch.func.grad(slope))(torch.tensor([0.1, 0.2], dtype=torch.float64))


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


@pytest.mark.parametrize("gradient", [Implicit(), implicit.Auto()], ids=repr)
def test_a_gradient_that_is_not_a_number_is_told(gradient: Gradient) -> None:
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    solution = fixed_point(lambda y: 0.5 * y + x, torch.zeros_like(x), gradient=gradient)
    v = torch.tensor([[1.0] * 3, [math.nan] * 3], dtype=torch.float64)
    with pytest.warns(implicit.ConvergenceWarning, match=r"1 of 2 samples"):
        (found,) = torch.autograd.grad(solution.value, x, v)
    torch.testing.assert_close(found[0], torch.full_like(found[0], 2.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_adjoint_that_grows_until_it_overflows_is_told(dtype: torch.dtype) -> None:
    x = torch.ones(1, 3, dtype=dtype, requires_grad=True)
    gradient = Implicit(implicit.Naive(), Tolerance(rtol=1e-3, atol=0.0, max_steps=3000))
    solution = fixed_point(lambda y: 1.5 * y + x, -2 * x.detach(), gradient=gradient)
    with pytest.warns(implicit.ConvergenceWarning):
        torch.autograd.grad(solution.value.sum(), x)
