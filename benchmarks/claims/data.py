"""The data of a preset: composed here, or a folder of the user's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from detection.data import compose_digits, compose_scenes, load_coco_folder


@dataclass(frozen=True)
class Data:
    """A data set: composed here, or a folder of the user's.

    Args:
        kind: ``scenes`` and ``digits`` are composed, ``folder`` must be given.
        train_images, val_images, size: of what is composed.
    """

    kind: Literal["scenes", "digits", "folder"]
    train_images: int = 0
    val_images: int = 0
    size: int = 0

    @property
    def default(self) -> Path:
        """Where it lies unless the user says otherwise."""
        return Path("data") / f"{self.kind}-{self.train_images}-{self.val_images}-{self.size}px"

    @property
    def bytes(self) -> int:
        """About what composing it takes of the disk: JPEG files of high quality."""
        return (self.train_images + self.val_images) * self.size**2

    def prepare(self, given: Path | None) -> Path:
        """Compose the data, or find it.

        Raises:
            SystemExit: with a sentence, where the folder must be given and is not.
        """
        if self.kind == "folder":
            if given is None:
                raise SystemExit(
                    "This preset trains on COCO: give its folder, --data PATH (with train2017/, "
                    "val2017/ and annotations/)."
                )
            if not (given / "annotations").is_dir():
                raise SystemExit(f"--data {given}: there is no folder annotations/ in it.")
            return given
        root = given or self.default
        sizes: dict[str, int] = {
            "train_images": self.train_images,
            "val_images": self.val_images,
            "size": self.size,
        }
        return _composer(self.kind)(root, **sizes)


def _composer(kind: str) -> Callable[..., Path]:
    return compose_digits if kind == "digits" else compose_scenes


def digest_of(root: Path) -> str:
    """Of the annotations of a data set: which images, which objects."""
    total = hashlib.sha256()
    for path in sorted((root / "annotations").glob("instances_*.json")):
        total.update(path.name.encode())
        total.update(path.read_bytes())
    return total.hexdigest()[:12]


def describe(data: Data, root: Path, skip_empty: bool) -> dict[str, Any]:
    """What the records say of the data."""
    train_set, val_set = load_coco_folder(root, skip_empty=skip_empty)
    return {
        "kind": data.kind,
        "train_images": len(train_set),
        "val_images": len(val_set),
        "val_objects": sum(len(found) for found in val_set.coco.imgToAnns.values()),
        "classes": len(train_set.categories),
        "digest": digest_of(root),
    }
