"""Exact counts: bytes kept and alive, operations, evaluations.

They are taken where torch dispatches, and so are the same on every machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from weakref import finalize

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


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
        self.outside = {t.untyped_storage()._cdata for t in outside}
        self.users: dict[int, int] = {}
        self.now = self.peak = 0
        self._hooks: AbstractContextManager[None] = torch.autograd.graph.saved_tensors_hooks(
            self._pack, lambda holder: holder.tensor
        )

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> _Holder:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
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


class Operations(TorchDispatchMode):
    """Counts tensor operations, and the bytes of the storages they made that are alive.

    What lived before is not counted, nor a storage seen through a second tensor, nor what an
    operation allocates and frees inside itself, nor what a storage grows by.  Deterministic, on any
    device.

    Example:
        >>> with Operations() as operations:
        ...     y = torch.ones(1000) * 2 + 1
        >>> operations.count, operations.peak  # the product is alive while the sum is made
        (3, 8000)
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            key, size = storage._cdata, storage.nbytes()
            if key not in given and key not in self._alive:
                self._alive.add(key)
                self.now += size
                finalize(storage, self._free, key, size)
        self.count += 1
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, key: int, size: int) -> None:
        self._alive.remove(key)
        self.now -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor)]


@contextmanager
def imagined(subject: T) -> Iterator[T]:
    """A copy of ``subject`` whose tensors have shapes and no values; inside, none is computed.

    What is kept and what is alive (`SavedBytes`, `Operations`) is the same to the byte, as long as
    nothing depends on a value, and is counted in a fraction of the time.

    Example:
        >>> with imagined(torch.ones(2**30 // 4)) as x, Operations() as operations:
        ...     y = x.exp() + 1
        >>> operations.peak // 2**30
        2
    """
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        copy = deepcopy(subject)
    with mode:
        yield copy


def live_bytes(run: Callable[[], object]) -> int:
    """Most bytes alive at once of what ``run`` allocates in tensors (see `Operations`)."""
    with Operations() as operations:
        run()
    return operations.peak


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes that ``run`` holds at once beyond those held before, told by the allocator.

    Where there is a GPU, of the GPU; otherwise of the CPU, from torch's own record of what it
    allocates, temporaries inside of operations included.  Deterministic, and slow on a CPU.

    Example:
        >>> peak_bytes(lambda: torch.ones(1000) * 2 + 1) // 1000  # and some scalars
        8
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in trace if e.get("name") == "[memory]"]
    held = accumulate(change for _, change in sorted(changes, key=itemgetter(0)))
    return max(held, default=0)


def operations_of(run: Callable[[], object]) -> int:
    """Tensor operations that ``run`` does, views included (see `Operations`)."""
    with Operations() as operations:
        run()
    return operations.count


class Counted:
    """``f``, counting its calls and the rows of the states it was called with.

    Example:
        >>> f = Counted(torch.cos)
        >>> y = f(f(torch.ones(4, 1)))
        >>> f.calls, f.rows
        (2, 8)
    """

    def __init__(self, f: Callable[..., Tensor]) -> None:
        self.f = f
        self.calls = self.rows = 0

    def __call__(self, y: Tensor, *args: Any) -> Tensor:
        self.calls += 1
        self.rows += len(y)
        return self.f(y, *args)
