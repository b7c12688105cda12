"""Video files, read and written frame by frame (PyAV, the libraries of FFmpeg)."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detection.data.errors import DataError

VIDEO_ENDINGS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv")


def read_frames(path: Path) -> Iterator[np.ndarray[Any, Any]]:
    """The frames of a video file, ``(H, W, 3)`` uint8 RGB, turned as the file says.

    One frame is in memory at a time.

    Raises:
        DataError: the file is missing, is no video, is damaged, or has no frame.
        ImportError: PyAV is not installed.
    """
    av = _pyav(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such video file.")
    found = 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path}: the file has no pictures in it.")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                # Telephones store what is held upright lying on its side.
                turns = round(frame.rotation / 90) % 4
                yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
                found += 1
    except (av.error.FFmpegError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path}: the video cannot be read after {found} frames ({error}). Fetch the file "
            "again, or convert it."
        ) from error
    if not found:
        raise DataError(f"{path}: the video has no frames.")


def frame_rate(path: Path) -> float:
    """Frames a second of a video file; 25 where it does not say.

    Raises:
        DataError: the file is no video.
    """
    av = _pyav(path)
    try:
        with av.open(str(path)) as container:
            return float(container.streams.video[0].average_rate or 25)
    except (av.error.FFmpegError, IndexError) as error:
        raise DataError(f"{path}: this is no video ({error}).") from error


class VideoWriter:
    """Writes pictures as the frames of an ``.mp4`` file (H.264), all of the size of the first.

    What was written stays a whole film where an error ends it.

    Args:
        path: ends in ``.mp4``.
        rate: frames a second.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "grey.mp4"
        >>> with VideoWriter(path, 25.0) as film:
        ...     for level in (80, 160):
        ...         film.write(Image.new("RGB", (65, 33), (level,) * 3))
        >>> [frame.shape for frame in read_frames(path)]
        [(34, 66, 3), (34, 66, 3)]
    """

    def __init__(self, path: Path, rate: float) -> None:
        self._av = _pyav(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._container = self._av.open(str(path), "w")
        self._rate = Fraction(rate).limit_denominator(1000)
        self._stream: Any = None

    def write(self, picture: Image.Image) -> None:
        """Add a frame."""
        if self._stream is None:
            self._stream = self._container.add_stream("libx264", rate=self._rate)
            # The codec knows even sizes only.
            self._stream.width, self._stream.height = (side + side % 2 for side in picture.size)
            self._stream.pix_fmt = "yuv420p"
        whole = Image.new("RGB", (self._stream.width, self._stream.height))
        whole.paste(picture)
        self._container.mux(self._stream.encode(self._av.VideoFrame.from_image(whole)))

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()


def _pyav(path: Path) -> Any:
    try:
        return import_module("av")
    except ImportError as error:
        raise ImportError(
            f'{path} is a video, which needs a package: pip install "implicit[video]".'
        ) from error
