"""One image of the digits data set: handwritten strokes composed on a crop of a photograph.

A contrast guard looks at the photograph under and around the stroke before its colour is drawn:
every digit can be read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image
from scipy import ndimage

from detection.data.compositing import (
    CLEARANCE,
    LUMA,
    draw_colour,
    iou,
    random_background,
    render_stroke,
)

HEIGHTS = (20.0, 64.0)
"""Shortest and tallest digit, in pixels, in an image of 128 pixels."""

REFERENCE_SIZE = 128
MOST_DIGITS = 5
MAX_ANGLE = math.radians(12)
MAX_SHEAR = 0.2
MAX_STRETCH = 1.15
MAX_IOU = 0.05
OPACITY = (0.85, 1.0)
PLACES = 6
"""Places that are tried for a stroke before another one is drawn."""

CONTRAST = 64.0
"""Least difference of luminance, 0 to 255, between a stroke and what surrounds it."""


@dataclass(frozen=True, eq=False)
class Materials:
    """What the images of one split are made of.

    Args:
        exemplars: ``(n, 8, 8)`` ink between 0 and 1.
        labels: ``(n,)`` the digit of each.
        photographs: RGB images.
    """

    exemplars: np.ndarray
    labels: np.ndarray
    photographs: tuple[Image.Image, ...]


def compose_image(
    materials: Materials, size: int, chance: Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one image.

    Args:
        materials: exemplars and photographs.
        size: side of the image in pixels.
        chance: all randomness.

    Returns:
        pixels ``(size, size, 3)`` uint8; boxes ``(n, 4)`` of the strokes, corners in pixels;
        digits ``(n,)``, with n from 1 to 5.
    """
    while True:
        canvas = random_background(materials.photographs, size, chance)
        wanted = int(chance.integers(1, MOST_DIGITS + 1))
        boxes: list[np.ndarray] = []
        digits: list[int] = []
        taken = np.zeros((size, size), dtype=bool)
        for _ in range(2 * wanted):
            exemplar = int(chance.integers(len(materials.labels)))
            alpha, box = _random_stroke(materials.exemplars[exemplar], size, chance)
            for _ in range(PLACES):
                moved = _place(canvas, taken, boxes, alpha, box, chance)
                if moved is not None:
                    boxes.append(moved)
                    digits.append(int(materials.labels[exemplar]))
                    break
            if len(boxes) == wanted:
                break
        if boxes:  # else the crop is too busy for any colour: take another
            return (canvas + 0.5).astype(np.uint8), np.stack(boxes), np.array(digits)


def _random_stroke(
    exemplar: np.ndarray, size: int, chance: Generator
) -> tuple[np.ndarray, np.ndarray]:
    low, high = (math.log(height * size / REFERENCE_SIZE) for height in HEIGHTS)
    return render_stroke(
        exemplar,
        height=math.exp(chance.uniform(low, high)),
        angle=chance.uniform(-MAX_ANGLE, MAX_ANGLE),
        shear=chance.uniform(-MAX_SHEAR, MAX_SHEAR),
        stretch=math.exp(chance.uniform(-1.0, 1.0) * math.log(MAX_STRETCH)),
    )


def _place(
    canvas: np.ndarray,
    taken: np.ndarray,
    boxes: list[np.ndarray],
    alpha: np.ndarray,
    box: np.ndarray,
    chance: Generator,
) -> np.ndarray | None:
    """Paint a stroke at a random place of ``canvas``; its box there, ``None`` if it cannot be."""
    size = len(canvas)
    rows, columns = alpha.shape
    if rows > size or columns > size:
        return None
    top, left = chance.integers(0, size - rows + 1), chance.integers(0, size - columns + 1)
    box = box + np.array([left, top, left, top])
    window = (slice(top, top + rows), slice(left, left + columns))
    around = ndimage.maximum_filter(alpha, 2 * CLEARANCE + 1) > 0
    if taken[window][around].any() or any(iou(box, other) > MAX_IOU for other in boxes):
        return None
    luminance = (canvas[window] @ LUMA)[around]
    opacity = chance.uniform(*OPACITY)
    darkest, lightest = np.percentile(luminance, (2, 98))
    colour = draw_colour(float(darkest), float(lightest), CONTRAST / opacity, chance)
    if colour is None:
        return None
    weight = (opacity * alpha)[..., None]
    canvas[window] += weight * (colour - canvas[window])
    taken[window] |= alpha > 0
    return box
