"""Looking at autograd's graph: where a solution begins in it, and which leaves it reaches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class Start(torch.autograd.Function):
    """Where the graph of an adjoint gradient begins: ``value``, as something to differentiate by.

    The gradient that arrives here is dropped, since the adjoint has accounted for it.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, requires_grad: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None

    @staticmethod
    def of(value: Tensor) -> Tensor:
        """``value`` as a start."""
        start: Tensor = Start.apply(
            value.detach(), torch.zeros((), device=value.device, requires_grad=True)
        )
        return start


def leaves_of(tensor: Tensor, known: Sequence[Tensor] = ()) -> Iterator[Tensor]:
    """The leaf tensors that a gradient of ``tensor`` would reach, not looking beyond a `Start`.

    Those of ``known`` are left out, and what only lies behind them.
    """
    ends = {id(t) for t in known}
    # An edge, not its node: one operation may have several outputs, of which some are known.
    passed = {(t.grad_fn, t.output_nr) for t in known}
    seen: set[Any] = set()
    pending: list[tuple[Any, int]] = [(tensor.grad_fn, tensor.output_nr)]
    while pending:
        node, _ = edge = pending.pop()
        if node is None or node in seen or edge in passed:
            continue
        if node.name() == Start._backward_cls.__name__:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in ends:
            yield leaf
        pending.extend(node.next_functions)
