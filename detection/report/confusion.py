"""What a detector took for what: true objects and detections, paired one to one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from detection.detections import Detections

IOU = 0.5
"""Least overlap of a pair."""


@dataclass(frozen=True)
class Pairs:
    """How the detections of one image, from a score on, stand to its objects.

    Attributes:
        true: ``(n,)`` int64 classes; the number of classes stands for "nothing there".
        found: ``(n,)`` int64 classes; the number of classes stands for "missed".
    """

    true: Tensor
    found: Tensor

    @property
    def mistakes(self) -> int:
        """Objects that were missed or taken for another class, and detections of nothing."""
        return int((self.true != self.found).sum())


def pair(
    detections: Detections,
    boxes: Tensor,
    labels: Tensor,
    classes: int,
    *,
    threshold: float,
    crowds: Tensor | None = None,
) -> Pairs:
    """Pair detections with objects, the surest first, each with the one that it overlaps most.

    First those of one class, as in COCO's metrics; then what is left, whatever its class.  A
    detection that has no object and lies in a crowd region with more than half its area is
    neither right nor wrong.

    Args:
        detections: of one image.
        boxes: ``(G, 4)`` true boxes, xyxy in pixels of the original image.
        labels: ``(G,)`` their classes.
        classes: how many there are.
        threshold: lowest score that counts.
        crowds: ``(C, 4)`` boxes of crowd regions.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]])
        >>> found = Detections(boxes[:1] + 1, torch.tensor([0.9]), torch.tensor([2]))
        >>> pairs = pair(found, boxes, torch.tensor([1, 0]), 3, threshold=0.5)
        >>> pairs.true.tolist(), pairs.found.tolist(), pairs.mistakes
        ([1, 0], [2, 3], 2)
    """
    shown = detections.above(threshold)
    overlap = box_iou(shown.boxes, boxes.to(shown.boxes))
    same = shown.labels[:, None] == labels
    partner = torch.full((len(shown),), -1)
    free = torch.ones(len(labels), dtype=torch.bool)
    for allowed in (same, torch.ones_like(same)):
        for row in range(len(shown) if len(labels) else 0):
            candidates = torch.where(allowed[row] & free, overlap[row], -1.0)
            best = int(candidates.argmax())
            if partner[row] < 0 and candidates[best] >= IOU:
                partner[row], free[best] = best, False
    paired = partner >= 0
    alone = ~paired
    if crowds is not None and len(crowds):
        alone &= ~_inside(shown.boxes, crowds.to(shown.boxes))
    nothing, missed = (torch.full((int(n),), classes) for n in (alone.sum(), free.sum()))
    return Pairs(
        torch.cat([labels[partner[paired]], nothing, labels[free]]),
        torch.cat([shown.labels[paired], shown.labels[alone], missed]),
    )


def confusion_matrix(pairs: Sequence[Pairs], classes: int) -> Tensor:
    """``(classes + 1, classes + 1)`` int64 counts; rows are true, columns found.

    The last row counts detections of nothing, the last column objects that were missed.

    Example:
        >>> pairs = Pairs(torch.tensor([0, 1, 2]), torch.tensor([0, 2, 1]))
        >>> confusion_matrix([pairs], 2).tolist()
        [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    """
    counts = torch.zeros(classes + 1, classes + 1, dtype=torch.int64)
    for image in pairs:
        one = torch.ones_like(image.true)
        counts.index_put_((image.true, image.found), one, accumulate=True)
    return counts


def _inside(boxes: Tensor, regions: Tensor) -> Tensor:
    """``(K,)`` whether more than half of a box lies in one of the regions."""
    corners = torch.maximum(boxes[:, None, :2], regions[:, :2])
    ends = torch.minimum(boxes[:, None, 2:], regions[:, 2:])
    common = (ends - corners).clamp(min=0).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(-1)
    return (common > IOU * area[:, None]).any(1)
