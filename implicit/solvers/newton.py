"""Newton–Krylov: Newton's method whose linear systems are solved by GMRES.

D. Knoll and D. Keyes, *Jacobian-free Newton–Krylov methods: a survey of approaches and
applications*, J. Comput. Phys. 193(2), 2004; how exactly each system is solved follows S.
Eisenstat and H. Walker, *Choosing the forcing terms in an inexact Newton method*, SIAM J. Sci.
Comput. 17(1), 1996 (choice 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit.arguments import check_count, check_number
from implicit.krylov import gmres
from implicit.solvers.base import Solver, check_memory
from implicit.solvers.line_search import LineSearch
from implicit.transforms import is_mapped


@dataclass
class _Memory:
    search: LineSearch
    # Not by its class: this module lies below `implicit.problem`.
    f: Any


@dataclass(frozen=True)
class NewtonKrylov(Solver):
    """``y ← y + s`` with ``(I − J) s = f(y) − y`` solved by GMRES on Jacobian–vector products.

    Converges quadratically near the solution and needs no contraction, at the price of products
    with the Jacobian: each counts as one evaluation of ``f``.  The step of a sample is halved
    while its residual does not fall.  ``f`` must be differentiable in forward or twice in reverse
    mode.

    Args:
        krylov: most products per Newton step.
        forcing: loosest relative tolerance of a linear system, in (0, 1); tightened as the
            residual falls.

    Example:
        >>> import torch, implicit
        >>> y0 = torch.full((1, 1), 2.0, dtype=torch.float64)
        >>> tight = implicit.Tolerance(rtol=0.0, atol=1e-12)
        >>> s = implicit.fixed_point(
        ...     lambda y: 3 * torch.cos(y), y0, solver=implicit.NewtonKrylov(), stop=tight
        ... )
        >>> round(s.value.item(), 6), int(s.steps) < 8
        (1.170121, True)
    """

    krylov: int = 40
    forcing: float = 0.1

    def __post_init__(self) -> None:
        check_count("NewtonKrylov", "krylov", self.krylov)
        check_number("NewtonKrylov", "forcing", self.forcing, above=0, below=1)

    @property
    def differentiable(self) -> bool:
        return False  # GMRES is not

    def init(self, y: Tensor) -> _Memory:
        raise TypeError("NewtonKrylov needs the map itself: begin(y, f).")

    def begin(self, y: Tensor, f: Any, exported: Any = None) -> _Memory:
        check_memory(self, exported, type(None))
        return _Memory(LineSearch.at(y), f)

    def step(self, memory: _Memory, y: Tensor, fy: Tensor, r: Tensor) -> tuple[Tensor, _Memory]:
        if is_mapped(r):
            raise RuntimeError(
                "NewtonKrylov looks at its residual to know when to end, which it cannot under "
                "torch.func.vmap: use Naive, Anderson or Broyden there."
            )
        search = memory.search
        length = torch.linalg.vector_norm(r.detach(), dim=1)
        accepted = search.accepts(length)
        forcing = (0.9 * (length / search.length).square()).clamp(1e-8, self.forcing)
        # A sample that is halving its step keeps its direction: its system counts as solved.
        allowed = torch.where(accepted, forcing * length, torch.inf)
        found = gmres(lambda s: s - memory.f.jvp(y, s), r, allowed, self.krylov)
        memory.f.count(found.products)
        return search.next(accepted, y, length, found.x), memory
