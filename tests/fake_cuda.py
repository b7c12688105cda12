"""CUDA where there is no GPU: tensors that are on it and have no numbers, under its autocast.

What torch dispatches for such tensors, and in which dtype, is what it would for real ones.  Layouts
are, too, but for those that libraries decide (a convolution gives contiguous maps here).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


@contextmanager
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors are made on a GPU that is not there."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(FakeTensor, "__deepcopy__", _copied, raising=False)
    # A kernel of one's own cannot be launched.
    monkeypatch.setattr("detection.decoder.sampling.triton_sampling", None)
    with FakeTensorMode(), torch.device("cuda"):
        yield


def _copied(tensor: FakeTensor, memo: dict[int, object]) -> torch.Tensor:
    """Torch's own would copy the mode that the tensor belongs to, and look for its storage."""
    clone = tensor.detach().clone()
    is_weight = isinstance(tensor, nn.Parameter)
    copy = nn.Parameter(clone, tensor.requires_grad) if is_weight else clone
    memo[id(tensor)] = copy
    return copy
