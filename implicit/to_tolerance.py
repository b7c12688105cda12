"""A solve to a tolerance: each sample stops by itself, and leaves the batch if it may.

Every evaluation of ``f`` is followed by a test of every sample on the device.  Who goes on is
learnt on the host only at a look (`Tolerance.check_every`), and there it is decided who leaves the
batch and who begins again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from implicit.autocast import full_precision
from implicit.problem import Problem
from implicit.roll_call import RollCall
from implicit.samples import BestSoFar, Outcome, Samples, in_order
from implicit.solution import classify
from implicit.solvers.base import Solver, take
from implicit.state import StateError
from implicit.stopping import Tolerance, batch_norm_of, least_of, relative_to, residual_in
from implicit.transforms import on_host, spread

STAYING = 15 / 16
"""Samples leave once no more than this share of the batch is still being solved."""


class ToTolerance:
    """One solve, of which `run` is called once and then `outcome`.

    Args:
        finest: machine epsilon of a state that is narrower than its working dtype, else 0.
    """

    def __init__(
        self, problem: Problem, y0: Tensor, solver: Solver, stop: Tolerance, finest: float
    ) -> None:
        self.problem, self.solver, self.stop, self.finest = problem, solver, stop, finest
        self.precision = full_precision(y0.device)
        self.rtol = stop.rtol_for(finest)
        self.start = y0
        self.atol = torch.full((), stop.atol, dtype=y0.dtype, device=y0.device)
        # Not where a path is differentiated, which would lead through where the map is not finite.
        may_retreat = solver.retreats and not torch.is_grad_enabled()
        # Without a part relative to it, what is allowed does not become infinite with the image.
        may_be_infinite = may_retreat and not (self.rtol or callable(stop.norm))
        self.roll = RollCall(len(y0), may_retreat, may_be_infinite)
        self.went_back = False  # whether a sample did at this step
        self.can_look = True  # whether the host can read results at all (not under vmap)
        self.all_active = True  # as far as the host knows
        self.passed: Tensor | None = None
        self.may_leave = problem.part is not None
        self.left: list[Samples] = []
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
                y = spread(y, fy)
                self.samples = Samples.all(y, self.solver.begin(y, self.problem, memory))
            self.samples.y = y
            r = fy - y
            # The start is tested, and whatever somebody wants to know of before the least steps.
            if n == 0 or n >= self.stop.min_steps or trace or self.roll.may_retreat:
                fy, r = self._test(n, fy, r, trace)
                y = self.samples.y
            if n == last or self.roll.still == 0:
                return
            few = self.roll.still <= STAYING * len(y)
            if few and self.may_leave and not self.went_back:
                y, fy, r = self._leave(fy, r)
            samples = self.samples
            with self.precision:
                proposed, samples.memory = self.solver.step(samples.memory, y, fy, r)
            del fy, r
            y = proposed if self.all_active else torch.where(_rows(samples.active), proposed, y)
            samples.y = y
            if n + 1 in path:
                self.states[n + 1] = self._whole([s.y for s in self._everyone()])

    def _test(self, n: int, fy: Tensor, r: Tensor, trace: bool) -> tuple[Tensor, Tensor]:
        """Test every sample; the images and residuals to go on from, which `_retreat` changes."""
        samples, y, going_on = self.samples, self.samples.y, (fy, r)
        if fy.requires_grad:
            y, fy, r = y.detach(), fy.detach(), r.detach()
        now = residual_in(self.stop.norm, y, fy, r)
        size = self._size(fy) if self.sized else now
        # Not added where it is zero: zero times an infinite size is not.
        allowed = torch.add(self.atol, size, alpha=self.rtol) if self.rtol else self.atol
        if n == 0:
            samples.first = now
            self._check_reachable(now, allowed, size)
        if trace or self.solver.keeps_best:
            self._record(n, samples, now, self._relative(size, now, r), trace)
        margin = now - allowed  # whose sign is exact
        if n < self.stop.min_steps:
            margin = margin.masked_fill(margin <= 0, 1)
        back: Tensor | None = None
        if (seen := self._seen(n, margin)) is not None:
            self.went_back = False
            if self.roll.all_go_on(seen):
                return going_on
            before = self.roll.still
            if lost := self.roll.look(seen, first=n == 0):
                back = self._flags(lost)
                going_on = self._retreat(back)
            if self.roll.still == before:
                return going_on
        going = margin > 0  # False for NaN too: nothing finite comes after it
        going = going if back is None else going | back
        size = size if self.sized else self._size(fy)
        self._end(n, going, now, allowed, size, r)
        return going_on

    def _end(
        self, n: int, going: Tensor, now: Tensor, allowed: Tensor, size: Tensor, r: Tensor
    ) -> None:
        """Write down how active samples end that are not ``going (B,)``; at last, all."""
        samples, norm = self.samples, self.stop.norm
        if n == self.stop.max_steps:
            stopping = samples.active
        else:
            stopping = ~going if self.all_active else samples.active & ~going
        # The squares of a residual may vanish where it does not, and those of an image overflow.
        now = now if callable(norm) else torch.maximum(now, least_of(r, norm))
        converged = stopping & (now <= allowed) & (allowed < torch.inf)
        samples.stop(stopping, n, converged, now, self._relative(size, now, r))
        if self.problem.beyond is not None:
            beyond = torch.where(stopping, self.problem.beyond, 0)
            samples.evaluations = samples.evaluations + beyond
        self.all_active = False

    def _seen(self, n: int, margin: Tensor) -> Tensor | None:
        """The margins on the host, if it looks at this step."""
        if not self.can_look or n % self.stop.check_every or n == self.stop.max_steps:
            return None
        seen = on_host(margin if self.all_active else self._of_active(margin))
        self.can_look = seen is not None
        return seen

    def _of_active(self, margin: Tensor) -> Tensor:
        """The margins of active samples.

        Others have zero, or one where the host knows them all, as no test is without a look.
        """
        if self.passed is None:
            self.passed = torch.full_like(self.atol, float(self.stop.check_every == 1))
        return torch.where(self.samples.active, margin, self.passed)

    def _flags(self, rows: list[int]) -> Tensor:
        """``(B,)``: True in some rows; nothing waits for the device."""
        flags = torch.zeros(len(self.roll.going), dtype=torch.bool)
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

    def _leave(self, fy: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those that are done leave the batch; iterates, images and residuals of the others."""
        samples = self.samples
        stay, gone = (torch.tensor(self.roll.rows(going)).to(fy.device) for going in (True, False))
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
        self.roll.narrow()
        self.all_active = True
        return self.samples.y, fy.index_select(0, stay), r.index_select(0, stay)

    def _size(self, fy: Tensor) -> Tensor:
        """What a relative tolerance is relative to, ``(B,)``."""
        return batch_norm_of(fy, "l2" if callable(self.stop.norm) else self.stop.norm)

    def _relative(self, size: Tensor, now: Tensor, r: Tensor) -> Tensor:
        """Relative residuals: in the norm of the stop, or ‖·‖₂ where that is a mere distance."""
        return relative_to(size, batch_norm_of(r, "l2") if callable(self.stop.norm) else now)

    def _record(self, n: int, samples: Samples, now: Tensor, relative: Tensor, trace: bool) -> None:
        """What is kept of every test: the trace, and the best iterate."""
        if trace:
            gone = [torch.full_like(left.relative, torch.nan) for left in self.left]
            present = torch.where(samples.active, relative, torch.nan)
            self.traced.append(self._whole([*gone, present]))
        if self.solver.keeps_best:
            best = samples.best
            if best is not None and n == self.stop.min_steps:
                best = best.forgotten(samples.active)
            samples.best = BestSoFar.of(best, samples.y, now, relative)

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

    def outcome(self, path: Sequence[int], keep_memory: bool) -> Outcome:
        """The samples in their order again."""
        everyone = self._everyone()

        def whole(name: str) -> Tensor:
            return self._whole([getattr(samples, name) for samples in everyone])

        y, residual, relative = whole("y"), whole("residual"), whole("relative")
        converged = whole("converged")
        status = classify(converged, residual, whole("first"))
        if self.solver.keeps_best:
            best = [samples.best for samples in everyone if samples.best is not None]
            y = torch.where(_rows(converged), y, self._whole([b.y for b in best]))
            residual = torch.where(converged, residual, self._whole([b.residual for b in best]))
            relative = torch.where(converged, relative, self._whole([b.relative for b in best]))
        return Outcome(
            y,
            status,
            whole("steps"),
            whole("evaluations"),
            residual,
            relative,
            self.traced,
            [y if n == self.stop.max_steps else self.states.get(n, y) for n in path],
            self._exported() if keep_memory else None,
        )

    def _exported(self) -> Any:
        """The solver's memory of all samples, each as it was when the sample left."""
        parts = [self.solver.export(samples.memory) for samples in self._everyone()]
        if parts[0] is None or len(parts) == 1:
            return parts[-1]
        names = [entry.name for entry in fields(parts[0])]
        return type(parts[0])(
            *(self._whole([getattr(part, name) for part in parts]) for name in names)
        )

    def _everyone(self) -> tuple[Samples, ...]:
        return (*self.left, self.samples)

    def _whole(self, values: Sequence[Tensor]) -> Tensor:
        """What those that left and those that are here have, in the order of the batch."""
        return in_order(self._everyone(), values)


def _rows(flags: Tensor) -> Tensor:
    return flags.unsqueeze(1)
