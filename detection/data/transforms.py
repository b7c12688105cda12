"""Augmentation and resizing of an image together with its boxes, on torchvision.transforms.v2.

The sizes and the two published schedules ("1x": resize and flip; "2x": random scales and crops)
are those of AdaMixer and DEQDet; zoom, shift and colour serve small data sets trained from
scratch.  All chance comes from torch's global generator, which the loader seeds per image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from detection.data.types import Target

CROP_SHORT_SIDES = (400, 500, 600)
CROP_SHORTEST, CROP_LONGEST = 384, 600
CROP_MAX_SIZE = 4200
"""Longest side before a crop of the 2x schedule; wider than any photograph comes out."""

PIXEL_MEAN = (124.0, 116.0, 104.0)
"""Fills what a zoom or a shift uncovers: ImageNet's mean, near 0 once the model normalises."""


@dataclass(frozen=True)
class AugmentationConfig:
    """How training images are changed, and the size of all images.

    Args:
        short_sides: the length of the short side is drawn from these; evaluation takes the
            largest.
        max_size: upper limit of the long side, in pixels.
        horizontal_flip: probability of a mirror image (0 for digits and letters).
        crop: the published 2x schedule: with probability ½, and before the final resizing, the
            image is resized to a short side of 400, 500 or 600 and a random part is cut out.
        scale_jitter: limits of a zoom about the centre; the size of the image stays.
        translate: largest shift, as a fraction of height and width; the size of the image stays.
        colour_jitter: strength of changes of brightness, contrast and saturation (and a quarter
            of it of hue), 0 to 1.

    Raises:
        ValueError: a field is out of its range.

    Example:
        >>> AugmentationConfig(short_sides=(128,), max_size=128, horizontal_flip=0.0).crop
        False
    """

    short_sides: tuple[int, ...] = (800,)
    max_size: int = 1333
    horizontal_flip: float = 0.5
    crop: bool = False
    scale_jitter: tuple[float, float] | None = None
    translate: float = 0.0
    colour_jitter: float = 0.0

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not self.short_sides or min(self.short_sides) < 1:
            raise ValueError(f"{name}(short_sides={self.short_sides}): give positive lengths.")
        if self.max_size < max(self.short_sides):
            raise ValueError(
                f"{name}(max_size={self.max_size}): the long side cannot be limited below the "
                f"short side {max(self.short_sides)}."
            )
        if not 0 <= self.horizontal_flip <= 1:
            raise ValueError(f"{name}(horizontal_flip={self.horizontal_flip}): a probability.")
        if self.scale_jitter is not None and not 0 < self.scale_jitter[0] <= self.scale_jitter[1]:
            raise ValueError(f"{name}(scale_jitter={self.scale_jitter}): give 0 < low <= high.")
        if not 0 <= self.translate < 1:
            raise ValueError(f"{name}(translate={self.translate}): must be in [0, 1).")
        if not 0 <= self.colour_jitter <= 1:
            raise ValueError(f"{name}(colour_jitter={self.colour_jitter}): must be in [0, 1].")


def fit_size(size: tuple[int, int], short_side: int, max_size: int) -> tuple[int, int]:
    """The size of an image resized to a short side, or less where the long side would exceed.

    ``scale = min(max_size / long, short_side / short)``, each side ``int(side * scale + 0.5)``.

    Args:
        size: ``(height, width)`` in pixels.
        short_side: the wanted length of the short side.
        max_size: upper limit of the long side.

    Returns:
        The new ``(height, width)``, at least 1 each.

    Example:
        >>> fit_size((480, 640), 800, 1333), fit_size((300, 1000), 800, 1333)
        ((800, 1067), (400, 1333))
    """
    scale = min(max_size / max(size), short_side / min(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


class TrainTransform:
    """Random flip, zoom and shift, crop, resizing and colour, as an `AugmentationConfig` says."""

    def __init__(self, config: AugmentationConfig) -> None:
        self.config = config
        strength = config.colour_jitter
        self._colour = (
            v2.ColorJitter(strength, strength, strength, strength / 4) if strength else None
        )

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        """Transform ``(3, h, w)`` uint8 and its boxes; boxes that leave the image are dropped."""
        config = self.config
        image, boxes = _wrap(image, target)
        if torch.rand(()) < config.horizontal_flip:
            image, boxes = F.horizontal_flip(image), F.horizontal_flip(boxes)
        if config.scale_jitter is not None or config.translate:
            image, boxes = self._zoom(image, boxes)
        if config.crop and torch.rand(()) < 0.5:
            image, boxes = _resize(image, boxes, _choose(CROP_SHORT_SIDES), CROP_MAX_SIZE)
            image, boxes = _random_crop(image, boxes)
        image, boxes = _resize(image, boxes, _choose(config.short_sides), config.max_size)
        if self._colour is not None:
            image = self._colour(image)
        return _unwrap(image, boxes, target)

    def _zoom(self, image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Look at a window of the image, which may reach beyond it, at the image's size.

        The window lies on whole pixels, so that the boxes stay exact.
        """
        height, width = image.shape[-2:]
        low, high = self.config.scale_jitter or (1.0, 1.0)
        # Uniform in the logarithm: as many pictures enlarged by a factor as reduced by it.
        zoom = math.exp(_uniform(math.log(low), math.log(high)))
        rows, columns = max(1, round(height / zoom)), max(1, round(width / zoom))
        shift = self.config.translate
        top = round((height - rows) / 2 + height * _uniform(-shift, shift))
        left = round((width - columns) / 2 + width * _uniform(-shift, shift))
        padding = [
            max(0, -left),
            max(0, -top),
            max(0, left + columns - width),
            max(0, top + rows - height),
        ]
        window = (top + padding[1], left + padding[0], rows, columns)
        image = F.crop(F.pad(image, padding, fill=list(PIXEL_MEAN)), *window)
        boxes = F.crop(F.pad(boxes, padding), *window)
        return (
            F.resize(image, [height, width], antialias=True),
            F.resize(boxes, [height, width]),
        )


class EvalTransform:
    """Resizing to one size rule: the largest of ``short_sides``, limited by ``max_size``."""

    def __init__(self, config: AugmentationConfig) -> None:
        self.config = config

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        """Resize ``(3, h, w)`` uint8 and its boxes."""
        image, boxes = _wrap(image, target)
        resized = _resize(image, boxes, max(self.config.short_sides), self.config.max_size)
        return _unwrap(*resized, target)

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The ``(height, width)`` that an image of ``size`` comes out with."""
        return fit_size(size, max(self.config.short_sides), self.config.max_size)


def train_transform(config: AugmentationConfig) -> TrainTransform:
    """The random transform of the training images.

    A box is clipped to what is left of the image, and dropped if nothing is left of it.

    Example:
        >>> image = torch.zeros(3, 480, 640, dtype=torch.uint8)
        >>> target = Target(torch.tensor([[0.0, 0, 64, 48]]), torch.tensor([2]), 1, (480, 640))
        >>> config = AugmentationConfig(horizontal_flip=1.0)
        >>> image, target = train_transform(config)(image, target)
        >>> image.shape, target.boxes.round()
        (torch.Size([3, 800, 1067]), tensor([[ 960.,    0., 1067.,   80.]]))
    """
    return TrainTransform(config)


def eval_transform(config: AugmentationConfig) -> EvalTransform:
    """The transform of validation images and of prediction: resizing, nothing random.

    Example:
        >>> eval_transform(AugmentationConfig()).output_size((480, 640))
        (800, 1067)
    """
    return EvalTransform(config)


def _wrap(image: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    boxes = tv_tensors.BoundingBoxes(
        target.boxes,
        format=tv_tensors.BoundingBoxFormat.XYXY,
        canvas_size=(image.shape[-2], image.shape[-1]),
    )
    return tv_tensors.Image(image), boxes


def _unwrap(image: Tensor, boxes: Tensor, target: Target) -> tuple[Tensor, Target]:
    image, boxes = image.as_subclass(Tensor), boxes.as_subclass(Tensor)
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return image, replace(target, boxes=boxes[kept], labels=target.labels[kept])


def _resize(image: Tensor, boxes: Tensor, short_side: int, max_size: int) -> tuple[Tensor, Tensor]:
    size = list(fit_size((image.shape[-2], image.shape[-1]), short_side, max_size))
    if size == list(image.shape[-2:]):
        return image, boxes
    return F.resize(image, size, antialias=True), F.resize(boxes, size)


def _random_crop(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """A part with sides between ``min(side, 384)`` and ``min(side, 600)``, anywhere."""
    height, width = image.shape[-2:]
    rows = _integer(min(height, CROP_SHORTEST), min(height, CROP_LONGEST))
    columns = _integer(min(width, CROP_SHORTEST), min(width, CROP_LONGEST))
    window = (_integer(0, height - rows), _integer(0, width - columns), rows, columns)
    return F.crop(image, *window), F.crop(boxes, *window)


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _integer(low: int, high: int) -> int:
    """Uniform among the integers from ``low`` to ``high``, both included."""
    return int(torch.randint(low, high + 1, ()))


def _choose(values: tuple[int, ...]) -> int:
    return values[_integer(0, len(values) - 1)]
