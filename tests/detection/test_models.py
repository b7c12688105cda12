"""The three detectors: what goes in and out, what is learned, and losses written out as loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import implicit
from detection.data.types import Target
from detection.decoder.layer import LayerConfig, RefinementLayer
from detection.decoder.movement import Settled
from detection.decoder.queries import Queries
from detection.models.config import (
    BackboneConfig,
    DecoderConfig,
    EquilibriumConfig,
    Gradient,
    ModelConfig,
    NeckConfig,
    PerturbationConfig,
    RecurrentConfig,
    Solver,
    StackedConfig,
)
from detection.models.decoders import (
    Decoder,
    EquilibriumDecoder,
    RecurrentDecoder,
    StackedDecoder,
    build_decoder,
)
from detection.models.detector import PIXEL_MEAN, PIXEL_STD, Detector
from detection.training.losses import Criterion, matched_queries
from detection.training.matching import Matcher

LAYER = LayerConfig(
    content_dim=32,
    feature_channels=32,
    heads=4,
    groups=2,
    points=4,
    out_points=6,
    ffn_channels=24,
    num_classes=3,
)
QUIET = PerturbationConfig(content=0, position=0)
EQUILIBRIUM = EquilibriumConfig(
    train_steps=5,
    steps=4,
    initial_points=5,
    extra_supervision=2,
    multiples=1,
    spacing=3,
    perturbation=QUIET,
)
DECODERS: dict[str, DecoderConfig] = {
    "stacked": StackedConfig(layers=3),
    "recurrent": RecurrentConfig(steps=3, initial_points=5),
    "equilibrium": EQUILIBRIUM,
    "perturbed": replace(EQUILIBRIUM, perturbation=PerturbationConfig(probability=0.5)),
}
HEIGHT, WIDTH, QUERIES = 64, 96, 7
SIZES = torch.tensor([[64, 90], [50, 96]])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def awakened(module: nn.Module) -> nn.Module:
    """Weights at random also where they start at zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return module


def detector(name: str) -> Detector:
    model = Detector(
        ModelConfig(
            BackboneConfig("small", pretrained=False),
            layer=LAYER,
            decoder=DECODERS[name],
            num_queries=QUERIES,
        )
    )
    awakened(model)
    return model


def decoder_of(config: DecoderConfig) -> Decoder:
    decoder = build_decoder(LAYER, config).double()
    awakened(decoder)
    return decoder


def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, HEIGHT, WIDTH), dtype=torch.uint8)


def features(batch: int = 2) -> list[Tensor]:
    return [
        torch.randn(batch, 32, HEIGHT // s, WIDTH // s, dtype=torch.float64, requires_grad=True)
        for s in LAYER.strides
    ]


def queries(batch: int = 2) -> Queries:
    boxes = torch.tensor([0.0, 0.0, 90.0, 60.0], dtype=torch.float64).expand(batch, QUERIES, 4)
    position = torch.tensor([45.0, 30.0, 6.2, -0.58], dtype=torch.float64)
    content = torch.randn(batch, QUERIES, 32, dtype=torch.float64, requires_grad=True)
    return Queries(position.expand(batch, QUERIES, 4), content, boxes)


def targets(objects: int = 3, dtype: torch.dtype = torch.float32) -> list[Target]:
    boxes = torch.tensor([[4, 4, 40, 50], [30, 10, 60, 30], [50, 5, 85, 45]], dtype=dtype)
    labels = torch.tensor([2, 0, 1])
    return [Target(boxes[:n], labels[:n], image, (64, 96)) for image, n in enumerate((objects, 0))]


def criterion(objects: int = 3, dtype: torch.dtype = torch.float32) -> Criterion:
    truth = targets(objects, dtype)
    return Criterion(truth, SIZES, normaliser=matched_queries(truth, QUERIES))


# The detector


@pytest.mark.parametrize("name", DECODERS)
def test_output(name: str) -> None:
    with torch.no_grad():
        output = detector(name).eval()(images(), SIZES)
    assert output.logits.shape == (2, QUERIES, 3)
    assert output.boxes.shape == (2, QUERIES, 4)
    assert bool(output.logits.isfinite().all()) and bool(output.boxes.isfinite().all())
    assert bool((output.boxes[..., 2:] > output.boxes[..., :2]).all())


OUTPUTS = {
    "stacked": ["layer1", "layer2", "layer3"],
    "recurrent": ["init", "iter1", "iter2"],
    "equilibrium": ["init", "init+1", "init+2", "iter1", "iter3", "iter5"],
    "perturbed": ["init", "init+1", "init+2", "iter1", "iter3", "iter5"],
}


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("objects", [3, 0])
def test_losses(name: str, objects: int) -> None:
    """Every output is scored; the total is their sum, and carries the only gradient."""
    losses = detector(name).losses(images(), SIZES, criterion(objects))
    assert list(losses.losses) == OUTPUTS[name]
    assert losses.total.shape == () and losses.total.requires_grad
    assert bool(losses.total.isfinite()) and float(losses.total.detach()) > 0
    for parts in (losses.losses, losses.parts):
        assert not any(value.requires_grad for value in parts.values())
        total = torch.stack(list(parts.values())).sum()
        torch.testing.assert_close(total, losses.total.detach(), rtol=1e-5, atol=0)
    boxes_count = float(losses.parts["l1"]) > 0 and float(losses.parts["giou"]) > 0
    assert boxes_count == (objects > 0)


@pytest.mark.parametrize("name", DECODERS)
def test_outputs_that_are_known_at_one_time_are_matched_with_one_wait(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that are not on the path; on the path each waits for its turn."""
    matched: list[int] = []
    together = Matcher.together

    def counting(matcher: Matcher, predictions: Any) -> Any:
        matched.append(len(predictions))
        return together(matcher, predictions)

    monkeypatch.setattr(Matcher, "together", counting)
    detector(name).losses(images(), SIZES, criterion())
    assert matched == ([3] if name in ("stacked", "recurrent") else [3, 1, 1, 1])


@pytest.mark.parametrize("name", DECODERS)
def test_no_parameter_is_dead(name: str) -> None:
    model = detector(name).train()
    model.losses(images(), SIZES, criterion()).total.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert not without
    still = [n for n, p in model.named_parameters() if not bool(p.grad.any())]  # type: ignore[union-attr]
    # At the start all boxes are the same, and so is every bias of the first layer's attention.
    first = "decoder.layers.0" if name == "stacked" else "decoder.initial"
    assert set(still) <= {f"{first}.attention.tau"}


@pytest.mark.parametrize("name", DECODERS)
def test_a_fresh_model_has_a_gradient_for_every_parameter(name: str) -> None:
    """As DistributedDataParallel needs it, with objects and without."""
    for objects in (3, 0):
        model = Detector(detector(name).config)
        model.losses(images(), SIZES, criterion(objects)).total.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_frozen_stages_get_no_gradient() -> None:
    config = detector("equilibrium").config
    model = Detector(replace(config, backbone=BackboneConfig("resnet18", False, frozen_stages=2)))
    model.losses(images(), SIZES, criterion()).total.backward()
    frozen = ("conv1", "bn1", "layer1", "layer2")
    for name, parameter in model.backbone.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen), name


@pytest.mark.parametrize("name", ["equilibrium", "perturbed"])
def test_batches_without_objects_push_scores_down_and_leave_boxes(name: str) -> None:
    model = detector(name)
    losses = model.losses(images(), SIZES, criterion(0))
    assert float(losses.parts["l1"]) == float(losses.parts["giou"]) == 0
    losses.total.backward()
    assert isinstance(model.decoder, EquilibriumDecoder)
    for layer in (model.decoder.initial, model.decoder.refinement):
        assert not any(bool(p.grad.any()) for p in layer.box_head.parameters())  # type: ignore[union-attr]
        bias = layer.class_head[3].bias.grad
        assert isinstance(bias, Tensor) and bool((bias > 0).all())


def test_images_are_standardised() -> None:
    model, batch = detector("stacked"), images()
    normalised = model.normalise(batch, SIZES)
    assert normalised.dtype == torch.float32
    for channel in range(3):
        value = float(batch[1, channel, 49, 95])
        wanted = (value - PIXEL_MEAN[channel]) / PIXEL_STD[channel]
        assert float(normalised[1, channel, 49, 95]) == pytest.approx(wanted, abs=1e-5)


def test_padding_is_zero_whatever_it_held() -> None:
    model, batch = detector("stacked").eval(), images()
    normalised = model.normalise(batch, SIZES)
    assert not normalised[0, :, :, 90:].any() and not normalised[1, :, 50:].any()
    assert bool(normalised[0, :, :, :90].any()) and bool(normalised[1, :, :50].any())
    changed = batch.clone()
    changed[0, :, :, 90:], changed[1, :, 50:] = 17, 255
    assert torch.equal(model.normalise(changed, SIZES), normalised)
    with torch.no_grad():
        for a, b in zip(model(changed, SIZES)[:2], model(batch, SIZES)[:2], strict=True):
            assert torch.equal(a, b)
    wider = model.normalise(nn.functional.pad(batch, (0, 32, 0, 64)), SIZES)
    assert torch.equal(wider[:, :, :HEIGHT, :WIDTH], normalised)
    assert not wider[:, :, HEIGHT:].any() and not wider[..., WIDTH:].any()


def test_whole_numbers_and_floats_are_the_same_images() -> None:
    model, batch = detector("stacked"), images()
    assert torch.equal(model.normalise(batch, SIZES), model.normalise(batch.float(), SIZES))


def test_the_configuration_reaches_every_part() -> None:
    config = replace(detector("stacked").config, neck=NeckConfig(kernel_size=3, activation=True))
    model = Detector(config)
    assert model.neck.convolutions[0].kernel_size == (3, 3)
    assert isinstance(model.neck.activation, nn.ReLU)
    assert len(model.queries.content) == QUERIES
    assert model.encode(images(), SIZES)[0][0].shape == (2, 32, 16, 24)


def test_nothing_but_weights_is_stored() -> None:
    """Constants would only go stale in a file."""
    model = detector("equilibrium")
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("name", ["stacked", "recurrent", "perturbed"])
def test_bfloat16(name: str) -> None:
    """Under autocast losses stay near those of float32; boxes stay in float32."""
    model, batch = detector(name), images()
    wanted = model.losses(batch, SIZES, criterion(), torch.Generator().manual_seed(1)).total
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.losses(batch, SIZES, criterion(), torch.Generator().manual_seed(1))
        output = model(batch, SIZES)
    assert losses.total.dtype == output.boxes.dtype == torch.float32
    assert float(losses.total.detach()) == pytest.approx(float(wanted.detach()), rel=0.1)
    losses.total.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


# The decoders


@pytest.mark.parametrize(
    ("name", "kind", "calls"),
    [("stacked", StackedDecoder, 3), ("recurrent", RecurrentDecoder, 3)]
    + [(name, EquilibriumDecoder, 5) for name in ("equilibrium", "perturbed")],
)
def test_the_trajectory_ends_where_forward_does(name: str, kind: type[Decoder], calls: int) -> None:
    decoder, maps, start = decoder_of(DECODERS[name]), features(), queries()
    assert type(decoder) is kind
    with torch.no_grad():
        outputs = list(decoder.trajectory(maps, start))
        last = decoder(maps, start)
    assert len(outputs) == calls
    torch.testing.assert_close(outputs[-1].logits, last.logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(outputs[-1].boxes, last.boxes, rtol=0, atol=1e-8)
    assert not torch.equal(outputs[0].boxes, outputs[1].boxes)


def apply(layers: Sequence[RefinementLayer], maps: list[Tensor], start: Queries) -> list[Queries]:
    states = []
    for layer in layers:
        start = layer(start, maps)
        states.append(start)
    return states


def layers_in_order(decoder: Decoder, calls: int) -> list[RefinementLayer]:
    if isinstance(decoder, StackedDecoder):
        return [layer for layer in decoder.layers if isinstance(layer, RefinementLayer)]
    assert isinstance(decoder, (RecurrentDecoder, EquilibriumDecoder))
    return [decoder.initial] + [decoder.refinement] * (calls - 1)


@pytest.mark.parametrize(("name", "calls"), [("stacked", 3), ("recurrent", 3), ("equilibrium", 5)])
def test_the_trajectory_is_the_layers_one_after_the_other(name: str, calls: int) -> None:
    decoder, maps, start = decoder_of(DECODERS[name]), features(), queries()
    layers = layers_in_order(decoder, calls)
    with torch.no_grad():
        outputs = list(decoder.trajectory(maps, start))
        states = apply(layers, maps, start)
        for output, layer, state in zip(outputs, layers, states, strict=True):
            wanted = layer.classify(state.content)
            torch.testing.assert_close(output.logits, wanted, rtol=0, atol=1e-10)
            torch.testing.assert_close(output.boxes, state.boxes, rtol=0, atol=1e-8)


def test_initial_points_are_those_of_the_initial_layer_alone() -> None:
    for name in ("recurrent", "equilibrium"):
        decoder = decoder_of(DECODERS[name])
        assert isinstance(decoder, (RecurrentDecoder, EquilibriumDecoder))
        assert decoder.initial.sampling.points == 5
        assert decoder.refinement.sampling.points == 4


def gradients(
    total: Tensor, decoder: Decoder, maps: list[Tensor], start: Queries
) -> dict[str, Tensor]:
    named = {f"feature {i}": feature for i, feature in enumerate(maps)}
    named |= {"content": start.content, **dict(decoder.named_parameters())}
    found = torch.autograd.grad(total, list(named.values()))
    return dict(zip(named, found, strict=True))


def check_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    largest = max(float(value.abs().max()) for value in wanted.values())
    for name, value in wanted.items():
        same = torch.isclose(found[name], value, rtol=1e-9, atol=1e-12 * largest)
        assert bool(same.all()), name


@pytest.mark.parametrize("name", ["stacked", "recurrent"])
def test_losses_of_unrolled_decoders_are_those_of_a_loop(name: str) -> None:
    """Every output scored, the gradient through everything before it."""
    decoder, maps, start = decoder_of(DECODERS[name]), features(), queries()
    score = criterion(dtype=torch.float64)
    layers = layers_in_order(decoder, 3)
    states = apply(layers, maps, start)
    wanted = [
        score(layer.classify(state.content), state.boxes)[0]
        for layer, state in zip(layers, states, strict=True)
    ]
    losses = decoder.losses(maps, start, score)
    found = [float(value) for value in losses.losses.values()]
    assert found == pytest.approx([float(value.detach()) for value in wanted], rel=1e-10)
    check_gradients(
        gradients(losses.total, decoder, maps, start),
        gradients(torch.stack(wanted).sum(), decoder, maps, start),
    )


def literal_equilibrium_losses(
    decoder: EquilibriumDecoder,
    maps: list[Tensor],
    start: Queries,
    score: Criterion,
    generator: torch.Generator,
) -> list[Tensor]:
    """The paper's §3.3 for naive iteration and RAG: g, h more of f, and positions on the path."""
    config = decoder.config
    noise = config.perturbation
    assert isinstance(config.gradient, implicit.RAG) and isinstance(config.solver, implicit.Naive)

    def scored(layer: RefinementLayer, state: Queries) -> Tensor:
        return score(layer.classify(state.content), state.boxes)[0]

    def refined(state: Queries) -> Queries:
        with torch.no_grad():
            moved: Queries = decoder.refinement(state, maps)
        return moved

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    def coin() -> bool:
        return float(torch.rand((), generator=generator)) < noise.probability

    def noisy(state: Queries) -> Queries:
        position, content, boxes = state
        if coin():
            length = content.square().sum(-1, keepdim=True).sqrt()
            content = (1 - noise.content) * content + noise.content * length * normal(content)
        if coin():
            boxes = boxes + noise.position * normal(boxes)
            x1, y1, x2, y2 = boxes.unbind(-1)
            w, h = ((x2 - x1).abs() + 1e-7).log2(), ((y2 - y1).abs() + 1e-7).log2()
            position = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, (w + h) / 2, h - w], dim=-1)
        return Queries(position, content, boxes)

    initial = decoder.initial(start, maps)
    losses, chained = [scored(decoder.initial, initial)], initial
    for _ in range(config.extra_supervision):
        chained = decoder.refinement(chained, maps)
        losses.append(scored(decoder.refinement, chained))
    state, damping = Queries(*(part.detach() for part in initial)), config.solver.damping
    for n in range(1, config.train_steps + 1):
        before = noisy(state) if noise.entry == "multi-step" else state
        moves = zip(before, refined(before), strict=True)
        state = Queries(*(old + damping * (new - old) for old, new in moves))
        if n in config.positions:
            unrolled = state
            if noise.entry == "one-step":
                unrolled = refined(noisy(before))
            elif noise.entry == "zero-step":
                unrolled = noisy(state)
            for _ in range(config.gradient.k):
                unrolled = decoder.refinement(unrolled, maps)
            losses.append(scored(decoder.refinement, unrolled))
    return losses


def check_against_the_loop(config: EquilibriumConfig) -> None:
    decoder, maps, start = decoder_of(config), features(), queries()
    assert isinstance(decoder, EquilibriumDecoder)
    score = criterion(dtype=torch.float64)
    wanted = literal_equilibrium_losses(
        decoder, maps, start, score, torch.Generator().manual_seed(5)
    )
    losses = decoder.losses(maps, start, score, torch.Generator().manual_seed(5))
    found = [float(value) for value in losses.losses.values()]
    assert found == pytest.approx([float(value.detach()) for value in wanted], rel=1e-9)
    check_gradients(
        gradients(losses.total, decoder, maps, start),
        gradients(torch.stack(wanted).sum(), decoder, maps, start),
    )


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_losses_of_the_equilibrium_are_those_of_a_loop(
    k: int, extra: int, probability: float
) -> None:
    noise = PerturbationConfig(content=0.1, position=3.0, probability=probability)
    check_against_the_loop(
        replace(EQUILIBRIUM, gradient=implicit.RAG(k), extra_supervision=extra, perturbation=noise)
    )


@pytest.mark.parametrize("entry", ["zero-step", "one-step", "multi-step"])
def test_noise_enters_where_it_should(
    entry: Literal["zero-step", "one-step", "multi-step"],
) -> None:
    noise = PerturbationConfig(content=0.1, position=3.0, probability=1.0, entry=entry)
    check_against_the_loop(replace(EQUILIBRIUM, perturbation=noise))


def test_the_configured_solver_walks_in_training() -> None:
    noise = PerturbationConfig(content=0.1, position=3.0, probability=1.0)
    solver = implicit.Naive(damping=0.7)
    check_against_the_loop(replace(EQUILIBRIUM, solver=solver, perturbation=noise))


def test_losses_through_the_whole_path_are_those_of_a_loop() -> None:
    none = PerturbationConfig(content=0.0, position=0.0)
    config = replace(EQUILIBRIUM, gradient=implicit.BPTT(), perturbation=none)
    decoder, maps, start = decoder_of(config), features(), queries()
    assert isinstance(decoder, EquilibriumDecoder) and decoder.initial is not None
    score = criterion(dtype=torch.float64)

    def scored(layer: nn.Module, state: Queries) -> Tensor:
        return score(layer.classify(state.content), state.boxes)[0]

    state = decoder.initial(start, maps)
    wanted, chained = [scored(decoder.initial, state)], state
    for _ in range(config.extra_supervision):
        chained = decoder.refinement(chained, maps)
        wanted.append(scored(decoder.refinement, chained))
    state = Queries(*(part.detach() for part in state))
    for n in range(1, config.train_steps + 1):
        state = decoder.refinement(state, maps)
        if n in config.positions:
            wanted.append(scored(decoder.refinement, state))
    losses = decoder.losses(maps, start, score)
    check_gradients(
        gradients(losses.total, decoder, maps, start),
        gradients(torch.stack(wanted).sum(), decoder, maps, start),
    )


def test_the_generator_decides_the_noise() -> None:
    decoder, maps, start = decoder_of(DECODERS["perturbed"]), features(), queries()
    score = criterion(dtype=torch.float64)

    def total(number: int) -> float:
        generator = torch.Generator().manual_seed(number)
        return float(decoder.losses(maps, start, score, generator).total.detach())

    assert total(1) == total(1)
    assert len({total(number) for number in range(4)}) > 1


def test_noise_is_for_training_alone() -> None:
    decoder, maps, start = decoder_of(DECODERS["perturbed"]), features(), queries()
    with torch.no_grad():
        first, again = decoder(maps, start), decoder(maps, start)
    assert torch.equal(first.boxes, again.boxes) and torch.equal(first.logits, again.logits)


@pytest.mark.parametrize(
    "gradient",
    [
        implicit.JFB(),
        implicit.Neumann(2),
        implicit.Phantom(2, 0.5),
        implicit.RAG(3),
        implicit.BPTT(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("solver", [implicit.Naive(), implicit.Anderson(), implicit.Broyden()])
def test_every_gradient_and_solver_trains(gradient: Gradient, solver: Solver) -> None:
    config = replace(EQUILIBRIUM, gradient=gradient, solver=solver)
    decoder, maps, start = decoder_of(config), features(), queries()
    losses = decoder.losses(maps, start, criterion(dtype=torch.float64))
    found = gradients(losses.total, decoder, maps, start)
    assert all(bool(value.isfinite().all()) and bool(value.any()) for value in found.values())


# The equilibrium at inference


@cache
def contractive() -> tuple[EquilibriumDecoder, list[Tensor], Queries]:
    """A decoder with a fixed point: contents are small beside the embeddings of the positions."""
    torch.manual_seed(0)
    decoder = build_decoder(LAYER, EQUILIBRIUM).double()
    assert isinstance(decoder, EquilibriumDecoder)
    with torch.no_grad():
        for parameter in decoder.initial.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
        decoder.refinement.ffn_norm.weight.mul_(0.1)
    return decoder, [feature.detach() for feature in features()], queries()


@pytest.mark.parametrize("solver", [implicit.Naive(), implicit.Anderson(), implicit.Broyden()])
def test_every_solver_finds_the_fixed_point(solver: Solver) -> None:
    decoder, maps, start = contractive()
    with torch.no_grad():
        state = decoder.initial(start, maps)
        for _ in range(100):
            before, state = state, decoder.refinement(state, maps)
        torch.testing.assert_close(state.content, before.content, rtol=0, atol=1e-13)
        stop = implicit.Tolerance(rtol=1e-9, atol=0, max_steps=60)
        output = decoder(maps, start, stop=stop, solver=solver, trace=True)
    assert output.residual is not None
    steps, batch = output.residual.shape
    assert 1 < steps < 60 and batch == 2
    for residual in output.residual.T:
        walked = residual[residual.isfinite()]  # a sample that is done waits for the others
        assert float(walked[-1]) <= 1e-9 < float(walked[:-1].min())
    wanted = decoder.refinement.classify(state.content)
    torch.testing.assert_close(output.logits, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(output.boxes, state.boxes, rtol=0, atol=1e-5)


def count_calls(decoder: EquilibriumDecoder) -> dict[str, int]:
    counts = {"initial": 0, "refinement": 0}
    for name in counts:

        def count(*_: object, name: str = name) -> None:
            counts[name] += 1

        decoder.get_submodule(name).register_forward_hook(count)
    return counts


def test_steps_are_those_of_the_configuration_unless_others_are_asked_for() -> None:
    decoder, maps, start = decoder_of(EQUILIBRIUM), features(), queries()
    assert isinstance(decoder, EquilibriumDecoder)
    counts = count_calls(decoder)
    with torch.no_grad():
        output = decoder(maps, start)
        assert counts == {"initial": 1, "refinement": 4} and output.residual is None
        traced = decoder(maps, start, stop=implicit.Steps(9), trace=True)
    assert counts == {"initial": 2, "refinement": 4 + 9}
    assert traced.residual is not None and traced.residual.shape == (9, 2)


def test_training_makes_the_published_number_of_calls() -> None:
    """One of g; with the published settings, 34 of f: h, the path, and RAG at each position."""
    config = EquilibriumConfig(initial_points=5, perturbation=QUIET)
    decoder, maps, start = decoder_of(config), features(), queries()
    assert isinstance(decoder, EquilibriumDecoder)
    counts = count_calls(decoder)
    losses = decoder.losses(maps, start, criterion(dtype=torch.float64))
    assert counts == {"initial": 1, "refinement": 2 + 20 + 6 * 2}
    assert len(losses.losses) == 9


@pytest.mark.parametrize("name", DECODERS)
def test_the_loss_is_an_ordinary_scalar(name: str) -> None:
    """Nothing is propagated before ``backward``; a scaled loss has a scaled gradient."""
    decoder, maps, start = decoder_of(DECODERS[name]), features(), queries()
    leaves = [feature.detach().requires_grad_() for feature in maps]

    def loss() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return decoder.losses(leaves, start, criterion(dtype=torch.float64), generator).total

    wanted = torch.autograd.grad(loss(), [*leaves, *decoder.parameters()])
    total = loss()
    assert total.shape == () and total.grad_fn is not None
    assert all(p.grad is None for p in (*leaves, *decoder.parameters()))
    (0.25 * total + loss() * 2).backward()
    for parameter, gradient in zip((*leaves, *decoder.parameters()), wanted, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, 2.25 * gradient, rtol=1e-9, atol=1e-12)


def test_an_image_is_refined_until_its_detections_have_settled() -> None:
    """Steps of its own for each image; the next refinement would move it less than allowed."""
    decoder, maps, start = contractive()
    settled = Settled(pixels=1e-3, score=1e-5)
    decoder.config = replace(decoder.config, steps="auto", settled=settled)
    with torch.no_grad():
        output = decoder(maps, start)
        assert output.steps is not None and (output.steps < 25).all()
        for image, steps in enumerate(output.steps.tolist()):
            alone = [feature[image : image + 1] for feature in maps]
            state = Queries(*(leaf[image : image + 1] for leaf in start))
            movements = []
            state = decoder.first(state, alone)
            for n in range(steps + 1):
                following = decoder.refinement(state, alone)
                moved = settled.movement(state, following, decoder.refinement.classify)
                movements.append(float(moved))
                if n == steps:
                    torch.testing.assert_close(output.boxes[image], state.boxes[0])
                state = following
            assert movements[-1] <= 1 and min(movements[:-1]) > 1


def test_an_image_is_refined_some_times_before_it_may_be_done() -> None:
    """From the first layer's output; from the frame before it may be done at once."""
    decoder, maps, start = contractive()
    loose = Settled(pixels=1e9, score=2.0, least_steps=4)
    decoder.config = replace(decoder.config, steps="auto", settled=loose)
    with torch.no_grad():
        cold = decoder(maps, start)
        assert cold.steps is not None and cold.steps.tolist() == [4] * len(cold.steps)
        fixed = decoder(maps, start, stop=implicit.Steps(4))
        torch.testing.assert_close(cold.boxes, fixed.boxes)
        warm = decoder(maps, start, start=cold.queries)
        assert warm.steps is not None and not warm.steps.any()
        # What the caller says about the end holds as it stands.
        often = decoder(maps, start, start=cold.queries, stop=decoder.until(loose, 25))
        assert often.steps is not None and often.steps.tolist() == [4] * len(often.steps)
        # Never more often than refinement is allowed to.
        few = decoder(maps, start, stop=decoder.until(loose, 2))
        assert few.steps is not None and few.steps.tolist() == [2] * len(few.steps)


@pytest.mark.parametrize("solver", [implicit.Anderson(memory=3), implicit.Broyden()], ids=repr)
def test_inference_may_have_a_solver_and_a_tolerance_of_its_own(solver: Solver) -> None:
    decoder, maps, start = contractive()
    config = replace(decoder.config, eval_solver=solver, tolerance=1e-6, steps=60)
    stop = implicit.Tolerance(rtol=1e-6, atol=0.0, max_steps=60)
    with torch.no_grad():
        asked = decoder(maps, start, stop=stop, solver=solver)
        decoder.config = config
        counts = count_calls(decoder)
        output = decoder(maps, start, trace=True)
    assert torch.equal(output.boxes, asked.boxes)
    assert output.residual is not None
    assert counts["refinement"] <= len(output.residual) + 1 < 60
    assert bool((output.residual.nan_to_num(1).amin(dim=0) <= 1e-6).all())
    with pytest.raises(ValueError, match=r"rtol=-1"):
        EquilibriumConfig(tolerance=-1)


def test_a_solver_that_flies_off_leaves_its_best_iterate() -> None:
    decoder, maps, start = contractive()
    first = decoder.initial
    assert first is not None

    class Wild(implicit.Broyden):
        """Right for two steps, and then nowhere."""

        def step(self, memory: object, y: Tensor, fy: Tensor, r: Tensor) -> tuple[Tensor, object]:
            calls.append(0)
            return (fy if len(calls) < 3 else torch.full_like(fy, torch.inf)), memory

    calls: list[int] = []
    with torch.no_grad():
        output = decoder(maps, start, solver=Wild(), stop=implicit.Steps(5))
        state = first(start, maps)
        for _ in range(2):
            state = decoder.refinement(state, maps)
    assert torch.equal(output.boxes, state.boxes)


def test_the_configured_solver_walks_at_inference() -> None:
    maps, start = features(), queries()
    decoder = decoder_of(replace(EQUILIBRIUM, solver=implicit.Anderson(), steps=6))
    assert isinstance(decoder, EquilibriumDecoder)
    with torch.no_grad():
        output = decoder(maps, start)
        asked = decoder(maps, start, solver=implicit.Anderson())
        naive = decoder(maps, start, solver=implicit.Naive())
        last = list(decoder.trajectory(maps, start))[-1]
    assert torch.equal(output.logits, asked.logits)
    assert not torch.allclose(output.logits, naive.logits, atol=1e-6)
    torch.testing.assert_close(output.logits, last.logits, rtol=0, atol=1e-8)


@pytest.mark.parametrize("tolerance", [None, 0.05])
@pytest.mark.parametrize("solver", [implicit.Naive(), implicit.Anderson()], ids=repr)
def test_an_image_is_detected_alike_in_any_batch(solver: Solver, tolerance: float | None) -> None:
    """To the last bit, also of weights whose refinement is far from a contraction."""
    decoder = replace(EQUILIBRIUM, steps=20, eval_solver=solver, tolerance=tolerance)
    backbone = BackboneConfig("small", pretrained=False)
    model = Detector(ModelConfig(backbone, layer=LAYER, decoder=decoder, num_queries=QUERIES))
    awakened(model).eval()
    images = torch.randint(0, 256, (3, 3, HEIGHT, WIDTH), dtype=torch.uint8)
    sizes = torch.tensor([[64, 90], [50, 96], [64, 96]])
    with torch.no_grad():
        together = model(images, sizes)
        for i in range(3):
            alone = model(images[i : i + 1], sizes[i : i + 1])
            pair = model(images[[2, i]], sizes[[2, i]])
            for part in ("boxes", "logits"):
                found = getattr(together, part)[i]
                assert torch.equal(found, getattr(alone, part)[0])
                assert torch.equal(found, getattr(pair, part)[1])
