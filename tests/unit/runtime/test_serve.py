"""serve(): eternal tasks, a drain on the first signal, failures that name the task."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from caesura.runtime.command import leaves
from caesura.runtime.serve import TaskEnded, serve
from caesura_testing.patience import patient


async def _for_ever() -> None:
    await asyncio.Event().wait()


async def test_the_first_signal_drains_then_cancels() -> None:
    story: list[str] = []
    up = asyncio.Event()

    async def work() -> None:
        up.set()
        try:
            await _for_ever()
        finally:
            story.append("cancelled")

    async def drain() -> None:
        story.append("drained")

    running = asyncio.create_task(serve({"work": work}, drain=drain))
    await up.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(patient(5)):
        await running
    assert story == ["drained", "cancelled"]


async def test_after_the_first_signal_the_second_one_kills() -> None:
    up = asyncio.Event()

    async def work() -> None:
        up.set()
        await _for_ever()

    handlers: list[bool] = []

    async def drain() -> None:
        # With the loop's handler gone, the default action stands: the process would die of a second signal.
        handlers.append(asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM))
        handlers.append(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)

    running = asyncio.create_task(serve({"work": work}, drain=drain))
    await up.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(patient(5)):
        await running
    assert handlers == [False, True]


async def test_a_task_that_returns_is_a_failure_and_work_is_drained() -> None:
    drained = asyncio.Event()

    async def short() -> None:
        return

    async def drain() -> None:
        drained.set()

    with pytest.raises(BaseExceptionGroup) as caught:
        await serve({"short": short, "long": _for_ever}, drain=drain)
    (error,) = leaves(caught.value)
    assert isinstance(error, TaskEnded)
    assert "'short' has finished unexpectedly" in str(error)
    assert drained.is_set()


async def test_a_drain_that_hangs_is_cut_off() -> None:
    up = asyncio.Event()

    async def work() -> None:
        up.set()
        await _for_ever()

    running = asyncio.create_task(serve({"work": work}, drain=_for_ever, drain_timeout_s=0.1))
    await up.wait()
    os.kill(os.getpid(), signal.SIGINT)
    async with asyncio.timeout(patient(5)):
        await running
