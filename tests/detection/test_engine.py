"""The engine where there is no GPU: it is the model; what it refuses; and what it would record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import fake_cuda
import pytest
import recorded_graphs
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import implicit
from detection.cuda_graphs import Recorded
from detection.decoder.layer import LayerConfig
from detection.decoder.sparse_rcnn import SparseRCNNLayerConfig
from detection.engine import Engine
from detection.models.config import BackboneConfig, EquilibriumConfig, ModelConfig
from detection.models.decoders import Output
from detection.models.detector import Detector
from detection.recipes import recipe
from implicit.stopping import Stop


@dataclass(frozen=True)
class Foreign(implicit.WholeSolver):
    """A solver with a loop of its own."""

    def run(self, f: Callable[[Tensor], Tensor], y0: Tensor, stop: Stop) -> Tensor:
        return f(y0)


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


# -- weights, which are cast once ------------------------------------------------------------------


class CastsOfWeights(TorchDispatchMode):
    """Counts how often weights are converted, wholly or in part."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.weights = [w.untyped_storage() for m in modules for w in m.parameters()]
        self.places, self.count = {weight._cdata for weight in self.weights}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.count += args[0].untyped_storage()._cdata in self.places
        return func(*args, **(kwargs or {}))


def frozen(detector: Detector) -> Detector:
    """Autocast keeps no cast of a weight that wants no gradient."""
    return detector.requires_grad_(False)


EXAMPLE = torch.zeros(1, 3, 64, 64), torch.tensor([[64, 64]])


@pytest.mark.parametrize("prepare", [lambda detector: detector, frozen])
@pytest.mark.parametrize("inference", [False, True])
def test_no_call_casts_a_weight(prepare: Callable[[Detector], Detector], inference: bool) -> None:
    detector = prepare(model())
    with torch.inference_mode(inference):
        engine = Engine(detector)
        with CastsOfWeights(detector, engine._own) as casts:
            output = engine(*EXAMPLE)
            engine.encode(*EXAMPLE)
        assert not output.boxes.is_inference()
    assert casts.count == 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), CastsOfWeights(detector) as casts:
        detector(*EXAMPLE)
    assert casts.count > 50  # without an engine


def in_both_ways(
    backbone: str, layer: LayerConfig | SparseRCNNLayerConfig, dtype: torch.dtype
) -> tuple[Output, Output]:
    """What a detector gives by the engine and by itself under autocast."""
    torch.manual_seed(0)
    decoder = EquilibriumConfig(steps=3)
    config = ModelConfig(BackboneConfig(backbone, pretrained=False), layer=layer, decoder=decoder)
    detector = Detector(config).eval()
    images, sizes = torch.rand(2, 3, 64, 96) * 255, torch.tensor([[64, 96], [50, 80]])
    with torch.no_grad(), torch.autocast("cpu", dtype):
        wanted = detector(images, sizes)
    return Engine(detector, dtype=dtype)(images, sizes), wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backbone", ["small", "resnet18"])
def test_it_is_the_model_under_autocast_to_the_bit(backbone: str, dtype: torch.dtype) -> None:
    layer = LayerConfig(points=8, out_points=16, ffn_channels=256)
    found, wanted = in_both_ways(backbone, layer, dtype)
    assert torch.equal(found.logits, wanted.logits) and torch.equal(found.boxes, wanted.boxes)


def test_it_is_sparse_rcnn_under_autocast_but_for_rounding() -> None:
    """torch's attention has a shorter way for float32, which rounds otherwise."""
    found, wanted = in_both_ways("small", SparseRCNNLayerConfig(), torch.bfloat16)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0.02, atol=0.02)
    torch.testing.assert_close(found.boxes, wanted.boxes, rtol=0.02, atol=0.5)


@pytest.mark.parametrize(
    "solver", [implicit.NewtonKrylov(), implicit.Best(implicit.NewtonKrylov()), Foreign()], ids=repr
)
def test_a_solver_that_waits_is_not_recorded(
    solver: implicit.Solver, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model(), dtype=torch.float32)
    monkeypatch.setattr(Engine, "_device", torch.device("cuda"))
    assert engine._records
    decoder = engine.model.decoder
    decoder.config = replace(decoder.config, eval_solver=solver)
    assert not engine._records


def test_what_becomes_of_the_model_is_not_seen() -> None:
    """But in float32, where there is no copy."""
    for dtype, seen in ((torch.bfloat16, False), (torch.float32, True)):
        detector = model()
        engine = Engine(detector, dtype=dtype)
        before = engine(*EXAMPLE).logits
        with torch.no_grad():
            for parameter in detector.parameters():
                parameter.mul_(1.5)
        assert torch.equal(engine(*EXAMPLE).logits, before) is not seen


def test_cudas_autocast_casts_no_weight_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lists of operators are others than those of the CPU's."""
    with fake_cuda.pretend(monkeypatch):
        config = replace(recipe("deqdet_digits").model, decoder=EquilibriumConfig(steps=3))
        detector = frozen(Detector(config).eval())
        engine = Engine(detector)
        images, sizes = torch.zeros(1, 3, 64, 64), torch.zeros(1, 2, dtype=torch.int64)
        with CastsOfWeights(detector, engine._own) as casts, torch.no_grad():
            output = engine._run(images, sizes)
        assert casts.count == 0 and output.logits.dtype == torch.bfloat16
        assert output.boxes.dtype == torch.float32 and output.boxes.is_cuda
        with CastsOfWeights(detector) as casts, torch.no_grad(), engine._precision("cuda"):
            detector(images, sizes, stop=implicit.Steps(3))
        assert casts.count > 90  # at every refinement


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


@pytest.mark.parametrize("prepare", [lambda detector: detector, frozen])
def test_no_replay_casts_a_weight(recording: None, prepare: Callable[[Detector], Detector]) -> None:
    detector = prepare(model())
    engine = Engine(detector)
    engine(*EXAMPLE)
    with CastsOfWeights(detector, engine._own) as casts:
        engine(*EXAMPLE)
    (graph,) = (recorded._graph for recorded in engine._recorded.values())
    assert casts.count == 0 and len(graph.calls) > 100
    with torch.no_grad(), CastsOfWeights(detector) as casts:
        recorded = Recorded(
            torch.autocast("cpu", torch.bfloat16)(detector), EXAMPLE, torch.device("cpu")
        )
        casts.count = 0
        recorded(*EXAMPLE)
    assert casts.count > 50  # without an engine


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
