"""Implicit layers for PyTorch: fixed-point solvers, gradients, supervision and perturbation.

>>> import torch, implicit
>>> solution = implicit.fixed_point(torch.cos, torch.ones(2, 3), solver=implicit.Anderson())
>>> bool(solution.converged.all())
True
"""

from implicit.diagnostics import ConvergenceLogger, plot_convergence, report
from implicit.dropout import SolveDropout
from implicit.fixed_point import FixedPoint, fixed_point, root
from implicit.gradients import (
    BPTT,
    JFB,
    RAG,
    Auto,
    ConvergenceWarning,
    Gradient,
    Implicit,
    Neumann,
    Phantom,
)
from implicit.normalization import contract, uncontract
from implicit.per_solve import PerSolve, renew
from implicit.perturbation import (
    BatchPart,
    GaussianNoise,
    Noise,
    NormScaledNoise,
    Perturbation,
    standard_normal,
)
from implicit.regularization import (
    fixed_point_correction,
    jacobian_penalty,
    lipschitz_estimate,
    spectral_radius,
)
from implicit.solution import Adjoint, Solution, SolveError, Status
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
    "Adjoint",
    "Anderson",
    "Auto",
    "BatchPart",
    "Best",
    "Broyden",
    "ConvergenceLogger",
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
    "PerSolve",
    "Perturbation",
    "Phantom",
    "Solution",
    "SolveDropout",
    "SolveError",
    "Solver",
    "StateError",
    "Status",
    "Steps",
    "Supervision",
    "Tolerance",
    "WholeSolver",
    "contract",
    "fixed_point",
    "fixed_point_correction",
    "jacobian_penalty",
    "lipschitz_estimate",
    "plot_convergence",
    "positions",
    "renew",
    "report",
    "root",
    "spectral_radius",
    "standard_normal",
    "supervise",
    "uncontract",
]
