"""Checks of what a caller chose, so that a mistake is named where it was made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def check_count(owner: str, name: str, value: Any, least: int = 1) -> None:
    """Raise `ValueError` unless ``value`` is an integer of at least ``least``.

    Example:
        >>> check_count("Steps", "n", 0)
        Traceback (most recent call last):
            ...
        ValueError: Steps(n=0): must be an integer of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{owner}({name}={value!r}): must be an integer of at least {least}.")


def check_number(
    owner: str,
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """Raise `ValueError` unless ``value`` is a finite number within bounds.

    Args:
        least, above: the lower one, which belongs to the range or does not; one is given.
        most, below: the upper one, likewise; none by default.

    Example:
        >>> check_number("Naive", "damping", "half", above=0, most=1)
        Traceback (most recent call last):
            ...
        ValueError: Naive(damping='half'): must be a finite number in (0, 1].
    """
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    high_enough = number and (value > above if above is not None else value >= least)
    low_enough = number and (most is None or value <= most) and (below is None or value < below)
    if not (high_enough and low_enough):
        where = f"of at least {least}" if above is None else f"above {above}"
        if most is not None or below is not None:
            low = f"[{least}" if above is None else f"({above}"
            where = f"in {low}, " + (f"{below})" if most is None else f"{most}]")
        raise ValueError(f"{owner}({name}={value!r}): must be a finite number {where}.")


def check_flag(owner: str, name: str, value: Any) -> None:
    """Raise `ValueError` unless ``value`` is True or False.

    Example:
        >>> check_flag("Broyden", "line_search", "yes")
        Traceback (most recent call last):
            ...
        ValueError: Broyden(line_search='yes'): must be True or False.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{owner}({name}={value!r}): must be True or False.")


def check_kind(name: str, value: Any, kind: Any, example: str) -> None:
    """Raise `TypeError` unless ``value`` is an instance of ``kind``.

    Example:
        >>> check_kind("solver", "anderson", int, "Anderson(memory=5)")
        Traceback (most recent call last):
            ...
        TypeError: solver='anderson' is not a solver: pass an object such as Anderson(memory=5).
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name}={value!r} is not a {name}: pass an object such as {example}.")


def check_args(args: Any) -> None:
    """Raise `TypeError` unless the further arguments of a map come as a tuple.

    Example:
        >>> check_args([1])
        Traceback (most recent call last):
            ...
        TypeError: args is a list: give a tuple, such as args=(x,).
    """
    if not isinstance(args, tuple):
        raise TypeError(f"args is a {type(args).__name__}: give a tuple, such as args=(x,).")


def check_positions(name: str, positions: Any, most: int | None = None, why: str = "") -> None:
    """Raise `ValueError` unless ``positions`` are step numbers from 1 on, rising, up to ``most``.

    Example:
        >>> check_positions("path", (3, 1), most=9, why="what Steps(n=9) allows")
        Traceback (most recent call last):
            ...
        ValueError: path=(3, 1): positions are a sequence of step numbers, rising, from 1 to 9 \
(what Steps(n=9) allows).
    """
    numbers = tuple(positions) if isinstance(positions, Sequence) else ()
    whole = all(isinstance(n, Integral) and not isinstance(n, bool) for n in numbers)
    rising = whole and list(numbers) == sorted(set(numbers))
    within = rising and (not numbers or (numbers[0] >= 1 and (not most or numbers[-1] <= most)))
    if not (within and isinstance(positions, Sequence)):
        end = "on" if most is None else f"to {most} ({why})"
        raise ValueError(
            f"{name}={positions!r}: positions are a sequence of step numbers, rising, from 1 {end}."
        )
