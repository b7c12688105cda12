"""Where a command writes, and how it ends: with a status, and with a sentence where it fails."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console

from detection.checkpoints import CheckpointError
from detection.data.errors import DataError, DataWarning
from detection.distributed import DeviceError
from detection.models.backbones import PretrainedUnavailable
from detection.training.errors import TrainingError
from detection.training.matching import NonFiniteCost

PROBLEMS = (
    CheckpointError,
    DataError,
    DeviceError,
    ImportError,
    NonFiniteCost,
    OSError,
    PretrainedUnavailable,
    TrainingError,
    ValueError,
)
"""What a person can mend: told without a stack trace."""

FAULTY, FAILED, INTERRUPTED = 1, 2, 130
"""Exit status: the input has faults, the command failed, the user stopped it."""


class Stopped(SystemExit):
    """A command has said what was wrong; carries the exit status."""


def output() -> Console:
    """Standard output; as wide as tables need where it is a file or a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


@contextmanager
def told(interrupted: str = "Interrupted.", *, by_all: bool = False) -> Iterator[None]:
    """Turn errors that a person can mend into a sentence on standard error, and a status.

    Of several processes (``torchrun``) the main one says what happens to all; what happens to
    another one alone is said by that, with its number.

    Args:
        interrupted: what to say after Ctrl-C.
        by_all: all processes do the same, without each other.

    Raises:
        Stopped: with status 2 after an error, 130 after Ctrl-C.

    Example:
        >>> try:
        ...     with told():
        ...         raise ValueError("--steps 0: at least 1.")
        ... except Stopped as stopped:
        ...     print(stopped.code)
        2
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", DataWarning)
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            yield
    except PROBLEMS as error:
        if is_main():
            say(f"error: {error}", "red")
        elif not by_all and not getattr(error, "of_main", False):
            say(f"error in process {os.environ['RANK']}: {error}", "red")
        raise Stopped(FAILED) from error
    except KeyboardInterrupt:
        if is_main():
            say(interrupted)
        raise Stopped(INTERRUPTED) from None
    except BrokenPipeError:  # the reader of a pipe has left
        with suppress(OSError):
            sys.stdout.close()
        raise Stopped(FAILED) from None


def is_main() -> bool:
    """Whether this is the main process, or the only one; known before the processes have met."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str, style: str = "") -> None:
    """Write a line to standard error as it is."""
    Console(stderr=True).print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """Warnings about data are for the reader; where the code stands that gives them is not."""
    if not is_main():
        return
    if issubclass(category, DataWarning):
        say(f"warning: {message}", "yellow")
    else:
        say(f"{category.__name__}: {message}", "yellow")
