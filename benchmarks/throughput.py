"""Images per second of DEQDet from end to end: eager, and by the engine for inference.

    python -m benchmarks.throughput

ResNet-50 from random weights, 100 queries, 32 points, 25 refinements, batch 1, 800×1344 (an image
of 800×1333, padded).  *Engine-only* begins with the image on the device; *end to end* begins with
bytes in the host's memory and ends with boxes there.  Median and 95th percentile.  On a GPU the
engine runs in bfloat16 as a CUDA graph (`detection.engine.Engine`), and so do the backbone and the
neck, which are timed alone.  The floors beside it are those of 25 refinements without the backbone,
and with it, one after the other: the flops of their products, or the bytes of their weights, over
the most that this machine was seen to do (`benchmarks.ceilings`).  On a CPU there is no graph, and
the engine is the model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.ceilings import Ceilings, Work
from benchmarks.full_size import IMAGE, full_size
from benchmarks.goals import NO_GPU, Goal, goals_table
from benchmarks.measure import (
    by_turns,
    device,
    machine,
    output_folder,
    p95,
    wide_console,
    write_results,
)
from detection.cuda_graphs import Recorded
from detection.detections import select_detections
from detection.engine import Engine
from detection.models.config import BackboneConfig, EquilibriumConfig, ModelConfig
from detection.models.detector import Detector

BACKBONE, STEPS = "resnet50", 25
GOAL, GOAL_RATIO = 100, 8
"""On an H200: images per second, end to end; and how often those of the eager code."""
EAGER, GRAPH, ENCODER = "eager, float32", "CUDA graph, end to end", "backbone and neck"
FLOOR, WHOLE_FLOOR = "floor of 25 refinements", "floor with backbone and neck"


@dataclass(frozen=True)
class ImageTime:
    """Seconds per image: median and 95th percentile."""

    name: str
    median: float
    p95: float


def measured(runs: dict[str, Callable[[], object]], repeats: int) -> list[ImageTime]:
    """All of them by turns."""
    taken = by_turns(list(runs.values()), repeats, uncounted=2)
    return [
        ImageTime(name, statistics.median(own), p95(own))
        for name, own in zip(runs, taken, strict=True)
    ]


def precision(device: str) -> torch.dtype:
    """What the engine multiplies in."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def configuration() -> ModelConfig:
    """What is timed."""
    decoder = EquilibriumConfig(steps=STEPS)
    return ModelConfig(BackboneConfig(BACKBONE, pretrained=False), decoder=decoder)


def encoder(
    engine: Engine, image: Tensor, size: Tensor, *, graph: bool
) -> Callable[[], list[Tensor]]:
    """Backbone and neck as the engine runs them; gives a corner of each map."""

    def encode(image: Tensor, size: Tensor) -> list[Tensor]:
        maps, _ = engine.encode(image, size)
        return [each[..., :1, :1] for each in maps]  # a graph's outputs are copied

    run = Recorded(encode, (image, size), image.device) if graph else encode
    return lambda: run(image, size)


def contestants(device: str) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    torch.manual_seed(0)
    model = Detector(configuration()).to(device).eval()
    engine = Engine(model, dtype=precision(device))
    host = torch.randint(0, 256, (1, 3, *IMAGE), dtype=torch.uint8)
    size = torch.tensor([[800, 1333]])
    if device == "cuda":
        host = host.pin_memory()
    image, size_there = host.to(device), size.to(device)

    kind = "CUDA graph" if device == "cuda" else "engine"

    def eager() -> object:
        return model(image, size_there)

    def end_to_end() -> object:
        output = engine(host.to(device, non_blocking=True), size.to(device, non_blocking=True))
        found = select_detections(output.logits, output.boxes, size_there, [(800, 1333)], 100)
        return found[0].boxes.cpu()

    return {
        EAGER: torch.inference_mode()(eager),
        f"{kind} only": lambda: engine(image, size_there),
        f"{kind}, end to end": torch.inference_mode()(end_to_end),
        ENCODER: encoder(engine, image, size_there, graph=device == "cuda"),
    }


def floors(device: str) -> list[ImageTime]:
    """Least times of 25 refinements, and of the backbone, the neck and then these."""
    dtype = precision(device)
    ceilings = Ceilings.measured(device, dtype)
    refinement, before = Work.of(full_size(device=device), dtype), work_before(dtype)
    refined = ceilings.floor(STEPS * refinement.flops, STEPS * refinement.bytes)
    # Nothing is refined before there are maps.
    whole = refined + ceilings.floor(before.flops, before.bytes)
    return [ImageTime(FLOOR, refined, refined), ImageTime(WHOLE_FLOOR, whole, whole)]


def work_before(dtype: torch.dtype) -> Work:
    """That of backbone and neck."""
    with torch.device("meta"):
        model = Detector(configuration()).eval()
        image, size = torch.zeros(1, 3, *IMAGE), torch.zeros(1, 2, dtype=torch.int64)
    weights = [*model.backbone.parameters(), *model.neck.parameters()]
    return Work.counted(lambda: model.encode(image, size), weights, dtype)


def goals(results: list[dict[str, Any]]) -> list[Goal]:
    """Those of an H200; a CPU has none."""
    times = {time.name: time for time in (ImageTime(**found) for found in results)}
    graph, floor = times.get(GRAPH), times.get(WHOLE_FLOOR)
    reason = NO_GPU if graph is None else "Image, backbone and refinements follow each other."
    return [
        Goal(
            f"images per second on a GPU, {STEPS} refinements, end to end",
            None if graph is None else 1 / graph.median,
            least=GOAL,
            floor=None if graph is None or floor is None else 1 / floor.median,
            reason=reason,
        ),
        Goal(
            "times the eager code's on a GPU, end to end",
            None if graph is None else times[EAGER].median / graph.median,
            least=GOAL_RATIO,
            reason=reason,
        ),
    ]


def main() -> None:
    """Print the table; write the results."""
    folder, console = output_folder(__doc__), wide_console()
    repeats = 100 if device() == "cuda" else 5
    found = [*measured(contestants(device()), repeats), *floors(device())]
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
    results = [asdict(time) for time in found]
    write_results(folder, "throughput", results, console, place=device())
    console.print(goals_table(goals(results)))


if __name__ == "__main__":
    main()
