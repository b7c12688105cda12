"""Sinusoidal embedding of a query's position."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class PositionEmbedding(nn.Module):
    """``(x/1000, y/1000, z, r)``, each as sines and cosines of falling frequency, side by side.

    Frequency ``i`` of a coordinate is ``10000^(−2⌊i/2⌋/(C/4))``; even ``i`` is a sine, odd a
    cosine.  No parameters, no gradient.  The frequencies are those of float32 whatever the dtype of
    the module, as in the published weights' training; the embedding is in the dtype of the
    position, float32 at least.

    Args:
        content_dim: ``C``, a multiple of 8.

    Example:
        >>> PositionEmbedding(16)(torch.zeros(2, 3, 4)).shape
        torch.Size([2, 3, 16])
    """

    periods: Tensor
    unit: Tensor

    def __init__(self, content_dim: int) -> None:
        super().__init__()
        if content_dim % 8:
            raise ValueError(f"PositionEmbedding({content_dim}): must be a multiple of 8.")
        per_coordinate = content_dim // 4
        exponent = torch.arange(0, per_coordinate, 2, dtype=torch.float32) / per_coordinate
        self.register_buffer("periods", 10000.0**exponent, persistent=False)
        self.register_buffer("unit", torch.tensor([1e3, 1e3, 1.0, 1.0]), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PositionEmbedding:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            applied = getattr(self, name)
            if applied.dtype != buffer.dtype:  # moved, and not cast
                setattr(self, name, buffer.to(applied.device))
        return self

    @torch.no_grad()
    def forward(self, position: Tensor) -> Tensor:
        """Embedding ``(B, N, C)`` of positions ``(B, N, 4)``."""
        angle = (position / self.unit)[..., None] / self.periods
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-3)
