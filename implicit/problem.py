"""What a solver sees of ``f``: a map of ``(B, D)`` matrices, its Jacobian, and its price."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from implicit.state import FlatMap

Map = Callable[[Tensor], Tensor]


class Problem:
    """``y = f(y)`` in the flat view.

    Args:
        f: maps ``(B, D)`` to ``(B, D)``, row by row.
        product: ``(y, v) ↦ J(y) v``, for maps whose Jacobian is known; otherwise it is taken by
            automatic differentiation.
        part: gives the map for some of the samples, from their row numbers ``(k,)`` among those
            that it has now; None where samples cannot be told apart.
        agreement: how far an image may differ when it is computed in another batch, relatively.
    """

    def __init__(
        self,
        f: Map,
        product: Callable[[Tensor, Tensor], Tensor] | None = None,
        part: Callable[[Tensor], FlatMap] | None = None,
        agreement: float = 1e-4,
    ) -> None:
        self.f = f
        self.product = product
        self.part = part
        self.agreement = agreement
        self.beyond: Tensor | None = None
        """``(B,)`` evaluations beyond one per call: Jacobian products, probes."""

    def __call__(self, y: Tensor) -> Tensor:
        return self.f(y)

    def count(self, evaluations: Tensor) -> None:
        """Add ``(B,)`` evaluations that the driver did not make."""
        self.beyond = evaluations if self.beyond is None else self.beyond + evaluations

    def parts_well(self, rows: Tensor, y: Tensor, fy: Tensor) -> bool:
        """Whether ``f`` gives samples the same images with few others as in the whole batch.

        It does not where an input that belongs to samples is closed over and so stays behind,
        where one that does not was taken for one that does, or where ``f`` mixes the samples.  The
        first of ``rows`` is evaluated with each of the others in turn, so that no other can be
        the one that it is mixed with every time; alone, if there is but one other.
        """
        first, others = rows[:1], rows[1:]
        if len(others) < 2:
            return self._agrees(first, y, fy)
        return all(self._agrees(torch.cat((first, other)), y, fy) for other in others.split(1))

    def _agrees(self, rows: Tensor, y: Tensor, fy: Tensor) -> bool:
        """Whether the samples ``rows (k,)`` have the same images without the rest."""
        assert self.part is not None
        with torch.no_grad():
            try:
                alone = self.part(rows)(y.index_select(0, rows))
            except Exception:  # shapes that no longer fit, in whatever words f has for it
                return False
            once = torch.zeros_like(fy[:, 0], dtype=torch.int64)
            self.count(once.index_fill(0, rows, 1))
            difference = torch.linalg.vector_norm(alone - fy.index_select(0, rows))
            size = torch.linalg.vector_norm(fy.index_select(0, rows))
            return bool(difference <= self.agreement * size)

    def narrow(self, rows: Tensor) -> None:
        """Go on with these samples alone."""
        assert self.part is not None
        fewer = self.part(rows)
        self.f, self.part = fewer, fewer.part
        if self.beyond is not None:
            self.beyond = self.beyond.index_select(0, rows)

    def jvp(self, y: Tensor, v: Tensor) -> Tensor:
        """``J(y) v``; both ``(B, D)``."""
        if self.product is not None:
            return self.product(y, v)
        _load_forward_mode()
        try:
            return torch.func.jvp(self.f, (y,), (v,))[1]
        except (NotImplementedError, RuntimeError):
            return _transposed_twice(self.f, y, v)


@functools.cache
def _load_forward_mode() -> None:
    """Let torch load its forward-mode rules, of which it warns that it scripts them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.zeros(()),))


def _transposed_twice(f: Map, y: Tensor, v: Tensor) -> Tensor:
    """``J v`` as the derivative of ``u ↦ Jᵀu``, for maps with an operator of no forward mode."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        image = f(y)
        u = torch.zeros_like(image, requires_grad=True)
        if not image.requires_grad:
            return torch.zeros_like(v)
        (back,) = torch.autograd.grad(image, y, u, create_graph=True, allow_unused=True)
        if back is None or not back.requires_grad:
            return torch.zeros_like(v)
        (forward,) = torch.autograd.grad(back, u, v, allow_unused=True)
    return torch.zeros_like(v) if forward is None else forward
