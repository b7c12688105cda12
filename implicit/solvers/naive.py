"""Naive fixed-point iteration (Picard, Banach), with damping."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from implicit.arguments import check_number
from implicit.solvers.base import Solver


@dataclass(frozen=True)
class Naive(Solver):
    """``y ← y + λ (f(y) − y)``; ``λ = 1`` is the plain iteration ``y ← f(y)``.

    Converges where the spectral radius of ``(1 − λ) I + λ J`` is below one; a damping ``λ < 1``
    tames oscillation (eigenvalues of ``J`` below −1).

    Args:
        damping: ``λ`` in (0, 1].

    Example:
        >>> import torch, implicit
        >>> y0 = torch.ones(1, 1, dtype=torch.float64)
        >>> s = implicit.fixed_point(lambda y: -2 * y + 3, y0 * 5, solver=implicit.Naive(0.4))
        >>> round(s.value.item(), 2)
        1.0
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        check_number("Naive", "damping", self.damping, above=0, most=1)

    def init(self, y: Tensor) -> None:
        return None

    def step(self, memory: None, y: Tensor, fy: Tensor, r: Tensor) -> tuple[Tensor, None]:
        return (fy if self.damping == 1 else y.lerp(fy, self.damping)), None
