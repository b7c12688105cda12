"""Real material that packages ship, for the embedded data sets: handwriting, print, photographs.

Nothing is downloaded.  What one split is made of, the other never shows.

- Handwritten digits: scikit-learn's (E. Alpaydin and C. Kaynak, Optical Recognition of
  Handwritten Digits, UCI 1998; CC BY 4.0).
- Printed letters: the fonts that come with Matplotlib: DejaVu (Bitstream Vera licence), STIX
  (SIL Open Font License) and Computer Modern (BaKoMa licence).
- Photographs: scikit-learn's (CC BY 2.0) and scikit-image's (public domain, CC0, or no known
  restrictions; for the moon and the motorcycle none are stated).
- Cut-outs from photographs of scikit-image: Greek coins (Brooklyn Museum, no known copyright
  restrictions), and faces of Labeled Faces in the Wild (Huang et al., 2007; no licence is stated,
  it was collected for research).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy import ndimage

VAL_SHARE = 5
"""Every fifth exemplar of a class is for validation."""

FACES = 100
"""The first so many of scikit-image's pictures from Labeled Faces in the Wild are faces."""

MASTER_SIZE = 256
"""Pixels per em of a printed letter before it is given its size."""

MARGIN = 8
"""Empty pixels around a picture, so that its edge stays smooth when it is turned."""

COIN_LEVELS = (30, 150)
"""Below and above them, a pixel of the coins' photograph is certainly table, or coin."""

COIN_AREA = 1000
"""Least number of pixels of a whole coin."""

TRAIN_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "cmr10",
    "cmb10",
)
VAL_FONTS = ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmss10", "cmtt10")
"""No design is in both: DejaVu and Computer Modern's roman; STIX, sans and typewriter."""


def is_held_out(labels: np.ndarray) -> np.ndarray:
    """Which exemplars are for validation: every `VAL_SHARE`-th of each label.

    Args:
        labels: ``(n,)`` the class of each.

    Returns:
        ``(n,)`` truth values.

    Example:
        >>> is_held_out(np.array([7, 7, 7, 7, 3, 7])).tolist()
        [False, False, False, False, False, True]
    """
    rank = np.zeros(len(labels), dtype=np.int64)  # how many of the same label came before
    for label in np.unique(labels):
        rank[labels == label] = np.arange((labels == label).sum())
    held_out: np.ndarray = rank % VAL_SHARE == VAL_SHARE - 1
    return held_out


def handwritten_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The readable handwritten digits of a split.

    Args:
        split: "train" or "val".

    Returns:
        ``(n, 8, 8)`` ink between 0 and 1; ``(n,)`` the digit of each.

    Example:
        >>> ink, digits = handwritten_digits("val")
        >>> ink.shape, sorted(set(digits.tolist()))
        ((353, 8, 8), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    from sklearn.datasets import load_digits

    levels, labels = load_digits(return_X_y=True)
    readable = _readable(levels, labels)
    levels, labels = levels[readable], labels[readable]
    held_out = is_held_out(labels)
    chosen = held_out if split == "val" else ~held_out
    return levels[chosen].reshape(-1, 8, 8) / 16.0, labels[chosen]


def printed_letters(split: str, letters: str) -> tuple[list[Image.Image], np.ndarray]:
    """Letters in the type faces of a split.

    Args:
        split: "train" or "val".
        letters: which.

    Returns:
        pictures of luminance (white) and coverage; for each, its place in ``letters``.

    Example:
        >>> pictures, labels = printed_letters("val", "AT")
        >>> len(pictures), pictures[0].mode, labels[:4].tolist()
        (10, 'LA', [0, 1, 0, 1])
    """
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    pictures, labels = [], []
    for name in VAL_FONTS if split == "val" else TRAIN_FONTS:
        font = ImageFont.truetype(folder / f"{name}.ttf", MASTER_SIZE)
        for label, letter in enumerate(letters):
            coverage = Image.new("L", (2 * MASTER_SIZE, 2 * MASTER_SIZE))
            place = (MASTER_SIZE // 2, MASTER_SIZE // 4)
            ImageDraw.Draw(coverage).text(place, letter, fill=255, font=font)
            coverage = ImageOps.expand(coverage.crop(coverage.getbbox()), MARGIN)
            pictures.append(Image.merge("LA", (Image.new("L", coverage.size, 255), coverage)))
            labels.append(label)
    return pictures, np.array(labels)


def coins(split: str) -> list[Image.Image]:
    """Ancient coins cut out of their photograph.

    Args:
        split: "train" or "val".

    Returns:
        pictures of luminance and coverage.

    Example:
        >>> len(coins("train")), len(coins("val"))
        (20, 4)
    """
    from skimage import data, filters, segmentation

    photograph = data.coins()
    markers = np.zeros(photograph.shape, dtype=np.int32)
    markers[photograph < COIN_LEVELS[0]] = 1
    markers[photograph > COIN_LEVELS[1]] = 2
    regions = segmentation.watershed(filters.sobel(photograph), markers)
    found, _ = ndimage.label(ndimage.binary_fill_holes(regions == 2))
    pictures = []
    for number, window in enumerate(ndimage.find_objects(found), start=1):
        rows, columns = (slice(part.start - 2, part.stop + 2) for part in window)
        mask = found[rows, columns] == number
        if mask.sum() < COIN_AREA:
            continue
        coverage = np.clip(2 * ndimage.gaussian_filter(mask.astype(float), 1.0) - 0.5, 0.0, 1.0)
        pictures.append(_picture(photograph[rows, columns], coverage * 255))
    return _share(pictures, split)


def faces(split: str) -> tuple[list[Image.Image], list[Image.Image]]:
    """Faces, and other parts of the same photographs, in ovals.

    Args:
        split: "train" or "val".

    Returns:
        two lists of pictures of luminance and coverage: faces; no faces.

    Example:
        >>> [len(pictures) for pictures in faces("val")]
        [20, 20]
    """
    from skimage import data

    photographs = (data.lfw_subset() * 255).round()
    side = photographs.shape[1]
    large = 4 * side  # so that the edge of the oval is smooth
    y, x = (np.mgrid[:large, :large] + 0.5) * 2 / large - 1
    coverage = np.clip((1 - np.hypot(x / 0.84, y)) * large / 2 + 0.5, 0.0, 1.0) * 255
    pictures = []
    for photograph in photographs:
        picture = Image.fromarray(photograph.astype(np.uint8))
        pictures.append(
            _picture(np.asarray(picture.resize((large, large), Image.Resampling.BICUBIC)), coverage)
        )
    return _share(pictures[:FACES], split), _share(pictures[FACES:], split)


def load_photographs(names: tuple[str, ...]) -> tuple[Image.Image, ...]:
    """Photographs of scikit-image, and with the ending ``.jpg`` of scikit-learn, in RGB.

    Example:
        >>> [photograph.size for photograph in load_photographs(("chelsea", "flower.jpg"))]
        [(451, 300), (640, 427)]
    """
    from skimage import data
    from sklearn.datasets import load_sample_image

    pictures = []
    for name in names:
        is_file = name.endswith(".jpg")
        pixels = load_sample_image(name) if is_file else getattr(data, name)()
        if isinstance(pixels, tuple):  # the left picture of a stereoscopic pair
            pixels = pixels[0]
        pictures.append(Image.fromarray(pixels).convert("RGB"))
    return tuple(pictures)


def _readable(levels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which exemplars look like their label: at least 2 of their 5 nearest neighbours share it.

    It leaves out 15 of 1797 that a person cannot name either.
    """
    squares = (levels**2).sum(axis=1)
    distance = squares[:, None] + squares - 2 * levels @ levels.T
    np.fill_diagonal(distance, np.inf)
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :5]
    agreeing: np.ndarray = (labels[nearest] == labels[:, None]).sum(axis=1)
    return agreeing >= 2


def _picture(luminance: np.ndarray, coverage: np.ndarray) -> Image.Image:
    """With a margin, into which the luminance goes on as it ends."""
    luminance, coverage = np.pad(luminance, MARGIN, mode="edge"), np.pad(coverage, MARGIN)
    bands = (Image.fromarray(band.round().astype(np.uint8)) for band in (luminance, coverage))
    return Image.merge("LA", tuple(bands))


def _share(pictures: list[Image.Image], split: str) -> list[Image.Image]:
    held_out = is_held_out(np.zeros(len(pictures)))
    wanted = split == "val"
    return [picture for picture, held in zip(pictures, held_out, strict=True) if held == wanted]
