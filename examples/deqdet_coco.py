"""Train, evaluate and draw DEQDet.

Without arguments this composes the embedded digits data set, trains DEQDet on it from random
weights on whatever the machine has, evaluates it and draws what it found:

    python examples/deqdet_coco.py

Pointed at a folder laid out as COCO 2017 it does the same there, on one GPU or several:

    python examples/deqdet_coco.py --data /path/to/coco --recipe deqdet_r50_1x
    torchrun --nproc_per_node 8 examples/deqdet_coco.py --data /path/to/coco --recipe deqdet_r50_1x

Two options do only a part of it:

    python examples/deqdet_coco.py --evaluate runs/…/checkpoints/best.safetensors
    python examples/deqdet_coco.py --predict a.jpg b.jpg --checkpoint runs/…/best.safetensors
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, get_args

import tyro
from rich.console import Console

from detection.checkpoints import CheckpointError
from detection.configuration import read_choice
from detection.data import (
    DataError,
    check_images,
    compose_digits,
    eval_transform,
    load_coco_folder,
    load_coco_split,
    read_image,
    train_transform,
)
from detection.distributed import DeviceError, Distributed, init_from_environment
from detection.models.backbones import PretrainedUnavailable
from detection.models.config import Gradient, Solver
from detection.prediction import evaluate, predict
from detection.pretrained import load_detector
from detection.recipes import recipe, recipe_names
from detection.report import draw_run
from detection.training.loop import TrainingError, train
from detection.training.matching import NonFiniteCost
from detection.training.recipe import Recipe
from detection.visualization import draw_detections, save_image

PROBLEMS = (
    CheckpointError,
    DataError,
    DeviceError,
    OSError,
    NonFiniteCost,
    PretrainedUnavailable,
    TrainingError,
    ValueError,
)
"""What a person can mend: told without a stack trace."""


@dataclass(frozen=True)
class Digits:
    """The embedded data set, used where no --data is given.

    Args:
        train_images: images to train on.
        val_images: images to evaluate on; their digits and photographs are others.
        size: side of the images in pixels.
        seed: of the composition.
    """

    train_images: int = 4000
    val_images: int = 500
    size: int = 128
    seed: int = 0

    def compose(self) -> Path:
        """The data set's folder below ``data/``, composed when it is first asked for."""
        name = f"digits-{self.train_images}-{self.val_images}-{self.size}px-seed{self.seed}"
        return compose_digits(
            Path("data") / name,
            train_images=self.train_images,
            val_images=self.val_images,
            size=self.size,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Options:
    """Train a detector, or only evaluate (--evaluate) or apply (--predict) one.

    Args:
        recipe: the settings to begin from; every one of them can be changed by the options
            below.
        data: folder laid out as COCO; by default the embedded digits are composed.
        output: folder of the run; by default a new one below runs/.
        resume: go on from the last checkpoint of --output.
        evaluate: only evaluate this checkpoint.
        predict: only detect objects in these images, with --checkpoint.
        checkpoint: what to detect with.
        threshold: lowest score that is drawn.
        device: cuda, cuda:1 or cpu; by default CUDA if there is one.
        digits: the embedded data set.
        settings: the recipe.
    """

    recipe: str = "deqdet_digits"
    data: Path | None = None
    output: Path | None = None
    resume: bool = False
    evaluate: Path | None = None
    predict: tuple[Path, ...] = ()
    checkpoint: Path | None = None
    threshold: float = 0.3
    device: str | None = None
    digits: Digits = field(default_factory=Digits)
    settings: Annotated[Recipe, tyro.conf.arg(name="")] = field(
        default_factory=lambda: recipe("deqdet_digits")
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the example; returns the exit status."""
    console = Console()
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        check(options)
        with init_from_environment(options.device) as distributed:
            if options.evaluate:
                run_evaluation(options, distributed, console)
            elif options.predict:
                run_prediction(options, distributed, console)
            else:
                run_training(options, distributed, console)
    except PROBLEMS as error:
        Console(stderr=True).print(
            f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print(
            "Interrupted. A run goes on from the end of its last whole epoch with --resume and "
            "the same --output."
        )
        return 130
    return 0


def check(options: Options) -> None:
    """Raise `ValueError` for options that contradict each other."""
    if options.evaluate and options.predict:
        raise ValueError("--evaluate and --predict exclude each other: give one of them.")
    if options.predict and options.checkpoint is None:
        raise ValueError("--predict needs --checkpoint: the .safetensors file of a run.")
    if options.checkpoint and not options.predict:
        raise ValueError(
            "--checkpoint goes with --predict IMAGES; to score it use --evaluate CHECKPOINT."
        )
    if options.resume and (options.evaluate or options.predict):
        raise ValueError("--resume goes with training alone.")
    if options.resume and options.output is None:
        raise ValueError("--resume needs --output: the folder of the run to go on with.")
    if not 0 <= options.threshold <= 1:
        raise ValueError(f"--threshold {options.threshold}: must lie in [0, 1].")


def run_training(options: Options, distributed: Distributed, console: Console) -> None:
    """Data, training, evaluation, pictures."""
    settings, started = options.settings, time.monotonic()
    root = options.data or compose_digits_once(options.digits, distributed, console)
    train_set, val_set = load_coco_folder(
        root,
        train_transform(settings.augmentation),
        eval_transform(settings.augmentation),
        skip_empty=settings.skip_empty,
    )
    if distributed.is_main:
        for dataset in (train_set, val_set):
            check_images(dataset)
    folder = options.output or new_run(options.recipe, distributed)
    trained = train(
        settings.for_classes(len(train_set.categories)),
        train_set,
        val_set,
        folder,
        distributed=distributed,
        resume=options.resume,
        console=console,
    )
    if distributed.is_main:
        console.print(trained.scores.table())
        console.print(trained.scores.class_table())
        pictures = draw_run(trained.model, val_set, folder, options.threshold)
        minutes = (time.monotonic() - started) / 60
        console.print(f"{minutes:.1f} minutes in all. Written to {folder}:")
        for path in (folder / "log.jsonl", folder / "config.json", folder / "checkpoints"):
            console.print(f"  {path.name}")
        for path in pictures:
            console.print(f"  {path.name}")


def run_evaluation(options: Options, distributed: Distributed, console: Console) -> None:
    """The COCO table of a checkpoint on the validation set."""
    assert options.evaluate is not None
    model, settings, categories = load_detector(options.evaluate)
    root = options.data or compose_digits_once(options.digits, distributed, console)
    dataset = load_coco_split(
        root, "val", eval_transform(settings.augmentation), categories=categories
    )
    scores = evaluate(
        model.to(distributed.device),
        dataset,
        batch_size=settings.optimization.batch_size,
        workers=settings.workers,
        max_detections=settings.max_detections,
        distributed=distributed,
    )
    if distributed.is_main:
        console.print(scores.table())
        console.print(scores.class_table())


def run_prediction(options: Options, distributed: Distributed, console: Console) -> None:
    """Pictures of the detections on some images, and the detections as JSON."""
    assert options.checkpoint is not None
    model, settings, categories = load_detector(options.checkpoint)
    found = predict(
        model.to(distributed.device),
        options.predict,
        settings.augmentation,
        settings.max_detections,
    )
    folder = options.output or new_run("predictions", distributed)
    records = []
    for number, (path, detections) in enumerate(zip(options.predict, found, strict=True)):
        image = read_image(path)
        picture = draw_detections(
            image,
            detections,
            categories,
            threshold=options.threshold,
            scale=max(1, min(480 // min(image.shape[1:]), 2000 // max(image.shape[1:]))),
        )
        target = folder / f"{number:03d}_{path.stem}.png"
        save_image(picture, target)
        console.print(f"{path}: {len(detections.above(options.threshold))} objects, {target}")
        for record in detections.to_coco(number, categories):
            name = categories.names[categories.index_of(record["category_id"])]
            records.append({"file": str(path), "category": name, **record})
    (folder / "detections.json").write_text(json.dumps(records, indent=1) + "\n")


def compose_digits_once(digits: Digits, distributed: Distributed, console: Console) -> Path:
    """The main process composes, the others find it composed."""
    if distributed.is_main:
        console.print("Composing the digits data set (or finding it composed).")
        digits.compose()
    distributed.barrier()
    return digits.compose()


def new_run(name: str, distributed: Distributed) -> Path:
    """A folder below ``runs/`` named after the time, the same for all processes."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{name}-{distributed.gather_objects(stamp)[0]}"


def parse(arguments: list[str]) -> Options:
    """Options of a command line; the recipe is read first, since it decides the defaults."""
    name = "deqdet_digits"
    for i, argument in enumerate(arguments):
        if argument == "--recipe" and i + 1 < len(arguments):
            name = arguments[i + 1]
        elif argument.startswith("--recipe="):
            name = argument.removeprefix("--recipe=")
    with registry():
        return tyro.cli(
            Options,
            args=arguments,
            default=Options(recipe=name, settings=recipe(name)),
            description=f"{__doc__}\nRecipes: {', '.join(recipe_names())}",
            config=(tyro.conf.AvoidSubcommands,),
        )


def registry() -> tyro.constructors.ConstructorRegistry:
    """Solvers and gradients as options: ``--model.decoder.solver "Anderson(memory=3)"``."""
    rules = tyro.constructors.ConstructorRegistry()

    @rules.primitive_rule
    def choice(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec[object] | None:
        members = get_args(info.type)
        options = tuple(member for member in members if member is not type(None))
        if not options or not set(options) <= {*get_args(Solver), *get_args(Gradient)}:
            return None
        optional = len(options) < len(members)
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="|".join([f"{o.__name__}(…)" for o in options] + ["None"] * optional),
            instance_from_str=lambda texts: (
                None if optional and texts[0] == "None" else read_choice(texts[0], options)
            ),
            is_instance=lambda value: isinstance(value, members),
            str_from_instance=lambda value: [repr(value)],
        )

    return rules


if __name__ == "__main__":
    sys.exit(main())
