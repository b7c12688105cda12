"""What a prediction costs once its queries are matched: focal, L1 and generalised-IoU loss.

All three are sums over the matched queries (the focal loss over all queries and classes) divided
by the number of matched queries, as in Sparse R-CNN and AdaMixer.  The paper states a weight of 5
for the focal loss, the published code uses 2; the default here is the code's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from detection.boxes import generalized_iou
from detection.distributed import Distributed
from detection.training.matching import (
    Matcher,
    Matches,
    MatchingCost,
    check_weights,
    focal,
    image_extent,
    single_precision_or_better,
)

if TYPE_CHECKING:
    from detection.data.types import Target


@dataclass(frozen=True)
class LossWeights:
    """Weights of the three losses, and the two constants of the focal loss.

    Example:
        >>> LossWeights(classification=5.0).l1  # the weights of the paper's text
        5.0
    """

    classification: float = 2.0
    l1: float = 5.0
    giou: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0

    def __post_init__(self) -> None:
        check_weights(self)


def matched_queries(
    targets: Sequence[Target], num_queries: int, distributed: Distributed | None = None
) -> Tensor:
    """Normaliser of the losses: matched queries of the batch, mean over the processes, at least 1.

    The number is known before any matching, ``Σ min(N, G)``, so one reduction serves the whole
    batch.  With the mean over processes, averaged gradients are those of the joint batch.

    Args:
        targets: the objects of each image of this process's batch.
        num_queries: ``N``.
        distributed: the processes; ``None`` for one.

    Example:
        >>> from detection.data.types import Target
        >>> empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 1, (8, 8))
        >>> matched_queries([empty], num_queries=20)
        tensor(1.)
    """
    distributed = distributed or Distributed()
    matched = float(sum(min(num_queries, len(target.labels)) for target in targets))
    mean = distributed.all_reduce_mean(torch.full((), matched, device=distributed.device))
    return mean.clamp(min=1)


class Criterion:
    """The loss of predictions for one batch; made once per batch, called once per prediction.

    Predictions that are known at one time are best matched together, by `matches`.

    Args:
        targets: the objects of each image; images and batches without objects are fine.
        sizes: ``(B, 2)`` height and width of the unpadded images, pixels.
        weights: of the losses.
        cost: of the matching.
        normaliser: what the sums are divided by, see `matched_queries`.

    Example:
        >>> from detection.data.types import Target
        >>> truth, sizes = torch.tensor([[10.0, 10.0, 30.0, 30.0]]), torch.tensor([[50, 50]])
        >>> target = Target(truth, torch.tensor([1]), image_id=7, original_size=(50, 50))
        >>> criterion = Criterion([target], sizes, normaliser=matched_queries([target], 1))
        >>> total, parts = criterion(torch.tensor([[[-20.0, 20.0]]]), truth[None])
        >>> round(total.item(), 6), sorted(parts)
        (0.0, ['class', 'giou', 'l1'])
    """

    def __init__(
        self,
        targets: Sequence[Target],
        sizes: Tensor,
        weights: LossWeights | None = None,
        cost: MatchingCost | None = None,
        normaliser: Tensor | float = 1.0,
    ) -> None:
        self.weights = weights or LossWeights()
        self.match = Matcher(targets, sizes, cost)
        self.normaliser = normaliser
        self.labels = torch.cat([target.labels for target in targets])
        self.boxes = torch.cat([target.boxes for target in targets])
        self.extent = image_extent(sizes)

    def matches(self, predictions: Sequence[tuple[Tensor, Tensor]]) -> list[Matches]:
        """What to call this with beside each of some predictions, for one wait for the device."""
        return self.match.together(
            [(single_precision_or_better(x), single_precision_or_better(b)) for x, b in predictions]
        )

    def __call__(
        self, logits: Tensor, boxes: Tensor, matches: Matches | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of ``logits (B, N, K)`` and ``boxes (B, N, 4)`` (xyxy, pixels).

        With `focal` ``f``, the matched logits ``x⁺`` of the right class and all others ``x⁻``:
        ``class = Σ α f(−x⁺) + Σ (1−α) f(x⁻)``, ``l1 = Σ ‖(b − b')/(w,h,w,h)‖₁`` and
        ``giou = Σ (1 − GIoU(b, b'))``, each divided by the normaliser.  Without ``matches``, which
        `matches` gives, they are made here.

        Returns:
            The weighted sum, a scalar that carries the gradient; and its terms ``class``, ``l1``
            and ``giou``, weighted and detached.

        Raises:
            NonFiniteCost: if a prediction or a target is not finite.
        """
        logits, boxes = single_precision_or_better(logits), single_precision_or_better(boxes)
        image, query, target = self.match(logits, boxes) if matches is None else matches
        w = self.weights
        on = logits[image, query, self.labels[target]]
        # All logits are counted as off; then the matched ones are moved to the other side.
        off = focal(logits, w.gamma).sum() - focal(on, w.gamma).sum()
        classification = w.alpha * focal(-on, w.gamma).sum() + (1 - w.alpha) * off
        matched, true = boxes[image, query], self.boxes[target]
        l1 = ((matched - true).abs() / self.extent[image]).sum()
        giou = (1 - generalized_iou(matched, true, eps=1e-7)).sum()
        terms = torch.stack([w.classification * classification, w.l1 * l1, w.giou * giou])
        terms = terms / self.normaliser
        parts = dict(zip(("class", "l1", "giou"), terms.detach(), strict=True))
        return terms.sum(), parts
