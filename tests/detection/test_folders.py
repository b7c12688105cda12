"""Folders are recognised by what lies in them, load alike, and are refused where it is unclear."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from labelled_folders import BOX, coco_folder, instances, page, picture, voc_folder, yolo_folder

from detection.data import DataError, load_coco_folder, load_folder, load_split, split_folder
from detection.data.folders import recognise

CORNERS = [BOX[0], BOX[1], BOX[0] + BOX[2], BOX[1] + BOX[3]]
FOLDERS: dict[str, Callable[[Path], Path]] = {
    "COCO": coco_folder,
    "YOLO": yolo_folder,
    "Pascal VOC": voc_folder,
}


@pytest.mark.parametrize("name", FOLDERS)
def test_every_format_gives_the_same_data_set(tmp_path: Path, name: str) -> None:
    root = FOLDERS[name](tmp_path / "own")
    assert recognise(root).format == name
    train, val = load_folder(root)
    assert len(train) == len(val) == 3
    assert sorted(train.categories.names) == ["car", "cup"]
    assert train.categories == val.categories
    for dataset in (train, val):
        for i, (image, target) in enumerate(dataset, start=1):
            assert image.shape == (3, 40, 60)
            torch.testing.assert_close(target.boxes, torch.tensor([CORNERS]))
            assert train.categories.names[target.labels] == ("cup", "car")[i % 2]
            assert dataset.coco.anns[i]["area"] == pytest.approx(BOX[2] * BOX[3])
    assert not train[0][0].equal(val[0][0])


@pytest.mark.parametrize("name", FOLDERS)
def test_a_transform_categories_and_skip_empty_reach_every_format(
    tmp_path: Path, name: str
) -> None:
    root = FOLDERS[name](tmp_path / "own")
    dataset = load_split(root, "val", lambda image, target: (image[:, :4], target))
    assert dataset[0][0].shape == (3, 4, 60)
    other = load_split(coco_folder(tmp_path / "other"), "train").categories
    if dataset.categories != other:
        with pytest.raises(DataError, match="categories are not the expected"):
            load_split(root, "val", categories=other)
    if name == "YOLO":
        (root / "labels" / "train" / "1.txt").write_text("")
        assert len(load_split(root, "train")) == 3
        assert len(load_folder(root, skip_empty=True)[0]) == 2


def test_roboflow_keeps_annotations_among_the_images(tmp_path: Path) -> None:
    root = coco_folder(tmp_path / "own")
    for split, name in (("train", "train"), ("val", "valid")):
        if name != split:
            (root / split).rename(root / name)
        (root / "annotations" / f"instances_{split}.json").rename(
            root / name / "_annotations.coco.json"
        )
    (root / "annotations").rmdir()
    train, val = load_folder(root)
    assert (train.images.name, val.images.name) == ("train", "valid")
    assert len(load_coco_folder(root)[1]) == 3


@pytest.mark.parametrize("images", ["train", "images/train", "images"])
def test_annotation_files_whose_names_tell_the_split(tmp_path: Path, images: str) -> None:
    root = tmp_path / "own"
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        document = instances()
        for record in document["images"]:
            record["file_name"] = f"{split}{record['file_name']}"
            picture(root / images.replace("train", split) / record["file_name"], record["id"])
        (root / "annotations" / f"{split}.json").write_text(json.dumps(document))
        (root / "annotations" / f"captions_{split}2017.json").write_text("{}")
    train, val = load_folder(root)
    assert train.names == ["train1.png", "train2.png", "train3.png"]
    assert val.names[0] == "val1.png"


def test_a_test_set_is_loaded_where_there_is_one(tmp_path: Path) -> None:
    root = coco_folder(tmp_path / "own")
    with pytest.raises(DataError, match="missing test2017"):
        load_split(root, "test")
    shutil.copytree(root / "val", root / "test")
    shutil.copy(
        root / "annotations" / "instances_val.json", root / "annotations" / "instances_test.json"
    )
    assert len(load_split(root, "test")) == 3


def test_unknown_folders_are_told_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "notes.yaml").write_text("a: 1\n")
    with pytest.raises(DataError, match=r"no data set is recognised.*COCO.*YOLO.*Pascal VOC"):
        load_folder(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        load_folder(tmp_path / "nowhere")


def test_a_folder_of_two_formats_is_refused(tmp_path: Path) -> None:
    root = yolo_folder(tmp_path / "own")
    shutil.copytree(coco_folder(tmp_path / "coco") / "annotations", root / "annotations")
    with pytest.raises(DataError, match=r"as COCO and YOLO; .*give the path of a data.yaml"):
        load_folder(root)
    assert len(load_folder(root / "data.yaml")[0]) == 3


@pytest.mark.parametrize("name", FOLDERS)
def test_training_data_alone_are_refused_with_a_remedy_that_works(
    tmp_path: Path, name: str
) -> None:
    root = FOLDERS[name](tmp_path / "own")
    if name == "COCO":
        (root / "annotations" / "instances_val.json").unlink()
    elif name == "YOLO":
        (root / "data.yaml").write_text("train: images/train\nnames: [cup, car]\n")
    else:
        (root / "ImageSets" / "Main" / "val.txt").unlink()
    with pytest.raises(DataError, match=r"found: train.*split_folder\(root, out\)"):
        load_folder(root)
    train, val = load_folder(split_folder(root, tmp_path / "out"))
    assert (len(train), len(val)) == (2, 1)
    torch.testing.assert_close(val[0][1].boxes, torch.tensor([CORNERS]))


def undivided(root: Path, count: int = 20) -> Path:
    """XML files beside their images."""
    for i in range(count):
        picture(root / f"{i}.png", i)
        (root / f"{i}.xml").write_text(page())
    return root


def test_split_folder_depends_on_contents_and_seed_alone(tmp_path: Path) -> None:
    root = undivided(tmp_path / "own")
    with pytest.raises(DataError, match=r"the folder is not divided.*split_folder"):
        load_folder(root)
    first = load_folder(split_folder(root, tmp_path / "first", share=0.25))
    assert [len(dataset) for dataset in first] == [15, 5]
    assert not set(first[0].names) & set(first[1].names)
    again = load_folder(split_folder(root, tmp_path / "again", share=0.25))
    assert again[1].names == first[1].names
    other = load_folder(split_folder(root, tmp_path / "other", share=0.25, seed=1))
    assert other[1].names != first[1].names
    picture(root / "new.png", 99)
    (root / "new.xml").write_text(page())
    grown = load_folder(split_folder(root, tmp_path / "grown", share=0.25))
    assert len(set(grown[1].names) ^ set(first[1].names)) <= 2
    assert (root / "new.png").is_file()


def test_equal_images_go_to_the_same_side(tmp_path: Path) -> None:
    root = undivided(tmp_path / "own", 6)
    for i in range(6):
        shutil.copy(root / f"{i}.png", root / f"copy{i}.png")
        (root / f"copy{i}.xml").write_text(page())
    for dataset in load_folder(split_folder(root, tmp_path / "out", share=0.5)):
        kept = set(dataset.names)
        assert all((f"{i}.png" in kept) == (f"copy{i}.png" in kept) for i in range(6))


def test_split_folder_refuses(tmp_path: Path) -> None:
    root = undivided(tmp_path / "own", 1)
    with pytest.raises(DataError, match="too few"):
        split_folder(root, tmp_path / "out")
    with pytest.raises(DataError, match="exists already"):
        split_folder(root, tmp_path / "own")
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_folder(root, tmp_path / "out", share=1.0)
    with pytest.raises(DataError, match="train and val"):
        split_folder(coco_folder(tmp_path / "divided"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
