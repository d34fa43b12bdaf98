"""Comparing the memory of both processes of a swap inside its pause: opened before it, in threads, every wait bounded."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Executor
from contextlib import suppress

from caesura_host_updater.drivers.port import SwapFailed
from caesura_host_updater.drivers.qemu.commandline import GuestRam
from caesura_host_updater.drivers.qemu.memory_comparison import (
    Compared,
    NoView,
    OtherMemory,
    Views,
    open_views,
)
from caesura_vmcontrol.qemu_plans import SwapPlan

_VIEWS_S = 2.0  # s: to find and open both processes' mappings of the RAM, before the pause: 3 ms is usual


async def find_views(memory: GuestRam | str, plan: SwapPlan, seed: str, threads: Executor) -> Views | str:
    """What is compared inside the pause, opened before it; or why nothing can be.

    Args:
        memory: the guest's RAM; a text says why there is none that can be compared.
        seed: which pages are compared follows from it.

    Raises:
        SwapFailed: the new process has other memory.
    """
    if isinstance(memory, str):
        return memory
    opening = asyncio.get_running_loop().run_in_executor(
        threads, open_views, plan.old.pid, plan.new.pid, memory.file, memory.size, seed
    )
    done, _ = await asyncio.wait({opening}, timeout=_VIEWS_S)
    if not done:
        opening.add_done_callback(lambda task: task.cancelled() or task.exception())
        return f"the mappings of its RAM were not found within {_VIEWS_S:g} s"
    try:
        return opening.result()
    except OtherMemory as error:
        raise SwapFailed(plan.vm, f"the new process has other memory than the guest: {error}") from error
    except NoView as error:
        return str(error)


async def compare(views: Views | str) -> Compared:
    """The result of comparing the pages; ``views``: a text says why nothing can be compared."""
    if isinstance(views, str):
        return Compared(None, views)
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Compared] = loop.create_future()

    def report(found: Compared) -> None:
        if not done.done():
            done.set_result(found)

    def work() -> None:
        found = views.compare()
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(report, found)

    # A thread of its own inherits the priority of this one, which is boosted; one of the pool would wait for a time slice.
    threading.Thread(target=work, name="compare", daemon=True).start()
    return await done
