"""What the transforms of `torch.func` and forward mode are doing at the moment.

Torch has no public way to ask, so its private names stand here and nowhere else.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch: Any = torch._C._functorch


def is_wrapped(x: Tensor) -> bool:
    """Whether ``x`` is seen through a transform."""
    return not torch.compiler.is_compiling() and _functorch.is_functorch_wrapped_tensor(x)


def is_transforming() -> bool:
    """Whether any transform is at work."""
    return _functorch.maybe_current_level() is not None


def derivatives() -> int:
    """How many transforms at work take derivatives; vmap does not."""
    if not is_transforming():
        return 0
    kinds = [interpreter.key() for interpreter in _functorch.get_interpreter_stack()]
    return sum(kind != _functorch.TransformType.Vmap for kind in kinds)


def is_mapped(x: Tensor) -> bool:
    """Whether ``x`` is one of many under `torch.func.vmap`."""
    while is_wrapped(x):
        if _functorch.is_batchedtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return False


def is_batched_by_autograd(x: Tensor) -> bool:
    """Whether ``x`` is one of many in a backward pass with ``is_grads_batched=True``."""
    if torch.compiler.is_compiling():  # which traces a backward pass of one
        return False
    return ", Batched" in repr(torch._C._dispatch_keys(x))  # a key that has no name in Python


def is_in_backward() -> bool:
    """Whether a backward pass is going on."""
    return torch._C._current_graph_task_id() != -1


def on_host(x: Tensor) -> Tensor | None:
    """``x`` on the host, for which it waits for the device; None under vmap."""
    if is_mapped(x):
        return None
    while is_wrapped(x):
        x = _functorch.get_unwrapped(x)
    return (x.detach() if x.requires_grad else x).cpu()


def spread(y: Tensor, fy: Tensor) -> Tensor:
    """``y``, mapped over what ``fy`` is mapped over where `torch.func.vmap` is at work.

    A start that is the same for all mapped problems must become one per problem before it is
    written to; outside of transforms this is ``y`` itself.
    """
    return y + torch.zeros_like(fy) if is_wrapped(fy) else y


def is_pushing_forward() -> bool:
    """Whether forward-mode differentiation is going on."""
    return forward_ad._current_level >= 0


def no_forward_mode() -> AbstractContextManager[object]:
    """Keep tangents out, as ``torch.no_grad`` keeps graphs out."""
    mode: AbstractContextManager[object] = forward_ad._set_fwd_grad_enabled(False)
    return mode


def has_tangent(x: Tensor) -> bool:
    """Whether forward-mode differentiation reaches ``x``."""
    return is_pushing_forward() and forward_ad.unpack_dual(x).tangent is not None
