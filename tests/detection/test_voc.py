"""Pascal VOC folders: coordinates from 1, difficult objects, the layouts, and bad XML."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from labelled_folders import page, picture, voc_folder

from detection.data import Categories, DataError, check_folder, load_folder, load_split
from detection.evaluation import evaluate_coco


def with_page(tmp_path: Path, text: str) -> Path:
    root = voc_folder(tmp_path / "own")
    (root / "Annotations" / "train_2.xml").write_text(text)
    return root


def test_pixels_are_counted_from_1_and_the_last_belongs_to_the_box(tmp_path: Path) -> None:
    root = with_page(tmp_path, page(corners=(1, 1, 60, 40)))
    assert load_split(root, "train")[1][1].boxes.tolist() == [[0, 0, 60, 40]]
    (root / "Annotations" / "train_2.xml").write_text(page(corners=(5, 5, 5, 5)))
    assert load_split(root, "train")[1][1].boxes.tolist() == [[4, 4, 5, 5]]
    (root / "Annotations" / "train_2.xml").write_text(page(corners=(0, 0.5, 9, 9)))
    assert load_split(root, "train")[1][1].boxes.tolist() == [[0, 0, 9, 9]]
    (warning,) = (p for p in check_folder(root).problems if p.rule == "pixels counted from 0")
    assert "1 of 3 boxes" in warning.fact


def test_difficult_objects_are_neither_trained_on_nor_scored(tmp_path: Path) -> None:
    root = with_page(tmp_path, page(more="<difficult>1</difficult>"))
    dataset = load_split(root, "train")
    assert len(dataset[1][1].boxes) == 0
    # Found or not, the difficult object changes no score.
    sure = [
        {"image_id": i, "category_id": 1 + (i == 2), "bbox": [6, 4, 24, 16], "score": 0.9}
        for i in (1, 3)
    ]
    also = {"image_id": 2, "category_id": 2, "bbox": [6, 4, 24, 16], "score": 0.95}
    for found in (sure, [*sure, also]):
        assert evaluate_coco(dataset.coco, found, dataset.categories).AP == pytest.approx(1.0)


def test_classes_are_those_of_all_splits_in_alphabetical_order(tmp_path: Path) -> None:
    root = voc_folder(tmp_path / "own")
    (root / "Annotations" / "val_1.xml").write_text(page("ant"))
    train, val = load_folder(root)
    assert train.categories == val.categories == Categories(("ant", "car", "cup"), (1, 2, 3))


@pytest.mark.parametrize("place", ["VOCdevkit/VOC2012", "VOC2007"])
def test_the_folder_of_the_challenge_is_found_below(tmp_path: Path, place: str) -> None:
    voc_folder(tmp_path / "own" / place)
    assert len(load_folder(tmp_path / "own")[0]) == 3
    shutil.copytree(tmp_path / "own" / place, (tmp_path / "own" / place).with_name("VOC2008"))
    with pytest.raises(DataError, match="cannot tell which of VOC20"):
        load_folder(tmp_path / "own")


def test_xml_beside_the_images_of_each_split(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        picture(tmp_path / "own" / split / "a.jpg", len(split))
        (tmp_path / "own" / split / "a.xml").write_text(page())
    train, val = load_folder(tmp_path / "own")
    assert (train.names, val.images.name) == (["a.jpg"], "valid")


LAUGHS = (
    '<!DOCTYPE lolz [<!ENTITY a "ha">'
    + "".join(
        f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    + "]><annotation>&i;</annotation>"
)
OUTSIDE = '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation>&b;</annotation>'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "document type or entities"),
        (OUTSIDE, "document type or entities"),
        ("<annotation>", "not XML"),
        ("", "not XML"),
        (page(corners=(30, 5, 7, 20)), "object 1.* negative width"),
        (page(corners=("nan", 5, 7, 20)), "object 1.* lacks one of"),
        (page().replace("<xmin>7</xmin>", ""), "object 1.* lacks one of"),
        (page().replace("bndbox", "polygon"), "object 1.* no bndbox"),
        (page(name=" "), "object 1: '' is no name"),
        (page(more="<difficult>maybe</difficult>"), "difficult is 'maybe'"),
        (page().replace("<width>60", "<width>6.5"), "height and width are '40' and '6.5'"),
        (page().replace("<width>60", "<width>61"), None),
    ],
)
def test_bad_xml_names_file_and_object(tmp_path: Path, text: str, message: str | None) -> None:
    root = with_page(tmp_path, text)
    if message is None:
        with pytest.raises(DataError, match=r"train_2.png.*60x40.*say 61x40"):
            load_split(root, "train")[1]
    else:
        with pytest.raises(DataError, match=rf"train_2\.xml.*{message}"):
            load_folder(root)


def test_an_absent_size_is_read_from_the_image(tmp_path: Path) -> None:
    root = with_page(tmp_path, page().replace("<width>60</width><height>40</height>", ""))
    assert load_split(root, "train").sizes[1] == (40, 60)
    assert [p.file.name for p in check_folder(root).warnings] == ["train_2.xml"]


def test_annotations_without_image_and_images_without_annotation(tmp_path: Path) -> None:
    root = voc_folder(tmp_path / "own")
    (root / "JPEGImages" / "train_1.png").rename(root / "JPEGImages" / "other.png")
    report = check_folder(root)
    (error,) = report.errors
    assert error.file.name == "train_1.xml" and "no image train_1" in error.fact
    (warning,) = report.warnings
    assert warning.file.name == "other.png" and warning.rule == "image without record"
    picture(root / "JPEGImages" / "train_2.jpg", 7)
    assert any("train_2.jpg, train_2.png" in p.fact for p in check_folder(root).errors)


def test_bad_lists_of_names(tmp_path: Path) -> None:
    root = voc_folder(tmp_path / "own")
    (root / "ImageSets" / "Main" / "train.txt").write_text("train_1  1\n../train_2 -1\nnone\n")
    with pytest.raises(DataError) as error:
        load_folder(root)
    assert "'../train_2' is no name" in str(error.value)
    assert "none.xml: there is no such annotation file" in str(error.value)


def test_boxes_have_float32_corners(tmp_path: Path) -> None:
    root = with_page(tmp_path, page(corners=(7.25, 5, 30, 20.5)))
    boxes = load_split(root, "train")[1][1].boxes
    torch.testing.assert_close(boxes, torch.tensor([[6.25, 4.0, 30.0, 20.5]]))
