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
from detection.decoder.recomputation import forgetting

try:  # comes with the CUDA builds of torch on Linux
    from detection.decoder import triton_sampling
except ImportError:
    triton_sampling = None  # type: ignore[assignment]

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

    Maps with their channels last (``torch.channels_last``) are read faster, since the channels of
    a cell then lie side by side: on a CPU as rows of a table, on a GPU by one kernel
    (`detection.decoder.triton_sampling`).  The gradients of the maps are sums in an order of
    chance there, so under `torch.use_deterministic_algorithms` they are read as rows where these
    are wanted.  What other maps need for the backward pass is computed
    again there where it is much (`detection.decoder.recomputation`).

    Args:
        points: ``(B, N, G, P, 3)``.
        features: maps ``(B, C, H_l, W_l)``; group ``g`` reads channels ``gC/G … (g+1)C/G``.
        strides: pixels per cell of each map.
        groups: ``G``.

    Returns:
        ``(B, N, G, P, C/G)`` in the dtype of the features.  Places in the maps are computed in
        the wider dtype of theirs and that of the points.

    Example:
        >>> maps = [torch.ones(1, 4, 8, 8), torch.ones(1, 4, 4, 4)]
        >>> points = torch.tensor([16.0, 16.0, 3.0]).expand(1, 2, 2, 5, 3)
        >>> sample_pyramid(points, maps, (4, 8), groups=2).unique().tolist()
        [1.0]
    """
    # Coordinates in bfloat16 would miss by pixels.
    points = points.to(torch.promote_types(points.dtype, features[0].dtype))
    if all(map(_has_channels_last, features)):
        if points.is_cpu or _must_repeat(features):
            return _read_rows(points, features, strides)
        if triton_sampling is not None and triton_sampling.fits(points, features, groups):
            return triton_sampling.sample(points, features, strides, groups)
    samples = points[..., 0].numel() * features[0].shape[1] // groups
    return forgetting(_read_maps, points, strides, *features, elements=samples * len(features))


def _level_weights(z: Tensor, strides: Sequence[int]) -> Tensor:
    """What each level counts for, ``(L, …)``, at scales ``z``."""
    # Strides stay Python numbers: a tensor made of them would have to be copied to the device.
    # Levels come first: the softmax then runs along rows of points.
    distance = torch.stack([z - math.log2(stride) for stride in strides])
    return (distance.square() * (-1 / TAU)).softmax(dim=0)


def _read_maps(points: Tensor, strides: Sequence[int], *features: Tensor) -> Tensor:
    """Read maps of any memory format, with torch's own bilinear sampling."""
    batch, queries, groups, count, _ = points.shape
    x, y, z = points.permute(4, 0, 2, 1, 3).flatten(1, 2).unbind(0)
    grids: dict[tuple[int, int], Tensor] = {}
    total: Tensor | None = None
    for stride, feature, weight in zip(strides, features, _level_weights(z, strides), strict=True):
        height, width = feature.shape[-2:]
        extent = (width * stride, height * stride)
        if extent not in grids:
            grids[extent] = torch.stack([x * (2 / extent[0]) - 1, y * (2 / extent[1]) - 1], dim=-1)
        by_group = feature.to(points.dtype).reshape(batch * groups, -1, height, width)
        sampled = F.grid_sample(by_group, grids[extent], align_corners=False)
        weight = weight[:, None]
        total = sampled.mul_(weight) if total is None else total.addcmul_(sampled, weight)
    assert total is not None
    total = total.view(batch, groups, -1, queries, count).permute(0, 3, 1, 4, 2)
    return total.to(features[0].dtype)


def _has_channels_last(feature: Tensor) -> bool:
    return feature.is_contiguous(memory_format=torch.channels_last)


def _must_repeat(features: Sequence[Tensor]) -> bool:
    """Whether the gradients of the maps must be the same bits each time."""
    wanted = torch.is_grad_enabled() and any(feature.requires_grad for feature in features)
    return wanted and torch.are_deterministic_algorithms_enabled()


def _read_rows(points: Tensor, features: Sequence[Tensor], strides: Sequence[int]) -> Tensor:
    """Read maps whose channels lie side by side: a weighted sum of four rows for each level.

    A map is then a table with a row of ``C/G`` numbers for each cell and group.  Tensors are made
    of Python numbers here, for which a GPU waits; it comes here only to be deterministic.
    """
    batch, queries, groups, count, _ = points.shape
    device = points.device
    x, y, z = points.flatten(0, 3).T.contiguous()
    sizes = [feature.shape[-2:] for feature in features]
    shape = torch.tensor(sizes, dtype=torch.int32, device=device)
    cells, weights = _neighbours(torch.stack([y, x]), strides, shape[..., None])
    # Every tensor from here on is (L, rows, columns, points): the longest loop is the inner one.
    height, width = shape.view(-1, 2, 1, 1, 1).unbind(1)
    row, column = cells[:, 0, :, None], cells[:, 1, None]
    image = torch.arange(batch, dtype=torch.int32, device=device)
    image = image.repeat_interleave(queries * groups * count)
    group = torch.arange(groups, dtype=torch.int32, device=device)
    group = group.repeat_interleave(count).repeat(batch * queries)
    index = ((row + image * height) * width + column) * groups + group
    level = _level_weights(z, strides)[:, None]
    weights = (weights[:, 0] * level)[:, :, None] * weights[:, 1, None]
    total: Tensor | None = None
    for feature, index_here, weight in zip(features, index, weights, strict=True):
        table = feature.permute(0, 2, 3, 1).reshape(-1, feature.shape[1] // groups)
        read = F.embedding_bag(
            index_here.flatten(0, 1).T,
            table,
            per_sample_weights=weight.flatten(0, 1).T.to(table.dtype),
            mode="sum",
        )
        total = read if total is None else total.add_(read)
    assert total is not None
    return total.view(batch, queries, groups, count, -1)


def _neighbours(places: Tensor, strides: Sequence[int], shape: Tensor) -> tuple[Tensor, Tensor]:
    """The cells around points, two along each axis, and what they count for: ``(L, 2, 2, n)``.

    A cell outside of the map counts nothing, and stands for one that is inside.

    Args:
        places: ``(2, n)`` in pixels, by axis.
        strides: of the maps.
        shape: ``(L, 2, 1)`` int32, of the maps.
    """
    per_pixel = places.new_tensor([1 / stride for stride in strides])
    # The centre of a cell is half a cell in.  More than a cell outside, nothing counts.
    centre = torch.minimum(places * per_pixel[:, None, None] - 0.5, shape).clamp_min(-1)
    first = centre.detach().floor()
    after = centre - first
    first = first.to(torch.int32)
    cells = torch.stack([first, first + 1], dim=2)
    shape = shape[..., None]
    outside = (cells < 0) | (cells >= shape)
    weights = torch.stack([1 - after, after], dim=2).masked_fill(outside, 0)
    # A place that is not a number has no cell: so these are integers when they are clamped.
    return torch.minimum(cells.clamp_(min=0), shape - 1), weights


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
