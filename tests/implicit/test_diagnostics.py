"""Tables, plots and logs of solves, against the figures that they are made of."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

import implicit
from implicit import Solution, Status
from implicit.diagnostics import ConvergenceLogger, plot_convergence, report


def solution(
    status: list[int],
    steps: list[int],
    relative: list[float],
    trace: torch.Tensor | None = None,
    device: str = "cpu",
) -> Solution:
    """A solution with given figures; a residual is ten times the relative one."""
    figures = torch.tensor(relative, dtype=torch.float64, device=device)
    counts = torch.tensor(steps, device=device)
    return Solution(
        value=None,
        aux=None,
        status=torch.tensor(status, device=device),
        steps=counts,
        evaluations=counts + 1,
        residual=10 * figures,
        relative_residual=figures,
        trace=trace,
    )


def printed(table: Any) -> list[str]:
    console = Console(width=120, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


def row(lines: list[str], name: str) -> list[str]:
    (line,) = [line for line in lines if name in line]
    return [cell.strip() for cell in line.split("│")[2:-1]]


# Report


def test_report_counts_and_quantiles() -> None:
    n = 100
    s = solution([0] * 90 + [1] * 7 + [2] * 3, list(range(1, n + 1)), [0.001 * i for i in range(n)])
    lines = printed(report(s))
    assert "100 samples: 90 CONVERGED, 7 STOPPED, 3 DIVERGED" in lines[0]
    assert row(lines, "median") == ["50", "51", "0.49", "0.049"]
    assert row(lines, "90 %") == ["90", "91", "0.89", "0.089"]
    assert row(lines, "max") == ["100", "101", "0.99", "0.099"]


def test_report_names_the_worst_samples_first() -> None:
    status = [0, 2, 1, 1, 0, 0, 0]
    s = solution(status, [1, 2, 3, 4, 5, 6, 7], [1e-4, 0.5, 0.3, 0.9, 1e-5, 1e-6, 1e-7])
    names = [line.split("│")[1].strip() for line in printed(report(s)) if "sample " in line]
    assert names == [
        "sample 1, DIVERGED",
        "sample 3, STOPPED",
        "sample 2, STOPPED",
        "sample 0, CONVERGED",
        "sample 4, CONVERGED",
    ]


def test_report_leaves_out_statuses_that_did_not_occur() -> None:
    assert "2 samples: 2 CONVERGED" in printed(report(solution([0, 0], [3, 4], [0.1, 0.2])))[0]


def test_report_writes_counts_out() -> None:
    lines = printed(report(solution([0], [12344], [0.123456])))
    assert row(lines, "max") == ["12344", "12345", "1.23", "0.123"]


def test_report_of_residuals_that_are_no_numbers() -> None:
    s = solution([0, 2, 2], [3, 4, 5], [0.1, float("nan"), float("inf")])
    lines = printed(report(s))
    assert row(lines, "max")[-1] == "nan"
    assert row(lines, "sample 0")[-1] == "0.1"


def test_report_of_a_solve() -> None:
    s = implicit.fixed_point(torch.cos, torch.rand(8, 3, requires_grad=True))
    lines = printed(report(s))
    assert "8 samples: 8 CONVERGED" in lines[0]
    assert row(lines, "max")[:2] == [str(int(s.steps.max())), str(int(s.evaluations.max()))]


def test_report_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(ImportError, match=r"implicit\.report needs rich.*\[plots\]"):
        report(solution([0], [1], [0.1]))


# Plot


def traced(batch: int, **options: Any) -> Solution:
    generator = torch.Generator().manual_seed(0)
    y0 = torch.rand(batch, 3, generator=generator, dtype=torch.float64)
    return implicit.fixed_point(torch.cos, y0, trace=True, **options)


def axes() -> Axes:
    return Figure().subplots()


def test_a_small_batch_is_a_line_per_sample() -> None:
    s = traced(4)
    assert s.trace is not None
    ax = plot_convergence(s, ax=axes())
    assert ax.get_yscale() == "log" and ax.get_legend() is None
    assert ax.get_xlabel() and ax.get_ylabel()
    assert len(ax.get_lines()) == 4
    for line, drawn in zip(ax.get_lines(), s.trace.T, strict=True):
        np.testing.assert_array_equal(line.get_xdata(), np.arange(1, len(s.trace) + 1))
        np.testing.assert_array_equal(line.get_ydata(), drawn.numpy())


def test_a_large_batch_is_a_median_and_a_band() -> None:
    """A sample that stopped keeps its last residual: at the end all 20 count, not those left."""
    trace = torch.full((3, 20), torch.nan, dtype=torch.float64)
    trace[0] = 1.0
    trace[1] = torch.arange(1, 21) / 100
    trace[2, 15:] = 1e-6
    ax = plot_convergence(solution([0] * 20, [2] * 20, [0.0] * 20, trace), ax=axes())
    (line,) = ax.get_lines()
    np.testing.assert_allclose(line.get_ydata(), [1.0, 0.10, 0.05])
    (band,) = ax.collections
    edges = band.get_paths()[0].vertices
    at_two = edges[np.isclose(edges[:, 0], 2), 1]
    np.testing.assert_allclose([at_two.min(), at_two.max()], [0.02, 0.18])


def test_several_solutions_have_a_colour_and_a_name_each() -> None:
    named = {"naive": traced(3, solver=implicit.Naive()), "anderson": traced(30)}
    ax = plot_convergence(named, ax=axes())
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["naive", "anderson"]
    assert len({line.get_color() for line in ax.get_lines()}) == 2


@pytest.mark.parametrize("batch", [3, 30])
def test_residuals_that_cannot_be_drawn(batch: int) -> None:
    """Zero, infinity, and NaN from the first evaluation, in some samples and in all."""
    trace = torch.ones(4, batch, dtype=torch.float64)
    trace[:, 0], trace[:, 1], trace[:, 2] = torch.nan, torch.inf, 0.0
    for drawn in (trace, torch.full_like(trace, torch.nan), torch.zeros_like(trace)):
        figure = Figure()
        plot_convergence(
            solution([2] * batch, [1] * batch, [1.0] * batch, drawn), ax=figure.subplots()
        )
        figure.canvas.draw()


def test_new_axes_by_default() -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    ax = plot_convergence(traced(2))
    assert ax.figure.number in plt.get_fignums()
    plt.close(ax.figure)


def test_plot_needs_a_trace() -> None:
    without = implicit.fixed_point(torch.cos, torch.rand(2, 3))
    with pytest.raises(ValueError, match=r"the solution has no trace.*trace=True"):
        plot_convergence(without, ax=axes())
    with pytest.raises(ValueError, match="the solution 'b' has no trace"):
        plot_convergence({"a": traced(2), "b": without}, ax=axes())
    with pytest.raises(ValueError, match="no solution to draw"):
        plot_convergence({}, ax=axes())
    with pytest.raises(TypeError, match=r"is not a solution.*or a dict of them"):
        plot_convergence([traced(2)], ax=axes())  # type: ignore[arg-type]


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"plot_convergence needs matplotlib.*\[plots\]"):
        plot_convergence(traced(2))


# Logger


def test_summary_is_over_all_samples_of_all_solves() -> None:
    logger = ConvergenceLogger()
    logger.add(solution([0, 0, 1], [1, 2, 6], [0.1, 0.2, 0.6]))
    logger.add(solution([2], [3], [float("nan")]))
    assert logger.summary() == pytest.approx(
        {
            "samples": 4,
            "steps_mean": 3,
            "steps_max": 6,
            "evaluations_mean": 4,
            "evaluations_max": 7,
            "relative_residual_mean": 0.3,
            "relative_residual_max": 0.6,
            "converged": 0.5,
            "diverged": 0.25,
        }
    )


def test_summary_begins_anew() -> None:
    logger = ConvergenceLogger()
    assert logger.summary() == {}
    logger.add(solution([0], [9], [0.5]))
    logger.summary()
    logger.add(solution([0], [1], [0.1]))
    figures = logger.summary()
    assert figures["samples"] == 1 and figures["steps_max"] == 1
    assert logger.summary() == {}


def test_summary_holds_plain_floats() -> None:
    logger = ConvergenceLogger()
    logger.add(traced(3))
    assert all(type(value) is float for value in logger.summary().values())


def test_summary_without_a_finite_residual() -> None:
    logger = ConvergenceLogger()
    logger.add(solution([2], [1], [float("inf")]))
    figures = logger.summary()
    assert np.isnan(figures["relative_residual_mean"]) and figures["diverged"] == 1


def test_add_does_not_wait_for_the_device() -> None:
    """On the meta device no value exists, so whatever looked at one would raise."""
    logger = ConvergenceLogger()
    logger.add(solution([0], [1], [0.1], device="meta"))


def test_add_keeps_copies_and_no_graph() -> None:
    """As it must where the next solve writes over the tensors of this one (CUDA graphs)."""
    w = torch.tensor(0.5, requires_grad=True)
    s = implicit.fixed_point(
        lambda y: w * y + 1, torch.zeros(2, 1), gradient=implicit.BPTT(), solver=implicit.Naive()
    )
    steps = int(s.steps.max())
    logger = ConvergenceLogger()
    logger.add(s)
    for tensor in (s.status, s.steps, s.evaluations, s.relative_residual):
        with torch.no_grad():
            tensor.zero_()
    figures = logger.summary()
    assert figures["steps_max"] == steps and figures["evaluations_max"] == steps + 1
    assert figures["converged"] == float(Status.CONVERGED == 0)


def test_solves_of_different_precision_and_batch() -> None:
    logger = ConvergenceLogger()
    for dtype, batch in ((torch.float32, 2), (torch.float64, 3), (torch.bfloat16, 1)):
        y0 = torch.ones(batch, 2, dtype=dtype)
        logger.add(implicit.fixed_point(torch.cos, y0, stop=implicit.Steps(4)))
    figures = logger.summary()
    assert figures["samples"] == 6 and figures["steps_mean"] == 4
    assert figures["converged"] == 0 and figures["diverged"] == 0
