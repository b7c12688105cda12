"""Adaptive 3D sampling on a GPU: four levels, four corners and all weights in one kernel.

The same numbers as `detection.decoder.sampling.sample_pyramid`, which is its reference and its
fallback.  Composed of torch's operators, the sampling of one refinement takes some forty kernels
and writes every level's samples to memory before they are added up; here a program reads the rows
of sixteen cells for each of its points and writes one row.  Maps have their channels last, so a row
is one run of memory.

The gradients of the maps are added up by atomic operations, in an order of chance: not under
`torch.use_deterministic_algorithms`, where `sample_pyramid` goes another way.

It needs Triton, four levels, and a power of two of channels in a group.  Triton's interpreter
(``TRITON_INTERPRET=1``) runs it on a CPU, which is how it is tested where there is no GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

LEVELS = 4
BLOCK = 16
"""Points of one program."""


def fits(points: Tensor, features: Sequence[Tensor], groups: int) -> bool:
    """Whether the kernel can do it."""
    channels = features[0].shape[1] // groups
    return (
        len(features) == LEVELS
        and points.dtype == torch.float32
        and features[0].shape[1] % groups == 0
        and channels >= 16
        and channels & (channels - 1) == 0
    )


def sample(
    points: Tensor, features: Sequence[Tensor], strides: Sequence[int], groups: int
) -> Tensor:
    """`detection.decoder.sampling.sample_pyramid` for what `fits`.

    Args:
        points: ``(B, N, G, P, 3)`` float32.
        features: four maps ``(B, C, H_l, W_l)`` in ``torch.channels_last``.
        strides: pixels per cell of each map.
        groups: ``G``.
    """
    sampled: Tensor = _Sample.apply(points.contiguous(), tuple(strides), groups, *features)
    return sampled


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, points: Tensor, strides: tuple[int, ...], groups: int, *features: Tensor
    ) -> Tensor:
        ctx.save_for_backward(points, *features)
        ctx.strides, ctx.groups = strides, groups
        channels = features[0].shape[1] // groups
        out = torch.empty(
            *points.shape[:4], channels, dtype=features[0].dtype, device=points.device
        )
        number = points.shape[:4].numel()
        if number:
            with torch.cuda.device_of(points):
                _forward[(triton.cdiv(number, BLOCK),)](
                    points, *features, out, *_numbers(points, features, strides), channels, BLOCK
                )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        points, *features = ctx.saved_tensors
        for_points = torch.zeros_like(points)
        maps = any(ctx.needs_input_grad[3:])
        if maps and torch.are_deterministic_algorithms_enabled():
            _refuse_or_warn()
        # Atomic additions need float32; the layout is that of the maps.
        for_maps = [
            torch.zeros_like(feature, dtype=torch.float32, memory_format=torch.channels_last)
            if maps
            else points  # which is not written to
            for feature in features
        ]
        number = points.shape[:4].numel()
        if number:
            with torch.cuda.device_of(points):
                _backward[(triton.cdiv(number, BLOCK),)](
                    points,
                    *features,
                    gradient.contiguous(),
                    for_points,
                    *for_maps,
                    *_numbers(points, features, ctx.strides),
                    gradient.shape[-1],
                    maps,
                    BLOCK,
                )
        wanted = zip(for_maps, features, ctx.needs_input_grad[3:], strict=True)
        return (
            for_points,
            None,
            None,
            *(found.to(feature.dtype) if asked else None for found, feature, asked in wanted),
        )


def _refuse_or_warn() -> None:
    """As torch does of its own operators; here only what was begun without asking comes by."""
    message = (
        "The gradient of the maps in detection.decoder.triton_sampling has no deterministic "
        "implementation, and torch.use_deterministic_algorithms was set after the forward pass: "
        "set it before."
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)


def _numbers(
    points: Tensor, features: Sequence[Tensor], strides: Sequence[int]
) -> tuple[int | float, ...]:
    """Points in all, per image and per group; groups; and each map's height, width and stride."""
    _, queries, groups, count, _ = points.shape
    sizes = [(*feature.shape[-2:], float(s)) for feature, s in zip(features, strides, strict=True)]
    per_image = queries * groups * count
    return (points.shape[0] * per_image, per_image, count, groups, *(n for s in sizes for n in s))


@triton.jit
def _axis(place, stride, cells):  # type: ignore[no-untyped-def]
    """First of two cells around a place, and how far beyond its centre that is."""
    centre = place / stride - 0.5
    # Further out than a cell both are outside, and stay so here.  By comparison and not as a
    # minimum: what is not a number goes outside, too.
    centre = tl.where(centre > -2.0, centre, -2.0)
    centre = tl.where(centre < cells, centre, cells * 1.0)
    first = tl.floor(centre)
    return first.to(tl.int32), centre - first


@triton.jit
def _corner(row, column, height, width, image, group, groups, live):  # type: ignore[no-untyped-def]
    """Row of the table for a cell, and whether there is such a cell."""
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & live
    index = ((image * height + row) * width + column).to(tl.int64) * groups + group
    return tl.where(inside, index, 0), inside


@triton.jit
def _read(table, index, inside, channel, E: tl.constexpr):  # type: ignore[no-untyped-def]
    place = table + index[:, None] * E + channel[None, :]
    return tl.load(place, mask=inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def _level(  # type: ignore[no-untyped-def]
    table, x, y, image, group, groups, live, height, width, stride, channel, E: tl.constexpr
):
    """Bilinear samples of one level."""
    row, down = _axis(y, stride, height)
    column, right = _axis(x, stride, width)
    i, inside = _corner(row, column, height, width, image, group, groups, live)
    total = _read(table, i, inside, channel, E) * ((1 - down) * (1 - right))[:, None]
    i, inside = _corner(row, column + 1, height, width, image, group, groups, live)
    total += _read(table, i, inside, channel, E) * ((1 - down) * right)[:, None]
    i, inside = _corner(row + 1, column, height, width, image, group, groups, live)
    total += _read(table, i, inside, channel, E) * (down * (1 - right))[:, None]
    i, inside = _corner(row + 1, column + 1, height, width, image, group, groups, live)
    total += _read(table, i, inside, channel, E) * (down * right)[:, None]
    return total


@triton.jit
def _point(points, i, live, per_image, count, groups):  # type: ignore[no-untyped-def]
    """Coordinates of the points ``i``, and whose image and group they are of."""
    x = tl.load(points + 3 * i, mask=live, other=0.0)
    y = tl.load(points + 3 * i + 1, mask=live, other=0.0)
    z = tl.load(points + 3 * i + 2, mask=live, other=0.0)
    return x, y, z, i // per_image, (i // count) % groups


@triton.jit
def _weights(z, s0, s1, s2, s3):  # type: ignore[no-untyped-def]
    """Softmax over the levels of ``−(z − log2 s)²/2``, and each level's ``−(z − log2 s)``."""
    a0, a1, a2, a3 = tl.log2(s0) - z, tl.log2(s1) - z, tl.log2(s2) - z, tl.log2(s3) - z
    e0, e1, e2, e3 = -0.5 * a0 * a0, -0.5 * a1 * a1, -0.5 * a2 * a2, -0.5 * a3 * a3
    top = tl.maximum(tl.maximum(e0, e1), tl.maximum(e2, e3))
    e0, e1, e2, e3 = tl.exp(e0 - top), tl.exp(e1 - top), tl.exp(e2 - top), tl.exp(e3 - top)
    total = e0 + e1 + e2 + e3
    return e0 / total, e1 / total, e2 / total, e3 / total, a0, a1, a2, a3


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    points, f0, f1, f2, f3, out,
    number, per_image, count, groups,
    h0, w0, s0, h1, w1, s1, h2, w2, s2, h3, w3, s3,
    E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live, channel = i < number, tl.arange(0, E)
    x, y, z, image, group = _point(points, i, live, per_image, count, groups)
    p0, p1, p2, p3, _a0, _a1, _a2, _a3 = _weights(z, s0 + z * 0, s1 + z * 0, s2 + z * 0, s3 + z * 0)
    total = _level(f0, x, y, image, group, groups, live, h0, w0, s0, channel, E) * p0[:, None]
    total += _level(f1, x, y, image, group, groups, live, h1, w1, s1, channel, E) * p1[:, None]
    total += _level(f2, x, y, image, group, groups, live, h2, w2, s2, channel, E) * p2[:, None]
    total += _level(f3, x, y, image, group, groups, live, h3, w3, s3, channel, E) * p3[:, None]
    place = out + i.to(tl.int64)[:, None] * E + channel[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=live[:, None])


@triton.jit
def _level_backward(  # type: ignore[no-untyped-def]
    table, into, gradient, share, x, y, image, group, groups, live, height, width, stride, channel,
    E: tl.constexpr, MAPS: tl.constexpr,
):  # fmt: skip
    """⟨gradient, samples⟩ of one level, and its derivatives; adds to the gradient of the map."""
    row, down = _axis(y, stride, height)
    column, right = _axis(x, stride, width)
    value, in_x, in_y = share * 0, share * 0, share * 0
    for corner in tl.static_range(4):
        r, c = corner // 2, corner % 2
        i, inside = _corner(row + r, column + c, height, width, image, group, groups, live)
        along_y = down if r == 1 else 1 - down
        along_x = right if c == 1 else 1 - right
        met = tl.sum(_read(table, i, inside, channel, E) * gradient, axis=1)
        value += along_y * along_x * met
        in_x += along_y * met * (2 * c - 1)
        in_y += along_x * met * (2 * r - 1)
        if MAPS:
            part = gradient * (share * along_y * along_x)[:, None]
            place = into + i[:, None] * E + channel[None, :]
            # Nobody reads it before the kernel has ended: no order is needed among the additions.
            tl.atomic_add(place, part, mask=inside[:, None], sem="relaxed")
    return value, in_x / stride, in_y / stride


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    points, f0, f1, f2, f3, gradient, for_points, g0, g1, g2, g3,
    number, per_image, count, groups,
    h0, w0, s0, h1, w1, s1, h2, w2, s2, h3, w3, s3,
    E: tl.constexpr, MAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live, channel = i < number, tl.arange(0, E)
    x, y, z, image, group = _point(points, i, live, per_image, count, groups)
    place = gradient + i.to(tl.int64)[:, None] * E + channel[None, :]
    g = tl.load(place, mask=live[:, None], other=0.0).to(tl.float32)
    p0, p1, p2, p3, a0, a1, a2, a3 = _weights(z, s0 + z * 0, s1 + z * 0, s2 + z * 0, s3 + z * 0)
    v0, x0, y0 = _level_backward(
        f0, g0, g, p0, x, y, image, group, groups, live, h0, w0, s0, channel, E, MAPS
    )
    v1, x1, y1 = _level_backward(
        f1, g1, g, p1, x, y, image, group, groups, live, h1, w1, s1, channel, E, MAPS
    )
    v2, x2, y2 = _level_backward(
        f2, g2, g, p2, x, y, image, group, groups, live, h2, w2, s2, channel, E, MAPS
    )
    v3, x3, y3 = _level_backward(
        f3, g3, g, p3, x, y, image, group, groups, live, h3, w3, s3, channel, E, MAPS
    )
    # d softmax_l/dz = p_l (a_l − Σ p a), with a_l = log2 s_l − z.
    mean = p0 * a0 + p1 * a1 + p2 * a2 + p3 * a3
    in_z = p0 * v0 * (a0 - mean) + p1 * v1 * (a1 - mean)
    in_z += p2 * v2 * (a2 - mean) + p3 * v3 * (a3 - mean)
    tl.store(for_points + 3 * i, p0 * x0 + p1 * x1 + p2 * x2 + p3 * x3, mask=live)
    tl.store(for_points + 3 * i + 1, p0 * y0 + p1 * y1 + p2 * y2 + p3 * y3, mask=live)
    tl.store(for_points + 3 * i + 2, in_z, mask=live)
