"""What is kept for the backward pass, and what is computed again there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LARGE = 2**20
"""Elements from which on memory is worth more than the time to fill it again."""


def forgetting(function: Callable[..., Tensor], *args: object, elements: int) -> Tensor:
    """``function(*args)``, keeping its arguments alone for the backward pass.

    Only where that saves memory that matters: with a graph, and if ``function`` would keep about
    ``elements`` numbers or more, `LARGE` at least.  What it computes must not be random.

    Example:
        >>> x = torch.ones(4, requires_grad=True)
        >>> forgetting(torch.exp, x, elements=LARGE).sum().backward()
        >>> torch.equal(x.grad, x.exp())
        True
    """
    if not torch.is_grad_enabled() or elements < LARGE:
        return function(*args)
    kept: Tensor = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return kept
