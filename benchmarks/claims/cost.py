"""What runs will take, from a few timed steps of each: hours, memory, disk; and what there is."""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.claims.jobs import Job, begin, load, on_card
from benchmarks.claims.measuring import first_batches
from benchmarks.claims.processes import beside, started
from benchmarks.claims.running import ending
from benchmarks.measure import seconds
from detection.distributed import Distributed
from detection.files import replacing
from detection.models.config import EquilibriumConfig, RecurrentConfig
from detection.models.detector import Detector
from detection.training.step import Step

STEPS, IMAGES = 3, 4
WALKED = 50
"""Refinements of every validation image in the study of a tied layer."""
LOOKED = 1200
"""Those of an image that is looked at closely, what else is done there counted as such."""
SCORING = 0.004
"""Seconds of scoring, by image and evaluation; there are about so many of these in a study:"""
SCORINGS = 25
KEPT = 4
"""Checkpoints on the disk at once: two, the best, and one that is being written."""
CONTEXT = 2**29
"""Bytes that CUDA takes for a process."""


@dataclass(frozen=True)
class Timing:
    """Of one kind of run.

    Attributes:
        step, image: seconds of a training step, and of the inference of an image.
        weights, checkpoint: bytes on the disk.
        peak: bytes, at most, of the memory where it trains.
        host: bytes, at most, of the machine's memory.
    """

    step: float
    image: float
    weights: int
    checkpoint: int
    peak: int
    host: int


def minutes(job: Job, timing: Timing, done: int = 0) -> float:
    """Of a run, or of what is left of it when some steps are done; its start is left out."""
    settings, data = job.recipe.optimization, job.data
    steps = settings.epochs * -(-data["train_images"] // settings.batch_size)
    evaluations = -(-settings.epochs // job.recipe.evaluate_every)
    left = max(0.0, 1.0 - done / steps)
    decoder = job.recipe.model.decoder
    study = data["val_images"] * timing.image
    if isinstance(decoder, (EquilibriumConfig, RecurrentConfig)):
        recurrent = isinstance(decoder, RecurrentConfig)
        calls = decoder.steps if recurrent else decoder.most_steps
        assert isinstance(calls, int)
        walked = WALKED / 2 if recurrent else WALKED
        study = timing.image / calls * (walked * data["val_images"] + LOOKED * job.sample)
    study += SCORINGS * data["val_images"] * SCORING
    evaluated = evaluations * data["val_images"] * (timing.image + SCORING)
    return (left * (steps * timing.step + evaluated) + study) / 60


def hours_text(minutes: float) -> str:
    """A time as people say it.

    Example:
        >>> hours_text(0.6), hours_text(7.2), hours_text(185)
        ('1 minute', '7 minutes', '3 h 5 min')
    """
    whole = max(1, round(minutes))
    if whole < 100:
        return f"{whole} minute{'s' if whole > 1 else ''}"
    return f"{whole // 60} h {whole % 60} min"


def wall(each: Sequence[float], jobs: int) -> float:
    """Minutes until all are done, each begun as soon as there is room.

    Example:
        >>> wall([3.0, 2.0, 2.0], 2)
        4.0
    """
    busy = [0.0] * jobs
    for one in each:
        busy[busy.index(min(busy))] += one
    return max(busy)


def measure(
    jobs: Sequence[Job], parallel: int, cache: Path
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time a few steps of each run, as many at once as there will be.

    Args:
        jobs: of some seeds; all seeds of a run take the same time.
        parallel: how many at once.
        cache: where timings are kept.

    Returns:
        Timings by run; and of those that failed, why.
    """
    try:
        known = {key: Timing(**found) for key, found in json.loads(cache.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        known = {}
    wanted = {_key(job): job for job in jobs}
    reasons = _time([job for key, job in wanted.items() if key not in known], parallel, known)
    with suppress(OSError):  # on a full disk: it is told of with the checkpoints, and they matter
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps({key: asdict(timing) for key, timing in known.items()}))
    return {job.run: known[key] for key, job in wanted.items() if key in known}, reasons


def _key(job: Job) -> str:
    return f"{job.run}-{job.code}-{job.device}-{job.jobs}x{job.threads}"


def _time(jobs: Sequence[Job], parallel: int, known: dict[str, Timing]) -> dict[str, str]:
    """Add to what is known; reasons by run, where that failed.

    Each run has a process of its own: its memory is not that of another, nor is its end.
    """
    reasons: dict[str, str] = {}
    with TemporaryDirectory() as folder:

        def start(job: Job, place: int) -> BaseProcess:
            return started(time_one, on_card(job, place), Path(folder) / f"{job.run}.json")

        def ended(job: Job, code: int) -> None:
            path = Path(folder) / f"{job.run}.json"
            if path.exists():
                known[_key(job)] = Timing(**json.loads(path.read_text()))
            else:
                reasons[job.run] = ending(code, path.with_suffix(".txt"))

        beside(jobs, parallel, start, ended)
    return reasons


def time_one(job: Job, path: Path) -> None:
    """Time a few steps; the target of a process."""
    begin(job.device, job.threads, path.with_suffix(".txt"))
    try:
        timing = _timed(job)
    except Exception as error:  # whatever it is, it is that run's
        raise SystemExit(f"{type(error).__name__}: {error}") from None
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(asdict(timing)))


def _timed(job: Job) -> Timing:
    device = Distributed(device=torch.device(job.device))
    train_set, val_set = load(job.root, job.recipe)
    recipe = job.recipe.for_classes(len(train_set.categories))
    batches = first_batches(train_set, recipe, recipe.optimization.batch_size)
    torch.manual_seed(recipe.seed)
    step = Step(Detector(recipe.without_pretraining().model).to(device.device), recipe, device, 100)

    def one() -> None:
        step(next(batches).to(device.device))

    one()
    times = [seconds(one) for _ in range(min(STEPS, max(1, len(train_set) // 64)))]
    model = step.detector.eval()
    images = first_batches(val_set, recipe, 1)
    with torch.inference_mode():
        looked = [next(images).to(device.device) for _ in range(min(IMAGES, len(val_set)))]
        inferred = [
            seconds(lambda image=image: model(image.images, image.sizes))
            for image in [looked[0], *looked]
        ]
    weights = _bytes(model.state_dict())
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    is_cuda = device.device.type == "cuda"
    return Timing(
        statistics.median(times),
        statistics.median(inferred[1:]),
        weights,
        weights + _bytes(step.state_dict()),
        torch.cuda.max_memory_allocated() + CONTEXT if is_cuda else host,
        host,
    )


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def disk_needed(jobs: Iterable[Job], timings: Mapping[str, Timing], parallel: int) -> int:
    """Bytes: the weights of every run, and the checkpoints of those that go on at once."""
    every = [timings[job.run] for job in jobs]
    largest = max((timing.checkpoint for timing in every), default=0)
    return sum(timing.weights for timing in every) + parallel * KEPT * largest


def now() -> float:
    """Minutes of a clock that only goes on."""
    return time.monotonic() / 60
