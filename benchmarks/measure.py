"""What the benchmarks share: exact counts of memory and operations; goals; results as files.

Memory and operations are counted where torch dispatches them, so they are the same on every
machine; results are written with the machine, versions, command and date they come from.  A module
with goals has a function ``goals(results)`` that holds its results against them.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from weakref import finalize

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
R = TypeVar("R")


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
    operation allocates and frees inside itself.  Deterministic, on any device.

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


def device() -> str:
    """Where benchmarks run: CUDA if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock time of one call, the GPU's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def by_turns(
    runs: Sequence[Callable[[], object]], repeats: int, uncounted: int = 1
) -> list[list[float]]:
    """Seconds of each run, shortest first; all take turns, and the first turns do not count.

    A machine that slows down so slows down all of them.  Each turn begins with another run.
    """
    turns = in_turns(runs, uncounted + repeats, seconds)
    return [sorted(times) for times in zip(*turns[uncounted:], strict=True)]


def in_turns(runs: Sequence[T], turns: int, measure: Callable[[T], R]) -> list[list[R]]:
    """What ``measure`` gives of each run, turn by turn; each turn begins with another run.

    What comes after something large meets other caches and clocks: so all come after each.

    Example:
        >>> order = []
        >>> in_turns(["a", "b"], 2, lambda run: order.append(run) or run)
        [['a', 'b'], ['a', 'b']]
        >>> order
        ['a', 'b', 'b', 'a']
    """
    rounds = []
    for turn in range(turns):
        order = [(turn + i) % len(runs) for i in range(len(runs))]
        found = {i: measure(runs[i]) for i in order}
        rounds.append([found[i] for i in range(len(runs))])
    return rounds


def p95(times: Sequence[float]) -> float:
    """The 95th percentile of times in ascending order.

    Example:
        >>> p95(range(101))
        95
    """
    return times[min(len(times) - 1, int(0.95 * len(times)))]


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


def processor(told: Path = Path("/proc/cpuinfo")) -> str:
    """Name of the processor, and which instructions for bfloat16 it has, so far as it tells them.

    Example:
        >>> processor(Path("nowhere")) == (platform.processor() or platform.machine())
        True
    """
    text = told.read_text(encoding="utf-8", errors="replace") if told.exists() else ""
    fields = (line.partition(":") for line in text.splitlines())
    known = {name.strip(): said.strip() for name, _, said in reversed(list(fields))}
    name = known.get("model name") or platform.processor() or platform.machine()
    has = [flag for flag in BFLOAT16 if flag in known.get("flags", "").split()]
    return f"{name} ({', '.join(has) or 'nothing for bfloat16'})" if "flags" in known else name


BFLOAT16 = ("avx512_bf16", "amx_bf16")
"""Instructions of a processor that multiply in bfloat16."""


def machine() -> str:
    """Processor, cores, system and versions, for the head of a table."""
    cuda = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{platform.machine()}, {processor()}, with {torch.get_num_threads()} threads{cuda}, "
        f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"
    )


def provenance(module: str, place: str = "cpu") -> dict[str, Any]:
    """Where results come from: machine, device, versions, command and date."""
    versions = {}
    for name in ("torch", "numpy", "torchdeq", "scipy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "machine": machine(),
        "device": torch.cuda.get_device_name() if place == "cuda" else processor(),
        "versions": versions,
        "command": f"python -m benchmarks.{module}".removesuffix(".__main__"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """With the option that all benchmarks have, ``--output``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).parent / "results"
    parser.add_argument(
        "--output", type=Path, default=default, help="folder for results (benchmarks/results)"
    )
    return parser


NO_GPU = "There was no GPU at hand."
"""Why a figure is not there that a GPU must give."""


@dataclass(frozen=True)
class Goal:
    """What a figure should be, and what it is.

    Attributes:
        what: it is the figure of.
        found: measured; `None` where this machine could not.
        most, least: its bounds; one of them is given.
        floor: what the figure cannot be better than, measured in the same run.
        reason: why it is missed or not there; told only then.

    Example:
        >>> goal = Goal("time over the plain one", 0.60001, most=0.6, reason="It is slow.")
        >>> goal.met, goal.cells()
        (False, ('time over the plain one', '≤ 0.6', '0.6001', '**missed**', 'It is slow.'))
    """

    what: str
    found: float | None
    most: float | None = None
    least: float | None = None
    floor: float | None = None
    reason: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the figure is within its bounds; `None` where there is none."""
        if self.found is None:
            return None
        above = self.least is None or self.found >= self.least
        return above and (self.most is None or self.found <= self.most)

    def cells(self) -> tuple[str, ...]:
        """A row: what, its bound, what was found, whether that is met, and else why not."""
        bound = f"≤ {self.most:g}" if self.least is None else f"≥ {self.least:g}"
        said = {True: "met", False: "**missed**", None: "not measured"}[self.met]
        found = "–" if self.found is None else self._rounded(self.found)
        if self.met:
            return self.what, bound, found, said, ""
        floor = "" if self.floor is None else f" Measured floor: {self._rounded(self.floor)}."
        return self.what, bound, found, said, f"{self.reason}{floor}"

    def _rounded(self, figure: float) -> str:
        """Four digits, and never in its own favour."""
        if not figure or not math.isfinite(figure):
            return f"{figure:g}"
        unit = 10.0 ** (math.floor(math.log10(abs(figure))) - 3)
        digits = figure / unit
        # What lies within rounding of a number is that number.
        near = math.isclose(digits, round(digits), rel_tol=1e-9)
        outwards = math.ceil if self.least is None else math.floor
        return f"{(round(digits) if near else outwards(digits)) * unit:.4g}"


def three_digits(figure: float) -> str:
    """``figure`` with three significant digits, and never with an exponent.

    Example:
        >>> [three_digits(x) for x in (0.0, 0.0123456, 11.816, 1710.6)]
        ['0', '0.0123', '11.8', '1711']
    """
    if not figure or not math.isfinite(figure):
        return f"{figure:g}"
    return f"{figure:.{max(0, 2 - math.floor(math.log10(abs(figure))))}f}"


GOAL_COLUMNS = ("goal", "bound", "found", "", "reason")


def goals_table(goals: Iterable[Goal]) -> Table:
    """One row for each goal, for the terminal."""
    table = Table(*GOAL_COLUMNS, show_lines=True)
    for goal in goals:
        table.add_row(*(cell.replace("*", "") for cell in goal.cells()))
    return table


def output_folder(description: str | None) -> Path:
    """What ``--output`` says, of a benchmark that has no other option; the folder is made."""
    folder: Path = argument_parser(description).parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def wide_console() -> Console:
    """Where tables go: as wide as the terminal, and wide enough for them in a file."""
    console = Console(highlight=False, record=True)
    return console if console.is_terminal else Console(highlight=False, record=True, width=160)


def stem(module: str, place: str) -> str:
    """Name of the files of what was measured at ``place``; those of a CPU have the module's alone.

    Example:
        >>> stem("refinement", "cpu"), stem("refinement", "cuda")
        ('refinement', 'refinement.cuda')
    """
    return module if place == "cpu" else f"{module}.{place}"


def write_results(
    folder: Path,
    module: str,
    results: Any,
    console: Console | None = None,
    *,
    place: str = "cpu",
) -> Path:
    """Write ``results``, their `provenance` and what was printed to ``folder/module.json``.

    A benchmark that runs on a GPU where there is one says with ``place`` where it ran (`device`),
    and what a GPU gave goes to ``folder/module.cuda.json``.
    """
    path = folder / f"{stem(module, place)}.json"
    printed = {} if console is None else {"printed": console.export_text(clear=False)}
    content = {**provenance(module, place), **printed, "results": results}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
