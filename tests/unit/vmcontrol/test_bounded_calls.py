"""Calls that hang: what they bring late is not kept, and they are not made again while they hang."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from caesura_testing.patience import patient
from caesura_vmcontrol.bounded_calls import CallTimeout, within
from caesura_vmcontrol.process_control import start

LONG_S = patient(20)


def until(holds: Callable[[], bool]) -> None:
    """Wait for a thread or a process."""
    end = time.monotonic() + LONG_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.002)


def started(log: Path) -> None:
    """A program is started with this log, whether or not it answers, and ended."""
    process = start(("/bin/sleep", "600"), (), str(log))
    os.kill(process.pid, signal.SIGKILL)
    os.waitpid(process.pid, 0)


def calls() -> set[threading.Thread]:
    """The threads of bounded calls that have not ended."""
    return {each for each in threading.enumerate() if each.name == "bounded call"}


def test_a_log_that_hangs_costs_one_thread_and_no_descriptor(tmp_path: Path) -> None:
    """A FIFO that nobody reads: its opening blocks, as on a disk that does not answer."""
    log = tmp_path / "log"
    os.mkfifo(log)
    earlier = calls()
    for _ in range(4):
        started(log)
    until(lambda: len(calls() - earlier) == 1)
    reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    try:
        until(lambda: not calls() - earlier)
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        assert poll.poll(LONG_S * 1000) == [(reader, select.POLLHUP)], "nobody has it open for writing"
        started(log)  # it answers again
        assert poll.poll(0) == [(reader, select.POLLHUP)]
    finally:
        os.close(reader)


def test_what_comes_too_late_is_discarded() -> None:
    answers = threading.Event()
    discarded: list[int] = []

    def work() -> int:
        answers.wait()
        return 7

    with pytest.raises(CallTimeout):
        within(0.01, work, key="k", discard=discarded.append)
    assert not discarded
    answers.set()
    until(lambda: discarded == [7])
    until(lambda: within(LONG_S, lambda: 8, key="k", discard=discarded.append) == 8)
    assert discarded == [7], "an answer that was taken is the caller's"


def test_what_hangs_is_not_asked_again_and_others_are() -> None:
    answers = threading.Event()
    asked: list[str] = []

    def ask(path: str) -> str:
        """As a caller writes it: the path is all that tells one question from another."""

        def work() -> str:
            asked.append(path)
            if path == "hangs":
                answers.wait()
            return path

        return within(0.05 if path == "hangs" else LONG_S, work)

    for _ in range(3):
        with pytest.raises(CallTimeout):
            ask("hangs")
    assert ask("answers") == "answers"
    assert asked == ["hangs", "answers"]
    answers.set()

    def answered() -> bool:
        try:
            return within(LONG_S, lambda: "k", key="another") == "k" and ask("hangs") == "hangs"
        except CallTimeout:
            return False

    until(answered)


def test_an_error_is_the_callers() -> None:
    def fail() -> None:
        raise FileNotFoundError("no")

    with pytest.raises(FileNotFoundError):
        within(LONG_S, fail)
