"""One image of the digits data set: handwritten strokes composed on a crop of a photograph.

A stroke is the level set of a cubic spline through the 8x8 pixels of its exemplar, so it is
smooth at every size and its edge, and with it the box, is known to a fraction of a pixel.  A
contrast guard looks at the photograph under and around the stroke before its colour is drawn:
every digit can be read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image
from scipy import ndimage

EXEMPLAR_SIZE = 8
PADDING = 2
EDGE_LEVEL = 0.5
"""The stroke is where the ink, 0 to 1, exceeds this."""

EDGE_SLOPE = 3.0
"""Steepest change of coverage with ink: what is left of a loop stays visible."""

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

CLEARANCE = 3
"""Pixels around a stroke that count as its surroundings and that no other stroke may enter."""

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


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
        canvas = _background(materials.photographs, size, chance)
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


def sharpen(exemplars: np.ndarray) -> np.ndarray:
    """Open closing loops and strengthen faint strokes: ink + (ink - its Gaussian mean, σ = 1).

    Args:
        exemplars: ``(n, 8, 8)`` ink between 0 and 1.

    Returns:
        The same, clipped to 0 and 1.

    Example:
        >>> float(sharpen(np.full((1, 8, 8), 0.5))[0, 0, 0].round(2))
        0.76
    """
    mean = ndimage.gaussian_filter(exemplars, sigma=(0.0, 1.0, 1.0), mode="constant")
    sharpened: np.ndarray = np.clip(2 * exemplars - mean, 0.0, 1.0)
    return sharpened


def render_stroke(
    exemplar: np.ndarray,
    height: float,
    angle: float = 0.0,
    shear: float = 0.0,
    stretch: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """A stroke at any size: its coverage and its box.

    Args:
        exemplar: ``(8, 8)`` ink between 0 and 1.
        height: height in pixels that the 8 rows become.
        angle: anticlockwise rotation in radians.
        shear: shift to the right per unit of height, downwards.
        stretch: width relative to the proportions of the exemplar.

    Returns:
        alpha ``(h, w)`` float32 between 0 and 1, with a rim of `CLEARANCE` pixels around all that
        is not 0; box ``(x1, y1, x2, y2)`` within it, where alpha crosses ½.

    Example:
        >>> bar = np.zeros((8, 8))
        >>> bar[:, 3:5] = 1.0
        >>> alpha, box = render_stroke(bar, height=32.0)
        >>> np.round(box[2:] - box[:2])
        array([ 8., 32.])
    """
    scale = height / EXEMPLAR_SIZE
    sine, cosine = math.sin(angle), math.cos(angle)
    rotation = np.array([[cosine, -sine], [sine, cosine]])  # of (row, column)
    forward = scale * rotation @ np.array([[1.0, 0.0], [shear, stretch]])
    half = (EXEMPLAR_SIZE / 2 + 1) * np.abs(forward).sum(axis=1) + CLEARANCE
    shape = (2 * np.ceil(half)).astype(int)
    inverse = np.linalg.inv(forward)
    padded = np.pad(exemplar, PADDING)
    offset = (np.array(padded.shape) - 1) / 2 - inverse @ ((shape - 1) / 2)
    ink = ndimage.affine_transform(padded, inverse, offset, tuple(shape), order=3)
    alpha = np.clip((ink - EDGE_LEVEL) * min(scale, EDGE_SLOPE) + 0.5, 0.0, 1.0).astype(np.float32)
    rows, columns = np.flatnonzero(alpha.any(axis=1)), np.flatnonzero(alpha.any(axis=0))
    alpha = alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    alpha = np.pad(alpha, CLEARANCE)
    x1, x2 = _crossings(alpha.max(axis=0))
    y1, y2 = _crossings(alpha.max(axis=1))
    return alpha, np.array([x1, y1, x2, y2])


def draw_colour(low: float, high: float, contrast: float, chance: Generator) -> np.ndarray | None:
    """A random RGB colour whose luminance keeps its distance from an interval.

    Args:
        low: lower end of the luminance of the surroundings, 0 to 255.
        high: upper end.
        contrast: least distance from the interval.
        chance: all randomness.

    Returns:
        ``(3,)`` float32 between 0 and 255, or ``None`` where no luminance is far enough.

    Example:
        >>> colour = draw_colour(0.0, 150.0, 64.0, np.random.default_rng(0))
        >>> bool(colour @ LUMA >= 214 - 1e-3), draw_colour(20.0, 200.0, 64.0, np.random.default_rng(0))
        (True, None)
    """  # noqa: E501
    darker, lighter = max(0.0, low - contrast), max(0.0, 255.0 - high - contrast)
    if darker + lighter <= 0:
        return None
    drawn = chance.uniform(0.0, darker + lighter)
    luminance = drawn if drawn < darker else high + contrast + drawn - darker
    colour = chance.uniform(0.0, 255.0, 3).astype(np.float32)
    own = float(colour @ LUMA)
    if luminance <= own:
        return colour * (luminance / own)
    return colour + (255.0 - colour) * ((luminance - own) / (255.0 - own))


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
    if taken[window][around].any() or any(_iou(box, other) > MAX_IOU for other in boxes):
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


def _background(photographs: tuple[Image.Image, ...], size: int, chance: Generator) -> np.ndarray:
    """A random part of a random photograph, mirrored and tinted, ``(size, size, 3)`` float32."""
    photograph = photographs[chance.integers(len(photographs))]
    longest = min(photograph.size)
    side = math.exp(chance.uniform(math.log(min(size, longest) / 2), math.log(longest)))
    left, top = (chance.uniform(0.0, length - side) for length in photograph.size)
    part = photograph.resize(
        (size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
    )
    pixels = np.asarray(part, dtype=np.float32)
    if chance.random() < 0.5:
        pixels = pixels[:, ::-1]
    gain = chance.uniform(0.6, 1.1) * chance.uniform(0.85, 1.15, 3)
    bias = chance.uniform(-20.0, 40.0)
    return np.clip(pixels * gain + bias, 0.0, 255.0).astype(np.float32)


def _crossings(profile: np.ndarray) -> tuple[float, float]:
    """Where a profile of pixels, 0 at both ends, first rises and last falls through ½.

    Pixel ``i`` covers ``[i, i + 1]``; its value is held at its centre, and linear between.
    """
    first = int(np.argmax(profile >= 0.5))
    last = len(profile) - 1 - int(np.argmax(profile[::-1] >= 0.5))
    rise = (0.5 - profile[first - 1]) / (profile[first] - profile[first - 1])
    fall = (0.5 - profile[last + 1]) / (profile[last] - profile[last + 1])
    return first - 0.5 + float(rise), last + 1.5 - float(fall)


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    sides = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0.0, None)
    intersection = float(sides.prod())
    return intersection / float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - intersection)
