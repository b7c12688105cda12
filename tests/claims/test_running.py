"""Runs beside each other: none is done twice, none stops the others, none begins without room."""

from __future__ import annotations

import errno
import fcntl
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
import torch
from fake_runs import DATA, make_job

from benchmarks.claims import __main__, cost, jobs, limits, processes, running
from benchmarks.claims.__main__ import Session, at_once, lacking, main, options
from benchmarks.claims.data import describe, digest_of
from benchmarks.claims.jobs import Job
from benchmarks.claims.measuring import Clock, history
from benchmarks.claims.presets import PRESETS
from benchmarks.claims.results import Record, append, read
from benchmarks.measure import wide_console
from detection.data import compose_digits
from detection.training.progress import JsonLines

ROOT = Path(__file__).parents[2]


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
    assert ended["fails"].reason == "ValueError: it cannot be done"
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
    for job_to_retry in (failed, job):
        running.forget(job_to_retry)
    do([failed, job])
    assert (failed.folder / "calls").read_text() == "xx"
    assert (job.folder / "calls").read_text() == "x"  # a result is not forgotten


def test_a_run_ends_with_its_command(tmp_path: Path) -> None:
    """It holds its folder until then, so that a successor waits."""
    code = f"import fake_runs, pathlib; fake_runs.command(pathlib.Path({str(tmp_path)!r}))"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment)
    folder = make_job(tmp_path, "waits").folder
    until((folder / "calls").exists)
    assert not is_free(folder / "lock")
    parent.kill()
    parent.wait()
    until(lambda: is_free(folder / "lock"), seconds=60)
    assert not (folder / "record.json").exists()


def is_free(path: Path) -> bool:
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def test_what_is_held_is_held_in_turn(tmp_path: Path) -> None:
    order = []

    def second() -> None:
        with processes.in_turn(tmp_path / "lock"):
            order.append("second")

    with processes.in_turn(tmp_path / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


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
    every = [make_job(tmp_path, arm, seed) for seed in (0, 1) for arm in ("a", "b")]
    done = [every[0].record("finished"), every[1].record("failed", reason="no")]
    assert running.remaining(every, done, retry=False) == every[2:]
    assert running.remaining(every, done, retry=True) == every[1:]


def test_all_arms_have_their_first_seed_first(tmp_path: Path) -> None:
    every = running.jobs_of(PRESETS["cpu"], tmp_path, DATA, "abc", tmp_path / "work", 2)
    assert [job.recipe.seed for job in every] == [0] * 5 + [1] * 5 + [2] * 5
    assert len({job.folder for job in every}) == 15
    assert all(job.code in job.folder.name and "def" in job.folder.name for job in every)


def test_two_processes_do_not_work_on_one_preset(tmp_path: Path) -> None:
    with (
        processes.alone(tmp_path),
        pytest.raises(SystemExit, match="Another process works on this preset"),
        processes.alone(tmp_path),
    ):
        pass
    with processes.alone(tmp_path):  # and it is free again
        pass


def test_two_commands_do_not_write_one_file_of_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They work in two folders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["claims", "--output", str(tmp_path / "results")])
    with (
        processes.alone(tmp_path / "results", ".claims-smoke.jsonl.lock"),
        pytest.raises(SystemExit, match="Another process works on this preset in .*results"),
    ):
        main()


def test_weights_alone_are_no_training_to_resume(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "step_000007.safetensors").touch()
    assert not jobs.resumable(tmp_path)
    (checkpoints / "step_000007.training.pt").touch()
    assert jobs.resumable(tmp_path)


def test_what_a_run_needs_to_go_on_stays_until_its_record_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(tmp_path, "fine")
    checkpoints = job.folder / "training" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for name in ("step_000007.safetensors", "step_000007.training.pt", "best.safetensors"):
        (checkpoints / name).touch()
    monkeypatch.setattr(jobs, "check_code", lambda code: None)
    monkeypatch.setattr(jobs, "perform", lambda job: job.record("finished"))
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "write", no_room)
        with pytest.raises(SystemExit):
            jobs.finish(job)
    assert "Its record could not be written" in capsys.readouterr().out.splitlines()[-1]
    assert jobs.resumable(job.folder / "training")
    jobs.finish(job)
    found = jobs.left_behind(job)
    assert found is not None and found.finished
    assert [path.name for path in checkpoints.iterdir()] == ["step_000007.safetensors"]


def no_room(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_runs_are_spread_over_the_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    job = replace(make_job(tmp_path, "a"), device="cuda")
    cards = [jobs.on_card(job, place).device for place in range(3)]
    assert cards == ["cuda:0", "cuda:1", "cuda:0"]
    assert jobs.on_card(make_job(tmp_path, "a"), 1).device == "cpu"
    assert jobs.on_card(job, 1).record("finished").place == "cuda"
    monkeypatch.setattr(__main__, "cores", lambda: 20)
    assert [at_once(PRESETS[name]) for name in ("cpu", "gpu", "coco")] == [2, 20, 2]


def test_a_place_is_free_again_when_its_task_has_ended() -> None:
    places, ended = {}, []

    class Process:
        exitcode = 0

        def __init__(self) -> None:
            self.sentinel, self.held = os.pipe()

        def end(self) -> None:
            os.close(self.held)

        def join(self) -> None:
            os.close(self.sentinel)

    first = Process()

    def start(task: str, place: int) -> Any:
        places[task] = place
        if task == "first":
            return first
        process = Process()
        process.end()
        return process

    def on_end(task: str, code: int) -> None:
        ended.append(task)
        if task == "third":
            first.end()

    processes.beside(["first", "second", "third"], 2, start, on_end)
    assert places == {"first": 0, "second": 1, "third": 1}
    assert ended == ["second", "third", "first"]


def test_a_record_says_what_it_is_of(tmp_path: Path) -> None:
    record = make_job(tmp_path, "a").record("finished")
    assert record.place == "cpu" and record.commit == jobs.commit()
    (tmp_path / "weights").write_bytes(b"abc")
    assert jobs.digest_of_weights(str(tmp_path / "weights")).startswith("ba7816bf8f01cfea")
    assert jobs.digest_of_weights("") == ""


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
    timing = cost.Timing(1, 0.1, weights=2**20, checkpoint=2**30, peak=2**28, host=2**28)
    monkeypatch.setattr(
        cost, "measure", lambda jobs, parallel, cache: ({job.run: timing for job in jobs}, {})
    )
    monkeypatch.setattr(running, "run", lambda *args: pytest.fail("a run was begun"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, 2**31))
    size = replace(PRESETS["smoke"], data=replace(PRESETS["smoke"].data, kind="folder"))
    session = Session(size, 2, tmp_path, tmp_path / "work", wide_console())
    with pytest.raises(SystemExit, match=r"The checkpoints need 8\.0 GiB .* 2\.0 GiB free"):
        session.go(tmp_path / "data", dry=False, retry=False)


def test_a_full_disk_stops_nothing_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run fails as it is timed; the others end, and cannot be written down at first."""
    monkeypatch.chdir(tmp_path)
    compose_digits(tmp_path / "data", train_images=2, val_images=1, size=64)
    timing = cost.Timing(1, 0.1, weights=1, checkpoint=1, peak=1, host=1)

    def measure(jobs: list[Job], parallel: int, cache: Path) -> Any:
        runs = list(dict.fromkeys(job.run for job in jobs))
        return dict.fromkeys(runs[1:], timing), {runs[0]: "ValueError: [/no]"}

    def run(every: list[Job], parallel: int, on_end: Any) -> None:
        for job in every:
            job.folder.mkdir(parents=True)
            record = job.record("finished", epochs=[{"epoch": 1, "AP": 0.4}])
            jobs.write(job.result, record)
            on_end(job, record)

    monkeypatch.setattr(cost, "measure", measure)
    monkeypatch.setattr(running, "run", run)
    monkeypatch.setattr(__main__, "show", lambda *arguments: None)
    data = replace(PRESETS["smoke"].data, kind="folder")
    size = replace(PRESETS["smoke"], data=data, teaching=0)
    session = Session(size, 2, tmp_path, tmp_path / "work", wide_console())
    with monkeypatch.context() as patch:
        patch.setattr(__main__, "append", no_room)
        session.go(tmp_path / "data", dry=False, retry=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "ValueError: [/no]" in said and "8 of 8" in said
    assert "claims-smoke.jsonl could not be written ([Errno 28]" in said
    assert not (tmp_path / "claims-smoke.jsonl").exists()
    session.go(tmp_path / "data", dry=True, retry=False)
    assert "8 of them done, 2 to do" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(running, "run", lambda *arguments: pytest.fail("done twice"))
    session.go(tmp_path / "data", dry=False, retry=False)
    records, _ = read(tmp_path / "claims-smoke.jsonl")
    assert [record.finished for record in records] == [True] * 8 + [False] * 2
    assert records[-1].reason == "A few steps were to be timed. ValueError: [/no]"


def test_an_arm_that_cannot_be_timed_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "time_one", fake_runs.time_one)
    every = [make_job(tmp_path, arm) for arm in ("killed", "fails", "fine")]
    timings, reasons = cost.measure(every, 3, tmp_path / "timings.json")
    assert list(timings) == ["run of fine"] and timings["run of fine"].host == 4
    assert "ended by signal 9" in reasons["run of killed"]
    assert reasons["run of fails"].endswith("with 1: ValueError: it cannot be done")
    monkeypatch.setattr(cost, "time_one", lambda job, path: pytest.fail("it is known"))
    assert cost.measure(every[2:], 3, tmp_path / "timings.json") == (timings, {})


def test_a_time_is_that_of_steps_evaluations_and_study(tmp_path: Path) -> None:
    job = make_job(tmp_path, "deqdet")
    timing = cost.Timing(2.0, 0.25, weights=10, checkpoint=100, peak=1, host=1)
    # 4 epochs of 3 steps, 2 evaluations of 10 images; 50 refinements of 25 of each of 10 images,
    # and 1200 of 4 images; 27 scorings of 10 images.
    expected = 12 * 2 + 2 * 10 * 0.25 + 0.01 * (50 * 10 + 1200 * 4) + 27 * 10 * cost.SCORING
    assert cost.minutes(job, timing) == pytest.approx(expected / 60)
    half = expected - 6 * 2 - 10 * (0.25 + cost.SCORING)
    assert cost.minutes(job, timing, done=6) == pytest.approx(half / 60)
    assert cost.minutes(job, timing, done=12) < cost.minutes(job, timing, done=11)
    assert cost.wall([5.0, 3.0, 3.0, 2.0], 2) == 7.0
    timings = {job.run: timing}
    assert cost.disk_needed([job, job], timings, 2) == 2 * 10 + 2 * cost.KEPT * 100


def test_a_run_to_resume_has_steps_done(tmp_path: Path) -> None:
    job = make_job(tmp_path, "deqdet")
    checkpoints = job.folder / "training" / "checkpoints"
    checkpoints.mkdir(parents=True)
    with JsonLines(job.folder / "training" / "log.jsonl") as log:
        for step in (1, 2, 3):
            log.write({"step": step, "loss": 1.0})
    assert job.steps_done() == 0  # there is no checkpoint
    (checkpoints / "step_000002.training.pt").touch()
    assert job.steps_done() == 3
    (job.folder / "training" / "log.jsonl").write_text("{\n")
    assert job.steps_done() == 0


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
        clock = Clock(tmp_path / "steps.jsonl")
        clock.write({"step": 1, "loss": 1.0})
        time.sleep(0.2)
        clock.write({"step": 1, "scores": {}})
        clock.write({"step": 2, "loss": 1.0})
        clock.close()
    assert len((tmp_path / "steps.jsonl").read_text().splitlines()) == 4
    wall, processor = clock.medians()
    assert 0 < wall < 0.1 and 0 <= processor < 0.1


def test_a_clock_keeps_what_it_was_told_at_once(tmp_path: Path) -> None:
    clock = Clock(tmp_path / "steps.jsonl")
    wall, processor = clock.medians()
    assert wall != wall and processor != processor  # NaN: no step was timed
    clock.write({"step": 1, "loss": 1.0})
    assert len((tmp_path / "steps.jsonl").read_text().splitlines()) == 1  # and it is not closed
    with open(tmp_path / "steps.jsonl", "a") as file:
        file.write('[9.0, 9.\n[9.0, 9.[8.0, 8.0]\n"x"\n3\n')  # as cut short
    assert clock.medians()[0] < 1
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
        (["--output", __file__], "cannot be written to"),
    ],
)
def test_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["claims", "--output", str(tmp_path), *arguments])
    with pytest.raises(SystemExit, match=said):
        main()


def test_a_missing_gpu_is_told_of_before_anything_is_composed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["claims", "--output", str(tmp_path), "--preset", "gpu"])
    with pytest.raises(SystemExit, match="needs a CUDA device, and there is none"):
        main()
    assert not (tmp_path / "data").exists()


def test_where_results_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the smoke preset are not among what is kept."""
    went = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(__main__, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(
        Session, "go", lambda self, *arguments: went.update({self.size.name: self.path})
    )
    for name in ("smoke", "cpu"):
        monkeypatch.setattr(sys, "argv", ["claims", "--preset", name])
        main()
    assert went["smoke"] == Path("runs") / "claims" / "smoke" / "claims-smoke.jsonl"
    assert went["cpu"] == tmp_path / "results" / "claims-cpu.jsonl"


def test_arms_that_a_claim_wants_and_a_preset_lacks_are_told_of() -> None:
    (said,) = lacking(PRESETS["cpu"], ["rag", "rap"])
    assert said.startswith("rag: the preset 'cpu' has no run of rag-1, so")
    assert list(lacking(PRESETS["coco"], ["rag", "4c"])) == []


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
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "claims-smoke.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def until(true: Any, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_ctrl_c_is_answered_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["claims"])
    monkeypatch.setattr(Session, "go", stopped)
    with pytest.raises(SystemExit, match=r"Stopped\. Finished runs are kept"):
        main()


@pytest.mark.slow
def test_a_command_that_is_killed_goes_on(tmp_path: Path) -> None:
    """It is killed where one run is finished and another has begun, and called again at once."""
    first = command(tmp_path, "--only", "deqdet-rnndet")
    work = tmp_path / "runs" / "claims" / "smoke"
    until(lambda: lines(tmp_path) and len(list(work.glob("*/training/checkpoints/*.pt"))) >= 1)
    first.kill()
    first.wait()
    assert first.stdout is not None
    first.stdout.close()
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
    (backbone,) = {record.backbone for record in records}
    assert len(backbone) == 64
    for record in records:
        assert record.place == "cpu" and record.commit[:40] == jobs.commit()[:40]
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
