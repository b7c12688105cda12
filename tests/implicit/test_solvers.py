"""Solvers: analytic fixed points, literal references, finite termination, and one row per sample.

Where an iteration is checked against its definition, the definition is written out here in its
dense form: least squares by QR for Anderson, rank-one updates of a full matrix for Broyden.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import implicit
from implicit import (
    Anderson,
    Broyden,
    Naive,
    NewtonKrylov,
    Status,
    Steps,
    Tolerance,
    fixed_point,
)
from implicit.solvers.history import ImagePairs, SecantHistory

ALL = [Naive(), Naive(0.7), Anderson(), Anderson(memory=1), Broyden(), Broyden(memory=1)]
SECANT = [Anderson(), Anderson(memory=1), Anderson(mixing=0.7), Broyden(), Broyden(memory=2)]
TIGHT = Tolerance(rtol=1e-12, atol=0.0, max_steps=500)
DOTTIE = 0.7390851332151606  # the solution of cos(y) = y, a known constant


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def affine(dim: int, radius: float, seed: int) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """``y ↦ y Aᵀ + b`` with a nonsymmetric ``A`` of spectral norm ``radius``, its ``A`` and y*."""
    a = random(dim, dim, seed=seed)
    a = radius * a / torch.linalg.matrix_norm(a, 2)
    b = random(dim, seed=seed + 1)
    answer = torch.linalg.solve(torch.eye(dim, dtype=a.dtype) - a, b)
    return (lambda y: y @ a.T + b), a, answer


def symmetric(dim: int, radius: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """``A = Q Λ Qᵀ`` with eigenvalues evenly from ``−radius`` to ``radius``, ``b``, and y*."""
    q, _ = torch.linalg.qr(random(dim, dim, seed=seed))
    a = q * torch.linspace(-radius, radius, dim, dtype=torch.float64) @ q.T
    b = random(dim, seed=seed + 1)
    return a, b, torch.linalg.solve(torch.eye(dim, dtype=torch.float64) - a, b)


class Counted:
    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        self.f, self.calls = f, 0
        self.seen: list[Tensor] = []

    def __call__(self, y: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(y.detach().clone())
        return self.f(y)


# -- analytic fixed points -----------------------------------------------------------------------


@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_dottie_number(solver: implicit.Solver) -> None:
    y0 = torch.tensor([[0.0, 1.0], [0.5, 2.0]], dtype=torch.float64)
    solution = fixed_point(torch.cos, y0, solver=solver, stop=TIGHT)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, torch.full_like(y0, DOTTIE), rtol=1e-10, atol=0)


@pytest.mark.parametrize("solver", ALL, ids=repr)
@settings(max_examples=10, deadline=None)
@given(dim=st.integers(1, 8), radius=st.floats(0.0, 0.8), seed=st.integers(0, 10**6))
def test_affine(solver: implicit.Solver, dim: int, radius: float, seed: int) -> None:
    f, _, answer = affine(dim, radius, seed)
    solution = fixed_point(f, random(3, dim, seed=seed + 2), solver=solver, stop=TIGHT)
    assert solution.converged.all()
    # ‖y − y*‖ ≤ ‖r‖ / (1 − ρ), and ‖r‖ ≤ 1e-12 ‖y‖.
    torch.testing.assert_close(solution.value, answer.expand(3, dim), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_componentwise(solver: implicit.Solver) -> None:
    """``y = (y + x/y)/2`` is Heron's rule: the fixed point is the square root."""
    x = torch.tensor([[2.0, 3.0], [9.0, 0.25]], dtype=torch.float64)
    solution = fixed_point(
        lambda y: 0.5 * (y + x / y), torch.ones_like(x), solver=solver, stop=TIGHT
    )
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, x.sqrt(), rtol=1e-10, atol=0)


ROTATION = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)


def rotated(y: Tensor) -> Tensor:
    """By 90 degrees about (0, 1): ``y* = R y* + (1, 1)`` has ``y* = (0, 1)``."""
    return y @ ROTATION.T + torch.tensor([1.0, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("solver", [s for s in SECANT if getattr(s, "memory", 0) > 1], ids=repr)
def test_rotation_is_solved_by_secant_methods(solver: implicit.Solver) -> None:
    y0 = torch.tensor([[3.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    solution = fixed_point(rotated, y0, solver=solver, stop=TIGHT)
    assert solution.converged.all()
    wanted = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(solution.value, wanted, rtol=0, atol=1e-8)


def test_rotation_makes_the_plain_iteration_cycle() -> None:
    y0 = torch.tensor([[3.0, 2.0]], dtype=torch.float64)
    solution = fixed_point(
        rotated, y0, solver=Naive(), stop=Tolerance(rtol=1e-6, max_steps=40), trace=True
    )
    assert solution.status.tolist() == [Status.STOPPED]
    assert torch.equal(solution.value, y0), "four turns by 90 degrees, ten times, are the identity"
    # The residual keeps its length: ‖(R − I)(y − y*)‖ = √2 ‖y − y*‖.
    torch.testing.assert_close(
        solution.residual, torch.tensor([math.sqrt(2 * (9 + 1))], dtype=torch.float64)
    )


def test_damping_tames_the_rotation() -> None:
    """``|0.5 + 0.5 i| < 1``: the damped iteration converges where the plain one cycles."""
    y0 = torch.tensor([[3.0, 2.0]], dtype=torch.float64)
    solution = fixed_point(rotated, y0, solver=Naive(0.5), stop=Tolerance(rtol=1e-8, max_steps=100))
    assert solution.converged.all()


def test_expansion_on_the_negative_side() -> None:
    """``f(y) = 3 − 2y`` has the fixed point 1 and the derivative −2: naive diverges."""
    y0 = torch.full((1, 1), 5.0, dtype=torch.float64)

    def f(y: Tensor) -> Tensor:
        return 3 - 2 * y

    assert fixed_point(f, y0, solver=Naive()).status.tolist() == [Status.DIVERGED]
    for solver in (Naive(0.4), Anderson(), Broyden()):
        solution = fixed_point(f, y0, solver=solver, stop=TIGHT)
        assert solution.value.item() == pytest.approx(1, abs=1e-9)


# -- Naive, to the letter ------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(damping=st.floats(0.05, 1.0), n=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_naive_is_its_definition(damping: float, n: int, seed: int) -> None:
    f, _, _ = affine(4, 0.9, seed)
    y = y0 = random(2, 4, seed=seed + 7)
    for _ in range(n):
        y = (1 - damping) * y + damping * f(y)
    found = fixed_point(f, y0, solver=Naive(damping), stop=Steps(n)).value
    torch.testing.assert_close(found, y, rtol=1e-10, atol=1e-12)


# -- Anderson, to the letter ---------------------------------------------------------------------


def tanh_layer(w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return torch.tanh(y @ w + b)


def literal_anderson(
    f: Callable[[Tensor], Tensor], y0: Tensor, memory: int, mixing: float, n: int
) -> list[Tensor]:
    """Type II on one sample ``(D,)``: ``γ = argmin ‖r − ΔR γ‖`` by QR (lstsq), no ridge."""
    ys, rs, path = [y0], [], []
    for _ in range(n):
        y = ys[-1]
        rs.append(f(y) - y)
        new = y + mixing * rs[-1]
        m = min(memory, len(rs) - 1)
        if m:
            dy = torch.stack([ys[i + 1] - ys[i] for i in range(len(ys) - 1)][-m:], dim=1)
            dr = torch.stack([rs[i + 1] - rs[i] for i in range(len(rs) - 1)][-m:], dim=1)
            gamma = torch.linalg.lstsq(dr, rs[-1][:, None]).solution[:, 0]
            new = new - (dy + mixing * dr) @ gamma
        ys.append(new)
        path.append(new)
    return path


@pytest.mark.parametrize("memory", [1, 2, 3, 5])
@pytest.mark.parametrize("mixing", [1.0, 0.6])
def test_anderson_is_literal_least_squares(memory: int, mixing: float) -> None:
    dim, n = 12, 9
    w, b = 0.9 * random(dim, dim, seed=3) / dim**0.5, random(2, dim, seed=4)
    y0 = random(2, dim, seed=5)
    solution = fixed_point(
        lambda y: torch.tanh(y @ w + b),
        y0,
        solver=Anderson(memory=memory, mixing=mixing, ridge=0.0),
        stop=Steps(n),
        path=range(1, n + 1),
    )
    for i in range(2):
        path = literal_anderson(partial(tanh_layer, w, b[i]), y0[i], memory, mixing, n)
        for found, wanted in zip(solution.path, path, strict=True):
            torch.testing.assert_close(found[i], wanted, rtol=1e-6, atol=1e-7)


def damped_anderson(f: Callable[[Tensor], Tensor], y: Tensor, solver: Anderson, n: int) -> Tensor:
    """One sample ``(D,)``: least squares with ``√ρ ‖Δr‖ γ`` added as a row for each pair.

    ``ρ`` is the ridge of the newest pair, a hundred times larger for each step of age, and 1e-2
    at most; in units of the pair's own length, so that the units of the state do not count.
    """
    ys, rs = [y], [f(y) - y]
    for _ in range(n):
        new = ys[-1] + solver.mixing * rs[-1]
        m = min(solver.memory, len(ys) - 1)
        if m:
            dy = torch.stack([ys[-i - 1] - ys[-i - 2] for i in range(m)], dim=1)
            dr = torch.stack([rs[-i - 1] - rs[-i - 2] for i in range(m)], dim=1)
            ridge = torch.tensor([min(solver.ridge * 100.0**age, 1e-2) for age in range(m)])
            rows = torch.diag(ridge.to(y.dtype).sqrt() * dr.norm(dim=0))
            system = torch.cat([dr, rows])
            target = torch.cat([rs[-1], torch.zeros(m, dtype=y.dtype)])
            gamma = torch.linalg.lstsq(system, target[:, None]).solution[:, 0]
            new = new - (dy + solver.mixing * dr) @ gamma
        ys.append(new)
        rs.append(f(new) - new)
    return torch.stack(ys[1:])


@pytest.mark.parametrize("memory", [2, 4, 20])
@pytest.mark.parametrize("ridge", [1e-10, 1e-6])
def test_ridge_grows_with_the_age_of_a_pair(memory: int, ridge: float) -> None:
    dim, n = 12, 9
    w, b = 0.9 * random(dim, dim, seed=3) / dim**0.5, random(2, dim, seed=4)
    y0, solver = random(2, dim, seed=5), Anderson(memory=memory, ridge=ridge, mixing=0.8)
    path = fixed_point(
        lambda y: torch.tanh(y @ w + b), y0, solver=solver, stop=Steps(n), path=range(1, n + 1)
    ).path
    for i in range(2):
        wanted = damped_anderson(partial(tanh_layer, w, b[i]), y0[i], solver, n)
        found = torch.stack([state[i] for state in path])
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 8])
def test_anderson_terminates_on_affine_maps(dim: int) -> None:
    """With ``m ≥ D`` pairs the span is full after D of them: D + 2 evaluations, as GMRES."""
    f, _, answer = affine(dim, 0.9, seed=dim)
    solution = fixed_point(
        f,
        torch.zeros(1, dim, dtype=torch.float64),
        solver=Anderson(memory=dim + 2),
        stop=Tolerance(rtol=1e-7, atol=0.0),
    )
    assert solution.converged.all()
    assert int(solution.evaluations) <= dim + 4
    torch.testing.assert_close(solution.value[0], answer, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [4, 8])
def test_anderson_terminates_not_sooner(dim: int) -> None:
    """A full set of distinct eigenvalues cannot be annihilated by a smaller polynomial."""
    a, b, _ = symmetric(dim, 0.9, seed=dim)
    solution = fixed_point(
        lambda y: y @ a + b,
        torch.zeros(1, dim, dtype=torch.float64),
        solver=Anderson(memory=dim + 2),
        stop=Tolerance(rtol=1e-9, atol=0.0),
    )
    assert dim + 1 <= int(solution.evaluations) <= dim + 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slow_affine_map_is_solved_by_the_default_anderson(dtype: torch.dtype) -> None:
    """ρ = 0.99 to 1e-6, where a ridge in absolute units never arrives in 1000 evaluations."""
    a, b, answer = symmetric(50, 0.99, seed=9)
    a, b = a.to(dtype), b.to(dtype)
    f = Counted(lambda y: y @ a + b)
    with torch.no_grad():
        solution = fixed_point(
            f,
            torch.zeros(2, 50, dtype=dtype),
            solver=Anderson(),
            stop=Tolerance(rtol=1e-6, atol=0.0, max_steps=999),
        )
    assert solution.converged.all()
    assert f.calls <= 1000
    torch.testing.assert_close(solution.value.double(), answer.expand(2, 50), rtol=1e-2, atol=1e-2)


def test_anderson_is_faster_than_the_plain_iteration() -> None:
    a, b, _ = symmetric(30, 0.95, seed=11)
    stop = Tolerance(rtol=1e-8, atol=0.0, max_steps=1000)
    y0 = torch.zeros(1, 30, dtype=torch.float64)
    plain, mixed = (
        int(fixed_point(lambda y: y @ a + b, y0, solver=s, stop=stop).evaluations)
        for s in (Naive(), Anderson())
    )
    assert mixed < plain / 2


# -- Broyden, to the letter ----------------------------------------------------------------------


def literal_broyden(f: Callable[[Tensor], Tensor], y0: Tensor, n: int) -> list[Tensor]:
    """Dense good Broyden on ``F(y) = y − f(y)`` for one sample, from ``B = I``."""
    matrix = torch.eye(len(y0), dtype=y0.dtype)
    y, value, path = y0, y0 - f(y0), []
    for _ in range(n):
        new = y - torch.linalg.solve(matrix, value)
        s, new_value = new - y, new - f(new)
        matrix = matrix + torch.outer(new_value - value - matrix @ s, s) / (s @ s)
        y, value = new, new_value
        path.append(y)
    return path


@pytest.mark.parametrize("extra", [0, 5])
def test_broyden_is_the_dense_method_while_nothing_is_forgotten(extra: int) -> None:
    dim, n = 10, 8
    w, b = 0.9 * random(dim, dim, seed=6) / dim**0.5, random(2, dim, seed=7)
    y0 = random(2, dim, seed=8)
    solution = fixed_point(
        lambda y: torch.tanh(y @ w + b),
        y0,
        solver=Broyden(memory=n + extra),
        stop=Steps(n),
        path=range(1, n + 1),
    )
    for i in range(2):
        path = literal_broyden(partial(tanh_layer, w, b[i]), y0[i], n)
        for found, wanted in zip(solution.path, path, strict=True):
            torch.testing.assert_close(found[i], wanted, rtol=1e-8, atol=1e-9)


def test_broyden_with_a_full_memory_rebuilds_from_the_last_pairs() -> None:
    """The step after forgetting is that of the dense update from I through the last m pairs."""
    dim, n, memory = 10, 9, 3
    w, b = 0.9 * random(dim, dim, seed=6) / dim**0.5, random(1, dim, seed=7)
    f = Counted(lambda y: torch.tanh(y @ w + b))
    with torch.no_grad():
        fixed_point(f, random(1, dim, seed=8), solver=Broyden(memory=memory), stop=Steps(n))
    ys = [y[0] for y in f.seen]
    values = [y - torch.tanh(y @ w + b[0]) for y in ys]
    for t in range(1, n - 1):
        matrix = torch.eye(dim, dtype=torch.float64)
        for i in range(max(0, t - memory), t):
            s, change = ys[i + 1] - ys[i], values[i + 1] - values[i]
            matrix = matrix + torch.outer(change - matrix @ s, s) / (s @ s)
        wanted = ys[t] - torch.linalg.solve(matrix, values[t])
        torch.testing.assert_close(ys[t + 1], wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("memory", [6, 10])
@pytest.mark.parametrize("seed", range(3))
def test_limited_broyden_converges_where_a_circular_history_diverges(
    memory: int, seed: int
) -> None:
    a, b, answer = symmetric(50, 0.9, seed=seed)
    solution = fixed_point(
        lambda y: y @ a + b,
        torch.zeros(2, 50, dtype=torch.float64),
        solver=Broyden(memory=memory),
        stop=Tolerance(rtol=1e-8, atol=0.0, max_steps=400),
    )
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, answer.expand(2, 50), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=repr)
def test_convergence_holds_far_beyond_the_answer(solver: implicit.Solver) -> None:
    """Hundreds of steps at rounding error must not throw a solved sample out again."""
    f, _, answer = affine(6, 0.8, seed=1)
    solution = fixed_point(
        f, torch.zeros(1, 6, dtype=torch.float64), solver=solver, stop=Steps(300)
    )
    torch.testing.assert_close(solution.value[0], answer, rtol=1e-8, atol=1e-8)


# -- what must not matter ------------------------------------------------------------------------


def tanh_problem(batch: int, dim: int = 6) -> tuple[Tensor, Tensor]:
    """Samples of different difficulty: the weights are scaled from 0.2 to 1."""
    w = random(dim, dim, seed=20)
    w = w / torch.linalg.matrix_norm(w, 2)
    scale = torch.linspace(0.2, 0.95, batch, dtype=torch.float64)
    return scale[:, None, None] * w, random(batch, dim, seed=21)


def solve_tanh(w: Tensor, b: Tensor, solver: implicit.Solver, **options: Any) -> implicit.Solution:
    def f(y: Tensor) -> Tensor:
        return torch.tanh(torch.einsum("bd,bde->be", y, w) + b)

    options = {"stop": Tolerance(rtol=1e-8, atol=0.0, max_steps=200), **options}
    with torch.no_grad():
        return fixed_point(f, torch.zeros_like(b), solver=solver, **options)


@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_a_sample_does_not_see_its_neighbours(solver: implicit.Solver) -> None:
    w, b = tanh_problem(5)
    together = solve_tanh(w, b, solver)
    assert len(set(together.evaluations.tolist())) > 1, "the problem must be a mixed one"
    for i in range(5):
        alone = solve_tanh(w[i : i + 1], b[i : i + 1], solver)
        assert alone.evaluations.tolist() == together.evaluations[i : i + 1].tolist()
        assert alone.status.tolist() == together.status[i : i + 1].tolist()
        torch.testing.assert_close(alone.value[0], together.value[i], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", ALL, ids=repr)
@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(5)))
def test_order_of_the_batch_does_not_matter(solver: implicit.Solver, order: list[int]) -> None:
    w, b = tanh_problem(5)
    straight, mixed = solve_tanh(w, b, solver), solve_tanh(w[order], b[order], solver)
    torch.testing.assert_close(mixed.value, straight.value[order], rtol=1e-9, atol=1e-12)
    assert torch.equal(mixed.evaluations, straight.evaluations[order])
    assert torch.equal(mixed.steps, straight.steps[order])


@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_converged_samples_do_not_move(solver: implicit.Solver) -> None:
    w, b = tanh_problem(5)
    states: list[Tensor] = []

    def f(y: Tensor) -> Tensor:
        states.append(y.clone())
        return torch.tanh(torch.einsum("bd,bde->be", y, w) + b)

    with torch.no_grad():
        solution = fixed_point(
            f, torch.zeros_like(b), solver=solver, stop=Tolerance(rtol=1e-8, atol=0.0)
        )
    for i in range(5):
        last = int(solution.evaluations[i]) - 1
        for later in states[last:]:
            assert torch.equal(later[i], states[last][i])
        assert torch.equal(solution.value[i], states[last][i])
    assert int(solution.evaluations.min()) < len(states)


@pytest.mark.parametrize("solver", SECANT, ids=repr)
@pytest.mark.parametrize("scale", [1e-6, 1e6, 2.0**-40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_units_of_the_state_do_not_matter(
    solver: implicit.Solver, scale: float, dtype: torch.dtype
) -> None:
    """If ``f(y)`` is solved, so is ``c f(y / c)``, in the same number of evaluations."""
    w, b = (x.to(dtype) for x in tanh_problem(4))
    stop = Tolerance(rtol=1e-5, atol=0.0, max_steps=100)

    def f(y: Tensor) -> Tensor:
        return torch.tanh(torch.einsum("bd,bde->be", y, w) + b)

    plain = fixed_point(f, torch.zeros_like(b), solver=solver, stop=stop)
    scaled = fixed_point(
        lambda y: scale * f(y / scale), torch.zeros_like(b), solver=solver, stop=stop
    )
    assert plain.converged.all()
    assert torch.equal(plain.evaluations, scaled.evaluations)
    torch.testing.assert_close(scaled.value / scale, plain.value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("solver", ALL, ids=repr)
@settings(max_examples=10, deadline=None)
@given(exponent=st.integers(-20, 20), seed=st.integers(0, 10**6))
def test_powers_of_two_scale_every_iterate_exactly(
    solver: implicit.Solver, exponent: int, seed: int
) -> None:
    """Multiplication by a power of two does not round, so not one bit may change."""
    w, b, y0 = 0.4 * random(5, 5, seed=seed), random(5, seed=seed + 1), random(2, 5, seed=seed + 2)
    scale = 2.0**exponent

    def path(factor: float) -> tuple[Tensor, ...]:
        return fixed_point(
            lambda y: factor * tanh_layer(w, b, y / factor),
            factor * y0,
            solver=solver,
            stop=Steps(9),
            path=range(1, 10),
        ).path

    for usual, scaled in zip(path(1.0), path(scale), strict=True):
        assert torch.equal(scale * usual, scaled)


@pytest.mark.parametrize("solver", SECANT, ids=repr)
def test_a_sample_that_was_thrown_far_away_begins_again(solver: implicit.Solver) -> None:
    """One wild image of one sample: it forgets its pairs and arrives, its neighbour never knows."""
    calls: list[int] = []

    def f(y: Tensor) -> Tensor:
        calls.append(1)
        image = torch.cos(y)
        if len(calls) == 4:
            image[1] += 1e9
        return image

    y0 = torch.tensor([[1.0, 0.5], [1.0, 0.5]], dtype=torch.float64)
    stop = Tolerance(rtol=1e-9, atol=0.0, max_steps=60)
    with torch.no_grad():
        thrown = fixed_point(f, y0, solver=solver, stop=stop)
        usual = fixed_point(torch.cos, y0, solver=solver, stop=stop)
    assert thrown.converged.all()
    torch.testing.assert_close(thrown.value, usual.value, rtol=1e-7, atol=0)
    assert torch.equal(thrown.value[0], usual.value[0])
    assert torch.equal(thrown.evaluations[0], usual.evaluations[0])


def after_one_pair(solver: implicit.Solver, ys: list[Tensor], rs: list[Tensor]) -> Tensor:
    """The next iterate of one sample ``(D,)`` that knows its last pair of differences alone."""
    dy, dr, r = ys[-1] - ys[-2], rs[-1] - rs[-2], rs[-1]
    if isinstance(solver, Anderson):
        gamma = dr.dot(r) / (dr.dot(dr) * (1 + solver.ridge))
        return ys[-1] + r - (dy + dr) * gamma
    matrix = torch.eye(len(r), dtype=r.dtype) + torch.outer(-dr - dy, dy) / dy.dot(dy)
    return ys[-1] + torch.linalg.solve(matrix, r)


@pytest.mark.parametrize("solver", [Anderson(restart=100.0), Broyden(restart=100.0)], ids=repr)
@pytest.mark.parametrize(("push", "forgets"), [(1e4, True), (1e-6, False)])
def test_pairs_are_forgotten_when_the_residual_grows_beyond_the_best(
    solver: implicit.Solver, push: float, forgets: bool
) -> None:
    """By more than ``restart`` times its own best, and for the sample alone whose residual did."""
    w, b = 0.5 * random(6, 6, seed=1) / 6**0.5, random(2, 6, seed=2)
    scale = torch.tensor([[1e8], [1.0]], dtype=torch.float64)
    calls: list[int] = []

    def f(y: Tensor) -> Tensor:
        calls.append(1)
        image = scale * torch.tanh((y / scale) @ w + b)
        if len(calls) == 7:  # later than `Broyden` takes steps back
            image[1] += push * random(6, seed=3)
        return image

    seen = Counted(f)
    with torch.no_grad():
        fixed_point(seen, torch.zeros(2, 6, dtype=torch.float64), solver=solver, stop=Steps(8))
    calls.clear()
    images = [f(y) for y in seen.seen]
    for sample, expected in ((0, False), (1, forgets)):
        ys = [y[sample] for y in seen.seen[:7]]
        rs = [image[sample] - y for image, y in zip(images[:7], ys, strict=True)]
        fresh = after_one_pair(solver, ys, rs)
        length = (fresh - ys[-1]).norm()
        assert bool((seen.seen[7][sample] - fresh).norm() < 1e-7 * length) == expected


@pytest.mark.parametrize("solver", SECANT, ids=repr)
def test_numbers_whose_squares_overflow_take_the_plain_step(solver: implicit.Solver) -> None:
    """1e200 squared is infinite, and no weights come of it; its neighbour is solved as ever."""
    scale = torch.tensor([[1e200], [1.0]], dtype=torch.float64)

    def f(y: Tensor) -> Tensor:
        return scale * torch.cos(y / scale)

    start = torch.zeros(2, 3, dtype=torch.float64)
    found = fixed_point(f, start, solver=solver, stop=Steps(8)).value
    plain = fixed_point(f, start, solver=Naive(), stop=Steps(8)).value
    alone = fixed_point(torch.cos, start[1:], solver=solver, stop=Steps(8)).value
    if getattr(solver, "mixing", 1.0) == 1:
        torch.testing.assert_close(found[0], plain[0], rtol=1e-12, atol=0)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[1:], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_one_solver_object_serves_a_solve_within_its_own(solver: implicit.Solver) -> None:
    """``y = (x(y) + d) / 2`` where ``x(y)`` solves ``x = (cos x + y) / 2``: all equal Dottie's."""
    dottie = 0.7390851332151607

    def outer(y: Tensor) -> Tensor:
        inner = fixed_point(lambda x: 0.5 * (torch.cos(x) + y), y, solver=solver, stop=TIGHT)
        return 0.5 * (inner.value + dottie)

    y0 = torch.zeros(2, 1, dtype=torch.float64)
    with torch.no_grad():
        value = fixed_point(outer, y0, solver=solver, stop=TIGHT).value
    torch.testing.assert_close(value, torch.full_like(y0, dottie), rtol=0, atol=1e-7)


@pytest.mark.parametrize("solver", ALL, ids=repr)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_sample_leaves_its_neighbours_alone(solver: implicit.Solver, bad: float) -> None:
    w, b = tanh_problem(4)
    good = solve_tanh(w, b, solver)
    poisoned = w.clone()
    poisoned[1] = bad
    spoilt = solve_tanh(poisoned, b, solver)
    others = [0, 2, 3]
    assert spoilt.status.tolist() == [0, Status.DIVERGED, 0, 0]
    torch.testing.assert_close(spoilt.value[others], good.value[others], rtol=1e-9, atol=1e-12)
    assert torch.equal(spoilt.evaluations[others], good.evaluations[others])


@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_a_sample_that_turns_bad_on_the_way(solver: implicit.Solver) -> None:
    """NaN from the third evaluation on, in one sample only."""
    w, b = tanh_problem(4)
    good = solve_tanh(w, b, solver)
    calls = []

    def f(y: Tensor) -> Tensor:
        calls.append(1)
        image = torch.tanh(torch.einsum("bd,bde->be", y, w) + b)
        if len(calls) >= 3:
            image[2] = torch.nan
        return image

    with torch.no_grad():
        spoilt = fixed_point(
            f,
            torch.zeros_like(b),
            solver=solver,
            stop=Tolerance(rtol=1e-8, atol=0.0, max_steps=200),
        )
    assert spoilt.status.tolist() == [0, 0, Status.DIVERGED, 0]
    # Ten times an evaluation of the start and one of what follows, where a solver does that.
    assert int(spoilt.evaluations[2]) == (23 if solver.retreats else 3)
    others = [0, 1, 3]
    torch.testing.assert_close(spoilt.value[others], good.value[others], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_nan_after_the_answer_does_not_poison_it(solver: implicit.Solver) -> None:
    """A sample that is done keeps value, status and residual, whatever f makes of it later."""
    w, b = tanh_problem(4)
    good = solve_tanh(w, b, solver)
    first = int(good.evaluations[0])
    assert first < int(good.evaluations.max()), "others must still be on their way"
    calls = []

    def f(y: Tensor) -> Tensor:
        calls.append(1)
        image = torch.tanh(torch.einsum("bd,bde->be", y, w) + b)
        if len(calls) > first:
            image[0] = torch.nan
        return image

    with torch.no_grad():
        found = fixed_point(
            f,
            torch.zeros_like(b),
            solver=solver,
            stop=Tolerance(rtol=1e-8, atol=0.0, max_steps=200),
        )
    for field in ("value", "status", "steps", "evaluations", "residual", "relative_residual"):
        torch.testing.assert_close(
            getattr(found, field), getattr(good, field), rtol=1e-6, atol=1e-12
        )


@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_a_bad_sample_under_fixed_steps(solver: implicit.Solver) -> None:
    w, b = tanh_problem(4)
    poisoned = w.clone()
    poisoned[1] = torch.nan
    good = solve_tanh(w, b, solver, stop=Steps(12))
    spoilt = solve_tanh(poisoned, b, solver, stop=Steps(12))
    assert spoilt.status.tolist() == [1, Status.DIVERGED, 1, 1]
    others = [0, 2, 3]
    torch.testing.assert_close(spoilt.value[others], good.value[others], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_a_solver_serves_many_solves(solver: implicit.Solver) -> None:
    """Nested and repeated solves with one object do not disturb each other."""
    w, b = tanh_problem(3)
    first = solve_tanh(w, b, solver)

    def outer(y: Tensor) -> Tensor:
        inner = fixed_point(lambda z: 0.5 * torch.cos(z) + 0.1 * y, y, solver=solver, stop=TIGHT)
        return inner.value

    with torch.no_grad():
        nested = fixed_point(outer, torch.zeros(2, 2, dtype=torch.float64), solver=solver)
    assert nested.converged.all()
    assert torch.equal(solve_tanh(w, b, solver).value, first.value)


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Naive(0.0), r"Naive\(damping=0\.0\): must be a .* in \(0, 1\]"),
        (lambda: Naive(1.5), r"Naive\(damping=1\.5\): must be a .* in \(0, 1\]"),
        (lambda: Naive(-0.5), r"Naive\(damping=-0\.5\): must be a .* in \(0, 1\]"),
        (lambda: Naive(math.nan), r"Naive\(damping=nan\): must be a .* in \(0, 1\]"),
        (lambda: Anderson(memory=0), r"Anderson\(memory=0\): must be an integer of at least 1"),
        (lambda: Anderson(memory=-1), r"Anderson\(memory=-1\): must be an integer of at least 1"),
        (lambda: Anderson(mixing=0.0), r"Anderson\(mixing=0\.0\): must be a .* in \(0, 1\]"),
        (lambda: Anderson(mixing=2.0), r"Anderson\(mixing=2\.0\): must be a .* in \(0, 1\]"),
        (lambda: Anderson(ridge=-1.0), r"Anderson\(ridge=-1\.0\): must be a .* of at least 0"),
        (lambda: Anderson(restart=1.0), r"Anderson\(restart=1\.0\): must be a .* above 1"),
        (lambda: Broyden(memory=0), r"Broyden\(memory=0\): must be an integer of at least 1"),
        (lambda: Broyden(restart=0.5), r"Broyden\(restart=0\.5\): must be a .* above 1"),
        (lambda: Naive("half"), r"Naive\(damping='half'\): must be a finite number"),  # type: ignore
        (lambda: Naive(True), r"Naive\(damping=True\): must be a finite number"),
        (lambda: Anderson(ridge=math.inf), r"Anderson\(ridge=inf\): must be a finite number"),
        (
            lambda: Broyden(line_search="yes"),  # type: ignore
            r"Broyden\(line_search='yes'\): must be True or False",
        ),
    ],
)
def test_options_out_of_range(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_numbers_of_numpy_are_numbers() -> None:
    options: dict[str, Any] = {"memory": np.int64(3), "mixing": np.float32(0.5)}
    steps: Any = np.int64(5)
    f, y0 = torch.cos, torch.ones(2, 1)
    numpys = fixed_point(f, y0, solver=Anderson(**options), stop=Steps(steps))
    ours = fixed_point(f, y0, solver=Anderson(memory=3, mixing=0.5), stop=Steps(5))
    assert torch.equal(numpys.value, ours.value)


@pytest.mark.parametrize("kind", [Anderson, Broyden])
def test_memory_must_be_an_integer(kind: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="memory=2.5"):
        kind(memory=2.5)


@pytest.mark.parametrize("option", ["ridge", "restart"])
def test_nan_is_not_an_option(option: str) -> None:
    options: dict[str, Any] = {option: math.nan}
    with pytest.raises(ValueError, match=rf"{option}=nan"):
        Anderson(**options)


@pytest.mark.parametrize(
    ("kind", "name"), [(Naive, "beta"), (Anderson, "m"), (Anderson, "max_iter"), (Broyden, "lamb")]
)
def test_unknown_options_are_refused(kind: Any, name: str) -> None:
    with pytest.raises(TypeError, match=name):
        kind(**{name: 1})


def test_solvers_hold_nothing_but_options() -> None:
    """Frozen: a solve cannot change the caller's object, and equal options are equal solvers."""
    for solver in ALL:
        with pytest.raises(AttributeError):
            solver.memory = 3  # type: ignore[attr-defined]
    assert Anderson(3) == Anderson(memory=3)
    assert hash(Broyden(4)) == hash(Broyden(memory=4))


@pytest.mark.parametrize(
    "solver", [implicit.Naive(), implicit.Anderson(4), implicit.Broyden(4)], ids=repr
)
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler, as it loads
def test_a_fixed_step_solve_compiles_whole(solver: implicit.Solver) -> None:
    def value(x: Tensor) -> Tensor:
        return implicit.fixed_point(
            lambda y: torch.tanh(0.5 * y + x),
            torch.zeros_like(x),
            solver=solver,
            stop=implicit.Steps(6),
        ).value

    x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
    with torch.no_grad():
        compiled = torch.compile(value, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(compiled, value(x))


def test_broyden_takes_back_a_first_step_that_is_far_too_long() -> None:
    """``f(y) = 10 c − 9 y``: the plain step leads ten times too far, and a tenth of it to ``c``."""
    c = random(2, 5, seed=4)
    y0 = torch.zeros_like(c)
    with torch.no_grad():
        found = fixed_point(lambda y: 10 * c - 9 * y, y0, solver=Broyden(), stop=Steps(2)).value
    torch.testing.assert_close(found, c, rtol=1e-14, atol=0)


@pytest.mark.parametrize("radius", [0.5, 30.0])
def test_steps_taken_back_are_differentiated_as_they_were_taken(radius: float) -> None:
    x = random(2, 3, seed=5).requires_grad_()

    def path(x: Tensor) -> Tensor:
        return fixed_point(
            lambda y: x.sin() - radius * y + 0.1 * y.cos(),
            torch.zeros_like(x),
            solver=Broyden(memory=4),
            stop=Steps(7),
            gradient=implicit.BPTT(),
        ).value

    value = path(x)
    (found,) = torch.autograd.grad(value.sum(), x)
    # The path has settled, so its derivative is that of the solution.
    slope = x.cos() / (1 + radius + 0.1 * value.sin())
    torch.testing.assert_close(found, slope.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", [0.5, 10.0, 400.0])
def test_pairs_that_are_handed_on_are_of_the_problem_whatever_was_damped(norm: float) -> None:
    """On ``f(y) = A y + b`` the residual changes by ``(A − I) Δy`` along a difference of points."""
    a = torch.diag(torch.tensor([-norm, 0.5, 0.2, -0.3], dtype=torch.float64))
    a = a + 0.05 * random(4, 4, seed=3)
    b, y0 = random(2, 4, seed=4), torch.zeros(2, 4, dtype=torch.float64)
    memory = fixed_point(
        lambda y: y @ a.T + b, y0, solver=Broyden(memory=3), stop=Steps(4), keep_memory=True
    ).memory
    expected = memory.others @ (a - torch.eye(4, dtype=torch.float64)).T
    assert float(memory.others.abs().max()) > 0
    torch.testing.assert_close(memory.residuals, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", [Anderson, Broyden], ids=["Anderson", "Broyden"])
@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2)])
def test_pairs_of_another_number_are_refused(solver: Any, before: int, after: int) -> None:
    y0 = torch.ones(2, 3, dtype=torch.float64)
    memory = fixed_point(torch.cos, y0, solver=solver(memory=before), keep_memory=True).memory
    with pytest.raises(ValueError, match=rf"kept \(2, {before}, 3\).*\(2, {after}, 3\)"):
        fixed_point(torch.cos, y0, solver=solver(memory=after), memory=memory)


def test_a_path_with_restarts_is_differentiated_as_it_was_taken() -> None:
    """A turn that expands: two pairs are too few, residuals grow, and the history is forgotten."""
    turn = 1.8 * torch.tensor([[0.6, -0.8, 0], [0.8, 0.6, 0], [0, 0, -0.9]], dtype=torch.float64)
    x = random(3, 3, seed=8).requires_grad_()
    traces: list[Any] = []

    def path(x: Tensor) -> Tensor:
        solution = fixed_point(
            lambda y: y @ turn + x.sin(),
            torch.zeros_like(x),
            solver=Anderson(memory=2, restart=1.05),
            stop=Steps(7),
            gradient=implicit.BPTT(),
            trace=True,
        )
        traces.append(solution.residual)
        assert isinstance(solution.value, Tensor)
        return solution.value

    assert torch.autograd.gradcheck(path, x)
    least = fixed_point(
        lambda y: y @ turn + x.detach().sin(),
        torch.zeros(3, 3, dtype=torch.float64),
        solver=Anderson(memory=2, restart=1e9),
        stop=Steps(7),
    )
    assert not torch.allclose(least.residual, traces[0]), "nothing has restarted"


@pytest.mark.parametrize("of", [Anderson(), Broyden(), NewtonKrylov(), Naive()], ids=repr)
@pytest.mark.parametrize("to", [Anderson(), Broyden(), NewtonKrylov(), Naive()], ids=repr)
def test_memory_of_another_solver_is_refused(of: implicit.Solver, to: implicit.Solver) -> None:
    y0 = torch.ones(2, 3, dtype=torch.float64)
    memory = fixed_point(torch.cos, y0, solver=of, keep_memory=True).memory
    if memory is None or type(of) is type(to):
        assert bool(fixed_point(torch.cos, y0, solver=to, memory=memory).converged.all())
    else:
        with pytest.raises(ValueError, match="same solver"):
            fixed_point(torch.cos, y0, solver=to, memory=memory)


def test_newton_krylov_finishes_the_neighbours_of_a_bad_sample() -> None:
    w, b = tanh_problem(4)
    poisoned = w.clone()
    poisoned[1] = torch.nan
    spoilt, good = (solve_tanh(x, b, NewtonKrylov()) for x in (poisoned, w))
    assert spoilt.status.tolist() == [0, Status.DIVERGED, 0, 0]
    others = [0, 2, 3]
    torch.testing.assert_close(spoilt.value[others], good.value[others], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", [Anderson(), Anderson(3), Broyden(), Broyden(3)], ids=repr)
def test_the_path_of_samples_that_stop_early_is_differentiated(solver: implicit.Solver) -> None:
    """One sample settles long before the other, and makes pairs of length zero from then on."""
    a = torch.tensor([[0.05], [0.95]], dtype=torch.float64, requires_grad=True)
    value = fixed_point(
        lambda y: a * torch.tanh(y) + 1,
        torch.zeros(2, 3, dtype=torch.float64),
        solver=solver,
        stop=Tolerance(rtol=1e-9, atol=0.0, max_steps=60),
        gradient=implicit.BPTT(),
    ).value
    (found,) = torch.autograd.grad(value.sum(), a)
    tanh = value.detach().tanh()
    exact = (tanh / (1 - a.detach() * (1 - tanh**2))).sum(dim=1, keepdim=True)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=0)


class SquareOfSine(torch.autograd.Function):
    """An operator with derivatives in reverse mode only, as many extensions have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin() ** 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (2 * x).sin()


def test_newton_krylov_needs_no_forward_mode() -> None:
    y0 = torch.full((2, 3), 0.7, dtype=torch.float64)

    def f(y: Tensor) -> Tensor:
        return 3 * SquareOfSine.apply(y) - 0.5  # which expands at its fixed point

    found = fixed_point(f, y0, solver=NewtonKrylov(), stop=TIGHT)
    usual = fixed_point(lambda y: 3 * y.sin() ** 2 - 0.5, y0, solver=NewtonKrylov(), stop=TIGHT)
    assert found.converged.all()
    torch.testing.assert_close(found.value, usual.value)
    assert torch.equal(found.evaluations, usual.evaluations)


def test_newton_krylov_solves_what_depends_on_no_state() -> None:
    b = random(2, 3, seed=6)
    with torch.enable_grad():
        found = fixed_point(lambda y: b, torch.zeros_like(b), solver=NewtonKrylov(), stop=TIGHT)
    torch.testing.assert_close(found.value, b)


def test_status_of_a_sample() -> None:
    solution = fixed_point(torch.cos, torch.zeros(1, 1))
    assert Status(solution.status[0]) is Status.CONVERGED
    with pytest.raises(ValueError, match="not a valid Status"):
        Status(torch.zeros(2))


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e3, 1e20])
@pytest.mark.parametrize("solver", [Anderson(), Broyden(), Broyden(memory=3)], ids=repr)
def test_a_warm_start_does_not_depend_on_the_scale(solver: implicit.Solver, scale: float) -> None:
    """Also for a sample whose last pairs are of length zero, as it settled before the other."""
    w, r = torch.linalg.qr(random(6, 6, seed=7))[0], torch.tensor([[0.3], [0.97]]).double()
    x, y0 = random(2, 6, seed=8), torch.zeros(2, 6, dtype=torch.float64)
    stop = Tolerance(rtol=1e-8, atol=0.0, max_steps=200)

    def f(y: Tensor) -> Tensor:
        return scale * torch.tanh(r * (y / scale @ w + x))

    with torch.no_grad():
        cold = fixed_point(f, y0, solver=solver, stop=stop, keep_memory=True)
        warm = fixed_point(f, y0, solver=solver, stop=stop, memory=cold.memory)
    assert warm.converged.all()
    torch.testing.assert_close(warm.value / scale, cold.value / scale, rtol=1e-6, atol=1e-7)
    assert warm.evaluations.sum() <= cold.evaluations.sum()


def writes_to_its_input(y: Tensor) -> Tensor:
    return y.mul_(0.5).add_(1)


@pytest.mark.parametrize("shape", [(2, 2), (2, 2, 2)])
@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_a_map_that_writes_to_its_input_is_told(
    solver: implicit.Solver, shape: tuple[int, ...]
) -> None:
    with torch.no_grad(), pytest.raises(implicit.StateError, match="wrote to the state"):
        fixed_point(writes_to_its_input, torch.zeros(shape), solver=solver)


def test_a_map_that_uses_its_output_again_is_told() -> None:
    buffer = torch.empty(2, 2)
    with torch.no_grad(), pytest.raises(implicit.StateError, match="return a clone"):
        fixed_point(lambda y: torch.cos(y, out=buffer), torch.zeros(2, 2), solver=Naive())


def test_bptt_through_newton_krylov_says_what_to_use() -> None:
    for solver in (NewtonKrylov(), implicit.Best(NewtonKrylov())):
        with pytest.raises(ValueError, match="Naive, Anderson or Broyden"):
            fixed_point(torch.cos, torch.zeros(1, 1), solver=solver, gradient=implicit.BPTT())


def test_args_must_be_a_tuple() -> None:
    with pytest.raises(TypeError, match=r"args=\(x,\)"):
        fixed_point(lambda y, x: y * x, torch.zeros(2, 1), args=torch.ones(2, 1))  # type: ignore[arg-type]


def test_pairs_of_an_affine_map_solve_the_next_problem_of_it_at_once() -> None:
    """Four pairs span the state, so Anderson mixing knows the Jacobian."""
    w, y0 = 0.8 * torch.linalg.qr(random(4, 4, seed=9))[0], torch.zeros(2, 4, dtype=torch.float64)
    stop = Tolerance(rtol=1e-7, atol=0.0, max_steps=50)
    cold = fixed_point(
        lambda y: y @ w + random(2, 4, seed=10),
        y0,
        solver=Anderson(memory=8),
        stop=stop,
        keep_memory=True,
    )
    warm = fixed_point(
        lambda y: y @ w + random(2, 4, seed=11),
        y0,
        solver=Anderson(memory=8),
        stop=stop,
        memory=cold.memory,
    )
    assert warm.converged.all()
    assert int(warm.evaluations.max()) <= 3 < int(cold.evaluations.min())


@pytest.mark.parametrize("memory", [3, 8])
def test_broyden_resumes_with_the_matrix_that_its_updates_make(memory: int) -> None:
    """``B ← B + (y − B s) sᵀ / ‖s‖²`` over the pairs that are handed on, oldest first."""
    w, b = 0.8 * torch.linalg.qr(random(6, 6, seed=12))[0], random(2, 6, seed=13)
    solver = Broyden(memory=memory)
    y = torch.zeros_like(b)
    points, residuals, state = [], [], solver.init(y)
    with torch.no_grad():
        for _ in range(6):
            fy = y @ w + b
            points.append(y.clone())
            residuals.append(fy - y)
            y, state = solver.step(state, y, fy, fy - y)
        resumed = solver.resume(solver.export(state), y)
        following, _ = solver.step(resumed, y, y @ w + b, y @ w + b - y)
    kept = min(memory - 1, 5)  # the slot of the oldest of a full memory is taken already
    for sample in range(2):
        matrix = torch.eye(6, dtype=torch.float64)
        for k in range(5 - kept, 5):
            s = points[k + 1][sample] - points[k][sample]
            change = residuals[k][sample] - residuals[k + 1][sample]
            matrix = matrix + torch.outer(change - matrix @ s, s) / s.dot(s)
        r = (y @ w + b - y)[sample]
        expected = y[sample] + torch.linalg.solve(matrix, r)
        torch.testing.assert_close(following[sample], expected, rtol=1e-9, atol=1e-12)


# -- Newton–Krylov and the line search, to the letter --------------------------------------------


def literal_newton(
    g: Callable[[float], float], slope: Callable[[float], float], y: float, n: int
) -> list[float]:
    """Newton's method on ``g(y) = 0`` for a number, with the search of Zhang and Hager (2004).

    ``Qₖ₊₁ = η Qₖ + 1`` and ``Cₖ₊₁ = (η Qₖ Cₖ + |gₖ₊₁|) / Qₖ₊₁`` with η = 0.85; a share ``t`` of
    the step is accepted at ``|g| ≤ (1 − 1e-4 t) C``, or after eight halvings.
    """
    path = []
    weight, average = 1.0, abs(g(y))
    while len(path) < n:
        step, share = -g(y) / slope(y), 1.0
        for halvings in range(9):
            path.append(y + share * step)
            if abs(g(path[-1])) <= (1 - 1e-4 * share) * average or halvings == 8:
                break
            share /= 2
        y = path[-1]
        average = (0.85 * weight * average + abs(g(y))) / (0.85 * weight + 1)
        weight = 0.85 * weight + 1
    return path[:n]


LANDSCAPES = {
    "overshoots": (torch.atan, math.atan, lambda y: 1 / (1 + y * y), 12.0),
    "has-no-root": (lambda y: 1 + y * y, lambda y: 1 + y * y, lambda y: 2 * y, 1e-3),
    "grows-for-once": (
        lambda y: y**3 - 2 * y + 2,
        lambda y: y**3 - 2 * y + 2,
        lambda y: 3 * y * y - 2,
        0.1,
    ),
}


@pytest.mark.parametrize("name", LANDSCAPES)
def test_newton_krylov_is_newton_with_the_search_of_zhang_and_hager(name: str) -> None:
    """In one dimension every linear system is solved exactly by one product."""
    g, literal, slope, start = LANDSCAPES[name]
    n = 24
    path = fixed_point(
        lambda y: y - g(y),
        torch.tensor([[start], [start]], dtype=torch.float64),
        solver=NewtonKrylov(),
        stop=Steps(n),
        path=range(1, n + 1),
    ).path
    wanted = literal_newton(literal, slope, start, n)
    halves = sum(abs(b - a) < abs(a) for a, b in itertools.pairwise(wanted))
    assert halves > 0
    for row in range(2):
        assert [y[row].item() for y in path] == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_newton_krylov_solves_as_exactly_as_eisenstat_and_walker_say() -> None:
    """Each step is the least-squares one of the smallest Krylov space within ``η ‖r‖``.

    ``η = 0.9 (‖rₖ‖ / ‖rₖ₋₁‖)²``, at most 0.1, which is what the first step takes.
    """
    dim, n = 12, 5
    w, b = 1.5 * random(dim, dim, seed=21) / dim**0.5, random(dim, seed=22)

    def f(y: Tensor) -> Tensor:
        return torch.tanh(y @ w + b)

    y0 = random(1, dim, seed=23)
    solution = fixed_point(
        f, y0, solver=NewtonKrylov(forcing=0.1), stop=Steps(n), path=range(1, n + 1)
    )
    y, last, products, sizes = y0[0], math.inf, 0, []
    for following in solution.path:
        r = f(y) - y
        length = float(r.norm())
        allowed = min(0.1, max(1e-8, 0.9 * (length / last) ** 2)) * length
        jacobian = torch.autograd.functional.jacobian(f, y)
        a = torch.eye(dim, dtype=y.dtype) - jacobian
        for size in range(1, dim + 1):
            space = torch.stack([torch.linalg.matrix_power(a, k) @ r for k in range(size)], dim=1)
            space, _ = torch.linalg.qr(space)
            step = space @ torch.linalg.lstsq(a @ space, r[:, None]).solution[:, 0]
            if float((r - a @ step).norm()) <= allowed:
                break
        torch.testing.assert_close(following[0], y + step, rtol=1e-6, atol=1e-8)
        products, last, y = products + size, length, following[0]
        sizes.append(size)
    assert len(set(sizes)) > 2, "each system is solved as exactly as it deserves"
    assert int(solution.evaluations) == n + products


@pytest.mark.parametrize("forcing", [0.0, 1.0, 1.5, -0.1, math.nan])
def test_forcing_out_of_range(forcing: float) -> None:
    with pytest.raises(ValueError, match=r"NewtonKrylov\(forcing=.*must be a .* in \(0, 1\)"):
        NewtonKrylov(forcing=forcing)


# -- Broyden that takes steps back, to the letter ------------------------------------------------


def literal_taking_back(residuals: list[Tensor], y: Tensor) -> list[Tensor]:
    """Dense good Broyden on ``F = −λ r``, given the residuals that are met one after another.

    One of the first five that is over four times that of the point it came from takes its step
    back, and λ is multiplied by ``‖Δy‖ / ‖ΔF‖``, within 0.01 and 1; one that is over a hundred
    times the least begins again from ``B = I``, as does a step that is taken back.
    """
    eye = torch.eye(len(y), dtype=y.dtype)
    matrix, rate, r, path = eye, 1.0, residuals[0], [y + residuals[0]]
    least = float(r.norm())
    for taken, now in enumerate(residuals[1:], start=2):
        new, length = path[-1], float(now.norm())
        s, change = new - y, rate * (r - now)
        if length > 100 * least:
            matrix, least = eye, length
        least = min(least, length)
        if taken <= 5 and length > 4 * float(r.norm()):
            rate *= min(1, max(0.01, float(s.norm() / change.norm())))
            matrix, least = eye, float(r.norm())
        else:
            matrix = matrix + torch.outer(change - matrix @ s, s) / (s @ s)
            y, r = new, now
        path.append(y + torch.linalg.solve(matrix, rate * r))
    return path


@pytest.mark.parametrize(
    "lengths",
    [
        [1, 3.9, 1, 0.5, 0.2, 0.1, 0.05],
        [1, 4.1, 3, 2, 1, 0.5, 0.2],
        [1, 1e4, 3, 2, 1, 1, 1],
        [1, 2, 9, 12, 1, 4.1, 30, 2],
        [1, 0.1, 0.1, 0.1, 0.41, 0.1, 0.1],
        [1, 0.1, 0.1, 0.1, 0.1, 0.41, 0.1],
        [1, 5, 3, 3, 3, 3, 250, 3, 2],
        [1, 5, 3, 3, 3, 3, 99, 3, 101, 2],
        [1, 1, 1, 1, 1, 1, 101, 9999, 2, 150, 201, 3],
    ],
)
def test_broyden_takes_steps_back_and_begins_again_as_it_is_told(lengths: list[float]) -> None:
    """The map has a residual of its own at each evaluation, wherever it is evaluated."""
    dim, n = 12, len(lengths)
    directions = torch.nn.functional.normalize(random(n, dim, seed=31), dim=1)
    residuals = list(directions * torch.tensor(lengths, dtype=torch.float64).unsqueeze(1))
    y0, met = random(1, dim, seed=32), iter(residuals)
    with torch.no_grad():
        path = fixed_point(
            lambda y: y + next(met), y0, solver=Broyden(), stop=Steps(n), path=range(1, n + 1)
        ).path
    for found, wanted in zip(path, literal_taking_back(residuals, y0[0]), strict=True):
        torch.testing.assert_close(found[0], wanted, rtol=1e-7, atol=1e-7)


def test_best_hands_on_what_its_solver_does() -> None:
    f, _, _ = affine(6, 0.9, seed=3)
    y0, bare = random(2, 6, seed=4), Broyden(memory=8)
    memories = [
        fixed_point(f, y0, solver=solver, stop=Steps(5), keep_memory=True).memory
        for solver in (bare, implicit.Best(bare))
    ]
    assert memories[0].others.abs().sum() > 0
    torch.testing.assert_close(vars(memories[1]), vars(memories[0]), rtol=0, atol=0)


def test_solvers_that_need_the_map_cannot_begin_without_it() -> None:
    class Elsewhere(implicit.solvers.WholeSolver):
        def run(self, f: Any, y0: Tensor, stop: Any) -> Tensor:
            return y0

    y = torch.zeros(1, 1)
    with pytest.raises(TypeError, match=r"needs the map itself: begin\(y, f\)"):
        NewtonKrylov().init(y)
    with pytest.raises(TypeError, match="runs as a whole and cannot be stepped"):
        Elsewhere().init(y)
    with pytest.raises(TypeError, match="runs as a whole and cannot be stepped"):
        Elsewhere().step(None, y, y, y)


# Found missing by mutants


def test_between_extrapolations_every_step_is_plain() -> None:
    """With ``every=3``, steps 3, 6, 9 extrapolate; the others are ``y + β r``, to the last bit."""
    matrix = random(5, 5, seed=0)
    matrix = 0.9 * matrix / torch.linalg.matrix_norm(matrix, 2)

    def f(y: Tensor) -> Tensor:
        return torch.tanh(y @ matrix) + 1

    y0 = torch.zeros(1, 5, dtype=torch.float64)
    solver = implicit.Anderson(memory=4, mixing=0.5, every=3)
    steps = range(1, 10)
    path = [y0, *fixed_point(f, y0, solver=solver, stop=Steps(9), path=steps).path]
    for n, (y, following) in enumerate(itertools.pairwise(path), start=1):
        assert torch.equal(following, y.lerp(f(y), 0.5)) == (n % 3 != 0), n


def test_the_oldest_of_the_pairs_handed_on_is_the_first_to_go() -> None:
    numbered = torch.arange(1.0, 4.0).view(1, 3, 1).expand(1, 3, 2)
    handed_on = ImagePairs(numbered.clone(), 10 * numbered)
    y = torch.zeros(1, 2)
    history = SecantHistory.of(handed_on, y, memory=3, growth=10.0)
    history.scale = torch.ones(1, 3)
    history.push(y + 7, y + 70)
    history.hold(y + 70)
    history.push(y + 3, y + 30)  # a pair: 4 and 40, old less new
    residuals, images = history.export()
    # The slot of the pair now oldest is where the next image would wait.
    assert residuals[0, 1:, 0].tolist() == [3, 4] and images[0, 1:, 0].tolist() == [30, 40]


@pytest.mark.parametrize("stop", [Steps(6), implicit.Tolerance(rtol=1e-9, max_steps=6)], ids=repr)
def test_the_end_of_the_path_is_the_best_iterate_where_that_is_the_answer(stop: Any) -> None:
    with torch.no_grad():
        found = fixed_point(
            lambda y: 3 * y + 1,
            torch.ones(2, 3, dtype=torch.float64),
            solver=implicit.Best(implicit.Naive()),
            stop=stop,
            path=(2, 6),
        )
    assert torch.equal(found.path[-1], found.value)
    torch.testing.assert_close(found.value, torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(found.path[0], torch.full((2, 3), 13.0, dtype=torch.float64))
