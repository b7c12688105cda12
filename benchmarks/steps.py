"""Fewer steps for the same answer: AP against refinements and against milliseconds.

    python -m benchmarks.steps --run RUN --data DATA

``RUN`` is the folder of a run of the main job (by default the newest in ``runs/``) and ``DATA`` the
data set that it composed (by default the newest in ``data/``).  The trained detector is evaluated
on the validation images with fixed numbers of steps, naive and by Anderson, with tolerances of the
relative residual, and with ``steps="auto"``, which refines each image until its detections have
settled (`detection.decoder.movement.Settled`), and beside it, what that would give without its
``least_steps``.  Steps are those that moved the state; to know that it has settled, one refinement
more is computed than there are steps, and so with tolerances.

How the rule came about: its limits were chosen on the scenes (`docs/claims.md`), and alone they
missed the goal on these images (*at once*, 0.0040 of AP).  The six refinements at least were added
then, chosen on the scenes and on 3500 more images of digits, of which ``--data`` gives the same
figures (``compose_digits(val_images=500, seed=1000)``, and 1000 images each of seeds 1001, 1002
and 1003).  They show the same exemplars as these, on the same photographs, and another rule was
tried on these before this one.  So the figures of *auto* here are those of a rule that is known to
do well on such images, and no independent test of it.

Then the same on films: validation images through which a window moves by a pixel a frame, or
stands *still*.  A cold start refines every frame from the first layer's output, a warm start from
the detections of the frame before, and may then be done at once.  *Flicker* is how far a
detection's box jumps, in pixels and beyond the window's own movement, between two frames, for those
that are seen in both (score ≥ 0.3).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

import implicit
from benchmarks.goals import Goal, goals_table
from benchmarks.measure import argument_parser, device, machine, stem, wide_console, write_results
from detection.data import eval_transform, load_coco_split
from detection.data.coco import CocoDataset
from detection.models.config import EquilibriumConfig
from detection.models.decoders import EquilibriumDecoder, Output
from detection.models.detector import Detector
from detection.prediction import evaluate
from detection.pretrained import load_detector

STEPS = (1, 2, 3, 5, 8, 12, 18, 25)
TOLERANCES = (3e-2, 1e-2, 3e-3)
GOAL_STEPS, GOAL_AP = 0.5, 0.002
"""``"auto"``: share of 25 steps, and AP that may be lost."""
FILMS, FRAMES, WINDOW = 20, 12, 96
SEEN = 0.3


@dataclass(frozen=True)
class Point:
    """One way to end refinement."""

    kind: str
    setting: str
    AP: float
    steps: float
    milliseconds: float


@dataclass(frozen=True)
class Film:
    """One way to start it."""

    start: str
    steps: float
    flicker: float


STARTS = {
    "cold": ("cold", 1),
    "warm": ("warm", 1),
    "cold, still": ("cold", 0),
    "warm, still": ("warm", 0),
}
"""Of films: how a frame starts, and by how many pixels the window moves."""


@contextmanager
def counting(decoder: EquilibriumDecoder) -> Iterator[list[float]]:
    """The steps of every image that is refined inside."""
    steps: list[float] = []

    def note(module: Any, args: Any, output: Output) -> None:
        assert output.steps is not None
        steps.extend(output.steps.float().tolist())

    handle = decoder.register_forward_hook(note)
    try:
        yield steps
    finally:
        handle.remove()


def settings(base: EquilibriumConfig) -> dict[tuple[str, str], EquilibriumConfig]:
    """What is compared, by kind and setting."""
    anderson = implicit.Anderson(memory=5)
    found: dict[tuple[str, str], EquilibriumConfig] = {}
    for n in STEPS:
        found["naive", f"{n} steps"] = replace(base, steps=n)
    for n in STEPS[2:]:
        found["Anderson", f"{n} steps"] = replace(base, steps=n, eval_solver=anderson)
    for rtol in TOLERANCES:
        config = replace(base, steps=25, tolerance=rtol)
        found["naive, tolerance", f"{rtol:g}"] = config
        found["Anderson, tolerance", f"{rtol:g}"] = replace(config, eval_solver=anderson)
    auto = replace(base, steps="auto")
    at_once = replace(auto, settled=replace(base.settled, least_steps=0))
    found["auto", "settled"], found["auto", "at once"] = auto, at_once
    return found


def curve(model: Detector, dataset: CocoDataset) -> list[Point]:
    """Every setting on the whole data set."""
    decoder = model.decoder
    assert isinstance(decoder, EquilibriumDecoder)
    base, found = decoder.config, []
    decoder.config = replace(base, steps=STEPS[0])
    evaluate(model, dataset)  # the first pass is slower, whatever its setting
    for (kind, setting), config in settings(base).items():
        decoder.config = config
        with counting(decoder) as steps:
            start = time.perf_counter()
            scores = evaluate(model, dataset)
            taken = time.perf_counter() - start
        mean = statistics.fmean(steps)
        found.append(Point(kind, setting, scores.AP, mean, 1e3 * taken / len(steps)))
    decoder.config = base
    return found


@torch.inference_mode()
def films(model: Detector, dataset: CocoDataset) -> list[Film]:
    """Steps per frame and flicker, cold and warm."""
    decoder = model.decoder
    assert isinstance(decoder, EquilibriumDecoder)
    base = decoder.config
    decoder.config = replace(base, steps="auto")
    model.eval()
    found, sizes = [], torch.tensor([[WINDOW, WINDOW]], device=device())
    for name, (start, speed) in STARTS.items():
        steps: list[float] = []
        jumps: list[float] = []
        for number in range(min(FILMS, len(dataset))):
            image = dataset[number][0]
            last: Output | None = None
            for frame in range(FRAMES):
                at = slice(frame * speed, frame * speed + WINDOW)
                window = image[None, :, at, at].to(device())
                features, queries = model.encode(window, sizes)
                warm = last.queries if start == "warm" and last is not None else None
                output = decoder(features, queries, start=warm)
                if last is not None:
                    assert output.steps is not None
                    steps.append(float(output.steps))
                    jumps += jumps_between(last, output, speed)
                last = output
        found.append(Film(name, statistics.fmean(steps), statistics.fmean(jumps)))
    decoder.config = base
    return found


def jumps_between(last: Output, output: Output, speed: int = 1) -> list[float]:
    """How far each seen box jumps to its nearest successor, beyond the window's movement."""
    before, after = (x.boxes[0][_seen(x)] for x in (last, output))
    if not len(before) or not len(after):
        return []
    distance = (before[:, None] - speed - after[None]).abs().amax(-1).amin(1)
    return [float(d) for d in distance if d < WINDOW / 8]  # others have left the window


def _seen(output: Output) -> Tensor:
    return output.logits[0].sigmoid().amax(-1) >= SEEN


def goals(results: dict[str, Any]) -> list[Goal]:
    """Of ``"auto"`` against all 25 steps, and of a warm start against a cold one."""
    points = [Point(**found) for found in results["points"]]
    auto = next(p for p in points if p.setting == "settled")
    fixed = sorted((p for p in points if p.kind == "naive"), key=lambda p: p.steps)
    full = fixed[-1]
    enough = next(p.steps for p in fixed if p.AP >= full.AP - GOAL_AP)
    cold, warm, *_ = (Film(**found) for found in results["films"])
    return [
        Goal(
            'steps of "auto" over 25, mean',
            auto.steps / full.steps,
            most=GOAL_STEPS,
            reason=(
                "An image waits for the slowest of its boxes, in proportion to their scores, and "
                "some move on long after their AP has settled. The fewest steps that lose no more "
                "AP than the goal allows, the same for all images and chosen after the fact, are "
                f"{enough / full.steps:.2f} of them."
            ),
        ),
        Goal(
            'AP that "auto" loses against 25 steps',
            full.AP - auto.AP,
            most=GOAL_AP,
            reason=(
                "Scores of some images go on rising by less than `settled.score` a step when they "
                "are taken for settled. A smaller `settled.score`, or more `settled.least_steps`, "
                "buys the AP back, with steps."
            ),
        ),
        Goal("steps per frame, warm over cold", warm.steps / cold.steps, most=1),
        Goal(
            "flicker, warm over cold",
            warm.flicker / cold.flicker,
            most=1,
            reason=(
                "Refinement ends when no box moves by more than `settled.pixels` over its score, "
                "and we take it that a warm start ends at the near side of that, where the last "
                "frame was: it is the price of the steps that it saves. A smaller "
                "`settled.pixels` buys it back, with steps."
            ),
        ),
    ]


def draw(points: Sequence[Point], path: Path) -> None:
    """AP over steps and over time."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, of, label in zip(
        figure.subplots(1, 2, sharey=True),
        (lambda p: p.steps, lambda p: p.milliseconds),
        ("refinements per image", "milliseconds per image, all included"),
        strict=True,
    ):
        for kind in dict.fromkeys(point.kind for point in points):
            own = sorted((of(p), 100 * p.AP) for p in points if p.kind == kind)
            marker = "*" if kind == "auto" else "."
            axes.plot(*zip(*own, strict=True), marker=marker, markersize=9, label=kind)
        axes.set(xlabel=label, ylabel="AP, %", ylim=(80, None))
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=150)


def newest(folder: str, pattern: str) -> Path:
    """The folder below ``folder`` that was changed last."""
    found = sorted(Path(folder).glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit(f"{folder}/{pattern}: nothing there. Run examples/deqdet_coco.py first.")
    return found[-1]


def main() -> None:
    """Print the tables; write the results and the plot."""
    parser = argument_parser(__doc__)
    parser.add_argument("--run", type=Path, help="folder of a trained run (newest in runs/)")
    parser.add_argument("--data", type=Path, help="its data set (newest in data/)")
    options = parser.parse_args()
    run = options.run or newest("runs", "deqdet_digits*")
    data = options.data or newest("data", "digits*")
    options.output.mkdir(parents=True, exist_ok=True)

    model, recipe, _ = load_detector(run / "checkpoints" / "best.safetensors")
    model = model.to(device())
    dataset = load_coco_split(data, "val", eval_transform(recipe.augmentation))
    console = wide_console()
    points = curve(model, dataset)
    table = Table("", "setting", "AP", "steps", "ms/image")
    for point in points:
        table.add_row(
            point.kind,
            point.setting,
            f"{100 * point.AP:.2f}",
            f"{point.steps:.1f}",
            f"{point.milliseconds:.0f}",
        )
    console.print(f"{len(dataset)} validation images. {machine()}.")
    console.print(table)
    on_films = films(model, dataset)
    table = Table("film", "steps per frame", "flicker, px")
    for film in on_films:
        table.add_row(film.start, f"{film.steps:.1f}", f"{film.flicker:.3f}")
    console.print(table)
    draw(points, options.output / f"{stem('steps', device())}.png")
    results = {"points": [asdict(p) for p in points], "films": [asdict(f) for f in on_films]}
    write_results(options.output, "steps", results, console, place=device())
    console.print(goals_table(goals(results)))


if __name__ == "__main__":
    main()
