"""Fixed-point solvers, one file each, over the interface of `implicit.solvers.base.Solver`."""

from implicit.solvers.anderson import Anderson
from implicit.solvers.base import Solver
from implicit.solvers.broyden import Broyden
from implicit.solvers.naive import Naive

__all__ = ["Anderson", "Broyden", "Naive", "Solver"]
