"""Images per second of DEQDet from end to end: eager, and by the engine for inference.

    python -m benchmarks.throughput

ResNet-50 from random weights, 100 queries, 32 points, 25 refinements, batch 1, 800×1344 (an image
of 800×1333, padded).  *Engine-only* begins with the image on the device; *end to end* begins with
bytes in the host's memory and ends with boxes there.  Median and 95th percentile.  On a GPU the
engine runs in bfloat16 as a CUDA graph (`detection.engine.Engine`); the floor beside it is the time
that the two large products of 25 refinements, and the reading of their weights, take there by
themselves.  On a CPU there is no graph, and the engine is the model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from rich.table import Table
from torch.nn import functional as F

from benchmarks.full_size import IMAGE
from benchmarks.measure import (
    by_turns,
    machine,
    output_folder,
    p95,
    wide_console,
    write_results,
)
from detection.decoder.layer import RefinementLayer
from detection.detections import select_detections
from detection.engine import Engine
from detection.models.config import BackboneConfig, EquilibriumConfig, ModelConfig
from detection.models.decoders import EquilibriumDecoder
from detection.models.detector import Detector

STEPS = 25
GOAL = 100
"""Images per second, end to end, on an H200; and `GOAL_RATIO` times the eager code's."""
GOAL_RATIO = 8


@dataclass(frozen=True)
class Time:
    """Seconds per image: median and 95th percentile."""

    name: str
    median: float
    p95: float


def measured(runs: dict[str, Callable[[], object]], repeats: int) -> list[Time]:
    """All of them by turns."""
    taken = by_turns(list(runs.values()), repeats, uncounted=2)
    return [
        Time(name, statistics.median(own), p95(own)) for name, own in zip(runs, taken, strict=True)
    ]


def contestants(device: str) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    torch.manual_seed(0)
    config = ModelConfig(
        BackboneConfig("resnet50", pretrained=False), decoder=EquilibriumConfig(steps=STEPS)
    )
    model = Detector(config).to(device).eval()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    engine = Engine(model, dtype=dtype)
    host = torch.randint(0, 256, (1, 3, *IMAGE), dtype=torch.uint8)
    size = torch.tensor([[800, 1333]])
    if device == "cuda":
        host = host.pin_memory()
    image, size_there = host.to(device), size.to(device)

    def eager() -> object:
        return model(image, size_there)

    def end_to_end() -> object:
        output = engine(host.to(device, non_blocking=True), size.to(device, non_blocking=True))
        found = select_detections(output.logits, output.boxes, size_there, [(800, 1333)], 100)
        return found[0].boxes.cpu()

    return {
        "eager, float32": torch.inference_mode()(eager),
        "engine only": lambda: engine(image, size_there),
        "engine, end to end": torch.inference_mode()(end_to_end),
        "backbone and neck": torch.inference_mode()(lambda: model.encode(image, size_there)),
        "floor of 25 refinements": torch.inference_mode()(lambda: floor(model, dtype)),
    }


def floor(model: Detector, dtype: torch.dtype) -> None:
    """The large products of all refinements and nothing else."""
    assert isinstance(model.decoder, EquilibriumDecoder)
    layer = model.decoder.refinement
    assert isinstance(layer, RefinementLayer)
    into, out_of = (
        layer.mixing.generator.weight.to(dtype),
        layer.mixing.project_out.weight.to(dtype),
    )
    content = into.new_ones(100, into.shape[1])
    mixed = into.new_ones(100, out_of.shape[1])
    for _ in range(STEPS):
        F.linear(content, into)
        F.linear(mixed, out_of)


def main() -> None:
    """Print the table; write the results."""
    folder, console = output_folder(__doc__), wide_console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = measured(contestants(device), repeats=100 if device == "cuda" else 5)
    table = Table("", "median, ms", "95 %, ms", "images/s", "over eager")
    for time in found:
        table.add_row(
            time.name,
            f"{1e3 * time.median:.1f}",
            f"{1e3 * time.p95:.1f}",
            f"{1 / time.median:.2f}",
            f"{found[0].median / time.median:.2f}",
        )
    console.print(f"DEQDet, ResNet-50, {STEPS} refinements, batch 1. {machine()}.")
    console.print(table)
    console.print(f"Goal on an H200: {GOAL} images/s end to end, {GOAL_RATIO} times eager.")
    write_results(folder, "throughput", [asdict(time) for time in found], console)


if __name__ == "__main__":
    main()
