"""Data sets in COCO's format: annotations, images and the usual folder layout.

A folder holds ``train2017/``, ``val2017/`` and ``annotations/instances_{train,val}2017.json``
(https://cocodataset.org/#format-data); other names that begin with ``train`` and ``val`` do too.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset

from detection.data.annotations import read_annotations
from detection.data.errors import DataError, DataWarning
from detection.data.images import check_image, read_image
from detection.data.types import Categories, Target

Transform = Callable[[Tensor, Target], tuple[Tensor, Target]]
"""``(image (3, h, w) uint8, target) -> (image, target)``."""

LAYOUT = (
    "expected: train2017/ and val2017/ with the images, annotations/instances_train2017.json and "
    "annotations/instances_val2017.json"
)


class CocoDataset(Dataset[tuple[Tensor, Target]]):
    """Images and boxes of one COCO instances file.

    An element is ``(image (3, h, w) uint8 RGB, Target)`` after ``transform``.  Only images that
    the file lists are used, in ascending order of id.  Crowd regions are no targets.  Boxes are
    clipped to the image; those with no area left are dropped, which a `DataWarning` counts and
    ``problems`` lists.

    Args:
        images: folder of the image files.
        annotations: the instances file.
        transform: see `detection.data.transforms`; ``None`` hands out the image as it is.
        categories: the classes to expect, those of a checkpoint or of the training set.
        skip_empty: leave out images without any target, as the published training does.

    Attributes:
        categories: the classes, `Categories`.
        image_ids: id of each element.
        names: file name of each element, relative to ``images``.
        sizes: annotated ``(height, width)`` of each element.
        coco: the `pycocotools.coco.COCO` of the whole file, for the evaluation.
        problems: one sentence for each annotation that is not trained on.

    Raises:
        DataError: the annotation file is unusable (see `detection.data.annotations`), its
            categories are not the expected ones, image files are missing, or nothing is left;
            on access, when an image is truncated or is not of the annotated size.

    Example:
        >>> CocoDataset(Path("val2017"), Path("nowhere.json"))
        Traceback (most recent call last):
        ...
        detection.data.errors.DataError: nowhere.json: there is no such annotation file.
    """

    def __init__(
        self,
        images: Path,
        annotations: Path,
        transform: Transform | None = None,
        *,
        categories: Categories | None = None,
        skip_empty: bool = False,
    ) -> None:
        content = read_annotations(annotations)
        if categories is not None and categories != content.categories:
            raise DataError(
                f"{annotations}: {_difference(content.categories, categories)}; both must have "
                "the same categories with the same ids."
            )
        _require_files(images, content.names, annotations)
        self.images = images
        self.transform = transform
        self.categories = content.categories
        self.problems = content.problems
        self._boxes, self._labels, self._starts = content.boxes, content.labels, content.starts
        self._rows = [
            i
            for i in range(len(content.names))
            if not skip_empty or content.starts[i + 1] > content.starts[i]
        ]
        if not self._rows:
            raise DataError(f"{annotations}: no image has a box to train on.")
        self.image_ids = [content.image_ids[i] for i in self._rows]
        self.names = [content.names[i] for i in self._rows]
        self.sizes = [content.sizes[i] for i in self._rows]
        self._coco: COCO | None = _index(content.document)
        if self.problems:
            warnings.warn(
                f"{annotations}: {len(self.problems)} of {len(self.coco.anns)} annotations are not "
                f"trained on. The first: {self.problems[0]}",
                DataWarning,
                stacklevel=2,
            )

    @property
    def coco(self) -> COCO:
        """The pycocotools index of the file; absent in the copies that loader workers hold."""
        if self._coco is None:
            raise RuntimeError("This copy was pickled for a worker: ask the data set itself.")
        return self._coco

    @property
    def number_of_targets(self) -> int:
        """Number of boxes to train on in the whole file."""
        return len(self._labels)

    def __getstate__(self) -> dict[str, Any]:
        # A worker needs pixels and boxes; the index of COCO weighs about a gigabyte.
        return {**self.__dict__, "_coco": None}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image_id, size = self.image_ids[index], self.sizes[index]
        image = read_image(self.path(index), size, f"image {image_id}")
        row = self._rows[index]
        owned = slice(int(self._starts[row]), int(self._starts[row + 1]))
        target = Target(
            boxes=self._boxes[owned].clone(),
            labels=self._labels[owned].clone(),
            image_id=image_id,
            original_size=size,
        )
        return (image, target) if self.transform is None else self.transform(image, target)

    def path(self, index: int) -> Path:
        """The image file of an element."""
        return self.images / self.names[index]


def load_coco_folder(
    root: Path,
    train_transform: Transform | None = None,
    val_transform: Transform | None = None,
    *,
    skip_empty: bool = False,
) -> tuple[CocoDataset, CocoDataset]:
    """The training and the validation set of a folder laid out as COCO.

    The folders may have any names that begin with ``train`` and ``val``, the annotation files
    the same names after ``instances_``; where there are several, those of 2017 are taken.

    Args:
        root: the folder.
        train_transform: applied to the training images.
        val_transform: applied to the validation images.
        skip_empty: leave training images without boxes out.

    Raises:
        DataError: part of the layout is missing (all of it is named), the two sets have
            different categories, no training box is left, or one set is unusable.

    Example:
        >>> load_coco_folder(Path("nowhere"))
        Traceback (most recent call last):
        ...
        detection.data.errors.DataError: nowhere: there is no such folder; expected: train2017/ \
and val2017/ with the images, annotations/instances_train2017.json and \
annotations/instances_val2017.json.
    """
    train = load_coco_split(root, "train", train_transform, skip_empty=skip_empty)
    if not train.number_of_targets:
        raise DataError(
            f"{train.images}: no annotation can be trained on; crowd regions and boxes without "
            "area do not count. Add boxes to the annotation file of the training set."
        )
    val = load_coco_split(root, "val", val_transform, categories=train.categories)
    return train, val


def load_coco_split(
    root: Path,
    split: Literal["train", "val"],
    transform: Transform | None = None,
    *,
    categories: Categories | None = None,
    skip_empty: bool = False,
) -> CocoDataset:
    """One of the two sets of a folder laid out as COCO; see `load_coco_folder`.

    Args:
        root: the folder.
        split: which.
        transform: applied to the images.
        categories: the classes to expect.
        skip_empty: leave images without boxes out.

    Raises:
        DataError: as `load_coco_folder`; what is missing of either set is named.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder; {LAYOUT}.")
    pairs = {name: _find_pair(root, name) for name in (split, "train", "val")}
    problems = [pair for pair in pairs.values() if isinstance(pair, str)]
    pair = pairs[split]
    if isinstance(pair, str):
        raise DataError(f"{root}: {'; '.join(problems)}; {LAYOUT}.")
    return CocoDataset(*pair, transform, categories=categories, skip_empty=skip_empty)


def check_images(dataset: CocoDataset) -> None:
    """Check that every image file of a data set is whole and has its annotated size.

    Takes about 0.1 ms per image: headers, checksums and end markers are read, not pixels.

    Raises:
        DataError: names the first three damaged files and says how many there are.

    Example:
        >>> import tempfile
        >>> from detection.data import compose_digits
        >>> root = compose_digits(
        ...     Path(tempfile.mkdtemp()) / "digits", train_images=2, val_images=1)
        >>> check_images(load_coco_folder(root)[0])
    """
    damaged = []
    for index, image_id in enumerate(dataset.image_ids):
        try:
            check_image(dataset.path(index), dataset.sizes[index], f"image {image_id}")
        except DataError as error:
            damaged.append(str(error))
    if damaged:
        raise DataError(
            f"{len(damaged)} of {len(dataset)} image files are unusable. {' '.join(damaged[:3])}"
        )


def _index(document: dict[str, Any]) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress by print
        coco = COCO()
        coco.dataset = document
        coco.createIndex()
    return coco


def _require_files(images: Path, names: list[str], annotations: Path) -> None:
    if not images.is_dir():
        raise DataError(f"{images}: there is no such folder of images; {LAYOUT}.")
    present = {entry.name for entry in images.iterdir()}
    missing = [name for name in names if name not in present and not (images / name).is_file()]
    if missing:
        raise DataError(
            f"{images}: {len(missing)} of the {len(names)} images that {annotations} lists are "
            f"missing: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}."
        )


def _find_pair(root: Path, split: str) -> tuple[Path, Path] | str:
    """Image folder and annotation file of a split, or what is wrong."""
    prefix = "instances_"
    folders = {path.name: path for path in sorted(root.glob(f"{split}*")) if path.is_dir()}
    files = {
        path.stem.removeprefix(prefix): path
        for path in sorted((root / "annotations").glob(f"{prefix}{split}*.json"))
    }
    wanted = f"{split}2017"
    missing = [
        what
        for what, found in ((f"{wanted}/", folders), (f"annotations/{prefix}{wanted}.json", files))
        if not found
    ]
    if missing:
        return f"missing {' and '.join(missing)}"
    shared = [name for name in files if name in folders]
    if wanted in shared:
        return folders[wanted], files[wanted]
    if len(shared) == 1:
        return folders[shared[0]], files[shared[0]]
    if len(folders) == 1 and len(files) == 1:
        return next(iter(folders.values())), next(iter(files.values()))
    return (
        f"cannot tell which of the folders {', '.join(folders)} belongs to which of "
        f"{', '.join(path.name for path in files.values())}"
    )


def _difference(found: Categories, expected: Categories) -> str:
    ours = dict(zip(found.ids, found.names, strict=True))
    theirs = dict(zip(expected.ids, expected.names, strict=True))
    wrong = [i for i in sorted({*ours, *theirs}) if ours.get(i) != theirs.get(i)]
    first = wrong[0]
    return (
        f"{len(wrong)} categories are not the expected ones, for instance id {first} "
        f"({ours.get(first)!r} here, {theirs.get(first)!r} expected)"
    )
