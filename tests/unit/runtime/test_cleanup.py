"""Clean-up that nothing cuts short."""

from __future__ import annotations

import asyncio
import os
import signal
import threading

import pytest

from caesura.runtime.cleanup import shielded, undisturbed


async def test_what_is_shielded_ends_however_often_its_caller_is_cancelled() -> None:
    go, story = asyncio.Event(), []

    async def work() -> None:
        story.append("began")
        await go.wait()
        story.append("ended")

    caller = asyncio.create_task(shielded(work()))
    for _ in range(3):
        await asyncio.sleep(0)
        caller.cancel()
    await asyncio.sleep(0)
    assert story == ["began"]
    assert not caller.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert story == ["began", "ended"]


async def test_without_a_cancellation_it_is_as_if_it_were_awaited() -> None:
    async def work() -> int:
        return 7

    async def fail() -> int:
        raise ValueError("no")

    assert await shielded(work()) == 7
    with pytest.raises(ValueError, match="no"):
        await shielded(fail())


async def test_a_failure_during_a_cancellation_is_its_cause() -> None:
    go = asyncio.Event()

    async def fail() -> None:
        await go.wait()
        raise ValueError("no")

    caller = asyncio.create_task(shielded(fail()))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.sleep(0)
    go.set()
    with pytest.raises(asyncio.CancelledError) as caught:
        await caller
    assert isinstance(caught.value.__cause__, ValueError)


def test_signals_are_put_off_until_the_end_of_the_block() -> None:
    story = []
    before = signal.signal(signal.SIGTERM, lambda *_: story.append("signal"))
    try:
        with undisturbed():
            os.kill(os.getpid(), signal.SIGTERM)
            story.append("block")
        story.append("after")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert story == ["block", "signal", "after"]


def test_in_another_thread_it_changes_nothing() -> None:
    masks: list[set[signal.Signals | int]] = []

    def look() -> None:
        with undisturbed():
            masks.append(set(signal.pthread_sigmask(signal.SIG_BLOCK, ())))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert masks == [set(signal.pthread_sigmask(signal.SIG_BLOCK, ()))]
