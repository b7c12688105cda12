"""Image files to RGB tensors, and the checks that files are whole before a run depends on them.

Files may come from anywhere: only common formats are tried, and neither a file nor a picture may
be larger than the limits below, whatever its header says.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from detection.data.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Formats that are read.  Pillow knows more, and starts other programs for some of them."""

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
) | {".ppm", ".pgm", ".pbm", ".pnm"}
"""Endings of their files, in small letters."""

MOST_PIXELS = 80_000_000
"""Pixels of the largest image that is decoded, about a gigabyte of memory on the way."""

MOST_IMAGE_BYTES = 1_000_000_000
"""Size of the largest image file that is opened."""

_UNREADABLE = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError),
    *(AttributeError, OverflowError, ZeroDivisionError, NotImplementedError, struct.error),
    *(zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning),
)
"""What Pillow's readers raise for damaged files."""

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
    return decode_image(path, _where(path, name), size)


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
    with _opened(source, where) as file:
        pixels = _decode(file, size, where)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def stored_size(path: Path, *, turned: bool) -> tuple[int, int]:
    """``(height, width)`` from the header of an image file.

    Args:
        path: the file.
        turned: as a viewer shows it, turned as EXIF says; or as the pixels are stored.

    Raises:
        DataError: the file is missing, of an unknown format, or too large.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "grey.png"
        >>> Image.new("L", (5, 3), 200).save(path)
        >>> stored_size(path, turned=True)
        (3, 5)
    """
    with _opened(path, str(path)) as file:
        size = file.height, file.width
        return size[::-1] if turned and _swaps_sides(file) else size


@dataclass(frozen=True)
class ImageFacts:
    """What `examine_image` found in a file that can be used.

    Args:
        digest: of the bytes of the file; equal files have equal ones.
        notes: what is peculiar about it, each with what to do: ``(rule, fact, remedy)``.
    """

    digest: bytes
    notes: tuple[tuple[str, str, str], ...]


def examine_image(path: Path, size: tuple[int, int], name: str) -> ImageFacts:
    """Decode a file to the last pixel, and refuse it where any of it is damaged.

    PNG files are also compared with their checksums.  JPEG files have none, and Pillow fills
    what is lost with grey; so they are decoded a second time by a decoder that does not.

    Args:
        path: the file.
        size: annotated ``(height, width)``.
        name: what to call the image in errors.

    Raises:
        DataError: as `read_image`, and for damage that `read_image` does not see.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "grey.png"
        >>> Image.new("L", (5, 3), 200).save(path)
        >>> examine_image(path, (3, 5), "image 1").notes
        ()
    """
    where = _where(path, name)
    notes = []
    with _opened(path, where) as file:
        orientation = file.getexif().get(_EXIF_ORIENTATION, 1)
        if orientation in range(2, 9) and size == (file.height, file.width):
            fact = "its EXIF data ask viewers to turn it, and the annotated size is the stored one"
            notes.append(("turned by EXIF", fact, "see that its boxes fit the pixels as stored"))
        # A photograph of several resolutions (MPO) holds one picture.
        if file.format != "MPO" and getattr(file, "is_animated", False):
            notes.append(("several frames", "it has more than one frame", "the first is used"))
        kind = file.format
        file.seek(0)
        _decode(file, size, where)
    if kind == "PNG":
        with _opened(path, where) as file:
            file.verify()
    content = path.read_bytes()
    if kind in ("JPEG", "MPO"):
        complaint = _jpeg_damage(content)
        if complaint is not None and complaint[1]:
            raise DataError(
                f"{where}: the image is damaged ({complaint[0]}), part of the picture is lost; "
                "fetch the file again or leave the image out."
            )
        if complaint is not None:
            notes.append(("JPEG oddity", complaint[0], "the picture is whole; nothing to do"))
    return ImageFacts(hashlib.blake2b(content, digest_size=16).digest(), tuple(notes))


def _jpeg_damage(content: bytes) -> tuple[str, bool] | None:
    """What a strict decoder complains of, and whether part of the picture is lost."""
    import simplejpeg

    try:
        space = simplejpeg.decode_jpeg_header(content, strict=False)[2]
        simplejpeg.decode_jpeg(content, "CMYK" if space in ("CMYK", "YCCK") else "RGB", strict=True)
    except ValueError as error:
        text = str(error)
        # Some cameras pad the data by a few bytes; damage leaves more.
        padding = re.search(r"(\d+) extraneous bytes before marker", text)
        return text, not (padding and int(padding[1]) <= HARMLESS_PADDING)
    except KeyError:  # a colour space that this decoder has no name for
        return "its colours are of a kind that only some programs read", False
    return None


HARMLESS_PADDING = 32
"""Bytes too many in a JPEG file that are no sign of damage."""


def check_image(path: Path, size: tuple[int, int], name: str) -> None:
    """Check that a file is whole and has its annotated size, mostly without decoding it.

    PNG files are checked by their checksums, JPEG files by their end marker; a JPEG file without
    one, and a file of another format, is decoded to be sure.

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
    where = _where(path, name)
    with _opened(path, where) as file:
        turned = _is_turned(file, size, where)
        if file.format == "PNG" and not turned:
            file.verify()
            return
        if file.format == "JPEG" and _JPEG_END in _tail(path):
            return
    read_image(path, size, name)


def _where(path: Path, name: str) -> str:
    return f"{path} ({name})" if name else str(path)


@contextmanager
def _opened(source: Path | IO[bytes] | Image.Image, where: str) -> Iterator[Image.Image]:
    """An image whose header has been read; whatever is wrong becomes a `DataError`."""
    try:
        if isinstance(source, Path):
            _check_file(source, where)
        if isinstance(source, Image.Image):
            opened: AbstractContextManager[Image.Image] = nullcontext(source)
        else:
            opened = Image.open(source, formats=FORMATS)
        with opened as file:
            if file.width * file.height > MOST_PIXELS:
                raise DataError(
                    f"{where}: the image is {file.width}x{file.height} pixels, and more than "
                    f"{MOST_PIXELS:,} are not decoded; make it smaller or cut it into parts."
                )
            yield file
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{where}: there is no such image file.") from None
    except Image.UnidentifiedImageError:
        raise DataError(
            f"{where}: the image cannot be read; it is none of {', '.join(FORMATS)}. Convert it, "
            "fetch the file again, or leave the image out."
        ) from None
    except _UNREADABLE as error:
        raise DataError(
            f"{where}: the image cannot be read ({error}); fetch the file again or leave the "
            "image out."
        ) from error


def _check_file(path: Path, where: str) -> None:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for without end
        raise DataError(f"{where}: this is a folder or a device; give an image file.")
    if status.st_size > MOST_IMAGE_BYTES:
        raise DataError(
            f"{where}: the file has {status.st_size:,} bytes, and more than "
            f"{MOST_IMAGE_BYTES:,} are not read; save the image in a compressed format."
        )


def _decode(file: Image.Image, size: tuple[int, int] | None, where: str) -> np.ndarray:
    if _is_turned(file, size, where):
        return _to_rgb(ImageOps.exif_transpose(file))
    return _to_rgb(file)


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-min(256, path.stat().st_size), os.SEEK_END)
        return file.read()


def _is_turned(file: Image.Image, size: tuple[int, int] | None, where: str) -> bool:
    """Whether EXIF has to be obeyed; `DataError` where the size fits neither way."""
    stored = (file.height, file.width)
    if size == stored:
        return False
    turned = stored[::-1] if _swaps_sides(file) else stored
    if size is None:
        return True
    if size not in (stored, turned):
        raise DataError(
            f"{where}: the file is {stored[1]}x{stored[0]} pixels (width x height), the "
            f"annotations say {size[1]}x{size[0]}; the two do not belong together."
        )
    return True


def _swaps_sides(file: Image.Image) -> bool:
    return file.getexif().get(_EXIF_ORIENTATION) in (5, 6, 7, 8)


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
