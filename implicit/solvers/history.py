"""The last ``m`` secant pairs of a solve, in one ring buffer.

Anderson mixing and Broyden's method learn the Jacobian from how the residual changed from one step
to the next, and with it one thing more: the image of `Anderson`, the point of `Broyden`.  Each step
they take inner products with one kind of difference, solve a small ``m × m`` system, and subtract a
combination of differences.  Only one pair, and one row and column of the system, change per step;
computing them all anew would cost ``m`` times as much.

What a step needs beside the pairs lies in the buffer too: the residual in row 0, where it is
multiplied with the pairs in one pass with the newest of them, and the last point or image in the
slot that is overwritten next, where subtracting the new one makes it a difference.  All differences
are thus *old less new*; every formula has them twice, so their sign does not show.

A solve for a small state costs as many microseconds as it takes operations, and to look at a part
of a tensor is one.  So the parts that a step needs are looked up once for each slot (`Views`).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from implicit.transforms import is_wrapped


@dataclass
class Pairs:
    """Secant pairs in order of time, oldest first: what one solve can hand to the next.

    Attributes:
        residuals, others: ``(B, m, D)``: how the residual changed, and the point or the image;
            zero where there is no pair.
    """

    residuals: Tensor
    others: Tensor


class PointPairs(Pairs):
    """Of residuals and points."""


class ImagePairs(Pairs):
    """Of residuals and images."""


@dataclass(frozen=True)
class Views:
    """What a step reads and writes of a history whose newest pair is in some slot.

    Attributes:
        residuals: ``(B, n, D)``: changes of the residual, of the slots that have ever held a pair.
        others: ``(B, n, D)``: changes of the point or the image, likewise.
        change, other: ``(B, D)``: those of the newest pair.
        targets: ``(B, D, 2)``: the residual, and its newest change.
        unit: ``(B, n, 1)``: the scale of each pair.
        own: ``(B, 1)``: that of the newest.
        equations: ``(B, n, n)``: the system of those pairs.
        line, column: ``(B, n)``: the newest pair's part of it.
        diagonal: ``(B, m)``: that of the whole system.
    """

    residuals: Tensor
    others: Tensor
    change: Tensor
    other: Tensor
    targets: Tensor
    unit: Tensor
    own: Tensor
    equations: Tensor
    line: Tensor
    column: Tensor
    diagonal: Tensor


@dataclass
class SecantHistory:
    """A ring of pairs, oldest overwritten first, and the system that weighs them.

    Attributes:
        rows: ``(B, 2m + 1, D)``: the residual, then two differences for each slot in turn: of
            residuals, and of points or images.
        scale: ``(B, m)``: one over the length of what each pair is measured by; 0 where a sample
            has forgotten its pair (`restart`).
        system: ``(B, m, m)``, written by the solver, for pairs of unit length.
        limit: ``(B, 1)``: the least residual since the last restart times ``growth``.
        growth: ``(B, 1)``: how far a residual may exceed that least one.
        size: ``m``, the number of slots.
        filled: slots that have ever held a pair.
        slot: that of the newest pair.
        holds: whether a point or an image waits in the next slot for its successor.
    """

    rows: Tensor
    scale: Tensor
    system: Tensor
    limit: Tensor
    growth: Tensor
    size: int
    filled: int = 0
    slot: int = -1
    holds: bool = False

    def __post_init__(self) -> None:
        self._parts: tuple[Tensor, ...] = ()
        self._seen: dict[int, Views] = {}
        self._seen_of: tuple[Tensor, ...] | None = None
        self._plain = not (is_wrapped(self.rows) or torch.compiler.is_compiling())
        self._least = torch.finfo(self.rows.dtype).tiny ** 0.5

    @classmethod
    def empty(cls, y: Tensor, memory: int, growth: float) -> SecantHistory:
        """A history of no pairs for a solve from ``y (B, D)``."""
        batch, dim = y.shape
        return cls(
            rows=y.new_empty(batch, 2 * memory + 1, dim),
            scale=y.new_zeros(batch, memory),
            system=y.new_zeros(batch, memory, memory),
            limit=y.new_full((batch, 1), torch.inf),
            growth=y.new_full((batch, 1), growth),
            size=memory,
        )

    @classmethod
    def of(cls, pairs: Pairs, y: Tensor, memory: int, growth: float) -> SecantHistory:
        """A history that begins with the pairs of another solve, but not with their system."""
        shape = (y.shape[0], memory, y.shape[1])
        if pairs.residuals.shape != shape:
            raise ValueError(
                f"memory: the solve that it comes from kept {tuple(pairs.residuals.shape)} and "
                f"this one keeps pairs of shape {shape} (samples, memory, elements). Use the same "
                "solver and batch, or memory=None."
            )
        history = cls.empty(y, memory, growth)
        history.filled, history.slot = memory, memory - 1
        history.residuals.copy_(pairs.residuals)
        history.others.copy_(pairs.others)
        return history

    def normalise(self, measured: Tensor) -> Tensor:
        """Set `scale` from the differences ``(B, m, D)`` that pairs are measured by; unit ones."""
        lengths = torch.linalg.vector_norm(measured, dim=2)
        self.scale = torch.where(lengths > 0, 1 / lengths, 0)
        return measured * self.scale.unsqueeze(2)

    def export(self) -> tuple[Tensor, Tensor]:
        """Both differences in order of time; the oldest is gone if its slot has been taken."""
        order = torch.arange(self.size, device=self.rows.device).roll(-1 - self.slot)
        alive = self.scale[:, order].unsqueeze(2) > 0
        if self.holds:
            alive[:, 0] = False
        # Selected, not multiplied: a forgotten pair may hold infinities.
        residuals, others = (
            torch.where(alive, self.rows[:, 1 + kind :: 2][:, order], 0).detach() for kind in (0, 1)
        )
        return residuals, others

    @property
    def residuals(self) -> Tensor:
        """``(B, n, D)``: changes of the residual, of the slots that have ever held a pair."""
        return self.rows[:, 1 : 2 * self.filled : 2]

    @property
    def others(self) -> Tensor:
        """``(B, n, D)``: changes of the point or the image, likewise."""
        return self.rows[:, 2 : 2 * self.filled + 1 : 2]

    @property
    def in_place(self) -> bool:
        """Whether results may be written over what they were computed from."""
        return self._plain and not torch.is_grad_enabled()

    def look(self) -> Views:
        """The parts that belong to the newest pair."""
        if self.filled < self.size or not self.in_place:
            return self._look()
        of = self.rows, self.scale, self.system
        if self._seen_of is None or not all(map(operator.is_, of, self._seen_of)):
            self._seen, self._seen_of = {}, of
        if self.slot not in self._seen:
            self._seen[self.slot] = self._look()
        return self._seen[self.slot]

    def _look(self) -> Views:
        n, row = self.filled, 1 + 2 * self.slot
        scale = self.scale.narrow(1, 0, n).unsqueeze(2)
        system = self.system[:, :n, :n]
        return Views(
            residuals=self.residuals,
            others=self.others,
            change=self.row(row),
            other=self.row(row + 1),
            targets=self.rows[:, : row + 1 : row].mT,
            unit=scale,
            own=scale.select(1, self.slot),
            equations=system,
            line=system.select(1, self.slot),
            column=system.select(2, self.slot),
            diagonal=self.system.diagonal(dim1=1, dim2=2),
        )

    def row(self, index: int) -> Tensor:
        """``(B, D)``: a row of the buffer."""
        if torch.is_grad_enabled():  # which forbids to write to views that were made together
            return self.rows.select(1, index)
        if not self._parts or self._parts[0]._base is not self.rows:
            self._parts = self.rows.unbind(1)
        return self._parts[index]

    def forget(self, which: Tensor) -> None:
        """Empty the history of the samples ``which (B, 1)``."""
        self.scale = self.scale.masked_fill(which, 0)

    def begin_again(self, which: Tensor, r: Tensor, other: Tensor) -> None:
        """Know nothing of the samples ``which (B, 1)`` but a residual, and a point or an image.

        The next step is given the same again: its pair is of length zero.
        """
        self.forget(which)
        self.limit = self.limit.masked_fill(which, torch.inf)
        # Numbers that have overflowed would outlast the scale, which is zero.
        self.system = self.system.masked_fill(which.unsqueeze(2), 0)
        self.rows.masked_fill_(which.unsqueeze(2), 0)
        for row, new in ((self.row(0), r), (self.held, other)):
            row.copy_(torch.where(which, new, row))

    def restart(self, length: Tensor) -> Tensor:
        """Empty the history of samples whose residual ``(B, 1)`` exceeds its limit; who keep it."""
        kept, allowed = length <= self.limit, length * self.growth
        self.limit = torch.where(kept, torch.minimum(self.limit, allowed), allowed)
        self.scale = self.scale.mul_(kept) if self.in_place else self.scale * kept
        return kept

    def push(self, r: Tensor, other: Tensor) -> bool:
        """Write the residual, and make a pair of what was held; False if nothing was."""
        residual = self.row(0)
        if self.holds:
            self.slot = (self.slot + 1) % self.size
            self.filled = min(self.filled + 1, self.size)
            change = self.row(1 + 2 * self.slot)
            if self.in_place:
                torch.sub(residual, r, out=change)
            else:
                change.copy_(residual).sub_(r)
            self.row(2 + 2 * self.slot).sub_(other)
        residual.copy_(r)
        return self.holds

    def hold(self, other: Tensor) -> None:
        """Keep a point or an image for the next pair, in place of the oldest one."""
        self._renew()
        self.held.copy_(other)
        self.holds = True

    def renewed(self, views: Views) -> Views:
        """The same parts, which may be written to although autograd may need what they hold."""
        return self._look() if self._renew() else views

    def _renew(self) -> bool:
        if not torch.is_grad_enabled():
            return False
        self.rows, self.system = self.rows.clone(), self.system.clone()
        return True

    @property
    def held(self) -> Tensor:
        """``(B, D)``: the row of the point or image that waits."""
        return self.row(2 + 2 * ((self.slot + 1) % self.size))

    @staticmethod
    def length_of(change: Tensor) -> Tensor:
        """``(B, 1)`` lengths of differences ``(B, D)``.

        Where autograd goes through it, no difference has length one: the length is not used, but
        in its second derivative, which is not a number, zero times that would be.
        """
        if torch.is_grad_enabled():
            gone = (change == 0).all(dim=1, keepdim=True)
            change = change.masked_fill(gone, max(change.shape[1], 1) ** -0.5)
        return torch.linalg.vector_norm(change, dim=1, keepdim=True)

    def measure(self, own: Tensor, length: Tensor) -> Tensor:
        """Set the scale of the newest pair from its length ``(B, 1)``, kept from zero."""
        length = length.clamp_min(self._least)
        return torch.reciprocal(length, out=own) if self.in_place else own.copy_(1 / length)

    def write(self, views: Views, own: Tensor, line: Tensor, column: Tensor) -> None:
        """Set the newest pair's line and column of the system, ``own`` times those ``(B, n)``."""
        if self.in_place:
            torch.mul(line, own, out=views.line)
            torch.mul(column, own, out=views.column)
        else:  # autograd does not know a view any more that was taken before a write
            views.equations.select(1, self.slot).copy_(line * own)
            views.equations.select(2, self.slot).copy_(column * own)

    @staticmethod
    def weights(views: Views, target: Tensor) -> Tensor:
        """Weights ``(B, 1, n)`` of the pairs for a right-hand side ``(B, n, 1)``.

        It is already multiplied by their scales, as the system is.
        """
        solution = torch.linalg.solve_ex(views.equations, target).result
        # A sample whose numbers overflowed takes the plain step; its neighbours are untouched.
        return (solution * views.unit).nan_to_num_(0, 0, 0).mT

    @staticmethod
    def mix(image: Tensor, weights: Tensor, rows: Tensor, into: Tensor) -> Tensor:
        """``image − Σᵢ wᵢ rowsᵢ (B, D)`` for ``weights (B, 1, n)``, written to a tensor of no use.

        That may be ``image`` itself.
        """
        if torch.is_grad_enabled() or is_wrapped(into):  # where in place is wrong, or slow
            return image - torch.bmm(weights, rows).squeeze(1)
        if into is not image:
            into.copy_(image)
        into.unsqueeze(1).baddbmm_(weights, rows, alpha=-1)
        return into
