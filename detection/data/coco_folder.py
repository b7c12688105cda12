"""Folders of COCO annotations, in the layouts that people have.

COCO's own (``train2017/`` beside ``annotations/instances_train2017.json``), Roboflow's
(``train/_annotations.coco.json`` among the images), and annotation files whose names tell their
split (``annotations/train.json``) with images in ``train/``, ``images/train/`` or ``images/``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from detection.data.annotations import parse_instances
from detection.data.problems import Problems
from detection.data.splits import SPLITS, WHOLE, Layout, Reading, image_files, split_folders

LAYOUT = (
    "expected: train2017/ and val2017/ with the images, annotations/instances_train2017.json and "
    "annotations/instances_val2017.json"
)

_ROBOFLOW = "_annotations.coco.json"
_PREFIX = "instances_"
_OTHER_KINDS = re.compile("caption|keypoint|panoptic|stuff|image_info|result", re.IGNORECASE)
_WORDS = {
    "train": {"train", "training"},
    "val": {"val", "valid", "validation"},
    "test": {"test", "testing"},
}


def find_coco(root: Path) -> Layout | None:
    """The splits of a COCO folder; `None` if it has no annotation file of COCO."""
    pairs = {split: _find_pair(root, split) for split in SPLITS}
    splits: dict[str, Callable[[Problems], Reading | None]] = {
        split: partial(_read, *pair) for split, pair in pairs.items() if not isinstance(pair, str)
    }
    if not splits:
        whole = _find_undivided(root)
        if whole is not None:
            splits[WHOLE] = partial(_read, *whole)
        elif not _annotation_files(root) and not any(root.glob(f"*/{_ROBOFLOW}")):
            return None
    complaints: dict[str, str] = {
        split: pair for split, pair in pairs.items() if isinstance(pair, str)
    }
    return Layout("COCO", root, splits, complaints)


def complaints_of(root: Path, split: str) -> str:
    """What is missing of a split, of training and of validation in a folder as COCO's own."""
    pairs = {name: _find_pair(root, name) for name in (split, "train", "val")}
    return "; ".join(pair for pair in pairs.values() if isinstance(pair, str))


def _read(images: Path, file: Path, problems: Problems) -> Reading | None:
    document = parse_instances(file, problems)
    return None if document is None else Reading(images, file, document)


def _find_pair(root: Path, split: str) -> tuple[Path, Path] | str:
    """Image folder and annotation file of a split, or what is wrong."""
    roboflow = [path for path in split_folders(root, split) if (path / _ROBOFLOW).is_file()]
    if len(roboflow) == 1:
        return roboflow[0], roboflow[0] / _ROBOFLOW
    candidates = split_folders(root, split) or split_folders(root / "images", split)
    folders = {path.name: path for path in candidates}
    files = {
        path.stem.removeprefix(_PREFIX): path
        for path in sorted((root / "annotations").glob(f"{_PREFIX}{split}*.json"))
    }
    if not files:
        named = [path for path in _annotation_files(root) if _tells(path, split)]
        files = {path.stem: path for path in named}
    if files and not folders:
        whole = root / "images"
        if whole.is_dir():
            folders = {whole.name: whole}
    wanted = f"{split}2017"
    missing = [
        what
        for what, found in ((f"{wanted}/", folders), (f"annotations/{_PREFIX}{wanted}.json", files))
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


def _find_undivided(root: Path) -> tuple[Path, Path] | None:
    files = [path for path in _annotation_files(root) if path.name != _ROBOFLOW]
    files = [root / _ROBOFLOW] if (root / _ROBOFLOW).is_file() else files
    if len(files) != 1 or any(_tells(files[0], split) for split in SPLITS):
        return None
    images = root / "images"
    folders = [path for path in (images / "default", images, root) if path.is_dir()]
    return next((path for path in folders if any(image_files(path))), root), files[0]


def _annotation_files(root: Path) -> list[Path]:
    """JSON files that may hold instances, to go by their names."""
    found = sorted((root / "annotations").glob("*.json"))
    found += [
        path
        for path in sorted(root.glob("*.json"))
        if re.search("annotation|instances|coco|label|train|val|test", path.stem, re.IGNORECASE)
    ]
    return [path for path in found if not _OTHER_KINDS.search(path.stem)]


def _tells(path: Path, split: str) -> bool:
    words = set(re.findall("[a-z]+", path.stem.lower()))
    return bool(words & _WORDS[split])
