"""What the images of the embedded data sets are drawn with: photographs, colours, strokes.

A stroke is the level set of a cubic spline through the 8x8 pixels of its exemplar, so it is
smooth at every size and its edge, and with it the box, is known to a fraction of a pixel.
"""

from __future__ import annotations

import math

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

CLEARANCE = 3
"""Pixels around an object that count as its surroundings."""

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


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
    return alpha, extent(alpha)


def extent(alpha: np.ndarray) -> np.ndarray:
    """The box of a shape: where its coverage crosses ½, to a fraction of a pixel.

    Args:
        alpha: ``(h, w)`` coverage between 0 and 1, 0 at the rim, and somewhere ½ at least.

    Returns:
        ``(x1, y1, x2, y2)`` in pixels.

    Example:
        >>> alpha = np.zeros((5, 8))
        >>> alpha[1:3, 2:6] = 1.0
        >>> extent(alpha)
        array([2., 1., 6., 3.])
    """
    x1, x2 = _crossings(alpha.max(axis=0))
    y1, y2 = _crossings(alpha.max(axis=1))
    return np.array([x1, y1, x2, y2])


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


def random_background(
    photographs: tuple[Image.Image, ...], size: int, chance: Generator
) -> np.ndarray:
    """A random part of a random photograph, mirrored and tinted.

    Args:
        photographs: RGB images.
        size: side of the part in pixels.
        chance: all randomness.

    Returns:
        ``(size, size, 3)`` float32 between 0 and 255.

    Example:
        >>> random_background((Image.new("RGB", (9, 9)),), 4, np.random.default_rng(0)).shape
        (4, 4, 3)
    """
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


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes, corners in pixels.

    Example:
        >>> iou(np.array([0, 0, 2, 2]), np.array([1, 0, 3, 2]))
        0.3333333333333333
    """
    sides = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0.0, None)
    intersection = float(sides.prod())
    return intersection / float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - intersection)


def _crossings(profile: np.ndarray) -> tuple[float, float]:
    """Where a profile of pixels, 0 at both ends, first rises and last falls through ½.

    Pixel ``i`` covers ``[i, i + 1]``; its value is held at its centre, and linear between.
    """
    first = int(np.argmax(profile >= 0.5))
    last = len(profile) - 1 - int(np.argmax(profile[::-1] >= 0.5))
    rise = (0.5 - profile[first - 1]) / (profile[first] - profile[first - 1])
    fall = (0.5 - profile[last + 1]) / (profile[last] - profile[last + 1])
    return first - 0.5 + float(rise), last + 1.5 - float(fall)
