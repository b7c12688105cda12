"""The 25 faults, as a user meets them: ``python -m pytest -m fault`` runs the tests of all.

Each test that carries the marker ``fault(number)`` names in its docstring the fault and what is
expected; docs/faults.md lists them.  Those that another file tests with its own means stay there.
"""

from __future__ import annotations

import http.server
import json
import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_runs import small_recipe
from labelled_folders import BOX, CLASSES, coco_folder, instances, picture
from PIL import Image
from small_predictor import small_predictor

from benchmarks import loader_memory
from detection.cli import main
from detection.data import (
    Categories,
    CocoDataset,
    DataError,
    DataWarning,
    check_folder,
    compose_digits,
    eval_transform,
    load_folder,
    load_split,
    train_transform,
)
from detection.detections import Detections
from detection.evaluation import CocoScores, evaluate_coco
from detection.models.config import EquilibriumConfig
from detection.predictor import Predictor
from detection.training.loop import train
from detection.training.progress import read_json_lines

SPARSE = Categories(CLASSES, (1, 2**40))


def saved(predictor: Predictor, folder: Path) -> Path:
    return predictor.save_checkpoint(folder / "model.safetensors")


def score_of_truth(dataset: CocoDataset) -> CocoScores:
    """What a detector that finds every object exactly is given."""
    results = [
        record
        for _, target in dataset
        for record in Detections(
            target.boxes, torch.ones(len(target.labels)), target.labels
        ).to_coco(target.image_id, dataset.categories)
    ]
    return evaluate_coco(dataset.coco, results, dataset.categories, dataset.image_ids)


def with_ids(ids: tuple[int, ...]) -> dict[str, Any]:
    document = instances()
    for record in document["categories"]:
        record["id"] = ids[record["id"] - 1]
    for record in document["annotations"]:
        record["category_id"] = ids[record["category_id"] - 1]
    return document


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """What was written to both streams, on one line, without a stack trace."""
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    return " ".join((said.out + said.err).split())


@pytest.mark.fault(1)
@pytest.mark.parametrize("ids", [(1, 2), (0, 90), (-3, 7), (5, 2**40), (2**62, 1)])
def test_category_ids_of_any_kind(tmp_path: Path, ids: tuple[int, int]) -> None:
    """Fault 1: sparse, 1-based, negative or huge category ids.

    Expected: labels are contiguous, results carry the original ids, a perfect detector scores 1.
    """
    root = coco_folder(tmp_path / "own", with_ids(ids), with_ids(ids))
    _, val = load_folder(root)
    assert {label for _, target in val for label in target.labels.tolist()} == {0, 1}
    assert set(val.categories.ids) == set(ids)
    assert score_of_truth(val).AP == pytest.approx(1)


@pytest.mark.fault(2)
def test_an_undeclared_category_stops_training_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault 2: an annotation has a category that the file does not declare.

    Expected: told with annotation, image and id; status 2; no folder of a run is made.
    """
    document = instances()
    document["annotations"][1]["category_id"] = 9
    root, output = coco_folder(tmp_path / "own", document), tmp_path / "run"
    assert main(["train", "--data", str(root), "--output", str(output)]) == 2
    said = told(capsys)
    assert "annotation 2 (image 2): there is no category with id 9" in said
    assert not output.exists()


@pytest.mark.fault(3)
def test_a_detector_of_other_classes_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault 3: the head of a checkpoint and the data set disagree on the classes.

    Expected: refused before any image is read, naming the first difference.
    """
    root = coco_folder(tmp_path / "own")
    for names in (("cup", "bus"), ("cup", "car", "bus"), ("car", "cup")):
        other = Categories(names, tuple(range(1, len(names) + 1)))
        model = saved(small_predictor(categories=other), tmp_path / "-".join(names))
        assert main(["evaluate", str(model), "--data", str(root)]) == 2
        assert "must have the same categories with the same ids" in told(capsys)


@pytest.mark.fault(4)
def test_predictions_carry_the_ids_of_the_data(tmp_path: Path) -> None:
    """Fault 4: category ids at prediction are contiguous labels in place of the data's ids.

    Expected: the ids of the training data, in Python and in the written records.
    """
    model = saved(small_predictor(categories=SPARSE), tmp_path)
    image, found = picture(tmp_path / "image.png", 1), tmp_path / "found"
    command = ["predict", str(image), "--checkpoint", str(model), "--output", str(found)]
    assert main([*command, "--threshold", "0"]) == 0
    records = json.loads((found / "detections.json").read_text())
    assert {record["category_id"] for record in records} == set(SPARSE.ids)


@pytest.mark.fault(5)
def test_images_without_annotations_count(tmp_path: Path) -> None:
    """Fault 5: an image without annotations.

    Expected: it is evaluated, so that what is found in it lowers the AP; training takes it or
    leaves it out as the recipe says.
    """
    document = instances()
    document["annotations"] = document["annotations"][1:]
    root = coco_folder(tmp_path / "own", document, document)
    report = check_folder(root)
    assert report.ok and report.splits[0].images == 3
    _, val = load_folder(root)
    assert len(val) == 3 and len(val[0][1].labels) == 0
    records = [
        {"image_id": i, "category_id": c, "bbox": list(BOX), "score": 1.0 - i / 10}
        for i, c in ((1, 1), (2, 1), (3, 2))
    ]
    with_it = evaluate_coco(val.coco, records, val.categories, val.image_ids)
    without = evaluate_coco(val.coco, records[1:], val.categories, val.image_ids)
    assert without.AP == pytest.approx(1) and with_it.AP == pytest.approx(0.75)
    assert len(load_folder(root, skip_empty=True)[0]) == 2


@pytest.mark.fault(7)
def test_nothing_is_found_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault 7: zero predictions at evaluation.

    Expected: every figure is 0, or unknown where there are no objects; nothing fails.
    """
    _, val = load_folder(coco_folder(tmp_path / "own"))
    scores = evaluate_coco(val.coco, [], val.categories, val.image_ids)
    assert (scores.AP, scores.AR100, set(scores.per_class.values())) == (0, 0, {0.0})
    assert math.isnan(scores.AP_large)
    assert capsys.readouterr().out == ""


NAN = float("nan")


@pytest.mark.fault(8)
@pytest.mark.parametrize(
    ("box", "fatal"),
    [
        ([5, 5, 0, 10], False),
        ([5, 5, 10, 0], False),
        ([200, 5, 10, 10], False),
        ([-30, 5, 10, 10], False),
        ([5, 5, -10, 10], True),
        ([5, NAN, 10, 10], True),
        ([5, 5, float("inf"), 10], True),
        ([5, 5, 10], True),
        ([5, 5, 10, "10"], True),
        (None, True),
    ],
)
def test_boxes_that_are_none(tmp_path: Path, box: Any, fatal: bool) -> None:
    """Fault 8: degenerate, NaN, outside or negative boxes.

    Expected: what has no area in its image is left out and counted, with annotation and image;
    what is no box is refused with both; never anything in silence.
    """
    document = instances()
    document["annotations"][0]["bbox"] = box
    root = coco_folder(tmp_path / "own", document)
    problems = [p for p in check_folder(root).problems if "annotation 1 (image 1)" in str(p)]
    assert problems and any(p.severity == ("error" if fatal else "warning") for p in problems)
    if fatal:
        with pytest.raises(DataError, match="annotation 1"):
            load_split(root, "train")
        return
    with pytest.warns(DataWarning, match=r"1 of 3 annotations are not trained on.*annotation 1"):
        dataset = load_split(root, "train")
    assert [len(target.labels) for _, target in dataset] == [0, 1, 1]


@pytest.mark.fault(10)
def test_optional_fields_are_missing(tmp_path: Path) -> None:
    """Fault 10: no area, no iscrowd, a segmentation that is null.

    Expected: the area is that of the box, nothing is a crowd, a segmentation is not needed; the
    report says so, and a perfect detector scores 1.
    """
    document = instances()
    for record in document["annotations"]:
        del record["area"], record["iscrowd"]
        record["segmentation"] = None
    root = coco_folder(tmp_path / "own", document, document)
    report = check_folder(root)
    assert report.ok and {"no area", "no iscrowd"} <= {p.rule for p in report.problems}
    assert score_of_truth(load_folder(root)[1]).AP == pytest.approx(1)


@pytest.mark.fault(11)
def test_annotations_and_files_disagree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault 11: files that no record names, records without a file, sizes that are not the file's.

    Expected: check-data tells all three with the file, and ends with status 1.
    """
    root = coco_folder(tmp_path / "own")
    (root / "train" / "1.png").unlink()
    picture(root / "train" / "2.png", 2, (40, 60))
    picture(root / "train" / "extra.png", 9)
    assert main(["check-data", str(root)]) == 1
    said = told(capsys)
    for words in ("1.png", "the file is 40x60 pixels", "extra.png"):
        assert words in said
    with pytest.raises(DataError, match=r"1 of the 3 images .* are missing: 1\.png"):
        load_split(root, "train")


@pytest.mark.fault(12)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image(
    tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault 12: a file that ends in the middle.

    Expected: named wherever it is read: by check-data, while training (also by a worker), and by
    predict, which goes on with the other images and ends with status 1.
    """
    root = coco_folder(tmp_path / "own", count=8)
    broken = root / "train" / "5.png"
    broken.write_bytes(broken.read_bytes()[:-900])
    assert main(["check-data", str(root)]) == 1
    assert "5.png" in told(capsys)
    settings = replace(small_recipe(1), workers=workers).for_classes(2)
    sets = load_folder(
        root, train_transform(settings.augmentation), eval_transform(settings.augmentation)
    )
    with pytest.raises(DataError, match=r"5\.png"):
        train(settings, *sets, tmp_path / "run")
    model, found = saved(small_predictor(categories=SPARSE), tmp_path), tmp_path / "found"
    whole = root / "train" / "6.png"
    command = ["predict", str(broken), str(whole), "--checkpoint", str(model)]
    assert main([*command, "--output", str(found), "--threshold", "0"]) == 1
    assert "5.png" in told(capsys)
    records = json.loads((found / "detections.json").read_text())
    assert {record["file"] for record in records} == {str(whole)}


MODES = {
    "grey": "L",
    "grey with alpha": "LA",
    "RGBA": "RGBA",
    "palette": "P",
    "one bit": "1",
    "16 bit": "I;16",
    "CMYK": "CMYK",
}


@pytest.mark.fault(14)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_pixels_of_every_kind(tmp_path: Path, mode: str) -> None:
    """Fault 14: grey, RGBA, 16-bit, palette or CMYK images.

    Expected: detections as in the same picture in RGB.
    """
    source = Image.open(picture(tmp_path / "source.png", 3)).convert("L")
    image = source.convert("I").point(lambda v: v * 257) if mode == "I;16" else source
    image = image.convert(mode)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(path)
    model = small_predictor(categories=SPARSE)
    wanted = model.predict((source if mode != "1" else source.convert("1")).convert("RGB"))
    found = model.predict(path)
    torch.testing.assert_close(found.boxes, wanted.boxes, atol=0.2, rtol=0)
    torch.testing.assert_close(found.scores, wanted.scores, atol=0.01, rtol=0)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A server of the files of ``tmp_path`` on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.fault(15)
def test_what_is_given_to_predict(tmp_path: Path, web: str) -> None:
    """Fault 15: a ``Path``, an empty list, an address that leads nowhere, a folder.

    Expected: a path is as good as its text, nothing gives nothing, the others are refused with
    what to do.
    """
    model, path = small_predictor(categories=SPARSE), picture(tmp_path / "image.png", 1)
    wanted = model.predict(str(path))
    for source in (path, f"{web}/image.png"):
        assert torch.equal(model.predict(source).boxes, wanted.boxes)
    assert model.predict([]) == []
    with pytest.raises(DataError, match=r"absent\.png.*404"):
        model.predict(f"{web}/absent.png")
    with pytest.raises(
        DataError, match=r"this is a folder, not an image\. detection\.find_sources"
    ):
        model.predict(tmp_path)


@pytest.mark.fault(16)
def test_sizes_beyond_reason(tmp_path: Path) -> None:
    """Fault 16: a pixel bomb, one pixel, an extreme aspect.

    Expected: the bomb is refused before it is unpacked; the others have finite detections.
    """
    model, path = small_predictor(categories=SPARSE), tmp_path / "image.png"
    for size in ((1, 1), (1, 3000), (3000, 2)):
        Image.new("RGB", size, "teal").save(path)
        found = model.predict(path)
        assert found.boxes.isfinite().all() and found.scores.isfinite().all()
    Image.new("1", (30_000, 30_000)).save(path)
    assert path.stat().st_size < 2e5
    with pytest.raises(DataError, match=r"image\.png.*pixels"):
        model.predict(path)


@pytest.mark.fault(17)
def test_more_objects_than_queries_train(tmp_path: Path, capsys: Any) -> None:
    """Fault 17: more objects in an image than the detector has queries.

    Expected: a warning names the image before training, and every step has a finite loss.
    """
    document = instances(8)
    document["annotations"] += [
        {**record, "id": 100 * n + record["id"], "bbox": [n, n, 20, 15]}
        for record in document["annotations"]
        for n in range(1, 9)
    ]
    root, output = coco_folder(tmp_path / "own", document, count=8), tmp_path / "run"
    options = ["--optimization.epochs", "1", "--optimization.batch-size", "4", "--workers", "0"]
    options += ["--augmentation.short-sides", "64", "--augmentation.max-size", "96"]
    options += ["--model.num-queries", "6", "--model.decoder.train-steps", "3"]
    options += ["--model.decoder.multiples", "1"]
    assert main(["train", "--data", str(root), "--output", str(output), *options]) == 0
    assert "has 9 objects" in told(capsys)
    losses = [row["loss"] for row in read_json_lines(output / "log.jsonl") if "loss" in row]
    assert len(losses) == 2 and all(map(math.isfinite, losses))


@pytest.mark.fault(19)
def test_the_fixed_point_is_not_reached(tmp_path: Path) -> None:
    """Fault 19: refinement ends before its fixed point is reached.

    Expected: the detections of the last refinement, with steps and residual that tell of it, in
    Python and in the written records; training logs the residual of every step.
    """
    model = small_predictor(EquilibriumConfig(steps=4))
    image = picture(tmp_path / "image.png", 1)
    (few, more) = (model.predict(image, steps=n, tolerance=1e-9) for n in (2, 4))
    assert (few.steps, more.steps) == (2, 4)
    assert few.residual is not None and few.residual > 1e-6
    assert "2 refinements" in repr(few) and f"{few.residual:.1e}"[:3] in repr(few)
    root = compose_digits(tmp_path / "digits", train_images=8, val_images=2, size=64)
    settings = small_recipe(1)
    sets = load_folder(
        root, train_transform(settings.augmentation), eval_transform(settings.augmentation)
    )
    run = train(settings, *sets, tmp_path / "run")
    rows = [row for row in read_json_lines(run.folder / "log.jsonl") if "loss" in row]
    assert rows and all(row["residual"] > 0 for row in rows)


@pytest.mark.fault(24)
@pytest.mark.slow
def test_workers_keep_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 24: the memory of workers grows from batch to batch.

    Expected: flat within 2 % over 1000 batches; `python -m benchmarks.loader_memory` measures it
    at the size of a real training.
    """
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("needs Linux, which tells the memory of processes")
    root = compose_digits(tmp_path / "digits", train_images=100, val_images=1, size=64)
    monkeypatch.setattr(loader_memory, "BATCH", 1)
    found = loader_memory.measure(root)
    assert found[-1][0] == 1000
    assert abs(loader_memory.growth(found)) < loader_memory.GOAL


def test_every_fault_has_a_test_that_names_it_and_is_told_of() -> None:
    """All 25 numbers, in the tests of this folder and in docs/faults.md with the test's name."""
    import ast

    here, found = Path(__file__).parent, {}
    for path in here.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            for mark in map(ast.unparse, node.decorator_list):
                if mark.startswith("pytest.mark.fault("):
                    number = int(mark.removeprefix("pytest.mark.fault(").removesuffix(")"))
                    text = ast.get_docstring(node) or ""
                    assert text.startswith(f"Fault {number}: ") and "Expected: " in text, node.name
                    found.setdefault(number, set()).add(node.name)
    assert sorted(found) == list(range(1, 26))
    page = (here.parents[1] / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][2:]
    told_of = {int(row[0].strip("| ")): set(row[-1].strip(" |`").split("`, `")) for row in rows}
    assert told_of == found
