"""Work that may wait for a disk, the kernel or a program, in a thread of its own.

Not ``asyncio.to_thread``: its pool has a few threads, and some that hang would take it from the resume of other VMs,
and keep the service from ending. These threads are daemons, and nobody waits for one that hangs.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


async def in_thread(name: str, work: Callable[[], T]) -> T:
    """What ``work`` returns or raises. Cancelled, it leaves the thread to itself.

    ``name``: of the thread, for people.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = work()
        except BaseException as raised:  # noqa: BLE001 - it is raised where it is awaited
            error = raised
        with suppress(RuntimeError):  # the loop was closed: nobody waits
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await done


async def in_thread_to_its_end(name: str, work: Callable[[threading.Event], T]) -> T:
    """As ``in_thread``, for work that must not continue in the background: cancelled, it is asked to end and waited for.

    ``work`` is given the event that asks it to end, and looks at it before everything that cannot be undone.
    """
    stop = threading.Event()
    running = asyncio.ensure_future(in_thread(name, lambda: work(stop)))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # taken note of
        raise
