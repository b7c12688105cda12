"""The embedded data set: real handwritten digits on real photographs, as a COCO folder.

The digits are scikit-learn's (exemplars of 8x8 pixels, from E. Alpaydin and C. Kaynak,
Optical Recognition of Handwritten Digits, UCI 1998), the photographs those that come with
scikit-learn and scikit-image; nothing is downloaded.  Training and validation share neither an
exemplar nor a photograph.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from numpy.random import Generator

from detection.data.composed import Composition, Drawn, compose
from detection.data.types import Categories

if TYPE_CHECKING:
    from detection.data.digit_images import Materials

FORMAT = 1
"""Changes whenever the same parameters give other images."""

TRAIN_PHOTOGRAPHS = (
    "astronaut",
    "brick",
    "camera",
    "china.jpg",
    "grass",
    "hubble_deep_field",
    "immunohistochemistry",
    "moon",
    "rocket",
    "stereo_motorcycle",
)
VAL_PHOTOGRAPHS = ("chelsea", "coffee", "flower.jpg", "gravel")
digits_categories = Categories(
    names=tuple(str(digit) for digit in range(10)), ids=tuple(range(1, 11))
)
"""The digits 0 to 9 with the COCO ids 1 to 10."""


def compose_digits(
    root: Path,
    *,
    train_images: int = 4000,
    val_images: int = 500,
    size: int = 128,
    seed: int = 0,
) -> Path:
    """Compose the digits data set, or find it composed already.

    The folder is laid out as COCO 2017 (``train2017/``, ``val2017/``, ``annotations/``) with
    JPEG files of quality 95, and a manifest ``digits.json``.  Each image holds 1 to 5 digits of
    about 20 to 64 pixels (at ``size`` 128); an ``area`` is that of the box.  Equal parameters give
    equal bytes.  The folder appears under its name only when it is complete; several processes
    may compose it at once.

    Args:
        root: the folder to write.
        train_images: number of training images.
        val_images: number of validation images.
        size: side of the images in pixels, at least 64.
        seed: not negative.

    Returns:
        ``root``.

    Raises:
        DataError: ``root`` exists and is something else, has other parameters, or was changed
            since it was composed; it is then left as it is.
        ValueError: a parameter is out of its range.
        ImportError: scikit-learn or scikit-image is not installed.

    Example:
        >>> import tempfile
        >>> root = compose_digits(
        ...     Path(tempfile.mkdtemp()) / "digits", train_images=2, val_images=1)
        >>> sorted(path.name for path in root.iterdir())
        ['annotations', 'digits.json', 'train2017', 'val2017']
    """
    return compose(
        _digits, root, train_images=train_images, val_images=val_images, size=size, seed=seed
    )


def _materials(split: str) -> Materials:
    """Exemplars and photographs of "train" or "val", which have none in common."""
    try:
        from detection.data.compositing import sharpen
        from detection.data.digit_images import Materials
        from detection.data.materials import handwritten_digits, load_photographs

        ink, labels = handwritten_digits(split)
        photographs = load_photographs(VAL_PHOTOGRAPHS if split == "val" else TRAIN_PHOTOGRAPHS)
    except ImportError as error:
        raise ImportError(
            f"The digits data set needs scikit-learn, scikit-image and scipy ({error}); install "
            'them with: pip install ".[detection]"'
        ) from error
    return Materials(exemplars=sharpen(ink), labels=labels, photographs=photographs)


def _draw(materials: Materials, size: int, chance: Generator) -> Drawn:
    from detection.data.digit_images import compose_image

    return compose_image(materials, size, chance)


_digits = Composition(
    name="digits",
    format=FORMAT,
    description="Handwritten digits composed on photographs",
    categories=digits_categories,
    supercategories=("digit",) * 10,
    least_size=64,
    materials=_materials,
    draw=_draw,
)
