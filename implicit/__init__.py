"""Implicit layers for PyTorch: fixed-point solvers, gradients, supervision and perturbation.

>>> import torch, implicit
>>> solution = implicit.fixed_point(torch.cos, torch.ones(2, 3), solver=implicit.Anderson())
>>> bool(solution.converged.all())
True
"""

from implicit.fixed_point import FixedPoint, fixed_point
from implicit.gradients import (
    BPTT,
    JFB,
    RAG,
    ConvergenceWarning,
    Gradient,
    Implicit,
    Neumann,
    Phantom,
)
from implicit.perturbation import (
    GaussianNoise,
    Noise,
    NormScaledNoise,
    Perturbation,
    standard_normal,
)
from implicit.solution import Solution, SolveError, Status
from implicit.solvers import (
    Anderson,
    Best,
    Broyden,
    Naive,
    NewtonKrylov,
    Solver,
    WholeSolver,
)
from implicit.state import StateError
from implicit.stopping import Steps, Tolerance
from implicit.supervision import Supervision, positions, supervise

__version__ = "0.1.0"

__all__ = [
    "BPTT",
    "JFB",
    "RAG",
    "Anderson",
    "Best",
    "Broyden",
    "ConvergenceWarning",
    "FixedPoint",
    "GaussianNoise",
    "Gradient",
    "Implicit",
    "Naive",
    "Neumann",
    "NewtonKrylov",
    "Noise",
    "NormScaledNoise",
    "Perturbation",
    "Phantom",
    "Solution",
    "SolveError",
    "Solver",
    "StateError",
    "Status",
    "Steps",
    "Supervision",
    "Tolerance",
    "WholeSolver",
    "fixed_point",
    "positions",
    "standard_normal",
    "supervise",
]
