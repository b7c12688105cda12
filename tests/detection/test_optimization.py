"""Parameter groups, schedules, clipping and the exponential average, against their formulas."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from detection.training.optimization import (
    ExponentialAverage,
    OptimizationConfig,
    clip_gradients,
    make_optimizer,
    make_schedule,
    parameter_groups,
    rate_factor,
)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.qkv = nn.Linear(4, 12)
        self.norm = nn.LayerNorm(4)


class Model(nn.Module):
    """Parts named as in the detector, with every kind of parameter the groups tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Attention())
        self.neck = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4))
        self.queries = nn.Embedding(5, 4)
        self.decoder = nn.ModuleDict({"linear": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
        self.decoder["again"] = self.decoder["linear"]
        self.decoder["tied"] = nn.Linear(4, 4, bias=False)
        self.decoder["tied"].weight = self.decoder["linear"].weight
        self.backbone[0].requires_grad_(False)


def names_by_group(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, set[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {group["name"]: {names[p] for p in group["params"]} for group in groups}


@pytest.mark.parametrize("spare_norms", [False, True])
def test_every_trainable_parameter_is_in_one_group_once(spare_norms: bool) -> None:
    model = Model()
    groups = parameter_groups(model, OptimizationConfig(spare_norms=spare_norms))
    listed = [parameter for group in groups for parameter in group["params"]]
    trainable = {parameter for parameter in model.parameters() if parameter.requires_grad}
    assert len(listed) == len(set(listed))
    assert set(listed) == trainable


def test_the_decoder_learns_four_times_as_fast_and_decays_ten_times_as_much() -> None:
    model = Model()
    groups = parameter_groups(model, OptimizationConfig())
    names = names_by_group(model, groups)
    assert set(names) == {"base", "decoder"}
    assert all(name.startswith("decoder.") for name in names["decoder"])
    assert not any(name.startswith("decoder.") for name in names["base"])
    settings = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert settings == {"base": (2.5e-5, 0.01), "decoder": (1e-4, 0.1)}


def test_spared_norms_learn_slowly_and_do_not_decay() -> None:
    model = Model()
    groups = parameter_groups(model, OptimizationConfig(spare_norms=True))
    names = names_by_group(model, groups)
    assert names["backbone_norms"] == {
        "backbone.1.weight",
        "backbone.1.bias",
        "backbone.2.norm.weight",
        "backbone.2.norm.bias",
        "backbone.2.relative_position_bias_table",
    }
    assert names["neck_norms"] == {"neck.1.weight", "neck.1.bias"}
    assert {"decoder.norm.weight", "decoder.norm.bias"} < names["decoder"]
    settings = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert settings["backbone_norms"] == (pytest.approx(2.5e-6), 0.0)
    assert settings["neck_norms"] == (2.5e-5, 0.0)


def test_a_wrapped_model_is_refused() -> None:
    with pytest.raises(ValueError, match="no part named 'decoder'"):
        parameter_groups(nn.ModuleDict({"module": Model()}), OptimizationConfig())


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(ValueError, match="requires a gradient"):
        parameter_groups(Model().requires_grad_(False), OptimizationConfig())


@pytest.mark.parametrize(("epochs", "first", "second"), [(12, 8, 11), (24, 16, 22)])
def test_steps_fall_at_the_published_epochs(epochs: int, first: int, second: int) -> None:
    config, steps = OptimizationConfig(epochs=epochs, warmup_steps=0), 37
    factors = [rate_factor(step, config, epochs * steps) for step in range(epochs * steps)]
    assert factors[: first * steps] == [1.0] * (first * steps)
    assert factors[first * steps : second * steps] == [0.1] * ((second - first) * steps)
    assert factors[second * steps :] == pytest.approx([0.01] * ((epochs - second) * steps))


@pytest.mark.parametrize("schedule", ["step", "one_cycle"])
def test_the_warm_up_is_a_straight_line(schedule: Any) -> None:
    config = OptimizationConfig(warmup_steps=500, schedule=schedule)
    factors = [rate_factor(step, config, 10_000) for step in range(501)]
    assert factors[0] == pytest.approx(0.001)
    assert factors[250] == pytest.approx((1 + 0.001) / 2)
    assert factors[500] == 1.0
    rises = [b - a for a, b in itertools.pairwise(factors)]
    assert rises == pytest.approx([0.999 / 500] * 500)


def test_one_cycle_is_half_a_cosine_down_to_nothing() -> None:
    config = OptimizationConfig(warmup_steps=100, schedule="one_cycle")
    assert rate_factor(100, config, 1100) == 1.0
    assert rate_factor(350, config, 1100) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert rate_factor(600, config, 1100) == pytest.approx(0.5)
    assert rate_factor(1100, config, 1100) == pytest.approx(0, abs=1e-12)
    assert rate_factor(2000, config, 1100) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("schedule", ["step", "one_cycle"])
def test_a_run_shorter_than_its_warm_up_is_well_defined(schedule: Any) -> None:
    config = OptimizationConfig(warmup_steps=500, schedule=schedule, milestones=())
    assert 0.001 <= rate_factor(2, config, 3) < 0.01


def train(model: nn.Module, optimizer: Any, schedule: Any, steps: int) -> list[list[float]]:
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr())
        model.decoder["linear"](torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return rates


def test_the_schedule_keeps_the_ratio_of_the_groups_and_resumes() -> None:
    torch.manual_seed(0)
    config = OptimizationConfig(epochs=2, warmup_steps=3, schedule="one_cycle")
    model = Model()
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config, steps_per_epoch=5)
    first = train(model, optimizer, schedule, 4)
    stored = copy.deepcopy((model.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    rest = train(model, optimizer, schedule, 6)
    rates = torch.tensor(first + rest, dtype=torch.float64)
    assert torch.allclose(rates[:, 1], 4 * rates[:, 0])
    wanted = [config.lr * rate_factor(step, config, 10) for step in range(10)]
    assert rates[:, 0].tolist() == pytest.approx(wanted)

    resumed = Model()
    again = make_optimizer(resumed, config)
    again_schedule = make_schedule(again, config, steps_per_epoch=5)
    for part, state in zip((resumed, again, again_schedule), stored, strict=True):
        part.load_state_dict(state)
    assert train(resumed, again, again_schedule, 6) == rest
    wanted_weights = model.state_dict()
    assert all(v.equal(wanted_weights[k]) for k, v in resumed.state_dict().items())


@pytest.mark.parametrize(("max_norm", "scale"), [(1.0, 1 / 13), (100.0, 1.0)])
def test_clipping_scales_the_whole_gradient_and_reports_its_norm(
    max_norm: float, scale: float
) -> None:
    weights = [
        nn.Parameter(torch.zeros(2)),
        nn.Parameter(torch.zeros(1)),
        nn.Parameter(torch.ones(1)),
    ]
    weights[0].grad, weights[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:]}])
    assert float(clip_gradients(optimizer, max_norm)) == pytest.approx(13)
    assert weights[0].grad.tolist() == pytest.approx([3 * scale, 4 * scale], rel=1e-5)
    assert weights[1].grad.tolist() == pytest.approx([12 * scale], rel=1e-5)


def test_a_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([math.nan, 1.0])
    assert math.isnan(float(clip_gradients(torch.optim.SGD([weight]), 1.0)))


def test_the_average_follows_its_recursion() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)).double()
    average = ExponentialAverage(model, decay=0.5)
    wanted = model[0].weight.item()
    for n in range(1, 21):
        nn.init.constant_(model[0].weight, float(n))
        model[1].running_mean.fill_(float(n))
        average.update(model)
        decay = min(0.5, n / (n + 9))
        wanted = decay * wanted + (1 - decay) * n
    assert float(average.average_model[0].weight) == pytest.approx(wanted)
    # The last twelve updates have decay 1/2 or nearly so: the average trails by about one.
    assert wanted == pytest.approx(19, abs=0.1)
    assert float(average.average_model[1].running_mean) == pytest.approx(wanted, abs=0.01)


def test_a_constant_model_is_its_own_average() -> None:
    model = Model()
    average = ExponentialAverage(model)
    for _ in range(5):
        average.update(model)
    for name, value in average.average_model.state_dict().items():
        assert torch.allclose(value, model.state_dict()[name])


def test_the_average_is_a_model_of_its_own() -> None:
    model = Model().train()
    average = ExponentialAverage(model, decay=0.9)
    before = copy.deepcopy(average.average_model.state_dict())
    for parameter in model.parameters():
        nn.init.constant_(parameter, 7.0)
    assert all(v.equal(before[k]) for k, v in average.average_model.state_dict().items())
    assert not average.average_model.training
    assert model.training
    assert not any(p.requires_grad for p in average.average_model.parameters())
    assert average.average_model.decoder["again"] is average.average_model.decoder["linear"]


def test_integer_buffers_are_copied() -> None:
    model = nn.BatchNorm1d(2)
    average = ExponentialAverage(model, decay=0.9)
    model(torch.randn(4, 2))
    average.update(model)
    assert int(average.average_model.num_batches_tracked) == 1


def test_the_average_resumes() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    average = ExponentialAverage(model, decay=0.9)
    average.update(other)
    again = ExponentialAverage(nn.Linear(2, 2), decay=0.9)
    again.load_state_dict(average.state_dict())
    for each in (average, again):
        each.update(model)
    assert again.average_model.weight.equal(average.average_model.weight)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0.0),
        ("lr", math.nan),
        ("weight_decay", -0.1),
        ("clip_norm", 0.0),
        ("epochs", 0),
        ("warmup_steps", -1),
        ("schedule", "cosine"),
        ("milestones", (0.5, 8.0)),
    ],
)
def test_impossible_settings_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"OptimizationConfig\\({name}="):
        OptimizationConfig(**{name: value})
