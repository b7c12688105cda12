"""What may change from one solve to the next, and must not change within one.

A fixed point exists of one map.  A dropout mask that is drawn, or a power iteration that moves, at
every evaluation makes each evaluation another map, and the solver chases a point that is not there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import nn


class PerSolve(nn.Module, ABC):
    """A module with something that is the same throughout a solve: `SolveDropout`, for one."""

    @abstractmethod
    def renew(self) -> None:
        """A solve begins: what is random may be drawn anew, what is tracked may move on."""


def renew(f: nn.Module | Callable[..., Any]) -> None:
    """Tell every `PerSolve` inside the module ``f`` that a solve begins.

    `fixed_point`, `FixedPoint`, `root` and `supervise` do so.  A function around a module does not
    show it to them, and nothing is done: call this with the module before each solve.

    Example:
        >>> import torch
        >>> from implicit.dropout import SolveDropout
        >>> cell = torch.nn.Sequential(torch.nn.Linear(4, 4), SolveDropout(0.5))
        >>> renew(cell)
        >>> y = torch.ones(2, 4)
        >>> bool((cell(y) == cell(y)).all())
        True
    """
    if not hasattr(f, "modules"):  # torch.compile of torch 2.6 cannot follow isinstance here
        return
    for inner in f.modules():
        if isinstance(inner, PerSolve):
            inner.renew()
