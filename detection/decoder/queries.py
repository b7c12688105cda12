"""What is refined, and what refines it: the interface between a decoder and its layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn


class Queries(NamedTuple):
    """The state that is refined: one position, content and box per query (paper, Eq. 2).

    Attributes:
        position: ``(B, N, 4)``, (x, y, z, r): centre in pixels, log2 size, log2 aspect.
        content: ``(B, N, C)``.
        boxes: ``(B, N, 4)`` corners in pixels.  They are those of the position, but for the
            corners that noise has moved past each other: attention sees these as they are.
    """

    position: Tensor
    content: Tensor
    boxes: Tensor


class QueryLayer(nn.Module, ABC):
    """Refines object queries once: the ``f`` of ``y ← f(x, y)``, whatever is inside.

    The decoders (`detection.models.decoders`), solvers, gradients, supervision and perturbation
    use nothing else of a layer.

    Attributes:
        class_head: reads class logits from a content; its last layer has one row for each class.
    """

    class_head: nn.Sequential

    def prepare(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The same feature maps, in the memory format that `forward` reads fastest.

        Any format will do; this is done once, for all refinements.  Where maps have it already
        nothing is copied.
        """
        return [feature.contiguous() for feature in features]

    @abstractmethod
    def forward(self, queries: Queries, features: Sequence[Tensor]) -> Queries:
        """Queries after one refinement against feature maps ``(B, C, H/s, W/s)``."""

    @abstractmethod
    def classify(self, content: Tensor) -> Tensor:
        """Class logits ``(B, N, num_classes)`` of contents ``(B, N, C)``."""


def output_head(channels: int, outputs: int) -> nn.Sequential:
    """Linear, LayerNorm, ReLU, linear: what reads classes or box steps from a content."""
    return nn.Sequential(
        nn.Linear(channels, channels),
        nn.LayerNorm(channels),
        nn.ReLU(inplace=True),
        nn.Linear(channels, outputs),
    )
