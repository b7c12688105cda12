"""The page: what the template is given, and what a browser may do with it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image as Pictures

from detection.configuration import to_json
from detection.data.coco import CocoDataset
from detection.evaluation import METRICS, CocoScores, score_text
from detection.pictures import draw_image
from detection.predictor import Predictor
from detection.report.analysis import PICTURES, Analysis, Image
from detection.report.charts import training_chart

LONGEST = 900
"""Pixels of the longer side of a picture on the page."""
MOST_CLASSES = 30
"""Classes of the confusion matrix; of more, those with the most mistakes are shown."""
CONFUSIONS = 10
"""The most frequent mistakes, listed."""


def render(
    *,
    folder: Path,
    model: Predictor,
    dataset: CocoDataset,
    analysis: Analysis,
    log: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
    threshold: float,
) -> str:
    """The HTML page of a run, see `detection.report.write_report`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # What a data set calls its classes and files is text, never markup.
    pages = Environment(
        loader=PackageLoader("detection.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters.update(share=_share, picture=_data_address)
    script = pages.get_template("report.js").render()

    def shown(images: Sequence[Image]) -> list[dict[str, Any]]:
        return [_picture(dataset, image, threshold) for image in images]

    return pages.get_template("report.html").render(
        chart=training_chart(log, analysis.residuals),
        classes=_classes(analysis.scores),
        confusion=_confusion(analysis, dataset.categories.names),
        facts=_facts(model, dataset, analysis, log, about),
        films=analysis.films,
        first=shown(analysis.images[:PICTURES]),
        hardest=shown(analysis.hardest(PICTURES)),
        name=folder.resolve().name,
        recipe=json.dumps(to_json(model.recipe), indent=2),
        scores=_figures(analysis.scores),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=pages.get_template("report.css").render(),
        threshold=threshold,
    )


def _facts(
    model: Predictor,
    dataset: CocoDataset,
    analysis: Analysis,
    log: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
) -> dict[str, str]:
    """What one wants to know first, by name."""
    parameters = sum(parameter.numel() for parameter in model.detector.parameters())
    versions = about.get("versions", {})
    facts = {
        "recipe": model.recipe.name,
        "parameters": f"{parameters / 1e6:.2f} million",
        "training": f"{_steps(log)} steps; the checkpoint is of step {model.step}",
        "validation": f"{len(dataset)} images, "
        f"{sum(len(image.truth[1]) for image in analysis.images)} objects, "
        f"{len(dataset.categories)} classes",
        "refinements": _refinements(analysis),
        "begun": str(about.get("date", "unknown")),
        "machine": f"{about.get('device', 'unknown')}, {about.get('processes', 1)} process(es)",
        "versions": ", ".join(f"{name} {value}" for name, value in versions.items()),
        "command": " ".join(map(str, about.get("command", ["unknown"]))),
    }
    return {name: value for name, value in facts.items() if value}


def _steps(log: Sequence[Mapping[str, Any]]) -> int:
    return max((int(record.get("step", 0)) for record in log), default=0)


def _refinements(analysis: Analysis) -> str:
    """How many an image took; nothing where the decoder has a fixed number of layers."""
    steps = sorted(i.detections.steps for i in analysis.images if i.detections.steps is not None)
    if not steps:
        return ""
    return f"{sum(steps) / len(steps):.1f} an image on average, {steps[0]} to {steps[-1]}"


def _figures(scores: CocoScores) -> list[tuple[str, str]]:
    """COCO's twelve, by name; a dash where there is nothing of that size."""
    return [(name.replace("_", " "), score_text(getattr(scores, name))) for name in METRICS]


def _classes(scores: CocoScores) -> list[tuple[str, float, str]]:
    """Name, AP and how to write it, the best first; classes without objects come last."""
    known = [(name, 0.0 if math.isnan(ap) else ap, ap) for name, ap in scores.per_class.items()]
    known.sort(key=lambda entry: (math.isnan(entry[2]), -entry[1]))
    return [(name, width, score_text(ap)) for name, width, ap in known]


def _confusion(analysis: Analysis, names: Sequence[str]) -> dict[str, Any]:
    """Rows of the matrix with the headings of rows and columns, and the worst mistakes."""
    counts, last = analysis.confusion, len(names)
    mistakes = counts.clone().fill_diagonal_(0)
    chosen = list(range(last))
    if last > MOST_CLASSES:
        worst = (mistakes.sum(0) + mistakes.sum(1))[:last].argsort(descending=True)
        chosen = sorted(worst[:MOST_CLASSES].tolist())
    places = [*chosen, last]
    rows = [
        (
            names[row] if row < last else "nothing there",
            [(int(counts[row, column]), row == column) for column in places],
            max(1, int(counts[row].sum())),
        )
        for row in places
    ]
    order = mistakes.flatten().argsort(descending=True)[:CONFUSIONS].tolist()
    pairs = [divmod(place, last + 1) for place in order]
    worst_pairs = [
        (
            names[row] if row < last else "nothing",
            names[column] if column < last else "missed",
            int(mistakes[row, column]),
        )
        for row, column in pairs
        if mistakes[row, column]
    ]
    return {
        "heads": [names[place] for place in chosen] + ["missed"],
        "rows": rows,
        "worst": worst_pairs,
        "left_out": last - len(chosen),
    }


def _picture(dataset: CocoDataset, image: Image, threshold: float) -> dict[str, Any]:
    drawn = draw_image(dataset, image.place, image.detections, image.truth, threshold)
    return {
        "picture": drawn,
        "name": dataset.names[image.place],
        "image_id": dataset.image_ids[image.place],
        "objects": len(image.truth[1]),
        "mistakes": image.pairs.mistakes,
    }


def _data_address(picture: Pictures.Image) -> str:
    """A picture as an address that holds it, no larger than the page needs."""
    small = picture.copy()
    small.thumbnail((LONGEST, LONGEST))
    file = io.BytesIO()
    small.convert("RGB").save(file, "JPEG", quality=86)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _share(count: int, whole: int) -> str:
    """Between 0 and 1; small shares can be seen too."""
    return f"{(count / whole) ** 0.5:.3f}"
