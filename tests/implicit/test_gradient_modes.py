"""What holds of every gradient mode.

With ``f(y) = J y + x`` the derivative of the solution with respect to ``x`` *is* the matrix that a
gradient mode puts in the place of ``(I − J)⁻¹``; each is compared with its own formula.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradient_problems import (
    EXACT,
    MODES,
    SOLVERS,
    TIGHT,
    cell,
    contraction,
    problem,
    put_for_the_inverse,
    random,
)
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
    Gradient,
    Implicit,
    Naive,
    Neumann,
    Phantom,
    Steps,
    Tolerance,
    fixed_point,
)

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


# -- the closed form -----------------------------------------------------------------------------


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


# -- states of several leaves --------------------------------------------------------------------


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


# -- what receives gradient ----------------------------------------------------------------------


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


@pytest.mark.parametrize("gradient", [m for m in MODES if m != BPTT()], ids=repr)
def test_start_gets_no_gradient(gradient: Gradient) -> None:
    w, x, y0 = problem()
    y0 = y0.requires_grad_()
    value = fixed_point(lambda y: cell(y, w, x), y0, gradient=gradient).value
    assert torch.autograd.grad(value.sum(), y0, allow_unused=True) == (None,)


# -- the value in a graph ------------------------------------------------------------------------


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


# -- options -------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_docstrings() -> None:
    assert implicit.Auto() == implicit.Auto(rtol=1e-3, terms=8, krylov=50)
    assert (RAG(), Neumann(), Implicit()) == (RAG(2), Neumann(2), Implicit(Anderson(), None))


@pytest.mark.parametrize(
    ("kind", "name"), [(RAG, "steps"), (Neumann, "terms"), (JFB, "k"), (BPTT, "k"), (Implicit, "m")]
)
def test_unknown_options_are_refused(kind: Any, name: str) -> None:
    with pytest.raises(TypeError, match=name):
        kind(**{name: 2})
