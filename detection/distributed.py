"""One program for one process or many: the few collective operations training needs.

Processes are started by ``torchrun``, which tells each its rank through the environment.  In a
single process every operation here is the identity and nothing is initialised.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class DeviceError(RuntimeError):
    """A device that is not there, or processes that were not started as they should be."""


@dataclass(frozen=True)
class Distributed:
    """One process among its peers; a context manager that leaves the group at its end.

    Attributes:
        rank: number of this process, from 0.
        world_size: how many there are.
        device: where this process computes.

    Example:
        >>> with Distributed() as alone:
        ...     alone.is_main, alone.all_reduce_mean(torch.tensor(3.0)), alone.gather_objects("a")
        (True, tensor(3.), ['a'])
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files and reports."""
        return self.rank == 0

    def all_reduce_mean(self, tensor: Tensor) -> Tensor:
        """Mean of a floating-point tensor over all processes; the tensor itself is kept."""
        if self.world_size == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total / self.world_size

    def gather_objects(self, item: Any) -> list[Any]:
        """What every process gave, in the order of ranks, on every process (pickled)."""
        if self.world_size == 1:
            return [item]
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item)
        return items

    def from_main(self, item: Any) -> Any:
        """What the main process gave, on every process (pickled): one decision for all."""
        return self.gather_objects(item if self.is_main else None)[0]

    def on_main(self, call: Callable[[], T]) -> T:
        """What a call gives on the main process, on every process; its error is raised on all.

        Where it is not the main process that raises it, the error has ``of_main``.
        """
        if self.world_size == 1:
            return call()
        found: T | None = None
        failure: Exception | None = None
        if self.is_main:
            try:
                found = call()
            except Exception as error:
                failure = error
        found, failure = self.from_main((found, failure))
        if failure is not None:
            failure.__dict__["of_main"] = not self.is_main
            raise failure
        return cast(T, found)

    def agree(self, flag: bool) -> bool:
        """Whether the main process says so; cheaper than `from_main`, for every step."""
        if self.world_size == 1:
            return flag
        decided = torch.tensor(float(flag), device=self.device)
        dist.broadcast(decided, src=0)
        return bool(decided)

    def barrier(self) -> None:
        """Wait until every process has come here."""
        if self.world_size > 1:
            # NCCL would otherwise guess the device from the rank.
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def close(self) -> None:
        """Leave the process group."""
        if self.world_size > 1:
            dist.destroy_process_group()

    def __enter__(self) -> Distributed:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:  # who leaves first may take down what the others still talk through
            self.barrier()
        self.close()


def init_from_environment(device: str | None = None) -> Distributed:
    """Join the processes that ``torchrun`` started, or stand alone without it.

    Args:
        device: ``"cuda"``, ``"cuda:1"`` or ``"cpu"``; by default CUDA if there is one.  Under
            ``torchrun`` each process takes the GPU of its local rank.  CUDA communicates by NCCL,
            CPU by gloo.

    Raises:
        DeviceError: if CUDA is asked for and absent, if there are more processes than GPUs, or
            if the environment is only half set.

    Example:
        >>> init_from_environment("cpu").world_size
        1
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"The device {device!r} was asked for, but PyTorch finds no CUDA. "
            "Use the device 'cpu', or install a CUDA build of PyTorch and its driver."
        )
    world_size = _integer("WORLD_SIZE", default=1)
    if world_size == 1:
        if kind.type == "cuda":
            torch.cuda.set_device(kind if kind.index is not None else 0)
            kind = torch.device("cuda", torch.cuda.current_device())
        return Distributed(device=kind)
    rank, local_rank = _integer("RANK"), _integer("LOCAL_RANK")
    if kind.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise DeviceError(
                f"Process {local_rank} on this machine has no GPU: there are "
                f"{torch.cuda.device_count()}. Start torchrun with --nproc_per_node at most that."
            )
        kind = torch.device("cuda", local_rank)
        torch.cuda.set_device(kind)
        dist.init_process_group("nccl", device_id=kind)
    else:
        dist.init_process_group("gloo")
    return Distributed(rank, world_size, kind)


def _integer(name: str, default: int | None = None) -> int:
    value = os.environ.get(name)
    if value is None and default is not None:
        return default
    try:
        return int(value or "")
    except ValueError:
        raise DeviceError(
            f"The environment variable {name} is {value!r}, where the number that torchrun sets "
            "was expected. Start several processes with torchrun, or unset WORLD_SIZE to run one."
        ) from None
