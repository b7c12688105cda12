"""Looking at autograd's graph: where a solution begins in it, and which leaves it reaches."""

from __future__ import annotations

from collections.abc import Iterator
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


def leaves_of(tensor: Tensor) -> Iterator[Tensor]:
    """The leaf tensors that a gradient of ``tensor`` would reach, not looking beyond a `Start`."""
    seen: set[Any] = set()
    pending = [tensor.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen or node.name() == Start._backward_cls.__name__:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf
        pending.extend(parent for parent, _ in node.next_functions)
