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


@pytest.mark.parametrize("others", [0, 3])
def test_signals_are_put_off_until_the_end_of_the_block(others: int) -> None:
    """Also where the kernel gives the signal to another thread, which has a mask of its own."""
    story = []
    end = threading.Event()
    threads = [threading.Thread(target=end.wait) for _ in range(others)]
    for thread in threads:
        thread.start()
    before = signal.signal(signal.SIGTERM, lambda *_: story.append("signal"))
    try:
        with undisturbed():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            story.append("block")
        story.append("after")
    finally:
        signal.signal(signal.SIGTERM, before)
        end.set()
        for thread in threads:
            thread.join()
    assert story == ["block", "signal", "after"]


async def test_an_event_loop_gets_a_signal_that_was_put_off_once() -> None:
    loop, seen = asyncio.get_running_loop(), list[str]()
    told = asyncio.Event()

    def handle() -> None:
        seen.append("signal")
        told.set()

    loop.add_signal_handler(signal.SIGHUP, handle)
    try:
        with undisturbed():
            os.kill(os.getpid(), signal.SIGHUP)
            seen.append("block")
        await told.wait()
        for _ in range(3):
            await asyncio.sleep(0)
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
    assert seen == ["block", "signal"]


def test_in_another_thread_it_changes_nothing() -> None:
    handlers = []

    def look() -> None:
        with undisturbed():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]
