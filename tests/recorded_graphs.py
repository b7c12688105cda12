"""CUDA graphs where there is no GPU: what torch dispatches is recorded, and done again at a replay.

It keeps a graph's rules: a replay reads and writes the memory of the recording, decides nothing
anew, and what would wait for the device is refused while recording.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "unique",
    "_linalg_check_errors",
)
"""Operators whose result, or its size, the host must wait for; a copy to the host is not seen."""


class Graph(TorchDispatchMode):
    """Stands for `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in WAITING:
            raise RuntimeError(f"{name} waits for the device, which a graph cannot")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tree_leaves(result)))
        return result

    def replay(self) -> None:
        """Every operator again, each result into the memory that it had."""
        for func, args, kwargs, results in self.calls:
            for old, new in zip(results, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Stream:
    """Does all in order, as a CPU does anyway."""

    def __init__(self, device: object = None) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        """Nothing to wait for."""


@contextmanager
def _recording(graph: Graph, **_: object) -> Iterator[None]:
    with graph:
        yield


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put these in the place of torch's."""
    for name, stand_in in (
        ("Stream", Stream),
        ("CUDAGraph", Graph),
        ("graph", _recording),
        ("current_stream", Stream),
        ("stream", lambda stream: nullcontext()),
        ("device", lambda device: nullcontext()),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
