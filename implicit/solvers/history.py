"""The last ``m`` secant pairs of a solve, in ring buffers.

Anderson mixing and Broyden's method learn the Jacobian from the same data: how the residual
``r = f(y) − y`` changed (``Δr``) when the iterate changed (``Δy``).  Both then solve a small
``m × m`` system of inner products of these pairs, of which one row and one column change per
step; computing them all anew would cost ``m`` times as much.
"""

from __future__ import annotations

import torch
from torch import Tensor


class SecantHistory:
    """Ring buffers of ``Δy`` and ``Δr``, both ``(B, m, D)``, oldest pair overwritten first.

    Each sample may forget its pairs by itself (`restart`): ``alive (B, m)`` says which slots count.
    """

    def __init__(self, y: Tensor, memory: int) -> None:
        self.memory = memory
        self.pairs = 0
        self.slot = -1
        self.dy = y.new_zeros(y.shape[0], memory, y.shape[1])
        self.dr = torch.zeros_like(self.dy)
        self.alive = torch.zeros(y.shape[0], memory, dtype=torch.bool, device=y.device)
        self.best = y.new_full((y.shape[0],), float("inf"))
        self.last: tuple[Tensor, Tensor] | None = None

    def push(self, y: Tensor, r: Tensor) -> bool:
        """Record ``(y, r)``; True if there was an earlier one to take differences with."""
        last, self.last = self.last, (y, r)
        if last is None:
            return False
        self.slot = (self.slot + 1) % self.memory
        self.pairs = min(self.pairs + 1, self.memory)
        self.dy = write(self.dy, self.slot, y - last[0])
        self.dr = write(self.dr, self.slot, r - last[1])
        self.alive = self.alive.clone()
        self.alive[:, self.slot] = True
        return True

    def restart(self, r: Tensor, growth: float) -> None:
        """Empty the history of each sample whose residual exceeds ``growth`` times its best."""
        length = torch.linalg.vector_norm(r.detach(), dim=1)
        lost = ~(length <= growth * self.best)
        self.alive = self.alive & ~lost[:, None]
        self.best = torch.where(lost, length, torch.minimum(self.best, length))

    @property
    def age(self) -> Tensor:
        """``(n,)`` int64: steps since the pair in each filled slot was recorded, 0 the newest."""
        return (self.slot - torch.arange(self.pairs, device=self.dy.device)) % self.pairs

    @property
    def later(self) -> Tensor:
        """``(n, n)`` bool: whether the pair in slot ``i`` is younger than the one in slot ``j``."""
        return self.age[:, None] < self.age[None, :]


def write(buffer: Tensor, slot: int, value: Tensor) -> Tensor:
    """``buffer[:, slot] = value``, in place unless autograd still needs the old contents."""
    if torch.is_grad_enabled():
        buffer = buffer.clone()
    buffer[:, slot] = value
    return buffer


def dot(rows: Tensor, x: Tensor) -> Tensor:
    """Inner products ``(B, m)`` of ``rows (B, m, D)`` with ``x (B, D)``."""
    return torch.bmm(rows, x.unsqueeze(2)).squeeze(2)


def combine(weights: Tensor, rows: Tensor) -> Tensor:
    """Linear combinations ``(B, D)`` of ``rows (B, m, D)`` with ``weights (B, m)``."""
    return torch.bmm(weights.unsqueeze(1), rows).squeeze(1)
