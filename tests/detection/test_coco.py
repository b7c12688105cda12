"""COCO folders: what is read from them, and how each kind of bad input is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detection.data import (
    Categories,
    CocoDataset,
    DataError,
    DataWarning,
    check_images,
    load_coco_folder,
    read_image,
)

CATEGORIES = [{"id": 90, "name": "tooth brush"}, {"id": 3, "name": "car"}]


def document() -> dict[str, Any]:
    """Two images of 20x30 (id 8) and 24x16 (id 5) pixels with three objects and a crowd."""
    return {
        "images": [
            {"id": 8, "file_name": "eight.png", "height": 20, "width": 30},
            {"id": 5, "file_name": "five.png", "height": 24, "width": 16},
        ],
        "categories": [dict(category) for category in CATEGORIES],
        "annotations": [
            {"id": 1, "image_id": 8, "category_id": 90, "bbox": [2, 3, 10, 5], "iscrowd": 0},
            {"id": 2, "image_id": 8, "category_id": 3, "bbox": [-4, 10, 50, 30]},
            {"id": 3, "image_id": 8, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1},
            {"id": 4, "image_id": 5, "category_id": 3, "bbox": [1.5, 2.5, 3.0, 4.0]},
        ],
    }


def write_folder(root: Path, train: Any = None, val: Any = None) -> Path:
    (root / "annotations").mkdir(parents=True)
    for split, content in (("train2017", train), ("val2017", val)):
        content = document() if content is None else content
        path = root / "annotations" / f"instances_{split}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        (root / split).mkdir()
        for name, size in (("eight.png", (30, 20)), ("five.png", (16, 24))):
            Image.new("RGB", size, (200, 100, 50)).save(root / split / name)
    return root


def dataset_of(root: Path, **options: Any) -> CocoDataset:
    return CocoDataset(
        root / "train2017", root / "annotations" / "instances_train2017.json", **options
    )


def test_images_boxes_and_categories(tmp_path: Path) -> None:
    dataset = dataset_of(write_folder(tmp_path))
    assert dataset.categories == Categories(names=("car", "tooth brush"), ids=(3, 90))
    assert dataset.image_ids == [5, 8]
    assert dataset.sizes == [(24, 16), (20, 30)]
    image, target = dataset[1]
    assert image.dtype == torch.uint8 and image.shape == (3, 20, 30)
    assert image[:, 7, 7].tolist() == [200, 100, 50]
    # xywh -> xyxy, clipped to 30x20; the crowd is no target.
    assert target.boxes.tolist() == [[2, 3, 12, 8], [0, 10, 30, 20]]
    assert target.boxes.dtype == torch.float32
    assert target.labels.tolist() == [1, 0] and target.labels.dtype == torch.int64
    assert (target.image_id, target.original_size) == (8, (20, 30))
    assert dataset[0][1].boxes.tolist() == [[1.5, 2.5, 4.5, 6.5]]
    with pytest.raises(IndexError):
        dataset[2]


def test_pycocotools_index_is_complete_and_silent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = dataset_of(write_folder(tmp_path))
    assert capsys.readouterr().out == ""
    assert sorted(dataset.coco.anns) == [1, 2, 3, 4]
    assert dataset.coco.anns[2]["area"] == 50 * 30  # absent in the file
    assert dataset.coco.anns[2]["iscrowd"] == 0
    assert dataset.coco.anns[3]["iscrowd"] == 1


def test_annotation_id_0_is_renumbered(tmp_path: Path) -> None:
    # pycocotools counts a ground truth with id 0 as never matched.
    content = document()
    content["annotations"][0]["id"] = 0
    dataset = dataset_of(write_folder(tmp_path, content))
    assert sorted(dataset.coco.anns) == [2, 3, 4, 5]
    assert dataset.coco.anns[5]["bbox"] == [2, 3, 10, 5]


def test_transform_is_applied(tmp_path: Path) -> None:
    dataset = dataset_of(
        write_folder(tmp_path), transform=lambda image, target: (image[:, :4], target)
    )
    assert dataset[0][0].shape == (3, 4, 16)


def test_skip_empty_leaves_out_images_without_targets(tmp_path: Path) -> None:
    content = document()
    content["annotations"][3]["iscrowd"] = 1
    root = write_folder(tmp_path, content)
    assert dataset_of(root).image_ids == [5, 8]
    assert dataset_of(root)[0][1].boxes.shape == (0, 4)
    dataset = dataset_of(root, skip_empty=True)
    assert dataset.image_ids == [8] and len(dataset) == 1
    assert dataset[0][1].labels.tolist() == [1, 0]


def test_boxes_without_area_are_reported(tmp_path: Path) -> None:
    content = document()
    content["annotations"][0]["bbox"] = [40, 3, 5, 5]  # right of the image
    content["annotations"][3]["bbox"] = [1, 1, 0, 5]
    with pytest.warns(DataWarning, match="2 of 4 annotations are not trained on"):
        dataset = dataset_of(write_folder(tmp_path, content))
    assert len(dataset.problems) == 2
    assert "annotation 1 (image 8)" in dataset.problems[0]
    assert dataset[1][1].boxes.tolist() == [[0, 10, 30, 20]]
    assert len(dataset[0][1].boxes) == 0


def test_workers_get_a_light_copy(tmp_path: Path) -> None:
    dataset = dataset_of(write_folder(tmp_path))
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[1][1].boxes.equal(dataset[1][1].boxes)
    with pytest.raises(RuntimeError, match="pickled"):
        _ = copy.coco


Change = Callable[[dict[str, Any]], object]
BAD_DOCUMENTS: dict[str, tuple[Change, str]] = {
    "no images key": (lambda d: d.pop("images"), "no list of images"),
    "no annotations key": (lambda d: d.pop("annotations"), "no list of annotations"),
    "no categories key": (lambda d: d.pop("categories"), "no list of categories"),
    "no images": (lambda d: d["images"].clear(), "image list is empty"),
    "no annotations": (lambda d: d["annotations"].clear(), "annotation list is empty"),
    "no categories": (lambda d: d["categories"].clear(), "category list is empty"),
    "unknown image": (
        lambda d: d["annotations"][1].update(image_id=77),
        "annotation 2 .*: there is no image with id 77",
    ),
    "image id is a list": (
        lambda d: d["annotations"][1].update(image_id=[8]),
        r"annotation 2 .*: there is no image with id \[8\]",
    ),
    "unknown category": (
        lambda d: d["annotations"][1].update(category_id=4),
        "annotation 2 .*: there is no category with id 4",
    ),
    "no category": (
        lambda d: d["annotations"][1].pop("category_id"),
        "annotation 2 .*: there is no category with id None",
    ),
    "repeated annotation": (
        lambda d: d["annotations"][1].update(id=4),
        "annotation id 4 occurs more than once",
    ),
    "repeated image": (lambda d: d["images"][1].update(id=8), "image id 8 occurs more than once"),
    "repeated category": (
        lambda d: d["categories"][1].update(id=90),
        "category id 90 occurs more than once",
    ),
    "annotation without id": (
        lambda d: d["annotations"][2].pop("id"),
        "annotation number 2 of the list: it has no integer id",
    ),
    "nameless category": (lambda d: d["categories"][0].pop("name"), "category 90 has no name"),
    "nameless image": (lambda d: d["images"][0].pop("file_name"), "image 8 has no file_name"),
    "no height": (lambda d: d["images"][0].pop("height"), r"image 8 \(eight.png\).*height None"),
    "zero width": (lambda d: d["images"][0].update(width=0), "width 0"),
    "three numbers": (lambda d: d["annotations"][1].update(bbox=[1, 2, 3]), "annotation 2.*four"),
    "text in a box": (
        lambda d: d["annotations"][1].update(bbox=[1, 2, 3, "4"]),
        "annotation 2.*four",
    ),
    "infinite box": (
        lambda d: d["annotations"][1].update(bbox=[1, 2, 3, float("inf")]),
        "annotation 2.*finite",
    ),
    "NaN in a box": (
        lambda d: d["annotations"][1].update(bbox=[float("nan"), 2, 3, 4]),
        "annotation 2.*finite",
    ),
    "negative width": (
        lambda d: d["annotations"][1].update(bbox=[1, 2, -3, 4]),
        "annotation 2.*negative",
    ),
    "strange iscrowd": (lambda d: d["annotations"][1].update(iscrowd=2), "annotation 2.*iscrowd"),
}


@pytest.mark.parametrize("name", BAD_DOCUMENTS)
def test_bad_annotation_files(tmp_path: Path, name: str) -> None:
    change, message = BAD_DOCUMENTS[name]
    content = document()
    change(content)
    root = write_folder(tmp_path, content)
    with pytest.raises(DataError, match=message) as error:
        dataset_of(root)
    assert "instances_train2017.json" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[]", "an object"), ('"\\ud83"', "not JSON"), ("{}", "images, annot")],
)
def test_files_that_are_no_instances_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        dataset_of(write_folder(tmp_path, text))


def test_nothing_to_train_on(tmp_path: Path) -> None:
    content = document()
    for record in content["annotations"]:
        record["iscrowd"] = 1
    root = write_folder(tmp_path, content)
    with pytest.raises(DataError, match="no annotation can be trained on"):
        load_coco_folder(root)
    with pytest.raises(DataError, match="no image has a box"):
        dataset_of(root, skip_empty=True)


@pytest.mark.parametrize("area", [None, "12", -1, float("nan"), 10**400])
def test_a_bad_area_is_refused_before_training(tmp_path: Path, area: object) -> None:
    """pycocotools would stumble over it after the first epoch."""
    content = document()
    content["annotations"][0]["area"] = area
    with pytest.raises(DataError, match=r"annotation \d+ .*: the area is"):
        dataset_of(write_folder(tmp_path, content))


def test_missing_image_files_are_counted_and_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    (root / "train2017" / "five.png").unlink()
    with pytest.raises(DataError, match="1 of the 2 images .* missing: five.png"):
        dataset_of(root)


def test_files_in_subfolders_are_found(tmp_path: Path) -> None:
    content = document()
    content["images"][0]["file_name"] = "part/eight.png"
    root = write_folder(tmp_path, content)
    (root / "train2017" / "part").mkdir()
    (root / "train2017" / "eight.png").rename(root / "train2017" / "part" / "eight.png")
    assert dataset_of(root)[1][0].shape == (3, 20, 30)


def test_truncated_image_names_file_and_id(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for name, options in (("eight.png", {}), ("eight.jpg", {"quality": 95})):
        path = root / "train2017" / "eight.png"
        Image.fromarray(noise).save(root / name, **options)
        path.write_bytes((root / name).read_bytes()[:700])
        dataset = dataset_of(root)
        with pytest.raises(DataError, match=r"eight.png \(image 8\).*cannot be read"):
            dataset[1]
        with pytest.raises(DataError, match="1 of 2 image files are unusable.*eight.png"):
            check_images(dataset)


def test_files_that_are_no_images(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    (root / "train2017" / "eight.png").write_text("not an image")
    with pytest.raises(DataError, match=r"eight.png \(image 8\)"):
        check_images(dataset_of(root))


def test_size_of_file_and_annotation_must_agree(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    Image.new("RGB", (31, 20)).save(root / "train2017" / "eight.png")
    dataset = dataset_of(root)
    for check in (lambda: dataset[1], lambda: check_images(dataset)):
        with pytest.raises(DataError, match=r"image 8.*31x20.*30x20"):
            check()


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp"])
def test_check_images_accepts_good_files(tmp_path: Path, suffix: str) -> None:
    content = document()
    for record in content["images"]:
        record["file_name"] = f"{record['id']}.{suffix}"
    root = write_folder(tmp_path, content)
    for record in content["images"]:
        size = (record["width"], record["height"])
        Image.new("RGB", size).save(root / "train2017" / record["file_name"])
    check_images(dataset_of(root))


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("LA", (77, 128), (77, 77, 77)),
        ("RGBA", (10, 20, 30, 0), (10, 20, 30)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 257 * 99, (99, 99, 99)),
    ],
)
def test_every_pixel_format_becomes_rgb(
    tmp_path: Path, mode: str, colour: Any, expected: tuple[int, int, int]
) -> None:
    path = tmp_path / "image.tif"
    Image.new(mode, (5, 3), colour).save(path)
    image = read_image(path, (3, 5))
    assert image.shape == (3, 3, 5) and image.dtype == torch.uint8
    assert (image == torch.tensor(expected, dtype=torch.uint8)[:, None, None]).all()


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (5, 3), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(tmp_path / "image.png", transparency=b"\x00\x80")
    assert read_image(tmp_path / "image.png")[:, 0, 0].tolist() == [200, 100, 50]


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    Image.new("F", (5, 3), 0.5).save(tmp_path / "image.tif")
    with pytest.raises(DataError, match="image.tif.*floating-point"):
        read_image(tmp_path / "image.tif")


@pytest.mark.fault(13)
def test_exif_rotation_only_where_the_annotation_asks_for_it(tmp_path: Path) -> None:
    """Fault 13: EXIF rotation of an image that is trained on.

    Expected: turned where the annotated size is that of the turned image, and only there.
    """
    stored = Image.new("RGB", (30, 20))
    stored.paste((255, 255, 255), (0, 0, 15, 20))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the left becomes the top
    path = tmp_path / "image.png"
    stored.save(path, exif=exif)
    as_stored = read_image(path, (20, 30))
    assert as_stored[0, :, 5].min() == 255 and as_stored[0, :, 25].max() == 0
    turned = read_image(path, (30, 20))
    assert turned.shape == (3, 30, 20)
    assert turned[0, 5].min() == 255 and turned[0, 25].max() == 0
    assert read_image(path).equal(turned)  # without annotations: as a viewer shows it


def test_load_coco_folder(tmp_path: Path) -> None:
    train, val = load_coco_folder(write_folder(tmp_path))
    assert len(train) == len(val) == 2
    assert train.images.name == "train2017" and val.images.name == "val2017"


def test_other_folder_names(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    (root / "train2017").rename(root / "train")
    (root / "val2017").rename(root / "valid")
    train, val = load_coco_folder(root)
    assert train.images.name == "train" and val.images.name == "valid"


def test_ambiguous_folders_are_refused(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    (root / "train2017").rename(root / "train_a")
    (root / "train_b").mkdir()
    with pytest.raises(DataError, match="cannot tell which.*train_a, train_b"):
        load_coco_folder(root)


@pytest.mark.parametrize(
    "missing",
    ["train2017", "val2017", "instances_train2017.json", "instances_val2017.json"],
)
def test_missing_part_of_the_layout_is_named(tmp_path: Path, missing: str) -> None:
    root = write_folder(tmp_path)
    for path in root.rglob(missing):
        path.rename(tmp_path / "elsewhere")
        break
    with pytest.raises(DataError, match=f"missing [^;]*{missing}.*; expected: train2017/"):
        load_coco_folder(root)


def test_a_folder_that_is_not_coco(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        load_coco_folder(tmp_path)
    before_expected = str(error.value).split("expected")[0]
    for part in ("train2017/", "val2017/", "instances_train2017", "instances_val2017"):
        assert part in before_expected
    with pytest.raises(DataError, match="no such folder"):
        load_coco_folder(tmp_path / "nowhere")


def test_categories_of_training_and_validation_must_agree(tmp_path: Path) -> None:
    content = document()
    content["categories"][1]["name"] = "lorry"
    with pytest.raises(DataError, match="instances_val2017.*id 3 .'lorry' here, 'car' expected"):
        load_coco_folder(write_folder(tmp_path, val=content))


def test_categories() -> None:
    categories = Categories(names=("a", "b"), ids=(2, 7))
    assert [categories.index_of(i) for i in categories.ids] == [0, 1]
    with pytest.raises(DataError, match="no category with id 3"):
        categories.index_of(3)
    with pytest.raises(DataError, match="2 names for 1 ids"):
        Categories(names=("a", "b"), ids=(2,))
    with pytest.raises(DataError, match="ascend"):
        Categories(names=("a", "b"), ids=(7, 2))
