"""The report on a folder of labelled images, before a run depends on it.

Every record is checked and every image decoded to its last pixel; nothing stops at the first
fault.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.progress import track
from rich.table import Table
from rich.text import Text

from detection.data.annotations import Annotations, check_annotations
from detection.data.coco import missing_files
from detection.data.errors import DataError
from detection.data.folders import absence, recognise
from detection.data.images import ImageFacts, examine_image, read_image
from detection.data.problems import Problem, Problems
from detection.data.splits import WHOLE, Reading, image_files

SMALL, MEDIUM = 32.0**2, 96.0**2
"""Areas in square pixels that part small, medium and large boxes in COCO's metrics."""

_CELL = 320
"""Pixels of the longer side of a picture on the contact sheet."""


@dataclass(frozen=True)
class SplitReport:
    """What one split holds.

    Args:
        name: ``"train"``, ``"val"``, ``"test"``, or ``"all"`` of a folder that is not divided.
        images: number of images.
        with_objects: images with at least one box to train on.
        classes: number of boxes of each class, by name.
        crowds: crowd regions (COCO) and difficult objects (Pascal VOC): neither trained on nor
            scored.
        small: boxes below 32² pixels.
        medium: boxes from 32² to 96² pixels.
        large: the others.
        most_objects: on one image.
        smallest: ``(height, width)`` of the image with the fewest pixels.
        largest: ``(height, width)`` of the image with the most pixels.
        pictures: file, size, boxes and labels of some images, for the contact sheet.
    """

    name: str
    images: int
    with_objects: int
    classes: dict[str, int]
    crowds: int
    small: int
    medium: int
    large: int
    most_objects: int
    smallest: tuple[int, int]
    largest: tuple[int, int]
    pictures: tuple[tuple[Path, tuple[int, int], Any, Any], ...]

    @property
    def boxes(self) -> int:
        """Boxes to train on."""
        return self.small + self.medium + self.large


@dataclass(frozen=True)
class FolderReport:
    """What `check_folder` found.

    Args:
        root: the folder.
        format: ``"COCO"``, ``"YOLO"``, ``"Pascal VOC"``, or empty where it was not recognised.
        splits: what the splits hold, as far as they could be read.
        problems: everything that is wrong, errors first; at most 100,000.
        number_of_errors: how many errors there are.
        left_out: how many problems there are beyond those in ``problems``.
    """

    root: Path
    format: str
    splits: tuple[SplitReport, ...]
    problems: tuple[Problem, ...]
    number_of_errors: int
    left_out: int

    @property
    def errors(self) -> tuple[Problem, ...]:
        """Problems that make training impossible, or its result worthless."""
        return tuple(problem for problem in self.problems if problem.severity == "error")

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """Problems that training survives."""
        return tuple(problem for problem in self.problems if problem.severity == "warning")

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self.number_of_errors

    def table(self, most: int | None = 5) -> RenderableType:
        """The report, to print with rich.

        Args:
            most: problems that are shown of each kind, ``None`` for all.
        """
        parts: list[RenderableType] = []
        if self.splits:
            parts += [self._split_table(), self._class_table()]
        parts += [self._problem_table(most)] if self.problems else []
        others = len(self.problems) + self.left_out - self.number_of_errors
        counts = f"{self.number_of_errors} errors, {others} warnings"
        verdict = "can be trained on" if self.ok else "cannot be trained on"
        style = "green" if self.ok else "red"
        parts.append(Text(f"{self.root}: {verdict} ({counts}).", style=style))
        return Group(*parts)

    def contact_sheet(self, path: Path | str) -> None:
        """Draw some images of every split with their boxes on one page.

        Args:
            path: of the picture; its ending names the format.

        Raises:
            DataError: no split could be read.
        """
        from detection.visualization import contact_sheet, save_image

        names = sorted({name for split in self.splits for name in split.classes})
        pictures = [
            _picture(
                file, size, boxes, [names.index(label) for label in labels], labels, split.name
            )
            for split in self.splits
            for file, size, boxes, labels in split.pictures
        ]
        if not pictures:
            raise DataError(f"{self.root}: there is no image to draw; mend the errors first.")
        title = f"{self.root.name}: {sum(split.images for split in self.splits)} images"
        save_image(contact_sheet(pictures, columns=4, title=title), path)

    def _split_table(self) -> Table:
        title = f"{self.root} ({self.format})"
        table = Table(title=Text(title), box=SIMPLE_HEAD, title_justify="left")
        table.add_column("")
        for split in self.splits:
            table.add_column(split.name, justify="right")

        def row(name: str, values: Iterable[object]) -> None:
            table.add_row(name, *map(str, values))

        row("images", (f"{split.images:,}" for split in self.splits))
        row("  with objects", (f"{split.with_objects:,}" for split in self.splits))
        row("  without", (f"{split.images - split.with_objects:,}" for split in self.splits))
        row("boxes", (f"{split.boxes:,}" for split in self.splits))
        row("  small (below 32²)", (f"{split.small:,}" for split in self.splits))
        row("  medium", (f"{split.medium:,}" for split in self.splits))
        row("  large (from 96²)", (f"{split.large:,}" for split in self.splits))
        row("crowds, difficult", (f"{split.crowds:,}" for split in self.splits))
        row("most objects on an image", (split.most_objects for split in self.splits))
        row("smallest image", (_by(split.smallest) for split in self.splits))
        row("largest image", (_by(split.largest) for split in self.splits))
        return table

    def _class_table(self) -> Table:
        table = Table(title="boxes of each class", box=SIMPLE_HEAD, title_justify="left")
        table.add_column("class")
        for split in self.splits:
            table.add_column(split.name, justify="right")
        for name in dict.fromkeys(name for split in self.splits for name in split.classes):
            counts = (f"{split.classes.get(name, 0):,}" for split in self.splits)
            table.add_row(Text(name), *counts)
        return table

    def _problem_table(self, most: int | None) -> Table:
        table = Table(title="problems", box=SIMPLE_HEAD, title_justify="left")
        for heading in ("", "kind", "number"):
            table.add_column(heading)
        table.add_column("where, what, and the remedy", overflow="fold")
        kinds = sorted(self.problems, key=lambda problem: (problem.severity, problem.rule))
        for (severity, rule), group in groupby(kinds, key=lambda p: (p.severity, p.rule)):
            members = list(group)
            lines = [str(problem) for problem in members[:most]]
            if len(members) > len(lines):
                lines.append(f"... and {len(members) - len(lines)} more")
            style = "red" if severity == "error" else "yellow"
            table.add_row(Text(severity, style), rule, str(len(members)), Text("\n".join(lines)))
        return table


def check_folder(
    root: Path, *, num_queries: int | None = None, console: Console | None = None
) -> FolderReport:
    """Check a folder of COCO, YOLO or Pascal VOC from end to end, and report all that is wrong.

    Annotations are held against each other, against the files on the disk and against the
    pixels; every image is decoded (about 5 ms for one of 640x480).  Training itself looks at
    headers and checksums only (`check_images`), and stops at the first unusable image.

    Args:
        root: the folder, or the ``data.yaml`` of a YOLO data set.
        num_queries: of the model to be trained; images with more objects are then mentioned.
        console: shows the progress.

    Returns:
        The report; it is returned, with what could be read, whatever is wrong.

    Example:
        >>> import tempfile
        >>> from detection.data import compose_digits
        >>> root = compose_digits(
        ...     Path(tempfile.mkdtemp()) / "digits", train_images=2, val_images=1)
        >>> report = check_folder(root)
        >>> report.ok, [(split.name, split.images) for split in report.splits]
        (True, [('train', 2), ('val', 1)])
    """
    root = Path(root)
    problems = Problems()
    try:
        layout = recognise(root)
    except DataError as error:
        _state(problems, "not recognised", root, error)
        return FolderReport(root, "", (), tuple(problems.kept), problems.number_of_errors, 0)
    for split in ("train", "val"):
        if split not in layout.splits:
            _state(problems, "missing split", root, DataError(absence(layout, split)))
    contents: list[tuple[str, Reading, Annotations]] = []
    for split, read in layout.splits.items():
        reading = read(problems)
        if reading is None:
            continue
        content = check_annotations(reading.document, reading.source, problems, reading.places)
        if content is not None:
            contents.append((split, reading, content))
    _compare_categories(contents, problems)
    digests: dict[bytes, list[tuple[str, Path]]] = {}
    for split, reading, content in contents:
        if split in ("train", WHOLE):
            _check_classes(content, problems)
        if num_queries is not None:
            _check_queries(content, num_queries, problems)
        for digest, path in _check_files(split, reading, content, problems, console):
            digests.setdefault(digest, []).append((split, path))
    _check_duplicates(digests, problems)
    _check_unnamed(contents, problems)
    problems.kept.sort(key=lambda problem: problem.severity)
    reports = tuple(_describe(*content) for content in contents)
    return FolderReport(
        root=root,
        format=layout.format,
        splits=reports,
        problems=tuple(problems.kept),
        number_of_errors=problems.number_of_errors,
        left_out=problems.left_out,
    )


def _state(problems: Problems, rule: str, file: Path, error: DataError) -> None:
    """Take over an error whose message says everything."""
    fact, _, remedy = str(error).removeprefix(f"{file}: ").rstrip(".").rpartition("; ")
    problems.error(rule, file, "", fact or remedy, remedy if fact else "see above")


def _compare_categories(
    contents: Sequence[tuple[str, Reading, Annotations]], problems: Problems
) -> None:
    for split, _, content in contents[1:]:
        first, _, expected = contents[0]
        if content.categories != expected.categories:
            ours = set(zip(content.categories.ids, content.categories.names, strict=True))
            theirs = set(zip(expected.categories.ids, expected.categories.names, strict=True))
            wrong = ", ".join(f"{number} {name!r}" for number, name in sorted(ours ^ theirs)[:3])
            fact = f"the categories of {split} and {first} differ, for instance in {wrong}"
            remedy = "give both the same categories with the same ids"
            problems.error("categories differ", content.source, "", fact, remedy)


def _check_classes(content: Annotations, problems: Problems) -> None:
    counts = Counter(content.labels.tolist())
    for label, name in enumerate(content.categories.names):
        if not counts[label]:
            fact = f"the class {name!r} has no box to train on"
            remedy = "it cannot be learned; add examples or remove the class"
            problems.warn("class without boxes", content.source, "", fact, remedy)
    if not len(content.labels):
        fact = "no annotation can be trained on; crowds and boxes without area do not count"
        problems.error("nothing to train on", content.source, "", fact, "add boxes")


def _check_queries(content: Annotations, num_queries: int, problems: Problems) -> None:
    counts = (content.starts[1:] - content.starts[:-1]).tolist()
    for number, name, count in zip(content.image_ids, content.names, counts, strict=True):
        if count > num_queries:
            fact = f"it has {count} objects, and the model has {num_queries} queries"
            remedy = f"{count - num_queries} objects can never be found: take more queries"
            problems.warn(
                "more objects than queries",
                content.source,
                f"image {number} ({name})",
                fact,
                remedy,
            )


def _check_files(
    split: str,
    reading: Reading,
    content: Annotations,
    problems: Problems,
    console: Console | None,
) -> list[tuple[bytes, Path]]:
    """Decode the images of a split; digest and path of those that are whole."""
    try:
        missing = set(missing_files(reading.images, content.names))
    except DataError as error:
        _state(problems, "missing folder", reading.images, error)
        return []
    jobs = []
    for name, size, number in zip(content.names, content.sizes, content.image_ids, strict=True):
        if name in missing:
            fact = f"{content.source} lists it, and there is no such file"
            problems.error(
                *("missing image", reading.images / name, f"image {number}", fact),
                "put it there, or remove its record",
            )
        else:
            jobs.append((reading.images / name, size, f"image {number}"))
    found = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        results: Iterable[ImageFacts | DataError] = threads.map(_examine, jobs)
        if console is not None:
            results = track(results, f"decoding {split}", total=len(jobs), console=console)
        for (path, _, name), result in zip(jobs, results, strict=True):
            if isinstance(result, DataError):
                fact, _, remedy = str(result).rstrip(".").rpartition("; ")
                fact = fact.removeprefix(f"{path} ({name}): ")
                problems.error("unusable image", path, name, fact or remedy, remedy)
                continue
            for rule, fact, remedy in result.notes:
                problems.warn(rule, path, name, fact, remedy)
            found.append((result.digest, path))
    return found


def _examine(job: tuple[Path, tuple[int, int], str]) -> ImageFacts | DataError:
    try:
        return examine_image(*job)
    except DataError as error:
        return error


def _check_duplicates(digests: dict[bytes, list[tuple[str, Path]]], problems: Problems) -> None:
    for copies in digests.values():
        files = list(dict.fromkeys(copies))
        if len({split for split, _ in files}) > 1:
            others = ", ".join(f"{path} ({split})" for split, path in files[1:4])
            fact = f"the same image is in {files[0][0]} and again in {others}"
            remedy = "remove it from one of them: the scores would be too good"
            problems.warn("image in two splits", files[0][1], "", fact, remedy)
        elif len({path for _, path in files}) > 1:
            fact = f"the same image is also {', '.join(str(path) for _, path in files[1:4])}"
            problems.warn("image twice", files[0][1], "", fact, "keep one of them")


def _check_unnamed(
    contents: Sequence[tuple[str, Reading, Annotations]], problems: Problems
) -> None:
    """Mention the image files of the splits' folders that no record of any split names."""
    named = {
        os.path.normpath(reading.images / name)
        for _, reading, content in contents
        for name in content.names
    }
    seen: set[str] = set()
    for folder in {reading.images for _, reading, _ in contents}:
        for path in image_files(folder):
            key = os.path.normpath(path)
            if key not in named and key not in seen:
                seen.add(key)
                remedy = "it is not used; add a record, or remove the file"
                problems.warn("image without record", path, "", "no annotation names it", remedy)


def _describe(name: str, reading: Reading, content: Annotations) -> SplitReport:
    extent = content.boxes[:, 2:] - content.boxes[:, :2]
    areas = extent[:, 0].double() * extent[:, 1].double()
    counts = content.starts[1:] - content.starts[:-1]
    labels = Counter(content.labels.tolist())
    names = content.categories.names
    by_area = sorted(content.sizes, key=lambda size: size[0] * size[1])
    # Twelve images spread over the split; those with objects say more.
    busy = [i for i, count in enumerate(counts.tolist()) if count] or list(range(len(counts)))
    chosen = [busy[i * len(busy) // min(12, len(busy))] for i in range(min(12, len(busy)))]
    pictures = []
    for i in chosen:
        owned = slice(int(content.starts[i]), int(content.starts[i + 1]))
        words = [names[label] for label in content.labels[owned].tolist()]
        file = reading.images / content.names[i]
        pictures.append((file, content.sizes[i], content.boxes[owned].clone(), words))
    return SplitReport(
        name=name,
        images=len(content.names),
        with_objects=int((counts > 0).sum()),
        classes={name: labels[label] for label, name in enumerate(names)},
        crowds=content.crowds,
        small=int((areas < SMALL).sum()),
        medium=int(((areas >= SMALL) & (areas < MEDIUM)).sum()),
        large=int((areas >= MEDIUM).sum()),
        most_objects=int(counts.max()),
        smallest=by_area[0],
        largest=by_area[-1],
        pictures=tuple(pictures),
    )


def _picture(
    path: Path, size: tuple[int, int], boxes: Any, labels: list[int], names: list[str], split: str
) -> Image.Image:
    """An image with its boxes, small; grey where it cannot be read."""
    from detection.drawing import INK, Canvas, class_colour

    scale = _CELL / max(size)
    shape = max(1, round(size[1] * scale)), max(1, round(size[0] * scale))
    try:
        pixels = read_image(path, size).permute(1, 2, 0).numpy()
        picture = Image.fromarray(pixels).resize(shape, Image.Resampling.BICUBIC)
    except DataError:
        picture = Image.new("RGB", shape, (128, 128, 128))
        names = [f"{path.name}: unreadable"] * len(names)
    canvas = Canvas(picture, scale)
    for box, label in zip(boxes, labels, strict=True):
        canvas.outline(box, class_colour(label))
    for box, label, name in zip(boxes, labels, names, strict=True):
        canvas.tag(box, name, class_colour(label))
    framed = Image.new("RGB", (picture.width, picture.height), INK)
    framed.paste(picture)
    return framed


def _by(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"
