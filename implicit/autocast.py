"""Mixed precision ends at the edge of ``f``.

``torch.autocast`` is meant for networks: it would run the matrix products of a solver in half
precision as well, where they lose what the solver lives on.  So ``f`` is evaluated under the
autocast that the caller has set, and everything around it without.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on ``device``; None if it is off."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def forget_casts(device: torch.device) -> None:
    """Drop the casts of weights that autocast keeps, before gradients are wanted.

    Those that were made without a graph would otherwise serve where there is one, and the weights
    get no gradient (torch 2.6 does not tell them apart).
    """
    if autocast_dtype(device) is not None:
        torch.clear_autocast_cache()


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off on ``device``."""
    if autocast_dtype(device) is None:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
