"""Detections of one image, and how they are read off a decoder's output.

A set predictor needs no suppression of overlaps: every (query, class) pair is a candidate, and the
highest sigmoid scores are the detections (Zhu et al., *Deformable DETR*, ICLR 2021, whose
selection AdaMixer and DEQDet share).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detection.data.types import Categories


@dataclass(frozen=True, eq=False)
class Detections:
    """What was found in one image, the surest first.

    Attributes:
        boxes: ``(K, 4)`` float32, xyxy in pixels of the original image; not clipped to it.
        scores: ``(K,)`` float32 in [0, 1], falling.
        labels: ``(K,)`` int64, contiguous class indices.

    Raises:
        ValueError: if the shapes do not belong together.

    Example:
        >>> found = Detections(torch.zeros(2, 4), torch.tensor([0.9, 0.2]), torch.tensor([1, 0]))
        >>> len(found), len(found.above(0.5))
        (2, 1)
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        count = self.scores.shape[0] if self.scores.ndim == 1 else -1
        if self.boxes.shape != (count, 4) or self.labels.shape != (count,):
            raise ValueError(
                "Detections: boxes, scores and labels must be (K, 4), (K,) and (K,), not "
                f"{tuple(self.boxes.shape)}, {tuple(self.scores.shape)} and "
                f"{tuple(self.labels.shape)}."
            )

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, threshold: float) -> Detections:
        """Those with a score of at least ``threshold``."""
        keep = self.scores >= threshold
        return Detections(self.boxes[keep], self.scores[keep], self.labels[keep])

    def to_coco(self, image_id: int, categories: Categories) -> list[dict[str, Any]]:
        """COCO result records: ``[x, y, w, h]`` boxes and the original category ids.

        Example:
            >>> found = Detections(
            ...     torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.tensor([0.5]), torch.tensor([1])
            ... )
            >>> found.to_coco(7, Categories(("cat", "dog"), (17, 18)))
            [{'image_id': 7, 'category_id': 18, 'bbox': [1.0, 2.0, 3.0, 6.0], 'score': 0.5}]
        """
        corners = self.boxes.double()
        boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
        return [
            {
                "image_id": image_id,
                "category_id": categories.ids[label],
                "bbox": box,
                "score": score,
            }
            for box, score, label in zip(
                boxes, self.scores.tolist(), self.labels.tolist(), strict=True
            )
        ]


def select_detections(
    logits: Tensor,
    boxes: Tensor,
    sizes: Tensor,
    original_sizes: Sequence[tuple[int, int]],
    max_detections: int = 100,
) -> list[Detections]:
    """The highest scores over queries and classes; a query may yield several classes.

    No threshold and no suppression of overlaps.  Equal scores keep the order of queries and
    classes, so the result does not depend on the device's sorting.

    Args:
        logits: ``(B, N, K)``.
        boxes: ``(B, N, 4)`` xyxy in pixels of the transformed images.
        sizes: ``(B, 2)`` (h, w) of the transformed images without padding.
        original_sizes: (h, w) of the files.
        max_detections: at most so many per image.

    Returns:
        One `Detections` per image, on the CPU.

    Raises:
        ValueError: if a shape does not fit, ``max_detections`` is below 1, or a score or a box to
            be returned is not finite; the image is named by its place in the batch.

    Example:
        >>> logits = torch.tensor([[[0.0, 2.0], [-1.0, 1.0]]])
        >>> boxes = torch.tensor([[[0.0, 0.0, 8.0, 8.0], [4.0, 4.0, 8.0, 8.0]]])
        >>> found = select_detections(logits, boxes, torch.tensor([[8, 8]]), [(16, 16)], 2)[0]
        >>> found.labels.tolist(), found.boxes[1].tolist()
        ([1, 1], [8.0, 8.0, 16.0, 16.0])
    """
    batch, queries, classes = logits.shape
    if boxes.shape != (batch, queries, 4) or not batch == len(sizes) == len(original_sizes):
        raise ValueError(
            f"select_detections: logits {tuple(logits.shape)}, boxes {tuple(boxes.shape)}, "
            f"{len(sizes)} sizes and {len(original_sizes)} original sizes do not belong together; "
            "they must be (B, N, K), (B, N, 4), B and B."
        )
    if max_detections < 1:
        raise ValueError(f"max_detections={max_detections}: must be at least 1.")
    scores = logits.float().sigmoid().flatten(1)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :max_detections]
    original = torch.tensor(original_sizes, device=sizes.device)
    scale = (original / sizes).flip(1).repeat(1, 2).to(boxes.device)
    picked = (boxes.float() * scale[:, None]).gather(
        1, (order // classes)[:, :, None].expand(-1, -1, 4)
    )
    picked, top, labels = picked.cpu(), scores.gather(1, order).cpu(), (order % classes).cpu()
    # NaN sorts first, so a score that is not a number is always among those picked.
    finite = picked.isfinite().all(-1) & top.isfinite()
    if not finite.all():
        place = int((~finite).any(1).nonzero()[0])
        raise ValueError(
            f"The model gave scores or boxes that are not finite for image {place} of the batch: "
            "its weights are damaged or its refinement diverges. Use an earlier checkpoint."
        )
    return [Detections(*found) for found in zip(picked, top, labels, strict=True)]
