"""Folders of labelled images, recognised by what lies in them: COCO, YOLO or Pascal VOC.

Nothing is guessed in silence: a folder that could be read in two ways, or that is not divided into
training and validation, is refused with what to do.  `split_folder` divides one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from detection.data.annotations import Annotations, check_annotations
from detection.data.coco import CocoDataset, Transform, missing_files
from detection.data.coco_folder import LAYOUT, complaints_of, find_coco
from detection.data.errors import DataError
from detection.data.problems import Problems
from detection.data.splits import WHOLE, Layout, Reading, SplitName
from detection.data.types import Categories
from detection.data.voc_folder import find_voc
from detection.data.yolo_folder import find_yolo

LAYOUTS = f"""\
{LAYOUT.removeprefix("expected: ")} (COCO; or train/_annotations.coco.json and \
valid/_annotations.coco.json among the images), \
YOLO (data.yaml, or classes.txt with images/train, images/val, labels/train and labels/val), or \
Pascal VOC (JPEGImages, Annotations, ImageSets/Main/train.txt and val.txt; or XML files beside the \
images of train and val)"""


def recognise(root: Path) -> Layout:
    """The format and the splits of a folder of labelled images.

    Args:
        root: the folder, or the ``data.yaml`` of a YOLO data set.

    Raises:
        DataError: it is of no format that is known, or could be of several.

    Example:
        >>> import tempfile
        >>> from detection.data import compose_digits
        >>> root = compose_digits(
        ...     Path(tempfile.mkdtemp()) / "digits", train_images=2, val_images=1)
        >>> layout = recognise(root)
        >>> layout.format, sorted(layout.splits)
        ('COCO', ['train', 'val'])
    """
    root = Path(root)
    if root.is_file() and root.suffix.lower() in (".yaml", ".yml"):
        found = [find_yolo(root)]
    elif not root.is_dir():
        raise DataError(f"{root}: there is no such folder; expected: {LAYOUTS}.")
    else:
        found = [find_coco(root), find_yolo(root), find_voc(root)]
    layouts = [layout for layout in found if layout is not None]
    if len(layouts) > 1:
        formats = " and ".join(layout.format for layout in layouts)
        raise DataError(
            f"{root}: this could be read as {formats}; move the annotations of one of them to "
            "another folder, or give the path of a data.yaml."
        )
    if not layouts:
        raise DataError(f"{root}: no data set is recognised here; expected: {LAYOUTS}.")
    return layouts[0]


def load_folder(
    root: Path,
    train_transform: Transform | None = None,
    val_transform: Transform | None = None,
    *,
    skip_empty: bool = False,
) -> tuple[CocoDataset, CocoDataset]:
    """The training and the validation set of a folder of COCO, YOLO or Pascal VOC.

    Which of them it is, is told from its files.  The classes are those of the data: their names,
    and the ids of COCO, the numbers of YOLO, or 1, 2, ... in alphabetical order for Pascal VOC.

    Args:
        root: the folder, or the ``data.yaml`` of a YOLO data set.
        train_transform: applied to the training images.
        val_transform: applied to the validation images.
        skip_empty: leave training images without boxes out.

    Raises:
        DataError: the folder is of no format that is known or could be of several, one of the
            two sets is missing, their classes differ, no training box is left, or one of them is
            unusable.

    Example:
        >>> import tempfile
        >>> from detection.data import compose_digits
        >>> root = compose_digits(
        ...     Path(tempfile.mkdtemp()) / "digits", train_images=2, val_images=1)
        >>> train, val = load_folder(root)
        >>> len(train), len(val), train.categories.names[:3]
        (2, 1, ('0', '1', '2'))
    """
    return _load_both(recognise(root), train_transform, val_transform, skip_empty)


def load_split(
    root: Path,
    split: SplitName,
    transform: Transform | None = None,
    *,
    categories: Categories | None = None,
    skip_empty: bool = False,
) -> CocoDataset:
    """One set of a folder of COCO, YOLO or Pascal VOC; see `load_folder`.

    Args:
        root: the folder, or the ``data.yaml`` of a YOLO data set.
        split: ``"train"``, ``"val"`` or ``"test"``.
        transform: applied to the images.
        categories: the classes to expect.
        skip_empty: leave images without boxes out.

    Raises:
        DataError: as `load_folder`.

    Example:
        >>> load_split(Path("nowhere"), "val")
        Traceback (most recent call last):
        ...
        detection.data.errors.DataError: nowhere: there is no such folder; expected: ...
    """
    return _load(recognise(root), split, transform, categories, skip_empty)


def load_coco_folder(
    root: Path,
    train_transform: Transform | None = None,
    val_transform: Transform | None = None,
    *,
    skip_empty: bool = False,
) -> tuple[CocoDataset, CocoDataset]:
    """The training and the validation set of a folder of COCO annotations.

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
    _coco_layout(root, "train"), _coco_layout(root, "val")
    return _load_both(_coco_layout(root, "train"), train_transform, val_transform, skip_empty)


def load_coco_split(
    root: Path,
    split: SplitName,
    transform: Transform | None = None,
    *,
    categories: Categories | None = None,
    skip_empty: bool = False,
) -> CocoDataset:
    """One of the sets of a folder of COCO annotations; see `load_coco_folder`.

    Args:
        root: the folder.
        split: which.
        transform: applied to the images.
        categories: the classes to expect.
        skip_empty: leave images without boxes out.

    Raises:
        DataError: as `load_coco_folder`; what is missing of either set is named.
    """
    return _load(_coco_layout(root, split), split, transform, categories, skip_empty)


def split_folder(root: Path, out: Path, *, share: float = 0.2, seed: int = 0) -> Path:
    """Divide a folder that has one split into training and validation, as a COCO folder.

    Images are linked where the file system allows it, and copied otherwise; ``root`` stays as it
    is.  Chance depends on the contents of the files and ``seed`` alone: files that are equal go to
    the same side, and images that are added later move hardly any.

    Args:
        root: a folder of COCO, YOLO or Pascal VOC that is not divided, or has training data alone.
        out: the folder to write; must not exist.
        share: of the images, for validation.
        seed: of the choice.

    Returns:
        ``out``.

    Raises:
        DataError: ``root`` is divided already or unusable, ``out`` exists, or there are too few
            images.
        ValueError: ``share`` is not between 0 and 1.

    Example:
        >>> split_folder(Path("nowhere"), Path("divided"))
        Traceback (most recent call last):
        ...
        detection.data.errors.DataError: nowhere: there is no such folder; expected: ...
    """
    out = Path(out)
    if not 0 < share < 1:
        raise ValueError(f"split_folder(share={share}): must be between 0 and 1.")
    layout = recognise(root)
    names = [name for name in (WHOLE, "train") if name in layout.splits]
    if "val" in layout.splits or not names:
        raise DataError(
            f"{root}: this folder has {' and '.join(layout.splits) or 'no split'}; only one "
            "that is not divided, or has training data alone, can be divided."
        )
    if out.exists():
        raise DataError(f"{out}: this exists already; choose another folder to write.")
    reading, content = read_split(layout, names[0])
    missing = missing_files(reading.images, content.names)
    if missing:
        raise DataError(f"{reading.images}: {len(missing)} images are missing, as {missing[0]}.")
    groups: dict[bytes, list[int]] = {}
    for i, name in enumerate(content.names):
        groups.setdefault(_draw(reading.images / name, seed), []).append(i)
    wanted, chosen = max(1, round(share * len(content.names))), set[int]()
    for draw in sorted(groups):
        if len(chosen) < wanted:
            chosen.update(groups[draw])
    if len(chosen) == len(content.names):
        raise DataError(f"{root}: {len(groups)} different images are too few to be divided.")
    for split, validating in (("train", False), ("val", True)):
        part = [i for i in range(len(content.names)) if (i in chosen) == validating]
        _write_part(reading, content, part, out, split)
    return out


def read_split(layout: Layout, split: str) -> tuple[Reading, Annotations]:
    """A split of a folder, read and checked; `DataError` where there is anything wrong."""
    problems = Problems()
    reading = layout.splits[split](problems)
    content = None
    if reading is not None:
        content = check_annotations(reading.document, reading.source, problems, reading.places)
    problems.raise_errors()
    assert reading is not None
    assert content is not None
    return reading, content


def absence(layout: Layout, split: str) -> str:
    """What to say of a folder that lacks a split."""
    complaint = layout.complaints.get(split, f"there is no split {split}")
    found = [name for name in layout.splits if name != WHOLE]
    text = f"{layout.root}: as {layout.format}, {complaint}"
    text += f" (found: {', '.join(found)})" if found else " (the folder is not divided)"
    if "val" not in layout.splits and "test" in layout.splits and split == "val":
        return f"{text}; if the test set is to be used for validation, call it val."
    if "val" not in layout.splits and (WHOLE in layout.splits or "train" in layout.splits):
        return (
            f"{text}; detection.data.split_folder(root, out) divides it into training and "
            "validation."
        )
    return f"{text}; add it."


def _coco_layout(root: Path, split: str) -> Layout:
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder; {LAYOUT}.")
    layout = find_coco(root)
    if layout is None or split not in layout.splits:
        raise DataError(f"{root}: {complaints_of(root, split)}; {LAYOUT}.")
    return layout


def _load_both(
    layout: Layout,
    train_transform: Transform | None,
    val_transform: Transform | None,
    skip_empty: bool,
) -> tuple[CocoDataset, CocoDataset]:
    for split in ("train", "val"):
        if split not in layout.splits:
            raise DataError(absence(layout, split))
    train = _load(layout, "train", train_transform, None, skip_empty)
    if not train.number_of_targets:
        raise DataError(
            f"{train.images}: no annotation can be trained on; crowd regions and boxes without "
            "area do not count. Add boxes to the annotation file of the training set."
        )
    return train, _load(layout, "val", val_transform, train.categories, False)


def _load(
    layout: Layout,
    split: str,
    transform: Transform | None,
    categories: Categories | None,
    skip_empty: bool,
) -> CocoDataset:
    if split not in layout.splits:
        raise DataError(absence(layout, split))
    reading, content = read_split(layout, split)
    return CocoDataset(
        reading.images, content, transform, categories=categories, skip_empty=skip_empty
    )


def _draw(path: Path, seed: int) -> bytes:
    digest = hashlib.blake2b(str(seed).encode(), digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def _write_part(
    reading: Reading, content: Annotations, part: list[int], out: Path, split: str
) -> None:
    ids = {content.image_ids[i] for i in part}
    document: dict[str, Any] = {
        **reading.document,
        "images": [record for record in reading.document["images"] if record["id"] in ids],
        "annotations": [
            record for record in reading.document["annotations"] if record["image_id"] in ids
        ],
    }
    file = out / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    for i in part:
        target = out / split / content.names[i]
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(reading.images / content.names[i], target)
        except OSError:
            shutil.copy2(reading.images / content.names[i], target)
    file.write_text(json.dumps(document), encoding="utf-8")
