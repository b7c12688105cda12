"""``deqdet predict``: detections in images and videos, drawn and as records."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from detection.commands.base import Command
from detection.commands.console import FAULTY, Stopped, say
from detection.commands.folders import new_folder, require_unused
from detection.commands.options import check_threshold
from detection.data.errors import DataError
from detection.data.video import VideoWriter, frame_rate
from detection.detections import Detections
from detection.distributed import Distributed
from detection.files import replacing
from detection.predictor import Predictor, load
from detection.sources import NamedImage, find_sources

Write = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Predict(Command):
    """Detect objects in images: files, folders, patterns, addresses, videos.

    Writes a picture of each image, and a film of each video, with the detections on it, and all
    of them as records in detections.json, into one folder.  An image that cannot be read is told
    and the others go on; the exit status is 1 then.

    Args:
        sources: files, folders, patterns such as "holiday/*.jpg", addresses, videos.
        checkpoint: a .safetensors file, the folder of a run, or a model on the Hugging Face hub.
        output: new or empty folder to write to; by default a new one below runs/.
        threshold: lowest score that is drawn and counted; the records have all.
        steps: refinements of each image, or auto; by default as in the recipe.
        tolerance: pixels that a box may still move, times its score, when an image is done, after
            the recipe's settled.least_steps at the soonest.
        max_detections: kept per image; by default as in the recipe.
        device: cuda, cuda:1 or cpu; by default CUDA if there is one.
    """

    sources: tyro.conf.Positional[tuple[str, ...]]
    checkpoint: Path
    output: Path | None = None
    threshold: float = 0.3
    steps: int | Literal["auto"] | None = None
    tolerance: float | None = None
    max_detections: int | None = None
    device: str | None = None

    def check(self) -> None:
        check_threshold(self.threshold)
        if self.output is not None:
            require_unused(self.output)

    def run(self, distributed: Distributed, console: Console) -> None:
        if distributed.world_size > 1:
            raise ValueError("predict runs in one process: start it without torchrun.")
        sources = find_sources(self.sources)
        model = load(self.checkpoint, device=distributed.device)
        folder = self.output or new_folder("predictions", distributed)
        failed = 0
        with _json_list(folder / "detections.json") as write:
            # Images stand alone; the frames of a video belong together.
            groups = itertools.groupby(sources, key=lambda image: str(image.video or image.name))
            for number, (_, images) in enumerate(groups):
                first = next(images)
                images = itertools.chain([first], images)
                target = folder / f"{number:03d}_{(first.video or Path(first.stem)).stem}"
                try:
                    if first.video is None:
                        line = self._image(model, first, target, number, write)
                    else:
                        line = self._video(model, first.video, images, target, number, write)
                    console.print(line, markup=False, soft_wrap=True)
                except DataError as error:
                    say(f"error: {error}", "red")
                    failed += 1
        console.print(f"Written to {folder}.", markup=False)
        if failed:
            say(f"error: {failed} of the sources could not be read; see above.", "red")
            raise Stopped(FAULTY)

    def _image(
        self, model: Predictor, image: NamedImage, target: Path, number: int, write: Write
    ) -> str:
        found = model.predict(
            image,
            steps=self.steps,
            tolerance=self.tolerance,
            max_detections=self.max_detections,
        )
        # Not `with_suffix`: a name may have dots in it.
        path = found.save(target.with_name(f"{target.name}.png"), threshold=self.threshold)
        _record(found, image, number, write)
        count = len(found.above(self.threshold))
        refined = "" if found.steps is None else f", {found.steps} refinements"
        return f"{image.name}: {count} objects{refined}, {path.name}"

    def _video(
        self,
        model: Predictor,
        video: Path,
        frames: Iterator[NamedImage],
        target: Path,
        number: int,
        write: Write,
    ) -> str:
        path = target.with_name(f"{target.name}.mp4")
        frames_done = objects = steps = 0
        stream = model.stream(
            frames,
            steps=self.steps,
            tolerance=self.tolerance,
            max_detections=self.max_detections,
        )
        with VideoWriter(path, frame_rate(video)) as film:
            for found in stream:
                assert found.source is not None
                film.write(found.plot(threshold=self.threshold, scale=1.0))
                _record(found, found.source, number, write)
                frames_done += 1
                objects += len(found.above(self.threshold))
                steps += found.steps or 0
        refined = f", {steps / frames_done:.1f} refinements" if steps else ""
        each = f"{objects / frames_done:.1f} objects{refined} a frame"
        return f"{video}: {frames_done} frames, {each}, {path.name}"


def _record(found: Detections, image: NamedImage, number: int, write: Write) -> None:
    """Write COCO's records of an image, with names beside the numbers."""
    where: dict[str, Any] = {"file": str(image.video or image.name)}
    if image.frame is not None:
        where["frame"] = image.frame
    for name, record in zip(found.class_names, found.to_coco(number), strict=True):
        write({**where, "category": name, **record})


@contextmanager
def _json_list(path: Path) -> Iterator[Write]:
    """A JSON list, written record by record; what was found stays where an error ends it."""
    failure: BaseException | None = None
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        before = "[\n"

        def write(record: Mapping[str, Any]) -> None:
            nonlocal before
            file.write(before + json.dumps(record))
            before = ",\n"

        try:
            yield write
        except BaseException as error:
            failure = error
        file.write("[]\n" if before == "[\n" else "\n]\n")
    if failure is not None:
        raise failure
