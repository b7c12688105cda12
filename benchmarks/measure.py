"""What the benchmarks share: clocks, the machine, and results as files.

Results are written with the machine, versions, command and date they come from.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

T = TypeVar("T")
R = TypeVar("R")


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


def three_digits(figure: float) -> str:
    """``figure`` with three significant digits, and never with an exponent.

    Example:
        >>> [three_digits(x) for x in (0.0, 0.0123456, 11.816, 1710.6)]
        ['0', '0.0123', '11.8', '1711']
    """
    if not figure or not math.isfinite(figure):
        return f"{figure:g}"
    return f"{figure:.{max(0, 2 - math.floor(math.log10(abs(figure))))}f}"


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
