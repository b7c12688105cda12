"""Our solvers under `torchdeq.get_deq`, and torchdeq's solvers in `implicit.fixed_point`.

Most maps are affine, ``f(y) = y A + x`` with ``‖A‖₂ < 1``: then ``y* = x (I − A)⁻¹``, and the
gradient of ``⟨c, y*⟩`` is ``c (I − A)⁻ᵀ`` for ``x`` and ``y*ᵀ`` times that for ``A``.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchdeq
import torchdeq.solver
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import in_a_fresh_interpreter
from torch import Tensor

import implicit
from implicit import Anderson, Broyden, Naive, NewtonKrylov, Steps, Tolerance, fixed_point
from implicit.interop.torchdeq import TorchDEQ, register

SOLVERS = [Naive(), Naive(0.7), Anderson(), Anderson(memory=2), Broyden(), NewtonKrylov()]
LINEAR = [solver for solver in SOLVERS if not isinstance(solver, NewtonKrylov)]
THEIRS = ["anderson", "broyden", "fixed_point_iter", "simple_fixed_point_iter"]


@pytest.fixture(autouse=True)
def solvers_of_torchdeq(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(torchdeq.solver, "_solvers", dict(torchdeq.solver._solvers))


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def affine(dim: int = 6, norm: float = 0.8) -> tuple[Tensor, Tensor, Tensor]:
    """``A (D, D)``, ``x (3, D)`` and the solution ``(3, D)``."""
    a, x = random(dim, dim, seed=0), random(3, dim, seed=1)
    a = norm * a / torch.linalg.matrix_norm(a, 2)
    inverse = torch.linalg.inv(torch.eye(dim, dtype=torch.float64) - a)
    return a, x, x @ inverse


def deq_of(solver: implicit.Solver, **options: Any) -> Any:
    """torchdeq's layer with a solver of ours, forward and backward."""
    register("ours", solver)
    chosen = {"f_solver": "ours", "b_solver": "ours", "f_max_iter": 300, "b_max_iter": 300}
    return torchdeq.get_deq(**{**chosen, **options})


# -- our solvers in torchdeq: answers ------------------------------------------------------------


@pytest.mark.parametrize("core", ["indexing", "sliced"])
@pytest.mark.parametrize("mode", ["abs", "rel"])
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_the_answer_is_the_solution(solver: implicit.Solver, mode: str, core: str) -> None:
    a, x, answer = affine()
    deq = deq_of(solver, core=core, f_stop_mode=mode, f_tol=1e-10).eval()
    states, figures = deq(lambda y: y @ a + x, torch.zeros_like(x))
    torch.testing.assert_close(states[-1], answer, rtol=1e-8, atol=1e-8)
    residual = torch.linalg.vector_norm(states[-1] @ a + x - states[-1], dim=1)
    torch.testing.assert_close(figures["abs_lowest"], residual, rtol=1e-6, atol=1e-13)
    assert (figures[f"{mode}_lowest"] <= 1e-10).all()


@pytest.mark.parametrize("shape", [(4,), (4, 1), (2, 3, 5)])
def test_shapes(shape: tuple[int, ...]) -> None:
    """What torchdeq takes for a sample: the first dimension, also of a vector."""
    deq = deq_of(Anderson(), f_tol=1e-12).eval()
    states, figures = deq(torch.cos, torch.zeros(shape, dtype=torch.float64))
    assert states[-1].shape == shape and figures["nstep"].shape == shape[:1]
    torch.testing.assert_close(states[-1], torch.full(shape, 0.7390851332, dtype=torch.float64))


def test_several_tensors_are_one_state() -> None:
    deq = deq_of(Anderson(), f_tol=1e-12, ift=True)
    w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    start = [torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 1, 2, dtype=torch.float64)]
    states, _ = deq(lambda y, z: (w * y + z.mean() + 1, z / 4 + 3), start)
    y, z = states[-1]
    torch.testing.assert_close(z, torch.full_like(z, 4.0))
    torch.testing.assert_close(y, torch.full_like(y, 10.0))
    (slope,) = torch.autograd.grad(y[0, 0], w)
    torch.testing.assert_close(slope, torch.tensor(20.0, dtype=torch.float64))  # 5 / (1 − w)²


def test_autocast_reaches_f_alone() -> None:
    """In half precision inside the layer, the linear algebra of the solver is not."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(4, 4)
    deq = deq_of(Anderson(), f_max_iter=20).eval()
    with torch.autocast("cpu", torch.bfloat16):
        states, figures = deq(lambda y: torch.tanh(0.2 * linear(y)), torch.zeros(2, 4))
    assert torch.isfinite(states[-1]).all()
    assert (figures["rel_lowest"] < 1e-2).all()


def test_one_of_torchdeqs_own_names_is_replaced() -> None:
    """At a solution torchdeq's Anderson evaluates three times, and ours once."""
    register("anderson", Anderson())
    calls = []

    def f(y: Tensor) -> Tensor:
        calls.append(1)
        return 2 - y

    torchdeq.get_deq(f_solver="anderson").eval()(f, torch.ones(2, 3))
    assert len(calls) == 2  # to find out, and to move on to f of it


# -- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-8])
@pytest.mark.parametrize("core", ["indexing", "sliced"])
@pytest.mark.parametrize("solver", LINEAR, ids=repr)
def test_implicit_gradient_is_exact_whatever_the_scale(
    solver: implicit.Solver, core: str, scale: float
) -> None:
    a, x, answer = affine()
    a.requires_grad_(), x.requires_grad_()
    deq = deq_of(solver, core=core, ift=True, f_tol=1e-12, b_stop_mode="rel", b_tol=1e-10)
    c = random(*x.shape, seed=2)
    states, _ = deq(lambda y: y @ a + x, torch.zeros_like(x))
    by_x, by_a = torch.autograd.grad(scale * (c * states[-1]).sum(), (x, a))
    w = c @ torch.linalg.inv(torch.eye(6, dtype=torch.float64) - a.detach()).mT
    torch.testing.assert_close(by_x / scale, w, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(by_a / scale, answer.detach().mT @ w, rtol=1e-7, atol=1e-7)


def test_hook_has_the_same_gradient() -> None:
    w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    deq = deq_of(Anderson(), hook_ift=True, f_tol=1e-12, b_tol=1e-12)
    states, _ = deq(lambda y: w * y + 1, torch.zeros(1, 1, dtype=torch.float64))
    states[-1].sum().backward()
    torch.testing.assert_close(w.grad, torch.tensor(4.0, dtype=torch.float64))


def test_a_loss_below_the_absolute_tolerance_still_has_the_gradient_of_one_step() -> None:
    """Zeros, where the backward solve starts, are within ``b_tol`` then, and are not returned."""
    w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    deq = deq_of(Anderson(), ift=True, f_tol=1e-12, b_tol=1e-6)
    states, _ = deq(lambda y: w * y + 1, torch.zeros(2, 1, dtype=torch.float64))
    states[-1][0].mul(1e-9).backward()  # of the other sample the gradient is zero
    torch.testing.assert_close(w.grad, torch.tensor(2e-9, dtype=torch.float64), rtol=1e-6, atol=0)


def test_a_gradient_that_is_not_finite_is_not_hidden() -> None:
    """A gradient scaler looks for it."""
    w = torch.tensor([[0.5], [0.5]], dtype=torch.float64, requires_grad=True)
    states, _ = deq_of(Anderson(), ift=True)(lambda y: w * y + 1, torch.zeros(2, 1).double())
    (torch.tensor([[1.0], [torch.nan]]) * states[-1]).sum().backward()
    assert torch.isfinite(w.grad).flatten().tolist() == [True, False]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("tau", [1.0, 0.6])
def test_unrolled_gradients_agree_with_ours(k: int, tau: float) -> None:
    """torchdeq's ``grad`` and ``tau`` are `RAG` and `Phantom` (whose value is not moved on)."""
    a, x, _ = affine()
    x.requires_grad_()
    deq = deq_of(Anderson(), grad=k, tau=tau, f_tol=1e-13)
    (theirs,) = torch.autograd.grad(deq(lambda y: y @ a + x, torch.zeros_like(x))[0][-1].sum(), x)
    gradient = implicit.RAG(k) if tau == 1 else implicit.Phantom(k, tau)
    stop = Tolerance(rtol=0.0, atol=1e-13, max_steps=300)
    ours = fixed_point(lambda y: y @ a + x, torch.zeros_like(x), stop=stop, gradient=gradient)
    (wanted,) = torch.autograd.grad(ours.value.sum(), x)
    torch.testing.assert_close(theirs, wanted)


def test_a_backward_pass_that_is_to_be_differentiated_again_is_refused() -> None:
    w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    states, _ = deq_of(Anderson(), ift=True)(lambda y: w * y + 1, torch.zeros(1, 1))
    with pytest.raises(RuntimeError, match=r"ours: .*create_graph.*gradient=implicit.Implicit"):
        torch.autograd.grad(states[-1].sum(), w, create_graph=True)


# -- states on the path, stops, statistics -------------------------------------------------------


RATES = torch.tensor([[0.0], [0.3], [0.6], [0.9]], dtype=torch.float64)
"""Of four samples of ``y ← λy + 1`` from zero: ``y_k = (1 − λᵏ) / (1 − λ)``, residual ``λᵏ``."""


def after(k: Tensor) -> Tensor:
    """``y_k`` of each of the four samples, for step numbers ``k (4, 1)``."""
    return (1 - RATES**k) / (1 - RATES)


def steps_needed(tol: float, most: int, relative: bool) -> Tensor:
    """``(4, 1)``: the first step whose residual is within ``tol``, or ``most``."""
    steps = torch.zeros(4, 1, dtype=torch.int64)
    for _ in range(most):
        size = after(steps + 1) if relative else torch.ones_like(RATES)
        steps += RATES**steps > tol * size
    return steps


@given(
    at=st.lists(st.integers(1, 12), max_size=5),
    relative=st.booleans(),
    tol=st.sampled_from([0.0, 1e-9, 1e-3, 0.2]),
)
@settings(max_examples=50, deadline=None)
def test_as_many_states_as_asked_each_after_its_step(
    at: list[int], relative: bool, tol: float
) -> None:
    """Whatever the order, and for each sample until it ends."""
    register("ours", Naive())
    value, states, figures = torchdeq.solver.get_solver("ours")(
        lambda y: RATES * y + 1,
        torch.zeros_like(RATES),
        max_iter=12,
        tol=tol,
        stop_mode="rel" if relative else "abs",
        indexing=at,
    )
    end = steps_needed(tol, 12, relative)
    torch.testing.assert_close(value, after(end))
    assert len(states) == len(at)
    for k, state in zip(at, states, strict=True):
        torch.testing.assert_close(state, after(end.clamp(max=k)))
    assert figures["nstep"].tolist() == end.flatten().tolist()
    torch.testing.assert_close(figures["abs_lowest"], (RATES**end).flatten())
    columns = torch.arange(13).expand(4, 13).minimum(end)
    torch.testing.assert_close(figures["abs_trace"], RATES**columns)
    wanted = RATES**columns / after(columns + 1)
    torch.testing.assert_close(figures["rel_trace"], wanted)
    torch.testing.assert_close(figures["rel_lowest"], wanted[:, -1])


@pytest.mark.parametrize("options", [{"n_states": 4}, {"indexing": [5, 10, 15]}], ids=str)
def test_layer_returns_every_state_though_it_ends_early(options: dict[str, Any]) -> None:
    w = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    deq = deq_of(Naive(), core="indexing", f_max_iter=20, f_tol=2e-7, **options)
    states, figures = deq(lambda y: w * y + 1, torch.zeros(2, 1, dtype=torch.float64))
    assert len(states) == 4 and (figures["nstep"] == 7).all()
    for state, k in zip(states, (5, 7, 7, 7), strict=True):  # and one tracked step
        torch.testing.assert_close(state, (1 - w ** (k + 1)) / (1 - w) * torch.ones(2, 1).double())
        assert torch.autograd.grad(state.sum(), w, retain_graph=True)[0] > 0


def test_statistics_are_those_of_torchdeq_in_kind() -> None:
    theirs = torchdeq.get_deq().eval()(torch.cos, torch.zeros(2, 3))[1]
    ours = deq_of(Naive(), f_max_iter=40).eval()(torch.cos, torch.zeros(2, 3))[1]
    assert type(ours) is type(theirs) and ours.keys() == theirs.keys()
    for name, figure in theirs.items():
        assert ours[name].shape == figure.shape and ours[name].dtype == figure.dtype, name


@pytest.mark.parametrize("limit", [torch.inf, 1e3], ids=["grows", "breaks"])
def test_a_sample_that_diverges_ends_at_its_best_and_harms_nobody(limit: float) -> None:
    rates = torch.tensor([[3.0], [0.5]], dtype=torch.float64)
    deq = deq_of(Naive(), core="indexing", indexing=[5], f_max_iter=40, f_tol=1e-9)
    start = torch.full((2, 1), 0.1, dtype=torch.float64)
    states, figures = deq(lambda y: torch.where(y > limit, torch.nan, rates * y), start)
    assert all(torch.isfinite(state).all() for state in states)
    torch.testing.assert_close(states[-1], rates * torch.tensor([[0.3], [0.0]]).double())
    assert figures["nstep"].tolist() == [0, 26] and figures["abs_lowest"][1] <= 1e-9


def test_the_step_of_the_answer_is_told_though_its_residual_grew() -> None:
    """``y ← 1.1 y + 1`` from zero: the residual is ``1.1ᵏ``, less and less beside the state."""
    deq = deq_of(Naive(), f_stop_mode="rel", f_tol=0.2).eval()
    _, figures = deq(lambda y: 1.1 * y + 1, torch.zeros(1, 1, dtype=torch.float64))
    steps = int(figures["nstep"])
    assert 0.1 * 1.1**steps <= 0.2 * (1.1 ** (steps + 1) - 1) and steps == 6
    assert figures["abs_lowest"].item() == pytest.approx(1.1**6)


def test_nothing_is_kept_for_a_backward_pass() -> None:
    w = torch.tensor(0.5, requires_grad=True)
    register("ours", Naive())
    solve = torchdeq.solver.get_solver("ours")
    value, states, figures = solve(lambda y: w * y + 1, torch.zeros(1, 1), indexing=[2])
    assert not any(x.requires_grad for x in (value, *states, *figures.values()))


def test_options_of_one_call() -> None:
    """``f_max_iter`` and settings of the solver, as torchdeq's ``solver_kwargs``."""
    a, x, _ = affine()
    deq = deq_of(Anderson(), f_tol=1e-10).eval()

    def steps(**options: Any) -> float:
        figures = deq(lambda y: y @ a + x, torch.zeros_like(x), solver_kwargs=options)[1]
        return float(figures["nstep"].max())

    assert steps() < steps(memory=1)
    assert steps(f_max_iter=3) <= 3


def test_more_steps_in_evaluation() -> None:
    deq = deq_of(Naive(), f_max_iter=10, eval_factor=2.0, f_tol=0.0)
    assert deq(torch.cos, torch.ones(1, 1))[1]["abs_trace"].shape == (1, 11)
    assert deq.eval()(torch.cos, torch.ones(1, 1))[1]["abs_trace"].shape == (1, 21)


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"stop_mode": "mixed"}, ValueError, r"ours\(stop_mode='mixed'\): use 'abs' or 'rel'"),
        ({"max_iter": 0}, ValueError, r"ours\(max_iter=0\): must be an integer of at least 1"),
        ({"max_iter": 2.5}, ValueError, r"ours\(max_iter=2\.5\)"),
        ({"tol": -1.0}, ValueError, r"atol=-1\.0.*at least 0"),
        ({"indexing": [50], "max_iter": 40}, ValueError, r"indexing=\[50\].*max_iter=40"),
        ({"indexing": [0]}, ValueError, r"indexing=\[0\].*from 1"),
        ({"m": 5}, TypeError, r"ours has no option 'm', but every, memory, mixing, restart, ridge"),
        ({"memory": 0}, ValueError, r"Anderson\(memory=0\)"),
        ({"x0": [torch.zeros(1, 1)]}, TypeError, r"ours: the state is a list.*no_stat"),
        ({"x0": torch.zeros(1, 1, dtype=torch.int64)}, implicit.StateError, "real numbers"),
        ({"x0": torch.ones(1, 1).bfloat16()}, implicit.StateError, "cannot be met in the dtype"),
        ({"func": lambda y: y[:, :0]}, implicit.StateError, "a state to a state of the same shape"),
    ],
)
def test_bad_options_of_a_solve(options: dict[str, Any], error: Any, match: str) -> None:
    register("ours", Anderson())
    given: dict[str, Any] = {"func": torch.cos, "x0": torch.ones(1, 1), **options}
    with pytest.raises(error, match=match):
        torchdeq.solver.get_solver("ours")(**given)


@pytest.mark.parametrize(
    ("solver", "match"),
    [
        ("anderson", r"solver='anderson' is not a solver"),
        (TorchDEQ("anderson"), r"TorchDEQ\('anderson'\) does not show its iterates"),
    ],
)
def test_what_cannot_be_registered(solver: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        register("refused", solver)
    assert "refused" not in torchdeq.solver._solvers


# -- torchdeq's solvers in fixed_point -----------------------------------------------------------


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize(
    "stop",
    [
        Tolerance(rtol=1e-9, atol=0.0, max_steps=300),
        Tolerance(rtol=0.0, atol=1e-9, max_steps=300),
        Steps(300),
    ],
    ids=repr,
)
def test_their_answer_is_judged_by_our_measure(name: str, stop: Any) -> None:
    a, x, answer = affine()
    solver = TorchDEQ(name, lam=1e-12) if name == "anderson" else TorchDEQ(name)
    found = fixed_point(
        lambda y, x: y @ a + x, torch.zeros_like(x), args=(x,), solver=solver, stop=stop
    )
    torch.testing.assert_close(found.value, answer, rtol=1e-7, atol=1e-7)
    image = found.value @ a + x
    residual = torch.linalg.vector_norm(image - found.value, dim=1)
    torch.testing.assert_close(found.residual, residual)
    assert found.converged.all() == isinstance(stop, Tolerance)
    if name != "simple_fixed_point_iter":  # which tests nothing
        assert (int(found.evaluations[0]) > 300) == isinstance(stop, Steps)


def test_their_word_is_not_taken() -> None:
    """Its Anderson leaves two evaluations untested and returns the start; the status tells."""
    start = torch.full((2, 1), 5.0, dtype=torch.float64)
    stop = Tolerance(rtol=1e-3, max_steps=2)
    found = fixed_point(torch.cos, start, solver=TorchDEQ("anderson"), stop=stop)
    assert torch.equal(found.value, start)
    assert found.status.tolist() == [implicit.Status.STOPPED] * 2
    torch.testing.assert_close(found.residual, (torch.cos(start) - start).abs().flatten())


@pytest.mark.parametrize("n", [1, 7])
def test_steps_are_their_iterations(n: int) -> None:
    found = fixed_point(
        lambda y: y / 2 + 1,
        torch.zeros(1, 1, dtype=torch.float64),
        solver=TorchDEQ("fixed_point_iter"),
        stop=Steps(n),
    )
    torch.testing.assert_close(found.value, torch.full((1, 1), 2 - 2 / 2**n, dtype=torch.float64))
    assert found.steps.tolist() == [n] and found.evaluations.tolist() == [n + 1]


@pytest.mark.parametrize("name", ["fixed_point_iter", "simple_fixed_point_iter"])
def test_their_options_reach_them(name: str) -> None:
    """Undamped, ``y ← 3 − 2y`` runs away."""
    start = torch.zeros(1, 1, dtype=torch.float64)
    stop = Tolerance(rtol=1e-6, max_steps=100)
    damped, plain = (
        fixed_point(lambda y: 3 - 2 * y, start, solver=TorchDEQ(name, tau=tau), stop=stop)
        for tau in (0.4, 1.0)
    )
    torch.testing.assert_close(damped.value, torch.ones_like(start))
    assert not plain.converged.any()


@pytest.mark.parametrize("name", ["anderson", "broyden"])
def test_gradient_through_their_solution_is_exact(name: str) -> None:
    """And with their solver for the backward system, too."""
    a, x, _ = affine()
    x.requires_grad_()
    tight = Tolerance(rtol=1e-11, atol=0.0, max_steps=300)
    theirs = TorchDEQ(name, lam=1e-14) if name == "anderson" else TorchDEQ(name)
    w = torch.linalg.inv(torch.eye(6, dtype=torch.float64) - a).sum(dim=1).expand(3, 6)
    for gradient in (implicit.Implicit(), implicit.Implicit(solver=theirs, stop=tight)):
        found = fixed_point(
            lambda y: y @ a + x, torch.zeros_like(x), solver=theirs, stop=tight, gradient=gradient
        )
        (by_x,) = torch.autograd.grad(found.value.sum(), x)
        torch.testing.assert_close(by_x, w, rtol=1e-7, atol=1e-7)
        assert len(found.adjoints) == 1


def test_their_solvers_find_roots_of_pytrees() -> None:
    start = {"a": torch.ones(2, 3, dtype=torch.float64), "b": torch.ones(2, 1, dtype=torch.float64)}
    found = implicit.root(
        lambda y: {"a": (y["a"] ** 2 - 2) / 4, "b": y["b"] - y["a"].mean(dim=1, keepdim=True)},
        start,
        solver=TorchDEQ("broyden"),
        stop=Tolerance(rtol=0.0, atol=1e-9),
    )
    assert found.converged.all()
    for leaf in found.value.values():
        torch.testing.assert_close(leaf, torch.full_like(leaf, 2**0.5))


def test_what_others_registered_in_torchdeq_is_found() -> None:
    def bisect(func: Callable[[Tensor], Tensor], x0: Tensor, depth: int = 60, **kwargs: Any) -> Any:
        low, high = torch.zeros_like(x0), torch.ones_like(x0)
        for _ in range(depth):
            middle = (low + high) / 2
            above = func(middle) > middle
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return low, [], {}

    torchdeq.solver.register_solver("bisect", bisect)
    start = torch.zeros(2, 1, dtype=torch.float64)
    exact = Tolerance(rtol=1e-14, atol=0.0)
    assert fixed_point(torch.cos, start, solver=TorchDEQ("bisect"), stop=exact).converged.all()
    rough = fixed_point(torch.cos, start, solver=TorchDEQ("bisect", depth=5), stop=exact)
    assert not rough.converged.any()


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda: TorchDEQ("andersen"),
            ValueError,
            "'andersen'.*no such solver, but anderson, broy",
        ),
        (lambda: TorchDEQ("anderson", memory=5), TypeError, "no option 'memory', but lam, m, ret"),
        (lambda: TorchDEQ("anderson", tol=1e-3), TypeError, "no option 'tol'"),
        (lambda: TorchDEQ("simple_fixed_point_iter", m=5), TypeError, "no option 'm', but tau"),
    ],
)
def test_solvers_that_torchdeq_does_not_have(make: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_what_their_solvers_cannot_do() -> None:
    solver, start = TorchDEQ("anderson", m=3), torch.ones(1, 2)
    assert repr(solver) == "TorchDEQ('anderson', m=3)"
    with pytest.raises(ValueError, match="tests the l2 norm, not norm='max'"):
        fixed_point(torch.cos, start, solver=solver, stop=Tolerance(norm="max"))
    w = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(RuntimeError, match="no graph of its path, so BPTT"):
        fixed_point(lambda y: w * y, start, solver=solver, gradient=implicit.BPTT())
    with pytest.raises(ValueError, match="no path, no trace"):
        fixed_point(torch.cos, start, solver=solver, path=(1,))


# -- imports -------------------------------------------------------------------------------------


def test_torchdeq_is_imported_where_it_is_wanted_only() -> None:
    out = in_a_fresh_interpreter(
        "import sys, implicit\n"
        "assert 'torchdeq' not in sys.modules\n"
        "sys.modules['torchdeq'] = None\n"
        "try:\n"
        "    import implicit.interop.torchdeq\n"
        "except ImportError as error:\n"
        "    print(error)"
    )
    assert "needs torchdeq, which is not installed: pip install torchdeq" in out


# -- the page for those who come from torchdeq ---------------------------------------------------


def options_of_torchdeq() -> set[str]:
    """Every public function and class, and every option that one of them takes."""
    parser = argparse.ArgumentParser()
    torchdeq.add_deq_args(parser)
    found = {action.dest for action in parser._actions} - {"help"}
    functions: list[Any] = [torchdeq.solver.get_solver(name) for name in THEIRS]
    functions += [torchdeq.core.DEQBase.__init__, torchdeq.core.DEQBase.forward]
    functions += [torchdeq.core.DEQIndexing.__init__, torchdeq.core.DEQSliced.__init__]
    functions += [torchdeq.apply_norm, torchdeq.mem_gc, torchdeq.fp_correction, torchdeq.jac_reg]
    functions += [kind.apply for kind in torchdeq.norm.base_norm._norm_class.values()]
    for function in functions:
        found |= set(inspect.signature(function).parameters)
    found |= {name for name in dir(torchdeq) if callable(getattr(torchdeq, name))}
    own = {"self", "args", "kwargs", "norm_kwargs", "deq_args", "func", "x0", "model", "module"}
    # Of a solver, where the layer's f_max_iter, b_max_iter and so on end; and what stays itself.
    return found - own - {"max_iter", "tol", "stop_mode", "eps", "f0", "z0", "crit", "in_args"}


def test_the_page_maps_every_option() -> None:
    root = Path(implicit.__file__).parents[1]
    text = (root / "docs" / "coming-from-torchdeq.md").read_text(encoding="utf-8")
    tables = " ".join(line for line in text.splitlines() if line.startswith("|"))
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", tables))))
    assert options_of_torchdeq() - named == set()


def test_every_name_on_the_page_is_one_of_ours() -> None:
    root = Path(implicit.__file__).parents[1]
    text = (root / "docs" / "coming-from-torchdeq.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]*) \| ([^|]*) \|.*$", text, flags=re.MULTILINE)
    called = {name for _, ours in rows for name in re.findall(r"`(\w+)\(", ours)}
    assert len(called) > 15
    elsewhere = {"f", "loss", "range", "backward", "report", "raise_for_status"}
    assert {name for name in called - elsewhere if not hasattr(implicit, name)} == set()
