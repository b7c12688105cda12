"""The benchmarks at tiny sizes: what they count is right, and what they write can be read back."""

from __future__ import annotations

import functools
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import recorded_graphs
import torch
from rich.table import Table
from torch import Tensor

import implicit
from benchmarks import __main__ as everything
from benchmarks import (
    ceilings,
    counts,
    gradient_error,
    gradient_memory,
    measure,
    mixed_batches,
    overhead,
    pages,
    refinement,
    report,
    robustness,
    scaling,
    steps,
    throughput,
    training_memory,
    training_step,
)
from benchmarks.full_size import full_size
from benchmarks.goals import Goal
from benchmarks.problems import problem
from detection.decoder.layer import RefinementLayer
from detection.engine import Engine
from detection.models.config import EquilibriumConfig, StackedConfig
from detection.models.decoders import Output
from detection.models.detector import Detector

ROOT = Path(__file__).parents[1]

# -- counts --------------------------------------------------------------------------------------


def test_live_bytes_follow_what_is_alive() -> None:
    x = torch.ones(100, dtype=torch.float64)

    def run() -> None:
        kept = [x + i for i in range(3)]
        del kept[0]
        kept[0].mul_(2)  # in place: no storage of its own
        kept[0].view(10, 10).mT.unsqueeze(0)  # nor has a view
        torch.cat([kept[0], kept[1]])

    assert counts.live_bytes(run) == (2 + 2) * 800
    assert counts.operations_of(run) == 3 + 1 + 3 + 1


def test_live_bytes_leave_out_what_lived_before() -> None:
    x = torch.ones(100)
    assert counts.live_bytes(lambda: x.view(10, 10).add_(1)) == 0


def test_live_bytes_of_a_chain_are_two_links() -> None:
    def run() -> None:
        y = torch.ones(100)
        for _ in range(5):
            y = y + 1

    assert counts.live_bytes(run) == 2 * 400


def test_counted_counts_rows_and_passes_arguments() -> None:
    f = counts.Counted(lambda y, x: y + x)
    for rows in (3, 2):
        assert f(torch.ones(rows, 4), torch.tensor(2.0)).sum() == 12 * rows
    assert (f.calls, f.rows) == (2, 5)


def test_results_are_written_with_their_provenance(tmp_path: Path) -> None:
    path = measure.write_results(tmp_path, "overhead", {"ρ": [1.5]})
    written = json.loads(path.read_text(encoding="utf-8"))
    assert path == tmp_path / "overhead.json"
    assert written["results"] == {"ρ": [1.5]}
    assert written["command"] == "python -m benchmarks.overhead"
    assert torch.__version__.startswith(written["versions"]["torch"])
    assert written["machine"] == measure.machine()
    assert written["date"].startswith("20")


# -- robustness ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", robustness.METHODS)
def test_every_method_solves_the_cosine(name: str) -> None:
    cosine = problem("cosine")
    run = robustness.run(cosine, name, robustness.METHODS[name])
    assert run.solved and run.residual <= 1e-6
    assert 3 <= run.evaluations <= 100


def test_a_method_is_judged_by_what_it_returns() -> None:
    cosine = problem("cosine")
    liar = robustness.run(cosine, "liar", lambda f, y0: f(y0))
    assert not liar.solved and liar.evaluations == 1
    assert liar.residual == pytest.approx(abs(torch.tensor(1.0).cos().cos() - 0.5403023).item())


def test_a_method_that_never_ends_is_stopped() -> None:
    def endless(f: Callable[[Tensor], Tensor], y0: Tensor) -> Tensor:
        while True:
            f(y0)

    run = robustness.run(problem("cosine"), "endless", endless)
    assert not run.solved and run.evaluations == robustness.BUDGET + 1


def test_an_error_in_our_own_code_is_not_taken_for_a_failure_to_converge() -> None:
    def broken(f: Callable[[Tensor], Tensor], y0: Tensor) -> Tensor:
        raise TypeError("a slip")

    with pytest.raises(TypeError, match="a slip"):
        robustness.run(problem("cosine"), "broken", broken)


def made_up_runs() -> list[robustness.Run]:
    evaluations: dict[str, dict[str, int | None]]
    evaluations = {"swift": {"p": 4, "q": 30, "r": None}, "steady": {"p": 8, "q": 10, "r": 50}}
    return [
        robustness.Run(p, "family", method, n or 1001, 0.0 if n else 1.0, n is not None)
        for method, row in evaluations.items()
        for p, n in row.items()
    ]


def test_profile_is_of_ratios_to_the_best() -> None:
    assert robustness.profile(made_up_runs()) == {"swift": [1, 3], "steady": [1, 1, 2]}
    assert robustness.solved_by_all(made_up_runs(), ["swift", "steady"]) == ["p", "q"]
    assert robustness.solved_by_all(made_up_runs(), ["steady"]) == ["p", "q", "r"]


def test_robustness_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tuple(problem(name) for name in ("cosine", "rotation-90"))
    monkeypatch.setattr(robustness, "problems", lambda: few)
    written = main_of("robustness", robustness.main, tmp_path, monkeypatch)
    assert written["solved"]["Anderson"] == 2 and written["solved"]["Naive"] == 1
    assert written["common"] == ["cosine", "rotation-90"]
    assert len(written["runs"]) == 2 * len(robustness.METHODS)
    assert "rotation-90" in capsys.readouterr().out
    assert (tmp_path / "robustness.png").stat().st_size > 1000


# -- overhead ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", overhead.SOLVERS)
def test_overhead_counts_are_sane(name: str) -> None:
    torchdeq, tolerance, steps = overhead.costs(name, 2, 16, evaluations=30, repeats=1)
    assert [c.stop for c in (torchdeq, tolerance, steps)] == ["torchdeq", "Tolerance", "Steps"]
    assert torchdeq.ratio == 1
    assert 1 <= steps.operations <= tolerance.operations
    histories = 0 if name == "Naive" else 2 * overhead.MEMORY
    for cost in (torchdeq, tolerance, steps):
        assert cost.copies >= histories + 2  # the state and its image


def test_overhead_refuses_to_compare_unequal_work(monkeypatch: pytest.MonkeyPatch) -> None:
    lazy: overhead.Contestant = lambda f, y0, evaluations: f(y0)  # noqa: E731
    monkeypatch.setitem(overhead.SOLVERS, "Naive", (implicit.Naive(), lazy))
    with pytest.raises(RuntimeError, match="evaluated f 1 times, not 30"):
        overhead.costs("Naive", 2, 16, evaluations=30, repeats=1)


def test_overhead_prints_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "SIZES", ((2, 8),))
    monkeypatch.setattr(overhead, "REPEATS", 1)
    written = main_of("overhead", overhead.main, tmp_path, monkeypatch)
    assert [(row["solver"], row["stop"]) for row in written] == [
        (solver, stop) for solver in overhead.SOLVERS for stop in ("torchdeq", "Tolerance", "Steps")
    ]


# -- mixed batches -------------------------------------------------------------------------------


def test_batches_have_the_radii_they_name() -> None:
    for batch in mixed_batches.batches(size=5, dim=6):
        radii = torch.linalg.eigvals(batch.inputs[0]).abs().amax(dim=1)
        assert radii.max().item() == pytest.approx(0.95)
        assert radii.min().item() == pytest.approx(0.2 if "hard" in batch.name else 0.1)
        assert batch.start.shape == (5, 6)


def test_maps_treat_rows_apart() -> None:
    affine, tanh = (mixed_batches.batches(size=3, dim=4)[i] for i in (0, 2))
    y = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    a, b = affine.inputs
    expected = torch.stack([a[i] @ y[i] + b[i] for i in range(3)])
    torch.testing.assert_close(affine.f(y, *affine.inputs), expected)
    a, b = tanh.inputs
    expected = torch.stack([torch.tanh(a[i] @ y[i] + b[i]) for i in range(3)])
    torch.testing.assert_close(tanh.f(y, *tanh.inputs), expected)


@pytest.mark.parametrize("name", mixed_batches.SOLVERS)
def test_rows_of_alike_samples_are_those_of_each_alone(name: str) -> None:
    a, b = mixed_batches.inputs(torch.tensor([0.5], dtype=torch.float64), 4, seed=0)
    alike = mixed_batches.Batch("alike", mixed_batches.affine, (a.repeat(3, 1, 1), b.repeat(3, 1)))
    count = mixed_batches.rows(alike, name, mixed_batches.SOLVERS[name])
    assert count.ratio == 1 and count.alone % 3 == 0


def test_mixed_batches_print_and_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = mixed_batches.batches(size=4, dim=4)
    monkeypatch.setattr(mixed_batches, "batches", lambda: small)
    written = main_of("mixed_batches", mixed_batches.main, tmp_path, monkeypatch)
    assert len(written) == len(small) * len(mixed_batches.SOLVERS)
    for row in written:
        assert row["ratio"] == row["together"] / row["alone"]
        # At most its hardest sample, times its size; at least its samples, up to rounding.
        assert 0.95 <= row["ratio"] <= 4


# -- gradient error ------------------------------------------------------------------------------


def test_exact_gradient_is_that_of_differences() -> None:
    layer = gradient_error.make_layer(0.8, batch=2, dim=3)
    exact = gradient_error.exact_gradient(layer)

    def loss(w: Tensor) -> Tensor:
        moved = gradient_error.Layer(w, layer.x, layer.v)
        y = implicit.fixed_point(moved, torch.zeros_like(layer.x), stop=gradient_error.TIGHT)
        return (layer.v * y.value).sum()

    with torch.no_grad():
        for i, j in ((0, 0), (0, 2), (1, 2)):
            nudge = torch.zeros(3, 3, dtype=torch.float64)
            nudge[i, j] = 1e-5
            difference = (loss(layer.w + nudge) - loss(layer.w - nudge)) / 2e-5
            assert difference.item() == pytest.approx(exact[i, j].item(), rel=1e-6)


def test_layer_has_the_contraction_asked_for() -> None:
    layer = gradient_error.make_layer(0.7, batch=2, dim=6)
    assert torch.linalg.matrix_norm(layer.w, 2).item() == pytest.approx(0.7)


@pytest.mark.parametrize("contraction", [0.3, 0.9])
def test_errors_fall_with_the_terms(contraction: float) -> None:
    names = ("JFB", "RAG(2)", "RAG(5)", "RAG(20)")
    errors = [gradient_error.error_of(name, contraction).error for name in names]
    assert all(more > less for more, less in pairwise(errors))
    # k terms leave an error of the order of ‖J‖ᵏ, up to the conditioning of the remainder.
    for k, error in zip((1, 2, 5, 20), errors, strict=True):
        assert error <= 2 * contraction**k


@pytest.mark.parametrize("scale", gradient_error.LOSS_SCALES)
def test_implicit_meets_its_goal_whatever_the_scale_of_the_loss(scale: float) -> None:
    assert gradient_error.error_of("Implicit", 0.95, scale).error <= gradient_error.GOAL


def test_gradient_error_prints_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_error, "CONTRACTIONS", (0.3, 0.5))
    written = main_of("gradient_error", gradient_error.main, tmp_path, monkeypatch)
    assert len(written["modes"]) == 2 * len(gradient_error.GRADIENTS)
    assert len(written["scaled"]) == 2 * len(gradient_error.LOSS_SCALES)
    assert (tmp_path / "gradient_error.png").stat().st_size > 1000


def main_of(
    module: str, main: Callable[[], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Run a benchmark as its command does, and read what it wrote."""
    monkeypatch.setattr(sys, "argv", [module, "--output", str(folder)])
    main()
    return json.loads((folder / f"{module}.json").read_text(encoding="utf-8"))["results"]


# -- memory, time and scaling of the refinement --------------------------------------------------


def test_peak_counts_what_is_alive_at_once() -> None:
    def run() -> None:
        x = torch.ones(2**20)
        y = x + 1  # two alive
        del x
        (y * 2).sum()  # two alive again

    assert counts.peak_bytes(run) == pytest.approx(2 * 4 * 2**20, rel=1e-3)


def test_figures_have_three_digits_on_any_device() -> None:
    """Seconds and milliseconds of a GPU are not shown as zeros."""
    written = json.loads((ROOT / "benchmarks/results/refinement.json").read_text(encoding="utf-8"))
    fast = [{**row, "median": row["median"] / 1e3} for row in written["results"]["times"]]
    table = next(
        t for t in refinement.tables({**written["results"], "times": fast}) if isinstance(t, Table)
    )
    medians = [row["median"] for row in fast[:2]]
    shown = [float(str(cell)) for cell in list(table.columns[2].cells)[:2]]
    assert max(medians) < 0.1 and shown == pytest.approx(medians, rel=5e-3)
    cost = scaling.Cost("steps", 5, 0.01234, 2**20)
    _, table = scaling.tables([asdict(replace(cost, size=n)) for n in (5, 10)])
    assert isinstance(table, Table) and list(table.columns[2].cells) == ["0.0123"] * 2


def test_contestants_refine_alike() -> None:
    small = full_size(5, 4, image=(64, 96))
    contestants = refinement.contestants(small)
    assert next(iter(contestants)) == "plain"
    del contestants["ours, compiled"]
    with torch.inference_mode():
        wanted = contestants["plain"](small.queries)
        for name, refine in contestants.items():
            found = refine(small.queries)
            if "bfloat16" in name:  # a box beside the image reads next to nothing: a norm of noise
                apart = (found.content.float() - wanted.content).norm(dim=-1)
                assert (apart / wanted.content.norm(dim=-1)).median() < 0.03
            else:
                torch.testing.assert_close(found.content, wanted.content, rtol=0, atol=1e-3)
                torch.testing.assert_close(found.boxes, wanted.boxes, rtol=1e-4, atol=1e-3)


def test_memory_of_a_small_layer_is_what_theory_says() -> None:
    subject = training_memory.generic(batch=64, dim=32)
    rows = gradient_memory.by_gradient(subject, (1, 3), steps=4)
    kept = {(row.gradient, row.k): row.kept for row in rows}
    state = 64 * 32 * 4
    # tanh keeps its output, the linear layer its input, and the loss the state.
    assert kept["RAG(k)", 3] - kept["RAG(k)", 1] == 2 * state
    assert kept["Neumann(k)", 3] == kept["Neumann(k)", 1] == kept["JFB", 1]
    peak = {(row.gradient, row.k): row.peak for row in rows}
    assert peak["Neumann(k)", 3] - peak["JFB", 1] < state  # no term is held beside the sum
    flat = gradient_memory.by_positions(subject, (1, 4), steps=6)
    assert flat[0].kept == flat[1].kept


def test_supervision_evaluates_twice_at_each_position() -> None:
    """With gradient; and once more each where it is computed again."""
    subject = training_memory.generic(batch=4, dim=3)
    tracked: list[bool] = []

    def note(*_: Any) -> None:
        tracked.append(torch.is_grad_enabled())

    handle = subject.layer.register_forward_pre_hook(note)  # recomputation may not come to the end
    for recompute in (False, True):
        tracked.clear()
        training_memory.supervise(subject, (2, 5), recompute)
        assert sum(tracked) == 2 * 2 * (1 + recompute) and len(tracked) == sum(tracked) + 5
    handle.remove()


def test_as_many_positions_are_measured_as_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    monkeypatch.setattr(gradient_memory, "supervise", lambda _, at, again: seen.append(list(at)))
    monkeypatch.setattr(gradient_memory, "memory_of", lambda *args: args[-1]())
    gradient_memory.by_positions(training_memory.generic(4, 3), (1, 3), steps=6)
    assert seen == [[6], [4, 5, 6]]


def test_at_once_has_no_least_steps() -> None:
    base = EquilibriumConfig()
    found = steps.settings(base)
    assert found["auto", "settled"].settled == base.settled
    assert found["auto", "at once"].settled == replace(base.settled, least_steps=0)
    assert base.settled.least_steps == 6


def test_memory_of_the_refinement_has_the_gradients_of_its_maps() -> None:
    """And where one weight alone wants a gradient, neither these nor those of the weights."""
    small = full_size(1, 1, image=(256, 320))
    subject = training_memory.subject_of(small)
    assert set(subject.wanting) == {*small.layer.parameters(), *subject.args[0]}
    named = small.layer.named_parameters()
    weights = sum(p.nbytes for name, p in named if not name.startswith("class_head"))  # not read
    peak = counts.live_bytes(lambda: training_memory.train(subject, implicit.JFB(), 1))
    maps = sum(map_.nbytes for map_ in subject.args[0])
    assert peak > weights + maps
    assert training_memory.frozen_peak(subject, implicit.JFB(), 1) < maps < weights
    assert all(tensor.grad is None for tensor in subject.wanting)
    assert set(subject.wanting) == {*small.layer.parameters(), *subject.args[0]}


@pytest.mark.parametrize(
    "gradient",
    [
        implicit.JFB(),
        implicit.RAG(2),
        implicit.RAG(2, recompute=True),
        implicit.Neumann(2),
        implicit.Phantom(2),
        implicit.BPTT(),
        implicit.Implicit(stop=implicit.Steps(3)),
    ],
    ids=repr,
)
def test_what_is_imagined_takes_the_bytes_of_what_is_computed(gradient: implicit.Gradient) -> None:
    """Two ways to count: tensors without values, and all that is computed."""
    for real in (
        training_memory.generic(batch=64, dim=32),
        training_memory.subject_of(full_size(5, 4, image=(64, 96))),
    ):
        train = functools.partial(training_memory.train, real, gradient, 3)
        wanted = counts.saved_bytes(train, real.outside), counts.live_bytes(train)
        with training_memory.measured(real) as copy:
            row = training_memory.memory_of(
                copy, "", 1, 3, functools.partial(training_memory.train, copy, gradient, 3)
            )
        assert (row.kept, row.peak) == wanted
        # Of what operations allocate inside themselves, and of the states of generators that
        # recomputation keeps, the allocator alone knows.
        allocated = counts.peak_bytes(train)
        assert row.peak <= allocated <= 1.1 * row.peak + 2**14


def test_bytes_are_freed_when_the_last_view_of_them_is() -> None:
    with counts.Operations() as operations:
        x = torch.ones(1000)
        view = x.view(10, 100)[2:]
        del x
        assert operations.now == 4000
        del view
        assert operations.now == 0
        y = torch.ones(500)
    assert (operations.now, operations.peak) == (2000, 4000)
    del y
    assert operations.now == 0


def test_exponents_and_a_small_sweep() -> None:
    assert scaling.exponent([1, 10, 100], [5, 50, 500]) == pytest.approx(1)
    setting = scaling.Setting(queries=5, points=4, area=64 * 108, steps=2)
    costs = [scaling.cost_of("steps", replace(setting, steps=n), repeats=1) for n in (2, 4)]
    assert [cost.size for cost in costs] == [2, 4]
    assert costs[0].bytes == costs[1].bytes > 0  # the path is not kept


def test_the_memory_of_a_sweep_is_that_at_the_end_of_the_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(scaling, "supervise", lambda _, at: seen.append(at))
    setting = scaling.Setting(queries=5, points=4, area=64 * 108, steps=7)
    scaling.cost_of("steps", setting, repeats=1)
    assert seen == [(7,)]


def test_the_stopwatch_tells_parts_from_what_is_inside_them() -> None:
    watch = training_step.Stopwatch()
    with watch.part("path"):
        time.sleep(0.02)
        with watch.part("matching"):
            time.sleep(0.05)
    assert watch.parts["matching"] >= 0.05 and watch.parts["path"] >= 0.02
    assert sum(watch.parts.values()) < 0.02 + watch.parts["matching"] + 0.05
    assert watch.parts["backward"] == 0


def test_a_training_step_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_step, "IMAGE", (64, 96))
    monkeypatch.setattr(training_step, "QUERIES", 5)
    decoder = EquilibriumConfig(train_steps=3, multiples=1, spacing=2)
    watch = training_step.Step(decoder, "cpu").split()
    assert all(watch.parts[name] > 0 for name in training_step.PARTS)
    assert watch.entered["matching"] == 1 + len(decoder.positions)
    parts = training_step.Step(StackedConfig(layers=1), "cpu").split().parts
    assert parts["path"] == parts["supervised"] == 0 < parts["matching"]


def test_on_a_gpu_a_step_is_timed_without_the_stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_step, "IMAGE", (64, 96))
    monkeypatch.setattr(training_step, "QUERIES", 5)
    monkeypatch.setattr(training_step, "BACKBONE", "small")
    made = {"AdaMixer": training_step.Step(training_step.DETECTORS["AdaMixer"], "cpu")}
    (on_cpu,) = training_step.measure(made, 1)
    assert on_cpu.whole is None and on_cpu.total == sum(on_cpu.seconds.values())
    monkeypatch.setattr(training_step, "device", lambda: "cuda")
    monkeypatch.setattr(training_step, "by_turns", lambda runs, repeats: [[0.5, 1.0, 7.0]])
    (on_a_gpu,) = training_step.measure(made, 1)
    assert on_a_gpu.total == 1.0 and set(on_a_gpu.seconds) == set(training_step.PARTS)


def test_jumps_are_beyond_the_movement_of_the_window() -> None:
    def output(boxes: list[list[float]], scores: list[float]) -> Output:
        logits = torch.logit(torch.tensor(scores))[None, :, None]
        return Output(logits, torch.tensor([boxes]))

    before = output([[10, 10, 20, 20], [50, 50, 60, 60]], [0.9, 0.1])
    after = output([[80, 80, 90, 90], [9, 9.5, 19, 19]], [0.9, 0.9])
    assert steps.jumps_between(before, after) == pytest.approx([0.5])
    assert steps.jumps_between(before, output([[0, 0, 1, 1]], [0.1])) == []


@pytest.fixture
def small_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full size is small, and ceilings are given: commands run as they are, in seconds."""
    small = functools.partial(full_size, 5, 4, image=(64, 96))
    for module in (refinement, throughput):
        monkeypatch.setattr(module, "full_size", lambda *_, **options: small(**options))
        known = classmethod(lambda cls, *_: cls(flops=1e9, bytes=1e9))
        monkeypatch.setattr(
            module, "Ceilings", type("Known", (ceilings.Ceilings,), {"measured": known})
        )
    monkeypatch.setattr(refinement, "SIZES", ((5, 4),))
    monkeypatch.setattr(refinement, "CHAIN", 1)
    monkeypatch.setattr(throughput, "IMAGE", (64, 96))
    monkeypatch.setattr(throughput, "STEPS", 2)
    monkeypatch.setattr(throughput, "BACKBONE", "small")
    monkeypatch.setattr(training_step, "IMAGE", (64, 96))
    monkeypatch.setattr(training_step, "QUERIES", 5)
    monkeypatch.setattr(training_step, "REPEATS", 1)
    monkeypatch.setattr(training_step, "BACKBONE", "small")
    monkeypatch.setattr(torch, "compile", lambda layer: layer)


def test_refinement_prints_and_writes(
    small_everywhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = main_of("refinement", refinement.main, tmp_path, monkeypatch)
    assert len(written["times"]) == 6
    work = ceilings.Work.of(full_size(5, 4, image=(64, 96)), torch.float32)
    floor = 1e3 * max(work.flops, work.bytes) / 1e9
    assert written["apart"]["5/4"]["floor"] == pytest.approx(floor)
    assert refinement.goals(written)[-1].met is None  # without a GPU


def test_throughput_prints_and_writes(
    small_everywhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = main_of("throughput", throughput.main, tmp_path, monkeypatch)
    names = [row["name"] for row in written]
    assert names[0] == throughput.EAGER and throughput.ENCODER in names
    assert names[-2:] == [throughput.FLOOR, throughput.WHOLE_FLOOR]
    assert all(0 < row["median"] <= row["p95"] for row in written)
    assert all(goal.met is None for goal in throughput.goals(written))
    refined, whole = (row["median"] for row in written[-2:])
    before = throughput.work_before(torch.float32)
    assert whole == pytest.approx(refined + max(before.flops, before.bytes) / 1e9)
    on_a_gpu = [*written, {"name": throughput.GRAPH, "median": 0.009, "p95": 0.01}]
    rate, ratio = throughput.goals(on_a_gpu)
    assert rate.met and rate.found == pytest.approx(1 / 0.009)
    assert rate.floor == pytest.approx(1 / whole)
    older = [row for row in on_a_gpu if row["name"] != throughput.WHOLE_FLOOR]
    assert throughput.goals(older)[0].floor is None  # 25 refinements are less than is done
    assert ratio.found == pytest.approx(written[0]["median"] / 0.009)


def test_backbone_and_neck_are_timed_as_the_engine_runs_them(
    small_everywhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a graph, in bfloat16; and their work is counted without doing it."""
    recorded_graphs.pretend(monkeypatch)
    model = Detector(throughput.configuration()).eval()
    engine = Engine(model)
    image, size = torch.rand(1, 3, 64, 96) * 255, torch.tensor([[64, 96]])
    eager = throughput.encoder(engine, image, size, graph=False)()
    graph = throughput.encoder(engine, image, size, graph=True)()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        maps, _ = model.encode(image, size)
    for a, b, wanted in zip(eager, graph, maps, strict=True):
        assert torch.equal(a, b) and torch.equal(a, wanted[..., :1, :1])
    weights = [p for part in (model.backbone, model.neck) for p in part.parameters()]
    done = ceilings.Work.counted(lambda: model.encode(image, size), weights, torch.bfloat16)
    assert throughput.work_before(torch.bfloat16) == done and done.flops > 1e6


def test_one_graph_of_many_refinements_is_what_an_engine_records(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights are cast beforehand, and maps are those of a neck under autocast."""
    recorded_graphs.pretend(monkeypatch)
    monkeypatch.setattr(refinement, "STEPS", 2)
    small, seen = full_size(5, 4, image=(64, 96)), []

    def note(layer: RefinementLayer, given: tuple[Any, ...]) -> None:
        seen.append((layer.ffn[0].weight.dtype, [feature.dtype for feature in given[1]]))

    small.layer.register_forward_pre_hook(note)
    assert refinement.in_one_graph(small, repeats=1) > 0
    prepared = small.layer.prepare(small.features)
    assert seen and seen[0] == (torch.bfloat16, [feature.dtype for feature in prepared])
    assert small.layer.ffn[0].weight.dtype == torch.float32


@pytest.mark.slow
def test_training_step_prints_and_writes(
    small_everywhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_step, "seconds_of_data", lambda: 0.5)
    monkeypatch.setattr(training_step, "RECURRENT_STEPS", (6, 8))
    written = main_of("training_step", training_step.main, tmp_path, monkeypatch)
    rows = {row["detector"]: row for row in written["steps"]}
    waits = {name: row["waits"] for name, row in rows.items()}
    assert waits == {"AdaMixer": 1, "RNNDet": 1, "DEQDet": 7}
    assert 0 < written["without_decoder"] < min(row["peak"] for row in rows.values())
    assert written["rnndet_memory"]["6"] == rows["RNNDet"]["peak"] < written["rnndet_memory"]["8"]
    _, memory, waiting = training_step.goals(written)
    assert memory.floor is not None and memory.floor < memory.found < 2
    assert written["steps"][0]["held"] > written["steps"][2]["held"]  # six layers, and two
    monkeypatch.setattr(training_step, "held_bytes", lambda *_, **__: 0)
    assert training_step.goals(written)[1].found == memory.found  # as it was written down
    assert waiting.met is False and "12 refinements" in waiting.reason


@pytest.mark.parametrize("decoder", [StackedConfig(layers=2), EquilibriumConfig()])
def test_what_is_held_is_counted_without_a_step(
    decoder: StackedConfig | EquilibriumConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_step, "IMAGE", (64, 96))
    monkeypatch.setattr(training_step, "QUERIES", 5)
    monkeypatch.setattr(training_step, "BACKBONE", "small")
    step = training_step.Step(decoder, "cpu")
    step()
    model, states = step.detector, step.optimizer.state.values()
    moments = [x for state in states for x in state.values() if isinstance(x, Tensor)]
    there = sum(x.nbytes for x in (*model.parameters(), *model.buffers(), *moments))
    assert training_step.held_bytes(decoder) == there
    assert 0 < training_step.held_bytes(decoder, parts=("backbone", "neck")) < there


def test_memory_of_a_step_has_what_is_held_in_it() -> None:
    """And a whole step is its own time."""
    made = training_step.Measured(
        "DEQDet", {"path": 1.0}, peak=10, waits=7, held=5, lowest=0.9, highest=1.1
    )
    assert made.memory == 15 and made.total == 1.0 and replace(made, whole=0.8).total == 0.8


def test_a_step_without_decoder_trains_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_step, "IMAGE", (64, 96))
    step = training_step.Step(StackedConfig(layers=1), "cpu")
    before = {name: p.detach().clone() for name, p in step.detector.named_parameters()}
    step.without_decoder()
    moved = {n for n, p in step.detector.named_parameters() if not torch.equal(p, before[n])}
    assert any(name.startswith("neck") for name in moved)
    assert any(name.startswith("backbone") for name in moved)
    assert not any(name.startswith(("decoder", "queries")) for name in moved)


# -- goals and the page --------------------------------------------------------------------------


def test_a_goal_is_never_rounded_in_its_own_favour() -> None:
    cells = Goal("time", 0.25001, most=0.25).cells()
    assert cells[1:4] == ("≤ 0.25", "0.2501", "**missed**")
    assert Goal("speed", 99.999, least=100).cells()[1:4] == ("≥ 100", "99.99", "**missed**")
    assert Goal("time", 0.25, most=0.25).cells()[1:4] == ("≤ 0.25", "0.25", "met")


def test_a_goal_tells_its_reason_only_where_it_is_not_met() -> None:
    goal = Goal("time", 0.9, most=0.5, floor=0.71231, reason="It is far.")
    assert goal.cells()[-1] == "It is far. Measured floor: 0.7124."
    assert replace(goal, found=0.5).cells()[-1] == ""
    unknown = replace(goal, found=None, floor=None)
    assert unknown.met is None and unknown.cells()[2:] == ("–", "not measured", "It is far.")


def written_results() -> list[tuple[Any, dict[str, Any]]]:
    """The module and the file of everything that was measured."""
    return [
        (report.module_of(path), json.loads(path.read_text("utf-8")))
        for path in report.results_in(ROOT / "benchmarks" / "results")
    ]


def test_what_missed_its_goal_has_its_reason_on_the_page() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    goals = [
        goal
        for module, written in written_results()
        if hasattr(module, "goals")
        for goal in module.goals(written["results"])
    ]
    assert len(goals) > 20
    for goal in goals:
        assert goal.met or goal.reason, f"{goal.what}: missed, and nobody says why"
        assert f"| {' | '.join(goal.cells())} |" in page


def test_work_and_ceilings_bound_a_refinement_from_below() -> None:
    small = full_size(5, 4, image=(64, 96))
    work = ceilings.Work.of(small, torch.float32)
    mixing, queries = small.layer.mixing, 5
    large = 2 * queries * (mixing.generator.weight.numel() + mixing.project_out.weight.numel())
    assert large < work.flops < 2 * large
    read = sum(p.nbytes for n, p in small.layer.named_parameters() if "class_head" not in n)
    assert work.bytes == read == 2 * ceilings.Work.of(small, torch.bfloat16).bytes
    bound = ceilings.Ceilings(flops=work.flops / 3.0, bytes=work.bytes / 2.0)
    assert bound.floor(work.flops, work.bytes) == pytest.approx(3.0)


def test_ceilings_are_timed_for_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes a millisecond is timed many times at once, and told as one of them."""
    calls: list[int] = []
    ceilings.repeated(lambda: calls.append(1), 5)()
    assert len(calls) == 5
    monkeypatch.setattr(ceilings, "COPIED", 2**10)
    monkeypatch.setattr(ceilings, "repeated", lambda run, calls: lambda: 0.001 * calls)
    monkeypatch.setattr(ceilings, "seconds", lambda run: run())
    timed: list[float] = []

    def by_turns(runs: list[Callable[[], float]], repeats: int) -> list[list[float]]:
        timed.extend(run() for run in runs)
        return [[run()] * repeats for run in runs]

    monkeypatch.setattr(ceilings, "by_turns", by_turns)
    found = ceilings.Ceilings.measured("cpu", torch.float32, side=8)
    assert len(timed) == 2 and min(timed) >= 0.2
    assert found.flops == pytest.approx(2 * 8**3 / 0.001)
    assert found.bytes == pytest.approx(2 * 2**10 / 0.001)


def test_a_page_without_its_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="has not the marks"):
        pages.put("text", "a table", "content")


def test_the_page_is_made_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    console = measure.wide_console()
    console.print("a table")
    measure.write_results(folder, "loader_memory", [], console)
    (folder / "loader_memory.png").write_bytes(b"")
    monkeypatch.setattr("sys.argv", ["report", "--output", str(folder)])
    report.main()
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "## `python -m benchmarks.loader_memory`" in page
    assert "a table" in page and "](results/loader_memory.png)" in page
    assert measure.machine() in page


def test_what_a_gpu_gave_stands_beside_what_the_cpu_gave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a benchmark that runs where it can: neither file, plot nor headline is the other's."""
    results = tmp_path / "results"
    shutil.copytree(ROOT / "benchmarks" / "results", results)
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    wanted = report.headlines(results)
    written = json.loads((results / "throughput.json").read_text(encoding="utf-8"))["results"]
    on_a_gpu = [{**row, "median": row["median"] / 100} for row in written]
    on_a_gpu.append({"name": throughput.GRAPH, "median": 0.009, "p95": 0.01})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A made-up GPU")
    console = measure.wide_console()
    console.print("a GPU's table")
    path = measure.write_results(results, "throughput", on_a_gpu, console, place="cuda")
    assert path.name == "throughput.cuda.json"
    assert json.loads(path.read_text(encoding="utf-8"))["device"] == "A made-up GPU"
    (results / "throughput.cuda.png").write_bytes(b"")
    assert all((results / name).read_bytes() == stored for name, stored in before.items())

    monkeypatch.setattr("sys.argv", ["report", "--output", str(results)])
    report.main()
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    own = page.split("## `python -m benchmarks.throughput`")[1].split("\n## ")[0]
    cpu, gpu = own.split("### On A made-up GPU")
    assert "a GPU's table" in gpu and "](results/throughput.cuda.png)" in gpu
    assert "There was no GPU at hand" in cpu and "There was no GPU at hand" not in gpu
    assert "| 111.1 | met |" in gpu and page.count("A made-up GPU") == 1
    assert page.count((throughput.__doc__ or "").partition("\n")[0]) == 1
    assert report.headlines(results) == wanted

    (results / "throughput.json").unlink()
    alone = report.section(path, json.loads(path.read_text(encoding="utf-8")))
    assert alone.startswith("## `python -m benchmarks.throughput`") and "### On A made" in alone


def test_the_processor_is_named_with_what_it_has_for_bfloat16(tmp_path: Path) -> None:
    told = tmp_path / "cpuinfo"
    told.write_text("model name\t: A Chip\nflags\t: sse avx512_bf16 amx_bf16\n\nmodel name\t: B\n")
    assert measure.processor(told) == "A Chip (avx512_bf16, amx_bf16)"
    told.write_text("model name\t: A Chip\nflags\t: sse\n")
    assert measure.processor(told) == "A Chip (nothing for bfloat16)"
    assert measure.processor(tmp_path / "nothing") and measure.processor() in measure.machine()


@pytest.mark.slow
def test_all_commands_are_timed_and_the_page_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in a process of its own; with two of the quick ones, told by name."""
    monkeypatch.setattr(everything, "COMMANDS", ("gradient_error", "mixed_batches"))
    folder = tmp_path / "results"
    written = main_of("__main__", everything.main, folder, monkeypatch)
    assert list(written) == ["gradient_error", "mixed_batches"] and min(written.values()) > 0
    assert everything.goals(written)[0].found == sum(written.values())
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "## `python -m benchmarks`\n" in page and "minutes in all | ≤ 15" in page
    assert page.count("## `python -m benchmarks.") == 2

    monkeypatch.setattr(sys, "argv", ["benchmarks", "mixed_batches", "--output", str(folder)])
    everything.main()
    again = json.loads((folder / "__main__.json").read_text(encoding="utf-8"))["results"]
    assert again["gradient_error"] == written["gradient_error"]
    assert again["mixed_batches"] != written["mixed_batches"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", "mixed"])
    with pytest.raises(SystemExit):
        everything.main()


def test_the_page_in_the_repository_is_that_of_its_results() -> None:
    """Every result has its section, and what it printed is there to the letter."""
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for path in report.results_in(ROOT / "benchmarks" / "results"):
        assert report.section(path, json.loads(path.read_text(encoding="utf-8"))) in page
