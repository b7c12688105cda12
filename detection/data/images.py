"""Image files to RGB tensors, and the check that files are whole before a run depends on them."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from detection.data.errors import DataError

_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_EXIF_ORIENTATION = 0x0112
_JPEG_END = b"\xff\xd9"


def read_image(path: Path, size: tuple[int, int] | None = None, name: str = "") -> Tensor:
    """Decode an image file to ``(3, h, w)`` uint8 RGB.

    Grey, palette, CMYK and 16-bit files are converted; an alpha channel is dropped.  COCO's own
    tools ignore the EXIF orientation, and its boxes were drawn on the pixels as stored.  So a
    file is turned as EXIF says only where ``size`` fits the turned image and not the stored one.

    Args:
        path: the file.
        size: annotated ``(height, width)``; ``None`` (a file without annotations) takes the
            image as a viewer shows it, turned as EXIF says.
        name: what to call the image in errors beside its path, "image 17" for instance.

    Raises:
        DataError: the file is missing, truncated, of an unknown format, or of another size.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "grey.png"
        >>> Image.new("L", (5, 3), 200).save(path)
        >>> read_image(path, (3, 5)).shape
        torch.Size([3, 3, 5])
    """
    return decode_image(path, f"{path} ({name})" if name else str(path), size)


def decode_image(
    source: Path | IO[bytes] | Image.Image, where: str, size: tuple[int, int] | None = None
) -> Tensor:
    """Decode a file, or what Pillow has opened already, as `read_image` does.

    Args:
        source: a path, an open file, or a Pillow image, which stays open and as it is.
        where: what to call it in errors.
        size: as for `read_image`.

    Raises:
        DataError: as `read_image`.

    Example:
        >>> decode_image(Image.new("RGBA", (5, 3)), "a picture").shape
        torch.Size([3, 3, 5])
    """
    try:
        opened = nullcontext(source) if isinstance(source, Image.Image) else Image.open(source)
        with opened as file:
            if _is_turned(file, size, where):
                pixels = _to_rgb(ImageOps.exif_transpose(file))
            else:
                pixels = _to_rgb(file)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{where}: there is no such image file.") from None
    except _UNREADABLE as error:
        raise DataError(
            f"{where}: the image cannot be read ({error}); fetch the file again or leave the "
            "image out."
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def check_image(path: Path, size: tuple[int, int], name: str) -> None:
    """Check that a file is whole and has its annotated size, mostly without decoding it.

    PNG files are checked by their checksums, JPEG files by their end marker; a file that fails
    this, or has another format, is decoded to be sure.

    Args:
        path: the file.
        size: annotated ``(height, width)``.
        name: what to call the image in errors.

    Raises:
        DataError: as `read_image`.

    Example:
        >>> check_image(Path("absent.png"), (3, 5), "image 1")
        Traceback (most recent call last):
        ...
        detection.data.errors.DataError: absent.png (image 1): there is no such image file.
    """
    try:
        with Image.open(path) as file:
            turned = _is_turned(file, size, f"{path} ({name})")
            if file.format == "PNG" and not turned:
                file.verify()
                return
            if file.format == "JPEG" and _JPEG_END in _tail(path):
                return
    except DataError:
        raise
    except _UNREADABLE:
        pass  # decoding says what is wrong
    read_image(path, size, name)


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-min(256, path.stat().st_size), os.SEEK_END)
        return file.read()


def _is_turned(file: Image.Image, size: tuple[int, int] | None, where: str) -> bool:
    """Whether EXIF has to be obeyed; `DataError` where the size fits neither way."""
    stored = (file.height, file.width)
    if size == stored:
        return False
    turned = stored[::-1] if file.getexif().get(_EXIF_ORIENTATION) in (5, 6, 7, 8) else stored
    if size is None:
        return True
    if size not in (stored, turned):
        raise DataError(
            f"{where}: the file is {stored[1]}x{stored[0]} pixels (width x height), the "
            f"annotations say {size[1]}x{size[0]}; the two do not belong together."
        )
    return True


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits per pixel, which convert() would clip at 255
        levels = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        grey = ((levels + 128) // 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, not 8 or 16 bits")
    if image.mode == "P":
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))
