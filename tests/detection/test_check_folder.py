"""The report on a folder: its figures, and every fault with file, id and remedy."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from labelled_folders import coco_folder, instances, picture, voc_folder, yolo_folder
from PIL import Image
from rich.console import Console

from detection.data import (
    DataError,
    FolderReport,
    Problem,
    check_folder,
    check_images,
    load_folder,
    read_image,
)
from detection.data import problems as problems_module


def printed(report: FolderReport, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=220)
    console.print(report.table(**options))
    return console.file.getvalue()  # type: ignore[attr-defined]


def rules(report: FolderReport) -> set[str]:
    return {problem.rule for problem in report.problems}


def only(report: FolderReport, rule: str) -> Problem:
    (problem,) = (problem for problem in report.problems if problem.rule == rule)
    assert problem.remedy and problem.fact
    return problem


@pytest.mark.parametrize("folder", [coco_folder, yolo_folder, voc_folder])
def test_a_sound_folder_has_no_problem(tmp_path: Path, folder: Callable[[Path], Path]) -> None:
    report = check_folder(folder(tmp_path / "own"))
    assert report.ok and not report.problems
    train, val = report.splits
    assert (train.name, val.name) == ("train", "val")
    assert (train.images, train.with_objects, train.boxes) == (3, 3, 3)
    assert sorted(train.classes.items()) == [("car", 2), ("cup", 1)]
    assert (train.small, train.medium, train.large, train.crowds) == (3, 0, 0, 0)
    assert train.smallest == train.largest == (40, 60) and train.most_objects == 1
    text = printed(report)
    assert "can be trained on (0 errors, 0 warnings)" in text
    for part in ("images", "train", "val", "cup", "60x40"):
        assert part in text


def test_sizes_of_boxes_are_those_of_cocos_metrics(tmp_path: Path) -> None:
    document = instances(4)
    for record, side in zip(document["annotations"], (31.9, 32, 95.9, 96), strict=True):
        record.update(bbox=[0, 0, side, side], area=side**2)
    for record in document["images"]:
        record.update(width=100, height=100)
    root = coco_folder(tmp_path / "own", document, document, count=4)
    for path in root.rglob("*.png"):
        picture(path, hash(path.as_posix()) % 1000, (100, 100))
    train = check_folder(root).splits[0]
    assert (train.small, train.medium, train.large) == (1, 2, 1)


Change = Callable[[dict[str, Any]], object]
EVERY_FAULT: dict[str, tuple[Change, str, str]] = {
    # what is changed: (how, rule, what the problem says)
    "undeclared category": (
        lambda d: d["annotations"][0].update(category_id=9),
        "unknown category",
        "annotation 1 (image 1): there is no category with id 9",
    ),
    "unknown image": (
        lambda d: d["annotations"][0].update(image_id=True),
        "unknown image",
        "annotation 1 (image True): there is no image with id True",
    ),
    "negative": (
        lambda d: d["annotations"][1].update(bbox=[1, 1, -4, 3]),
        "negative bbox",
        "annotation 2 (image 2): the bbox [1, 1, -4, 3] has a negative",
    ),
    "NaN": (
        lambda d: d["annotations"][1].update(bbox=[1, float("nan"), 4, 3]),
        "bad bbox",
        "annotation 2 (image 2): the bbox [1, nan, 4, 3]",
    ),
    "degenerate": (
        lambda d: d["annotations"][1].update(bbox=[1, 1, 0, 3], area=0),
        "box without area",
        "annotation 2 (image 2): the box [1, 1, 0, 3] has no area",
    ),
    "outside": (
        lambda d: d["annotations"][1].update(bbox=[70, 1, 4, 3]),
        "box without area",
        "annotation 2 (image 2): the box [70, 1, 4, 3] has no area inside the image of 60x40",
    ),
    "overrun": (
        lambda d: d["annotations"][1].update(bbox=[50, 1, 30, 3]),
        "box leaves the image",
        "annotation 2 (image 2): the box [50, 1, 30, 3] reaches beyond",
    ),
    "no area": (
        lambda d: d["annotations"][2].pop("area"),
        "no area",
        "1 of 3 annotations have no area; each is taken to be that of its box",
    ),
    "no iscrowd": (
        lambda d: d["annotations"][2].pop("iscrowd"),
        "no iscrowd",
        "1 of 3 annotations have no iscrowd",
    ),
    "huge id": (
        lambda d: d["images"][0].update(id=10**30),
        "no id",
        "image number 0 of the list: it has no integer id of 64 bits",
    ),
    "repeated id": (
        lambda d: d["annotations"][2].update(id=1),
        "repeated id",
        "the annotation id 1 occurs more than once",
    ),
    "climbing": (
        lambda d: d["images"][0].update(file_name="../val/1.png"),
        "file name leads outside",
        "image 1: the file name '../val/1.png' leads out of the folder",
    ),
    "absolute": (
        lambda d: d["images"][0].update(file_name="/etc/hostname"),
        "file name leads outside",
        "image 1: the file name '/etc/hostname' leads out",
    ),
    "drive": (
        lambda d: d["images"][0].update(file_name="C:\\a.png"),
        "file name leads outside",
        "image 1: the file name 'C:\\\\a.png' leads out",
    ),
    "escape sequence": (
        lambda d: d["images"][0].update(file_name="\x1b[2J.png"),
        "file name leads outside",
        "has control characters",
    ),
    "same file twice": (
        lambda d: d["images"][0].update(file_name="./2.png"),
        "repeated file name",
        "image 2 (2.png): image 1 has the same file",
    ),
    "pixel bomb on paper": (
        lambda d: d["images"][0].update(height=10**6, width=10**6),
        "too many pixels",
        "image 1 (1.png): it has 1000000x1000000 pixels",
    ),
    "wrong size": (
        lambda d: d["images"][0].update(height=60, width=40),
        "unusable image",
        "1.png: image 1: the file is 60x40 pixels (width x height), the annotations say 40x60",
    ),
    "missing file": (
        lambda d: d["images"][0].update(file_name="absent.png"),
        "missing image",
        "absent.png: image 1: ",
    ),
    "nameless category": (
        lambda d: d["categories"][0].update(name=""),
        "bad category name",
        "category 1 has no name",
    ),
    "same name twice": (
        lambda d: d["categories"][0].update(name="car"),
        "repeated name",
        "'car' occurs more than once",
    ),
    "class without boxes": (
        lambda d: d["categories"].append({"id": 7, "name": "bus"}),
        "class without boxes",
        "the class 'bus' has no box to train on",
    ),
}


@pytest.mark.parametrize("name", EVERY_FAULT)
def test_every_fault_is_told_with_file_and_id(tmp_path: Path, name: str) -> None:
    change, rule, text = EVERY_FAULT[name]
    document = instances()
    change(document)
    root = coco_folder(tmp_path / "own", document)
    report = check_folder(root)
    found = [problem for problem in report.problems if problem.rule == rule]
    assert len(found) == 1
    assert text in str(found[0]) and found[0].remedy
    assert "train" in str(found[0].file)
    loads = True
    try:
        for dataset in load_folder(root):
            for _ in dataset:
                pass
    except DataError:
        loads = False
    except UserWarning:
        pass
    if rule not in ("class without boxes",):
        assert report.ok == loads


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    document = instances(6)
    document["annotations"][0]["category_id"] = 9
    document["annotations"][1]["bbox"] = [1, 2, 3]
    document["annotations"][2]["image_id"] = 99
    document["images"][3]["file_name"] = "../4.png"
    document["categories"].append({"id": 1, "name": "again"})
    root = coco_folder(tmp_path / "own", document, count=6)
    (root / "val" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    report = check_folder(root)
    assert not report.ok
    assert {
        *("unknown category", "bad bbox", "unknown image", "file name leads outside"),
        *("repeated id", "unusable image", "image without record"),
    } <= rules(report)
    assert [p.severity for p in report.problems] == sorted(p.severity for p in report.problems)
    with pytest.raises(DataError, match=r"^6 errors\. .*check_folder lists them all"):
        load_folder(root)
    assert "cannot be trained on" in printed(report)


def test_null_segmentation_and_what_no_detector_needs_is_left_out(tmp_path: Path) -> None:
    """Fault: null segmentation.  Expected: no matter; polygons are not even kept."""
    document = instances()
    for record, value in zip(
        document["annotations"], (None, [], [[1, 2, 3, 4, 5, 6]]), strict=True
    ):
        record["segmentation"] = value
    root = coco_folder(tmp_path / "own", document)
    assert check_folder(root).ok
    assert "segmentation" not in load_folder(root)[0].coco.anns[3]


def test_ids_may_be_sparse_negative_or_huge(tmp_path: Path) -> None:
    """Fault: sparse, 1-based or huge category ids.  Expected: kept, and contiguous inside."""
    document = instances()
    ids = {1: -5, 2: 2**62}
    for record in document["categories"]:
        record["id"] = ids[record["id"]]
    for record in document["annotations"]:
        record["category_id"] = ids[record["category_id"]]
        record["image_id"] = record["id"] = 2**60 + record["id"]
    for record in document["images"]:
        record["id"] += 2**60
    root = coco_folder(tmp_path / "own", document, document)
    assert check_folder(root).ok
    train, _ = load_folder(root)
    assert train.categories.ids == (-5, 2**62)
    assert train.image_ids == [2**60 + 1, 2**60 + 2, 2**60 + 3]
    assert train[0][1].labels.tolist() == [1]


@pytest.mark.fault(9)
@pytest.mark.parametrize("count", [3, 30])
def test_corners_given_as_sizes(tmp_path: Path, count: int) -> None:
    """Fault 9: xyxy given as xywh.

    Expected: refused, with the boxes' right format.
    """
    document = instances(count)
    chance = np.random.default_rng(0)
    for record in document["annotations"]:
        x, y = chance.uniform(20, 40), chance.uniform(15, 25)
        record["bbox"] = [x, y, x + chance.uniform(5, 20), y + chance.uniform(5, 15)]
    root = coco_folder(tmp_path / "own", document, count=count)
    problem = only(check_folder(root), "corners given as sizes")
    assert problem.severity == "error" and "(x, y, width, height)" in problem.remedy
    with pytest.raises(DataError, match="would fit if they were"):
        load_folder(root)


def test_boxes_that_are_merely_large_are_not_taken_for_corners(tmp_path: Path) -> None:
    document = instances(30)
    chance = np.random.default_rng(0)
    for record in document["annotations"]:
        x, y = chance.uniform(0, 30), chance.uniform(0, 20)
        record["bbox"] = [x, y, 60 - x, 40 - y]
    report = check_folder(coco_folder(tmp_path / "own", document, count=30))
    assert report.ok and not report.problems


def test_more_objects_than_queries(tmp_path: Path) -> None:
    """Fault: more objects than queries.  Expected: images and the excess are named."""
    document = instances()
    document["annotations"] += [{**document["annotations"][0], "id": 10 + i} for i in range(4)]
    root = coco_folder(tmp_path / "own", document)
    assert not check_folder(root).problems
    assert not check_folder(root, num_queries=5).problems
    problem = only(check_folder(root, num_queries=4), "more objects than queries")
    assert problem.record == "image 1 (1.png)" and "5 objects" in problem.fact
    assert problem.severity == "warning"


def test_the_same_image_in_training_and_validation(tmp_path: Path) -> None:
    root = coco_folder(tmp_path / "own")
    shutil.copy(root / "train" / "2.png", root / "val" / "3.png")
    shutil.copy(root / "train" / "1.png", root / "train" / "3.png")
    report = check_folder(root)
    assert report.ok
    assert only(report, "image in two splits").file == root / "train" / "2.png"
    assert str(root / "val" / "3.png") in only(report, "image in two splits").fact
    assert str(root / "train" / "3.png") in only(report, "image twice").fact


def test_files_that_no_record_names(tmp_path: Path) -> None:
    """Fault: JSON and disk disagree.  Expected: told both ways."""
    root = coco_folder(tmp_path / "own")
    (root / "train" / "1.png").rename(root / "train" / "new.png")
    (root / "train" / ".hidden.png").write_bytes(b"")
    (root / "train" / "notes.txt").write_bytes(b"")
    report = check_folder(root)
    assert only(report, "missing image").record == "image 1"
    assert only(report, "image without record").file.name == "new.png"


def test_splits_with_different_categories(tmp_path: Path) -> None:
    document = instances()
    document["categories"][0]["name"] = "mug"
    report = check_folder(coco_folder(tmp_path / "own", val=document))
    assert "1 'cup'" in only(report, "categories differ").fact


def test_what_cannot_be_read_at_all_is_a_report_as_well(tmp_path: Path) -> None:
    report = check_folder(tmp_path)
    assert not report.ok and only(report, "not recognised").file == tmp_path
    assert "cannot be trained on" in printed(report)
    with pytest.raises(DataError, match="no image to draw"):
        report.contact_sheet(tmp_path / "sheet.png")
    root = coco_folder(tmp_path / "own", "no document")
    (root / "annotations" / "instances_val.json").unlink()
    report = check_folder(root)
    assert rules(report) == {"not COCO", "missing split"} and not report.splits


def damaged(path: Path, kind: str) -> None:
    """Overwrite bytes in the middle of a file's image data; head and end stay."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    options = {"quality": 90, "progressive": kind == "progressive"} if kind != "PNG" else {}
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG" if kind == "PNG" else "JPEG", **options)
    content = bytearray(buffer.getvalue())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["PNG", "baseline", "progressive"])
def test_damage_in_the_middle_does_not_pass(tmp_path: Path, kind: str) -> None:
    """Fault: truncated image.  Expected: also where its end is there and Pillow would read it."""
    document = instances()
    document["images"][1].update(width=64, height=64)
    root = coco_folder(tmp_path / "own", document)
    damaged(root / "train" / "2.png", kind)
    problem = only(check_folder(root), "unusable image")
    assert problem.severity == "error" and problem.record == "image 2"
    assert problem.file == root / "train" / "2.png"


def test_a_jpeg_with_a_few_bytes_of_padding_is_whole(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.jpg", 0)
    content = path.read_bytes()
    document = instances(1)
    root = coco_folder(tmp_path / "own", document, count=1)
    (root / "train" / "1.png").write_bytes(content[:-2] + bytes(8) + content[-2:])
    report = check_folder(root)
    assert report.ok and only(report, "JPEG oddity").severity == "warning"


def test_what_is_peculiar_about_an_image(tmp_path: Path) -> None:
    root = coco_folder(tmp_path / "own")
    exif = Image.Exif()
    exif[0x0112] = 3
    picture(root / "train" / "1.png", 1, exif=exif)
    frames = [Image.new("RGB", (60, 40), (i, 0, 9)) for i in (0, 100)]
    frames[0].save(root / "train" / "2.png", "GIF", save_all=True, append_images=frames[1:])
    report = check_folder(root)
    assert report.ok
    assert only(report, "turned by EXIF").record == "image 1"
    assert only(report, "several frames").record == "image 2"


def test_check_images_of_a_data_set_says_the_same_in_short(tmp_path: Path) -> None:
    root = coco_folder(tmp_path / "own")
    train, _ = load_folder(root)
    check_images(train)
    path = root / "train" / "2.png"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="1 of 3 image files"):
        check_images(train)
    assert only(check_folder(root), "unusable image").record == "image 2"


def test_the_table_shows_some_or_all(tmp_path: Path) -> None:
    document = instances(12)
    for record in document["annotations"]:
        record["category_id"] = 5
    report = check_folder(coco_folder(tmp_path / "[bold]own", document, count=12))
    assert printed(report).count("there is no category with id 5") == 5
    assert "... and 7 more" in printed(report)
    assert printed(report, most=None).count("there is no category with id 5") == 12
    assert "[bold]own" in printed(report)


def test_problems_beyond_a_number_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(problems_module, "MOST_KEPT", 4)
    document = instances(12)
    for record in document["annotations"]:
        record["category_id"] = 5
    report = check_folder(coco_folder(tmp_path / "own", document, count=12))
    assert len(report.problems) == 4 and report.number_of_errors >= 12
    assert report.left_out + 4 >= report.number_of_errors


def test_progress_is_shown_on_a_console(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    check_folder(coco_folder(tmp_path / "own"), console=console)
    assert "decoding train" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_contact_sheet_shows_images_and_boxes(tmp_path: Path) -> None:
    root = coco_folder(tmp_path / "own")
    report = check_folder(root)
    report.contact_sheet(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 4 * 320 and sheet.height > 2 * 200
        before = np.asarray(sheet).copy()
    (root / "train" / "2.png").write_bytes(b"")  # drawn as a grey picture
    check_folder(root).contact_sheet(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        after = np.asarray(sheet)
    assert before.shape == after.shape and (before != after).any()
    assert ((after == 128).all(axis=-1)).sum() > ((before == 128).all(axis=-1)).sum() + 10_000


def test_a_report_writes_nothing(tmp_path: Path) -> None:
    root = coco_folder(tmp_path / "own")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    check_folder(root)
    assert before == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert json.loads(before[root / "annotations" / "instances_train.json"])
    assert read_image(root / "train" / "1.png").shape == (3, 40, 60)
