"""The last ``m`` secant pairs of a solve, in one ring buffer.

Anderson mixing and Broyden's method learn the Jacobian from the same data: how a point changed and
how its image changed from one step to the next.  Each step they take inner products with the one
kind of difference (the ``basis``), solve a small ``m × m`` system, and subtract a combination of
the other kind (the ``moves``).  Only one pair, and one row and column of the system, change per
step; computing them all anew would cost ``m`` times as much.

What a step needs beside the pairs lies in the buffer too, because it is then multiplied with them
in one pass: the residual in row 0, and the last point and image in the slot that is overwritten
next, where subtracting the new ones from them makes a pair.  Pairs are thus differences *old less
new*; every formula has them twice, so their sign does not show.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Pairs:
    """Secant pairs in order of time, oldest first: what one solve can hand to the next.

    Attributes:
        basis, moves: ``(B, m, D)``; zero where there is no pair.
    """

    basis: Tensor
    moves: Tensor


@dataclass
class SecantHistory:
    """A ring of pairs, oldest overwritten first, and the system that weighs them.

    Attributes:
        rows: ``(B, 2m + 1, D)``: the residual, then basis and moves of each slot in turn.
        scale: ``(B, m)``: one over the length of each basis vector; 0 where a sample has forgotten
            its pair (`restart`).
        system: ``(B, m, m)``, written by the solver, for basis vectors of unit length.
        blank: ``(B, m, m)``: the identity, which is the system of no pairs.
        best: ``(B,)``: the least residual since the last restart.
        filled: slots that have ever held a pair.
        slot: that of the newest pair.
        holds: whether a point and an image wait in the next slot for their successors.
    """

    rows: Tensor
    scale: Tensor
    system: Tensor
    blank: Tensor
    best: Tensor
    filled: int = 0
    slot: int = -1
    holds: bool = False

    @classmethod
    def empty(cls, y: Tensor, memory: int) -> SecantHistory:
        """A history of no pairs for a solve from ``y (B, D)``."""
        batch, dim = y.shape
        blank = torch.eye(memory, dtype=y.dtype, device=y.device).expand(batch, -1, -1)
        return cls(
            rows=y.new_empty(batch, 2 * memory + 1, dim),
            scale=y.new_zeros(batch, memory),
            system=blank + y.new_zeros(batch, 1, 1),
            blank=blank,
            best=y.new_full((batch,), torch.inf),
        )

    @classmethod
    def of(cls, pairs: Pairs, y: Tensor, memory: int) -> SecantHistory:
        """A history that begins with the pairs of another solve, but not with their system."""
        shape = (y.shape[0], memory, y.shape[1])
        if not isinstance(pairs, Pairs) or pairs.basis.shape != shape:
            given = tuple(pairs.basis.shape) if isinstance(pairs, Pairs) else type(pairs).__name__
            raise ValueError(
                f"memory: the solve that it comes from kept {given} and this one keeps pairs of "
                f"shape {shape} (samples, memory, elements). Use the same solver and batch, or "
                "memory=None."
            )
        history = cls.empty(y, memory)
        history.filled, history.slot = memory, memory - 1
        history.basis.copy_(pairs.basis)
        history.moves.copy_(pairs.moves)
        lengths = torch.linalg.vector_norm(history.basis, dim=2)
        history.scale = torch.where(lengths > 0, 1 / lengths, 0)
        return history

    def export(self) -> Pairs:
        """The pairs in order of time; the oldest is gone if its slot has been taken already."""
        order = torch.arange(self.size, device=self.rows.device).roll(-1 - self.slot)
        alive = self.scale[:, order].unsqueeze(2) > 0
        if self.holds:
            alive[:, 0] = False
        # Selected, not multiplied: a forgotten pair may hold infinities.
        basis, moves = (
            torch.where(alive, self.rows[:, 1 + kind :: 2][:, order], 0).detach() for kind in (0, 1)
        )
        return Pairs(basis, moves)

    @property
    def basis(self) -> Tensor:
        """``(B, n, D)``: of the slots that have ever held a pair."""
        return self.rows[:, 1 : 2 * self.filled : 2]

    @property
    def moves(self) -> Tensor:
        """``(B, n, D)``: likewise."""
        return self.rows[:, 2 : 2 * self.filled + 1 : 2]

    def residual(self, y: Tensor, fy: Tensor) -> Tensor:
        """Write ``fy − y (B, D)`` to row 0, which is returned."""
        return self.rows.select(1, 0).copy_(fy).sub_(y)

    def restart(self, length: Tensor, growth: float) -> None:
        """Empty the history of each sample whose residual exceeds ``growth`` times its best."""
        kept = length <= growth * self.best
        self.best = torch.where(kept, torch.minimum(self.best, length), length)
        self.scale = self.scale * kept.unsqueeze(1)
        self.system = torch.where(kept.view(-1, 1, 1), self.system, self.blank)

    def push(self, point: Tensor, image: Tensor) -> bool:
        """Make a pair of what is held and its successors; False if nothing is held."""
        if not self.holds:
            return False
        self.slot = (self.slot + 1) % self.size
        self.filled = min(self.filled + 1, self.size)
        self.rows.select(1, 1 + 2 * self.slot).sub_(point)
        self.rows.select(1, 2 + 2 * self.slot).sub_(image)
        return True

    def hold(self, point: Tensor, image: Tensor) -> None:
        """Keep a point and an image for the next pair, in place of the oldest one."""
        if torch.is_grad_enabled():  # autograd needs the old contents
            self.rows = self.rows.clone()
        following = (self.slot + 1) % self.size
        self.rows.select(1, 1 + 2 * following).copy_(point)
        self.rows.select(1, 2 + 2 * following).copy_(image)
        self.holds = True

    def residual_and(self, row: int) -> Tensor:
        """``(B, 2, D)``: row 0 and another one, without a copy."""
        return self.rows[:, : row + 1 : row]

    def measure(self, square: Tensor) -> None:
        """Take note of ``‖basis‖² (B,)`` of the newest pair, which is kept from zero in place."""
        square.clamp_min_(torch.finfo(square.dtype).tiny)
        self.scale.select(1, self.slot).copy_(square.rsqrt())

    def weights(self, target: Tensor) -> Tensor:
        """Solve the system for ``target (B, n)``, both for unit vectors; weights of the pairs."""
        n = self.filled
        solution, _ = torch.linalg.solve_ex(self.system[:, :n, :n], target.unsqueeze(2))
        # A sample whose numbers overflowed takes the plain step; its neighbours are untouched.
        return (solution.squeeze(2) * self.scale[:, :n]).nan_to_num_(0, 0, 0)

    def mix(self, image: Tensor, weights: Tensor) -> Tensor:
        """``image − Σᵢ wᵢ movesᵢ`` for ``weights (B, n)``."""
        return torch.baddbmm(
            image.unsqueeze(1), weights.unsqueeze(1), self.moves, alpha=-1
        ).squeeze(1)

    @property
    def size(self) -> int:
        """``m``, the number of slots."""
        return self.scale.shape[1]
