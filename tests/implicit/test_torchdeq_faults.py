"""The faults that torchdeq 0.1.0 was measured to have, one test for each, and what we do there.

Under ``# torchdeq`` a test shows the fault in the release that is installed; under ``# ours`` it
asserts what this library does with the same problem, so a library with the fault fails it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
import torchdeq
import torchdeq.solver
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import implicit
from benchmarks import mixed_batches, overhead
from benchmarks.counts import Counted, live_bytes
from implicit import Anderson, Best, Broyden, Naive, Steps, Tolerance, fixed_point

theirs = torchdeq.solver.get_solver

DOTTIE = 0.7390851332151607  # = cos of itself


def column(number: float) -> Tensor:
    return torch.tensor([[number]], dtype=torch.float64)


def symmetric(dim: int, low: float, high: float, scale: float = 1.0) -> Callable[[Tensor], Tensor]:
    """``y ↦ y A + scale`` with eigenvalues of ``A = Aᵀ`` evenly between ``low`` and ``high``."""
    noise = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = torch.linalg.qr(noise)[0]
    a = q * torch.linspace(low, high, dim, dtype=torch.float64) @ q.mT
    return lambda y: y @ a + scale


def absolute(atol: float, max_steps: int = 1000) -> Tolerance:
    return Tolerance(rtol=0.0, atol=atol, max_steps=max_steps)


# -- solvers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 2])
def test_anderson_returns_its_start_after_one_or_two_evaluations(most: int) -> None:
    start = column(2.0)
    # torchdeq
    assert torch.equal(theirs("anderson")(torch.cos, start, max_iter=most)[0], start)
    # ours
    found = fixed_point(torch.cos, start, solver=Anderson(), stop=Tolerance(max_steps=most))
    assert found.evaluations.item() == most + 1
    assert found.residual.item() < (torch.cos(start) - start).abs().item()


def test_a_start_at_the_solution_costs_three_evaluations() -> None:
    # torchdeq
    theirs("anderson")(f := Counted(torch.cos), column(DOTTIE))
    assert f.calls == 3
    # ours
    for solver in (Naive(), Anderson(), Broyden()):
        with torch.no_grad():  # where there is no gradient to tie to the answer
            found = fixed_point(f := Counted(torch.cos), column(DOTTIE), solver=solver)
        assert found.converged.all() and f.calls == 1


def test_anderson_with_a_memory_of_one_raises() -> None:
    # torchdeq
    with pytest.raises(IndexError):
        theirs("anderson")(torch.cos, column(2.0), m=1)
    # ours
    found = fixed_point(torch.cos, column(2.0), solver=Anderson(memory=1), stop=absolute(1e-9))
    torch.testing.assert_close(found.value, column(DOTTIE))


def test_the_ridge_is_absolute_and_keeps_a_slow_map_from_its_solution() -> None:
    f, start = symmetric(50, -0.99, 0.99), torch.zeros(1, 50, dtype=torch.float64)
    # torchdeq
    lowest = theirs("anderson")(f, start, max_iter=1000, tol=1e-6)[2]["abs_lowest"]
    assert lowest > 1e-4
    # ours
    found = fixed_point(f, start, solver=Anderson(), stop=absolute(1e-6))
    assert found.converged.all() and found.evaluations.item() < 100


def test_the_units_of_the_state_decide_whether_anderson_converges() -> None:
    start, scales = torch.zeros(1, 16, dtype=torch.float64), (1e-4, 1.0, 1e4)
    maps = [symmetric(16, 0.0, 0.9, scale) for scale in scales]
    # torchdeq
    lowest = [
        theirs("anderson")(f, start, max_iter=100, tol=1e-6, stop_mode="rel")[2]["rel_lowest"]
        for f in maps
    ]
    assert [bool(residual < 1e-6) for residual in lowest] == [False, False, True]
    # ours
    stop = Tolerance(rtol=1e-6, atol=0.0)
    found = [fixed_point(f, start, solver=Anderson(memory=6), stop=stop) for f in maps]
    assert all(solution.converged.all() for solution in found)
    assert len({int(solution.steps) for solution in found}) == 1


def test_limited_broyden_overwrites_its_history_in_a_circle_and_diverges() -> None:
    f, start = symmetric(16, -0.9, 0.9), torch.zeros(1, 16, dtype=torch.float64)
    # torchdeq
    trace = theirs("broyden")(f, start, max_iter=100, tol=1e-6, LBFGS_thres=6)[2]["abs_trace"]
    assert trace[0, 10] < 0.1 and trace[0, -1] > 1e20
    # ours
    found = fixed_point(f, start, solver=Broyden(memory=6), stop=absolute(1e-6, 100))
    assert found.converged.all()


def test_broyden_takes_a_batch_of_one_for_stagnation() -> None:
    """The spread over the batch, which is none, stands where that over time should."""
    f, start = symmetric(55, -0.99, 0.99), torch.zeros(1, 55, dtype=torch.float64)
    # torchdeq, whose trace is rounded differently on other processors
    trace = theirs("broyden")(f, start, max_iter=300, tol=1e-13)[2]["abs_trace"][0]
    # Half of a residual after more than 30 steps: what is below three times that ends the solve.
    tol = float(trace[40]) / 2
    figures = theirs("broyden")(f, start, max_iter=300, tol=tol)[2]
    assert figures["abs_lowest"] > tol and figures["nstep"] < 300
    assert trace.min() < tol / 10  # a few steps more, and it would have got there
    # ours
    found = fixed_point(f, start, solver=Broyden(), stop=absolute(tol, 300))
    assert found.converged.all()


def test_a_nan_on_the_way_poisons_the_best_state() -> None:
    def fails_at(call: int) -> Callable[[Tensor], Tensor]:
        calls = iter(range(1, 100))
        return lambda y: y / 2 + 1 if next(calls) < call else y * torch.nan

    # torchdeq
    start = torch.zeros(1, 1, dtype=torch.float64)
    answer, _, figures = theirs("fixed_point_iter")(fails_at(6), start, max_iter=20, tol=1e-9)
    assert answer.isnan() and figures["abs_lowest"].isnan()
    # ours
    stop = absolute(1e-9, 20)
    found = fixed_point(fails_at(6), start, solver=Best(Naive()), stop=stop)
    torch.testing.assert_close(found.value, column(2 - 2**-3))
    assert found.residual.item() == 2**-4


def test_fewer_states_come_back_than_were_asked_for() -> None:
    def f(y: Tensor) -> Tensor:
        return y / 10 + 1

    # torchdeq
    for name in ("anderson", "broyden", "fixed_point_iter"):
        assert len(theirs(name)(f, column(0.0), max_iter=20, indexing=[5, 20])[1]) == 1
    deq = torchdeq.get_deq(core="indexing", indexing=[5], f_max_iter=20)
    assert len(deq(f, column(0.0))[0]) == 1
    # ours
    for solver in (Naive(), Anderson(), Broyden()):
        found = fixed_point(f, column(0.0), solver=solver, path=(5, 20))
        assert len(found.path) == 2 and torch.equal(found.path[-1], found.value)


def test_damping_shrinks_the_residual_that_is_reported() -> None:
    def f(y: Tensor) -> Tensor:
        return y / 2

    # torchdeq
    figures = theirs("fixed_point_iter")(f, column(2.0), tau=0.01, tol=0.05)[2]
    assert figures["nstep"].item() == 1  # and the distance to the solution is still 1.99
    torch.testing.assert_close(figures["abs_lowest"], torch.tensor([0.01], dtype=torch.float64))
    # ours
    found = fixed_point(f, column(2.0), solver=Naive(0.01), stop=absolute(0.05, 10))
    assert not found.converged.any()
    torch.testing.assert_close(found.residual, found.value[:, 0] / 2)


# -- gradients -----------------------------------------------------------------------------------


def parameter() -> Tensor:
    """``w`` of ``y ← w y + 1``, whose solution is 2 and has the derivative 4; JFB gives 2."""
    return torch.tensor(0.5, dtype=torch.float64, requires_grad=True)


def layer(**options: Any) -> Any:
    chosen = {"f_solver": "broyden", "b_solver": "broyden", "f_tol": 1e-12, "b_tol": 1e-6}
    return torchdeq.get_deq(**{**chosen, **options})


TIGHT = Tolerance(rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("scale", [1.0, 1e-7])
def test_a_small_loss_silently_gets_the_gradient_of_jfb(scale: float) -> None:
    # torchdeq
    w = parameter()
    loss = scale * layer(ift=True)(lambda y: w * y + 1, column(0.0))[0][-1].sum()
    expected = 4.0 if scale == 1 else 2.0
    torch.testing.assert_close(torch.autograd.grad(loss, w)[0].item() / scale, expected)
    # ours
    loss = scale * fixed_point(lambda y: w * y + 1, column(0.0), stop=TIGHT).value.sum()
    torch.testing.assert_close(torch.autograd.grad(loss, w)[0].item() / scale, 4.0)


def test_double_backward_is_silently_wrong() -> None:
    def second(solve: Callable[[Tensor], Tensor]) -> float:
        w = parameter()
        (first,) = torch.autograd.grad(solve(w).sum(), w, create_graph=True)
        return float(torch.autograd.grad(first, w)[0])

    exact = second(lambda w: 1 / (1 - w * w))  # which solves y = w² y + 1
    # torchdeq
    deq = layer(ift=True, b_tol=1e-12)
    assert second(lambda w: deq(lambda y: w * w * y + 1, column(0.0))[0][-1]) < exact / 2
    # ours
    ours = second(lambda w: fixed_point(lambda y: w * w * y + 1, column(0.0), stop=TIGHT).value)
    assert ours == pytest.approx(exact, rel=1e-6)


def test_the_hook_recurses_without_end_when_a_layer_is_used_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class TooDeep(Exception):
        pass

    depth = 0

    def watched(*args: Any, **kwargs: Any) -> Any:
        """A backward solver that lets nobody go deep enough to crash."""
        nonlocal depth
        if depth == 5:
            raise TooDeep
        depth += 1
        try:
            return theirs("fixed_point_iter")(*args, **kwargs)
        finally:
            depth -= 1

    monkeypatch.setitem(torchdeq.solver._solvers, "watched", watched)
    w = parameter()
    # torchdeq
    deq = layer(hook_ift=True, b_solver="watched")
    first, second = (deq(lambda y, b=b: w * y + b, column(0.0))[0][-1] for b in (1, 2))
    with pytest.raises(TooDeep):
        torch.autograd.grad((first * second).sum(), w)
    # ours
    ours = implicit.FixedPoint(lambda y, b: w * y + b, stop=TIGHT)
    first, second = (ours(column(0.0), b).value for b in (1, 2))
    (slope,) = torch.autograd.grad((first * second).sum(), w)
    assert slope.item() == pytest.approx(32.0)  # d/dw 2 / (1 − w)²


def test_the_backward_pass_raises_under_autocast() -> None:
    linear = torch.nn.Linear(4, 4)
    torch.nn.init.eye_(linear.weight).data.mul_(0.5)

    def f(y: Tensor) -> Tensor:
        return torch.tanh(linear(y))

    # torchdeq
    with torch.autocast("cpu", torch.bfloat16):
        value = torchdeq.get_deq(ift=True)(f, torch.zeros(2, 4))[0][-1]
    with pytest.raises(RuntimeError, match="same dtype|not require grad"):  # torch's age decides
        value.float().sum().backward()
    # ours
    exact, half = (_bias_gradient(f, linear, enabled) for enabled in (False, True))
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0.0)


def _bias_gradient(f: Callable[[Tensor], Tensor], linear: Any, autocast: bool) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = fixed_point(f, torch.zeros(2, 4)).value
    (gradient,) = torch.autograd.grad(value.float().sum(), linear.bias)
    return gradient


def test_anderson_raises_in_bfloat16() -> None:
    start = torch.ones(2, 3, dtype=torch.bfloat16)
    # torchdeq
    with pytest.raises(RuntimeError, match="not implemented for 'BFloat16'"):
        theirs("anderson")(torch.cos, start)
    # ours
    found = fixed_point(torch.cos, start, solver=Anderson())
    assert found.converged.all() and found.value.dtype == torch.bfloat16
    torch.testing.assert_close(
        found.value.double(), torch.full((2, 3), DOTTIE).double(), rtol=0.02, atol=0
    )


def test_the_power_method_finds_nothing_in_a_rotation() -> None:
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    # torchdeq
    assert torchdeq.power_method(y @ turn, y)[1].item() == pytest.approx(0.0, abs=1e-12)
    # ours
    assert implicit.spectral_radius(lambda y: y @ turn, y).item() == pytest.approx(1.0)


# -- what a step costs ---------------------------------------------------------------------------

PAIRS = [
    pytest.param(Naive(), "fixed_point_iter", id="naive"),
    pytest.param(Anderson(), "anderson", id="anderson"),
    pytest.param(Broyden(), "broyden", id="broyden"),
]


class Waits(TorchDispatchMode):
    """Counts how often the host asks for a number of a tensor."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ == "_local_scalar_dense"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def waits() -> Iterator[Waits]:
    with torch.no_grad(), Waits() as counter:
        yield counter


@pytest.mark.parametrize(("solver", "name"), PAIRS)
def test_the_host_waits_at_every_iteration(solver: implicit.Solver, name: str) -> None:
    f, start = symmetric(50, -0.999, 0.999), torch.zeros(1, 50, dtype=torch.float64)
    # torchdeq
    with waits() as counter:
        theirs(name)(f, start, max_iter=20, tol=0.0)
    assert counter.count >= 18
    # ours
    with waits() as counter:
        fixed_point(f, start, solver=solver, stop=Steps(20))
    assert counter.count == 0
    with waits() as counter:
        stop = Tolerance(rtol=1e-12, atol=0.0, max_steps=20, check_every=10)
        found = fixed_point(f, start, solver=solver, stop=stop)
    assert counter.count <= 3 and not found.converged.any()


@pytest.mark.parametrize("name", ["Naive", "Anderson", "Broyden"])
def test_an_iteration_takes_many_operations_and_copies_of_the_state(name: str) -> None:
    """Theirs at a memory of 6 too, where the theory asks for 2m + 3 copies."""
    f, start = overhead.cheap_map(4, 4096)
    solver, peer = overhead.SOLVERS[name]
    contestants = (peer, overhead.ours(solver, False), overhead.ours(solver, True))
    with torch.no_grad():
        operations = [overhead.operations_per_evaluation(solve, f, start) for solve in contestants]
        copies = [live_bytes(lambda s=s: s(f, start, 20)) / start.nbytes for s in contestants]
    # torchdeq
    assert operations[0] > {"Naive": 40, "Anderson": 85, "Broyden": 140}[name]
    allowed = 4 if name == "Naive" else 2 * overhead.MEMORY + 5
    assert copies[0] > allowed + 2
    # ours
    assert max(operations[1:]) < 0.75 * operations[0]
    assert max(copies[1:]) < allowed


def test_the_batch_runs_until_its_slowest_sample() -> None:
    batch = mixed_batches.batches(64, 8)[1]  # one hard sample among 64
    ratio = {
        name: mixed_batches.rows(batch, name, mixed_batches.SOLVERS[name]).ratio
        for name in ("torchdeq fixed_point_iter", "Naive")
    }
    # torchdeq
    assert ratio["torchdeq fixed_point_iter"] > 5
    # ours
    assert ratio["Naive"] < 1.15


# -- options -------------------------------------------------------------------------------------


def test_a_misspelt_option_is_accepted() -> None:
    # torchdeq
    torchdeq.get_deq(f_sover="anderson", f_max_itre=3)
    theirs("anderson")(torch.cos, torch.ones(1, 1), memory=3)
    # ours
    for call in (fixed_point, implicit.FixedPoint, Anderson, Broyden, Naive, Tolerance):
        with pytest.raises(TypeError, match="max_itre"):
            call(max_itre=3)


def test_the_options_of_the_caller_are_changed() -> None:
    # torchdeq
    options: dict[str, Any] = {"f_solver": "anderson"}
    torchdeq.get_deq(options, ift=True)
    assert options == {"f_solver": "anderson", "ift": True}
    # ours
    chosen: Any = Anderson(memory=5)
    options = {"solver": chosen, "stop": Tolerance(rtol=1e-4)}
    ours = implicit.FixedPoint(torch.cos, **options, gradient=implicit.JFB())
    ours(torch.ones(1, 1))
    assert options == {"solver": Anderson(memory=5), "stop": Tolerance(rtol=1e-4)}
    with pytest.raises(FrozenInstanceError):
        chosen.memory = 7


# -- what the page for those who come from torchdeq tells besides --------------------------------


def test_broyden_returns_the_state_before_the_one_asked_for() -> None:
    exact = {n: theirs("broyden")(torch.cos, column(0.0), n, 0.0)[0] for n in (3, 4)}
    # torchdeq
    (state,) = theirs("broyden")(torch.cos, column(0.0), 9, 0.0, indexing=[4])[1]
    assert torch.equal(state, exact[3]) and not torch.equal(state, exact[4])
    # ours
    stops = [absolute(1e-15, most) for most in (4, 9)]
    four, nine = (
        fixed_point(torch.cos, column(0.0), solver=Broyden(), stop=stop, path=(4,))
        for stop in stops
    )
    assert torch.equal(nine.path[0], four.value) and not torch.equal(nine.value, four.value)


def test_the_default_norm_bounds_nothing() -> None:
    def norm_of(linear: torch.nn.Linear) -> float:
        return torch.linalg.matrix_norm(linear.weight.detach(), 2).item()

    layers = [torch.nn.Linear(4, 4) for _ in range(3)]
    for linear in layers:
        torch.nn.init.constant_(linear.weight, 5.0)  # of norm 20
    # torchdeq
    torchdeq.apply_norm(layers[0])
    torchdeq.reset_norm(layers[0])
    assert norm_of(layers[0]) == pytest.approx(20.0)
    # ours, and the options that make torchdeq's the same
    implicit.contract(layers[1], bound=0.9)
    assert norm_of(layers[1]) == pytest.approx(0.9)
    torchdeq.apply_norm(
        layers[2], "spectral_norm", learn_scale=False, target_norm=0.9, clip=True, clip_value=1.0
    )
    torchdeq.reset_norm(layers[2])
    assert norm_of(layers[2]) == pytest.approx(0.9)


def test_the_mask_of_dropout_is_made_on_the_cpu() -> None:
    elsewhere = torch.ones(2, 3, device="meta")
    # torchdeq
    with pytest.raises(RuntimeError, match="device"):
        torchdeq.VariationalDropout(0.5)(elsewhere)
    # ours
    implicit.renew(dropout := implicit.SolveDropout(0.5))
    assert dropout(elsewhere).device == elsewhere.device
