"""What is fuzzed: bytes become a file of a data set, which must load whole or raise `DataError`.

Each target writes its input into a folder, checks the folder and loads it.  Anything but a
`DataError` is a finding, and so are a report that disagrees with the loading, and a record that
neither becomes a box nor is accounted for.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from detection.data import DataError, check_folder, load_folder, read_image
from detection.data.annotations import Annotations
from detection.data.folders import read_split, recognise
from detection.data.images import check_image, examine_image, stored_size

SIZES = {"a": (24, 16), "b": (7, 40)}
"""Width and height of the images that lie beside the annotations."""


def coco(data: bytes, folder: Path) -> None:
    """An instances file; images a.png and b.png exist."""
    for split in ("train", "val"):
        _write_images(folder / split, split)
        _write(folder / "annotations" / f"instances_{split}.json", data)
    content = _check(folder)
    if content is not None:
        _account(content, len(content.document["annotations"]), len(content.document["images"]))


def yolo(data: bytes, folder: Path) -> None:
    """A data.yaml and, after a zero byte, the label file of the image a.png."""
    settings, _, labels = data.partition(b"\0")
    for split in ("train", "val"):
        _write_images(folder / "images" / split, split)
        _write(folder / "labels" / split / "a.txt", labels)
        _write(folder / "labels" / split / "b.txt", b"")
    _write(folder / "data.yaml", settings)
    content = _check(folder)
    if content is not None and len(content.names) == 2:
        rows = labels.decode("utf-8-sig").splitlines()
        _account(content, sum(bool(row.strip()) for row in rows), 2)


def voc(data: bytes, folder: Path) -> None:
    """The XML file of the image a.png."""
    for split in ("train", "val"):
        _write_images(folder / split, split)
        _write(folder / split / "a.xml", data)
        _write(folder / split / "b.xml", _SOUND_XML)
    content = _check(folder)
    if content is not None:
        _account(content, len(content.document["annotations"]), 2)


def image(data: bytes, folder: Path) -> None:
    """An image file, read by all that read images."""
    path = folder / "image.bin"
    _write(path, data)
    try:
        size = stored_size(path, turned=True)
        pixels = read_image(path)
        assert tuple(pixels.shape[1:]) == size or pixels.shape[0] == 3
        examine_image(path, (pixels.shape[1], pixels.shape[2]), "image 1")
    except DataError as error:
        assert str(error)
        sound = False
    else:
        sound = True
    try:
        size = stored_size(path, turned=False)
        check_image(path, size, "image 1")
        assert tuple(read_image(path, size).shape) == (3, *size)
    except DataError:
        # What is whole to the last pixel is whole for those that look less closely.
        assert not sound


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    target.__name__: target for target in (coco, yolo, voc, image)
}

_SOUND_XML = (
    b"<annotation><size><width>7</width><height>40</height></size><object><name>cup</name>"
    b"<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>9</ymax></bndbox></object>"
    b"</annotation>"
)


def run(target: str, data: bytes, folder: Path) -> None:
    """One input through one target, in an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of boxes that are not trained on; Pillow's own
        TARGETS[target](data, folder)


def _check(folder: Path) -> Annotations | None:
    """The training set, if the folder loads; the report must agree."""
    report = check_folder(folder)
    str(report.table())
    for problem in report.problems:
        str(problem).encode()
    try:
        sets = load_folder(folder)
        for dataset in sets:
            for element in range(len(dataset)):
                dataset[element]
        content = read_split(recognise(folder), "train")[1]
    except DataError as error:
        assert not report.ok, f"the report has no error, but: {error}"
        str(error).encode()
        return None
    assert report.ok, f"loads, but: {report.errors[0]}"
    return content


def _account(content: Annotations, annotations: int, images: int) -> None:
    assert len(content.labels) + content.crowds + len(content.not_trained_on) == annotations
    assert len(content.names) == images


def _write_images(folder: Path, split: str) -> None:
    folder.mkdir(parents=True)
    for name, size in SIZES.items():
        Image.new("RGB", size, (len(split), 0, 0)).save(folder / f"{name}.png")


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
