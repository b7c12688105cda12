"""Weights in the type that autocast multiplies in, made once.

Autocast casts a weight where it is used.  It keeps the cast for the rest of its context if the
weight wants a gradient, and else casts it anew at every use; a CUDA graph, which is one context,
would do so at every replay.  A weight that has the narrower type already is left alone, so a module
with such weights computes under autocast what it did, to the bit, and casts none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from detection.decoder.mixing import AdaptiveMixing

AnyModule = TypeVar("AnyModule", bound=nn.Module)


@torch.inference_mode(False)  # else a graph of it could be recorded in that mode alone
def narrowed(module: AnyModule, dtype: torch.dtype) -> AnyModule:
    """A copy of ``module`` to be called under autocast to ``dtype``, which has no weight to cast.

    Weights of products (linear layers, convolutions, attention) are in ``dtype`` and want no
    gradient, and those of convolutions have their channels last, as the detector's maps have; all
    else is copied as it is.  ``module`` is left alone.

    Args:
        module: with weights in float32.
        dtype: ``torch.bfloat16`` or ``torch.float16``.

    Example:
        >>> module = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
        >>> [parameter.dtype for parameter in narrowed(module, torch.bfloat16).parameters()]
        [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    """
    # What `copy.deepcopy` finds in its memo it takes for the copy, and makes none.
    memo: dict[int, Any] = {
        id(weight): nn.Parameter(_cast(weight, dtype), requires_grad=False)
        for weight in _of_products(module)
    }
    return copy.deepcopy(module, memo)


def _of_products(module: nn.Module) -> Iterator[Tensor]:
    """What autocast casts.  It leaves float64 alone."""
    products = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
    parts = list(module.modules())
    # This bias is added to a product and not handed to it, in the wider type of the two.
    added = {id(part.project_out.bias) for part in parts if isinstance(part, AdaptiveMixing)}
    for part in parts:
        if isinstance(part, products):
            for weight in part.parameters(recurse=False):
                if id(weight) not in added and weight.dtype != torch.float64:
                    yield weight


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last if weight.dim() == 4 else torch.preserve_format
    return weight.detach().to(dtype, memory_format=layout)
