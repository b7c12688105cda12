"""Gradients of a fixed point, over the interface of `implicit.gradients.base.Gradient`."""

from implicit.gradients.adjoint import (
    AdjointGradient,
    Auto,
    ConvergenceWarning,
    Implicit,
    Neumann,
)
from implicit.gradients.base import Gradient
from implicit.gradients.bptt import BPTT
from implicit.gradients.unrolled import JFB, RAG, Phantom

__all__ = [
    "BPTT",
    "JFB",
    "RAG",
    "AdjointGradient",
    "Auto",
    "ConvergenceWarning",
    "Gradient",
    "Implicit",
    "Neumann",
    "Phantom",
]
