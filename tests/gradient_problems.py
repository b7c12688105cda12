"""The maps that tests of gradients solve, and what their derivatives are.

With ``f(y) = J y + x`` the derivative of the solution with respect to ``x`` *is* the matrix that a
gradient mode puts in the place of ``(I − J)⁻¹``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from implicit import (
    BPTT,
    JFB,
    RAG,
    Anderson,
    Broyden,
    Gradient,
    Implicit,
    Naive,
    Neumann,
    Phantom,
    Tolerance,
)

TIGHT = Tolerance(rtol=1e-13, atol=0.0, max_steps=500)
EXACT = Implicit(stop=Tolerance(rtol=1e-13, atol=0.0, max_steps=500))
EXACT_ADJOINT = Implicit(stop=Tolerance(rtol=1e-13, atol=0.0, max_steps=300))
MODES = [JFB(), RAG(1), RAG(3), Neumann(1), Neumann(3), Phantom(3, 0.4), EXACT, BPTT()]
SOLVERS = [Naive(), Anderson(), Broyden()]


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def contraction(dim: int, radius: float, seed: int) -> Tensor:
    j = random(dim, dim, seed=seed)
    return radius * j / torch.linalg.matrix_norm(j, 2)


def power_sum(matrix: Tensor, terms: int) -> Tensor:
    total = term = torch.eye(len(matrix), dtype=matrix.dtype)
    for _ in range(terms - 1):
        term = term @ matrix
        total = total + term
    return total


def put_for_the_inverse(gradient: Gradient, j: Tensor) -> Tensor:
    """The matrix ``M`` with ``∂y*/∂x = M ∂f/∂x``, as each method's paper gives it."""
    eye = torch.eye(len(j), dtype=j.dtype)
    if isinstance(gradient, JFB):
        return eye
    if isinstance(gradient, (RAG, Neumann)):
        return power_sum(j, gradient.k)
    if isinstance(gradient, Phantom):
        rate = gradient.damping
        return rate * power_sum(rate * j + (1 - rate) * eye, gradient.k)
    assert isinstance(gradient, Implicit)
    return torch.linalg.inv(eye - j)


def cell(y: Tensor, w: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(y @ w + x) + 0.1 * torch.sin(y)


def problem() -> tuple[Tensor, Tensor, Tensor]:
    w = contraction(4, 0.6, seed=11).requires_grad_()
    x = random(3, 4, seed=12).requires_grad_()
    return w, x, random(3, 4, seed=13)
