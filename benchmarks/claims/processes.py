"""Processes beside each other: they take turns where they must, and none outlives its command."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def beside(
    tasks: Iterable[T],
    parallel: int,
    start: Callable[[T, int], BaseProcess],
    on_end: Callable[[T, int], None],
) -> None:
    """Do tasks, each in a process of its own, and so many at once.

    Args:
        tasks: in the order in which they are begun.
        parallel: how many at once.
        start: begins the process of a task; told too in which place, of ``parallel``, it works.
        on_end: takes a task that has ended, with the exit code of its process.
    """
    waiting = list(tasks)
    free = list(range(parallel))
    going: dict[int, tuple[BaseProcess, T, int]] = {}
    try:
        while waiting or going:
            while waiting and free:
                task, place = waiting.pop(0), free.pop(0)
                process = start(task, place)
                going[process.sentinel] = process, task, place
            for sentinel in wait(list(going)):
                process, task, place = going.pop(sentinel)  # type: ignore[arg-type]
                process.join()
                free = sorted([*free, place])
                on_end(task, process.exitcode or 0)
    finally:
        for process, _, _ in going.values():
            process.terminate()
        for process, _, _ in going.values():
            process.join()


def started(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A new process that does not hear Ctrl-C: it is for the one that starts it."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    return process


def end_with_parent() -> None:
    """From now on, end this process as soon as the one that started it is gone, even if killed.

    It may be in the middle of anything: what it writes must be there whole or not at all.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Hold a file, once no other process holds it; a process that ends lets go of it."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def alone(folder: Path, name: str = "lock") -> Iterator[None]:
    """No other command works in a folder, or on what is called ``name`` there.

    Raises:
        SystemExit: with a sentence, if one does, or if the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / name, "a")  # noqa: SIM115
    except OSError as error:
        raise SystemExit(
            f"{folder} cannot be written to ({error.strerror}): choose a folder where you may "
            "write, or make room."
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(
                f"Another process works on this preset in {folder}: wait for it, or end it."
            ) from None
        yield
