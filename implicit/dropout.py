"""Dropout with one mask for a whole solve.

Y. Gal and Z. Ghahramani, *A theoretically grounded application of dropout in recurrent neural
networks*, NeurIPS 2016: the same units are dropped at every step of a recurrence.  A fixed point
needs this more than a recurrence does: with a new mask at every evaluation it does not exist.
"""

from __future__ import annotations

import torch
from torch import Tensor

from implicit.arguments import check_number
from implicit.per_solve import PerSolve


class SolveDropout(PerSolve):
    """Zeroes the same random elements of every sample throughout a solve, and scales the rest.

    A new mask is drawn in the first training call of each solve (see `renew`), in the shape of one
    sample, and holds until the next solve begins.  What is evaluated after a solve, such as
    `jacobian_penalty`, therefore sees the map that was solved.  The backward pass of each call has
    the mask of that call, however often the layer is used.  In evaluation mode it is the identity.

    The mask is shared by the samples of the batch, since these may leave a solve one by one.  For a
    mask per sample, make it an argument of ``f``, which leaves with its sample:
    ``mask = torch.nn.functional.dropout(torch.ones_like(y0), p)`` and ``args=(x, mask)``.

    Activation checkpointing: `RAG` ``(k, recompute=True)`` computes again with the mask of its
    solve.  Put a checkpoint of your own around the solve, not inside ``f``, where what is computed
    again may meet the mask of a later solve.

    Args:
        p: probability in [0, 1) of an element being zeroed; the others are divided by ``1 − p``.

    Raises:
        RuntimeError: in training mode, if no solve was ever announced.
        ValueError: if ``p`` is out of range, or the shape of a sample changes within a solve (use
            one `SolveDropout` for each place).

    Example:
        >>> import torch, implicit
        >>> class Cell(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear, self.dropout = torch.nn.Linear(4, 4), SolveDropout(0.5)
        ...     def forward(self, y, x):
        ...         return self.dropout(torch.tanh(0.3 * self.linear(y) + x))
        >>> layer = implicit.FixedPoint(Cell())
        >>> solution = layer(torch.zeros(2, 4), torch.randn(2, 4))
        >>> bool(solution.converged.all())
        True
    """

    per_solve = ("announced", "kept")

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        check_number("SolveDropout", "p", p, least=0, below=1)
        self.p = p
        self.announced = False
        self.kept: Tensor | None = None

    def renew(self) -> None:
        self.announced, self.kept = True, None

    def forward(self, x: Tensor) -> Tensor:
        """``x (B, ...)`` with elements dropped, in its own dtype."""
        if not self.training or self.p == 0:
            return x
        if not self.announced:
            raise RuntimeError(
                "SolveDropout draws one mask for each solve, and no solve was announced. Pass the "
                "module that holds it as f itself, not inside a function, or call "
                "implicit.renew(module) before each solve."
            )
        if self.kept is None:
            self.kept = torch.rand(x.shape[1:], device=x.device) >= self.p
        if self.kept.shape != x.shape[1:]:
            raise ValueError(
                f"SolveDropout met samples of shape {tuple(self.kept.shape)} and then of "
                f"{tuple(x.shape[1:])} in one solve: use one SolveDropout for each place."
            )
        return torch.where(self.kept, x / (1 - self.p), 0)

    def extra_repr(self) -> str:
        return f"p={self.p}"
