"""One process, and two that talk through gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from detection.distributed import Distributed, init_from_environment

TWO_PROCESSES = """
import json, torch
from detection.data.types import Target
from detection.distributed import init_from_environment
from detection.training.losses import matched_queries

with init_from_environment("cpu") as here:
    given = torch.tensor([1.0, 10.0 * here.rank])
    mean = here.all_reduce_mean(given)
    objects = 5 * here.rank
    target = Target(torch.zeros(objects, 4), torch.zeros(objects, dtype=torch.int64), 1, (8, 8))
    answer = {
        "rank": here.rank,
        "is_main": here.is_main,
        "given": given.tolist(),
        "mean": mean.tolist(),
        "objects": here.gather_objects({"rank": here.rank}),
        "normaliser": float(matched_queries([target], 3, here)),
    }
    here.barrier()
print(json.dumps(answer), torch.distributed.is_initialized())
"""


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with init_from_environment("cpu") as here:
        assert (here.rank, here.world_size, here.device) == (0, 1, torch.device("cpu"))
        assert here.is_main
        value = torch.tensor(2.0)
        assert here.all_reduce_mean(value) is value
        assert here.gather_objects({"a": 1}) == [{"a": 1}]
        here.barrier()
    assert not torch.distributed.is_initialized()


def test_only_rank_zero_is_main() -> None:
    assert [Distributed(rank, 2).is_main for rank in range(2)] == [True, False]


def test_two_processes_share_means_and_objects() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES],
            env={
                **os.environ,
                **common,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (output, errors) in enumerate(outputs):
        assert output, errors
        answer, closed = output.strip().rsplit(" ", 1)
        assert closed == "False"
        assert json.loads(answer) == {
            "rank": rank,
            "is_main": rank == 0,
            "given": [1.0, 10.0 * rank],
            "mean": [1.0, 5.0],
            "objects": [{"rank": 0}, {"rank": 1}],
            # min(3 queries, 0 objects) and min(3, 5): their mean.
            "normaliser": 1.5,
        }


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
def test_half_an_environment_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for each in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(each, "2")
    if name == "WORLD_SIZE":
        monkeypatch.setenv(name, "two")
    else:
        monkeypatch.delenv(name)
    with pytest.raises(RuntimeError, match=f"variable {name} is .*torchrun"):
        init_from_environment("cpu")


def test_absent_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="'cuda' was asked for"):
        init_from_environment("cuda")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=r"Process 1 .* has no GPU: there are 1"):
        init_from_environment()
