"""Frames of a video file, one by one, as a player shows them (PyAV, the libraries of FFmpeg)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from detection.data.errors import DataError

VIDEO_ENDINGS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv")


def read_frames(path: Path) -> Iterator[np.ndarray[Any, Any]]:
    """The frames of a video file, ``(H, W, 3)`` uint8 RGB, turned as the file says.

    One frame is in memory at a time.

    Raises:
        DataError: the file is missing, is no video, is damaged, or has no frame.
        ImportError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f'{path} is a video: to read it, pip install "implicit[video]".'
        ) from error
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
