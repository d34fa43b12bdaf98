"""Work that may wait for a disk, the kernel or a program, in a thread of its own.

Not ``asyncio.to_thread``: its pool has a few threads, and a few that hang would take them away from the resume of other VMs,
and keep the service from ending. These threads are daemons, and nobody waits for one that hangs.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from queue import SimpleQueue
from typing import TypeVar

from caesura.runtime.logs import get_logger

T = TypeVar("T")
_log = get_logger("caesura.runtime.threads")


async def in_thread(name: str, work: Callable[[], T]) -> T:
    """What ``work`` returns or raises. When cancelled, it abandons the thread.

    ``name``: of the thread, for people.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()
    threading.Thread(target=_report, args=(loop, done, work), name=name, daemon=True).start()
    return await done


async def in_thread_to_its_end(name: str, work: Callable[[threading.Event], T]) -> T:
    """As ``in_thread``, for work that must not continue in the background: when cancelled, it requests its end and waits for it.

    ``work`` receives the event that requests its end, and checks it before every step that cannot be undone.
    """
    stop = threading.Event()
    running = asyncio.ensure_future(in_thread(name, lambda: work(stop)))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # mark it as retrieved
        raise


def meanwhile(name: str, work: Callable[[], T], every_s: float, sign: Callable[[], None]) -> T:
    """What ``work`` returns or raises, from a thread of its own; in this one, ``sign`` is called every so many seconds until then.

    When ``sign`` raises, that is raised, and the thread is abandoned.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - it is raised where it is awaited
            done.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    while not wait([done], timeout=every_s).done:
        sign()
    return done.result()


class Worker:
    """One thread that runs its work items one by one, in the order in which they were posted.

    Unlike a pool's, its thread is a daemon: one that hangs does not keep the service from ending.

    Args:
        name: of the thread, for people.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def post(self, work: Callable[[], None]) -> None:
        """Run ``work`` later; an exception is logged."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        self._jobs.put(work)

    async def do(self, work: Callable[[], T]) -> T:
        """What ``work`` returns or raises, after everything that was posted before. When the caller is cancelled, it is done anyway."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        self.post(lambda: _report(loop, done, work))
        return await done

    async def close(self, patience_s: float) -> bool:
        """Finish the posted work and end the thread; false: it hangs, and is abandoned after that time."""
        if self._thread is None:
            return True
        finished = True
        try:
            async with asyncio.timeout(patience_s):
                await self.do(lambda: None)
        except TimeoutError:
            finished = False
        self.end()
        return finished

    def end(self) -> None:
        """Make the thread end after the posted work, without waiting; later work is done by another thread."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread = None
            self._jobs = SimpleQueue()

    def _work(self) -> None:
        jobs = self._jobs
        while (job := jobs.get()) is not None:
            try:
                job()
            except Exception:  # noqa: BLE001 - the next job must be done all the same
                _log.exception("worker.job_failed", worker=self._name)


def _report(loop: asyncio.AbstractEventLoop, done: asyncio.Future[T], work: Callable[[], T]) -> None:
    """Run ``work`` in a thread and settle ``done`` in its loop."""

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    result: T | None = None
    failed: BaseException | None = None
    try:
        result = work()
    except BaseException as error:  # noqa: BLE001 - it is raised where it is awaited
        failed = error
    with suppress(RuntimeError):  # the loop was closed: there is no waiter
        loop.call_soon_threadsafe(settle, result, failed)
