"""Adaptive 3D sampling: each query picks points in the feature pyramid (AdaMixer, CVPR 2022).

A pyramid is a space of three dimensions, the third being scale.  A point has a place ``(x, y)``
in pixels and a scale ``z`` in log2 pixels; it reads all levels bilinearly, weighted by how near
each level's own scale is to ``z``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detection.boxes import side_lengths

TAU = 2.0
"""Softness of the choice of levels."""


class Sampling3D(nn.Module):
    """Places points relative to a query's box and reads the features there.

    A linear layer gives offsets ``(Δx, Δy, Δz)`` for ``G`` channel groups of ``P`` points; the
    point is ``(x + Δx·w, y + Δy·h, z + Δz)``.

    Args:
        content_dim: channels of the content.
        groups: ``G``, channel groups of the features, each with points of its own.
        points: ``P`` per group.
        strides: of the pyramid's levels, in pixels.

    Example:
        >>> sampling = Sampling3D(16, groups=2, points=4, strides=(4, 8))
        >>> maps = [torch.randn(1, 6, 8, 8), torch.randn(1, 6, 4, 4)]
        >>> position = torch.tensor([16.0, 16.0, 3.0, 0.0]).expand(1, 5, 4)
        >>> sampling(torch.randn(1, 5, 16), position, maps).shape
        torch.Size([1, 5, 2, 4, 3])
    """

    def __init__(self, content_dim: int, groups: int, points: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.groups, self.points, self.strides = groups, points, tuple(strides)
        self.offset = nn.Linear(content_dim, groups * points * 3)
        nn.init.zeros_(self.offset.weight)
        with torch.no_grad():
            self.offset.bias.view(groups, points, 3).copy_(_initial_offsets(groups, points))

    def forward(self, content: Tensor, position: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Sampled features ``(B, N, G, P, C/G)``.

        Args:
            content: ``(B, N, content_dim)``.
            position: ``(B, N, 4)``.
            features: maps ``(B, C, H/s, W/s)``, one per stride ``s``.
        """
        return sample_pyramid(self.place(content, position), features, self.strides, self.groups)

    def place(self, content: Tensor, position: Tensor) -> Tensor:
        """Sampling points ``(B, N, G, P, 3)``: x, y in pixels, z in log2 pixels."""
        batch, queries, _ = content.shape
        offset = self.offset(content).view(batch, queries, self.groups * self.points, 3)
        scale = torch.cat([side_lengths(position), torch.ones_like(position[..., :1])], dim=-1)
        points = torch.addcmul(position[:, :, None, :3], offset, scale[:, :, None])
        return points.view(batch, queries, self.groups, self.points, 3)


def sample_pyramid(
    points: Tensor, features: Sequence[Tensor], strides: Sequence[int], groups: int
) -> Tensor:
    """Read a feature pyramid at points in it.

    The value of a point is ``Σ_l softmax_l(−(z − log2 s_l)²/τ) · bilinear(features_l, x, y)``
    with ``τ = 2``; outside of a map (its padding included in the map) features are zero.

    Args:
        points: ``(B, N, G, P, 3)``.
        features: maps ``(B, C, H_l, W_l)``; group ``g`` reads channels ``gC/G … (g+1)C/G``.
        strides: pixels per cell of each map.
        groups: ``G``.

    Returns:
        ``(B, N, G, P, C/G)`` in the dtype of the features; computed in the wider one of theirs
        and that of the points.

    Example:
        >>> maps = [torch.ones(1, 4, 8, 8), torch.ones(1, 4, 4, 4)]
        >>> points = torch.tensor([16.0, 16.0, 3.0]).expand(1, 2, 2, 5, 3)
        >>> sample_pyramid(points, maps, (4, 8), groups=2).unique().tolist()
        [1.0]
    """
    batch, queries, _, count, _ = points.shape
    x, y, z = points.permute(4, 0, 2, 1, 3).flatten(1, 2).unbind(0)
    # Strides and extents stay Python numbers: a tensor made of them would have to be copied to
    # the device at every call.  Levels come first: the softmax then runs along rows of points.
    distance = torch.stack([z - math.log2(stride) for stride in strides])
    weights = (distance.square() * (-1 / TAU)).softmax(dim=0).unbind(0)
    # Coordinates in bfloat16 would miss by pixels.
    dtype = torch.promote_types(points.dtype, features[0].dtype)
    grids: dict[tuple[int, int], Tensor] = {}
    total: Tensor | None = None
    for stride, feature, weight in zip(strides, features, weights, strict=True):
        height, width = feature.shape[-2:]
        extent = (width * stride, height * stride)
        if extent not in grids:
            place = (x * (2 / extent[0]) - 1, y * (2 / extent[1]) - 1)
            grids[extent] = torch.stack(place, dim=-1).to(dtype)
        by_group = feature.to(dtype).reshape(batch * groups, -1, height, width)
        sampled = F.grid_sample(by_group, grids[extent], align_corners=False) * weight[:, None]
        total = sampled if total is None else total + sampled
    assert total is not None
    total = total.view(batch, groups, -1, queries, count).permute(0, 3, 1, 4, 2)
    return total.to(features[0].dtype)


def _initial_offsets(groups: int, points: int) -> Tensor:
    """A regular grid of cell centres for a square number of points, else at random; z at −1."""
    side = math.isqrt(points)
    if side * side == points:
        line = (torch.arange(side) + 0.5) / side - 0.5
        rows, columns = torch.meshgrid(line, line, indexing="ij")
        place = torch.stack([columns, rows], dim=-1).view(1, points, 2).repeat(groups, 1, 1)
    else:
        place = torch.rand(groups, points, 2) - 0.5
    return torch.cat([place, torch.full((groups, points, 1), -1.0)], dim=-1)
