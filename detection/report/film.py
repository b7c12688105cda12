"""The refinement of one image, as boxes over a picture: one group of boxes for each step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from detection.data.coco import CocoDataset
from detection.data.images import read_image
from detection.data.loading import collate
from detection.drawing import as_picture, class_colour
from detection.models.detector import Detector
from detection.pictures import refinements, to_original

FAINTEST = 0.05
"""Queries below this score are not shown."""


@dataclass(frozen=True)
class Box:
    """One query at one step; x, y, width and height in pixels of the original image."""

    x: float
    y: float
    width: float
    height: float
    score: float
    name: str
    colour: str

    @property
    def opacity(self) -> float:
        """The surer, the stronger."""
        return round(min(1.0, 0.25 + self.score), 2)


@dataclass(frozen=True)
class Film:
    """A picture, and the boxes on it step by step; the first step is the initialisation."""

    name: str
    image_id: int
    picture: Image.Image
    steps: list[list[Box]]


def film(model: Detector, dataset: CocoDataset, place: int) -> Film:
    """The refinement of the image at ``place`` of a data set."""
    pixels, target = dataset[place]
    batch = collate([(pixels, target)])
    picture = as_picture(read_image(dataset.path(place), target.original_size), 1)
    scale, end = to_original(target, batch.sizes[0]), torch.tensor(picture.size * 2)
    steps = [
        _shown((boxes * scale).clamp(torch.zeros(4), end), scores, labels, dataset.categories.names)
        for boxes, scores, labels in refinements(model, batch)
    ]
    return Film(dataset.names[place], target.image_id, picture, steps)


def _shown(boxes: Tensor, scores: Tensor, labels: Tensor, names: tuple[str, ...]) -> list[Box]:
    """From the faintest to the surest, which is drawn last and lies on top."""
    found = []
    for query in scores.argsort().tolist():
        x, y, x2, y2 = (round(value, 1) for value in boxes[query].tolist())
        if scores[query] < FAINTEST or x2 <= x or y2 <= y:
            continue
        label = int(labels[query])
        colour = "#{:02x}{:02x}{:02x}".format(*class_colour(label))
        sides = round(x2 - x, 1), round(y2 - y, 1)
        found.append(Box(x, y, *sides, round(float(scores[query]), 3), names[label], colour))
    return found
