"""The engine where there is no GPU: it is the model; what it refuses; and what it would record."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import recorded_graphs
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import implicit
from detection.cuda_graphs import Recorded
from detection.engine import Engine
from detection.models.detector import Detector
from detection.recipes import recipe


def model() -> Detector:
    torch.manual_seed(0)
    config = recipe("deqdet_digits").model
    return Detector(replace(config, decoder=replace(config.decoder, steps=3))).eval()


def test_on_a_cpu_it_is_the_model() -> None:
    detector, images = model(), torch.rand(2, 3, 64, 96) * 255
    sizes = torch.tensor([[64, 96], [50, 80]])
    with torch.inference_mode():
        wanted = detector(images, sizes)
    found = Engine(detector, dtype=torch.float32)(images, sizes)
    assert torch.equal(found.boxes, wanted.boxes) and torch.equal(found.logits, wanted.logits)


def test_in_bfloat16_boxes_stay_in_float32() -> None:
    detector, images = model(), torch.rand(1, 3, 64, 64) * 255
    sizes = torch.tensor([[64, 64]])
    exact = Engine(detector, dtype=torch.float32)(images, sizes)
    output = Engine(detector)(images, sizes)
    assert output.boxes.dtype == torch.float32
    torch.testing.assert_close(output.boxes, exact.boxes, rtol=0.05, atol=2.0)
    torch.testing.assert_close(output.logits.float(), exact.logits, rtol=0.05, atol=0.1)


def test_it_puts_the_model_in_evaluation_mode() -> None:
    detector = model().train()
    Engine(detector)
    assert not detector.training


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": torch.float64}, "use torch.bfloat16"), ({"most_shapes": 0}, "at least 1")],
)
def test_what_it_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(model(), **options)  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_gives_what_the_model_gives() -> None:
    detector = model().cuda()
    engine = Engine(detector, dtype=torch.float32)
    for seed in range(3):  # the first is recorded, the others replayed
        generator = torch.Generator().manual_seed(seed)
        images = (torch.rand(1, 3, 64, 96, generator=generator) * 255).cuda()
        sizes = torch.tensor([[64, 96 - seed]]).cuda()
        with torch.inference_mode():
            wanted = detector(images, sizes)
        found = engine(images, sizes)
        torch.testing.assert_close(found.boxes, wanted.boxes, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-3, atol=1e-3)


def test_an_engine_keeps_its_precision_under_autocast() -> None:
    images, sizes = torch.rand(1, 3, 64, 64) * 255, torch.tensor([[64, 64]])
    engine = Engine(model(), dtype=torch.float32)
    wanted = engine(images, sizes)
    with torch.autocast("cpu", torch.bfloat16):
        found = engine(images, sizes)
    assert found.logits.dtype == torch.float32 and torch.equal(found.logits, wanted.logits)


class CastsOfWeights(TorchDispatchMode):
    """Counts how often weights are converted."""

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.places, self.count = {weight.data_ptr() for weight in weights}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.count += args[0].data_ptr() in self.places
        return func(*args, **(kwargs or {}))


def test_weights_are_cast_once_for_all_refinements() -> None:
    """In inference mode autocast would cast them anew at each, which a graph would record."""
    counts = []
    for steps in (2, 5):
        detector = model()
        detector.decoder.config = replace(detector.decoder.config, steps=steps)
        with CastsOfWeights(detector.decoder.refinement.ffn.parameters()) as casts:
            Engine(detector, dtype=torch.bfloat16)(
                torch.zeros(1, 3, 64, 64), torch.tensor([[64, 64]])
            )
        counts.append(casts.count)
    assert counts[0] == counts[1] > 0


def test_inference_mode_around_it_changes_nothing() -> None:
    """Weights would be cast at each refinement, and buffers made in it could not be written to."""
    detector = model()
    with (
        CastsOfWeights(detector.decoder.refinement.ffn.parameters()) as casts,
        torch.inference_mode(),
    ):
        output = Engine(detector)(torch.zeros(1, 3, 64, 64), torch.tensor([[64, 64]]))
    assert casts.count == 4 and not output.boxes.is_inference()  # two weights, two biases


# -- what would be recorded, with a stand-in for CUDA graphs ---------------------------------------


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded_graphs.pretend(monkeypatch)
    monkeypatch.setattr(Engine, "_records", True)


def test_the_stand_in_replays_and_refuses_to_wait(recording: None) -> None:
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x.mul(2).add_(1)

    graph = Recorded(doubled, (torch.ones(2),), torch.device("cpu"))
    first = graph(torch.tensor([1.0, 2.0]))
    assert graph(torch.tensor([3.0, 4.0])).tolist() == [7, 9] and first.tolist() == [3, 5]
    with pytest.raises(RuntimeError, match="waits for the device"):
        Recorded(lambda x: x * x.sum().item(), (torch.ones(2),), torch.device("cpu"))


@pytest.mark.parametrize("solver", [implicit.Naive(), implicit.Anderson(memory=3)])
def test_a_replay_gives_all_that_the_model_gives(recording: None, solver: implicit.Solver) -> None:
    """Nothing in the whole model waits for the device, or depends on the first images."""
    detector = model()
    detector.decoder.config = replace(detector.decoder.config, solver=solver)
    engine, found, wanted = Engine(detector, dtype=torch.float32), [], []
    for seed in range(3):  # the first is recorded, the others replayed
        torch.manual_seed(seed)
        images, sizes = torch.rand(1, 3, 64, 96) * 255, torch.tensor([[64, 96 - seed]])
        found.append(engine(images, sizes))
        with torch.no_grad():
            wanted.append(detector(images, sizes))
    assert len(engine._recorded) == 1
    for mine, eager in zip(found, wanted, strict=True):
        assert mine.queries is not None and mine.steps.tolist() == [3]
        torch.testing.assert_close(mine, eager, rtol=1e-5, atol=1e-5)


def test_graphs_are_kept_by_shape_and_configuration(recording: None) -> None:
    detector = model()
    engine = Engine(detector, dtype=torch.float32, most_shapes=2)

    def shapes(width: int) -> list[tuple[int, ...]]:
        engine(torch.zeros(1, 3, 32, width), torch.tensor([[32, width]]))
        return [tuple(key[0])[3:] for key in engine._recorded]

    assert shapes(32) == [(32,)] and shapes(64) == [(32,), (64,)]
    assert shapes(32) == [(64,), (32,)]  # used last
    assert shapes(96) == [(32,), (96,)]
    detector.decoder.config = replace(detector.decoder.config, steps=2)
    assert shapes(96) == [(96,), (96,)]
    output = engine(torch.zeros(1, 3, 32, 96), torch.tensor([[32, 96]]))
    assert output.steps is not None and output.steps.tolist() == [2]
