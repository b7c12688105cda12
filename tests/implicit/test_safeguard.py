"""Samples whose residual is not finite on the way: they begin again, with shorter steps.

The problems are ones where a quasi-Newton step leads to where the map overflows or is not defined.
Each is also solved without the safeguard, which must fail, so that it is that which solves it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import implicit
from benchmarks.counts import operations_of
from implicit import Anderson, Best, Broyden, Naive, Status, Steps, Tolerance, fixed_point

CLOSE = Tolerance(rtol=0.0, atol=1e-6, max_steps=960)
TIGHT = Tolerance(rtol=1e-10, atol=0.0, max_steps=200)
SOLVERS = [Anderson(), Anderson(memory=2), Anderson(mixing=0.8), Broyden(), Broyden(memory=2)]
SHORTER, MOST = 0.3, 10


class Counted:
    def __init__(self, f: Callable[..., Tensor]) -> None:
        self.f, self.seen = f, list[Tensor]()

    def __call__(self, y: Tensor, *args: Any) -> Tensor:
        self.seen.append(y.detach().clone())
        return self.f(y, *args)


@pytest.fixture
def unguarded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Takes the safeguard away."""

    def take() -> None:
        for kind in (Anderson, Broyden):
            monkeypatch.setattr(kind, "retreats", False)

    return take


# -- problems that overflow ----------------------------------------------------------------------


def robertson(h: float) -> Callable[[Tensor], Tensor]:
    """An implicit Euler step of Robertson's stiff kinetics from (1, 0, 0)."""
    before = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)

    def f(y: Tensor) -> Tensor:
        a, b, c = y.unbind(1)
        slow, back, fast = 0.04 * a, 1e4 * b * c, 3e7 * b * b
        return before + h * torch.stack([back - slow, slow - back - fast, fast], dim=1)

    return f


def banded(y: Tensor) -> Tensor:
    """Broyden's banded function (Moré, Garbow and Hillstrom, problem 31)."""
    below, above, n = 5, 1, y.shape[1]
    z = torch.nn.functional.pad(y * (1 + y), (below, above))
    near = sum(z[:, below + k : below + k + n] for k in range(-below, above + 1) if k)
    return y * (2 + 5 * y * y) + 1 - near


def all_of(value: float, n: int) -> Tensor:
    return torch.full((1, n), value, dtype=torch.float64)


FIRST = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
OVERFLOWING: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, implicit.Solver]] = {
    "robertson-1": (robertson(1.0), FIRST, Anderson()),
    "robertson-10": (robertson(10.0), FIRST, Anderson()),
    "robertson-1-zeros": (robertson(1.0), all_of(0, 3), Anderson()),
    "robertson-10-zeros": (robertson(10.0), all_of(0, 3), Anderson()),
    "robertson-0.001-ones": (robertson(1e-3), all_of(1, 3), Anderson()),
    "robertson-0.01-ones": (robertson(1e-2), all_of(1, 3), Anderson()),
    "robertson-0.1-ones": (robertson(0.1), all_of(1, 3), Anderson()),
    "robertson-1-ones": (robertson(1.0), all_of(1, 3), Anderson()),
    "banded-0": (lambda y: y - banded(y), all_of(0, 100), Anderson()),
    "banded-1": (lambda y: y - banded(y), all_of(1, 100), Anderson()),
    "banded-away": (lambda y: y + banded(y), all_of(-1, 100), Anderson()),
    "banded-0-broyden": (lambda y: y - banded(y), all_of(0, 100), Broyden()),
    "banded-slow-broyden": (lambda y: y - 0.2 * banded(y), all_of(0, 100), Broyden()),
}


@pytest.mark.parametrize("name", OVERFLOWING)
def test_what_overflowed_is_solved(name: str, unguarded: Callable[[], None]) -> None:
    map_, y0, solver = OVERFLOWING[name]
    f = Counted(map_)
    with torch.no_grad():
        solution = fixed_point(f, y0, solver=solver, stop=CLOSE)
        assert solution.status.tolist() == [Status.CONVERGED]
        assert float((map_(solution.value) - solution.value).norm()) <= 1e-6
        assert len(f.seen) == int(solution.evaluations) <= 1000
        if name.startswith("robertson"):  # the three sum up to one
            assert float(solution.value.sum()) == pytest.approx(1, abs=1e-5)
        unguarded()
        without = fixed_point(map_, y0, solver=solver, stop=CLOSE)
    assert without.status.tolist() == [Status.DIVERGED]


# -- an edge, beyond which there is nothing ------------------------------------------------------


def edge(y: Tensor, k: Tensor, beyond: float = math.nan) -> Tensor:
    """``k √(2 − y)``, with a number of choice beyond 2."""
    return torch.where(y > 2, beyond, k * (2 - y).clamp_min(0).sqrt())


def edge_solution(k: Tensor) -> Tensor:
    """``y² + k² y − 2 k² = 0``."""
    return (-k * k + (k**4 + 8 * k * k).sqrt()) / 2


K = torch.tensor([[0.2], [3.0], [0.5], [3.5], [0.1]], dtype=torch.float64)
"""Those of 3 and 3.5 leave the domain in their first step."""


@pytest.mark.parametrize("rtol", [0.0, 1e-12])
@pytest.mark.parametrize("beyond", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("solver", [*SOLVERS, Best(Anderson())], ids=repr)
def test_steps_beyond_an_edge(
    solver: implicit.Solver, beyond: float, rtol: float, unguarded: Callable[[], None]
) -> None:
    stop = Tolerance(rtol=rtol, atol=1e-11, max_steps=100)
    y0 = torch.zeros_like(K)
    with torch.no_grad():
        solution = fixed_point(lambda y: edge(y, K, beyond), y0, solver=solver, stop=stop)
        unguarded()
        without = fixed_point(lambda y: edge(y, K, beyond), y0, solver=solver, stop=stop)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, edge_solution(K), rtol=1e-9, atol=0)
    assert without.converged.tolist() == [True, False, True, False, True]


def literal_secant(k: float, mixing: float, y0: float = 0.0) -> list[float]:
    """Where `Anderson` of one pair evaluates ``k √(2 − y)``: the secant rule, from the start again.

    The plain step goes ``β r`` far; the extrapolation along the last pair adds what is its own.
    """
    beta, seen, y, last = mixing, [y0], y0, None
    while len(seen) < 12:
        r = k * math.sqrt(2 - y) - y
        plain = y + beta * r
        following = plain
        if last is not None:
            gamma = r * (r - last[1]) / (r - last[1]) ** 2
            following = plain - gamma * (plain - last[0])
        last = (plain, r)
        y = following
        seen.append(y)
        if y > 2:  # lost: the start is evaluated again
            beta, y, last = SHORTER * beta, y0, None
            seen.append(y)
    return seen


@pytest.mark.parametrize("mixing", [1.0, 0.7])
@pytest.mark.parametrize("k", [2.5, 3.0, 6.0])
def test_anderson_begins_again_as_it_is_told(k: float, mixing: float) -> None:
    f = Counted(lambda y: edge(y, torch.tensor(k, dtype=torch.float64)))
    with torch.no_grad():
        fixed_point(
            f,
            torch.zeros(1, 1, dtype=torch.float64),
            solver=Anderson(memory=1, mixing=mixing, ridge=0.0),
            stop=Tolerance(rtol=1e-30, atol=0.0, max_steps=30),
        )
    seen, wanted = [float(y) for y in f.seen], literal_secant(k, mixing)
    assert max(wanted) > 2, "it must be lost at least once"
    # Where the secant rule has settled, its differences are of rounding errors alone.
    steps = (abs(a - b) for a, b in itertools.pairwise(wanted))
    settled = next((i for i, step in enumerate(steps) if step < 1e-6), 9)
    assert seen[: settled + 1] == pytest.approx(wanted[: settled + 1], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("leaves", [False, True])
def test_neighbours_never_know(solver: implicit.Solver, leaves: bool) -> None:
    """Not one bit, nor one evaluation, whether those beside them begin again or not."""
    tame = K.clone()
    tame[[1, 3]] = torch.tensor([[0.3], [0.4]], dtype=torch.float64)
    others = [0, 2, 4]
    with torch.no_grad():
        wild, usual = (
            fixed_point(edge, torch.zeros_like(k), solver=solver, stop=TIGHT, args=(k,))
            if leaves
            else fixed_point(lambda y: edge(y, k), torch.zeros_like(k), solver=solver, stop=TIGHT)  # noqa: B023
            for k in (K, tame)
        )
        alone = fixed_point(
            lambda y: edge(y, K[1:2]), torch.zeros_like(K[:1]), solver=solver, stop=TIGHT
        )
    assert wild.converged.all() and usual.converged.all()
    for field in ("value", "steps", "residual", "relative_residual"):
        assert torch.equal(getattr(wild, field)[others], getattr(usual, field)[others]), field
    if not leaves:  # which evaluates a few to know whether they may
        assert torch.equal(wild.evaluations[others], usual.evaluations[others])
        assert wild.evaluations[1:2].tolist() == alone.evaluations.tolist()
    assert wild.steps[1:2].tolist() == alone.steps.tolist()
    torch.testing.assert_close(wild.value[1:2], alone.value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=repr)
def test_samples_begin_again_after_others_have_left(solver: implicit.Solver) -> None:
    """The start is that of the sample, whichever row it is in by now."""
    k = torch.linspace(0.05, 0.5, 16, dtype=torch.float64)[:, None].clone()
    k[11] = 3.0
    y0 = torch.linspace(-0.5, 0.5, 16, dtype=torch.float64)[:, None]
    calls: list[int] = []

    def f(y: Tensor, k: Tensor, wild: Tensor) -> Tensor:
        calls.append(len(y))
        image = edge(y, k)
        late = len(calls) == 9  # once, of a sample that has long been the last
        return torch.where(wild & late, math.nan, image)

    wild = (torch.arange(16) == 11)[:, None]
    with torch.no_grad():
        found = fixed_point(f, y0, solver=solver, stop=TIGHT, args=(k, wild))
    assert min(calls) < 16, "nobody has left"
    assert found.converged.all()
    torch.testing.assert_close(found.value, edge_solution(k), rtol=1e-8, atol=0)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("exponent", [-30, 7, 100])
def test_the_scale_does_not_matter(solver: implicit.Solver, exponent: int) -> None:
    """A power of two does not round: not one bit changes, and not one evaluation."""
    scale = 2.0**exponent
    y0 = torch.zeros_like(K)
    with torch.no_grad():
        usual = fixed_point(lambda y: edge(y, K), y0, solver=solver, stop=TIGHT)
        scaled = fixed_point(lambda y: scale * edge(y / scale, K), y0, solver=solver, stop=TIGHT)
    assert usual.converged.all()
    assert torch.equal(scaled.value, scale * usual.value)
    assert torch.equal(scaled.evaluations, usual.evaluations)


# -- what cannot be helped -----------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_nothing_finite_but_the_start(solver: implicit.Solver) -> None:
    """Ten times back, each an evaluation of the start and one of what follows."""
    good = torch.tensor([[True], [False], [False]])

    def map_(y: Tensor) -> Tensor:
        image = torch.cos(y) + 0.1
        image = torch.where(good | (y == 0), image, math.nan)
        image[2] = math.nan  # whatever the state
        return image

    f, y0 = Counted(map_), torch.zeros(3, 2, dtype=torch.float64)
    with torch.no_grad():
        found = fixed_point(f, y0, solver=solver, stop=TIGHT)
        usual = fixed_point(lambda y: torch.cos(y) + 0.1, y0, solver=solver, stop=TIGHT)
    assert found.status.tolist() == [Status.CONVERGED, Status.DIVERGED, Status.DIVERGED]
    assert found.evaluations[1:].tolist() == [2 + 2 * MOST, 1]
    assert found.steps[1:].tolist() == [1 + MOST, 0]
    assert torch.isfinite(found.value).all()
    assert torch.equal(found.value[0], usual.value[0])
    assert found.evaluations[0] == usual.evaluations[0]
    assert len(f.seen) == max(int(found.steps.max()) + 1, int(found.steps[0]) + 1) + MOST


def test_ten_times_are_counted_through_what_leaves() -> None:
    k = torch.linspace(0.05, 0.5, 16, dtype=torch.float64)[:, None]
    bad = (torch.arange(16) == 11)[:, None]
    sizes: list[int] = []

    def f(y: Tensor, k: Tensor, bad: Tensor) -> Tensor:
        sizes.append(len(y))
        # Not always, for others leave between; nor of the two by which it is known that they may.
        lost = bad & (y != 0) & (len(sizes) % 3 < 2 and len(y) != 2)
        return torch.where(lost, math.nan, torch.where(bad, y + 1, edge(y, k)))

    with torch.no_grad():
        found = fixed_point(f, torch.zeros_like(k), solver=Anderson(), stop=TIGHT, args=(k, bad))
    assert min(sizes) == 1, "nobody has left"
    # Two more, as it was evaluated with two others to know whether they may.
    assert found.evaluations[11].item() - found.steps[11].item() - 1 == MOST + 2
    assert found.converged.tolist() == [i != 11 for i in range(16)]


@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=repr)
def test_how_near_a_sample_had_been_is_forgotten(solver: Any) -> None:
    """A residual that is large beside the last ones takes nothing back and restarts nothing."""
    y = torch.zeros(1, 3, dtype=torch.float64)
    memory, fy = solver.init(y), y + 1
    with torch.no_grad():
        for size in (1.0, 1e-2):
            y, memory = solver.step(memory, y, y + size, torch.full_like(y, size))
        y = torch.zeros_like(y)
        solver.retreat(memory, torch.ones(1, 1, dtype=torch.bool), y, fy, fy - y)
        assert memory.history.limit.isinf().all()
        following, memory = solver.step(memory, y, fy, fy - y)
        torch.testing.assert_close(following, torch.full_like(y, SHORTER), rtol=1e-15, atol=0)
        if isinstance(solver, Broyden):  # a pair of length zero would leave it no solution
            assert not memory.history.scale.any()
            assert torch.equal(memory.history.system, memory.blank)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_the_start_must_be_finite(solver: implicit.Solver) -> None:
    for bad in (math.nan, math.inf):
        f = Counted(lambda y: y * bad)  # noqa: B023
        with torch.no_grad():
            found = fixed_point(f, torch.ones(2, 3), solver=solver, stop=TIGHT)
        assert found.status.tolist() == [Status.DIVERGED] * 2
        assert found.evaluations.tolist() == [1, 1] and len(f.seen) == 1


@pytest.mark.parametrize("solver", [Naive(), Broyden(line_search=True)], ids=repr)
def test_solvers_that_do_not_begin_again(solver: implicit.Solver) -> None:
    f = Counted(lambda y: edge(y, K))
    with torch.no_grad():
        found = fixed_point(f, torch.zeros_like(K), solver=solver, stop=TIGHT)
    assert not solver.retreats
    assert found.evaluations[1].item() == 2
    assert found.status[[1, 3]].tolist() == [Status.DIVERGED] * 2
    with pytest.raises(NotImplementedError, match="cannot begin again"):
        Naive().retreat(None, K > 0, K, K, K)


@pytest.mark.parametrize(("late", "status"), [(2, Status.DIVERGED), (3, Status.CONVERGED)])
@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=repr)
def test_only_a_look_helps(solver: implicit.Solver, late: int, status: Status) -> None:
    """With ``check_every=2`` the host sees the first and the third evaluation, not the second."""
    calls: list[int] = []

    def f(y: Tensor) -> Tensor:
        calls.append(1)
        image = torch.cos(y)
        if len(calls) == late:
            image[0] = math.nan
        return image

    stop = Tolerance(rtol=1e-9, check_every=2)
    with torch.no_grad():
        found = fixed_point(f, torch.zeros(2, 2, dtype=torch.float64), solver=solver, stop=stop)
    assert found.status.tolist() == [status, Status.CONVERGED]
    if status == Status.DIVERGED:
        assert found.evaluations[0].item() == late
    else:
        torch.testing.assert_close(found.value[0], found.value[1], rtol=1e-7, atol=0)


@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=repr)
def test_fixed_steps_are_as_many_as_they_are(solver: implicit.Solver) -> None:
    f = Counted(lambda y: edge(y, K))
    with torch.no_grad():
        found = fixed_point(f, torch.zeros_like(K), solver=solver, stop=Steps(7))
    assert len(f.seen) == 7
    assert found.status[[1, 3]].tolist() == [Status.DIVERGED] * 2


def test_under_vmap_nobody_looks() -> None:
    def solve(k: Tensor) -> Tensor:
        y0 = torch.zeros(1, 1, dtype=torch.float64)
        return fixed_point(lambda y: edge(y, k), y0, solver=Anderson(), stop=TIGHT).value

    with torch.no_grad():
        found = torch.func.vmap(solve)(K)[:, 0]
    others = [0, 2, 4]
    torch.testing.assert_close(found[others], edge_solution(K)[others], rtol=1e-8, atol=0)
    assert (found[[1, 3]] > 2).all(), "where they were lost"


# -- what it costs, and what others see ----------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("rtol", [0.0, 1e-6])
@pytest.mark.parametrize("solver", [Anderson(4), Broyden(4), Best(Anderson(4))], ids=repr)
def test_where_nothing_is_lost_it_costs_no_operation(
    solver: implicit.Solver, rtol: float, every: int, unguarded: Callable[[], None]
) -> None:
    k, stop = K[[0, 2, 4]], Tolerance(rtol=rtol, atol=1e-9, check_every=every)

    @torch.no_grad()
    def solve() -> None:
        solution = fixed_point(edge, torch.zeros_like(k), solver=solver, stop=stop, args=(k,))
        assert solution.converged.all()

    with_it = operations_of(solve)
    unguarded()
    assert with_it == operations_of(solve)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_the_path_of_a_lost_sample_is_not_differentiated(solver: implicit.Solver) -> None:
    """It ends as diverged, and the derivatives of the others are theirs."""
    k = K.clone().requires_grad_()
    found = fixed_point(
        lambda y: edge(y, k),
        torch.zeros_like(K),
        solver=solver,
        stop=TIGHT,
        gradient=implicit.BPTT(),
    )
    assert found.status.tolist() == [0, Status.DIVERGED, 0, Status.DIVERGED, 0]
    assert found.evaluations[1].item() == 2
    others = [0, 2, 4]
    (slope,) = torch.autograd.grad(found.value[others].sum(), k)
    torch.testing.assert_close(slope[others], slope_of(K)[others], rtol=1e-6, atol=0)


def slope_of(k: Tensor) -> Tensor:
    """``dy*/dk``, of the formula for ``y*``."""
    return -k + (2 * k**3 + 8 * k) / (2 * (k**4 + 8 * k * k).sqrt())


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_sample_that_was_saved_has_the_gradient_of_its_solution(solver: implicit.Solver) -> None:
    k = K.clone().requires_grad_()
    tight = Tolerance(rtol=1e-10, atol=0.0, max_steps=200)
    found = fixed_point(
        lambda y: edge(y, k),
        torch.zeros_like(K),
        solver=solver,
        stop=tight,
        gradient=implicit.Implicit(stop=tight),
    )
    (slope,) = torch.autograd.grad(found.value.sum(), k)
    torch.testing.assert_close(slope, slope_of(K), rtol=1e-7, atol=0)


@pytest.mark.parametrize("solver", [Anderson(4), Anderson(4, mixing=0.8), Broyden(4)], ids=repr)
def test_pairs_that_are_handed_on_are_of_the_problem(solver: Any) -> None:
    """On ``f(y) = A y + b`` the residual changes by ``(A − I) Δy``, whatever the steps were."""
    matrix = torch.tensor([[0.5, 0.2, 0], [-0.3, 0.4, 0.1], [0, 0.2, -3.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, 2.0, 4.0], [0.1, 0.2, 0.3]], dtype=torch.float64)

    def f(y: Tensor, shift: float = 0.0) -> Tensor:
        inside = y[:, 2:].abs() <= 3.1
        return torch.where(inside, y @ matrix.T + b + shift, math.nan)

    y0, eye = torch.zeros_like(b), torch.eye(3, dtype=torch.float64)
    with torch.no_grad():
        cold = fixed_point(f, y0, solver=solver, stop=TIGHT, keep_memory=True)
        short = Tolerance(rtol=1e-10, atol=0.0, max_steps=5)
        memory = fixed_point(f, y0, solver=solver, stop=short, keep_memory=True).memory
        moved = fixed_point(
            lambda y: f(y, 0.01), cold.value, solver=solver, stop=TIGHT, memory=cold.memory
        )
    assert cold.converged.all() and moved.converged.all()
    assert cold.evaluations[0] > cold.steps[0] + 1 and cold.evaluations[1] == cold.steps[1] + 1
    points = memory.others
    if isinstance(solver, Anderson):
        points = points - solver.mixing * memory.residuals
    assert (points.abs().amax(dim=(1, 2)) > 0.1).all()
    torch.testing.assert_close(memory.residuals, points @ (matrix - eye).T, rtol=1e-8, atol=1e-9)
    if isinstance(solver, Anderson):  # Broyden's few pairs are no help here to any sample
        assert moved.evaluations.max() < cold.evaluations.max()


@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=repr)
def test_best_hands_it_on(solver: implicit.Solver) -> None:
    y0 = torch.zeros_like(K)
    with torch.no_grad():
        bare, best = (
            fixed_point(lambda y: edge(y, K), y0, solver=s, stop=TIGHT, trace=True)
            for s in (solver, Best(solver))
        )
    assert torch.equal(bare.value, best.value) and torch.equal(bare.evaluations, best.evaluations)
    torch.testing.assert_close(bare.trace, best.trace, rtol=0, atol=0, equal_nan=True)


def test_a_history_that_overflowed_does_not_outlast_its_sample() -> None:
    """Its products are infinite; of what begins again not one number may be."""
    solver = Anderson(memory=3)
    y = torch.zeros(2, 4, dtype=torch.float64)
    memory = solver.init(y)
    with torch.no_grad():
        for size in (1.0, 1e100, 1e200, 1e300):
            fy = y + torch.tensor([[size], [0.5]]) * torch.arange(1.0, 5.0, dtype=torch.float64)
            y, memory = solver.step(memory, y, fy, fy - y)
        assert not torch.isfinite(memory.history.system[0]).all()
        kept = memory.history.rows[1].clone()
        lost, y = torch.tensor([[True], [False]]), torch.zeros_like(y)
        fy = y + 1
        solver.retreat(memory, lost, y, fy, fy - y)
        assert torch.equal(memory.history.rows[1], kept)
        assert torch.isfinite(memory.history.system).all()
        following, memory = solver.step(memory, y, fy, fy - y)
    torch.testing.assert_close(following[0], torch.full_like(y[0], SHORTER), rtol=1e-15, atol=0)
