"""The one loop that drives every solver.

Evaluations of ``f``, tests, counts and per-sample freezing are done here, once, so that a solver
is only its step (`implicit.solvers.base.Solver`).  Everything works on the flat ``(B, D)`` view.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from implicit.solution import classify
from implicit.solvers.base import Solver
from implicit.stopping import Norm, Steps, Stop, Tolerance, batch_norm_of

Map = Callable[[Tensor], Tensor]
Visit = Callable[[int, Tensor, Tensor], None]
"""Called after step ``n`` with ``(n, state before the step, state after it)``."""


@dataclass
class Outcome:
    """A solve in the flat view; see `implicit.Solution` for the meaning of the fields."""

    value: Tensor
    status: Tensor
    steps: Tensor
    evaluations: Tensor
    residual: Tensor
    relative_residual: Tensor
    trace: list[Tensor] = field(default_factory=list)


def solve(
    f: Map,
    y0: Tensor,
    solver: Solver,
    stop: Stop,
    *,
    perturb: Map | None = None,
    visit: Visit | None = None,
    trace: bool = False,
) -> Outcome:
    """Iterate ``solver`` on ``f`` from ``y0 (B, D)`` until ``stop`` says so.

    Args:
        perturb: moves the iterate before each step (refinement-aware perturbation).
        visit: is shown the path, step by step.
        trace: keep the relative residual of every evaluation.
    """
    if isinstance(stop, Steps):
        return _solve_steps(f, y0, solver, stop, perturb, visit, trace)
    return _solve_tolerance(f, y0, solver, stop, perturb, visit, trace)


def _solve_steps(
    f: Map,
    y0: Tensor,
    solver: Solver,
    stop: Steps,
    perturb: Map | None,
    visit: Visit | None,
    trace: bool,
) -> Outcome:
    """Exactly ``n`` steps; nothing here waits for the device."""
    y, memory, traced = y0, solver.init(y0), []
    first = residual = relative = y0
    for n in range(1, stop.n + 1):
        before = y if perturb is None else perturb(y)
        fy = f(before)
        if trace or n in (1, stop.n):
            residual, relative = _residuals(before, fy, "l2")
            first = residual if n == 1 else first
        if trace:
            traced.append(relative)
        y, memory = solver.step(memory, before, fy)
        if visit is not None:
            visit(n, before, y)
    count = torch.full_like(residual, stop.n, dtype=torch.int64)
    nothing = torch.zeros_like(residual, dtype=torch.bool)
    # The value lies one step beyond the last residual: an overflow there must not pass unseen.
    finite = torch.isfinite(y.detach()).all(dim=1)
    status = classify(nothing, torch.where(finite, residual, torch.inf), first)
    return Outcome(y, status, count, count.clone(), residual, relative, traced)


def _solve_tolerance(
    f: Map,
    y0: Tensor,
    solver: Solver,
    stop: Tolerance,
    perturb: Map | None,
    visit: Visit | None,
    trace: bool,
) -> Outcome:
    """Until every sample is done; a sample that is done does not move any more."""
    y, memory, traced = y0, solver.init(y0), []
    active = torch.ones(len(y0), dtype=torch.bool, device=y0.device)
    converged = torch.zeros_like(active)
    steps = torch.zeros_like(active, dtype=torch.int64)
    evaluations = torch.zeros_like(steps)
    first = residual = relative = y0.new_full((len(y0),), torch.nan)
    for n in range(stop.max_steps + 1):
        before = y if perturb is None or n == stop.max_steps else perturb(y)
        before = y if before is y else torch.where(active[:, None], before, y)
        fy = f(before)
        now, now_relative = _residuals(before, fy, stop.norm)
        allowed = stop.atol + stop.rtol * batch_norm_of(fy.detach(), stop.norm)
        within = torch.isfinite(now) & (now <= allowed)
        first = now if n == 0 else first
        residual = torch.where(active, now, residual)
        relative = torch.where(active, now_relative, relative)
        evaluations += active
        if trace:
            traced.append(torch.where(active, now_relative, torch.nan))
        converged = converged | (active & within)
        y = before
        active = active & ~within & torch.isfinite(now)
        checked = n % stop.check_every == 0
        if n == stop.max_steps or (checked and not bool(active.any())):
            break
        proposed, memory = solver.step(memory, y, fy)
        y = torch.where(active[:, None], proposed, y)
        steps += active
        if visit is not None:
            visit(n + 1, before, y)
    status = classify(converged, residual, first)
    return Outcome(y, status, steps, evaluations, residual, relative, traced)


def _residuals(y: Tensor, fy: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """``‖f(y) − y‖``, and the same over ``‖f(y)‖`` (0 where both vanish)."""
    residual = batch_norm_of((fy - y).detach(), norm)
    size = batch_norm_of(fy.detach(), norm)
    relative = residual / size
    return residual, torch.where(residual == 0, torch.zeros_like(relative), relative)
