"""Every image once, batches of like shape, and an order that only seed and epoch decide."""

from __future__ import annotations

import json
import pickle
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from detection.data import (
    AugmentationConfig,
    Batch,
    CocoDataset,
    DataError,
    Target,
    collate,
    eval_transform,
    make_loader,
    train_transform,
)
from detection.data.loading import (
    EvaluationBatches,
    SeededDataset,
    TrainingBatches,
    padded_size,
)

AUGMENTATION = AugmentationConfig((48,), 96, scale_jitter=(0.8, 1.25), translate=0.1)
SIZES = st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen images, five of them portrait; image k has k % 3 boxes."""
    root = tmp_path_factory.mktemp("loading")
    sizes = [(40, 50)] * 6 + [(50, 40)] * 5 + [(40, 80)] * 3
    images, annotations = [], []
    for k, (height, width) in enumerate(sizes):
        images.append({"id": k, "file_name": f"{k}.png", "height": height, "width": width})
        Image.new("RGB", (width, height), (k, 0, 0)).save(root / f"{k}.png")
        for j in range(k % 3):
            record = {"id": len(annotations) + 1, "image_id": k, "category_id": 1}
            annotations.append({**record, "bbox": [5 * j, 4, 20, 10]})
    categories = [{"id": 1, "name": "thing"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "instances.json").write_text(json.dumps(content))
    return root


def dataset_of(folder: Path, training: bool) -> CocoDataset:
    transform = (train_transform if training else eval_transform)(AUGMENTATION)
    return CocoDataset(folder, folder / "instances.json", transform)


def target(boxes: int = 1) -> Target:
    return Target(torch.ones(boxes, 4), torch.zeros(boxes, dtype=torch.int64), 7, (9, 9))


def test_collate_pads_right_and_bottom() -> None:
    images = [torch.full((3, 40, 33), 9, dtype=torch.uint8), torch.full((3, 20, 65), 7).byte()]
    batch = collate([(images[0], target()), (images[1], target(0))])
    assert batch.images.shape == (2, 3, 64, 96) and batch.images.dtype == torch.uint8
    assert batch.sizes.tolist() == [[40, 33], [20, 65]] and batch.sizes.dtype == torch.int64
    for padded, image in zip(batch.images, images, strict=True):
        assert padded[:, : image.shape[1], : image.shape[2]].equal(image)
        assert padded.sum() == image.sum()
    assert [len(t.boxes) for t in batch.targets] == [1, 0]
    moved = batch.to("meta")
    assert moved.images.device.type == moved.targets[0].boxes.device.type == "meta"


@given(size=st.tuples(st.integers(1, 2000), st.integers(1, 2000)))
def test_padded_size(size: tuple[int, int]) -> None:
    for side, padded in zip(size, padded_size(size), strict=True):
        assert padded % 32 == 0 and 0 <= padded - side < 32


@given(
    sizes=SIZES,
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 4),
    epoch=st.integers(0, 5),
)
def test_training_batches(
    sizes: list[tuple[int, int]], batch_size: int, world_size: int, epoch: int
) -> None:
    portrait, whole = [height > width for height, width in sizes], batch_size * world_size
    full = sum(portrait) // whole + (len(sizes) - sum(portrait)) // whole
    if not full:
        with pytest.raises(DataError, match=f"do not fill one batch of {batch_size}"):
            TrainingBatches(sizes, batch_size, seed=0, rank=0, world_size=world_size)
        return
    seen: list[int] = []
    for rank in range(world_size):
        batches = TrainingBatches(sizes, batch_size, 0, rank, world_size)
        batches.set_epoch(epoch)
        drawn = list(batches)
        assert len(drawn) == len(batches) == full  # the same on every rank
        for batch in drawn:
            assert len(batch) == batch_size
            assert len({portrait[index] for index, _ in batch}) == 1
            seen.extend(index for index, _ in batch)
    assert len(seen) == len(set(seen)) == full * whole


@given(sizes=SIZES, batch_size=st.integers(1, 3), world_size=st.integers(1, 3))
def test_what_all_processes_draw_is_what_one_draws(
    sizes: list[tuple[int, int]], batch_size: int, world_size: int
) -> None:
    """Step by step, with the seeds of the images."""
    whole = batch_size * world_size
    try:
        wanted = list(TrainingBatches(sizes, whole, 5))
    except DataError:
        return
    drawn = [TrainingBatches(sizes, batch_size, 5, rank, world_size) for rank in range(world_size)]
    together = [list(chain.from_iterable(parts)) for parts in zip(*drawn, strict=True)]
    assert together == wanted


@given(sizes=SIZES, start=st.integers(0, 20))
def test_an_epoch_is_gone_on_with_at_any_batch(sizes: list[tuple[int, int]], start: int) -> None:
    batches = TrainingBatches(sizes, 1, seed=2)
    batches.set_epoch(3)
    wanted = list(batches)
    batches.set_epoch(3, start=start)
    assert list(batches) == wanted[start:]
    assert len(batches) == len(wanted)  # of a whole epoch


def test_order_depends_on_seed_and_epoch_alone() -> None:
    sizes = [(4, 6)] * 30

    def draw(seed: int, *epochs: int) -> list[list[tuple[int, int]]]:
        batches = TrainingBatches(sizes, 4, seed)
        for epoch in epochs:
            batches.set_epoch(epoch)
            drawn = list(batches)
        return drawn

    assert draw(3, 2) == draw(3, 0, 1, 2)  # resumed or not
    assert draw(3, 2) != draw(3, 1)
    assert draw(3, 2) != draw(4, 2)


def test_every_image_is_drawn_equally_often() -> None:
    batches = TrainingBatches([(4, 6)] * 5, 2, seed=0)
    counts = [0] * 5
    for epoch in range(500):
        batches.set_epoch(epoch)
        for batch in batches:
            for index, _ in batch:
                counts[index] += 1
    assert all(abs(count - 400) < 40 for count in counts)  # 4.5 standard deviations


@given(sizes=SIZES, batch_size=st.integers(1, 5), world_size=st.integers(1, 4))
def test_evaluation_batches(sizes: list[tuple[int, int]], batch_size: int, world_size: int) -> None:
    seen = []
    for rank in range(world_size):
        batches = EvaluationBatches(sizes, batch_size, rank, world_size)
        assert len(list(batches)) == len(batches)
        for batch in batches:
            assert 1 <= len(batch) <= batch_size
            assert len({padded_size(sizes[index]) for index in batch}) == 1
            seen.extend(batch)
    assert sorted(seen) == list(range(len(sizes)))


def content(batches: list[Batch]) -> list[tuple[object, ...]]:
    return [(batch.images.tolist(), [t.boxes.tolist() for t in batch.targets]) for batch in batches]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_batches_do_not_depend_on_workers_or_on_the_past(folder: Path) -> None:
    dataset = dataset_of(folder, training=True)
    here = make_loader(dataset, 2, training=True, workers=0, seed=1)
    there = make_loader(dataset, 2, training=True, workers=2, seed=1)
    list(there)  # an epoch that `here` never saw
    torch.manual_seed(99)
    for loader in (here, there):
        loader.set_epoch(4)
    expected = content(list(here))
    assert content(list(there)) == expected
    assert content(list(here)) == expected
    here.set_epoch(5)
    assert content(list(here)) != expected


def test_loading_leaves_the_global_generator_alone(folder: Path) -> None:
    loader = make_loader(dataset_of(folder, True), 2, training=True, workers=0, seed=1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(loader)
    assert torch.get_rng_state().equal(before)


def test_images_are_augmented_independently(folder: Path) -> None:
    seeded = SeededDataset(dataset_of(folder, training=True))
    assert seeded[2, 5][1].boxes.equal(seeded[2, 5][1].boxes)
    assert not seeded[2, 5][1].boxes.equal(seeded[2, 6][1].boxes)


def test_evaluation_loader(folder: Path) -> None:
    dataset = dataset_of(folder, training=False)
    ids = []
    for rank in range(2):
        loader = make_loader(dataset, 4, training=False, workers=0, seed=0, rank=rank, world_size=2)
        for batch in loader:
            for padded, size, one in zip(batch.images, batch.sizes, batch.targets, strict=True):
                height, width = size.tolist()
                assert tuple(padded.shape[-2:]) == padded_size((height, width))
                assert (height, width) == AUGMENTED[one.original_size]
                assert padded[0, 0, 0] == one.image_id  # the colour is the id
                ids.append(one.image_id)
    assert sorted(ids) == list(range(14))


AUGMENTED = {(40, 50): (48, 60), (50, 40): (60, 48), (40, 80): (48, 96)}


def test_evaluation_without_a_known_size_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="eval_transform"):
        make_loader(dataset_of(folder, True), 2, training=False, workers=0, seed=0)
    plain = CocoDataset(folder, folder / "instances.json")
    loader = make_loader(plain, 8, training=False, workers=0, seed=0)
    assert sum(len(batch) for batch in loader) == 14


def test_what_workers_receive_can_be_pickled(folder: Path) -> None:
    loader = make_loader(dataset_of(folder, True), 2, training=True, workers=0, seed=0)
    copy = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    assert copy[1]([copy[0][0, 1]]).images.shape[0] == 1


@pytest.mark.parametrize(
    ("name", "value"), [("batch_size", 0), ("workers", -1), ("seed", -1), ("rank", 1)]
)
def test_impossible_arguments(folder: Path, name: str, value: int) -> None:
    arguments = {"batch_size": 2, "workers": 0, "seed": 0, name: value}
    with pytest.raises(ValueError, match=f"{name}={value}"):
        make_loader(dataset_of(folder, True), training=True, **arguments)
