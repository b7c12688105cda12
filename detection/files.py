"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A temporary name beside ``path``, with the same ending; it takes the place of ``path``.

    It does so when the block ends well, after the contents have reached the disk.  When it does
    not, what was there before stays, and the temporary file goes; a process that is killed leaves
    it, see `remove_leftovers`.  Folders above ``path`` are made.  Who may read the file is decided
    by the umask, whatever the block makes of it.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "notes" / "one.txt"
        >>> with replacing(path) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> path.read_text(), len(list(path.parent.iterdir()))
        ('whole', 1)
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def remove_leftovers(folder: Path | str) -> list[Path]:
    """Remove the temporary files of `replacing` that killed processes left in ``folder``.

    Nobody else may be writing there.

    Returns:
        What was removed.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / ".notes.4711.partial.txt").touch()
        >>> (folder / "notes.txt").touch()
        >>> [path.name for path in remove_leftovers(folder)]
        ['.notes.4711.partial.txt']
    """
    found = [
        path
        for path in sorted(Path(folder).glob(".*"))
        if re.search(r"\.\d+\.partial(\.\w+)?$", path.name) and path.is_file()
    ]
    for path in found:
        path.unlink()
    return found


def _sync_folder(folder: Path) -> None:
    """Let the new name reach the disk too, where the system has that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
