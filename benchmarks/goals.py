"""What a figure should be, what it is, and why it is not.

A module with goals has a function ``goals(results)`` that holds its results against them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table

NO_GPU = "There was no GPU at hand."
"""Why a figure is not there that a GPU must give."""


@dataclass(frozen=True)
class Goal:
    """What a figure should be, and what it is.

    Attributes:
        what: it is the figure of.
        found: measured; `None` where this machine could not.
        most, least: its bounds; one of them is given.
        floor: what the figure cannot be better than, measured in the same run.
        reason: why it is missed or not there; told only then.

    Example:
        >>> goal = Goal("time over the plain one", 0.60001, most=0.6, reason="It is slow.")
        >>> goal.met, goal.cells()
        (False, ('time over the plain one', '≤ 0.6', '0.6001', '**missed**', 'It is slow.'))
    """

    what: str
    found: float | None
    most: float | None = None
    least: float | None = None
    floor: float | None = None
    reason: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the figure is within its bounds; `None` where there is none."""
        if self.found is None:
            return None
        above = self.least is None or self.found >= self.least
        return above and (self.most is None or self.found <= self.most)

    def cells(self) -> tuple[str, ...]:
        """A row: what, its bound, what was found, whether that is met, and else why not."""
        bound = f"≤ {self.most:g}" if self.least is None else f"≥ {self.least:g}"
        said = {True: "met", False: "**missed**", None: "not measured"}[self.met]
        found = "–" if self.found is None else self._rounded(self.found)
        if self.met:
            return self.what, bound, found, said, ""
        floor = "" if self.floor is None else f" Measured floor: {self._rounded(self.floor)}."
        return self.what, bound, found, said, f"{self.reason}{floor}"

    def _rounded(self, figure: float) -> str:
        """Four digits, and never in its own favour."""
        if not figure or not math.isfinite(figure):
            return f"{figure:g}"
        unit = 10.0 ** (math.floor(math.log10(abs(figure))) - 3)
        digits = figure / unit
        # What lies within rounding of a number is that number.
        near = math.isclose(digits, round(digits), rel_tol=1e-9)
        outwards = math.ceil if self.least is None else math.floor
        return f"{(round(digits) if near else outwards(digits)) * unit:.4g}"


GOAL_COLUMNS = ("goal", "bound", "found", "", "reason")


def goals_table(goals: Iterable[Goal]) -> Table:
    """One row for each goal, for the terminal."""
    table = Table(*GOAL_COLUMNS, show_lines=True)
    for goal in goals:
        table.add_row(*(cell.replace("*", "") for cell in goal.cells()))
    return table
