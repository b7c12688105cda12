"""The embedded data set of the benchmark: 24 classes of real things among clutter.

Handwritten digits (scikit-learn), printed letters (the fonts of Matplotlib), ancient coins and
faces (both cut out of photographs of scikit-image) lie on photographs and partly cover each
other; `detection.data.materials` names the sources and licences.  Nothing is downloaded.
Training and validation share no handwritten digit, type face, coin, face or photograph.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from numpy.random import Generator

from detection.data.composed import Composition, Drawn, compose
from detection.data.types import Categories

if TYPE_CHECKING:
    from detection.data.scene_images import SceneMaterials

FORMAT = 4
"""Changes whenever the same parameters give other images."""

LETTERS = "AEHKMNRTVWXY"
"""Those that, leaning a little, are taken for no digit and for no other of them: no B (8),
D, O, Q (0), G (6), I, J, L (1), S (5), Z (2); C (G), F (E), P (R) and U (V) neither."""

TRAIN_PHOTOGRAPHS = (
    "brick",
    "china.jpg",
    "grass",
    "hubble_deep_field",
    "immunohistochemistry",
    "moon",
    "rocket",
    "stereo_motorcycle",
)
VAL_PHOTOGRAPHS = ("chelsea", "coffee", "flower.jpg", "gravel")
"""None that shows a human face or writing; one that shows a cat's."""

_NAMES = (*(str(digit) for digit in range(10)), *LETTERS, "coin", "face")

scene_categories = Categories(names=_NAMES, ids=tuple(range(1, len(_NAMES) + 1)))
"""The digits 0 to 9, twelve capital letters, coins and faces, with the COCO ids 1 to 24."""


def compose_scenes(
    root: Path,
    *,
    train_images: int = 2000,
    val_images: int = 600,
    size: int = 256,
    seed: int = 0,
) -> Path:
    """Compose the scenes data set, or find it composed already.

    The folder is laid out as COCO 2017 (``train2017/``, ``val2017/``, ``annotations/``) with
    JPEG files of quality 95, and a manifest ``scenes.json``.  Each image holds 1 to 10 objects
    whose longer side has 8 to 160 pixels (at ``size`` 256), patches of other photographs, faceless
    ovals, shapes and wires that are none, and whatever lies on top covers what lies below.  As in
    COCO, a box is that of the visible part, which is most of the object; an ``area`` is that of
    the box.  Equal parameters give equal bytes.  The folder appears under its name only when it
    is complete; several processes may compose it at once.

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
        ImportError: scikit-learn, scikit-image or Matplotlib is not installed.

    Example:
        >>> import tempfile
        >>> root = compose_scenes(
        ...     Path(tempfile.mkdtemp()) / "scenes", train_images=2, val_images=1)
        >>> sorted(path.name for path in root.iterdir())
        ['annotations', 'scenes.json', 'train2017', 'val2017']
    """
    return compose(
        _scenes, root, train_images=train_images, val_images=val_images, size=size, seed=seed
    )


def _materials(split: str) -> SceneMaterials:
    """Exemplars and photographs of "train" or "val", which have none in common."""
    try:
        from detection.data import materials
        from detection.data.compositing import sharpen
        from detection.data.scene_images import CutOut, Handwriting, SceneMaterials

        ink, digits = materials.handwritten_digits(split)
        letters, places = materials.printed_letters(split, LETTERS)
        faces, no_faces = materials.faces(split)
        coins = materials.coins(split)
        photographs = materials.load_photographs(
            VAL_PHOTOGRAPHS if split == "val" else TRAIN_PHOTOGRAPHS
        )
    except ImportError as error:
        raise ImportError(
            "The scenes data set needs scikit-learn, scikit-image, Matplotlib and scipy "
            f'({error}); install them with: pip install ".[detection]"'
        ) from error
    strokes = [Handwriting(exemplar) for exemplar in sharpen(ink)]
    prints = [CutOut(picture, textured=False) for picture in letters]
    return SceneMaterials(
        classes=(
            *(
                tuple(s for s, found in zip(strokes, digits, strict=True) if found == digit)
                for digit in range(10)
            ),
            *(
                tuple(p for p, found in zip(prints, places, strict=True) if found == place)
                for place in range(len(LETTERS))
            ),
            tuple(map(CutOut, coins)),
            tuple(map(CutOut, faces)),
        ),
        distractors=tuple(map(CutOut, no_faces)),
        photographs=photographs,
    )


def _draw(materials: SceneMaterials, size: int, chance: Generator) -> Drawn:
    from detection.data.scene_images import compose_scene

    return compose_scene(materials, size, chance)


_scenes = Composition(
    name="scenes",
    format=FORMAT,
    description="Digits, letters, coins and faces among clutter on photographs",
    categories=scene_categories,
    supercategories=(*("digit",) * 10, *("letter",) * len(LETTERS), "coin", "face"),
    least_size=64,
    materials=_materials,
    draw=_draw,
)
