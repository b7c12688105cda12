"""The data set that everything trains on and is evaluated with: annotations beside images.

`detection.data.folders` finds both in a folder; other formats than COCO become COCO annotations.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset

from detection.data.annotations import Annotations, read_annotations
from detection.data.errors import DataError, DataWarning
from detection.data.images import check_image, read_image
from detection.data.types import Categories, Target

Transform = Callable[[Tensor, Target], tuple[Tensor, Target]]
"""``(image (3, h, w) uint8, target) -> (image, target)``."""


class CocoDataset(Dataset[tuple[Tensor, Target]]):
    """Images and boxes of one COCO instances file, or of what was read from another format.

    An element is ``(image (3, h, w) uint8 RGB, Target)`` after ``transform``.  Only images that
    the file lists are used, in ascending order of id.  Crowd regions are no targets.  Boxes are
    clipped to the image; those with no area left are dropped, which a `DataWarning` counts and
    ``problems`` lists.

    Args:
        images: folder of the image files.
        annotations: the instances file, or what `check_annotations` has read.
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
        detection.data.errors.DataError: nowhere.json: there is no such annotation file; add it.
    """

    def __init__(
        self,
        images: Path,
        annotations: Path | Annotations,
        transform: Transform | None = None,
        *,
        categories: Categories | None = None,
        skip_empty: bool = False,
    ) -> None:
        content = (
            annotations if isinstance(annotations, Annotations) else read_annotations(annotations)
        )
        source = content.source
        if categories is not None and categories != content.categories:
            raise DataError(
                f"{source}: {_difference(content.categories, categories)}; both must have "
                "the same categories with the same ids."
            )
        missing = missing_files(images, content.names)
        if missing:
            raise DataError(
                f"{images}: {len(missing)} of the {len(content.names)} images that {source} lists "
                f"are missing: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}."
            )
        self.images = images
        self.transform = transform
        self.categories = content.categories
        self.problems = tuple(map(str, content.not_trained_on))
        self._boxes, self._labels, self._starts = content.boxes, content.labels, content.starts
        self._rows = [
            i
            for i in range(len(content.names))
            if not skip_empty or content.starts[i + 1] > content.starts[i]
        ]
        if not self._rows:
            raise DataError(f"{source}: no image has a box to train on.")
        self.image_ids = [content.image_ids[i] for i in self._rows]
        self.names = [content.names[i] for i in self._rows]
        self.sizes = [content.sizes[i] for i in self._rows]
        self._coco: COCO | None = _index(content.document)
        if self.problems:
            warnings.warn(
                f"{source}: {len(self.problems)} of {len(self.coco.anns)} annotations are not "
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


def check_images(dataset: CocoDataset) -> None:
    """Check that every image file of a data set is whole and has its annotated size.

    Takes about 0.1 ms per image: headers, checksums and end markers are read, not pixels.  What
    damage this misses, inside JPEG data above all, `detection.data.check_folder` finds.

    Raises:
        DataError: names the first three damaged files and says how many there are.

    Example:
        >>> import tempfile
        >>> from detection.data import compose_digits, load_coco_folder
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
        coco.dataset = _ready_for_pycocotools(document)
        coco.createIndex()
    return coco


def _ready_for_pycocotools(document: dict[str, Any]) -> dict[str, Any]:
    """Fill in what pycocotools takes for granted.

    Its evaluation uses the annotation id 0 as "not matched", so an annotation that has it would
    count as missed however well it is found: that one gets a new id.
    """
    document.setdefault("info", {})
    document.setdefault("licenses", [])
    for record in document["annotations"]:
        if record["id"] == 0:
            record["id"] = max(other["id"] for other in document["annotations"]) + 1
            break
    return document


def missing_files(images: Path, names: list[str]) -> list[str]:
    """The names that are no files in a folder of images; `DataError` if there is no such folder."""
    if not images.is_dir():
        raise DataError(f"{images}: there is no such folder of images; put the images there.")
    present = {entry.name for entry in images.iterdir()}
    return [name for name in names if name not in present and not (images / name).is_file()]


def _difference(found: Categories, expected: Categories) -> str:
    ours = dict(zip(found.ids, found.names, strict=True))
    theirs = dict(zip(expected.ids, expected.names, strict=True))
    wrong = [i for i in sorted({*ours, *theirs}) if ours.get(i) != theirs.get(i)]
    first = wrong[0]
    return (
        f"{len(wrong)} categories are not the expected ones, for instance id {first} "
        f"({ours.get(first)!r} here, {theirs.get(first)!r} expected)"
    )
