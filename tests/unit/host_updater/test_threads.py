"""Work that hangs: it keeps neither the event loop nor other work from going on."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from caesura.runtime.threads import Worker, in_thread, in_thread_to_its_end
from caesura_host_updater import spawn, update_process
from caesura_host_updater.inventory.updates import UpdateFile
from caesura_host_updater.spawn import start_detached
from caesura_host_updater.update_process import UpdateNotStarted, UpdateProcess
from caesura_testing.patience import patient
from caesura_vmcontrol import process_control
from caesura_vmcontrol.bounded_read import environs, read_each
from caesura_vmcontrol.process_control import find_by_env
from caesura_vmcontrol.procfs import read_process


async def until(holds: Callable[[], bool]) -> None:
    """Wait for a thread or a process."""
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 - nobody calls us
            await asyncio.sleep(0.005)


async def test_what_it_returns_and_raises() -> None:
    assert await in_thread("sum", lambda: 1 + 1) == 2
    with pytest.raises(ZeroDivisionError):
        await in_thread("slip", lambda: 1 / 0)


async def test_a_hundred_that_hang_do_not_keep_another_from_its_work() -> None:
    answers = threading.Event()
    hung = [asyncio.create_task(in_thread("hangs", answers.wait)) for _ in range(100)]
    assert await in_thread("works", lambda: "done") == "done"
    for each in hung:
        each.cancel()
    await asyncio.gather(*hung, return_exceptions=True)
    answers.set()


async def test_cancelled_it_is_told_and_waited_for() -> None:
    begun, ended = threading.Event(), threading.Event()

    def work(stop: threading.Event) -> None:
        begun.set()
        stop.wait()
        ended.set()

    task = asyncio.create_task(in_thread_to_its_end("work", work))
    await until(begun.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_a_lane_keeps_the_order_and_survives_what_fails() -> None:
    worker, done = Worker("worker"), list[int]()
    for number in range(100):
        worker.post(lambda number=number: done.append(number))  # type: ignore[misc]
    worker.post(lambda: done.append(1 // 0))
    with pytest.raises(ZeroDivisionError):
        await worker.do(lambda: 1 / 0)
    assert await worker.do(lambda: list(done)) == list(range(100))
    assert await worker.close(20)
    assert await worker.do(lambda: "again") == "again"
    assert await worker.close(20)


async def test_a_lane_that_hangs_does_not_hold_up_the_end() -> None:
    worker, disk = Worker("worker"), threading.Event()

    def hang() -> None:
        disk.wait()

    worker.post(hang)
    assert not await worker.close(0.05)
    disk.set()


def readers() -> set[threading.Thread]:
    """The threads that read a file, or have just done so."""
    return {each for each in threading.enumerate() if each.name == "bounded read"}


def test_a_file_that_hangs_does_not_keep_the_others_from_being_read(tmp_path: Path) -> None:
    """A FIFO without a writer: as /proc/PID/environ of a process that is stuck in the kernel."""
    for name in ("a", "c"):
        (tmp_path / name).write_text(name)
    for name in ("b", "d"):
        os.mkfifo(tmp_path / name)
    paths = [str(tmp_path / name) for name in "abcde"]
    earlier = readers()
    found = dict(read_each(paths, 0.05))
    assert found == {paths[0]: b"a", paths[1]: None, paths[2]: b"c", paths[3]: None}
    assert dict(read_each(paths, patient(5))) == found, "what hangs is not waited for again"
    until = time.monotonic() + patient(10)
    while len(readers() - earlier) != 2:
        assert time.monotonic() < until, "it costs one thread each, and no further one"
        time.sleep(0.002)
    for name in ("b", "d"):
        (tmp_path / name).write_text("")  # its thread comes back, some time soon
        (tmp_path / name).unlink()
        (tmp_path / name).touch()
    until = time.monotonic() + patient(10)
    while dict(read_each(paths)) != {**found, paths[1]: b"", paths[3]: b""}:
        assert time.monotonic() < until, "a file that answered at last is read again"


def test_processes_are_found_by_their_environment() -> None:
    name = f"CAESURA_TEST_MARK={os.getpid()}"
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], env=dict([name.split("=")])
    )
    try:
        assert [each.pid for each in find_by_env(name)] == [process.pid]
        assert dict(environs([process.pid]))[process.pid] >= {name.encode()}
    finally:
        process.kill()
        process.wait()


class Exec:
    """``subprocess.Popen`` of a program on a file system that does not answer until the test lets it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, where: Any) -> None:
        self.begun = threading.Event()
        self.answers = threading.Event()
        self.started: list[int] = []
        real = subprocess.Popen

        def popen(*arguments: Any, **options: Any) -> Any:
            self.begun.set()
            self.answers.wait()
            process = real(*arguments, **options)
            self.started.append(process.pid)
            return process

        monkeypatch.setattr(where.subprocess, "Popen", popen)


def update(**changes: Any) -> UpdateFile:
    facts: dict[str, Any] = {
        "name": "patch",
        "impact": "pause",
        "scope": "host",
        "argv": ("sleep", "600"),
        "expected_s": 1.0,
        "timeout_s": 5.0,
    }
    return UpdateFile(**(facts | changes))


async def test_an_update_that_could_not_be_started_in_time_is_killed_when_it_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = Exec(monkeypatch, update_process)
    process = UpdateProcess(update(), os.environ)
    starting = asyncio.create_task(process.start())
    await until(program.begun.is_set)  # and the loop turns, or this would not end
    process.end(signal.SIGKILL)
    program.answers.set()
    with pytest.raises(UpdateNotStarted, match="was ended before it began"):
        await starting
    assert read_process(program.started[0]) is None
    process.close()


async def test_an_update_that_starts_when_its_operation_is_over_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = Exec(monkeypatch, update_process)
    process = UpdateProcess(update(), os.environ)
    starting = asyncio.create_task(process.start())
    await until(program.begun.is_set)
    starting.cancel()
    process.close()
    program.answers.set()
    await until(lambda: bool(program.started) and read_process(program.started[0]) is None)


async def test_a_process_that_nobody_waits_for_any_more_does_not_stay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = Exec(monkeypatch, process_control)
    starting = asyncio.create_task(start_detached(["sleep", "600"], os.environ, tmp_path / "log"))
    await until(program.begun.is_set)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    program.answers.set()
    await until(lambda: bool(program.started) and read_process(program.started[0]) is None)


async def test_a_start_that_is_cancelled_leaves_no_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the moment in which the process runs and nobody has its pid yet; whoever waits hears of it when it is dead."""
    started: list[int] = []
    real = spawn.spawn_detached

    def spawn_and_cancel(*arguments: Any) -> int:
        started.append(real(*arguments))
        starting.get_loop().call_soon_threadsafe(starting.cancel)
        return started[0]

    monkeypatch.setattr(spawn, "spawn_detached", spawn_and_cancel)
    monkeypatch.setattr(spawn, "_UNWANTED_S", 20.0)
    starting = asyncio.create_task(start_detached(["sleep", "600"], os.environ, tmp_path / "log"))
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert read_process(started[0]) is None


def test_starting_a_program_never_holds_the_interpreter() -> None:
    """With vfork(2) Python's lock is held until the program was executed: no thread would help."""
    assert subprocess._USE_VFORK is False
