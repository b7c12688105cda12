"""Unrolled gradients: a few tracked applications of ``f`` from the detached solution.

JFB: Fung et al., *JFB: Jacobian-free backpropagation for implicit networks*, AAAI 2022.
RAG: Wang, Teng and Wang, *Deep Equilibrium Object Detection*, ICCV 2023, Eq. 10–11.
Phantom: Geng et al., *On training implicit models*, NeurIPS 2021.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from implicit.arguments import check_count, check_flag, check_number
from implicit.gradients.base import Gradient, Map
from implicit.transforms import is_transforming


@dataclass(frozen=True)
class Phantom(Gradient):
    """``k`` tracked and damped applications ``y ← (1 − λ) y + λ f(y)`` from the solution.

    At the fixed point the gradient is ``λ Σ_{i<k} (λJ + (1 − λ)I)ⁱ ∂f/∂(·)``.  Damping makes the
    series converge for maps whose Jacobian has eigenvalues far on the negative side.  Memory:
    ``k`` applications of ``f``.

    Example:
        >>> Phantom(k=5, damping=0.5)
        Phantom(k=5, damping=0.5)
    """

    k: int
    damping: float = 0.5

    def __post_init__(self) -> None:
        check_count(type(self).__name__, "k", self.k)
        check_number("Phantom", "damping", self.damping, above=0, most=1)

    def attach(self, f: Map, value: Tensor) -> Tensor:
        y = value
        for _ in range(self.k):
            y = y.lerp(f(y), self.damping)
        return y


@dataclass(frozen=True)
class RAG(Gradient):
    """Refinement-aware gradient: ``k`` tracked applications from the solution (Eq. 10–11).

    At the fixed point this is ``Σ_{i<k} Jⁱ ∂f/∂(·)``; ``k = 1`` is JFB.  Memory: ``k``
    applications of ``f``, or one and ``k`` states where they are recomputed.  `Neumann` gives the
    same gradient in the memory of one, but at the fixed point only.

    Args:
        k: applications, at least 1.
        recompute: keep only the states between the applications, and evaluate each once more when
            the gradient goes back through it, with the same random numbers.

    Example:
        >>> RAG(2)
        RAG(k=2, recompute=False)
    """

    k: int = 2
    recompute: bool = False

    def __post_init__(self) -> None:
        check_count("RAG", "k", self.k)
        check_flag("RAG", "recompute", self.recompute)

    def attach(self, f: Map, value: Tensor) -> Tensor:
        if self.recompute and is_transforming():
            raise RuntimeError(
                f"{self}: torch.func cannot recompute. Use RAG({self.k}), or Neumann({self.k}), "
                "which keeps one application."
            )
        y = value
        for _ in range(self.k):
            y = checkpoint(f, y, use_reentrant=False) if self.recompute else f(y)
        return y


@dataclass(frozen=True)
class JFB(Gradient):
    """Jacobian-free backpropagation: one tracked application; ``(I − J)⁻¹`` becomes ``I`` (Eq. 9).

    Example:
        >>> JFB()
        JFB()
    """

    def attach(self, f: Map, value: Tensor) -> Tensor:
        return f(value)
