"""What all commands have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from detection.distributed import Distributed

if TYPE_CHECKING:
    from typing_extensions import Self


class Command(ABC):
    """A frozen dataclass whose fields are the options, and whose docstring is the help.

    Attributes:
        device: where it computes: cuda, cuda:1 or cpu; CUDA if there is one where it is `None`.
    """

    device: str | None = None

    @property
    def interrupted(self) -> str:
        """What is said after Ctrl-C."""
        return "Interrupted."

    @classmethod
    def begun(cls, arguments: Sequence[str]) -> Self | None:
        """Options that others stand for, before the words are read; by default there are none."""
        return None

    def check(self) -> None:  # noqa: B027  (most commands have nothing to add)
        """Raise `ValueError` for options that contradict each other, before any work is done."""

    @abstractmethod
    def run(self, distributed: Distributed, console: Console) -> None:
        """Do the work; errors of `detection.commands.console.PROBLEMS` are told as sentences."""
