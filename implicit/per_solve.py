"""What may change from one solve to the next, and must not change within one.

A fixed point exists of one map.  A dropout mask that is drawn, or a power iteration that moves, at
every evaluation makes each evaluation another map, and the solver chases a point that is not there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

from torch import nn


class PerSolve(nn.Module, ABC):
    """A module with something that is the same throughout a solve: `SolveDropout`, for one."""

    per_solve: ClassVar[tuple[str, ...]] = ()
    """The attributes that hold it, for evaluations that a backward pass makes after other solves.

    They are assigned and never written into.
    """

    @abstractmethod
    def renew(self) -> None:
        """A solve begins: what is random may be drawn anew, what is tracked may move on."""


_Held = list[tuple[PerSolve, dict[str, Any]]]


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
    for inner in _inside(f):
        inner.renew()


def holding(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f``, in whose calls every `PerSolve` inside it holds what it does now."""
    held = _held_by(_inside(f))
    if not held:
        return f

    def call(*args: Any) -> Any:
        before = _held_by(module for module, _ in held)
        _assign(held)
        try:
            return f(*args)
        finally:
            _assign(before)

    return call


def _held_by(modules: Iterable[PerSolve]) -> _Held:
    return [
        (module, {name: getattr(module, name) for name in module.per_solve}) for module in modules
    ]


def _assign(held: _Held) -> None:
    for module, values in held:
        for name, value in values.items():
            setattr(module, name, value)


def _inside(f: nn.Module | Callable[..., Any]) -> Iterator[PerSolve]:
    if hasattr(f, "modules"):  # torch.compile of torch 2.6 cannot follow isinstance here
        for inner in f.modules():
            if isinstance(inner, PerSolve):
                yield inner
