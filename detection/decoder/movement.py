"""How far a refinement moves detections: what decides that refining them has come to its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detection.decoder.queries import Queries

_EARLIER = {"pixels": 1.0, "score": 0.02}
"""Limits, unless others were chosen, of the rule before this one, which had a ``least_score``."""


@dataclass(frozen=True)
class Settled:
    """An image is done when one more refinement would hardly change its detections.

    What a detection counts for is about in proportion to its score.  So a change of a score counts
    as it is, and a movement times the score of the box: one of score 1 may still move by
    ``pixels``, one of score ½ by twice as much, and those that hardly score, which never come to
    rest, hold up no image.  Every box must be within both limits.

    From the output of the first layer, scores may stand almost still for a refinement before they
    rise.  So an image is refined `least_steps` times before it may be done, by default as often as
    a decoder of six layers does; where it starts from the frame before, it may be done at once.

    Args:
        pixels: most that a side of a box may still move, times the score of the box.
        score: most that a score may still change.
        least_steps: refinements from the first layer's output before an image may be done.

    Example:
        >>> before = Queries(torch.zeros(1, 1, 4), torch.tensor([[[0.01]]]), torch.zeros(1, 1, 4))
        >>> after = before._replace(boxes=before.boxes + 75)
        >>> Settled().movement(before, after, torch.logit)  # of contents that are scores
        tensor([0.5000])
    """

    pixels: float = 1.5
    score: float = 0.05
    least_steps: int = 6

    def __post_init__(self) -> None:
        for name in ("pixels", "score"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"settled.{name}={value}: must be a number above 0.")
        least = self.least_steps
        if isinstance(least, bool) or not isinstance(least, int) or least < 0:
            raise ValueError(f"settled.least_steps={least!r}: must be an integer of at least 0.")

    @staticmethod
    def from_earlier(stored: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that stored ones stand for, also those of the rule before this one.

        That one held every box above a ``least_score`` to the limits alike.  Where these were its
        defaults, today's take their place; others stay, in the same units.
        """
        if "least_score" not in stored:
            return dict(stored)
        return {
            name: value
            for name, value in stored.items()
            if name != "least_score" and (name, value) not in _EARLIER.items()
        }

    def movement(
        self, before: Queries, after: Queries, classify: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """``(B,)`` the largest movement of an image, over what is allowed: done at 1 or less.

        Args:
            before, after: a refinement, ``(B, N, …)``.
            classify: logits ``(B, N, K)`` of contents.
        """
        scores = [classify(queries.content).sigmoid() for queries in (before, after)]
        changed = (scores[1] - scores[0]).abs().amax(-1)
        # By the larger score: a box that appears or fades is not at rest either.
        weight = torch.maximum(*scores).amax(-1)
        moved = weight * (after.boxes - before.boxes).abs().amax(-1)
        movement = torch.maximum(changed / self.score, moved / self.pixels)
        return movement.amax(-1) if movement.shape[-1] else movement.new_zeros(len(movement))
