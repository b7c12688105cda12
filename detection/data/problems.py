"""What is wrong with a data set: collected whole, for a report, or raised as one `DataError`.

The readers state every fault they meet as a `Problem` and go on.  Whoever needs a sound data set
asks for `Problems.raise_errors`; `detection.data.check_folder` shows them all.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from detection.data.errors import DataError

MOST_KEPT = 100_000
"""Problems beyond this number are counted, not kept: a file may be wrong in every record."""


@dataclass(frozen=True)
class Problem:
    """One fault of a data set.

    Args:
        severity: an ``"error"`` makes training impossible, or its result worthless; a
            ``"warning"`` says what will not be used, or not as one might expect.
        rule: a few words that are the same for all faults of a kind.
        file: the file or folder at fault.
        record: the part of it, ``"annotation 3 (image 8)"`` for instance; may be empty.
        fact: what is wrong.
        remedy: what to do about it.

    Example:
        >>> print(Problem("error", "no file", Path("a.json"), "image 8", "b.jpg is missing",
        ...               "put it there or remove the record"))
        a.json: image 8: b.jpg is missing; put it there or remove the record.
    """

    severity: Literal["error", "warning"]
    rule: str
    file: Path
    record: str
    fact: str
    remedy: str

    def __str__(self) -> str:
        where = f"{self.file}: {self.record}" if self.record else str(self.file)
        return f"{where}: {self.fact}; {self.remedy}."


class Problems:
    """A growing list of problems.

    Attributes:
        kept: the problems, at most `MOST_KEPT` of them.
        left_out: how many more there were.

    Example:
        >>> problems = Problems()
        >>> problems.error("size", Path("a.json"), "image 8", "it has no width", "add it")
        >>> problems.raise_errors()
        Traceback (most recent call last):
        ...
        detection.data.errors.DataError: a.json: image 8: it has no width; add it.
    """

    def __init__(self) -> None:
        self.kept: list[Problem] = []
        self.left_out = 0
        self.number_of_errors = 0

    def error(self, rule: str, file: Path, record: str, fact: str, remedy: str) -> None:
        """State a fault that makes training impossible or worthless."""
        self.add(Problem("error", rule, file, record, fact, remedy))

    def warn(self, rule: str, file: Path, record: str, fact: str, remedy: str) -> None:
        """State a fault that training survives."""
        self.add(Problem("warning", rule, file, record, fact, remedy))

    def add(self, problem: Problem) -> None:
        """Take over a problem that was stated elsewhere."""
        self.number_of_errors += problem.severity == "error"
        if len(self.kept) < MOST_KEPT:
            self.kept.append(problem)
        else:
            self.left_out += 1

    def of(self, rule: str) -> list[Problem]:
        """The kept problems of one kind."""
        return [problem for problem in self.kept if problem.rule == rule]

    def raise_errors(self) -> None:
        """Raise the first three errors and the number of all, if there are any."""
        if not self.number_of_errors:
            return
        errors = [problem for problem in self.kept if problem.severity == "error"]
        text = " ".join(map(str, errors[:3]))
        if self.number_of_errors > 1:
            text = f"{self.number_of_errors} errors. {text}"
        if self.number_of_errors > 3:
            text += " ... detection.data.check_folder lists them all."
        raise DataError(text)


def shown(value: Any) -> str:
    r"""A value of a file for a message: short, on one line, without control characters.

    Example:
        >>> print(shown(list(range(1000))), shown("a" + chr(27)))
        [0, 1, 2, 3, 4, 5, ...] 'a\x1b'
    """
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
