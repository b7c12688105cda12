"""Runs beside each other: none is done twice, none stops the others, none begins without room."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_runs
import pytest

from benchmarks.claims import cost, limits, running
from benchmarks.claims.__main__ import Session, main, options
from benchmarks.claims.data import describe, digest_of
from benchmarks.claims.jobs import Job
from benchmarks.claims.measuring import Clock, history
from benchmarks.claims.presets import PRESETS
from benchmarks.claims.results import Record, read
from benchmarks.measure import wide_console
from detection.data import compose_digits
from detection.recipes import recipe

ROOT = Path(__file__).parents[2]
DATA = {"train_images": 40, "val_images": 10, "digest": "def"}


def make_job(folder: Path, arm: str, seed: int = 0) -> Job:
    made = replace(recipe("deqdet_digits"), seed=seed)
    where = folder / f"{arm}-{seed}"
    return Job(f"run of {arm}", (arm,), "abc", made, DATA, folder, where, "cpu", 1, 2, 4)


def do(jobs: list[Job], parallel: int = 2) -> dict[str, Record]:
    ended: dict[str, Record] = {}
    running.run(jobs, parallel, lambda job, record: ended.update({job.arm: record}))
    return ended


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "execute", fake_runs.execute)


@pytest.mark.usefixtures("fake")
def test_a_failed_run_is_recorded_and_does_not_stop_the_others(tmp_path: Path) -> None:
    names = ("killed", "fails", "exits", "fine", "well")
    ended = do([make_job(tmp_path, name) for name in names])
    assert set(ended) == set(names)
    assert [name for name in names if ended[name].finished] == ["fine", "well"]
    assert "ended by signal 9, as the system does where memory runs out" in ended["killed"].reason
    assert ended["exits"].reason == "The process ended with 7: the last word"


@pytest.mark.usefixtures("fake")
def test_what_ended_unrecorded_is_not_done_again(tmp_path: Path) -> None:
    job = make_job(tmp_path, "fine")
    do([job])
    assert do([job])["fine"].finished
    assert (job.folder / "calls").read_text() == "x"
    failed = make_job(tmp_path, "fails")
    do([failed])
    running.forget(failed)
    do([failed])
    assert (failed.folder / "calls").read_text() == "xx"


@pytest.mark.usefixtures("fake")
def test_ctrl_c_ends_the_runs(tmp_path: Path) -> None:
    # Who starts the tests in the background may have told them to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            do([make_job(tmp_path, "waits")])
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 60


def test_jobs_that_remain(tmp_path: Path) -> None:
    jobs = [make_job(tmp_path, arm, seed) for seed in (0, 1) for arm in ("a", "b")]
    done = [jobs[0].record("finished"), jobs[1].record("failed", reason="no")]
    assert running.remaining(jobs, done, retry=False) == jobs[2:]
    assert running.remaining(jobs, done, retry=True) == jobs[1:]


def test_all_arms_have_their_first_seed_first(tmp_path: Path) -> None:
    jobs = running.jobs_of(PRESETS["cpu"], tmp_path, DATA, "abc", tmp_path / "work", 2)
    assert [job.recipe.seed for job in jobs] == [0] * 5 + [1] * 5 + [2] * 5
    assert len({job.folder for job in jobs}) == 15
    assert all(job.code in job.folder.name and "def" in job.folder.name for job in jobs)


def test_two_processes_do_not_work_on_one_preset(tmp_path: Path) -> None:
    with (
        running.alone(tmp_path),
        pytest.raises(SystemExit, match="Another process works on this preset"),
        running.alone(tmp_path),
    ):
        pass
    with running.alone(tmp_path):  # and it is free again
        pass


def test_code_that_changes_meanwhile_is_not_run(tmp_path: Path) -> None:
    ended = do([make_job(tmp_path, "deqdet")])  # of the code "abc"
    assert "RuntimeError: The code has changed" in ended["deqdet"].reason


# -- what it takes -------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, 2**30))
    limits.check_disk(tmp_path / "not" / "there", 2**30, "The checkpoints")
    with pytest.raises(SystemExit, match=r"The checkpoints need 2\.0 GiB .* 1\.0 GiB free"):
        limits.check_disk(tmp_path, 2**31, "The checkpoints")


def test_a_memory_that_is_too_small_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert limits.free_memory("cpu") > 2**28
    monkeypatch.setattr(limits, "free_memory", lambda device: 2**30)
    limits.check_memory(2**30, "cpu", 2)
    with pytest.raises(SystemExit, match=r"4 runs at once need 2\.0 GiB .* choose --jobs 2"):
        limits.check_memory(2**31, "cpu", 4)
    with pytest.raises(SystemExit, match="a smaller preset"):
        limits.check_memory(2**31, "cpu", 1)


def test_nothing_begins_where_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole command, with the timing as if it had been done."""
    monkeypatch.chdir(tmp_path)
    compose_digits(tmp_path / "data", train_images=2, val_images=1, size=64)
    timing = cost.Timing(step=1, image=0.1, weights=2**20, checkpoint=2**30, peak=2**28)
    monkeypatch.setattr(
        cost, "measure", lambda jobs, parallel, cache: {job.run: timing for job in jobs}
    )
    monkeypatch.setattr(running, "run", lambda *args: pytest.fail("a run was begun"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, 2**31))
    size = replace(PRESETS["smoke"], data=replace(PRESETS["smoke"].data, kind="folder"))
    session = Session(size, 2, tmp_path, tmp_path / "work", wide_console())
    with pytest.raises(SystemExit, match=r"The checkpoints need 8\.0 GiB .* 2\.0 GiB free"):
        session.go(tmp_path / "data", dry=False, retry=False)


def test_a_time_is_that_of_steps_evaluations_and_study(tmp_path: Path) -> None:
    job = make_job(tmp_path, "deqdet")
    timing = cost.Timing(step=2.0, image=0.25, weights=10, checkpoint=100, peak=1)
    # 4 epochs of 3 steps, 2 evaluations of 10 images; 50 refinements of 25 of each of 10 images,
    # and 1200 of 4 images; 27 scorings of 10 images.
    expected = 12 * 2 + 2 * 10 * 0.25 + 0.01 * (50 * 10 + 1200 * 4) + 27 * 10 * cost.SCORING
    assert cost.minutes(job, timing) == pytest.approx(expected / 60)
    assert cost.wall([5.0, 3.0, 3.0, 2.0], 2) == 7.0
    timings = {job.run: timing}
    assert cost.disk_needed([job, job], timings, 2) == 2 * 10 + 2 * cost.KEPT * 100


def test_data_is_told_by_its_annotations(tmp_path: Path) -> None:
    one, same, other = (tmp_path / name for name in "abc")
    for root, seed in ((one, 0), (same, 0), (other, 1)):
        compose_digits(root, train_images=3, val_images=2, size=64, seed=seed)
    assert digest_of(one) == digest_of(same) != digest_of(other)
    told = describe(PRESETS["smoke"].data, one, skip_empty=True)
    assert (told["train_images"], told["val_images"], told["classes"]) == (3, 2, 10)
    assert told["val_objects"] >= 2 and told["digest"] == digest_of(one)


# -- what a run tells ----------------------------------------------------------------------------


def test_a_history_is_thinned_to_windows() -> None:
    steps = [
        {"step": n, "loss": 1.0 * n, "gradient_norm": 3.0 + n % 2, "residual": 0.5}
        for n in range(1, 1001)
    ]
    found = history(steps)
    assert len(found["step"]) == 112 and found["step"][:2] == [9, 18] and found["step"][-1] == 1000
    assert found["loss"][0] == 5 and found["norm_most"][0] == 4
    assert found["norm"][1] == pytest.approx(3.444, abs=1e-3)
    assert found["norm_deviation"][1] == pytest.approx(0.4969, abs=1e-4)
    assert found["residual"] == [0.5] * 112
    assert "residual" not in history([{"step": 1, "loss": 1.0, "gradient_norm": 2.0}])


def test_a_clock_goes_on_and_leaves_evaluations_out(tmp_path: Path) -> None:
    for _ in range(2):
        clock = Clock(tmp_path / "steps.jsonl", os.getppid())
        clock.write({"step": 1, "loss": 1.0})
        time.sleep(0.2)
        clock.write({"step": 1, "scores": {}})
        clock.write({"step": 2, "loss": 1.0})
        clock.close()
    assert len((tmp_path / "steps.jsonl").read_text().splitlines()) == 4
    wall, processor = clock.medians()
    assert 0 < wall < 0.1 and 0 <= processor < 0.1


def test_a_run_ends_when_nobody_waits_for_it(tmp_path: Path) -> None:
    clock = Clock(tmp_path / "steps.jsonl", parent=-1)
    with pytest.raises(SystemExit):
        clock.write({"step": 1, "loss": 1.0})
    clock.close()


# -- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "gpus"], "no preset 'gpus'. Did you mean 'gpu'"),
        (["--only", "rappp"], "no claim 'rappp'. Did you mean 'rap'"),
        (["--jobs", "0"], "--jobs 0: at least 1"),
        (["--preset", "coco"], "give its folder, --data PATH"),
        (["--preset", "coco", "--data", "nowhere"], "no folder annotations/"),
    ],
)
def test_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["claims", "--output", str(tmp_path), *arguments])
    with pytest.raises(SystemExit, match=said):
        main()


def test_data_of_another_kind_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compose_digits(tmp_path / "data", train_images=2, val_images=1, size=64)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["claims", "--output", str(tmp_path), "--data", str(tmp_path / "data")]
    )
    with pytest.raises(SystemExit, match=r"train_images 2 \(wanted: 32\)"):
        main()


def test_results_of_other_code_are_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.claims.results import append

    job = make_job(tmp_path, "deqdet")
    append(tmp_path / "claims-smoke.jsonl", replace(job.record("finished"), code="older"))
    session = Session(PRESETS["smoke"], 2, tmp_path, tmp_path / "work", wide_console())
    assert session.records([job]) == []
    assert "1 result is of other code or data" in " ".join(capsys.readouterr().out.split())
    session.any_version = True
    assert len(session.records([job])) == 1
    assert "taken in" in capsys.readouterr().out


def test_every_preset_is_offered() -> None:
    assert all(name in options().format_help() for name in PRESETS)


def command(folder: Path, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.claims", "--output", str(folder), *more],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Who starts the tests in the background may have told them to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "claims-smoke.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def until(true: Any, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_a_command_that_is_stopped_goes_on(tmp_path: Path) -> None:
    """Ctrl-C where one run is finished and another has begun; then whoever is left is killed."""
    first = command(tmp_path, "--only", "deqdet-rnndet")
    work = tmp_path / "runs" / "claims" / "smoke"
    until(lambda: lines(tmp_path) and len(list(work.glob("*/training/checkpoints/*.pt"))) >= 1)
    os.killpg(first.pid, signal.SIGINT)
    said = first.communicate(timeout=120)[0]
    assert first.returncode == 1 and "Stopped. Finished runs are kept" in said
    assert "Traceback" not in said
    kept = lines(tmp_path)
    second = command(tmp_path, "--only", "deqdet-rnndet")
    said = second.communicate(timeout=600)[0]
    assert second.returncode == 0, said
    assert f"{len(kept)} of them done, {4 - len(kept)} to do" in said
    found = lines(tmp_path)
    assert found[: len(kept)] == kept and len(found) == 4
    assert len({(line["run"], line["seed"]) for line in found}) == 4
    assert any(line["resumed"] for line in found)
    third = command(tmp_path, "--only", "deqdet-rnndet")
    said = third.communicate(timeout=120)[0]
    assert "4 of them done, 0 to do" in said and lines(tmp_path) == found


@pytest.mark.slow
def test_the_smoke_preset_from_nothing_to_the_tables(tmp_path: Path) -> None:
    process = command(tmp_path)
    said = process.communicate(timeout=900)[0]
    assert process.returncode == 0, said
    records, _ = read(tmp_path / "claims-smoke.jsonl")
    assert len(records) == 10 and all(record.finished for record in records)
    for record in records:
        assert [epoch["epoch"] for epoch in record.epochs] == [1, 2]
        assert record.step_seconds > 0 and record.memory["train"] > record.memory["inference"] > 0
        assert record.history["step"] == list(range(1, 9))
        own = record.epochs[-1]["AP"]
        at_end = {"rnndet-6": "5", "adamixer": "6"}.get(record.arms[0], "25")
        (point,) = (
            point
            for point in record.inference["curve"]
            if point["kind"] in ("naive", "layers") and point["setting"] == at_end
        )
        assert point["AP"] == pytest.approx(own, abs=2e-5)
    assert "About" in said and "GiB of memory" in said
    for title in ("Claims: ", "Table 2: ", "Figure 4: ", "Is there a fixed point?"):
        assert title in said
    for plot in ("epochs", "gradients", "refinements", "residuals", "rows"):
        assert (tmp_path / f"claims-smoke-{plot}.png").stat().st_size > 5000
