"""What drives every solver, for a number of steps or to a tolerance.

Evaluations of ``f``, tests, counts, freezing and leaving are done here and in
`implicit.to_tolerance`, once, so that a solver is only its step (`implicit.solvers.base.Solver`).
Everything works on the flat ``(B, D)`` view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from implicit.autocast import full_precision
from implicit.problem import Problem
from implicit.samples import BestSoFar, Outcome
from implicit.solution import classify
from implicit.solvers.base import Solver, WholeSolver
from implicit.stopping import Stop, Tolerance, batch_norm_of, relative_to, residual_in
from implicit.to_tolerance import ToTolerance
from implicit.transforms import spread

Visit = Callable[[int, Tensor, Tensor], None]
"""Called after step ``n`` with ``(n, state before the step, state after it)``."""


def solve(
    problem: Problem,
    y0: Tensor,
    solver: Solver,
    stop: Stop,
    *,
    path: Sequence[int] = (),
    trace: bool = False,
    memory: Any = None,
    keep_memory: bool = False,
    finest: float = 0.0,
) -> Outcome:
    """Iterate ``solver`` on ``problem`` from ``y0 (B, D)`` until ``stop`` says so.

    Args:
        path: positions whose states are kept.
        trace: keep the relative residual of every evaluation.
        memory: exported by an earlier solve, to begin with.
        keep_memory: export the memory at the end.
        finest: machine epsilon of a state that is narrower than its working dtype, else 0.
    """
    if isinstance(solver, WholeSolver):
        return _solve_whole(problem, y0, solver, stop)
    if isinstance(stop, Tolerance):
        run = ToTolerance(problem, y0, solver, stop, finest)
        run.run(y0, path, trace, memory)
        return run.outcome(path, keep_memory)
    states: list[Tensor] = []

    def visit(n: int, before: Tensor, after: Tensor) -> None:
        if n in path:
            states.append(after)

    outcome = iterate(
        problem, y0, solver, stop.n, visit=visit, trace=trace, memory=memory, keep=keep_memory
    )
    if solver.keeps_best and stop.n in path:
        states[-1] = outcome.value
    outcome.path = states
    return outcome


def iterate(
    problem: Problem,
    y0: Tensor,
    solver: Solver,
    n: int,
    *,
    perturb: Callable[[Tensor], Tensor] | None = None,
    visit: Visit | None = None,
    trace: bool = False,
    memory: Any = None,
    keep: bool = False,
) -> Outcome:
    """Exactly ``n`` steps; nothing here waits for the device.

    Args:
        perturb: moves the iterate before each step (refinement-aware perturbation).
        visit: is shown the path, step by step.
    """
    y, traced, precision = y0, [], full_precision(y0.device)
    first = residual = relative = y0
    state: Any = None
    best: BestSoFar | None = None
    for step in range(1, n + 1):
        before = y if perturb is None else perturb(y)
        fy = problem(before)
        if step == 1:
            before = spread(before, fy)
            state = solver.begin(before, problem, memory)
        r = fy - before
        if trace or solver.keeps_best or step in (1, n):
            residual = batch_norm_of(r.detach(), "l2")
            relative = relative_to(batch_norm_of(fy.detach(), "l2"), residual)
            first = residual if step == 1 else first
        if trace:
            traced.append(relative)
        if solver.keeps_best:
            best = BestSoFar.of(best, before, residual, relative)
        with precision:
            y, state = solver.step(state, before, fy, r)
        del fy, r  # while f is evaluated, only the memory and the iterate need be held
        if visit is not None:
            visit(step, before, y)
        del before
    nothing = torch.zeros_like(residual, dtype=torch.bool)
    # The value lies one step beyond the last residual: an overflow there must not pass unseen.
    finite = torch.isfinite(y.detach()).all(dim=1)
    status = classify(nothing, torch.where(finite, residual, torch.inf), first)
    if best is not None:
        y, residual, relative = best.y, best.residual, best.relative
    count = torch.full_like(residual, n, dtype=torch.int64)
    evaluations = count + (0 if problem.beyond is None else problem.beyond)
    exported = solver.export(state) if keep else None
    return Outcome(y, status, count, evaluations, residual, relative, traced, memory=exported)


def _solve_whole(problem: Problem, y0: Tensor, solver: WholeSolver, stop: Stop) -> Outcome:
    """A solver that runs its own loop; its answer is judged like any other."""
    if isinstance(stop, Tolerance) and stop.min_steps:
        raise ValueError(
            f"{solver} runs a loop of its own, without a least number of steps: leave out "
            f"min_steps={stop.min_steps}."
        )
    calls = 0
    first: Tensor | None = None
    norm = stop.norm if isinstance(stop, Tolerance) else "l2"

    def counted(y: Tensor) -> Tensor:
        nonlocal calls, first
        calls += 1
        fy = problem(y)
        if first is None:
            first = residual_in(norm, y.detach(), fy.detach(), (fy - y).detach())
        return fy

    y = solver.run(counted, y0, stop)
    fy = counted(y)
    r = (fy - y).detach()
    residual = residual_in(norm, y.detach(), fy.detach(), r)
    size = batch_norm_of(fy.detach(), "l2" if callable(norm) else norm)
    converged = torch.zeros_like(residual, dtype=torch.bool)
    if isinstance(stop, Tolerance):
        allowed = stop.atol + stop.rtol_for(0.0) * size
        converged = (residual <= allowed) & (allowed < torch.inf)
    assert first is not None  # it was counted at least once, here
    count = torch.full_like(residual, calls, dtype=torch.int64)
    status = classify(converged, residual, first)
    relative = relative_to(size, batch_norm_of(r, "l2") if callable(norm) else residual)
    return Outcome(y, status, count - 1, count, residual, relative)
