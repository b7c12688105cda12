"""Fixed-point solvers, one file each, over the interface of `implicit.solvers.base.Solver`."""

from implicit.solvers.anderson import Anderson
from implicit.solvers.base import Solver, WholeSolver
from implicit.solvers.best import Best
from implicit.solvers.broyden import Broyden
from implicit.solvers.naive import Naive
from implicit.solvers.newton import NewtonKrylov

__all__ = ["Anderson", "Best", "Broyden", "Naive", "NewtonKrylov", "Solver", "WholeSolver"]
