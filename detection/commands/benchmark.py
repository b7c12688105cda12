"""``deqdet benchmark``: how fast a detector is on this machine."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from detection.commands.base import Command
from detection.distributed import Distributed
from detection.engine import Engine
from detection.models.config import EquilibriumConfig
from detection.models.decoders import EquilibriumDecoder
from detection.models.detector import Detector
from detection.predictor import load
from detection.recipes import recipe

WARM_UP = 2


@dataclass(frozen=True)
class Benchmark(Command):
    """Time a detector on this machine: milliseconds a batch, images a second, memory.

    Every image takes the same number of refinements, and lies on the device already.  On a GPU
    the engine (bfloat16, a CUDA graph) is timed beside the eager code.

    Args:
        model: a checkpoint; or the name of a recipe, which is timed with random weights.
        size: height and width of the images, as the detector gets them.
        batch_size: images at a time.
        steps: refinements; by default as many as the recipe takes at most.
        runs: timed runs.
        device: cuda, cuda:1 or cpu; by default CUDA if there is one.
    """

    model: tyro.conf.Positional[str]
    size: tuple[int, int] = (800, 1344)
    batch_size: int = 1
    steps: int | None = None
    runs: int = 10
    device: str | None = None

    def check(self) -> None:
        for name in ("batch_size", "steps", "runs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: at least 1.")
        if any(side < 32 or side % 32 for side in self.size):
            raise ValueError(f"--size {self.size}: two multiples of 32, as images are padded.")

    def run(self, distributed: Distributed, console: Console) -> None:
        device = distributed.device
        detector = self._fixed(self._detector().to(device).eval())
        images = torch.randint(0, 256, (self.batch_size, 3, *self.size), dtype=torch.uint8)
        images, sizes = images.to(device), torch.tensor([self.size] * self.batch_size).to(device)
        runs = {"eager": lambda: detector(images, sizes)}
        if device.type == "cuda":
            engine = Engine(detector)
            runs["engine, bfloat16"] = lambda: engine(images, sizes)
        height, width = self.size
        title = f"{self.model}, {self.batch_size} × {height}×{width}, on {_name(device)}"
        table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
        table.add_column("run")
        for heading in ("median ms", "p95 ms", "images/s", "peak MiB"):
            table.add_column(heading, justify="right")
        for name, run in runs.items():
            times, peak = _timed(run, self.runs, device)
            median = statistics.median(times)
            table.add_row(
                name,
                f"{1e3 * median:.1f}",
                f"{1e3 * np.percentile(times, 95):.1f}",
                f"{self.batch_size / median:.2f}",
                f"{peak / 2**20:.0f}",
            )
        console.print(table)

    def _detector(self) -> Detector:
        if Path(self.model).exists() or "/" in self.model:
            return load(self.model).detector
        torch.manual_seed(0)
        return Detector(recipe(self.model).without_pretraining().model)

    def _fixed(self, detector: Detector) -> Detector:
        """The detector with a number of refinements that does not depend on the image."""
        decoder = detector.decoder
        if not isinstance(decoder, EquilibriumDecoder):
            if self.steps is not None:
                raise ValueError(f"--steps {self.steps}: {self.model} has a fixed number of them.")
            return detector
        config: EquilibriumConfig = decoder.config
        decoder.config = replace(config, steps=self.steps or config.most_steps)
        return detector


@torch.inference_mode()
def _timed(run: Callable[[], object], runs: int, device: torch.device) -> tuple[list[float], int]:
    """Seconds of each run, and bytes at the peak: of the device, or of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(WARM_UP):
        run()
    times = []
    for _ in range(runs):
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - started)
    if device.type == "cuda":
        return times, torch.cuda.max_memory_allocated(device)
    return times, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU, {torch.get_num_threads()} threads"
