"""What the benchmarks share: memory that can be counted exactly, and the machine's name."""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import AbstractContextManager
from weakref import finalize

import torch
from torch import Tensor


class SavedBytes:
    """Bytes of the distinct storages that autograd keeps for the backward pass: now, and at most.

    A storage that several operations save counts once; parameters and inputs, which live anyway,
    do not count.  Deterministic, on any device.

    Example:
        >>> x = torch.ones(1000, requires_grad=True)
        >>> with SavedBytes(outside=[x]) as saved:
        ...     y = x.exp().sum()
        >>> saved.peak
        4000
    """

    def __init__(self, outside: list[Tensor]) -> None:
        self.outside = {t.untyped_storage().data_ptr() for t in outside}
        self.users: dict[int, int] = {}
        self.now = self.peak = 0
        self._hooks: AbstractContextManager[None] = torch.autograd.graph.saved_tensors_hooks(
            self._pack, lambda holder: holder.tensor
        )

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> _Holder:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        holder = _Holder(tensor)
        if key not in self.outside:
            self.users[key] = self.users.get(key, 0) + 1
            self.now += size if self.users[key] == 1 else 0
            self.peak = max(self.peak, self.now)
            finalize(holder, self._release, key, size)
        return holder

    def _release(self, key: int, size: int) -> None:
        self.users[key] -= 1
        if not self.users[key]:
            del self.users[key]
            self.now -= size


class _Holder:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(run: Callable[[], object], outside: list[Tensor]) -> int:
    """Peak of `SavedBytes` while ``run`` runs."""
    with SavedBytes(outside) as saved:
        run()
    return saved.peak


def machine() -> str:
    """Processor, cores, system and versions, for the head of a table."""
    cuda = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{platform.machine()} with {torch.get_num_threads()} threads{cuda}, "
        f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"
    )
