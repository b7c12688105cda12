"""The one loop that drives every solver.

Evaluations of ``f``, tests, counts, freezing and leaving are done here, once, so that a solver is
only its step (`implicit.solvers.base.Solver`).  Everything works on the flat ``(B, D)`` view.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from implicit.autocast import full_precision
from implicit.problem import Problem
from implicit.samples import BestSoFar, Samples
from implicit.solution import classify
from implicit.solvers.base import Solver, WholeSolver, take
from implicit.state import StateError
from implicit.stopping import (
    Stop,
    Tolerance,
    batch_norm_of,
    least_of,
    relative_to,
    residual_in,
)
from implicit.transforms import is_wrapped, on_host

Visit = Callable[[int, Tensor, Tensor], None]
"""Called after step ``n`` with ``(n, state before the step, state after it)``."""

STAYING = 15 / 16
"""Samples leave once no more than this share of the batch is still being solved."""
MOST_RETREATS = 10
"""How often one sample begins again where its residual is not finite."""


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
    path: list[Tensor] = field(default_factory=list)
    memory: Any = None


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
        run = _Run(problem, y0, solver, stop, finest)
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
            before = _spread(before, fy)
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


class _Run:
    """A solve to a tolerance: each sample stops by itself, and leaves the batch if it may."""

    def __init__(
        self, problem: Problem, y0: Tensor, solver: Solver, stop: Tolerance, finest: float
    ) -> None:
        self.problem, self.solver, self.stop, self.finest = problem, solver, stop, finest
        self.precision = full_precision(y0.device)
        self.rtol = stop.rtol_for(finest)
        self.start = y0
        self.atol = torch.full((), stop.atol, dtype=y0.dtype, device=y0.device)
        self.left: list[Samples] = []
        self.may_leave = problem.part is not None
        self.all_active = True  # as far as the host knows
        self.going = [True] * len(y0)  # which samples were not done, at the last look
        self.still = len(y0)  # how many
        self.retreats = [0] * len(y0)
        self.went_back = False  # whether a sample did at this step
        # Not where a path is differentiated, which would lead through where the map is not finite.
        self.may_retreat = solver.retreats and not torch.is_grad_enabled()
        # Without a part relative to it, what is allowed does not become infinite with the image.
        self.may_be_infinite = self.may_retreat and not (self.rtol or callable(stop.norm))
        self.passed: Tensor | None = None
        self.can_look = True  # whether the host can read results at all (not under vmap)
        self.traced: list[Tensor] = []
        self.states: dict[int, Tensor] = {}

    def run(self, y0: Tensor, path: Sequence[int], trace: bool, memory: Any) -> None:
        """Step until every sample is done."""
        last, y = self.stop.max_steps, y0
        # Sizes that no test needs are computed where a sample stops.
        self.sized = bool(self.rtol) or trace or self.solver.keeps_best or self.finest > self.rtol
        for n in range(last + 1):
            fy = self.problem(y)
            if n == 0:
                y = _spread(y, fy)
                self.samples = Samples.all(y, self.solver.begin(y, self.problem, memory))
            self.samples.y = y
            r = fy - y
            fy, r = self._test(n, fy, r, trace)
            y = self.samples.y
            if n == last or self.still == 0:
                return
            few = self.still <= STAYING * len(y)
            if few and self.may_leave and not self.went_back:
                y, fy, r = self._leave(fy, r)
            samples = self.samples
            with self.precision:
                proposed, samples.memory = self.solver.step(samples.memory, y, fy, r)
            del fy, r
            y = proposed if self.all_active else torch.where(_rows(samples.active), proposed, y)
            samples.y = y
            if n + 1 in path:
                self.states[n + 1] = self._whole(lambda s: s.y)

    def _test(self, n: int, fy: Tensor, r: Tensor, trace: bool) -> tuple[Tensor, Tensor]:
        """Test every sample; the images and residuals to go on from, which `_retreat` changes."""
        samples, norm, going_on = self.samples, self.stop.norm, (fy, r)
        y = samples.y
        if fy.requires_grad:
            y, fy, r = y.detach(), fy.detach(), r.detach()
        now = residual_in(norm, y, fy, r)
        size = self._size(fy) if self.sized else now
        # Not added where it is zero: zero times an infinite size is not.
        allowed = torch.add(self.atol, size, alpha=self.rtol) if self.rtol else self.atol
        if n == 0:
            samples.first = now
            self._check_reachable(now, allowed, size)
        if trace or self.solver.keeps_best:
            relative = self._relative(size, now, r)
            if trace:
                self._record(torch.where(samples.active, relative, torch.nan))
            if self.solver.keeps_best:
                samples.best = BestSoFar.of(samples.best, samples.y, now, relative)
        last = n == self.stop.max_steps
        seen: Tensor | None = None
        if self.can_look and n % self.stop.check_every == 0 and not last:
            margin = now - allowed  # whose sign is exact
            seen = on_host(margin if self.all_active else self._of_active(margin))
            self.can_look = seen is not None
        if seen is None:
            going = now > allowed  # False for NaN too: nothing finite comes after it
        else:
            self.went_back = False
            if not self.may_be_infinite and float(seen.min()) > 0:  # False for NaN too
                return going_on
            before, lost = self.still, self._look(n, seen)
            back = self._flags(lost) if lost else None
            if back is not None:
                going_on = self._retreat(back)
            if self.still == before:
                return going_on
            going = margin > 0 if back is None else (margin > 0) | back
        if last:
            stopping = samples.active
        else:
            stopping = ~going if self.all_active else samples.active & ~going
        # The squares of a residual may vanish where it does not, and those of an image overflow.
        now = now if callable(norm) else torch.maximum(now, least_of(r, norm))
        converged = stopping & (now <= allowed) & (allowed < torch.inf)
        size = size if self.sized else self._size(fy)
        samples.stop(stopping, n, converged, now, self._relative(size, now, r))
        if self.problem.beyond is not None:
            beyond = torch.where(stopping, self.problem.beyond, 0)
            samples.evaluations = samples.evaluations + beyond
        self.all_active = False
        return going_on

    def _of_active(self, margin: Tensor) -> Tensor:
        """The margins of active samples.

        Others have zero, or one where the host knows them all, as no test is without a look.
        """
        if self.passed is None:
            self.passed = torch.full_like(self.atol, float(self.stop.check_every == 1))
        return torch.where(self.samples.active, margin, self.passed)

    def _look(self, n: int, margin: Tensor) -> list[int]:
        """Learn from ``margin (B,)`` on the host who goes on; those who must begin again for it."""
        margins = margin.tolist()
        if self.may_be_infinite and float(margin.min()) > 0 and max(margins) < math.inf:
            return []
        lost = [
            i
            for i, m in enumerate(margins)
            if not math.isfinite(m) and (m != math.inf or self.may_be_infinite)
        ]
        if n == 0:  # there is nowhere else to begin
            for i in lost:
                self.retreats[i] = MOST_RETREATS
        lost = [i for i in lost if self.may_retreat and self.retreats[i] < MOST_RETREATS]
        self.going = [was and m > 0 for was, m in zip(self.going, margins, strict=True)]
        for i in lost:
            self.going[i] = True
            self.retreats[i] += 1
        self.still = sum(self.going)
        return lost

    def _flags(self, rows: list[int]) -> Tensor:
        """``(B,)``: True in some rows; nothing waits for the device."""
        flags = torch.zeros(len(self.going), dtype=torch.bool)
        flags[rows] = True
        return flags.to(self.samples.row.device, non_blocking=True)

    def _retreat(self, back: Tensor) -> tuple[Tensor, Tensor]:
        """Take samples ``back (B,)`` to their start; all images and residuals to go on from.

        The map is evaluated there again, so that no image need be kept from the start on.
        """
        samples, rows = self.samples, _rows(back)
        start = self.start.index_select(0, samples.row) if self.left else self.start
        y = samples.y = torch.where(rows, start, samples.y)
        fy = self.problem(y)
        self.problem.count(back.to(torch.int64))
        # A map that has changed meanwhile may not be finite even there: then the sample stays.
        fy = torch.where(torch.isfinite(fy).all(dim=1, keepdim=True), fy, y)
        r = fy - y
        self.went_back = True
        with self.precision:
            self.solver.retreat(samples.memory, rows, y, fy, r)
        return fy, r

    def _size(self, fy: Tensor) -> Tensor:
        """What a relative tolerance is relative to, ``(B,)``."""
        return batch_norm_of(fy, "l2" if callable(self.stop.norm) else self.stop.norm)

    def _relative(self, size: Tensor, now: Tensor, r: Tensor) -> Tensor:
        """Relative residuals: in the norm of the stop, or ‖·‖₂ where that is a mere distance."""
        return relative_to(size, batch_norm_of(r, "l2") if callable(self.stop.norm) else now)

    def _leave(self, fy: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those that are done leave the batch; iterates, images and residuals of the others."""
        samples = self.samples
        stay, gone = (
            torch.tensor([i for i, goes in enumerate(self.going) if goes is going]).to(fy.device)
            for going in (True, False)
        )
        if not self.left:
            # It costs evaluations of a few samples to know; let them be those with longest to go.
            length = torch.linalg.vector_norm(r, dim=1).index_fill(0, gone, -1)
            hardest = length.topk(min(3, len(length))).indices
            self.may_leave = self.problem.parts_well(hardest, samples.y, fy)
            if not self.may_leave:
                return samples.y, fy, r
        self.left.append(take(samples, gone))
        self.samples = take(samples, stay)
        self.problem.narrow(stay)
        self.all_active = True
        self.retreats = [self.retreats[i] for i, goes in enumerate(self.going) if goes]
        self.going = [True] * self.still
        return self.samples.y, fy.index_select(0, stay), r.index_select(0, stay)

    def outcome(self, path: Sequence[int], keep_memory: bool) -> Outcome:
        """The samples in their order again."""
        whole = self._whole
        y, converged = whole(lambda s: s.y), whole(lambda s: s.converged)
        residual, relative = whole(lambda s: s.residual), whole(lambda s: s.relative)
        status = classify(converged, residual, whole(lambda s: s.first))
        if self.solver.keeps_best:
            y = torch.where(_rows(converged), y, whole(lambda s: _best(s).y))
            residual = torch.where(converged, residual, whole(lambda s: _best(s).residual))
            relative = torch.where(converged, relative, whole(lambda s: _best(s).relative))
        return Outcome(
            y,
            status,
            whole(lambda s: s.steps),
            whole(lambda s: s.evaluations),
            residual,
            relative,
            self.traced,
            [y if n == self.stop.max_steps else self.states.get(n, y) for n in path],
            self._exported() if keep_memory else None,
        )

    def _exported(self) -> Any:
        """The solver's memory of all samples, each as it was when the sample left."""
        parts = [self.solver.export(samples.memory) for samples in (*self.left, self.samples)]
        if parts[0] is None or len(parts) == 1:
            return parts[-1]
        return type(parts[0])(
            *(
                self._ordered([getattr(part, entry.name) for part in parts])
                for entry in fields(parts[0])
            )
        )

    def _whole(self, of: Callable[[Samples], Tensor]) -> Tensor:
        if not self.left:
            return of(self.samples)
        return self._ordered([of(samples) for samples in (*self.left, self.samples)])

    def _ordered(self, parts: list[Tensor]) -> Tensor:
        rows = torch.cat([samples.row for samples in (*self.left, self.samples)])
        return torch.cat(parts).index_select(0, rows.argsort())

    def _record(self, relative: Tensor) -> None:
        if self.left:
            gone = [torch.full_like(samples.relative, torch.nan) for samples in self.left]
            relative = self._ordered([*gone, relative])
        self.traced.append(relative)

    def _check_reachable(self, now: Tensor, allowed: Tensor, size: Tensor) -> None:
        """Refuse a tolerance that rounding alone exceeds."""
        if self.rtol >= self.finest or not self.can_look or callable(self.stop.norm):
            return
        beyond_reach = on_host((allowed < self.finest * size) & (now > 0))
        if beyond_reach is not None and bool(beyond_reach.all()):
            raise StateError(
                f"{self.stop} cannot be met in the dtype of this state: rounding alone leaves a "
                f"relative residual of about {self.finest:.2g}. Use rtol={self.finest:.2g} or "
                "more, or a state of a wider dtype (f may still compute in the narrow one)."
            )


def _solve_whole(problem: Problem, y0: Tensor, solver: WholeSolver, stop: Stop) -> Outcome:
    """A solver that runs its own loop; its answer is judged like any other."""
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


def _spread(y: Tensor, fy: Tensor) -> Tensor:
    """``y``, mapped over what ``fy`` is mapped over where `torch.func.vmap` is at work.

    A start that is the same for all mapped problems must become one per problem before it is
    written to; outside of transforms this is ``y`` itself.
    """
    return y + torch.zeros_like(fy) if is_wrapped(fy) else y


def _rows(flags: Tensor) -> Tensor:
    return flags.unsqueeze(1)


def _best(samples: Samples) -> BestSoFar:
    assert samples.best is not None
    return samples.best
