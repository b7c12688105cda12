"""Which query answers for which object: the optimal one-to-one assignment of each image.

Set prediction (DETR, Carion et al. 2020): predictions and objects are paired so that the sum of
the pairwise costs is smallest, by the Hungarian method.  The cost has the terms of the loss: a
focal term for the class, the L1 distance of the corners, and the generalised IoU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import softplus
from torch.nn.utils.rnn import pad_sequence

from detection.boxes import generalized_iou

if TYPE_CHECKING:
    from detection.data.types import Target


class NonFiniteCost(FloatingPointError):
    """A prediction or a box is not finite, so no assignment exists; names the images."""


@dataclass(frozen=True)
class MatchingCost:
    """Weights of the terms of the pairwise cost, and the two constants of the focal term.

    Example:
        >>> MatchingCost(l1=0.0).giou
        2.0
    """

    classification: float = 2.0
    l1: float = 5.0
    giou: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0

    def __post_init__(self) -> None:
        check_weights(self)


class Matches(NamedTuple):
    """Pairs of a query and an object, as three int64 tensors ``(M,)`` on the device.

    ``boxes[batch_index, query_index]`` are the matched boxes, and ``target_index`` counts through
    the objects of all images one after the other: ``torch.cat([t.boxes ...])[target_index]``.
    """

    batch_index: Tensor
    query_index: Tensor
    target_index: Tensor


class Matcher:
    """Matches the predictions for one batch, as often as they are made.

    Args:
        targets: the objects of each image; images without objects are fine.
        sizes: ``(B, 2)`` height and width of the unpadded images, pixels.
        cost: the weights.
    """

    def __init__(
        self, targets: Sequence[Target], sizes: Tensor, cost: MatchingCost | None = None
    ) -> None:
        self.cost = cost or MatchingCost()
        self.image_ids = tuple(target.image_id for target in targets)
        self.counts = tuple(len(target.labels) for target in targets)
        self.labels = pad_sequence([target.labels for target in targets], batch_first=True)
        self.boxes = pad_sequence([target.boxes for target in targets], batch_first=True)
        self.extent = image_extent(sizes)[:, None, None]

    @torch.no_grad()
    def costs(self, logits: Tensor, boxes: Tensor) -> Tensor:
        """Pairwise costs ``(B, N, G)``, ``G`` being the largest number of objects in an image.

        ``λ_c (α f(−x) − (1−α) f(x)) + λ_1 ‖(b − b')/(w,h,w,h)‖₁ − λ_g GIoU(b, b')`` with `focal`
        ``f`` and the logit ``x`` of the object's class.  Columns beyond an image's objects are
        padding.
        """
        cost, labels = self.cost, self.labels[:, None].expand(-1, logits.shape[1], -1)
        x = single_precision_or_better(logits).gather(2, labels)
        on, off = cost.alpha * focal(-x, cost.gamma), (1 - cost.alpha) * focal(x, cost.gamma)
        boxes, true = single_precision_or_better(boxes)[:, :, None], self.boxes[:, None]
        l1 = ((boxes - true).abs() / self.extent).sum(-1)
        giou = generalized_iou(boxes, true, eps=1e-6)
        return cost.classification * (on - off) + cost.l1 * l1 - cost.giou * giou

    def __call__(self, logits: Tensor, boxes: Tensor) -> Matches:
        """The cheapest pairs of each image, ``min(N, G)`` of them; see `match`."""
        (found,) = self.together([(logits, boxes)])
        return found

    def together(self, predictions: Sequence[tuple[Tensor, Tensor]]) -> list[Matches]:
        """The same for several predictions, each of logits and boxes, which wait only once."""
        costs = torch.stack([self.costs(*prediction) for prediction in predictions])
        costs_there = costs.cpu().numpy()  # the only wait for the device
        if not np.isfinite(costs_there).all():
            self._refuse(costs_there)
        pairs = torch.from_numpy(np.stack([self._pairs(each) for each in costs_there]))
        return [Matches(*each) for each in pairs.to(costs.device, non_blocking=True)]

    def _pairs(self, costs: np.ndarray) -> np.ndarray:
        """`Matches` as one array ``(3, M)``, of costs ``(B, N, G)``."""
        queries = costs.shape[1]
        pairs = np.empty((3, sum(min(queries, count) for count in self.counts)), dtype=np.int64)
        start = first_target = 0
        for image, count in enumerate(self.counts):
            end = start + min(queries, count)
            query, target = linear_sum_assignment(costs[image, :, :count])
            pairs[0, start:end] = image
            pairs[1, start:end] = query
            pairs[2, start:end] = target + first_target
            start, first_target = end, first_target + count
        return pairs

    def _refuse(self, costs: np.ndarray) -> None:
        """``costs (K, B, N, G)`` of ``K`` predictions are not all finite."""
        fine = np.isfinite(costs).all(axis=(0, 2, 3))
        bad = [image_id for image_id, ok in zip(self.image_ids, fine, strict=True) if not ok]
        shown = ", ".join(map(str, bad[:8])) + (", …" if len(bad) > 8 else "")
        raise NonFiniteCost(
            f"The matching costs of {len(bad)} of {len(fine)} images (image ids {shown}) are not "
            "finite: the logits, the predicted boxes or the annotated boxes hold NaN or infinity. "
            "What helps: (a) a lower learning rate or a longer warm-up, (b) clipping the gradient, "
            "(c) looking at the annotations of these images."
        )


def match(
    logits: Tensor,
    boxes: Tensor,
    targets: Sequence[Target],
    sizes: Tensor,
    cost: MatchingCost | None = None,
) -> Matches:
    """Pair queries with objects so that the sum of the costs of each image is smallest.

    Every object gets one query, or every query one object where there are more objects.  No
    gradient flows.  To match several predictions for one batch, make one `Matcher`.

    Args:
        logits: ``(B, N, K)``, one sigmoid per class.
        boxes: ``(B, N, 4)`` xyxy in pixels.
        targets: one per image.
        sizes: ``(B, 2)`` height and width of the unpadded images, pixels.
        cost: the weights.

    Raises:
        NonFiniteCost: if a cost is NaN or infinite; nothing is masked.

    Example:
        >>> from detection.data.types import Target
        >>> truth = torch.tensor([[10.0, 10.0, 30.0, 30.0]])
        >>> target = Target(truth, torch.tensor([1]), image_id=7, original_size=(50, 50))
        >>> boxes = torch.stack([truth + 15, truth + 1])[None, :, 0]
        >>> found = match(torch.zeros(1, 2, 3), boxes, [target], torch.tensor([[50, 50]]))
        >>> found.query_index.tolist(), found.target_index.tolist()
        ([1], [0])
    """
    return Matcher(targets, sizes, cost)(logits, boxes)


def focal(logits: Tensor, gamma: float) -> Tensor:
    """Focal loss ``σ(x)^γ · softplus(x)`` of logits that should be off (Lin et al. 2017, Eq. 4).

    That of logits that should be on is ``focal(-logits, gamma)``; the balance α is left out.

    Example:
        >>> round(focal(torch.tensor(0.0), gamma=2.0).item(), 4)  # log(2) / 4
        0.1733
    """
    return logits.sigmoid().pow(gamma) * softplus(logits)


def image_extent(sizes: Tensor) -> Tensor:
    """``(B, 4)`` float32 (w, h, w, h) of ``sizes (B, 2)`` int (h, w).

    Example:
        >>> image_extent(torch.tensor([[480, 640]])).tolist()
        [[640.0, 480.0, 640.0, 480.0]]
    """
    return sizes.flip(1).repeat(1, 2).float()


def single_precision_or_better(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is where it is finer: costs and losses are never in half."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_weights(weights: object) -> None:
    """Refuse weights that are negative or not finite, and an α outside [0, 1]."""
    for name, value in vars(weights).items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(
                f"{type(weights).__name__}({name}={value}): must be finite and not negative."
            )
        if name == "alpha" and value > 1:
            raise ValueError(f"{type(weights).__name__}(alpha={value}): must lie in [0, 1].")
