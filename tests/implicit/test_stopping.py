"""When a solve ends: the test of each sample, its counts, its status, and what the host waits for.

Counts and values are compared with loops written out here, one sample at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import implicit
from implicit import Status, Tolerance, fixed_point
from implicit.interop.torchdeq import TorchDEQ
from implicit.stopping import Norm, batch_norm_of

SOLVERS = [implicit.Naive(), implicit.Naive(0.6), implicit.Anderson(), implicit.Broyden()]


class Counted:
    """A map that counts its evaluations."""

    def __init__(self, f: Any) -> None:
        self.f, self.calls = f, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.f(*args)


def by_hand(x: list[float], norm: Norm) -> float:
    if not x:
        return 0.0
    if norm == "max":
        return max(abs(v) for v in x)
    length = math.sqrt(sum(v * v for v in x))
    return length if norm == "l2" else length / math.sqrt(len(x))


# -- norms ---------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3), min_size=1, max_size=4),
    st.sampled_from(["l2", "rms", "max"]),
)
def test_norms(rows: list[list[float]], norm: Norm) -> None:
    found = batch_norm_of(torch.tensor(rows, dtype=torch.float64), norm)
    for row, value in zip(rows, found.tolist(), strict=True):
        assert value == pytest.approx(by_hand(row, norm), rel=1e-12)


@pytest.mark.parametrize("norm", ["l2", "rms", "max"])
def test_norm_of_nothing_is_zero(norm: Norm) -> None:
    assert batch_norm_of(torch.zeros(3, 0), norm).tolist() == [0, 0, 0]


# -- Tolerance -----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-0.95, 0.95), min_size=1, max_size=4),
    st.floats(0.2, 1.0),
    st.floats(1e-6, 1e-1),
    st.floats(0, 1e-1),
    st.integers(1, 30),
    st.sampled_from(["l2", "rms", "max"]),
)
def test_naive_solve_is_the_loop_over_each_sample(
    rates: list[float], damping: float, rtol: float, atol: float, max_steps: int, norm: Norm
) -> None:
    """Value, counts, status and residuals against a scalar loop with the documented test."""
    a = torch.tensor(rates, dtype=torch.float64)[:, None]
    b = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    solution = implicit.fixed_point(
        lambda y: a * y + b,
        torch.zeros(len(rates), 3, dtype=torch.float64),
        solver=implicit.Naive(damping),
        stop=implicit.Tolerance(rtol=rtol, atol=atol, max_steps=max_steps, norm=norm),
    )
    for i, rate in enumerate(rates):
        y, steps = [0.0, 0.0, 0.0], 0
        while True:
            fy = [rate * v + c for v, c in zip(y, b.tolist(), strict=True)]
            r = [p - q for p, q in zip(fy, y, strict=True)]
            residual, size = by_hand(r, norm), by_hand(fy, norm)
            within = residual <= atol + rtol * size
            if within or steps == max_steps:
                break
            y = [v + damping * w for v, w in zip(y, r, strict=True)]
            steps += 1
        if abs(residual - atol - rtol * size) < 1e-12:
            continue  # a tie that rounding decides
        assert int(solution.steps[i]) == steps
        assert int(solution.evaluations[i]) == steps + 1
        assert bool(solution.converged[i]) == within
        assert solution.value[i].tolist() == pytest.approx(y, rel=1e-9, abs=1e-9)
        assert float(solution.residual[i]) == pytest.approx(residual, rel=1e-6, abs=1e-12)
        assert float(solution.relative_residual[i]) == pytest.approx(
            residual / size, rel=1e-6, abs=1e-12
        )


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("norm", ["l2", "rms", "max"])
def test_reported_residual_is_that_of_the_value(solver: implicit.Solver, norm: Norm) -> None:
    """Of ``f(y) − y`` at the value returned, whatever the solver or its damping made of it."""
    torch.manual_seed(1)
    a = 0.6 * torch.randn(5, 5, dtype=torch.float64) / 5**0.5
    b = torch.randn(4, 5, dtype=torch.float64)
    stop = implicit.Tolerance(rtol=1e-3, atol=1e-5, norm=norm)

    def f(y: Tensor) -> Tensor:
        return torch.tanh(y @ a + b)

    solution = implicit.fixed_point(f, torch.zeros_like(b), solver=solver, stop=stop)
    image = f(solution.value)
    residual = batch_norm_of(image - solution.value, norm)
    size = batch_norm_of(image, norm)
    torch.testing.assert_close(solution.residual, residual)
    torch.testing.assert_close(solution.relative_residual, residual / size)
    assert solution.converged.all()
    assert (residual <= stop.atol + stop.rtol * size).all()


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("max_steps", [1, 2, 5])
def test_evaluations_are_counted_exactly_when_steps_run_out(
    solver: implicit.Solver, max_steps: int
) -> None:
    f = Counted(lambda y: torch.cos(3 * y) + 2)
    with torch.no_grad():
        solution = implicit.fixed_point(
            f,
            torch.zeros(3, 2, dtype=torch.float64),
            solver=solver,
            stop=implicit.Tolerance(rtol=1e-14, atol=0.0, max_steps=max_steps),
        )
    assert f.calls == max_steps + 1
    assert solution.evaluations.tolist() == [max_steps + 1] * 3
    assert solution.steps.tolist() == [max_steps] * 3
    assert not solution.converged.any()


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_starting_at_the_solution_costs_one_evaluation(solver: implicit.Solver) -> None:
    f = Counted(lambda y: 0.5 * y + 1)
    y0 = torch.full((2, 3), 2.0)
    with torch.no_grad():
        solution = implicit.fixed_point(f, y0, solver=solver)
    assert f.calls == 1
    assert solution.evaluations.tolist() == [1, 1]
    assert solution.steps.tolist() == [0, 0]
    assert solution.residual.tolist() == [0, 0]
    assert solution.relative_residual.tolist() == [0, 0]
    assert torch.equal(solution.value, y0)


def test_zero_is_a_solution_that_relative_tolerance_finds() -> None:
    """At ``f(0) = 0`` residual and size vanish both; the relative residual is 0, not NaN."""
    solution = implicit.fixed_point(
        lambda y: 0.5 * y, torch.zeros(1, 2), stop=implicit.Tolerance(rtol=1e-3, atol=0.0)
    )
    assert solution.converged.all()
    assert solution.relative_residual.tolist() == [0]


def test_absolute_tolerance_alone() -> None:
    """``|f(y) − y| = 2⁻ⁿ⁻¹`` on ``y = 2⁻ⁿ``: within 1e-3 first at ``n = 9``."""
    solution = implicit.fixed_point(
        lambda y: 0.5 * y,
        torch.ones(1, 1, dtype=torch.float64),
        solver=implicit.Naive(),
        stop=implicit.Tolerance(rtol=0.0, atol=1e-3),
    )
    assert solution.steps.tolist() == [9]
    assert solution.residual.tolist() == [2.0**-10]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("every", [2, 3, 7])
def test_looking_less_often_changes_only_the_calls(solver: implicit.Solver, every: int) -> None:
    torch.manual_seed(2)
    a = torch.tensor([[0.1], [0.5], [0.8]], dtype=torch.float64)
    b = torch.randn(3, 4, dtype=torch.float64)
    runs = []
    for check_every in (1, every):
        f = Counted(lambda y: torch.tanh(a * y + b))
        with torch.no_grad():
            solution = implicit.fixed_point(
                f,
                torch.zeros_like(b),
                solver=solver,
                stop=implicit.Tolerance(rtol=1e-6, check_every=check_every),
            )
        runs.append((f.calls, solution))
    (calls, often), (more_calls, rarely) = runs
    assert often.converged.all()
    assert calls == int(often.evaluations.max())
    assert calls <= more_calls <= calls + every - 1
    assert torch.equal(often.value, rarely.value)
    for field in ("status", "steps", "evaluations", "residual", "relative_residual"):
        assert torch.equal(getattr(often, field), getattr(rarely, field)), field


# -- Steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_steps_are_exactly_n_evaluations(solver: implicit.Solver, n: int) -> None:
    f = Counted(torch.cos)
    with torch.no_grad():
        solution = implicit.fixed_point(f, torch.ones(2, 3), solver=solver, stop=implicit.Steps(n))
    assert f.calls == n
    assert solution.steps.tolist() == [n, n]
    assert solution.evaluations.tolist() == [n, n]
    assert solution.status.tolist() == [Status.STOPPED] * 2


def test_steps_of_the_plain_iteration_are_powers_of_f() -> None:
    y0 = torch.tensor([[0.3], [2.0]], dtype=torch.float64)
    solution = implicit.fixed_point(torch.cos, y0, solver=implicit.Naive(), stop=implicit.Steps(4))
    third = y0.cos().cos().cos()
    assert torch.equal(solution.value, third.cos())
    # The residual is that of the last iterate which was evaluated, one step before the value.
    torch.testing.assert_close(solution.residual, (third.cos() - third).abs()[:, 0])


def test_steps_test_nothing_even_at_the_solution() -> None:
    f = Counted(lambda y: 0.5 * y + 1)
    with torch.no_grad():
        solution = implicit.fixed_point(f, torch.full((1, 1), 2.0), stop=implicit.Steps(3))
    assert f.calls == 3
    assert solution.status.tolist() == [Status.STOPPED]
    assert not solution.converged.any()


# -- status --------------------------------------------------------------------------------------


def test_status_of_each_sample() -> None:
    """One contraction, one too slow, one growing, one that is NaN from the start."""
    rate = torch.tensor([[0.1], [0.999], [2.0], [torch.nan]], dtype=torch.float64)
    solution = implicit.fixed_point(
        lambda y: rate * y + 1,
        torch.zeros(4, 2, dtype=torch.float64),
        solver=implicit.Naive(),
        stop=implicit.Tolerance(rtol=1e-3, max_steps=10),
    )
    assert solution.status.tolist() == [
        Status.CONVERGED,
        Status.STOPPED,
        Status.DIVERGED,
        Status.DIVERGED,
    ]
    assert solution.converged.tolist() == [True, False, False, False]
    assert solution.steps.tolist()[1:] == [10, 10, 0]
    assert solution.evaluations.tolist()[1:] == [11, 11, 1]


@pytest.mark.parametrize(("steps", "status"), [(4, Status.STOPPED), (5, Status.DIVERGED)])
def test_diverged_means_more_than_ten_times_the_first_residual(steps: int, status: Status) -> None:
    """With ``f(y) = 2y + 1`` the residual doubles: 8 times after 3 steps, 16 after 4."""
    solution = implicit.fixed_point(
        lambda y: 2 * y + 1, torch.zeros(1, 1), solver=implicit.Naive(), stop=implicit.Steps(steps)
    )
    assert solution.status.tolist() == [status]


@pytest.mark.parametrize(("rate", "status"), [(9.9, Status.STOPPED), (10.1, Status.DIVERGED)])
@pytest.mark.parametrize("stop", [implicit.Steps(2), implicit.Tolerance(max_steps=1)], ids=repr)
def test_threshold_of_divergence(stop: Any, rate: float, status: Status) -> None:
    """After one step of ``y ← a y`` the residual is ``a`` times what it was."""
    y0 = torch.ones(1, 2, dtype=torch.float64)
    solution = implicit.fixed_point(lambda y: rate * y, y0, solver=implicit.Naive(), stop=stop)
    assert solution.status.tolist() == [status]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("when", [0, 1, 3])
def test_an_infinite_image_is_never_within_tolerance(
    when: int, bad: float, solver: implicit.Solver
) -> None:
    """``∞ ≤ atol + rtol · ∞`` is true of the numbers and false of the solve."""
    calls = 0

    def f(y: Tensor) -> Tensor:
        nonlocal calls
        image = torch.cos(y) + torch.tensor([[0.0], [2.0]], dtype=torch.float64)
        if calls >= when:
            image[1, 0] = bad
        calls += 1
        return image

    y0 = torch.zeros(2, 3, dtype=torch.float64)
    stop = implicit.Tolerance(rtol=1e-6)
    solution = implicit.fixed_point(f, y0, solver=solver, stop=stop, gradient=implicit.JFB())
    assert solution.status.tolist() == [Status.CONVERGED, Status.DIVERGED]
    retreats = 10 if solver.retreats and when > 0 else 0  # each to the start, and one step on
    assert int(solution.evaluations[1]) == when + 1 + 2 * retreats
    assert torch.isfinite(solution.value).all(), "the last state that is known is kept"
    with pytest.raises(implicit.SolveError, match=r"1 of 2 samples \(1\).*DIVERGED"):
        solution.raise_for_status()


def test_overflow_in_the_very_last_step_is_seen() -> None:
    """``f`` is finite at the last state evaluated only in its residual, not in its value."""
    big = torch.tensor([[2e38], [1.0]])
    solution = implicit.fixed_point(
        lambda y: torch.where(y > 1e38, torch.full_like(y, torch.inf), y),
        big,
        solver=implicit.Naive(),
        stop=implicit.Steps(1),
    )
    assert solution.status.tolist() == [Status.DIVERGED, Status.STOPPED]


class Leap(implicit.Solver):
    """A solver whose proposal is infinite, though all that it was shown is not."""

    def init(self, y: Tensor) -> None:
        return None

    def step(self, memory: None, y: Tensor, fy: Tensor, r: Tensor) -> tuple[Tensor, None]:
        return torch.full_like(fy, torch.inf), None


def test_overflow_of_the_step_itself_is_seen() -> None:
    """The residual is finite at the last state evaluated, one step before the value."""
    solution = implicit.fixed_point(
        torch.cos, torch.zeros(2, 1), solver=Leap(), stop=implicit.Steps(1)
    )
    assert solution.residual.tolist() == [1, 1]
    assert solution.status.tolist() == [Status.DIVERGED] * 2


def test_overflow_of_the_value_in_its_own_dtype_is_seen() -> None:
    """The secant step finds 1e5, which float16 cannot hold: infinite, so not merely stopped."""
    solution = implicit.fixed_point(
        lambda y: 0.99 * y + 1000,
        torch.zeros(1, 1, dtype=torch.float16),
        solver=implicit.Anderson(),
        stop=implicit.Steps(2),
    )
    assert solution.value.isinf().all()
    assert solution.status.tolist() == [Status.DIVERGED]


# -- what the host waits for ---------------------------------------------------------------------


class Synchronisations(TorchDispatchMode):
    """Counts reads of a tensor's numbers by the host, and operations of data-dependent shape."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_steps_never_wait_for_the_device(solver: implicit.Solver) -> None:
    parameter = torch.tensor([0.5], requires_grad=True)
    with Synchronisations() as counter:
        implicit.fixed_point(
            lambda y: torch.cos(parameter * y),
            torch.ones(2, 3),
            solver=solver,
            stop=implicit.Steps(9),
            gradient=implicit.RAG(2),
            path=(1, 9),
            trace=True,
        )
    assert counter.count == 0


@pytest.mark.parametrize("solver", SOLVERS[2:], ids=repr)
@pytest.mark.parametrize("rtol", [0.0, 1e-9])
def test_samples_that_begin_again_are_not_waited_for(solver: implicit.Solver, rtol: float) -> None:
    """Three of the evaluations are of the start again, and the host looks no more often for it."""
    f = Counted(lambda y: torch.cos(y) * (torch.nan if f.calls in (3, 5, 7) else 1))
    with torch.no_grad(), Synchronisations() as counter:
        solution = implicit.fixed_point(
            f,
            torch.ones(2, 3, dtype=torch.float64),
            solver=solver,
            stop=implicit.Tolerance(rtol=rtol, atol=1e-9, max_steps=60),
        )
    assert solution.converged.all()
    looks = int(solution.steps.max()) + 1
    assert f.calls == looks + 3 == int(solution.evaluations.max())
    assert looks <= counter.count <= looks + 1


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("every", [1, 4])
def test_tolerance_waits_once_per_look(solver: implicit.Solver, every: int) -> None:
    f = Counted(torch.cos)
    with torch.no_grad(), Synchronisations() as counter:
        implicit.fixed_point(
            f,
            torch.ones(2, 3, dtype=torch.float64),
            solver=solver,
            stop=implicit.Tolerance(rtol=1e-9, check_every=every, max_steps=60),
        )
    assert f.calls > every
    looks = 1 + (f.calls - 1) // every
    assert looks <= counter.count <= looks + 1, "one per look, and one at y0"


# -- least steps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("least", [1, 5, 60])
@pytest.mark.parametrize("solver", [*SOLVERS, implicit.Best(implicit.Naive())], ids=repr)
def test_no_sample_is_done_before_its_least_steps(
    solver: implicit.Solver, least: int, every: int
) -> None:
    """The first row begins at its fixed point, the others end as they would have, or at last."""
    slope = torch.tensor([[0.5], [0.1], [0.9]], dtype=torch.float64)
    y0 = torch.tensor([[0.0], [1.0], [1.0]], dtype=torch.float64)

    def solve(least: int, **how: Any) -> implicit.Solution:
        stop = Tolerance(0.0, 1e-6, max_steps=200, check_every=every, min_steps=least)
        return fixed_point(
            lambda y, s: s * y.sin(), y0, solver=solver, stop=stop, args=(slope,), **how
        )

    free = solve(0)
    assert free.steps[0] == 0, "or the test shows nothing"
    for held in (solve(least), solve(least, trace=True), solve(least, gradient=implicit.RAG(2))):
        assert held.converged.all()
        assert held.steps.tolist() == [max(least, int(n)) for n in free.steps]
        assert held.value.abs().amax() <= 1e-5, "sin has its fixed point at 0"


def test_least_steps_hold_under_vmap_and_at_the_very_limit() -> None:
    """A step of exactly the tolerance is within it, and may not end the solve too soon either."""

    def steps(y0: Tensor) -> Tensor:
        stop = Tolerance(0.0, 0.5, max_steps=9, min_steps=4)
        return fixed_point(lambda y: y + 0.5, y0, solver=implicit.Naive(), stop=stop).value

    y0 = torch.zeros(3, 2, 1)
    assert torch.equal(steps(y0[0]), y0[0] + 2.0)
    assert torch.equal(torch.vmap(steps)(y0), y0 + 2.0)


def test_before_its_least_steps_nothing_is_tested_but_the_start() -> None:
    calls = []

    def distance(y: Tensor, fy: Tensor) -> Tensor:
        calls.append(y)
        return (fy - y).abs().amax(1)

    stop = Tolerance(rtol=0.0, atol=1.0, min_steps=6, norm=distance)
    with torch.no_grad(), Synchronisations() as counter:
        solution = fixed_point(torch.cos, torch.ones(2, 1), solver=implicit.Naive(), stop=stop)
    assert solution.steps.tolist() == [6, 6]
    assert len(calls) == 2 and counter.count <= 3
    # What is not finite is found then.
    lost = fixed_point(
        lambda y: torch.where(y > 2, torch.nan, 2 * y),
        torch.ones(1, 1),
        solver=implicit.Naive(),
        stop=Tolerance(min_steps=20),
    )
    assert lost.steps.item() == 20 and lost.status.item() == Status.DIVERGED


def test_the_best_iterate_is_one_after_the_least_steps() -> None:
    """The start is within the tolerance by chance; all that follow move by 1."""

    def f(y: Tensor) -> Tensor:
        return y + torch.where(y < 0.003, 0.006, 1.0)

    def solve(least: int) -> implicit.Solution:
        stop = Tolerance(rtol=0.0, atol=0.01, max_steps=10, min_steps=least)
        return fixed_point(f, torch.zeros(2, 1), solver=implicit.Best(implicit.Naive()), stop=stop)

    assert solve(0).converged.all() and not solve(0).value.any()
    held = solve(6)
    assert not held.converged.any()
    assert held.value.flatten().tolist() == pytest.approx([5.006, 5.006])
    assert held.residual.tolist() == pytest.approx([1.0, 1.0])


def test_a_loop_of_its_own_has_no_least_steps() -> None:
    with pytest.raises(ValueError, match=r"TorchDEQ\('anderson'\).*leave out min_steps=3"):
        implicit.fixed_point(
            torch.cos,
            torch.ones(1, 1),
            solver=TorchDEQ("anderson"),
            stop=implicit.Tolerance(min_steps=3),
        )


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rtol": -1e-3}, r"Tolerance\(rtol=-0\.001\).*finite number of at least 0"),
        ({"atol": -1.0}, r"Tolerance\(atol=-1\.0\).*finite number of at least 0"),
        ({"rtol": math.nan}, r"Tolerance\(rtol=nan\).*finite number of at least 0"),
        ({"atol": math.inf}, r"Tolerance\(atol=inf\).*finite number of at least 0"),
        ({"rtol": 0.0, "atol": 0.0}, r"rtol=0, atol=0.*never be met.*Steps\(n\)"),
        ({"max_steps": 0}, r"Tolerance\(max_steps=0\).*must be an integer of at least 1"),
        ({"check_every": 0}, r"Tolerance\(check_every=0\).*at least 1"),
        ({"min_steps": -1}, r"Tolerance\(min_steps=-1\).*at least 0"),
        ({"min_steps": 51}, r"min_steps=51, max_steps=50.*no sample could stop"),
        ({"norm": "l1"}, r"Tolerance\(norm='l1'\).*'l2', 'rms' or 'max'"),
    ],
)
def test_bad_tolerance(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        implicit.Tolerance(**options)


@pytest.mark.parametrize("n", [0, -3])
def test_bad_steps(n: int) -> None:
    with pytest.raises(ValueError, match=rf"Steps\(n={n}\).*must be an integer of at least 1"):
        implicit.Steps(n)


@pytest.mark.parametrize("n", [2.5, "3"])
def test_steps_must_be_an_integer(n: Any) -> None:
    """A fraction of a step is refused where it is written, not deep inside the loop."""
    with pytest.raises((TypeError, ValueError), match=r"Steps\(.*(integer|step)"):
        implicit.Steps(n)


@pytest.mark.parametrize("name", ["max_steps", "check_every", "min_steps"])
def test_tolerance_counts_must_be_integers(name: str) -> None:
    options: dict[str, Any] = {name: 2.5}
    with pytest.raises((TypeError, ValueError), match=name):
        implicit.Tolerance(**options)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(implicit.Tolerance, "tol"), (implicit.Tolerance, "max_iter"), (implicit.Steps, "steps")],
)
def test_unknown_options_are_refused(kind: Any, name: str) -> None:
    with pytest.raises(TypeError, match=name):
        kind(**{name: 1})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_default_tolerance_knows_of_autocast(dtype: torch.dtype) -> None:
    """A float32 state whose map rounds like ``dtype`` settles at its machine epsilon, not below."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        linear.weight.mul_(1.2 / torch.linalg.matrix_norm(linear.weight, 2))
        x = torch.randn(8, 64)
        solution = implicit.fixed_point(lambda y: torch.tanh(linear(y) + x), torch.zeros(8, 64))
    assert solution.value.dtype == torch.float32
    assert solution.converged.all()
    assert bool((solution.relative_residual <= 2.001 * torch.finfo(dtype).eps + 1e-6).all())


def test_a_distance_of_ones_own_decides_and_is_reported() -> None:
    """In its own units, sample by sample, on the state as it was given."""

    def f(y: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"a": 0.5 * y["a"], "b": 0.9 * y["b"]}

    def moved(y: dict[str, Tensor], fy: dict[str, Tensor]) -> Tensor:
        return (fy["a"] - y["a"]).abs().amax(1)  # whatever b does

    y0 = {"a": torch.tensor([[1.0], [1024.0]]), "b": torch.ones(2, 3)}
    stop = implicit.Tolerance(rtol=0.0, atol=0.01, norm=moved)
    solution = implicit.fixed_point(f, y0, solver=implicit.Naive(), stop=stop)
    # ½ⁿ⁺¹ and 1024 · ½ⁿ⁺¹ fall below a hundredth at n = 6 and n = 16.
    assert solution.steps.tolist() == [6, 16]
    assert solution.converged.all()
    torch.testing.assert_close(solution.residual, torch.tensor([0.5**7, 1024 * 0.5**17]))
    r = torch.cat([0.5 * solution.value["a"], 0.1 * solution.value["b"]], dim=1)
    fy = torch.cat([0.5 * solution.value["a"], 0.9 * solution.value["b"]], dim=1)
    torch.testing.assert_close(solution.relative_residual, r.norm(dim=1) / fy.norm(dim=1))


def test_samples_leave_by_a_distance_of_ones_own() -> None:
    rates = torch.linspace(0.1, 0.9, 16)[:, None]
    sizes = []

    def f(y: Tensor, rate: Tensor) -> Tensor:
        sizes.append(len(y))
        return rate * y

    def distance(y: Tensor, fy: Tensor) -> Tensor:
        return (fy - y).abs().amax(1)

    for norm in (distance, "max"):
        sizes.clear()
        stop = implicit.Tolerance(rtol=0.0, atol=1e-3, max_steps=200, norm=norm)
        found = implicit.fixed_point(
            f, torch.ones(16, 2), solver=implicit.Naive(), stop=stop, args=(rates,)
        )
        with_all = sizes.pop()  # of the gradient
        assert with_all == 16 and sizes[-1] < 16 and found.converged.all()
        if norm is distance:
            wanted = found
    assert torch.equal(found.value, wanted.value) and torch.equal(found.steps, wanted.steps)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: implicit.Tolerance(norm=lambda y, fy: y[:, 0]), "Give rtol=0"),
        (lambda: implicit.Tolerance(norm="l3"), "or a function"),
        (
            lambda: implicit.Implicit(
                stop=implicit.Tolerance(rtol=0.0, norm=lambda y, fy: y[:, 0])
            ),
            "the backward solve is for a gradient",
        ),
    ],
)
def test_distances_that_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_distance_is_one_number_for_each_sample() -> None:
    stop = implicit.Tolerance(rtol=0.0, atol=1.0, norm=lambda y, fy: fy - y)
    with pytest.raises(ValueError, match=r"shape \(2, 3\): it must be one number for each sample"):
        implicit.fixed_point(torch.cos, torch.zeros(2, 3), stop=stop)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("slope", [1.5, 10.0])
def test_a_sample_whose_length_overflows_has_not_converged(
    dtype: torch.dtype, slope: float
) -> None:
    """An infinite ``‖f(y)‖`` allows any residual; the residual itself may still be finite."""
    y0 = torch.ones(2, 3, dtype=dtype)
    stop = Tolerance(max_steps=2000)
    with torch.no_grad():
        for solver in (implicit.Naive(), implicit.Naive(0.5)):
            found = fixed_point(lambda y: slope * y + 1, y0, solver=solver, stop=stop)
            assert (found.status == Status.DIVERGED).all()
            assert not (found.relative_residual < 1e-3).any()
        best = fixed_point(
            lambda y: slope * y + 1, y0, solver=implicit.Best(implicit.Naive()), stop=stop
        )
    torch.testing.assert_close(best.value, y0)


@pytest.mark.parametrize("norm", ["l2", "rms", "max"])
def test_a_residual_whose_square_vanishes_does_not(norm: Any) -> None:
    """In float32 the square of 1e-25 is zero."""
    y0 = torch.zeros(1, 3)
    found = fixed_point(
        lambda y: 1e-25 * torch.cos(y / 1e-25),
        y0,
        solver=implicit.Naive(),
        stop=Tolerance(rtol=1e-4, atol=0.0, norm=norm),
    )
    right = (found.value / 1e-25 - 0.739085).abs().max() < 1e-3
    assert right or not found.converged.any()
    assert (found.residual > 0).all()
