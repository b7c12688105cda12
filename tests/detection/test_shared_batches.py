"""A batch that is shared by processes, or done in parts, trains as it does at once.

"As" means: the same noise for each image, losses divided by the objects of the whole batch, and
float32 sums that differ in their order alone.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_runs import differences, small_recipe
from torch import Tensor

from detection.checkpoints import load_training_state, load_weights
from detection.data import compose_digits, load_coco_folder
from detection.data.loading import make_loader
from detection.data.transforms import eval_transform, train_transform
from detection.data.types import Batch, Target
from detection.distributed import Distributed, init_from_environment
from detection.models.config import PerturbationConfig, RecurrentConfig, StackedConfig
from detection.models.detector import Detector
from detection.training.loop import TrainingError, train
from detection.training.progress import read_json_lines
from detection.training.recipe import Recipe
from detection.training.step import Step

TOLERANCE = 2e-6
"""Of losses and gradients in float32, relative to the largest: some ten roundings."""


def noisy_recipe(**changes: Any) -> Recipe:
    """Noise before nearly every step of the path, in contents and boxes."""
    base = small_recipe(average=0.9)
    noise = PerturbationConfig(content=0.1, position=4.0, probability=0.9)
    decoder = replace(base.model.decoder, perturbation=noise)
    return replace(
        base,
        model=replace(base.model, decoder=decoder),
        # The sizes of images decide how they are padded, which is done process by process.
        augmentation=replace(base.augmentation, short_sides=(64,)),
        optimization=replace(base.optimization, epochs=2, lr=1e-4, **changes),
        skip_empty=False,
        save_minutes=60.0,
    )


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of which most have no objects, so that some process's batches have none.

    In those to evaluate on, whose number no number of processes divides, an object fills the image:
    that is what an untrained model says, so its AP is not 0.
    """
    root = compose_digits(
        tmp_path_factory.mktemp("data") / "digits", train_images=24, val_images=7, size=64
    )
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    chosen = sorted({record["image_id"] for record in content["annotations"]})[:4]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in chosen]
    path.write_text(json.dumps(content))
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    first = {a["image_id"]: a for a in content["annotations"]}.values()
    content["annotations"] = [{**a, "bbox": [1, 1, 62, 62], "area": 62 * 62} for a in first]
    path.write_text(json.dumps(content))
    return root


def sets(recipe: Recipe, root: Path) -> Any:
    return load_coco_folder(
        root, train_transform(recipe.augmentation), eval_transform(recipe.augmentation)
    )


def first_batch(recipe: Recipe, root: Path, rank: int = 0, world_size: int = 1) -> Batch:
    loader = make_loader(
        sets(recipe, root)[0],
        recipe.optimization.batch_size // world_size,
        training=True,
        workers=0,
        seed=recipe.seed,
        rank=rank,
        world_size=world_size,
    )
    loader.set_epoch(1)
    return next(iter(loader))


def gradients(step: Step, batch: Batch) -> dict[str, Tensor]:
    """Of one step, before clipping, with the weights left as they are."""
    kept: dict[str, Tensor] = {}

    def keep(_: Any = None) -> None:
        for name, parameter in step.detector.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                kept[name] = parameter.grad.clone()

    step.scaler.unscale_ = keep  # type: ignore[method-assign]
    step(batch)
    return kept


def detector(recipe: Recipe) -> Detector:
    torch.manual_seed(7)
    model = Detector(recipe.model)
    with torch.no_grad():  # at the start the box heads are 0, and hide what depends on them
        for name, parameter in model.named_parameters():
            if "box_head" in name:
                parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative to the largest number of all."""
    assert a.keys() == b.keys()
    scale = max(float(tensor.abs().max()) for tensor in a.values())
    return max(float((a[name] - b[name]).abs().max()) for name in a) / scale


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_those_of_the_batch(digits: Path, parts: int) -> None:
    """The same losses and gradients, to the rounding of sums; noise and empty parts included."""
    whole, divided = noisy_recipe(accumulate=1), noisy_recipe(accumulate=parts)
    batch = first_batch(whole, digits)
    counts = [len(target.labels) for target in batch.targets]
    assert 0 < sum(counts) and 0 in [sum(counts[i : i + 2]) for i in range(0, 8, 2)]
    steps = [Step(detector(recipe), recipe, Distributed(), 3) for recipe in (whole, divided)]
    found = [gradients(step, batch) for step in steps]
    assert largest_difference(*found) < TOLERANCE
    records = [step(batch) for step in steps]
    assert records[0] == pytest.approx(records[1], rel=20 * TOLERANCE)


def test_noise_is_that_of_the_place_in_the_batch_and_of_the_step(digits: Path) -> None:
    """It changes from step to step, and does so again in a run of the same seed."""
    recipe = noisy_recipe()
    batch = first_batch(recipe, digits)

    def losses(seed: int, count: int) -> float:
        step = Step(detector(recipe), replace(recipe, seed=seed), Distributed(), 3)
        step.count = count
        return step(batch)["loss"]

    assert losses(0, 0) == losses(0, 0)
    assert len({losses(0, 0), losses(0, 1), losses(1, 0)}) == 3


WORKER = f"""
import sys, pathlib, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_shared_batches
torch.set_num_threads(1)
test_shared_batches.work(*map(pathlib.Path, sys.argv[1:]))
"""


def work(root: Path, folder: Path) -> None:
    """What each process does: a whole run, and one step of every kind of decoder."""
    with init_from_environment("cpu") as here:
        for name, recipe in decoders().items():
            batch = first_batch(recipe, root, here.rank, here.world_size)
            step = Step(detector(recipe), recipe, here, 3)
            found = gradients(step, batch)
            objects = here.gather_objects(sum(len(target.labels) for target in batch.targets))
            if here.is_main:
                torch.save((found, objects), folder / f"{name}-{here.world_size}.pt")
        recipe, run = noisy_recipe(), folder / f"run{here.world_size}"
        train(recipe, *sets(recipe, root), run, distributed=here)
        # As if it had been killed in its second epoch.
        resumed = folder / f"resumed{here.world_size}"
        if here.is_main:
            shutil.copytree(run, resumed)
            for path in resumed.glob("checkpoints/step_000006.*"):
                path.unlink()
        here.barrier()
        train(recipe, *sets(recipe, root), resumed, distributed=here, resume=True)


def decoders() -> dict[str, Recipe]:
    base = noisy_recipe()
    return {
        "deq": base,
        **{
            name: replace(base, model=replace(base.model, decoder=decoder))
            for name, decoder in (
                ("stacked", StackedConfig(layers=2)),
                ("recurrent", RecurrentConfig(steps=3)),
            )
        },
    }


def processes(code: str, arguments: list[str], count: int = 2) -> list[str]:
    """What so many processes that talk through gloo write to their standard errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env={
                **os.environ,
                **{"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * count, "\n".join(errors)
    return errors


@pytest.fixture(scope="module")
def two(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes did, and of what one process does with the whole batch."""
    folder = tmp_path_factory.mktemp("shared")
    processes(WORKER, [str(digits), str(folder)])
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WORLD_SIZE", raising=False)
        work(digits, folder)
    return folder


@pytest.mark.fault(6)
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["deq", "stacked", "recurrent"])
def test_two_processes_have_the_gradients_of_one(two: Path, kind: str) -> None:
    """Fault 6: one process's batch has no objects, another's has.

    Expected: the gradients of one process with the whole batch.
    """
    (one, (objects,)), (both, counts) = (torch.load(two / f"{kind}-{n}.pt") for n in (1, 2))
    assert 0 in counts and sum(counts) == objects > 0
    assert largest_difference(one, both) < TOLERANCE


@pytest.mark.slow
def test_two_processes_have_the_losses_and_the_ap_of_one(two: Path) -> None:
    """Faults: collectives on rank 0 alone, images that are evaluated twice or not at all."""
    one, both = (read_json_lines(two / f"run{n}" / "log.jsonl") for n in (1, 2))
    assert len(one) == len(both) == 8
    for wanted, found in zip(one, both, strict=True):
        if "scores" in wanted:
            assert found["scores"]["AP"] == pytest.approx(wanted["scores"]["AP"], abs=1e-9) != 0
        else:
            assert found == pytest.approx(wanted, rel=20 * TOLERANCE)


@pytest.mark.slow
def test_two_processes_have_the_weights_of_one(two: Path) -> None:
    """Those of the model, and of its average."""
    name = "checkpoints/step_000006.safetensors"
    states = [load_training_state(two / f"run{n}" / name)["step"] for n in (1, 2)]
    assert largest_difference(*(state["model"] for state in states)) < 1e-5
    averages = [load_weights(two / f"run{n}" / name)[0] for n in (1, 2)]
    assert largest_difference(*averages) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_run_of_two_processes_is_resumed_to_the_bit(two: Path, count: int) -> None:
    """With the average, and the random generators of each process."""
    found = differences(two / f"run{count}", two / f"resumed{count}")
    assert [name for name in found if "step_000003" not in name] == []
    state = load_training_state(two / f"resumed{count}" / "checkpoints" / "step_000006.safetensors")
    assert len(state["random"]) == count


def test_a_batch_that_cannot_be_divided_is_refused(digits: Path, tmp_path: Path) -> None:
    recipe = noisy_recipe(accumulate=3)
    with pytest.raises(TrainingError, match="8 images .* by 1 processes, each in 3 parts"):
        train(recipe, *sets(recipe, digits), tmp_path / "run")


def test_a_batch_is_split_with_its_padding() -> None:
    targets = tuple(
        Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), i, (8, 8)) for i in range(4)
    )
    batch = Batch(torch.rand(4, 3, 32, 64), torch.full((4, 2), 8), targets)
    parts = batch.split(2)
    assert [[t.image_id for t in part.targets] for part in parts] == [[0, 1], [2, 3]]
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
