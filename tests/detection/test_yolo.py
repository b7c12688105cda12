"""YOLO folders: what is read from data.yaml and label files, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from labelled_folders import ROW, YAML, picture, yolo_folder
from PIL import Image

from detection.data import DataError, check_folder, load_folder, load_split


def with_row(tmp_path: Path, row: str) -> Path:
    root = yolo_folder(tmp_path / "own")
    (root / "labels" / "train" / "2.txt").write_text(row)
    return root


def test_a_row_is_centre_and_size_as_fractions(tmp_path: Path) -> None:
    root = with_row(tmp_path, "1 0.5 0.5 0.5 0.25\n0 0.1 0.2 0.2 0.4\n")
    target = load_split(root, "train")[1][1]
    torch.testing.assert_close(
        target.boxes, torch.tensor([[15.0, 15.0, 45.0, 25.0], [0.0, 0.0, 12.0, 16.0]])
    )
    assert target.labels.tolist() == [1, 0]


def test_a_polygon_becomes_its_box(tmp_path: Path) -> None:
    root = with_row(tmp_path, "1 0.5 0.1 0.25 0.5 0.75 0.4\n")
    boxes = load_split(root, "train")[1][1].boxes
    torch.testing.assert_close(boxes, torch.tensor([[15.0, 4.0, 45.0, 20.0]]))


def test_empty_and_absent_label_files_are_images_without_objects(tmp_path: Path) -> None:
    """Fault: an image without annotations.  Expected: it is used, and an absent file mentioned."""
    root = with_row(tmp_path, "\n")
    (root / "labels" / "train" / "3.txt").unlink()
    dataset = load_split(root, "train")
    assert [len(target.boxes) for _, target in dataset] == [1, 0, 0]
    (warning,) = (p for p in check_folder(root).problems if p.rule == "no label file")
    assert warning.file.name == "3.png" and "an empty file" in warning.remedy


def test_no_label_file_at_all_is_an_error(tmp_path: Path) -> None:
    root = yolo_folder(tmp_path / "own")
    (root / "labels" / "train").rename(root / "labels" / "elsewhere")
    with pytest.raises(DataError, match=r"none of the 3 images.*labels.train.1\.txt"):
        load_folder(root)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("0 30 20 24 16\n", "30 is no fraction .*divided by its size"),
        ("0 6 4 30 20\n", "corners x1 y1 x2 y2 in pixels"),
        ("0 0.5 0.5 -0.1 0.1\n", "is no fraction"),
        ("0 0.5 0.5 -0.005 0.1\n", "is negative"),
        ("2 0.5 0.5 0.1 0.1\n", r"no class 2; the numbers are \[0, 1\]"),
        ("0.5 0.5 0.5 0.1 0.1\n", "no class 0.5"),
        ("0 0.5 0.5 nan 0.1\n", "not all finite"),
        ("0 0.5 0.5 0.1 1e400\n", "not all finite"),
        ("0 0.5 0.5 0.1 x\n", "not all numbers"),
        ("0 0.5 0.5 0.1 0.1 0.9\n", "6 numbers.*score"),
        ("0 0.5 0.5 0.1\n", "4 numbers"),
        ("0 0.5 0.5 0.1 0.1 0.1 0.1 0.1\n", "8 numbers"),
        ("0 10 10 20 20 30 10\n", "30 is no fraction"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, row: str, message: str) -> None:
    root = with_row(tmp_path, ROW.format(0) + row)
    with pytest.raises(DataError, match=rf"labels.train.2\.txt: line 2: .*{message}"):
        load_folder(root)


def test_corners_as_fractions_are_noticed(tmp_path: Path) -> None:
    """Fault: x1 y1 x2 y2 given as x y width height.  Expected: refused with a hint."""
    root = yolo_folder(tmp_path / "own")
    corners = [(0.1, 0.1, 0.4, 0.5), (0.2, 0.3, 0.9, 0.8), (0.5, 0.6, 0.95, 0.9)]
    for number, (x1, y1, x2, y2) in enumerate(corners, start=1):
        (root / "labels" / "train" / f"{number}.txt").write_text(f"0 {x1} {y1} {x2} {y2}\n")
    with pytest.raises(DataError, match="would fit if they were x1 y1 x2 y2"):
        load_folder(root)


def test_boxes_that_overrun_are_clipped_and_mentioned(tmp_path: Path) -> None:
    root = with_row(tmp_path, "0 0.9 0.5 0.4 0.2\n")
    assert load_split(root, "train")[1][1].boxes[0, 2] == 60
    (warning,) = (p for p in check_folder(root).problems if p.rule == "box leaves the image")
    assert warning.record.endswith("2.txt, line 1")


def test_fractions_are_of_the_image_as_a_viewer_shows_it(tmp_path: Path) -> None:
    """Fault: EXIF rotation.  Expected: labels are of the turned image, so that is loaded."""
    root = yolo_folder(tmp_path / "own")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(root / "images" / "train" / "2.png", 5, exif=exif)
    image, target = load_split(root, "train")[1]
    assert image.shape == (3, 60, 40)
    torch.testing.assert_close(target.boxes, torch.tensor([[4.0, 6.0, 20.0, 30.0]]))


@pytest.mark.parametrize(
    "names", ["[cup, car]", "{0: cup, 1: car}", "{'0': cup, '1': car}", "\n- cup\n- car"]
)
def test_names_as_list_or_by_number(tmp_path: Path, names: str) -> None:
    yaml = f"train: images/train\nval: [images/val]\nnc: 2\nnames: {names}\n"
    train, _ = load_folder(yolo_folder(tmp_path / "own", yaml))
    assert train.categories.names == ("cup", "car") and train.categories.ids == (0, 1)


def test_numbers_of_classes_may_have_gaps(tmp_path: Path) -> None:
    """Fault: sparse category ids.  Expected: they are kept, and contiguous inside the model."""
    root = yolo_folder(tmp_path / "own", YAML.replace("[cup, car]", "{7: cup, 700: car}"))
    for path in (root / "labels").rglob("*.txt"):
        path.write_text(ROW.format(700))
    train, _ = load_folder(root)
    assert train.categories.ids == (7, 700)
    assert train[0][1].labels.tolist() == [1]


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        (YAML.replace("[cup, car]", "[yes, no]"), "class 0 is True; put it in quotation marks"),
        (YAML.replace("[cup, car]", "[1.10, b]"), "class 0 is 1.1; put it in quotation marks"),
        (YAML.replace("[cup, car]", "cup"), "names is 'cup'"),
        (YAML.replace("[cup, car]", "{-1: cup}"), "-1 is no class number"),
        (YAML + "nc: 3\n", "nc is 3, and there are 2 names"),
        (YAML.replace("path: .", "path: elsewhere"), "elsewhere, which is no folder"),
        (YAML.replace("path: .", "path: [a]"), r"path is \['a'\]"),
        (YAML.replace("images/val", "images/nowhere"), "nowhere is neither a folder"),
        (YAML.replace("images/val", "7"), r"val is \[7\]"),
        (YAML + "kpt_shape: [17, 3]\n", "key points"),
        ("names: [a\n", "not YAML"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nnames: [*b, *b]\n", "has aliases"),
        ("!!python/object/apply:os.getcwd []", "not YAML"),
        ("[" * 5000, "nested too deeply|not YAML"),
        ("- a\n", "no list of splits and names"),
        ("", "no list of splits and names"),
        ("# " + "x" * 1_000_001, "1,000,003 bytes"),
    ],
)
def test_bad_yaml(tmp_path: Path, yaml: str, message: str) -> None:
    root = yolo_folder(tmp_path / "own", yaml)
    with pytest.raises(DataError, match=f"data.yaml.*{message}"):
        load_folder(root)


def test_no_validation_set_in_the_yaml(tmp_path: Path) -> None:
    root = yolo_folder(tmp_path / "own", "train: images/train\nnames: [cup, car]\n")
    with pytest.raises(DataError, match=r"data.yaml has no val \(found: train\)"):
        load_folder(root)


def test_several_yaml_files(tmp_path: Path) -> None:
    root = yolo_folder(tmp_path / "own")
    (root / "data.yaml").rename(root / "mine.yaml")
    (root / "notes.yaml").write_text("a: 1")
    assert len(load_folder(root)[0]) == 3
    (root / "other.yml").write_text(YAML)
    with pytest.raises(DataError, match="which of mine.yaml, other.yml"):
        load_folder(root)
    assert len(load_folder(root / "mine.yaml")[0]) == 3


def test_paths_absolute_listed_and_as_roboflow_writes_them(tmp_path: Path) -> None:
    root = yolo_folder(tmp_path / "own")
    (root / "list.txt").write_text("./images/val/1.png\n\nimages/val/3.png\n")
    yaml = f"path: {root}\ntrain: ../images/train\nval: list.txt\nnames: [cup, car]\n"
    elsewhere = tmp_path / "elsewhere" / "data.yaml"
    elsewhere.parent.mkdir()
    elsewhere.write_text(yaml)
    train, val = load_folder(elsewhere)
    assert len(train) == 3
    assert val.names == ["1.png", "3.png"]
    (root / "list.txt").write_text("images/val/1.txt\n")
    with pytest.raises(DataError, match=r"list\.txt: line 1: 'images/val/1.txt' is no image"):
        load_folder(elsewhere)


@pytest.mark.parametrize("layout", ["images/train", "train/images"])
def test_classes_txt_instead_of_yaml(tmp_path: Path, layout: str) -> None:
    root = yolo_folder(tmp_path / "own", None)
    if layout == "train/images":
        for split in ("train", "val"):
            (root / split).mkdir()
            for kind in ("images", "labels"):
                (root / kind / split).rename(root / split / kind)
    train, val = load_folder(root)
    assert train.categories.names == ("cup", "car") and len(val) == 3
    (root / "classes.txt").write_text("cup\n\x1b[2J\n")
    with pytest.raises(DataError, match=r"classes\.txt, line 2"):
        load_folder(root)


def test_unreadable_image_and_label_files(tmp_path: Path) -> None:
    root = yolo_folder(tmp_path / "own")
    (root / "images" / "train" / "1.png").write_bytes(b"no image")
    (root / "labels" / "val" / "2.txt").write_bytes(b"0 \xff\xfe")
    errors = [str(problem) for problem in check_folder(root).errors]
    assert len(errors) == 2
    assert "1.png" in errors[0] and "cannot be read" in errors[0]
    assert "2.txt" in errors[1] and "UTF-8" in errors[1]
