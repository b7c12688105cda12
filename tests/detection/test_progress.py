"""What a run says: lines and bar with a clock of their own, and the log."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from detection.training.progress import JsonLines, Progress, read_json_lines


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain(clock: Clock, total: int, **options: object) -> tuple[Progress, io.StringIO]:
    text = io.StringIO()
    progress = Progress(total, console=Console(file=text, width=40), clock=clock, **options)
    return progress, text


def test_plain_lines_come_now_and_then_and_at_the_end() -> None:
    clock = Clock()
    progress, text = plain(clock, 10, every=5.0)
    with progress:
        for step in range(1, 11):
            clock.now += 2.0
            progress.update(step, {"loss": 1 / step, "gradient_norm": 3.0})
    steps = [line.split()[1] for line in text.getvalue().splitlines()]
    assert steps == ["1/10", "4/10", "7/10", "10/10"]


def test_a_line_has_metrics_step_time_and_time_left_and_is_not_broken() -> None:
    clock = Clock()
    progress, text = plain(clock, 3601)
    with progress:
        clock.now += 2.0
        progress.update(1, {"loss": 12.3456, "gradient_norm": 0.5, "lr": 1e-4})
    assert text.getvalue() == (
        "step 1/3601  loss 12.35  gradient norm 0.5  lr 0.0001  2 s/step  2:00:00 left\n"
    )


def test_the_step_time_is_an_average_per_step() -> None:
    clock = Clock()
    progress, _ = plain(clock, 100)
    with progress:
        clock.now += 10.0
        progress.update(10)
        assert progress.step_time == pytest.approx(1.0)
        clock.now += 2.0
        progress.update(11)
        assert progress.step_time == pytest.approx(0.95 * 1 + 0.05 * 2)


def test_resumed_steps_and_pauses_that_end_in_a_note_cost_no_time() -> None:
    clock = Clock()
    progress, _ = plain(clock, 100, done_steps=50)
    with progress:
        clock.now += 1.0
        progress.update(51)
        clock.now += 500.0
        progress.note("evaluated")
        clock.now += 1.0
        progress.update(52)
    assert progress.step_time == pytest.approx(1.0)


def test_metrics_stay_until_they_are_replaced() -> None:
    clock = Clock()
    progress, text = plain(clock, 2, every=0.0)
    with progress:
        progress.update(1, {"loss": 2.0, "lr": 0.1})
        progress.update(2, {"loss": 1.0})
    assert "loss 1  lr 0.1" in text.getvalue().splitlines()[-1]


def test_notes_are_written_as_they_are() -> None:
    progress, text = plain(Clock(), 1)
    with progress:
        progress.note("[bold] is no markup :smile:" + 40 * " x")
    assert text.getvalue() == "[bold] is no markup :smile:" + 40 * " x" + "\n"


def test_quiet_says_nothing() -> None:
    progress, text = plain(Clock(), 1, quiet=True)
    with progress:
        progress.update(1, {"loss": 1.0})
        progress.note("hidden")
    assert text.getvalue() == ""


def test_a_terminal_shows_a_bar_and_leaves_its_cursor_whole() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=60, color_system=None)
    with Progress(20, console=console) as progress:
        progress.update(5, {"loss": 1.5})
        progress.note("half way")
        progress.update(20, {"loss": 0.5})
    shown = text.getvalue()
    assert "half way" in shown
    assert "20/20" in shown
    assert "loss 0.5" in shown
    assert "━" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1


def test_an_error_inside_passes_and_stops_the_bar() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    with pytest.raises(KeyError), Progress(2, console=console):
        raise KeyError("inside")
    console.print("free again")


def test_numbers_survive_the_log(tmp_path: Path) -> None:
    record = {
        "step": 3,
        "loss": 0.1,
        "norm": torch.tensor(2.5),
        "bad": [math.nan, math.inf, -math.inf],
        "scores": {"AP": 0.5, "none": None, "name": "größer\u2028"},
        "done": True,
    }
    with JsonLines(tmp_path / "run" / "log.jsonl") as log:
        log.write(record)
        assert len(read_json_lines(log.path)) == 1, "flushed at once"
    text = (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8")
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict["bad"] == ["NaN", "Infinity", "-Infinity"]
    (found,) = read_json_lines(log.path)
    assert math.isnan(found["bad"][0])
    assert found["bad"][1:] == [math.inf, -math.inf]
    assert {**found, "bad": 0} == {**record, "norm": 2.5, "bad": 0}


def write(path: Path, *steps: int, keep: int | None = None) -> None:
    with JsonLines(path, keep=keep) as log:
        for step in steps:
            log.write({"step": step})


def test_a_log_is_continued(tmp_path: Path) -> None:
    write(tmp_path / "log", 1, 2)
    write(tmp_path / "log", 3)
    assert [record["step"] for record in read_json_lines(tmp_path / "log")] == [1, 2, 3]


def test_resuming_drops_what_will_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with JsonLines(path) as log:
        log.write({"note": "no step"})
    write(path, 1, 2, 3, 4)
    write(path, 3, keep=3)
    assert [record.get("step") for record in read_json_lines(path)] == [None, 1, 2, 3]
    assert list(tmp_path.iterdir()) == [path]


def test_a_line_cut_short_by_a_crash_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path, 1, 2)
    path.write_bytes(path.read_bytes()[:-3])
    assert [record["step"] for record in read_json_lines(path)] == [1]
    write(path, 2)
    assert [record["step"] for record in read_json_lines(path)] == [1, 2]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text('{"step": 1}\nnot json\n')
    with pytest.raises(ValueError, match="log, line 2 is not JSON"):
        read_json_lines(path)
    with pytest.raises(ValueError, match="log, line 2 is not JSON"):
        JsonLines(path)
    assert path.read_text() == '{"step": 1}\nnot json\n'
