"""What training through a layer takes of memory: layers, ways to train through them, and bytes.

On a CPU the bytes are counted on copies without values (`benchmarks.counts.imagined`), on a GPU by
its allocator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import implicit
from benchmarks.counts import imagined, live_bytes, peak_bytes, saved_bytes
from benchmarks.full_size import Problem, full_size
from benchmarks.measure import device

S = TypeVar("S")


@dataclass(frozen=True)
class Subject:
    """A layer with what it is called on: ``layer(start, *args)``; ``read`` makes a loss of it."""

    name: str
    layer: nn.Module
    start: Any
    args: tuple[Any, ...]
    read: Callable[[Any], Tensor]
    outside: list[Tensor]

    @property
    def wanting(self) -> list[Tensor]:
        """What receives a gradient."""
        tensors = [*self.layer.parameters(), *pytree.tree_leaves(self.args)]
        return [tensor for tensor in tensors if tensor.requires_grad]

    def drop_gradients(self) -> None:
        """Let go of them."""
        for tensor in self.wanting:
            tensor.grad = None


@dataclass(frozen=True)
class Memory:
    """What one way to train takes, in bytes."""

    layer: str
    gradient: str
    k: int
    steps: int
    kept: int
    peak: int


class Generic(nn.Module):
    """``tanh(Wy + x)`` with ``‖W‖`` about 0.9."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        nn.init.orthogonal_(self.linear.weight, gain=0.9)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(y) + x)


def generic(batch: int = 2048, dim: int = 256) -> Subject:
    """The generic layer."""
    torch.manual_seed(0)
    layer, x = Generic(dim).to(device()), torch.randn(batch, dim, device=device())
    start = torch.zeros_like(x)
    outside = [*layer.parameters(), x, start]
    return Subject("tanh", layer, start, (x,), lambda y: y.square().mean(), outside)


def refinement(queries: int, points: int) -> Subject:
    """The refinement layer of DEQDet."""
    problem = full_size(queries, points, device=device())
    return subject_of(problem, f"refinement {queries}/{points}")


def subject_of(problem: Problem, name: str = "refinement") -> Subject:
    """A refinement on maps that want a gradient."""
    maps = problem.maps_of_a_neck()
    return Subject(
        name,
        problem.layer,
        problem.queries,
        (maps,),
        lambda y: y.content.square().mean() + y.boxes.mean(),
        [*problem.outside, *maps],
    )


def train(subject: Subject, gradient: implicit.Gradient, steps: int) -> None:
    """Forward and backward pass of one solve."""
    solution = implicit.fixed_point(
        subject.layer,
        subject.start,
        solver=implicit.Naive(),
        stop=implicit.Steps(steps),
        gradient=gradient,
        args=subject.args,
    )
    subject.read(solution.value).backward()
    subject.drop_gradients()


def supervise(subject: Subject, at: Sequence[int], recompute: bool = False) -> None:
    """Forward and backward pass with supervised positions, RAG(2) at each."""
    supervision = implicit.supervise(
        subject.layer,
        subject.start,
        lambda y, _: subject.read(y),
        at=at,
        gradient=implicit.RAG(2, recompute=recompute),
        args=subject.args,
        parameters=subject.layer.parameters(),
    )
    supervision.loss.backward()
    subject.drop_gradients()


@contextmanager
def measured(subject: S) -> Iterator[S]:
    """What to measure ``subject`` by: a copy without values, or itself on a GPU."""
    if device() == "cuda":
        yield subject
        return
    with imagined(subject) as copy:
        yield copy


def peak_of(run: Callable[[], None]) -> int:
    """Most bytes alive at once of those that ``run`` makes."""
    return peak_bytes(run) if device() == "cuda" else live_bytes(run)


def memory_of(subject: Subject, name: str, k: int, steps: int, run: Callable[[], None]) -> Memory:
    """Both figures of ``run``, which runs once."""
    kept = 0

    def keep() -> None:
        nonlocal kept
        kept = saved_bytes(run, subject.outside)

    peak = peak_of(keep)
    return Memory(subject.name, name, k, steps, kept, peak)


def frozen_peak(subject: Subject, gradient: implicit.Gradient, steps: int) -> int:
    """Peak where the first weight alone wants a gradient, which takes the whole way back."""
    others = subject.wanting[1:]
    for tensor in others:
        tensor.requires_grad_(False)
    try:
        return peak_of(functools.partial(train, subject, gradient, steps))
    finally:
        for tensor in others:
            tensor.requires_grad_(True)
