"""Arnoldi's step and GMRES for a batch of linear systems, one Krylov space per sample.

Y. Saad and M. Schultz, *GMRES: a generalized minimal residual algorithm for solving nonsymmetric
linear systems*, SIAM J. Sci. Stat. Comput. 7(3), 1986.  The Arnoldi basis is orthogonalised twice
(classical Gram–Schmidt), which is as stable as the modified form and two batched products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Krylov:
    """What GMRES found.

    Attributes:
        x: ``(B, D)``, the solution.
        residual: ``(B,)``, ``‖b − A x‖₂``.
        products: ``(B,)`` int64, products with ``A`` that each sample needed.
        smallest: ``(B,)``, smallest singular value of ``A`` seen in the Krylov space, from above;
            0 where ``A`` is zero on all of it.
    """

    x: Tensor
    residual: Tensor
    products: Tensor
    smallest: Tensor

    @property
    def error(self) -> Tensor:
        """``(B,)``: an estimate of ``‖x − A⁻¹b‖``."""
        return torch.where(self.residual > 0, self.residual / self.smallest, self.residual)


def gmres(
    matvec: Callable[[Tensor], Tensor], b: Tensor, allowed: Tensor, dimensions: int
) -> Krylov:
    """Solve ``A x = b`` for each row of ``b (B, D)``, from ``x = 0``.

    Args:
        matvec: ``A`` applied to each row of a ``(B, D)`` matrix.
        allowed: ``(B,)``, the residual at which a sample is done.
        dimensions: most products with ``A``.

    Example:
        >>> A = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
        >>> found = gmres(lambda x: x @ A.T, torch.tensor([[5.0, 6.0]]), torch.tensor([1e-5]), 2)
        >>> found.x.round(decimals=4).tolist(), found.products.tolist()
        ([[1.5, 2.0]], [2])
    """
    batch, size = b.shape
    dimensions = min(dimensions, size)
    length = torch.linalg.vector_norm(b, dim=1)
    basis = b.new_zeros(batch, dimensions + 1, size)
    basis[:, 0] = _unit(b, length)
    hessenberg = b.new_zeros(batch, dimensions + 1, dimensions)
    products = torch.zeros(batch, dtype=torch.int64, device=b.device)
    # What no coefficient can do better than: b itself.
    weights, residual, n = b.new_zeros(batch, 0), length, 0
    while n < dimensions and bool((residual > allowed).any()):
        products += residual > allowed
        basis[:, n + 1], hessenberg[:, : n + 2, n] = new_direction(
            matvec(basis[:, n]), basis[:, : n + 1]
        )
        n += 1
        weights, residual = _least_squares(hessenberg[:, : n + 1, :n], length)
    x = torch.bmm(weights.unsqueeze(1), basis[:, :n]).squeeze(1)
    smallest = torch.ones_like(length)
    if n:
        # A sample whose numbers are not finite has none, and must not stop the others.
        values = torch.linalg.svdvals(hessenberg[:, : n + 1, :n].nan_to_num(0, 0, 0))
        # Columns after an exhausted space are zero and say nothing of A.
        present = values > 10 * torch.finfo(b.dtype).eps * values[:, :1]
        smallest = torch.where(present, values, values[:, :1]).amin(dim=1)
    return Krylov(x, residual, products, smallest)


def new_direction(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """What of ``w (B, D)`` is orthogonal to the rows of ``basis (B, n, D)``, as a unit vector.

    It is zero where the space is exhausted: what is then left of ``w`` is rounding error, which in
    unit length is neither a product of the matrix nor orthogonal to anything.

    Returns:
        That vector ``(B, D)``, and the column ``(B, n + 1)`` of the Hessenberg matrix: the overlaps
        of ``w`` with the basis and the length of what is left.
    """
    scale = torch.linalg.vector_norm(w, dim=1)
    overlaps = w.new_zeros(basis.shape[:2])
    for _ in range(2):
        overlap = torch.bmm(basis, w.unsqueeze(2))
        overlaps = overlaps + overlap.squeeze(2)
        w = w - torch.bmm(overlap.mT, basis).squeeze(1)
    rest = torch.linalg.vector_norm(w, dim=1)
    rest = torch.where(rest > 10 * torch.finfo(w.dtype).eps * scale, rest, 0)
    # A little more than that may be rounding error too, and shows by not being orthogonal.
    q = _unit(w, rest)
    q = q - torch.bmm(torch.bmm(basis, q.unsqueeze(2)).mT, basis).squeeze(1)
    length = torch.linalg.vector_norm(q, dim=1)
    rest = torch.where(length < 0.7, 0, rest)
    q = torch.where(length[:, None] < 0.7, 0, _unit(q, length))
    return q, torch.cat((overlaps, rest.unsqueeze(1)), dim=1)


def _unit(x: Tensor, length: Tensor) -> Tensor:
    """Rows of length one; a row of length zero stays zero."""
    return x * torch.where(length > 0, 1 / length, 0).unsqueeze(1)


def _least_squares(hessenberg: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """``argmin ‖length·e₁ − H c‖`` for ``H (B, n+1, n)``, and the norm that is left."""
    q, r = torch.linalg.qr(hessenberg, mode="complete")
    target = q[:, 0] * length.unsqueeze(1)
    n = hessenberg.shape[2]
    diagonal = r.diagonal(dim1=1, dim2=2)
    largest = diagonal.abs().amax(dim=1, keepdim=True)
    empty = diagonal.abs() <= 10 * torch.finfo(r.dtype).eps * largest
    # A direction that A does not move gets no weight and keeps its share of the residual.
    square = torch.where(empty.unsqueeze(2), 0, r[:, :n]) + torch.diag_embed(empty.to(r.dtype))
    reached = torch.where(empty, 0, target[:, :n])
    weights = torch.linalg.solve_triangular(square, reached.unsqueeze(2), upper=True).squeeze(2)
    missed = torch.cat((torch.where(empty, target[:, :n], 0), target[:, n:]), dim=1)
    return weights, torch.linalg.vector_norm(missed, dim=1)
