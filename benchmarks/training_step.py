"""Where the time of a training step goes, and what it takes of memory: AdaMixer, RNNDet, DEQDet.

    python -m benchmarks.training_step

ResNet-50 from random weights, batch 2, images of 800×1344 with ten objects each, 100 queries, 32
points: the paper's 1× setting in the same code and run.  The second table is the growth of memory
with RNNDet's T, which DEQDet does not have (paper, Table 2).  ``data`` is the time to read, flip,
resize and collate a batch of two of the embedded digits, 128 pixels wide and high and brought to
800×800; photographs of 800×1344 take longer to decode.

Memory is told in two parts.  What is *held* whatever is computed are parameters, buffers and the
two moments of AdamW with its counters: counted from the shapes, without a step.  What a step
allocates *beyond* that, gradients included, is measured at its peak.  Their sum is what
``torch.cuda.max_memory_allocated`` would tell of a detector alone on a device, but for the images.

``waits`` are those of the host for the device, to match queries with objects: the outputs that are
known at one time are matched together.  On DEQDet's path each position has one of its own, since
its output is differentiated and let go before the next one is there.  To match all at once they
would have to be computed without gradient before, which takes as many refinements more as there are
positions times those of the gradient.

The detectors take turns, each turn begins with another of them, and the first is not counted;
medians of five.  What stands in no part, such as to move the targets, is a thousandth of a step.

Time is told apart by a stopwatch at the borders of the parts, each exclusive of those inside it;
``path`` is the refinement without gradient, ``supervised`` what is differentiated at its positions,
forward and backward, and ``backward`` the rest of the backward pass: backbone, neck, and the
layers that are not on the path.  On a GPU the stopwatch waits for the device at each border, so
the time of the step there is that of whole steps without it.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from rich.table import Table

import implicit
import implicit.supervision
from benchmarks.counts import peak_bytes
from benchmarks.full_size import IMAGE
from benchmarks.goals import Goal, goals_table
from benchmarks.measure import (
    by_turns,
    device,
    in_turns,
    machine,
    output_folder,
    three_digits,
    wide_console,
    write_results,
)
from detection.data import compose_digits, load_coco_split, train_transform
from detection.data.loading import make_loader
from detection.data.transforms import AugmentationConfig
from detection.data.types import Target
from detection.models.config import (
    BackboneConfig,
    DecoderConfig,
    EquilibriumConfig,
    ModelConfig,
    RecurrentConfig,
    StackedConfig,
)
from detection.models.detector import Detector
from detection.training.losses import Criterion, matched_queries
from detection.training.matching import Matcher
from detection.training.optimization import OptimizationConfig, clip_gradients, make_optimizer

APPLICATIONS = 2
"""With gradient, at each position."""
EQUILIBRIUM = EquilibriumConfig(gradient=implicit.RAG(APPLICATIONS))
DETECTORS: dict[str, DecoderConfig] = {
    "AdaMixer": StackedConfig(),
    "RNNDet": RecurrentConfig(),
    "DEQDet": EQUILIBRIUM,
}
BACKBONE = "resnet50"
RECURRENT_STEPS = (6, 12, 20)
PARTS = ("backbone", "layers", "path", "supervised", "matching", "backward", "optimiser")
BATCH, OBJECTS, QUERIES, REPEATS = 2, 10, 100, 5
GOAL_TIME, GOAL_MEMORY = 1.3, 0.6
"""DEQDet over AdaMixer; that of the memory is of all that is held and allocated, on CUDA."""
GOAL_WAITS = 1


class Stopwatch:
    """Seconds by part, each without the parts inside it; and how often a part was entered."""

    def __init__(self) -> None:
        self.parts = dict.fromkeys(PARTS, 0.0)
        self.entered = dict.fromkeys(PARTS, 0)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what is done inside as ``name``."""
        self._lap()
        self._open.append(name)
        self.entered[name] += 1
        try:
            yield
        finally:
            self._lap()
            self._open.pop()

    def _lap(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._open:
            self.parts[self._open[-1]] += now - self._since
        self._since = now

    def timed(self, name: str | Callable[[], str], call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, timed as ``name``."""

        @functools.wraps(call)
        def inner(*args: Any, **kwargs: Any) -> Any:
            with self.part(name if isinstance(name, str) else name()):
                return call(*args, **kwargs)

        return inner


def configuration(decoder: DecoderConfig) -> ModelConfig:
    """Of a detector that is measured."""
    backbone = BackboneConfig(BACKBONE, pretrained=False)
    return ModelConfig(backbone=backbone, decoder=decoder, num_queries=QUERIES)


def held_bytes(decoder: DecoderConfig, *, parts: Sequence[str] = ()) -> int:
    """Bytes of parameters, buffers and AdamW's state: of the detector, or of some parts of it.

    Counted from shapes; nothing is allocated.
    """
    with torch.device("meta"):
        detector = Detector(configuration(decoder))
    optimizer = make_optimizer(detector, OptimizationConfig())
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    held = 0
    for part in [detector.get_submodule(name) for name in parts] or [detector]:
        held += sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers()))
        # Two moments each, and a counter of steps in float32.
        held += sum(2 * p.nbytes + 4 for p in part.parameters() if p in trained)
    return held


class Step:
    """One training step of a detector on made-up images."""

    def __init__(self, decoder: DecoderConfig, device: str) -> None:
        torch.manual_seed(0)
        self.detector = Detector(configuration(decoder)).to(device).train()
        self.optimizer = make_optimizer(self.detector, OptimizationConfig())
        height, width = IMAGE
        self.images = torch.randint(0, 256, (BATCH, 3, *IMAGE), dtype=torch.uint8, device=device)
        self.sizes = torch.tensor([IMAGE] * BATCH, device=device)
        low = torch.rand(BATCH, OBJECTS, 2) * 0.7
        corners = torch.cat([low, low + 0.05 + 0.25 * torch.rand(BATCH, OBJECTS, 2)], dim=-1)
        boxes = (corners * torch.tensor([width, height, width, height])).to(device)
        labels = torch.randint(0, 80, (BATCH, OBJECTS), device=device)
        self.targets = [Target(boxes[i], labels[i], i, IMAGE) for i in range(BATCH)]
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, watch: Stopwatch | None = None) -> None:
        """Forward, backward and update."""
        part: Callable[[str], AbstractContextManager[Any]]
        part = nullcontext if watch is None else watch.part
        criterion = Criterion(
            self.targets, self.sizes, normaliser=matched_queries(self.targets, QUERIES)
        )
        with part("layers"):
            supervised = self.detector.losses(self.images, self.sizes, criterion, self.generator)
        with part("backward"):
            supervised.total.backward()
        with part("optimiser"):
            clip_gradients(self.optimizer, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def without_decoder(self) -> None:
        """The same of the backbone and the neck alone."""
        features, _ = self.detector.encode(self.images, self.sizes)
        torch.stack([feature.square().mean() for feature in features]).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def split(self) -> Stopwatch:
        """One step, by part."""
        watch = Stopwatch()
        with ExitStack() as patches:

            def time_as(name: str, owner: Any, attribute: str) -> None:
                timed = watch.timed(name, getattr(owner, attribute))
                patches.enter_context(patch.object(owner, attribute, timed))

            time_as("backbone", self.detector, "encode")
            time_as("matching", Matcher, "together")
            # A position: its applications with gradient, its loss, its backward pass.
            walk = implicit.supervision.iterate
            visiting = self._visiting(watch, walk)
            patches.enter_context(patch.object(implicit.supervision, "iterate", visiting))
            self(watch)
        return watch

    @staticmethod
    def _visiting(watch: Stopwatch, walk: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, visit: Callable[..., None], **kwargs: Any) -> Any:
            with watch.part("path"):
                return walk(*args, visit=watch.timed("supervised", visit), **kwargs)

        return inner


@dataclass(frozen=True)
class Measured:
    """A detector's step.

    Attributes:
        detector: its name.
        seconds: by part, medians.
        peak: most bytes that the step allocates beyond those held before it.
        waits: of the host for the device, to match.
        held: bytes that the model and its optimiser hold (`held_bytes`).
        lowest, highest: seconds of the shortest and the longest step.
        whole: seconds of the step without a stopwatch, where that makes a difference.
    """

    detector: str
    seconds: dict[str, float]
    peak: int
    waits: int
    held: int
    lowest: float
    highest: float
    whole: float | None = None

    @property
    def total(self) -> float:
        """Seconds of the step, without its data."""
        return sum(self.seconds.values()) if self.whole is None else self.whole

    @property
    def memory(self) -> int:
        """Bytes at the peak of the step, with all that is held."""
        return self.held + self.peak


def measure(steps: dict[str, Step], repeats: int) -> list[Measured]:
    """Time and memory of all, which take turns; the first turn is not counted."""
    every = list(steps.values())
    for step in every:
        step()
    turns = in_turns(every, repeats, Step.split)
    whole: list[list[float]] | None = None
    if device() == "cuda":  # where the stopwatch waits for the device
        whole = by_turns(every, 5 * repeats)
    found = []
    for i, (name, step) in enumerate(steps.items()):
        watches = [turn[i] for turn in turns]
        own = [sum(watch.parts.values()) for watch in watches] if whole is None else whole[i]
        found.append(
            Measured(
                name,
                {part: statistics.median(w.parts[part] for w in watches) for part in PARTS},
                peak_bytes(step),
                watches[0].entered["matching"],
                held_bytes(DETECTORS[name]),
                min(own),
                max(own),
                None if whole is None else statistics.median(own),
            )
        )
    return found


def memory(decoder: DecoderConfig, device: str) -> int:
    """Peak of a step, beyond what is held."""
    step = Step(decoder, device)
    step()  # the optimiser makes its state
    return peak_bytes(step)


def seconds_of_data(repeats: int = 4) -> float:
    """Median time of a batch ``(2, 3, 800, 800)`` of digits of 128 pixels, read by this process."""
    with TemporaryDirectory() as folder:
        root = compose_digits(Path(folder), train_images=32, val_images=1, size=128)
        augmentation = AugmentationConfig(short_sides=(IMAGE[0],), max_size=IMAGE[1])
        dataset = load_coco_split(root, "train", train_transform(augmentation))
        batches = iter(make_loader(dataset, BATCH, training=True, workers=0, seed=0))
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            next(batches)
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def goals(results: dict[str, Any]) -> list[Goal]:
    """DEQDet against AdaMixer."""
    steps = {row["detector"]: Measured(**row) for row in results["steps"]}
    ours, stacked = steps["DEQDet"], steps["AdaMixer"]
    least = results["without_decoder"]
    positions = EQUILIBRIUM.positions
    more = len(positions) * APPLICATIONS
    first = 1 + EQUILIBRIUM.extra_supervision
    without = least + held_bytes(EQUILIBRIUM, parts=("backbone", "neck"))
    return [
        Goal(
            "time of a step over AdaMixer's",
            ours.total / stacked.total,
            most=GOAL_TIME,
            reason=(
                f"DEQDet differentiates {more + first} refinements of a step ({first} at its "
                f"beginning and {APPLICATIONS} at each of {len(positions)} positions) where "
                f"AdaMixer has six, and walks {positions[-1]} without gradient. On two cores the "
                "backbone, which both have, is too small a part of the step to hide that; each "
                "gradient of the maps is a pass over them. The paper's hours are 1.8 of "
                "AdaMixer's. On a GPU the neck's GroupNorm gives back contiguous maps in training, "
                "and they are laid out anew."
            ),
        ),
        Goal(
            "memory of a step over AdaMixer's, weights and AdamW's state included",
            ours.memory / stacked.memory,
            most=GOAL_MEMORY,
            floor=(least + ours.held) / stacked.memory,
            reason=(
                "Weights and moments of two layers in place of six are what is saved. The "
                "activations of the backbone, which both have, are most of the rest, and a layer "
                "of ours keeps so little that AdaMixer's six leave little to save: what a step "
                f"allocates beyond what is held is {ours.peak / stacked.peak:.2f} of AdaMixer's. "
                "The floor is a step of the backbone and the neck alone, with all that DEQDet "
                "holds. With no weight of any decoder it would be "
                f"{without / stacked.memory:.2f}. The goal is of a GPU; where none is named above, "
                "this is the CPU's memory."
            ),
        ),
        Goal(
            "waits for the device to match, of nine supervised outputs",
            ours.waits,
            most=GOAL_WAITS,
            reason=(
                "An output on the path is differentiated before the next one is there. To know all "
                f"{len(positions)} before takes {more} refinements without gradient more, "
                f"{1e3 * more * ours.seconds['path'] / positions[-1]:.0f} ms of this step at the "
                f"pace of its path, where all its matching takes "
                f"{1e3 * ours.seconds['matching']:.0f} ms."
            ),
        ),
    ]


def tables(results: dict[str, Any]) -> tuple[str | Table, ...]:
    """What is shown of the results that were written."""
    found = [Measured(**row) for row in results["steps"]]
    first, ours = found[0], found[-1]
    times = Table("seconds", *PARTS, "step", "lowest to highest", "over AdaMixer", "waits")
    memories = Table("GiB", "held", "beyond", "over AdaMixer", "in all", "over AdaMixer")
    for row in found:
        times.add_row(
            row.detector,
            *(three_digits(row.seconds[part]) for part in PARTS),
            three_digits(row.total),
            f"{three_digits(row.lowest)} to {three_digits(row.highest)}",
            f"{row.total / first.total:.2f}",
            str(row.waits),
        )
        memories.add_row(
            row.detector,
            three_digits(row.held / 2**30),
            three_digits(row.peak / 2**30),
            f"{row.peak / first.peak:.2f}",
            three_digits(row.memory / 2**30),
            f"{row.memory / first.memory:.2f}",
        )
    growth = Table("RNNDet, T", "beyond, GiB", "in all, GiB", "over DEQDet")
    recurrent = next(row for row in found if row.detector == "RNNDet")
    for t, peak in results["rnndet_memory"].items():
        memory = recurrent.held + peak  # its layers are one, whatever T
        growth.add_row(
            str(t),
            three_digits(peak / 2**30),
            three_digits(memory / 2**30),
            f"{memory / ours.memory:.2f}",
        )
    least = three_digits(results["without_decoder"] / 2**30)
    return (
        f"A training step, ResNet-50, batch {BATCH}, 800×1344.",
        times,
        f"data: {three_digits(results['data'])} s.",
        memories,
        f"Backbone and neck alone: {least} GiB beyond what is held.",
        growth,
    )


def main() -> None:
    """Print the tables; write the results."""
    folder, console = output_folder(__doc__), wide_console()
    steps = {name: Step(decoder, device()) for name, decoder in DETECTORS.items()}
    found = measure(steps, REPEATS)
    data = seconds_of_data()
    least = peak_bytes(steps["AdaMixer"].without_decoder)
    del steps
    growth = {
        t: found[1].peak if t == RecurrentConfig().steps else memory(RecurrentConfig(t), device())
        for t in RECURRENT_STEPS
    }
    results = {
        "steps": [asdict(row) for row in found],
        "data": data,
        "without_decoder": least,
        "rnndet_memory": growth,
    }
    console.print(f"{machine()}.", *tables(results), sep="\n")
    write_results(folder, "training_step", results, console, place=device())
    console.print(goals_table(goals(results)))


if __name__ == "__main__":
    main()
