"""DEQDet's refinement layer at the sizes of the paper: what several benchmarks measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from detection.boxes import decode_position
from detection.decoder.layer import LayerConfig, RefinementLayer
from detection.decoder.queries import Queries

SIZES = ((100, 32), (100, 64), (300, 32), (300, 64))
"""Queries and points: those of the published models."""
IMAGE = (800, 1344)
"""Height and width, padded: those of most COCO images in training and evaluation."""


@dataclass(frozen=True)
class Problem:
    """A layer and what it refines.

    Attributes:
        layer: in evaluation mode, with random weights everywhere.
        queries: with boxes of all sizes all over the image.
        features: maps ``(B, 256, H/s, W/s)``, channels second.
        prepared: the same as the detector hands them to its decoder at inference, channels last.
        trained_on: and in training.
    """

    layer: RefinementLayer
    queries: Queries
    features: Sequence[Tensor]
    prepared: Sequence[Tensor]
    trained_on: Sequence[Tensor]

    @property
    def outside(self) -> list[Tensor]:
        """What lives whatever is computed."""
        of_layer = [*self.layer.parameters(), *self.layer.buffers()]
        return [*of_layer, *self.queries, *self.features, *self.prepared, *self.trained_on]

    def maps_of_a_neck(self) -> list[Tensor]:
        """Those of training, as leaves that want a gradient: a neck would hand theirs on."""
        return [maps.detach().requires_grad_() for maps in self.trained_on]


def full_size(
    queries: int = 100,
    points: int = 32,
    *,
    image: tuple[int, int] = IMAGE,
    batch: int = 1,
    device: torch.device | str = "cpu",
) -> Problem:
    """A layer of 256 channels, an image's features and queries; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        layer = RefinementLayer(LayerConfig(points=points)).eval()
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02, generator=generator)
    height, width = image
    features = [
        torch.randn(batch, 256, -(-height // s), -(-width // s), generator=generator).to(device)
        for s in layer.sampling.strides
    ]
    place = torch.rand(batch, queries, 4, generator=generator)
    scale, least = torch.tensor([width, height, 4.0, 2.0]), torch.tensor([0.0, 0.0, 4.0, -1.0])
    position = (place * scale + least).to(device)
    content = torch.randn(batch, queries, 256, generator=generator).to(device)
    layer = layer.to(device)
    start = Queries(position, content, decode_position(position))
    with torch.no_grad():
        prepared = layer.prepare(features)
    with torch.enable_grad():
        trained_on = layer.prepare(features)
    return Problem(layer, start, features, prepared, trained_on)
