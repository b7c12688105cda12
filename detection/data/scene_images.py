"""One image of the scenes data set: things and clutter laid over each other on a photograph.

Everything is laid down in one order, the large rather first, and covers what lies there already.
An object goes only where all below it stay visible enough, and where its colour can be told from
what surrounds it.  Boxes are of what is visible in the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw
from scipy import ndimage

from detection.data.compositing import (
    CLEARANCE,
    LUMA,
    draw_colour,
    extent,
    iou,
    random_background,
    render_stroke,
)

MOST_OBJECTS = 10
"""Of an image; one object is ten times as likely as ten, with as many chances lost at each more."""

SHORTEST = 8.0
"""Least longer side of an object, in pixels."""

LONGEST = 160 / 256
"""Greatest longer side of an object, as a fraction of the image's."""

LENGTH_SHARES = ((0.0, 0.0), (0.25, 0.46), (0.65, 0.84), (1.0, 1.0))
"""Share of the objects below a longer side, and the place of its logarithm between the ends.

Log-uniform between: as it stands, a straight line, only a tenth would be large for COCO."""

CLUTTER = (1, 5)
CLUTTER_LENGTHS = (0.08, 0.5)
"""Of patches and shapes, as fractions of the image's side."""

SMALL = 24.0
"""Objects shorter than this are hardly covered: too little would be left."""

LEAST_VISIBLE = 0.6
LEAST_VISIBLE_SMALL = 0.95
"""Share of an object's coverage that is not covered by what came later."""

MAX_ANGLE = math.radians(12)
MAX_SHEAR = 0.15
MAX_STRETCH = 1.15
OPACITY = (0.9, 1.0)
CONTRAST = 64.0
"""Least difference of luminance, 0 to 255, between a stroke and most of what surrounds it."""

CUT_OUT_CONTRAST = 28.0
"""The same for the mean of a cut-out, which has a texture of its own."""

FINE_PRINT = 40.0
MOST_EMPHASIS = 2.5
"""Print smaller than this is drawn bolder, at most so much: hairlines would vanish."""

CROWD = (8.0, 92.0)
"""Percentiles of the luminance under and around an object, and of the objects there, that count
as what surrounds it."""

CUT_OUT_LUMINANCE = (50.0, 205.0)
"""Limits of a cut-out's mean, between which there is room for its texture."""

MAX_IOU = 0.4
"""Of the boxes of two objects: else neither could be named."""

RENDERINGS = 4
PLACES = 6
"""Renderings of an object that are tried, and places for each."""

PROBE = 32.0
"""Length at which a rendering is first measured."""

MEASUREMENTS = 3
TOLERANCE = 0.03
"""Times that it is then measured and given its length anew, and when it has it."""


@dataclass(frozen=True)
class Pose:
    """How an exemplar is drawn.

    Args:
        angle: anticlockwise rotation in radians.
        shear: shift to the right per unit of height, downwards.
        stretch: width relative to the proportions of the exemplar.
    """

    angle: float = 0.0
    shear: float = 0.0
    stretch: float = 1.0


@dataclass(frozen=True, eq=False)
class Handwriting:
    """A handwritten exemplar, of 8x8 pixels, which is drawn in one colour.

    Args:
        ink: ``(8, 8)`` between 0 and 1.
    """

    ink: np.ndarray
    textured: bool = field(default=False, init=False)

    def render(self, scale: float, pose: Pose) -> tuple[np.ndarray, np.ndarray | None]:
        """Coverage ``(h, w)``, and no texture, at a scale of 1 for a height of `PROBE`."""
        alpha, _ = render_stroke(self.ink, PROBE * scale, pose.angle, pose.shear, pose.stretch)
        return alpha, None


@dataclass(frozen=True, eq=False)
class CutOut:
    """A picture with a shape.

    Args:
        picture: luminance and coverage.
        textured: whether it keeps its luminance, or is drawn in one colour.
    """

    picture: Image.Image
    textured: bool = True

    @cached_property
    def levels(self) -> list[Image.Image]:
        """The picture, and as long as it is large, at half the size of the one before."""
        levels = [self.picture]
        while max(levels[-1].size) > PROBE / 2:
            width, height = levels[-1].size
            half = (max(1, (width + 1) // 2), max(1, (height + 1) // 2))
            levels.append(self.picture.resize(half, Image.Resampling.BOX))
        return levels

    def render(self, scale: float, pose: Pose) -> tuple[np.ndarray, np.ndarray | None]:
        """Coverage ``(h, w)`` and luminance, at a scale of 1 for a longer side of `PROBE`."""
        width, height = self.picture.size
        length = PROBE * scale
        level = next(
            (level for level in reversed(self.levels) if max(level.size) >= length), self.picture
        )
        sine, cosine = math.sin(pose.angle), math.cos(pose.angle)
        # Of (x, y), y down: the angle is anticlockwise to the eye.
        turn = np.array([[cosine, sine], [-sine, cosine]])
        form = np.array([[pose.stretch, pose.shear], [0.0, 1.0]])
        whole = length / max(width, height) * turn @ form
        half = np.abs(whole) @ np.array([width, height]) / 2 + CLEARANCE + 1
        columns, rows = (2 * np.ceil(half)).astype(int).tolist()
        back = np.diag(np.array(level.size) / (width, height)) @ np.linalg.inv(whole)
        shift = np.array(level.size) / 2 - back @ (columns / 2, rows / 2)
        (a, b), (c, d) = back.tolist()
        drawn = level.transform(
            (columns, rows),
            Image.Transform.AFFINE,
            (a, b, float(shift[0]), c, d, float(shift[1])),
            Image.Resampling.BICUBIC,
        )
        luminance, alpha = np.moveaxis(np.asarray(drawn, dtype=np.float32), 2, 0)
        alpha = alpha / 255
        if self.textured:
            return alpha, luminance
        return np.clip(alpha * np.clip(FINE_PRINT / length, 1.0, MOST_EMPHASIS), 0.0, 1.0), None


@dataclass(frozen=True, eq=False)
class SceneMaterials:
    """What the images of one split are made of.

    Args:
        classes: exemplars of each.
        distractors: cut-outs that belong to none.
        photographs: RGB images.
    """

    classes: tuple[tuple[Handwriting | CutOut, ...], ...]
    distractors: tuple[CutOut, ...]
    photographs: tuple[Image.Image, ...]


def compose_scene(
    materials: SceneMaterials, size: int, chance: Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one image.

    Args:
        materials: exemplars and photographs.
        size: side of the image in pixels, at least 64.
        chance: all randomness.

    Returns:
        pixels ``(size, size, 3)`` uint8; boxes ``(n, 4)`` of what is visible of the objects,
        corners in pixels; labels ``(n,)``, with n from 1 to 10.
    """
    scene = draw_scene(materials, size, chance)
    boxes = np.stack([thing.box for thing in scene.objects])
    labels = np.array([thing.label for thing in scene.objects])
    return (scene.canvas + 0.5).astype(np.uint8), boxes, labels


def draw_scene(materials: SceneMaterials, size: int, chance: Generator) -> Scene:
    """Lay down everything that an image shows, one object at least.

    Args:
        materials: exemplars and photographs.
        size: side of the image in pixels, at least 64.
        chance: all randomness.
    """
    while True:
        scene = Scene(_muted_background(materials.photographs, size, chance))
        for length, is_object in _plan(size, chance):
            if is_object:
                _lay_object(scene, materials, length, chance)
            else:
                _lay_clutter(scene, materials, length, chance)
        if scene.objects:  # else the part is too busy for any colour: take another
            return scene


def draw_length(size: int, chance: Generator) -> float:
    """The longer side of an object, in pixels.

    Example:
        >>> lengths = [draw_length(256, np.random.default_rng(seed)) for seed in range(100)]
        >>> 8 <= min(lengths) < 9, 150 < max(lengths) <= 160
        (True, True)
    """
    shares, places = zip(*LENGTH_SHARES, strict=True)
    place = float(np.interp(chance.random(), shares, places))
    return float(SHORTEST * (LONGEST * size / SHORTEST) ** place)


@dataclass(eq=False)
class Thing:
    """An object that lies in a scene.

    Args:
        label: its class.
        corner: row and column of its window.
        visible: ``(h, w)`` what is left of its coverage.
        length: longer side of the whole.

    Attributes:
        whole: what its coverage came to before anything covered it.
        whole_box: its box then.
    """

    label: int
    corner: tuple[int, int]
    visible: np.ndarray
    length: float
    whole: float = field(init=False)
    whole_box: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.whole, self.whole_box = float(self.visible.sum()), self.box

    @property
    def box(self) -> np.ndarray:
        """Of the visible part, corners in pixels of the image."""
        row, column = self.corner
        return extent(self.visible) + np.array([column, row, column, row])

    @property
    def share(self) -> float:
        """How much of it is visible."""
        return float(self.visible.sum()) / self.whole

    def without(self, corner: tuple[int, int], alpha: np.ndarray) -> np.ndarray:
        """What is left of it below a shape; the same array where they do not meet."""
        (top, left), (row, column) = self.corner, corner
        rows, columns = self.visible.shape
        first, last = max(top, row), min(top + rows, row + alpha.shape[0])
        begin, end = max(left, column), min(left + columns, column + alpha.shape[1])
        if first >= last or begin >= end:
            return self.visible
        visible = self.visible.copy()
        above = alpha[first - row : last - row, begin - column : end - column]
        visible[first - top : last - top, begin - left : end - left] *= 1 - above
        return visible

    def survives(self, visible: np.ndarray) -> bool:
        """Whether enough of it is left."""
        least = LEAST_VISIBLE_SMALL if self.length < SMALL else LEAST_VISIBLE
        return bool(visible.sum() >= least * self.whole)


@dataclass(eq=False)
class Scene:
    """An image that is being drawn: pixels, and what lies on them.

    Args:
        canvas: ``(size, size, 3)`` float32.

    Attributes:
        objects: in the order in which they were laid down.
        taken: ``(size, size)`` where an object is on top.
    """

    canvas: np.ndarray
    objects: list[Thing] = field(default_factory=list)
    taken: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.taken = np.zeros(self.canvas.shape[:2], dtype=bool)

    def window(self, corner: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
        """A part of the canvas, to be read or painted."""
        return self.canvas[corner[0] : corner[0] + shape[0], corner[1] : corner[1] + shape[1]]

    def _taken(self, corner: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
        return self.taken[corner[0] : corner[0] + shape[0], corner[1] : corner[1] + shape[1]]

    def cover(self, corner: tuple[int, int], alpha: np.ndarray) -> bool:
        """Put a shape above all objects, unless one of them would be covered too much."""
        left = [thing.without(corner, alpha) for thing in self.objects]
        pairs = list(zip(self.objects, left, strict=True))
        if not all(kept is thing.visible or thing.survives(kept) for thing, kept in pairs):
            return False
        for thing, kept in pairs:
            thing.visible = kept
        self._taken(corner, alpha.shape)[alpha > 0.5] = False
        return True

    def add(self, thing: Thing) -> None:
        """Let an object be above all others, for which there is place."""
        self.objects.append(thing)
        self._taken(thing.corner, thing.visible.shape)[thing.visible > 0.5] = True

    def luminance(self, corner: tuple[int, int], around: np.ndarray) -> tuple[float, float]:
        """Lower and upper end of what there is in a region, and of the objects in it."""
        values = self.window(corner, around.shape)[around] @ LUMA
        low, high = np.percentile(values, CROWD)
        taken = self._taken(corner, around.shape)[around]
        if taken.any():
            lowest, highest = np.percentile(values[taken], CROWD)
            low, high = min(low, lowest), max(high, highest)
        return float(low), float(high)

    def paint(self, corner: tuple[int, int], alpha: np.ndarray, colours: np.ndarray) -> None:
        """Mix colours, of a pixel each or one for all, into the canvas."""
        window = self.window(corner, alpha.shape)
        window += alpha[..., None] * (colours - window)


def _plan(size: int, chance: Generator) -> list[tuple[float, bool]]:
    """Lengths of objects and of clutter, in the order in which they are laid down."""
    chances = np.arange(MOST_OBJECTS, 0, -1)
    wanted = 1 + int(chance.choice(MOST_OBJECTS, p=chances / chances.sum()))
    lengths = [(draw_length(size, chance), True) for _ in range(wanted)]
    low, high = (math.log(share * size) for share in CLUTTER_LENGTHS)
    for _ in range(int(chance.integers(CLUTTER[0], CLUTTER[1] + 1))):
        lengths.append((math.exp(chance.uniform(low, high)), False))
    # The large come first, more or less, and clutter rather below.
    order = [
        math.log(length) + chance.normal(0.0 if is_object else 0.7, 0.5)
        for length, is_object in lengths
    ]
    return [lengths[i] for i in np.argsort(order)[::-1]]


def _lay_object(scene: Scene, materials: SceneMaterials, length: float, chance: Generator) -> None:
    label = int(chance.integers(len(materials.classes)))
    exemplars = materials.classes[label]
    for _ in range(RENDERINGS):
        exemplar = exemplars[chance.integers(len(exemplars))]
        alpha, luminance = _random_rendering(exemplar, length, chance)
        if max(alpha.shape) > len(scene.canvas):
            continue
        around, box = ndimage.maximum_filter(alpha, 2 * CLEARANCE + 1) > 0, extent(alpha)
        for _ in range(PLACES):
            corner = _random_corner(len(scene.canvas), alpha.shape, chance)
            there = box + np.array([corner[1], corner[0]] * 2)
            if any(iou(there, other.whole_box) > MAX_IOU for other in scene.objects):
                continue
            colours = _colours(scene, corner, alpha, around, luminance, chance)
            if colours is not None and scene.cover(corner, alpha):
                scene.paint(corner, alpha * chance.uniform(*OPACITY), colours)
                scene.add(Thing(label, corner, alpha, length))
                return


def _lay_clutter(scene: Scene, materials: SceneMaterials, length: float, chance: Generator) -> None:
    size = len(scene.canvas)
    kind = chance.choice(("patch", "shape", "wire", "distractor"))
    colours = chance.uniform(0.0, 255.0, 3).astype(np.float32)
    if kind == "distractor":
        exemplar = materials.distractors[chance.integers(len(materials.distractors))]
        alpha, luminance = _random_rendering(exemplar, length, chance)
        assert luminance is not None
        colours = _tinted(luminance, alpha, colours)
    elif kind == "wire":
        alpha = _random_wire(size, chance)
        alpha = alpha[_tight(alpha)]
    else:
        alpha = _random_shape(length, chance)
        if kind == "patch":
            part = random_background(materials.photographs, max(alpha.shape), chance)
            colours = part[: alpha.shape[0], : alpha.shape[1]]
    corner = _random_corner(size, alpha.shape, chance)
    if scene.cover(corner, alpha):
        scene.paint(corner, alpha, colours)


def _muted_background(
    photographs: tuple[Image.Image, ...], size: int, chance: Generator
) -> np.ndarray:
    """A photograph with less contrast, so that there are colours to be told from it."""
    canvas = random_background(photographs, size, chance)
    mean = canvas.mean(axis=(0, 1))
    muted: np.ndarray = mean + np.float32(chance.uniform(0.35, 0.8)) * (canvas - mean)
    return muted


def _random_rendering(
    exemplar: Handwriting | CutOut, length: float, chance: Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """An exemplar in a random pose, whose longer side is as wanted: with a rim, cut tight."""
    pose = Pose(
        angle=chance.uniform(-MAX_ANGLE, MAX_ANGLE),
        shear=chance.uniform(-MAX_SHEAR, MAX_SHEAR),
        stretch=math.exp(chance.uniform(-1.0, 1.0) * math.log(MAX_STRETCH)),
    )
    alpha, luminance = exemplar.render(1.0, pose)
    scale = 1.0
    for _ in range(MEASUREMENTS):
        scale *= length / _longer_side(alpha)
        alpha, luminance = exemplar.render(scale, pose)
        if abs(_longer_side(alpha) - length) < TOLERANCE * length:
            break
    tight = _tight(alpha)
    alpha = np.pad(alpha[tight], CLEARANCE)
    if luminance is not None:
        luminance = np.pad(luminance[tight], CLEARANCE)
    return alpha, luminance


def _tight(alpha: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns beyond which there is nothing."""
    rows, columns = (np.flatnonzero(alpha.any(axis=axis)) for axis in (1, 0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _longer_side(alpha: np.ndarray) -> float:
    x1, y1, x2, y2 = extent(alpha).tolist()
    return max(x2 - x1, y2 - y1)


def _random_corner(size: int, shape: tuple[int, ...], chance: Generator) -> tuple[int, int]:
    row, column = (int(chance.integers(0, size - side + 1)) for side in shape)
    return row, column


def _colours(
    scene: Scene,
    corner: tuple[int, int],
    alpha: np.ndarray,
    around: np.ndarray,
    luminance: np.ndarray | None,
    chance: Generator,
) -> np.ndarray | None:
    """Colours that can be told from what lies around, ``None`` if there are none."""
    if luminance is None:
        low, high = scene.luminance(corner, around)
        return draw_colour(low, high, CONTRAST / OPACITY[0], chance)
    mean = float((scene.window(corner, alpha.shape) @ LUMA)[around & (alpha < 0.5)].mean())
    colour = draw_colour(mean, mean, CUT_OUT_CONTRAST / OPACITY[0], chance)
    if colour is None or not CUT_OUT_LUMINANCE[0] <= colour @ LUMA <= CUT_OUT_LUMINANCE[1]:
        return None
    return _tinted(luminance, alpha, colour)


def _tinted(luminance: np.ndarray, alpha: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """A texture around a colour, which is made paler: ``(h, w, 3)``."""
    grey = float(colour @ LUMA)
    colour = grey + 0.4 * (colour - grey)
    mean = float((luminance * alpha).sum() / alpha.sum())
    tinted: np.ndarray = np.clip(colour + (luminance - mean)[..., None], 0.0, 255.0)
    return tinted.astype(np.float32)


def _random_shape(length: float, chance: Generator) -> np.ndarray:
    """Coverage of a polygon with five to eight corners."""
    corners = int(chance.integers(5, 9))
    turns = np.sort(chance.uniform(0.0, 2 * math.pi, corners))
    radii = chance.uniform(0.4, 1.0, corners)
    side = 2 * math.ceil(length)
    points = side / 2 * (1 + radii[:, None] * np.stack([np.cos(turns), np.sin(turns)], axis=1))
    picture = Image.new("L", (side, side))
    ImageDraw.Draw(picture).polygon([*map(tuple, points.tolist())], fill=255)
    return np.asarray(picture.reduce(2), dtype=np.float32) / 255


def _random_wire(size: int, chance: Generator) -> np.ndarray:
    """Coverage of a wavy line from one side of the image to the other."""
    steps = np.linspace(0.0, 1.0, 24)
    waves = sum(
        chance.normal(0.0, 0.1 / k) * np.sin(2 * math.pi * (k * steps + chance.random()))
        for k in (1, 2, 3)
    )
    ends = chance.uniform(0.0, 1.0, 2)
    across = ends[0] + (ends[1] - ends[0]) * steps + waves
    points = 2 * size * np.stack([steps, across], axis=1)
    if chance.random() < 0.5:
        points = points[:, ::-1]
    width = round(chance.uniform(0.02, 0.05) * size)
    picture = Image.new("L", (2 * size, 2 * size))
    ImageDraw.Draw(picture).line(
        [*map(tuple, points.tolist())], fill=255, width=width, joint="curve"
    )
    return np.asarray(picture.reduce(2), dtype=np.float32) / 255
