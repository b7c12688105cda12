"""What can be detected in: files, folders, patterns, addresses, videos, and images in memory.

`read_image_of` makes an RGB tensor of anything that holds one image; `find_sources` makes a lazy
stream of such things from what stands on a command line.
"""

from __future__ import annotations

import glob
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detection.data.errors import DataError, DataWarning
from detection.data.fetching import fetch, is_url
from detection.data.images import SUFFIXES, decode_image
from detection.data.video import VIDEO_ENDINGS, read_frames

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any] | Tensor
"""A path, an address, a Pillow image, an array ``(H, W)``, ``(H, W, 3)`` or ``(H, W, 4)``, or a
tensor ``(3, H, W)``."""


@dataclass(frozen=True, eq=False)
class NamedImage:
    """One image, not read yet, and what to call it.

    Attributes:
        name: for people and errors: a path, an address, ``film.mp4, frame 17``, ``image 3``.
        image: where it comes from, the thing itself and not a copy of it.
        video: the file that it is a frame of.
        frame: its number in that file, from 0.

    Example:
        >>> NamedImage("grey", np.zeros((4, 6), np.uint8)).read().shape
        torch.Size([3, 4, 6])
    """

    name: str
    image: ImageLike
    video: Path | None = None
    frame: int | None = None

    @classmethod
    def of(cls, image: ImageLike | NamedImage, place: int) -> NamedImage:
        """The image under its own name, or under its place among others.

        Raises:
            DataError: if it is nothing that could be an image, or a path that leads to none.
        """
        if isinstance(image, NamedImage):
            return image
        if isinstance(image, str) and is_url(image):
            return cls(image, image)
        if isinstance(image, (str, os.PathLike)):
            _check_file(Path(image))
            return cls(str(image), Path(image))
        if not isinstance(image, (Image.Image, np.ndarray, Tensor)):
            raise DataError(
                f"image {place} is a {type(image).__name__}: give a path, an address, a Pillow "
                "image, an array (H, W, 3), a tensor (3, H, W), or a list of these."
            )
        return cls(f"image {place}", image)

    def read(self) -> Tensor:
        """The image as ``(3, H, W)`` uint8 RGB; an address is fetched once.

        Raises:
            DataError: as `read_image_of`.
        """
        if isinstance(self.image, str) and is_url(self.image):
            return decode_image(io.BytesIO(self._content), self.name)
        return read_image_of(self.image, self.name)

    @property
    def stem(self) -> str:
        """The name without folders and ending, to call files after.

        Example:
            >>> NamedImage("https://example.org/a/cat.jpg?size=2", "").stem
            'cat'
        """
        stem = Path(self.name.partition("?")[0]).stem if self.video is None else self.video.stem
        return stem if self.frame is None else f"{stem}_{self.frame:06d}"

    @cached_property
    def _content(self) -> bytes:
        assert isinstance(self.image, str)
        return fetch(self.image)


def read_image_of(source: ImageLike, name: str = "") -> Tensor:
    """Anything that holds an image as ``(3, H, W)`` uint8 RGB, as a viewer would show it.

    Files and Pillow images are turned as EXIF says, converted from grey, palette, CMYK or 16 bits,
    and lose an alpha channel.  Arrays and tensors are RGB (OpenCV's are BGR: give
    ``image[..., ::-1]``), of uint8, or of floating-point numbers from 0 to 1, which are rounded
    to the nearest of 256 levels.

    Args:
        source: a path, an address (``http``, ``https``; 64 MiB at most), a Pillow image, an array
            ``(H, W)``, ``(H, W, 3)`` or ``(H, W, 4)``, or a tensor ``(3, H, W)``.
        name: what to call it in errors; by default its path, address or kind.

    Raises:
        DataError: if there is no image to be had from it; says what is wrong.

    Example:
        >>> half = np.full((4, 6, 3), 0.5)
        >>> read_image_of(half).shape, read_image_of(half).unique().tolist()
        (torch.Size([3, 4, 6]), [128])
    """
    if isinstance(source, str) and is_url(source):
        return decode_image(io.BytesIO(fetch(source)), name or source)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        _check_file(path)
        return decode_image(path, name or str(path))
    if isinstance(source, Image.Image):
        return decode_image(source, name or "the Pillow image")
    if isinstance(source, np.ndarray):
        return _from_array(source, name or "the array")
    if isinstance(source, Tensor):
        return _from_tensor(source, name or "the tensor")
    raise DataError(f"{name or 'the image'} is a {type(source).__name__}, which holds no image.")


class Sources:
    """A stream of images that `find_sources` has found; it can be gone through again.

    Attributes:
        entries: what was found, in order: image files, video files and addresses.
        skipped: how many files of the folders are neither images nor videos.
    """

    def __init__(self, entries: Sequence[Path | str], skipped: int) -> None:
        self.entries, self.skipped = tuple(entries), skipped

    def __iter__(self) -> Iterator[NamedImage]:
        for entry in self.entries:
            if isinstance(entry, Path) and _is_video(entry):
                for number, frame in enumerate(read_frames(entry)):
                    yield NamedImage(f"{entry}, frame {number}", frame, entry, number)
            else:
                yield NamedImage(str(entry), entry)


def find_sources(places: Sequence[str | os.PathLike[str]]) -> Sources:
    """Images and video frames from files, folders, patterns and addresses.

    Nothing is opened before its turn.  A folder gives the images and videos that lie in it, by
    name, without those in folders below (``folder/**`` gives all); hidden files are left out.

    Args:
        places: paths of files or folders, patterns as of a shell (``*``, ``?``, ``[ab]``, and
            ``**`` for all folders below), or addresses.

    Raises:
        DataError: naming the place, if nothing is there or nothing matches, or a folder has no
            image.

    Warns:
        DataWarning: if files of folders are skipped, for they are no images; with their number.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("b.png", "a.png"):
        ...     Image.new("RGB", (4, 4)).save(folder / name)
        >>> [source.stem for source in find_sources([folder])]
        ['a', 'b']
    """
    if isinstance(places, (str, os.PathLike)):
        places = [places]
    entries: list[Path | str] = []
    skipped = 0
    for place in places:
        text = os.fspath(place)
        if is_url(text):
            entries.append(text)
            continue
        path = Path(text)
        if path.is_dir():
            found, others = _in_folder(sorted(path.iterdir()), text)
        elif path.exists() or not glob.has_magic(text):
            _check_file(path)
            found, others = [path], 0
        else:
            matches = [Path(match) for match in sorted(glob.glob(text, recursive=True))]
            if not matches:
                raise DataError(f"{text}: nothing matches this pattern.")
            files = [match for match in matches if match.is_file()]
            # A pattern that names an ending means every file that has it.
            found, others = _in_folder(files, text) if text.endswith("*") else (files, 0)
            if not found:
                raise DataError(f"{text}: only folders match this pattern, and no files.")
        if others:
            warnings.warn(
                f"{text}: {others} files that are neither images nor videos are skipped.",
                DataWarning,
                stacklevel=2,
            )
        entries += found
        skipped += others
    if not entries:
        raise DataError("There are no images to detect in: give files, folders or addresses.")
    return Sources(list(dict.fromkeys(entries)), skipped)


def _in_folder(candidates: Sequence[Path], where: str) -> tuple[list[Path], int]:
    """The images and videos among the files of a folder, and the number of others."""
    files = [path for path in candidates if path.is_file() and not path.name.startswith(".")]
    found = [p for p in files if p.suffix.lower() in SUFFIXES or _is_video(p)]
    if not found:
        raise DataError(
            f"{where}: none of the {len(files)} files there is an image or a video, by its ending "
            f"({', '.join((*sorted(SUFFIXES), *VIDEO_ENDINGS))})."
        )
    return found, len(files) - len(found)


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_ENDINGS


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise DataError(
            f"{path}: this is a folder, not an image. detection.find_sources([{str(path)!r}]) "
            "goes through its images."
        )
    if not path.exists():
        raise DataError(f"{path}: there is no such image file.")


def _from_array(array: np.ndarray[Any, Any], where: str) -> Tensor:
    if array.ndim == 2:
        array = array[..., None].repeat(3, axis=2)
    elif array.ndim != 3 or array.shape[2] not in (3, 4):
        hint = ""
        if array.ndim == 3 and array.shape[0] in (1, 3, 4):
            hint = " Its channels come first: give array.transpose(1, 2, 0)."
        elif array.ndim == 4:
            hint = " To detect in several images give list(array)."
        raise DataError(
            f"{where} has shape {array.shape}; an image is (H, W), (H, W, 3) or (H, W, 4).{hint}"
        )
    if array.dtype.kind not in "fu":  # torch has no numbers for some of the others
        raise DataError(_wrong_kind(where, str(array.dtype)))
    if array.dtype.kind == "u" and array.dtype != np.uint8:
        raise DataError(_wrong_kind(where, str(array.dtype)))
    array = array[..., :3]
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    return _as_bytes(torch.from_numpy(np.array(array)).permute(2, 0, 1), where)


def _from_tensor(tensor: Tensor, where: str) -> Tensor:
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        hint = ""
        if tensor.ndim == 3 and tensor.shape[2] == 3:
            hint = " Its channels come last: give tensor.permute(2, 0, 1)."
        elif tensor.ndim == 4:
            hint = " To detect in several images give list(tensor)."
        raise DataError(f"{where} has shape {tuple(tensor.shape)}; an image is (3, H, W).{hint}")
    if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
        raise DataError(_wrong_kind(where, str(tensor.dtype)))
    return _as_bytes(tensor.detach().cpu().clone(), where)


def _as_bytes(image: Tensor, where: str) -> Tensor:
    """``(3, H, W)`` uint8 from uint8, or from floating point in [0, 1]."""
    if not image.numel():
        raise DataError(f"{where} has shape {tuple(image.shape)}, and so no pixels.")
    if image.is_floating_point():
        image = image.float()
        if not image.isfinite().all():
            raise DataError(f"{where} has pixels that are not finite (NaN or infinity).")
        low, high = float(image.min()), float(image.max())
        if low < 0 or high > 1:
            raise DataError(
                f"{where} has floating-point pixels from {low:g} to {high:g}; they must lie in "
                "[0, 1]. Divide by the white level, or convert levels of 0 to 255 to uint8."
            )
        image = (image * 255).round().to(torch.uint8)
    return image.contiguous()


def _wrong_kind(where: str, dtype: str) -> str:
    return f"{where} is of {dtype}; pixels are uint8, or floating point from 0 to 1. Convert them."
