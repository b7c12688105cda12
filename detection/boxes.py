"""Boxes: corners and positions, overlaps, and noise.

A box is four corner coordinates ``(x1, y1, x2, y2)`` in pixels; a position is
``(x, y, z, r)``, the centre in pixels with ``z = log2 √(wh)`` and ``r = log2 (h/w)`` (paper,
Eq. 3), so that ``w = 2^(z − r/2)`` and ``h = 2^(z + r/2)``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def encode_boxes(boxes: Tensor) -> Tensor:
    """Positions ``(..., 4)`` of boxes ``(..., 4)``.

    Side lengths count by their absolute value, so a box whose corners have changed places has the
    position of its orderly twin; 1e-7 px is added to them, so an empty box has a position too.

    Example:
        >>> encode_boxes(torch.tensor([10.0, 10.0, 42.0, 18.0])).tolist()
        [26.0, 14.0, 4.0, -2.0]
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    width = ((x2 - x1).abs() + 1e-7).log2()
    height = ((y2 - y1).abs() + 1e-7).log2()
    return torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, (width + height) / 2, height - width], dim=-1)


def decode_position(position: Tensor) -> Tensor:
    """Boxes ``(..., 4)`` of positions ``(..., 4)``; the inverse of `encode_boxes`.

    Example:
        >>> decode_position(torch.tensor([26.0, 14.0, 4.0, -2.0])).tolist()
        [10.0, 10.0, 42.0, 18.0]
    """
    half = 0.5 * side_lengths(position)
    centre = position[..., :2]
    return torch.cat([centre - half, centre + half], dim=-1)


def side_lengths(position: Tensor) -> Tensor:
    """Width and height ``(..., 2)`` in pixels of positions ``(..., 4)``.

    Example:
        >>> side_lengths(torch.tensor([0.0, 0.0, 4.0, -2.0])).tolist()
        [32.0, 8.0]
    """
    z, r = position[..., 2], position[..., 3]
    return torch.stack([z - 0.5 * r, z + 0.5 * r], dim=-1).exp2()


def intersection_over_foreground(boxes: Tensor) -> Tensor:
    """``IoF_ij = |b_i ∩ b_j| / |b_i|`` of boxes ``(B, N, 4)``, as ``(B, N, N)``.

    Row ``i`` is the attending query.  The area is never taken below 1e-6 px², also where corners
    have changed places and make it negative.

    Example:
        >>> boxes = torch.tensor([[[0.0, 0.0, 4.0, 4.0], [2.0, 0.0, 4.0, 4.0]]])
        >>> intersection_over_foreground(boxes).tolist()
        [[[1.0, 0.5], [1.0, 1.0]]]
    """
    low, high = boxes[..., :2], boxes[..., 2:]
    sides = torch.minimum(high[:, :, None], high[:, None]) - torch.maximum(
        low[:, :, None], low[:, None]
    )
    area = (high - low).prod(-1)
    return sides.clamp(min=0).prod(-1) / area.clamp(min=1e-6)[:, :, None]


def generalized_iou(a: Tensor, b: Tensor, eps: float = 1e-7) -> Tensor:
    """``GIoU = |a ∩ b| / |a ∪ b| − (|c| − |a ∪ b|) / |c|`` with the smallest box ``c`` around both.

    Rezatofighi et al., *Generalized intersection over union*, CVPR 2019.  Works elementwise with
    broadcasting: ``generalized_iou(a[:, :, None], b[:, None])`` compares all pairs.

    Args:
        a: boxes ``(..., 4)``.
        b: boxes ``(..., 4)``.
        eps: least area that is divided by, in the units of the areas.

    Returns:
        Values in [−1, 1], in the broadcast shape without the last dimension.

    Example:
        >>> a = torch.tensor([0.0, 0.0, 2.0, 2.0])
        >>> generalized_iou(a, a).item(), round(generalized_iou(a, a + 2).item(), 4)
        (1.0, -0.5)
    """
    low_a, high_a = a[..., :2], a[..., 2:]
    low_b, high_b = b[..., :2], b[..., 2:]
    overlap = (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp(min=0).prod(-1)
    union = (high_a - low_a).prod(-1) + (high_b - low_b).prod(-1) - overlap
    hull = (torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).clamp(min=0).prod(-1)
    union, hull = union.clamp(min=eps), hull.clamp(min=eps)
    return overlap / union - (hull - union) / hull


def perturb_boxes(boxes: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and boxes after noise on the corners (paper, §3.3).

    Corners may change places: the boxes are returned as they come, the position is that of the
    orderly twin.

    Args:
        boxes: ``(..., 4)`` corners in pixels.
        noise: ``(..., 4)`` pixels.

    Example:
        >>> position, boxes = perturb_boxes(
        ...     torch.tensor([0.0, 0.0, 4.0, 4.0]), torch.tensor([6.0, 0.0, 0.0, 0.0])
        ... )
        >>> boxes.tolist(), decode_position(position).round().tolist()
        ([6.0, 0.0, 4.0, 4.0], [4.0, 0.0, 6.0, 4.0])
    """
    noisy = boxes + noise
    return encode_boxes(noisy), noisy
