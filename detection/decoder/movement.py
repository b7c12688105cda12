"""How far a refinement moves detections: what decides that refining them has come to its end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from detection.decoder.queries import Queries


@dataclass(frozen=True)
class Settled:
    """An image is done when one more refinement would hardly change its detections.

    Args:
        pixels: most that a side of a box may still move.
        score: most that a score may still change.
        least_score: boxes matter whose score is at least this much, before or after.

    Example:
        >>> Settled(pixels=0.5).score
        0.02
    """

    pixels: float = 1.0
    score: float = 0.02
    least_score: float = 0.05

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"settled.{name}={value}: must be a number above 0.")

    def movement(
        self, before: Queries, after: Queries, classify: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """``(B,)`` the largest movement of an image, over what is allowed: done at 1 or less.

        Args:
            before, after: a refinement, ``(B, N, …)``.
            classify: logits ``(B, N, K)`` of contents.
        """
        scores = [classify(queries.content).sigmoid() for queries in (before, after)]
        changed = (scores[1] - scores[0]).abs().amax(-1) / self.score
        moved = (after.boxes - before.boxes).abs().amax(-1) / self.pixels
        seen = torch.maximum(*scores).amax(-1) >= self.least_score
        # Selected: a box that is nowhere must not hold up its image if nobody sees it.
        movement = torch.maximum(changed, torch.where(seen, moved, 0))
        return movement.amax(-1) if movement.shape[-1] else movement.new_zeros(len(movement))
